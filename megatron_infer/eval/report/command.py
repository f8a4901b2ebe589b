"""The command `eval report`: one HTML file of a scored run, which needs no network and no other file.

Owns what the report tells and its numbers; report.html has the words and the looks, plots.py the figures, and
side_by_side.py the single cases. The same results give the same bytes, whenever and wherever it is written.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from megatron_infer.commands.options import Parser, add_option, percentile, run_command
from megatron_infer.eval.cases import Case
from megatron_infer.eval.files import replacing
from megatron_infer.eval.report import plots
from megatron_infer.eval.report.side_by_side import MAX_CASES, CaseView, outcome_column, view, visible
from megatron_infer.eval.run.records import differences, key_of, run_on_warning
from megatron_infer.eval.score.results import Run, Scores, is_error, read_run, read_run_cases, read_scores, task_of
from megatron_infer.eval.score.statistics import Comparison, compare
from megatron_infer.eval.score.tables import (
    clusters_of,
    counted,
    headline,
    shown,
    shown_groupings,
    shown_interval,
    values_by_case,
)
from megatron_infer.eval.tasks.truncation import raw_text
from megatron_infer.world import World

REPORT = "report.html"
_MAX_LISTED = 50
_OUTCOME_WORDS = (
    {"right": "match", "wrong": "no match", "error": "error", "unscored": "not scored"},
    {"right": "passed", "wrong": "not passed", "error": "error", "unscored": "not scored"},
)
_SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)

Row = dict[str, Any]


@dataclass(frozen=True)
class Compared:
    """One metric in one group of cases, "" for all of them, in this run and the other."""

    group: str
    column: Row
    result: Comparison


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m megatron_infer eval report`. Returns the exit status."""
    return run_command(lambda world: _run(_parser(world).parse_args(argv)))


def _run(args: argparse.Namespace) -> int:
    run = read_run(args.out)
    scores = read_scores(run)
    cases = read_run_cases(run, task_of(run), args.data)
    other = _read_other(run, scores, args.against) if args.against is not None else None
    page = render(run, scores, cases, other)
    path = run.directory / REPORT
    with replacing(path) as file:
        file.write(page)
    print(path)
    return 0


def _read_other(run: Run, scores: Scores, directory: str) -> tuple[Run, Scores]:
    other = read_run(directory)
    for name in ("task", "data_sha256"):
        if run.fingerprint[name] != other.fingerprint[name]:
            raise ValueError(
                f"{directory} cannot be compared: its {name} is {other.fingerprint[name]!r}, that of {run.directory} "
                f"{run.fingerprint[name]!r}"
            )
    other_scores = read_scores(other)
    names, other_names = ({column["name"] for column in each.tables["columns"]} for each in (scores, other_scores))
    if names.isdisjoint(other_names) or {row["task_id"] for row in scores.rows}.isdisjoint(
        row["task_id"] for row in other_scores.rows
    ):
        raise ValueError(f"{directory} and {run.directory} share no metric or no case, so there is nothing to compare")
    return other, other_scores


