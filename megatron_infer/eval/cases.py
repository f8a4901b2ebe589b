"""What is evaluated: a Case is one hole to fill, a Task says how a benchmark's rows become cases and answers.

Owns the reading of JSONL files and their refusal by line number. Knows no benchmark (tasks/), no engine, no metric.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from megatron_infer.sampling_params import SamplingParams
from megatron_infer.text.fim import FimOptions, FimPrompt

Row = Mapping[str, Any]
"""One line of a benchmark file."""


@dataclass(frozen=True)
class Case:
    """One hole to fill.

    task_id: unique in its file. reference: the text that stood there, where the benchmark tells.
    language: a name that syntax.py knows (python, java, cpp, ...) or "". scenario: the kind of hole, or "".
    row: the line it was read from.
    """

    task_id: str
    prompt: FimPrompt
    reference: str | None = None
    language: str = ""
    scenario: str = ""
    row: Row = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Task:
    """A benchmark: its fields, its prompt, its post-processing and its output format.

    about: where these conventions come from. read: a row to a case; raises KeyError for a missing field, ValueError for
    a wrong one. options: the prompt's layout. sampling: the published settings.
    finish: the official post-processing of a completion's text. predict: the row the official scorer reads.
    metrics: names in metrics.METRICS. program: the test program around an answer, for pass@k; None where there is none.
    """

    name: str
    about: str
    read: Callable[[Row], Case]
    options: FimOptions
    sampling: SamplingParams
    finish: Callable[[Case, str], str]
    predict: Callable[[Case, str], dict[str, Any]]
    metrics: tuple[str, ...]
    program: Callable[[Case, str], str] | None = None


def read_cases(path: str | Path, task: Task) -> list[Case]:
    """Every case of a `.jsonl` or `.jsonl.gz` file, in its order.

    Raises:
        ValueError: the file cannot be read; a line is not a JSON object, lacks a field of `task` or repeats a task_id
            (the message names the line); or there is no case at all.
    """
    cases: list[Case] = []
    lines: dict[str, int] = {}
    for number, row in read_rows(path):
        where = f"{path}, line {number}"
        try:
            case = task.read(row)
        except KeyError as error:
            raise ValueError(
                f"{where}: no field {error.args[0]!r}, which task {task.name!r} reads; the line has {', '.join(row)}"
            ) from None
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if case.task_id in lines:
            raise ValueError(f"{where}: task_id {case.task_id!r} stands in line {lines[case.task_id]} already")
        lines[case.task_id] = number
        cases.append(case)
    if not cases:
        raise ValueError(f"{path} holds no case")
    return cases


def read_rows(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers from 1 and JSON objects of a `.jsonl` or `.jsonl.gz` file; blank lines are passed over.

    Raises:
        ValueError: the file cannot be read, or a line is not a JSON object in UTF-8.
    """
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
