"""Another engine's completions, in a benchmark's official format, as a finished run, which score and report then read.

Knows the formats: rows as the official scorers read them, and bigcode-evaluation-harness's generations.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_infer.commands.options import say
from megatron_infer.eval.cases import Task, read_as, read_cases
from megatron_infer.eval.files import replacing, to_line, write_json
from megatron_infer.eval.run.records import (
    COMPLETIONS,
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    SUCCESS,
    TIMINGS,
    RunDirectory,
)
from megatron_infer.eval.tasks.fields import id_of, text_of
from megatron_infer.files import sha256_of

Row = dict[str, Any]


def import_predictions(path: Path, task: Task, data: Path, out: Path) -> None:
    """Make `out` the finished run that had these predictions for `data`; the same again changes nothing.

    A case without a prediction, or with fewer samples than others, becomes an error, worth 0.

    Raises ValueError: a file cannot be read or fits neither the format nor the data, or `out` holds something else.
    """
    ids = [case.task_id for case in read_cases(data, task)]
    samples = _read(path, task, ids)
    num_samples = max(map(len, samples.values()))
    fingerprint = {
        "task": task.name, "data_sha256": sha256_of(data), "predictions_sha256": sha256_of(path), "num_cases": len(ids),
        "num_samples": num_samples,
    }  # fmt: skip
    directory = RunDirectory(out)
    with directory.locked():
        if (known := directory.manifest()) is not None:
            directory.check(known, fingerprint)
        if directory.success is not None:
            return
        about = {"data": str(data.resolve()), "model_dir": str(path), "versions": {}, "attempts": []}
        value = {"format": FORMAT, "format_version": FORMAT_VERSION, "fingerprint": fingerprint, **about}
        write_json(out / MANIFEST, {**value, "command": sys.argv})
        missing = sum(num_samples - len(samples.get(task_id, ())) for task_id in ids)
        if missing:
            say(f"{missing} of {num_samples * len(ids)} completions are not in {path}; they count as errors, worth 0")
        with replacing(out / COMPLETIONS) as file:
            for task_id in ids:
                own = samples.get(task_id, [])
                rows = own + [_row("", "error", "there is no prediction")] * (num_samples - len(own))
                for index, row in enumerate(rows):
                    file.write(to_line({"task_id": task_id, "sample_idx": index, **row}))
        (out / TIMINGS).touch()
        hashes = {name: sha256_of(out / name) for name in (COMPLETIONS, TIMINGS)}
        write_json(out / SUCCESS, {"num_completions": num_samples * len(ids), "seconds": 0.0, "sha256": hashes})


def _row(text: str, finish_reason: str, error: str | None = None) -> Row:
    return {"text": text, "finish_reason": finish_reason, "error": error}


def _read(path: Path, task: Task, ids: Sequence[str]) -> dict[str, list[Row]]:
    """What a file has for every task_id: rows of completions.jsonl without their names."""
    samples: dict[str, list[Row]] = {}

    def row_of(row: Mapping[str, Any]) -> tuple[str, Row]:
        return id_of(row, "task_id"), _row(text_of(row, task.output[0]), str(row.get("finish_reason", "unknown")))

    if path.suffix == ".json":
        for task_id, own in zip(ids, _generations(path, ids), strict=True):
            samples[task_id] = [_row(text, "unknown") for text in own]
    else:
        for _, (task_id, row) in read_as(path, row_of, f"the scorer of task {task.name!r}"):
            samples.setdefault(task_id, []).append(row)
    if not samples:
        raise ValueError(f"{path} holds no prediction")
    if unknown := samples.keys() - set(ids):
        raise ValueError(f"{path} has {len(unknown)} task_ids that the data has not, among them {min(unknown)!r}")
    return samples


def _generations(path: Path, ids: Sequence[str]) -> list[list[str]]:
    """What bigcode-evaluation-harness saves: for every case, in the data's order, a list of its samples."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    lists = found if isinstance(found, list) else [found]
    if not all(isinstance(own, list) and all(isinstance(text, str) for text in own) for own in lists):
        raise ValueError(f"{path} must hold a list with a list of texts for each case; one row a line is .jsonl")
    if len(lists) != len(ids):
        raise ValueError(f"{path} has {len(lists)} cases, the data {len(ids)}")
    return lists
