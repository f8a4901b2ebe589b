"""Means with their intervals by language and scenario: scores.json's tables, and how they are printed.

Knows the rows of scores.jsonl, not how they came about.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from megatron_infer.eval.cases import Task
from megatron_infer.eval.score.metrics import METRICS, pass_at_k
from megatron_infer.eval.score.results import SCORES_FORMAT, SCORES_FORMAT_VERSION, TABLES, Run
from megatron_infer.eval.score.statistics import CONFIDENCE, NUM_RESAMPLES, SEED, bootstrap_mean, case_means

Row = dict[str, Any]

GROUPINGS: dict[str, tuple[str, ...]] = {
    "overall": (),
    "language": ("language",),
    "scenario": ("scenario",),
    "language_scenario": ("language", "scenario"),
}
"""The tables, and the fields of a case that make a row of each."""

_NUM_COLUMNS = 4


def make_tables(run: Run, task: Task, rows: Sequence[Row], execution: Row | None, ks: Sequence[int]) -> Row:
    """The content of scores.json: for every group of cases, the mean of each metric and its confidence interval."""
    columns = list(_columns(task, ks))
    return {
        "format": SCORES_FORMAT,
        "format_version": SCORES_FORMAT_VERSION,
        "task": task.name,
        "completions_sha256": run.completions_sha256,
        "interval": {
            "method": "percentile bootstrap over cases",
            "confidence": CONFIDENCE,
            "num_resamples": NUM_RESAMPLES,
            "seed": SEED,
        },
        "columns": columns,
        "execution": execution,
        "python_hash_seed": os.environ.get("PYTHONHASHSEED", "random"),
        "tables": {
            name: [
                {**dict(zip(fields, group, strict=True)), **_summary(members, columns)}
                for group, members in _grouped(rows, fields)
            ]
            for name, fields in GROUPINGS.items()
        },
    }


def _columns(task: Task, ks: Iterable[int]) -> Iterator[Row]:
    """What is averaged. full: the value of a perfect prediction, or None where values are no share of anything."""
    for k in ks:
        about = "share of cases solved by one of k samples, unbiased (Chen et al. 2021, arXiv:2107.03374)"
        yield {"name": f"pass@{k}", "metric": "", "about": about, "full": 1.0}
    for name in task.metrics:
        metric = METRICS[name]
        for value, full in metric.values.items():
            yield {"name": value, "metric": name, "about": metric.about, "full": full}


def values_by_case(rows: Iterable[Row], column: str) -> dict[str, float]:
    """One value per case for a column of the tables: the mean of its samples, or the case's pass@k."""
    values: dict[str, list[float | None]] = {}
    name = "passed" if column.startswith("pass@") else column
    for row in rows:
        values.setdefault(row["task_id"], []).append(row["metrics"][name])
    if name == column:
        return case_means(values)
    k = int(column.removeprefix("pass@"))
    return {task_id: pass_at_k(len(passed), passed.count(1.0), k) for task_id, passed in values.items()}


def _summary(rows: Sequence[Row], columns: Sequence[Row]) -> Row:
    metrics: dict[str, Row | None] = {}
    for column in columns:
        values = list(values_by_case(rows, column["name"]).values())
        metrics[column["name"]] = asdict(bootstrap_mean(values)) if values else None
    return {
        "num_cases": len({row["task_id"] for row in rows}),
        "num_completions": len(rows),
        "num_errors": sum(row["error"] is not None for row in rows),
        "num_quarantined": sum(row["is_quarantined"] for row in rows),
        "metrics": metrics,
    }


def _grouped(rows: Sequence[Row], fields: Sequence[str]) -> list[tuple[tuple[str, ...], list[Row]]]:
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[field] for field in fields), []).append(row)
    return sorted(groups.items())


# ---- showing it -----------------------------------------------------------------------------------------------------


def show_tables(tables: Row) -> Iterator[str]:
    """The tables as lines of text, of which the overall one has every metric and the others the first few."""
    overall, columns = tables["tables"]["overall"][0], tables["columns"]
    yield (
        f"task {tables['task']}: {overall['num_cases']} cases, {overall['num_completions']} completions, of which "
        f"{overall['num_errors']} errors ({overall['num_quarantined']} given up), each worth 0"
    )
    if tables["execution"] is not None:
        counts = ", ".join(f"{count} {status}" for status, count in tables["execution"]["num_by_status"].items())
        yield f"tests: {counts}; isolation: {tables['execution']['isolation']}"
    interval = tables["interval"]
    yield (
        "Shares are in percent of a perfect prediction's value. In brackets the "
        f"{100 * interval['confidence']:g}% interval: {interval['method']}, {interval['num_resamples']} resamples."
    )
    yield ""
    yield f"{'overall':<44} {'mean':>9}  {'interval':<18} {'cases':>6}"
    for column in columns:
        cell = overall["metrics"][column["name"]]
        if cell is not None:
            mean, low, high = (shown(cell[key], column) for key in ("mean", "low", "high"))
            yield f"{column['name']:<44} {mean:>9}  {f'[{low}, {high}]':<18} {cell['num_cases']:>6}"
    for name, fields in GROUPINGS.items():
        groups = tables["tables"][name]
        if fields and any(group[field] for group in groups for field in fields):
            yield from _show_groups(groups, fields, columns)


def _show_groups(groups: Sequence[Row], fields: Sequence[str], columns: Sequence[Row]) -> Iterator[str]:
    first = headline(columns)
    labels = [" / ".join(group[field] or "(none)" for field in fields) for group in groups]
    width = max(map(len, [*labels, " / ".join(fields)]))
    widths = [max(22, len(column["name"])) for column in first]
    yield ""
    heads = "".join(f"  {column['name']:>{size}}" for column, size in zip(first, widths, strict=True))
    yield f"{' / '.join(fields):<{width}} {'cases':>6} {'errors':>6}{heads}"
    for label, group in zip(labels, groups, strict=True):
        cells = "".join(
            f"  {_show_cell(group['metrics'][column['name']], column):>{size}}"
            for column, size in zip(first, widths, strict=True)
        )
        yield f"{label:<{width}} {group['num_cases']:>6} {group['num_errors']:>6}{cells}"
    if len(columns) > len(first):
        yield f"({len(columns) - len(first)} more metrics in {TABLES})"


def _show_cell(cell: Row | None, column: Row) -> str:
    if cell is None:
        return "-"
    mean, low, high = (shown(cell[key], column) for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def shown(value: float, column: Mapping[str, Any]) -> str:
    """A value of a column as it is printed: shares in percent, all else as it is."""
    full = column["full"]
    digits = 2 if full is None else 1
    # Adding 0.0 makes 0.0 of the -0.0 to which a small negative value is rounded.
    return f"{round(value if full is None else 100 * value / full, digits) + 0.0:.{digits}f}"


def headline(columns: Sequence[Row]) -> list[Row]:
    """The few columns for where there is no room: of each kind (exact, edit, bleu, ...) the first."""
    kinds: dict[str, Row] = {}
    for column in columns:
        if column["full"] is not None:
            kinds.setdefault(column["name"].removeprefix(f"{column['metric']}_").split("_")[0], column)
    return list(kinds.values())[:_NUM_COLUMNS]
