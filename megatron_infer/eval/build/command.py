"""The command `eval build`: a fill-in-the-middle benchmark from source trees, for task "fim".

Owns the rows and the summary. sources.py finds the files, scenarios.py their holes, selection.py chooses.
"""

from __future__ import annotations

import argparse
import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_infer.commands.options import Parser, add_option, run_command, say
from megatron_infer.eval.build.scenarios import SCENARIOS, load_grammars
from megatron_infer.eval.build.selection import Candidate, Plan, Survey, survey
from megatron_infer.eval.build.sources import digests_of, list_sources, read_source
from megatron_infer.eval.files import replacing, to_line
from megatron_infer.world import World


def to_row(candidate: Candidate, source: bytes, context_chars: int | None) -> dict[str, Any]:
    """The row of task "fim". prefix + reference + suffix is the file, or with `context_chars` a piece of it."""
    file, hole = candidate.file, candidate.hole
    prefix, suffix = source[: hole.start].decode(), source[hole.end :].decode()
    line, column = prefix.count("\n") + 1, len(prefix) - prefix.rfind("\n")
    if context_chars is not None:
        far = len(prefix) - context_chars
        if far > 0:
            prefix = prefix[prefix.find("\n", far - 1) + 1 or far :]
        if len(suffix) > context_chars:
            suffix = suffix[: suffix.rfind("\n", 0, context_chars) + 1 or context_chars]
    return {
        "task_id": f"{file.full_name}:{line}:{column}:{hole.scenario}", "language": file.language,
        "scenario": hole.scenario, **({"repository": file.repository} if file.repository else {}), "path": file.name,
        "prefix": prefix, "suffix": suffix, "reference": source[hole.start : hole.end].decode(),
        "source_sha256": candidate.sha256,
    }  # fmt: skip


def write_rows(out: Path, candidates: Sequence[Candidate], context_chars: int | None) -> None:
    """Write the benchmark whole or not at all. Raises ValueError: it cannot be written, or a source has changed."""
    try:
        with replacing(out) as output:
            for candidate in candidates:
                source, _ = read_source(candidate.file.path)
                if hashlib.sha256(source).hexdigest() != candidate.sha256:
                    raise ValueError(f"{candidate.file.path} changed in the meantime; build again")
                output.write(to_line(to_row(candidate, source, context_chars)))
    except OSError as error:
        raise ValueError(f"cannot write {out}: {error.strerror or error}") from None


def summary(result: Survey, plan: Plan) -> Iterator[str]:
    """Lines of a table, kept / found by scenario and language, and what was skipped."""
    grammars = load_grammars()
    languages = [name for name in plan.languages if any(language == name for language, _ in result.found)]
    kept = Counter((candidate.file.language, candidate.hole.scenario) for candidate in result.kept)
    yield "kept / found".ljust(20) + "".join(f"{name:>16}" for name in languages)
    for scenario in plan.scenarios:
        cells = [
            "none" if scenario in grammars[name].absent else f"{kept[name, scenario]} / {result.found[name, scenario]}"
            for name in languages
        ]
        yield scenario.ljust(20) + "".join(f"{cell:>16}" for cell in cells)
    for name in languages:
        yield from (f"none: {why}" for scenario, why in grammars[name].absent.items() if scenario in plan.scenarios)
    yield f"{len(result.kept)} cases from {result.num_files} files"
    for reason, number in sorted(result.skipped.items()):
        yield f"skipped, {reason}: {number}"


# ---- the command ----------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m megatron_infer eval build`. Returns the exit status."""
    return run_command(lambda world: _run(_parser(world).parse_args(argv)))


