"""What is evaluated: a Case is one hole to fill, a Task says how a benchmark's rows become cases and answers.

Owns the reading of JSONL and Parquet files and their refusal by line number. Knows no benchmark (tasks/), no engine, no
metric.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeVar

from megatron_infer.sampling_params import SamplingParams
from megatron_infer.text.fim import FimOptions, FimPrompt

Row = Mapping[str, Any]
"""One line of a benchmark file."""
T = TypeVar("T")


@dataclass(frozen=True)
class Case:
    """One hole to fill.

    task_id: unique in its file. reference: the text that stood there, where the benchmark tells.
    language: a name that syntax.py knows (python, java, cpp, ...) or "". scenario: the kind of hole, or "".
    cluster: the problem or file that it shares with other cases, or "": these are not independent observations.
    row: the line it was read from.
    """

    task_id: str
    prompt: FimPrompt
    reference: str | None = None
    language: str = ""
    scenario: str = ""
    row: Row = field(default_factory=dict, repr=False)
    cluster: str = ""


@dataclass(frozen=True)
class Task:
    """A benchmark: its fields, its prompt, its post-processing and its output format.

    about: where these conventions come from. source, licence, files: where the data is, under what licence ("" where
    none is stated), and SHA-256 of its files by name, as far as known.
    read: a row to a case; raises KeyError for a missing field, ValueError for a wrong one.
    options: the prompt's layout. sampling: the published settings.
    cuts: the published post-processing of a completion's text, by name; the first is the official one.
    output: the field of the completion in the row that the official scorer reads, and attributes of the case beside it.
    metrics: names in metrics.METRICS. program: the test program around an answer, for pass@k; None where there is none.
    """

    name: str
    about: str
    read: Callable[[Row], Case]
    options: FimOptions
    sampling: SamplingParams
    cuts: Mapping[str, Callable[[Case, str], str]]
    metrics: tuple[str, ...]
    output: tuple[str, ...] = ("completion",)
    program: Callable[[Case, str], str] | None = None
    source: str = ""
    licence: str = ""
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def official_cut(self) -> str:
        """The name of the official post-processing."""
        return next(iter(self.cuts))

    def finish(self, case: Case, text: str) -> str:
        """The official post-processing of a completion's text."""
        return self.cuts[self.official_cut](case, text)

    def predict(self, case: Case, completion: str) -> dict[str, Any]:
        """The row that the official scorer reads."""
        beside = {name: getattr(case, name) for name in self.output[1:]}
        return {"task_id": case.task_id, self.output[0]: completion, **beside}


def read_cases(path: str | Path, task: Task) -> list[Case]:
    """Every case of a `.jsonl`, `.jsonl.gz` or `.parquet` file, in its order.

    Raises ValueError: the file cannot be read; a line is not a JSON object, lacks a field of `task` or repeats a
    task_id (the message names the line); or there is no case at all.
    """
    cases: list[Case] = []
    lines: dict[str, int] = {}
    for number, case in read_as(path, task.read, f"task {task.name!r}"):
        if case.task_id in lines:
            raise ValueError(
                f"{path}, line {number}: task_id {case.task_id!r} stands in line {lines[case.task_id]} already"
            )
        lines[case.task_id] = number
        cases.append(case)
    if not cases:
        raise ValueError(f"{path} holds no case")
    return cases


def read_as(path: str | Path, read: Callable[[Row], T], reader: str) -> Iterator[tuple[int, T]]:
    """Line numbers and what `read` makes of the rows; ValueError, naming the line, for what it refuses."""
    for number, row in read_rows(path):
        try:
            value = read(row)
        except KeyError as error:
            raise ValueError(
                f"{path}, line {number}: no field {error.args[0]!r}, which {reader} reads; the line has "
                + ", ".join(row)
            ) from None
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        yield number, value


def read_rows(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers from 1 and JSON objects of a `.jsonl` or `.jsonl.gz` file, or rows of a `.parquet` file.

    Blank lines are passed over.

    Raises ValueError: the file cannot be read, a line is not a JSON object in UTF-8, or pyarrow is not installed.
    """
    if Path(path).suffix == ".parquet":
        yield from enumerate(_parquet_rows(Path(path)), start=1)
        return
    number = 0
    try:
        with _open(Path(path)) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError(f"a JSON object is needed, not {type(row).__name__}")
                    yield number, row
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}, line {max(number, 1)}: {error}") from None


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise ValueError("Parquet files need the package 'pyarrow'; pip install 'megatron_infer[parquet]'") from None
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        raise ValueError(f"cannot read {path}: {error}") from None
