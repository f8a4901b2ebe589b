"""Which of a tree's holes become cases: evenly over files and by a seed, none twice, on one side of a split.

Holds one file at a time, and of the holes only those in the running. Knows no output and no command.
"""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction

from megatron_infer.eval.build.scenarios import SCENARIOS, Hole, find_holes
from megatron_infer.eval.build.sources import SourceFile, content_digest, read_source

_CONTEXT_BYTES = 100
"""Two holes are near-duplicates when so much on either side is the same, and the reference is; white space aside."""


@dataclass(frozen=True)
class Plan:
    """What to choose.

    per_scenario: cases of each scenario in each language. reference_chars: shortest and longest reference.
    context_chars: how much of prefix and suffix to keep, in whole lines; None: all. held_out: the share of files, or
    repositories, of side "test"; None: there are no sides.
    """

    languages: tuple[str, ...]
    scenarios: tuple[str, ...]
    per_scenario: int
    seed: int
    reference_chars: tuple[int, int]
    context_chars: int | None
    held_out: Fraction | None
    split: str

    def __post_init__(self) -> None:
        shortest, longest = self.reference_chars
        if self.per_scenario < 1:
            raise ValueError(f"--per_scenario must be at least 1, got {self.per_scenario}")
        if not 1 <= shortest <= longest:
            raise ValueError(f"--min_reference_chars {shortest} and --max_reference_chars {longest} leave no reference")
        if self.context_chars is not None and self.context_chars < 1:
            raise ValueError(f"--max_context_chars must be at least 1, got {self.context_chars}")
        if self.held_out is not None and not 0 < self.held_out < 1:
            raise ValueError(f"--held_out must lie between 0 and 1, got {self.held_out}")

    def holes_of(self, language: str, source: bytes) -> list[Hole] | None:
        """The holes of a file that are asked for and have the right length; None if it has syntax errors."""
        holes = find_holes(language, source)
        shortest, longest = self.reference_chars
        return holes and [
            hole
            for hole in holes
            if hole.scenario in self.scenarios
            and (hole.scenario == "empty" or shortest <= len(source[hole.start : hole.end].decode()) <= longest)
        ]


@dataclass(frozen=True)
class Candidate:
    """A hole that may become a row, and the file's state it was found in."""

    file: SourceFile
    hole: Hole
    sha256: str

    @property
    def place(self) -> tuple[str, int, str, str, int]:
        """Where its row stands in the output."""
        position = list(SCENARIOS).index(self.hole.scenario)
        return self.file.language, position, self.file.repository, self.file.name, self.hole.start


class Selection:
    """The first `limit` candidates of an order, each content once, whatever sequence they are offered in."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._best: dict[bytes, tuple[tuple[int, int], Candidate]] = {}
        self._bound = (sys.maxsize, 0)

    def wants(self, order: tuple[int, int]) -> bool:
        """Whether a candidate of this order could still be among the first."""
        return order < self._bound

    def offer(self, content: bytes, order: tuple[int, int], candidate: Candidate) -> None:
        known = self._best.get(content)
        if known is None or order < known[0]:
            self._best[content] = (order, candidate)
        if len(self._best) >= 2 * self._limit:
            self._drop_the_last()

    def _drop_the_last(self) -> None:
        first = sorted(self._best.items(), key=lambda item: item[1][0])[: self._limit]
        self._best = dict(first)
        if len(first) == self._limit:
            self._bound = first[-1][1][0]

    def candidates(self) -> list[Candidate]:
        self._drop_the_last()
        return [candidate for _, candidate in self._best.values()]


@dataclass
class Survey:
    """What the trees gave. found: holes by (language, scenario). skipped: files, and folders, by reason."""

    found: Counter[tuple[str, str]]
    skipped: Counter[str]
    kept: list[Candidate]
    num_files: int = 0


def survey(files: Iterable[SourceFile], plan: Plan, excluded: set[bytes], skipped: Counter[str]) -> Survey:
    """Choose from `files`, of which at most one at a time is in memory. Files of the other side are not cut.

    A file whose content is excluded, or stood in another file, or on the other side of the split, gives no hole.
    """
    result = Survey(Counter(), skipped, [])
    chosen: dict[tuple[str, str], Selection] = {}
    seen = set(excluded)
    for file, wanted in _by_side(files, plan):
        source, unfit = read_source(file.path) if wanted or plan.split == "test" else (b"", "")
        digest = content_digest(source)
        holes = None
        if not wanted:
            unfit = unfit or "other side of the split"
        elif digest in excluded:
            unfit = unfit or "excluded by content"
        elif digest in seen:
            unfit = unfit or "duplicate of another file"
        elif not unfit:
            holes = plan.holes_of(file.language, source)
            unfit = "syntax errors" if holes is None else ""
        seen.add(digest)
        if unfit or holes is None:
            skipped[unfit] += 1
            continue
        result.num_files += 1
        result.found.update((file.language, hole.scenario) for hole in holes)
        _choose(file, source, holes, plan, chosen)
    kept = [candidate for selection in chosen.values() for candidate in selection.candidates()]
    result.kept = sorted(kept, key=lambda candidate: candidate.place)
    return result


def _by_side(files: Iterable[SourceFile], plan: Plan) -> Iterator[tuple[SourceFile, bool]]:
    """Every file, and whether it is to be cut; the side "rest" first, so that its contents leave the test side."""
    if plan.held_out is None:
        yield from ((file, True) for file in files)
        return
    sides: tuple[list[SourceFile], list[SourceFile]] = ([], [])
    for file in files:
        sides[file.is_held_out(plan.held_out)].append(file)
    yield from ((file, plan.split == "rest") for file in sides[False])
    yield from ((file, plan.split == "test") for file in sides[True])


def _choose(
    file: SourceFile, source: bytes, holes: list[Hole], plan: Plan, chosen: dict[tuple[str, str], Selection]
) -> None:
    """Offer a file's holes: of every file one, drawn by the seed, then of every file a second, and so on."""
    sha256 = hashlib.sha256(source).hexdigest()
    ranked: dict[str, list[tuple[int, Hole]]] = {}
    for hole in holes:
        text = f"{plan.seed}\0{hole.scenario}\0{file.full_name}\0{hole.start}"
        rank = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
        ranked.setdefault(hole.scenario, []).append((rank, hole))
    for scenario, candidates in ranked.items():
        selection = chosen.setdefault((file.language, scenario), Selection(plan.per_scenario))
        for turn, (rank, hole) in enumerate(sorted(candidates, key=lambda pair: pair[0])):
            if not selection.wants((turn, rank)):
                break
            selection.offer(_content_of(hole, source), (turn, rank), Candidate(file, hole, sha256))


def _content_of(hole: Hole, source: bytes) -> bytes:
    """The same for near-duplicates."""
    reach = 10 * _CONTEXT_BYTES  # enough of both in all but the emptiest of files
    before = b"".join(source[max(0, hole.start - reach) : hole.start].split())[-_CONTEXT_BYTES:]
    after = b"".join(source[hole.end : hole.end + reach].split())[:_CONTEXT_BYTES]
    reference = b"".join(source[hole.start : hole.end].split())
    return hashlib.blake2b(b"\0".join((before, reference, after)), digest_size=16).digest()
