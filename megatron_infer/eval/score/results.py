"""A finished run directory, read for scoring and reporting: everything is checked against the hashes in _SUCCESS first.

Owns which files belong to a result and the refusal of unfinished, changed or mismatched ones. Writes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_infer.eval.cases import Case, Task, read_cases, read_rows
from megatron_infer.eval.run.records import COMPLETIONS, GIVEN_UP, MANIFEST, SUCCESS, TIMINGS, RunDirectory, key_of
from megatron_infer.eval.tasks import registry as tasks
from megatron_infer.eval.tasks.fields import content_id
from megatron_infer.files import sha256_of

SCORES, TABLES = "scores.jsonl", "scores.json"
SCORES_FORMAT, SCORES_FORMAT_VERSION = "megatron_infer-eval-scores", 2


@dataclass(frozen=True)
class Run:
    """A finished run. completions: the rows of completions.jsonl, in the dataset's order."""

    directory: Path
    manifest: dict[str, Any]
    success: dict[str, Any]
    completions: list[dict[str, Any]]

    @property
    def fingerprint(self) -> dict[str, Any]:
        return dict(self.manifest["fingerprint"])

    @property
    def completions_sha256(self) -> str:
        return str(self.success["sha256"][COMPLETIONS])

    def timings(self) -> list[dict[str, Any]]:
        """The rows of timings.jsonl, in the same order. Raises ValueError if they are not those of the run."""
        _check_hash(self.directory, TIMINGS, self.success)
        return [row for _, row in read_rows(self.directory / TIMINGS)]


@dataclass(frozen=True)
class Scores:
    """What `eval score` wrote. rows: of scores.jsonl, those of the first truncation. tables: scores.json."""

    rows: list[dict[str, Any]]
    tables: dict[str, Any]


def read_run(directory: str | Path) -> Run:
    """Raises ValueError: not a finished run, or completions.jsonl is not the file that the run ended with."""
    found = RunDirectory(directory)
    if not found.path.is_dir():
        raise ValueError(f"there is no directory {directory}; give the --out of an eval run")
    success, manifest = found.success, found.manifest()
    if success is None or manifest is None:
        raise ValueError(
            f"{directory} has no {SUCCESS}, so its run is not finished; run the same eval run command again, and it "
            "goes on where it stopped"
        )
    _check_hash(found.path, COMPLETIONS, success)
    return Run(Path(directory), manifest, success, [row for _, row in read_rows(found.path / COMPLETIONS)])


def task_of(run: Run) -> Task:
    """The task that a run completed, with the field names it was given; one of likelihoods has no other metric."""
    fields = run.fingerprint.get("fields") or {}
    task = tasks.generic_task(**fields) if fields else tasks.task(run.fingerprint["task"])
    if run.fingerprint.get("metric") != "likelihood":
        return task
    return replace(task, metrics=("likelihood",), program=None, cuts=tasks.task("text").cuts)


def read_run_cases(run: Run, task: Task, data: str | None = None) -> dict[str, Case]:
    """The cases of a run by task_id, from `data` or from where the run found them.

    Raises ValueError: the file is gone or is not what the run completed.
    """
    path = Path(data or run.manifest["data"])
    if not path.is_file():
        raise ValueError(f"there is no {path}, the data of {run.directory}; say with --data where it is now")
    if sha256_of(path) != run.fingerprint["data_sha256"]:
        raise ValueError(
            f"{path} is not the data that {run.directory} completed (its sha256 differs from {MANIFEST}'s); give the "
            "original file with --data"
        )
    found = read_cases(path, task)
    # Some runs have names for their cases that are older than the data's own.
    cases = {f"{case.language}/{content_id(case.prompt)}": case for case in found}
    cases |= {case.task_id: case for case in found}
    missing = [task_id for row in run.completions if (task_id := row["task_id"]) not in cases]
    if missing:
        raise ValueError(f"{path} has no case {missing[0]!r}, which {run.directory / COMPLETIONS} completes")
    return cases


def read_scores(run: Run) -> Scores:
    """Raises ValueError: the run has no scores, or they are of other completions."""
    remedy = f"run `eval score {run.directory}` first"
    if not (run.directory / TABLES).is_file():
        raise ValueError(f"{run.directory} has no {TABLES}; {remedy}")
    try:
        tables = json.loads((run.directory / TABLES).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{run.directory / TABLES} is damaged ({error}); {remedy}") from None
    found = (tables.get("format"), tables.get("format_version"))
    if found != (SCORES_FORMAT, SCORES_FORMAT_VERSION):
        raise ValueError(f"{run.directory / TABLES} was not written by this version of eval score; {remedy}")
    _check_hash(run.directory, SCORES, tables, remedy)
    first = next(iter(tables["truncations"]))
    rows = [row for _, row in read_rows(run.directory / SCORES) if row["truncation"] == first]
    if tables["completions_sha256"] != run.completions_sha256 or [key_of(row) for row in rows] != [
        key_of(row) for row in run.completions
    ]:
        raise ValueError(f"the scores in {run.directory} are of other completions; {remedy}")
    return Scores(rows, tables)


def is_error(row: Mapping[str, Any]) -> bool:
    """Whether a row of completions.jsonl is one that the engine could not complete."""
    return row["finish_reason"] == "error" or row["error"] is not None


def is_quarantined(row: Mapping[str, Any]) -> bool:
    """Whether the run gave this prompt up, since the process died of it again and again."""
    return bool(row["error"] == GIVEN_UP)


def _check_hash(
    directory: Path, name: str, record: Mapping[str, Any], remedy: str = "restore the file or repeat the run"
) -> None:
    path = directory / name
    if not path.is_file():
        raise ValueError(f"{path} is missing; {remedy}")
    if sha256_of(path) != record.get("sha256", {}).get(name):
        raise ValueError(f"{path} was changed after it was written (its sha256 differs); {remedy}")