def render(run: Run, scores: Scores, cases: Mapping[str, Case], other: tuple[Run, Scores] | None) -> str:
    """The report as HTML. Every text from the data or the model is escaped by the template engine."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["visible"] = visible
    source = (Path(__file__).parent / REPORT).read_text(encoding="utf-8")
    scripts = [hashlib.sha256(body.encode()).digest() for body in _SCRIPT.findall(source)]
    columns = scores.tables["columns"]
    outcome = outcome_column(headline(columns))
    speed = measure_speed(run)
    comparisons = list(_comparisons(scores, other[1])) if other else []
    runs = [(run, scores), other] if other else [(run, scores)]
    setups = [{**each.fingerprint, "truncation": next(iter(own.tables["truncations"]))} for each, own in runs]
    return environment.get_template(REPORT).render(
        # The browser runs the page's own script and no other, even if something slipped through the escaping.
        script_hashes=" ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in scripts),
        run=run,
        about=task_of(run).about,
        model=Path(run.manifest["model_dir"]).name,
        data=Path(run.manifest["data"]).name,
        command=shlex.join(run.manifest["command"]),
        attempts=run.manifest["attempts"],
        tables=scores.tables,
        overall=scores.tables["tables"]["overall"][0],
        columns=columns,
        headline=headline(columns),
        groupings=shown_groupings(scores.tables),
        shown=shown,
        shown_interval=shown_interval,
        counted=counted,
        duration=duration,
        warning=run_on_warning(scores.tables["tables"]["overall"][0]["num_by_finish_reason"]),
        figures=dict(_figures(scores, comparisons)),
        speed=speed,
        percentiles=[("median", 50), ("95%", 95), ("99%", 99)],
        percentile=percentile,
        errors=[row for row in scores.rows if row["error"] is not None],
        max_listed=_MAX_LISTED,
        other=other[0] if other else None,
        other_model=Path(other[0].manifest["model_dir"]).name if other else "",
        differences=list(differences(setups[-1], setups[0])),
        comparisons=comparisons,
        changed=_changed_cases(scores, other[1]) if other else {},
        cases=list(_views(runs, cases)),
        num_samples=run.fingerprint["num_samples"],
        outcome=outcome,
        outcome_words=_OUTCOME_WORDS[outcome == "passed"],
    )


# ---- numbers --------------------------------------------------------------------------------------------------------


def measure_speed(run: Run) -> Row | None:
    """How fast the last attempt's completions were; None if it completed nothing, or the run is not our own.

    Earlier attempts' wall time is not known. Latencies are from hand-over to the engine, waiting included.
    """
    rows = run.timings()
    last = max((row["attempt"] for row in rows), default=0)
    failed = {key_of(row) for row in run.completions if is_error(row)}
    done = [row for row in rows if row["attempt"] == last and key_of(row) not in failed]
    seconds = run.success["seconds"]
    if not done or seconds <= 0:
        return None
    return {
        "num_completions": len(done), "seconds": seconds, "cases_per_second": len(done) / seconds,
        "tokens_per_second": sum(row["num_new_tokens"] for row in done) / seconds,
        "cached_share": sum(row["num_cached_tokens"] for row in done)
        / max(1, sum(row["num_prompt_tokens"] for row in done)),
        "first_token_seconds": [row["first_token_seconds"] for row in done],
        "total_seconds": [row["total_seconds"] for row in done],
    }  # fmt: skip


def duration(seconds: float) -> str:
    """Seconds as they are read: 12 ms, 1.23 s, 6 min 46 s."""
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 100 else f"{seconds // 60:.0f} min {seconds % 60:.0f} s"


def _comparisons(scores: Scores, other: Scores) -> Iterator[Compared]:
    """Every shared metric that is a share over all cases, then the headline ones per scenario and per language."""
    known = {column["name"] for column in other.tables["columns"]} - {"perplexity"}  # which no single case has
    shared = [column for column in scores.tables["columns"] if column["name"] in known]
    columns = [column for column in shared if column["full"] is not None] or shared
    for column in columns:
        yield from _compared("", column, scores.rows, other.rows)
    for field in ("scenario", "language"):
        groups = sorted({row[field] for row in scores.rows})
        for group in groups if len(groups) > 1 else ():
            for column in headline(columns):
                ours, theirs = ([row for row in each.rows if row[field] == group] for each in (scores, other))
                yield from _compared(group or "(none)", column, ours, theirs)


def _compared(group: str, column: Row, rows: Sequence[Row], other_rows: Sequence[Row]) -> Iterator[Compared]:
    ours, theirs = (values_by_case(each, column["name"]) for each in (rows, other_rows))
    if ours.keys() & theirs.keys():
        yield Compared(group, column, compare(ours, theirs, clusters_of(rows)))


def _changed_cases(scores: Scores, other: Scores) -> dict[str, list[str]]:
    """The task_ids that this run does better, and those it does worse, by the first metric that both runs have."""
    known = {column["name"] for column in other.tables["columns"]}
    name = next(column["name"] for column in scores.tables["columns"] if column["name"] in known)
    ours, theirs = values_by_case(scores.rows, name), values_by_case(other.rows, name)
    shared = [task_id for task_id in ours if task_id in theirs]
    return {
        "metric": [name],
        "won": [task_id for task_id in shared if ours[task_id] > theirs[task_id]],
        "lost": [task_id for task_id in shared if ours[task_id] < theirs[task_id]],
    }


# ---- figures and cases ----------------------------------------------------------------------------------------------


def _figures(scores: Scores, comparisons: Sequence[Compared]) -> Iterator[tuple[str, Markup]]:
    columns = [column for column in headline(scores.tables["columns"]) if column["full"] is not None]
    for name, fields in shown_groupings(scores.tables).items():
        groups = scores.tables["tables"][name]
        panels = [_panel(groups, fields, column) for column in columns]
        panels = [panel for panel in panels if panel.estimates]
        if panels:
            about = f"Mean and confidence interval of each metric per {' and '.join(fields)}, in percent"
            yield name, Markup(plots.interval_plot(f"plot-{name}", about, panels))
    panels = []
    shares = [each.column for each in comparisons if not each.group and each.column["full"] is not None]
    for column in headline(shares):
        own = [compared for compared in comparisons if compared.column == column]
        estimates = (_estimate(compared.group or "all", asdict(compared.result.difference), column) for compared in own)
        panels.append(plots.Panel(column["name"], tuple(estimates)))
    if panels:
        about = "Difference between the two runs with confidence interval, in percentage points"
        yield "comparison", Markup(plots.interval_plot("plot-comparison", about, panels, is_difference=True))


def _panel(groups: Sequence[Row], fields: Sequence[str], column: Row) -> plots.Panel:
    estimates = []
    for group in groups:
        label = " / ".join(group[field] or "(none)" for field in fields) + f" ({group['num_cases']})"
        if (cell := group["metrics"][column["name"]]) is not None:
            estimates.append(_estimate(label, cell, column))
    return plots.Panel(column["name"], tuple(estimates))


def _estimate(label: str, interval: Row, column: Row) -> plots.Estimate:
    """In percent of the value of a perfect prediction."""
    scale = 100 / column["full"]
    low, high = (None if interval[key] is None else scale * interval[key] for key in ("low", "high"))
    return plots.Estimate(visible(label), scale * interval["mean"], low, high)


def _views(runs: Sequence[tuple[Run, Scores]], cases: Mapping[str, Case]) -> Iterator[CaseView]:
    """The first cases in the dataset's order, whatever they scored, each with its first sample in every run."""
    scored = [{row["task_id"]: row for row in scores.rows if row["sample_idx"] == 0} for _, scores in runs]
    raw = [{row["task_id"]: raw_text(row) for row in run.completions if row["sample_idx"] == 0} for run, _ in runs]
    for task_id in list(scored[0])[:MAX_CASES]:
        rows = [(own[task_id], texts[task_id]) for own, texts in zip(scored, raw, strict=True) if task_id in own]
        yield view(cases[task_id], rows, headline(runs[0][1].tables["columns"]))


# ---- options --------------------------------------------------------------------------------------------------------


def _parser(world: World) -> Parser:
    parser = Parser(
        world,
        "python -m megatron_infer eval report",
        f"Write {REPORT} beside the scores of a run: tables, plots, speed, errors and cases side by side, in one file. "
        "Every option may be spelled with - or _.",
    )
    parser.add_argument("out", metavar="OUT", help="directory of a run that eval score has scored")
    add_option(parser, "against", metavar="OUT2", help="another scored run of the same task and data, to compare with")
    add_option(parser, "data", help="the benchmark's file, if it is no longer where the run found it")
    return parser