def _run(args: argparse.Namespace) -> int:
    plan = Plan(
        _names(args.languages, tuple(load_grammars()), "--languages"),
        _names(args.scenarios, tuple(SCENARIOS), "--scenarios"), args.per_scenario, args.seed,
        (args.min_reference_chars, args.max_reference_chars), args.max_context_chars, _share(args.held_out),
        args.split or "test",
    )  # fmt: skip
    out = Path(args.out)
    if args.split and plan.held_out is None:
        raise ValueError("--split chooses a side; give --held_out too, the share of the files on side test")
    if out.suffix != ".jsonl":
        raise ValueError(f"--out must end in .jsonl, got {out}")
    if not out.parent.is_dir():
        raise ValueError(f"there is no directory {out.parent} to write {out.name} to")
    if out.exists() and not args.force:
        raise ValueError(f"{out} exists; give another --out, or --force to replace it")
    skipped: Counter[str] = Counter()
    files = list_sources(args.sources, plan.languages, args.skip, args.repositories, skipped)
    excluded = digests_of(args.exclude, skipped)
    result = survey(tqdm(files, "files", unit="file", disable=None), plan, excluded, skipped)
    for line in summary(result, plan):
        say(line)
    if not result.kept:
        raise ValueError("no hole was found, and nothing written; the lines above say what was skipped, and why")
    write_rows(out, result.kept, plan.context_chars)
    return 0


def _names(text: str | None, known: tuple[str, ...], option: str) -> tuple[str, ...]:
    """Names from a comma-separated list, in the order of `known`; all where there is no list. Raises ValueError."""
    names = known if text is None else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise ValueError(f"{option}: there is no {name!r}; known are {', '.join(known)}")
    return tuple(name for name in known if name in names)


def _share(text: str | None) -> Fraction | None:
    try:
        return None if text is None else Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"--held_out takes a share such as 0.1 or 1/20, not {text!r}") from None


def _parser(world: World) -> Parser:
    parser = Parser(
        world,
        "python -m megatron_infer eval build",
        "Make a fill-in-the-middle benchmark of task fim from source trees: whole syntax nodes are cut out of files "
        "that parse. The same trees and seed give the same bytes, wherever the trees lie. "
        "Every option may be spelled with - or _.",
    )
    parser.add_argument("sources", nargs="+", metavar="SRC", help="directories; or single files, named as given")
    add_option(parser, "out", required=True, metavar="FILE.jsonl", help="the benchmark to write")
    add_option(parser, "force", action="store_true", help="replace --out where it exists")
    files = parser.add_argument_group("files")
    add_option(files, "languages", metavar="NAMES", help=f"of {','.join(load_grammars())} (default: all)")
    add_option(
        files, "skip", action="append", default=[], metavar="PATTERN", help="skip paths like 'test/*'; repeatable"
    )
    add_option(
        files, "exclude", action="append", default=[], metavar="PATH",
        help="skip files whose content, white space aside, is in this training file or tree, or in a file named in "
        "this .txt list; repeatable",
    )  # fmt: skip
    add_option(files, "repositories", action="store_true", help="the first folder below SRC is a repository of its own")
    add_option(
        files, "held_out", metavar="SHARE",
        help="put so many files, or repositories, on side test, by a hash of the path alone (0.05 or 1/20)",
    )  # fmt: skip
    add_option(files, "split", choices=("test", "rest"), help="the side to build from (default: test)")
    holes = parser.add_argument_group("holes")
    add_option(holes, "scenarios", metavar="NAMES", help=f"of {','.join(SCENARIOS)} (default: all)")
    add_option(holes, "per_scenario", type=int, default=100, metavar="INT",
               help="cases per language and scenario, spread over the files (default: %(default)s)")  # fmt: skip
    add_option(holes, "seed", type=int, default=0, metavar="INT", help="of the choice (default: %(default)s)")
    add_option(holes, "min_reference_chars", type=int, default=4, metavar="INT", help="(default: %(default)s)")
    add_option(holes, "max_reference_chars", type=int, default=2000, metavar="INT", help="(default: %(default)s)")
    add_option(holes, "max_context_chars", type=int, metavar="INT",
               help="of prefix and of suffix, in whole lines (default: the whole file)")  # fmt: skip
    return parser
