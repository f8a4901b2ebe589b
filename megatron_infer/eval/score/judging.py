"""Completions as rows of scores.jsonl: each under each truncation, with its metrics and what its tests came to.

What a metric is stands in metrics.py, what a truncation leaves in tasks/truncation.py; programs run in execution.py.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from tqdm import tqdm

from megatron_infer.commands.options import say
from megatron_infer.eval.cases import Case, Task
from megatron_infer.eval.score.execution import Limits, Outcome, find_isolation, run_programs
from megatron_infer.eval.score.metrics import METRICS, likelihood
from megatron_infer.eval.score.results import Run, is_error, is_quarantined
from megatron_infer.eval.tasks.truncation import raw_text, truncate

Row = dict[str, Any]

_HOLE_LINES = (0, 1, 2, 4, 8, 16)
_PROMPT_TOKENS = (0, 128, 512, 2048, 8192, 32768)
_ERROR_CLASS = re.compile(r"[\w.]+(?=:|$)")


def judge(run: Run, task: Task, cases: Mapping[str, Case], rules: Sequence[str]) -> Iterator[Row]:
    """The rows of scores.jsonl, rule by rule. What could not be completed is worth 0, never left out."""
    for rule in rules:
        for row in run.completions:
            yield _judged(rule, task, cases[row["task_id"]], row)


def _judged(rule: str, task: Task, case: Case, row: Mapping[str, Any]) -> Row:
    failed = is_error(row)
    prediction = "" if failed else truncate(rule, task, case, row)
    metrics: dict[str, float | None] = {}
    for name in task.metrics:
        metric = METRICS[name]
        scored = row.get("log_probabilities")
        values = likelihood(scored, row["text"]) if scored else metric.function(case, prediction)
        for value, full in metric.values.items():
            known = None if values is None else values.get(value)
            metrics[value] = 0.0 if failed and full is not None and known is not None else known
    return {
        "task_id": row["task_id"], "sample_idx": row["sample_idx"], "truncation": rule, "language": case.language,
        "scenario": case.scenario, "cluster": case.cluster or row["task_id"], "finish_reason": row["finish_reason"],
        "hole_lines": "" if case.reference is None else bucket(len(case.reference.splitlines()), _HOLE_LINES),
        "prompt_tokens": bucket(row["num_prompt_tokens"], _PROMPT_TOKENS) if row.get("num_prompt_tokens") else "",
        "completion": prediction,
        "num_removed_characters": 0 if failed else max(0, len(raw_text(row)) - len(prediction)), "metrics": metrics,
        "error": row["error"] or row["finish_reason"] if failed else None, "is_quarantined": is_quarantined(row),
    }  # fmt: skip


def bucket(value: int, edges: Sequence[int]) -> str:
    """The range between two edges that a number is in, such as "4-7"."""
    low = max(edge for edge in edges if edge <= value)
    high = min((edge - 1 for edge in edges if edge > value), default=None)
    return f"{low} or more" if high is None else str(low) if high == low else f"{low}-{high}"


def run_tests(rows: Sequence[Row], task: Task, cases: Mapping[str, Case], limits: Limits, num_workers: int) -> Row:
    """Add to every row what its test program came to; returns under what isolation and limits they ran.

    Rows with equal programs, as truncations often leave them, share one outcome.
    """
    assert task.program is not None
    isolation = find_isolation()
    say(f"tests run in {isolation.about}")
    tested = [(row, task.program(cases[row["task_id"]], row["completion"])) for row in rows if row["error"] is None]
    programs = list(dict.fromkeys(program for _, program in tested))
    running = run_programs(programs, limits, isolation, num_workers)
    outcomes = dict(zip(programs, tqdm(running, "testing", len(programs), disable=None, leave=False), strict=True))
    by_row = {id(row): outcomes[program] for row, program in tested}
    for row in rows:
        outcome = by_row.get(id(row), Outcome("refused", "there is no completion to test"))
        row["metrics"] = {"passed": float(outcome.status == "passed"), **row["metrics"]}
        row["test"] = asdict(outcome)
    first = [row["test"] for row in rows if row["truncation"] == rows[0]["truncation"]]
    return {
        "isolation": isolation.name, "about": isolation.about, "limits": asdict(limits),
        "num_by_status": dict(sorted(Counter(test["status"] for test in first).items())),
        "num_by_error": dict(Counter(_error_class(test["error"]) for test in first if test["error"]).most_common()),
    }  # fmt: skip


def _error_class(error: str) -> str:
    """The exception's name, where the last line of a program's errors begins with one; else that line."""
    match = _ERROR_CLASS.match(error)
    return match[0] if match else error
