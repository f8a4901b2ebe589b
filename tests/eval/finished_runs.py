"""Finished run directories written by hand, as `eval run` leaves them, for the tests of what reads them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

GIVEN_UP = "given up: 3 times the process died while it computed this prompt and no other"


def fim_row(task_id: str, reference: str = "x = 1", **fields: Any) -> dict[str, Any]:
    """A row of the generic task."""
    row = {"language": "python", "scenario": "single_line", "path": "a.py", "prefix": "def f():\n    ", "suffix": "\n"}
    return {"task_id": task_id, **row, "reference": reference, **fields}


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    """Write JSON lines; returns the SHA-256 of the file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return sha256(path)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_run(
    out: Path,
    data: Path,
    rows: Sequence[Mapping[str, Any]],
    texts: Mapping[str, Sequence[str]],
    *,
    task: str = "fim",
    errors: Mapping[str, str] | None = None,
    fields: Mapping[str, str] | None = None,
    timing: Mapping[str, Any] | None = None,
    attempts: int = 1,
    id_field: str = "task_id",
    ended: Mapping[str, str] | None = None,
    raw: Mapping[str, str] | None = None,
    **fingerprint: Any,
) -> Path:
    """A finished run over `rows` with the samples of each task_id in `texts`; returns its directory.

    ended: finish reasons by task_id, where not "stop". raw: what was written before the run's own ending cut it.
    """
    errors, raw = errors or {}, raw or {}
    out.mkdir()
    data_sha256 = write_lines(data, rows)
    keys = [(str(row[id_field]), sample_idx) for row in rows for sample_idx in range(len(texts[str(row[id_field])]))]
    completions, timings = [], []
    for task_id, sample_idx in keys:
        error = errors.get(task_id)
        name = {"task_id": task_id, "sample_idx": sample_idx}
        completions.append(
            {
                **name,
                "text": "" if error else texts[task_id][sample_idx],
                "token_ids": [1, 2],
                "finish_reason": "error" if error else (ended or {}).get(task_id, "stop"),
                "num_prompt_tokens": 10,
                "num_dropped_tokens": 0,
                "prompt_sha256": "00",
                "error": error,
                **({"raw_text": raw[task_id]} if task_id in raw else {}),
            }
        )
        timings.append(
            {
                **name,
                "first_token_seconds": 0.0 if error else 0.01,
                "total_seconds": 0.0 if error else 0.05,
                "num_new_tokens": 0 if error else 5,
                "num_cached_tokens": 4,
                "num_prompt_tokens": 10,
                "attempt": attempts,
                "replica": 0,
                **(timing or {}),
            }
        )
    hashes = {
        "completions.jsonl": write_lines(out / "completions.jsonl", completions),
        "timings.jsonl": write_lines(out / "timings.jsonl", timings),
    }
    started = "2026-01-02T03:04:05+00:00"
    manifest = {
        "format": "megatron_infer-eval",
        "format_version": 1,
        "fingerprint": {
            "task": task,
            "fields": fields or {},
            "data_sha256": data_sha256,
            "model_sha256": "ab" * 32,
            "config": {"dtype": "bfloat16"},
            "sampling": {"max_new_tokens": 32, "temperature": 0.0},
            "seed": 0,
            "num_cases": len(rows),
            "num_samples": len(next(iter(texts.values()))),
            **fingerprint,
        },
        "data": str(data),
        "model_dir": "/models/tiny-model",
        "versions": {"torch": "2.0"},
        "command": ["eval", "run", "--data", "some data.jsonl"],
        "created": started,
        "attempts": [
            {"attempt": i + 1, "started": started, "world_size": 4, "engine": {"tensor_parallel_size": 2}}
            for i in range(attempts)
        ],
    }
    success = {
        "num_cases": len(rows),
        "num_completions": len(keys),
        "num_errors": len(errors),
        "num_quarantined": sum(error == GIVEN_UP for error in errors.values()),
        "seconds": 2.0,
        "sha256": hashes,
    }
    (out / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    (out / "_SUCCESS").write_text(json.dumps(success), encoding="utf-8")
    return out
