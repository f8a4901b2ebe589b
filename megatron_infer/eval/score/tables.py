"""Means with their intervals by language and scenario: scores.json's tables, and how they are printed.

Knows the rows of scores.jsonl, not how they came about.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from megatron_infer.eval.cases import Task
from megatron_infer.eval.score.judging import Row
from megatron_infer.eval.score.metrics import METRICS, pass_at_k
from megatron_infer.eval.score.results import SCORES_FORMAT, SCORES_FORMAT_VERSION, TABLES, Run
from megatron_infer.eval.score.statistics import (
    CONFIDENCE,
    LEAST_CLUSTERS,
    NUM_RESAMPLES,
    SEED,
    bootstrap_mean,
    case_means,
)
from megatron_infer.eval.tasks import truncation

_FIELDS = ("truncation", "language", "scenario", "language/scenario", "finish_reason", "hole_lines", "prompt_tokens")
GROUPINGS: dict[str, tuple[str, ...]] = {"overall": ()} | {f.replace("/", "_"): tuple(f.split("/")) for f in _FIELDS}
"""The tables, and the fields of a row of scores.jsonl that make a row of each."""

_NUM_COLUMNS = 4
_INTERVAL = {
    "method": "percentile bootstrap over clusters of cases, which share a problem or a file",
    "confidence": CONFIDENCE, "num_resamples": NUM_RESAMPLES, "seed": SEED, "least_clusters": LEAST_CLUSTERS,
}  # fmt: skip


def make_tables(
    run: Run, task: Task, rows: Sequence[Row], rules: Sequence[str], execution: Row | None, ks: Sequence[int]
) -> Row:
    """The content of scores.json: for every group of cases, the mean of each metric and its confidence interval.

    All tables but that of truncations are about the first of `rules`.
    """
    columns = list(_columns(task, ks))
    first = [row for row in rows if row["truncation"] == rules[0]]
    return {
        "format": SCORES_FORMAT,
        "format_version": SCORES_FORMAT_VERSION,
        "task": task.name,
        "completions_sha256": run.completions_sha256,
        "truncations": {rule: truncation.about(rule, task) for rule in rules},
        "interval": _INTERVAL,
        "columns": columns,
        "execution": execution,
        "python_hash_seed": os.environ.get("PYTHONHASHSEED", "random"),
        "tables": {
            name: [
                {**dict(zip(fields, group, strict=True)), **_summary(members, columns)}
                for group, members in _grouped(rows if name == "truncation" else first, fields)
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
    if "likelihood" in task.metrics:
        yield {"name": "perplexity", "metric": "", "about": "of a token, over all tokens of the cases", "full": None}


def _perplexity(rows: Sequence[Row]) -> Row | None:
    """Of all tokens together, long references weighing more: exp of minus the mean log probability of a token."""
    per_token, tokens = (values_by_case(rows, name) for name in ("log_probability_per_token", "reference_tokens"))
    if not per_token:
        return None
    clusters = clusters_of(rows)
    found = bootstrap_mean(list(per_token.values()), [clusters[key] for key in per_token], list(tokens.values()))
    low, high = (None if bound is None else math.exp(-bound) for bound in (found.high, found.low))
    return {**asdict(found), "mean": math.exp(-found.mean), "low": low, "high": high}


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
    clusters = clusters_of(rows)
    for column in columns:
        if column["name"] == "perplexity":
            metrics["perplexity"] = _perplexity(rows)
            continue
        values = values_by_case(rows, column["name"])
        of = [clusters[task_id] for task_id in values]
        metrics[column["name"]] = asdict(bootstrap_mean(list(values.values()), of)) if values else None
    return {
        "num_cases": len(clusters), "num_clusters": len(set(clusters.values())), "num_completions": len(rows),
        "num_by_finish_reason": dict(sorted(Counter(row["finish_reason"] for row in rows).items())),
        "num_cut": sum(row["num_removed_characters"] > 0 for row in rows),
        "mean_removed_characters": sum(row["num_removed_characters"] for row in rows) / len(rows),
        "num_errors": sum(row["error"] is not None for row in rows),
        "num_quarantined": sum(row["is_quarantined"] for row in rows), "metrics": metrics,
    }  # fmt: skip


def clusters_of(rows: Iterable[Row]) -> dict[str, str]:
    """The cluster of every case."""
    return {row["task_id"]: row["cluster"] for row in rows}


def _grouped(rows: Sequence[Row], fields: Sequence[str]) -> list[tuple[tuple[str, ...], list[Row]]]:
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[field] for field in fields), []).append(row)
    return (
        list(groups.items()) if "truncation" in fields else sorted(groups.items(), key=lambda group: _order(group[0]))
    )


def _order(names: Iterable[str]) -> list[list[tuple[int, str]]]:
    """Sorts names of groups, numbers in them by their size."""
    parts = (re.findall(r"\d+|\D+", name) for name in names)
    return [[(int(part), "") if part.isdecimal() else (-1, part) for part in name] for name in parts]


def shown_groupings(tables: Row) -> dict[str, tuple[str, ...]]:
    """The tables that say more than those before them: of more than one group, and of other groups than before."""
    found: dict[str, tuple[str, ...]] = {}
    sizes = {1}
    for name, fields in GROUPINGS.items():
        size = len(tables["tables"][name])
        if size > 1 and (len(fields) == 1 or size not in sizes):
            found[name] = fields
        sizes.add(size)
    return found


# ---- showing it -----------------------------------------------------------------------------------------------------


def show_tables(tables: Row) -> Iterator[str]:
    """The tables as lines of text, of which the overall one has every metric and the others the first few."""
    overall, columns = tables["tables"]["overall"][0], tables["columns"]
    yield (
        f"task {tables['task']}: {overall['num_cases']} cases, {overall['num_completions']} completions, of which "
        f"{overall['num_errors']} errors ({overall['num_quarantined']} given up), each worth 0"
    )
    yield f"ended by {counted(overall['num_by_finish_reason'])}"
    if tables["execution"] is not None:
        execution = tables["execution"]
        yield f"tests: {counted(execution['num_by_status'])}; isolation: {execution['isolation']}"
        yield f"errors of failed tests: {counted(execution['num_by_error']) or 'none'}"
    interval = tables["interval"]
    yield (
        "Shares are in percent of a perfect prediction's value. In brackets the "
        f"{100 * interval['confidence']:g}% interval: {interval['method']}, {interval['num_resamples']} resamples; "
        f"none from fewer than {interval['least_clusters']} clusters."
    )
    for rule, about in tables["truncations"].items():
        yield f"truncation {rule}: {about}"
    yield ""
    rows = [("overall", "mean", "interval", "cases")]
    for c in columns:
        if (cell := overall["metrics"][c["name"]]) is not None:
            rows.append((c["name"], shown(cell["mean"], c), shown_interval(cell, c), str(cell["num_cases"])))
    yield from _aligned(rows)
    for name, fields in shown_groupings(tables).items():
        yield from _show_groups(tables["tables"][name], fields, headline(columns))
    if (num_more := len(columns) - len(headline(columns))) and shown_groupings(tables):
        yield f"({num_more} more metrics in {TABLES})"


def counted(counts: Mapping[str, int]) -> str:
    """Counts as they are printed."""
    return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items())


def _show_groups(groups: Sequence[Row], fields: Sequence[str], columns: Sequence[Row]) -> Iterator[str]:
    yield ""
    rows = [(" / ".join(fields), "cases", "errors", "cut", *(column["name"] for column in columns))]
    for group in groups:
        cells = (_show_cell(group["metrics"][column["name"]], column) for column in columns)
        counts = (str(group[name]) for name in ("num_cases", "num_errors", "num_cut"))
        rows.append((" / ".join(group[field] or "(none)" for field in fields), *counts, *cells))
    yield from _aligned(rows)


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A table's rows as lines: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        yield "  ".join([first.ljust(widths[0]), *cells])


def _show_cell(cell: Row | None, column: Row) -> str:
    return "-" if cell is None else f"{shown(cell['mean'], column)} {shown_interval(cell, column)}".rstrip()


def shown_interval(cell: Mapping[str, Any], column: Mapping[str, Any]) -> str:
    """An interval as it is printed; nothing where there are too few clusters for one."""
    return "" if cell["low"] is None else f"[{shown(cell['low'], column)}, {shown(cell['high'], column)}]"


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
    return list(kinds.values())[:_NUM_COLUMNS] or list(columns)[-_NUM_COLUMNS:]
