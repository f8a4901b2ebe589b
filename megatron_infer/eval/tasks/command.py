"""The command `eval tasks`: every benchmark with its settings, where its data is, under what licence, and its cuts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

from megatron_infer.commands.options import Parser, run_command
from megatron_infer.eval.cases import Task
from megatron_infer.eval.tasks.registry import CUTS_ABOUT, TASKS, task
from megatron_infer.world import World


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m megatron_infer eval tasks`. Returns the exit status."""
    return run_command(lambda world: _run(world, argv))


def _run(world: World, argv: Sequence[str] | None) -> int:
    parser = Parser(world, "python -m megatron_infer eval tasks", "List the benchmarks that eval run knows.")
    parser.add_argument("names", metavar="TASK", nargs="*", help="only these (default: all)")
    names = parser.parse_args(argv).names
    for each in map(task, names) if names else TASKS.values():
        print("\n".join(_lines(each)), end="\n\n")
    return 0


def _lines(each: Task) -> Iterator[str]:
    yield f"{each.name}\n  {each.about}"
    yield f"  data: {each.source}; licence: {each.licence or 'not stated there'}"
    yield from (f"  sha256 of {name}: {sha256}" for name, sha256 in each.files.items())
    yield f"  defaults: {', '.join([*_set(each.options), *_set(each.sampling)])}"
    yield f"  metrics: {', '.join([*(['pass@k'] if each.program else []), *each.metrics]) or 'likelihood'}"
    for cut in each.cuts:
        yield f"  --truncate {cut}{' (official)' if cut == each.official_cut else ''}: {CUTS_ABOUT[cut]}"


def _set(settings: Any) -> Iterator[str]:
    """The settings that are not the engine's own defaults."""
    for spec in fields(settings):
        if (value := getattr(settings, spec.name)) != spec.default:
            yield f"--{spec.name} {value}"
