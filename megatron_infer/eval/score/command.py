"""The command `eval score`: post-processes the completions of a finished run, judges them, and averages over cases.

Owns scores.jsonl, scores.json and what is printed. How a completion is judged stands in judging.py, how sure a mean is
in statistics.py; test programs run only where --allow_exec is given.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from tqdm import tqdm

from megatron_infer.commands.options import Parser, add_option, run_command, say
from megatron_infer.eval.files import replacing, to_line, write_json
from megatron_infer.eval.run.records import run_on_warning
from megatron_infer.eval.score.execution import Limits
from megatron_infer.eval.score.judging import Row, judge, run_tests
from megatron_infer.eval.score.predictions import import_predictions
from megatron_infer.eval.score.results import SCORES, TABLES, Run, read_run, read_run_cases, task_of
from megatron_infer.eval.score.tables import make_tables, show_tables
from megatron_infer.eval.tasks import truncation
from megatron_infer.eval.tasks.registry import task as task_named
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
    if args.predictions:
        if not (args.task and args.data):
            raise ValueError("--predictions needs --task and --data: what was completed")
        import_predictions(Path(args.predictions), task_named(args.task), Path(args.data), Path(args.out))
    elif args.task:
        raise ValueError("--task goes with --predictions; a run of eval run knows its own")
    run = read_run(args.out)
    task = task_of(run)
    ks = _ks(args.k, int(run.fingerprint["num_samples"]))
    if args.allow_exec and task.program is None:
        raise ValueError(f"task {task.name!r} has no test programs; leave out --allow_exec")
    cases = read_run_cases(run, task, args.data)
    rules = truncation.rules_of(args.truncate, task)
    num_rows = len(run.completions) * len(rules)
    rows = list(tqdm(judge(run, task, cases, rules), "judging", num_rows, disable=None, leave=False))
    execution = None
    if args.allow_exec:
        execution = run_tests(rows, task, cases, limits, args.num_workers)
    tables = make_tables(run, task, rows, rules, execution, ks if args.allow_exec else ())
    write_scores(run, rows, tables)
    for line in show_tables(tables):
        print(line.encode(errors="replace").decode())  # names in the data may have lone surrogates
    if warning := run_on_warning(tables["tables"]["overall"][0]["num_by_finish_reason"]):
        say(warning)
    if task.program is not None and not args.allow_exec:
        say(
            "tests were not run, so there is no pass@k: they execute code that the model wrote. To run them, with "
            f"time, memory, files and network limited: eval score {args.out} --allow_exec"
        )
    return 0


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
    parser.add_argument("out", metavar="OUT", help="directory of a finished eval run, or a new one with --predictions")
    add_option(parser, "data", help="the benchmark's file, if it is no longer where the run found it")
    add_option(
        parser, "predictions", metavar="FILE",
        help="judge another engine's completions, with --task and --data: .jsonl as the benchmark's own scorer reads "
        "it (the form of predictions.jsonl), or .json as bigcode-evaluation-harness saves it",
    )  # fmt: skip
    add_option(parser, "task", help="the task of --predictions")
    add_option(
        parser, "truncate", default=truncation.OFFICIAL,
        help="rules by which completions are cut before they are judged, with commas between them; the first one's "
        f"results stand in every table: {', '.join((truncation.OFFICIAL, *truncation.GENERAL))}, or a published cut "
        "of the task, which eval tasks lists (default: %(default)s)",
    )  # fmt: skip
    tests = parser.add_argument_group("unit tests, for benchmarks that have them")
    add_option(tests, "allow_exec", action="store_true", help="run code that the model wrote, under limits, for pass@k")
    add_option(tests, "k", help="pass@k for these, such as 1,10 (default: 1, 10 and 100 as far as there are samples)")
    limits = Limits()
    add_option(
        tests, "timeout_seconds", type=float, default=limits.timeout_seconds,
        help="wall time of one test program (default: %(default)s, as in HumanEval)",
    )  # fmt: skip
    add_option(
        tests, "memory_bytes", type=int, default=limits.memory_bytes,
        help="memory of all its processes together (default: %(default)s)",
    )  # fmt: skip
    add_option(
        tests, "num_workers", type=int, default=len(os.sched_getaffinity(0)),
        help="test programs at a time (default: one per core)",
    )  # fmt: skip
    return parser
