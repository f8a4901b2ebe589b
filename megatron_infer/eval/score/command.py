"""The command `eval score`: post-processes the completions of a finished run, judges them, and averages over cases.

Owns scores.jsonl, scores.json and the printed tables. What a metric is stands in metrics.py, how sure a mean is in
statistics.py; test programs run in execution.py, and only where --allow_exec is given.
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict

from tqdm import tqdm

from megatron_infer.commands.options import Parser, add_option, run_command, say
from megatron_infer.eval.cases import Case, Task
from megatron_infer.eval.files import replacing, to_line, write_json
from megatron_infer.eval.score.execution import Limits, Outcome, find_isolation, run_programs
from megatron_infer.eval.score.metrics import METRICS
from megatron_infer.eval.score.results import (
    SCORES,
    TABLES,
    Run,
    is_error,
    is_quarantined,
    read_run,
    read_run_cases,
    task_of,
)
from megatron_infer.eval.score.tables import Row, make_tables, show_tables
from megatron_infer.files import sha256_of
from megatron_infer.world import World

_USUAL_K = (1, 10, 100)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m megatron_infer eval score`. Returns the exit status."""
    return run_command(lambda world: _run(_parser(world).parse_args(argv)))


def _run(args: argparse.Namespace) -> int:
    limits = Limits(timeout_seconds=args.timeout_seconds, memory_bytes=args.memory_bytes)
    if args.num_workers < 1:
        raise ValueError(f"--num_workers must be at least 1, got {args.num_workers}")
    run = read_run(args.out)
    task = task_of(run)
    ks = _ks(args.k, int(run.fingerprint["num_samples"]))
    if args.allow_exec and task.program is None:
        raise ValueError(f"task {task.name!r} has no test programs; leave out --allow_exec")
    cases = read_run_cases(run, task, args.data)
    rows = list(tqdm(judge(run, task, cases), "judging", len(run.completions), disable=None, leave=False))
    execution = None
    if args.allow_exec:
        execution = _run_tests(rows, task, cases, limits, args.num_workers)
    tables = make_tables(run, task, rows, execution, ks if args.allow_exec else ())
    write_scores(run, rows, tables)
    for line in show_tables(tables):
        print(line.encode(errors="replace").decode())  # names in the data may have lone surrogates
    if task.program is not None and not args.allow_exec:
        say(
            "tests were not run, so there is no pass@k: they execute code that the model wrote. To run them, with "
            f"time, memory, files and network limited: eval score {args.out} --allow_exec"
        )
    return 0


# ---- judging --------------------------------------------------------------------------------------------------------


def judge(run: Run, task: Task, cases: Mapping[str, Case]) -> Iterator[Row]:
    """The rows of scores.jsonl. What could not be completed is worth 0, never left out."""
    for row in run.completions:
        case = cases[row["task_id"]]
        failed = is_error(row)
        prediction = "" if failed else task.finish(case, row["text"])
        metrics: dict[str, float | None] = {}
        for name in task.metrics:
            metric = METRICS[name]
            values = metric.function(case, prediction)
            for value, full in metric.values.items():
                known = None if values is None else values.get(value)
                metrics[value] = 0.0 if failed and full is not None and known is not None else known
        yield {
            "task_id": row["task_id"],
            "sample_idx": row["sample_idx"],
            "language": case.language,
            "scenario": case.scenario,
            "completion": prediction,
            "metrics": metrics,
            "error": row["error"] or row["finish_reason"] if failed else None,
            "is_quarantined": is_quarantined(row),
        }


def _run_tests(rows: list[Row], task: Task, cases: Mapping[str, Case], limits: Limits, num_workers: int) -> Row:
    """Add to every row what its test program came to; returns under what isolation and limits they ran."""
    assert task.program is not None
    isolation = find_isolation()
    say(f"tests run in {isolation.about}")
    tested = [row for row in rows if row["error"] is None]
    programs = (task.program(cases[row["task_id"]], row["completion"]) for row in tested)
    outcomes = tqdm(
        run_programs(programs, limits, isolation, num_workers), "testing", len(tested), disable=None, leave=False
    )
    by_row = {id(row): outcome for row, outcome in zip(tested, outcomes, strict=True)}
    for row in rows:
        outcome = by_row.get(id(row), Outcome("refused", "there is no completion to test"))
        row["metrics"] = {"passed": float(outcome.status == "passed"), **row["metrics"]}
        row["test"] = asdict(outcome)
    return {
        "isolation": isolation.name,
        "about": isolation.about,
        "limits": asdict(limits),
        "num_by_status": dict(sorted(Counter(row["test"]["status"] for row in rows).items())),
    }


def _ks(given: str | None, num_samples: int) -> tuple[int, ...]:
    if given is None:
        return tuple(k for k in _USUAL_K if k <= num_samples)
    try:
        ks = tuple(sorted({int(k) for k in given.split(",")}))
    except ValueError:
        raise ValueError(f"--k takes whole numbers with commas between them, such as 1,10, not {given!r}") from None
    if ks[0] < 1 or ks[-1] > num_samples:
        raise ValueError(
            f"--k must be from 1 to the samples per case, of which this run has {num_samples}, not {given}; run with a "
            "larger --num_samples for a larger k"
        )
    return ks


def write_scores(run: Run, rows: Iterable[Row], tables: Row) -> None:
    """Replace both files, the tables last: until they stand, the rows before them do not count."""
    with replacing(run.directory / SCORES) as file:
        file.writelines(map(to_line, rows))
    write_json(run.directory / TABLES, {**tables, "sha256": {SCORES: sha256_of(run.directory / SCORES)}})


# ---- options --------------------------------------------------------------------------------------------------------


def _parser(world: World) -> Parser:
    parser = Parser(
        world,
        "python -m megatron_infer eval score",
        "Judge the completions of a finished eval run: writes scores.jsonl and scores.json beside them and prints the "
        "tables. Every option may be spelled with - or _.",
    )
    parser.add_argument("out", metavar="OUT", help="directory of a finished eval run")
    add_option(parser, "data", help="the benchmark's file, if it is no longer where the run found it")
    tests = parser.add_argument_group("unit tests, for benchmarks that have them")
    add_option(tests, "allow_exec", action="store_true", help="run code that the model wrote, under limits, for pass@k")
    add_option(tests, "k", help="pass@k for these, such as 1,10 (default: 1, 10 and 100 as far as there are samples)")
    limits = Limits()
    add_option(
        tests,
        "timeout_seconds",
        type=float,
        default=limits.timeout_seconds,
        help="wall time of one test program (default: %(default)s, as in HumanEval)",
    )
    add_option(
        tests,
        "memory_bytes",
        type=int,
        default=limits.memory_bytes,
        help="memory of all its processes together (default: %(default)s)",
    )
    add_option(
        tests,
        "num_workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="test programs at a time (default: one per core)",
    )
    return parser
