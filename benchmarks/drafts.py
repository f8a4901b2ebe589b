"""What drafts bring: the same prompts with drafts and without, in turn, on one engine; tokens per second and per step.

python -m benchmarks.drafts --model_dir DIR [--out FOLDER] [--parts holes typed noise] [--cases 16] [--repetitions 3]

Holes of several lines are cut from the sources of installed packages and of this project, the same in every run; two
files of the same package that share the most words go with each. Prompts are laid out as for typing, and answers end
by `--ending`. "typed" asks again after part of an answer has been typed as it was shown. "noise" is text in which
nothing repeats: distinct random tokens, continued at a high temperature. All but the last token of a prompt is in the
KV cache before the time is taken, which is that of the whole call. Each repetition has a drafter of its own, which
has seen none of the answers. Ends with one JSON line; `--out` gets the report.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import re
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.peers import machine
from megatron_infer import LLM, Completion, FimOptions, FimPrompt, SamplingParams
from megatron_infer.engine.drafter import LookupDrafter

PACKAGES = (
    "_pytest", "asyncio", "hypothesis", "jinja2", "megatron_infer.engine", "numpy.lib", "packaging", "torch.optim",
    "torch.utils.data", "tqdm",
)  # fmt: skip
FILE_BYTES = range(2_500, 30_000)
EXTRA_BYTES = 2_500
"""Of each extra file, its head."""
LINES_BEFORE, LINES_BEHIND, HOLE_LINES = 40, 25, range(3, 9)
TYPED_SHARES = (0.1, 0.4, 0.7)
"""Of an answer's characters: how much of it the user has typed, from one hole to the next."""
NOISE_TOKENS = 1000
TARGETS = {"holes": 1.3, "typed": 2.0, "noise": 0.97}
SIDES = ("without", "with")


@dataclass
class Totals:
    """Sums over the calls of one side."""

    answers: int = 0
    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0
    drafted: Counter[str] = field(default_factory=Counter)
    accepted: Counter[str] = field(default_factory=Counter)

    def add(self, completion: Completion) -> None:
        """Count one call."""
        timings = completion.timings
        self.answers += 1
        self.tokens += timings.num_new_tokens
        self.steps += len(set(timings.token_seconds))
        self.seconds += timings.total_seconds
        for source, (drafted, accepted) in completion.draft_sources.items():
            self.drafted[source] += drafted
            self.accepted[source] += accepted


Runs = list[dict[str, Totals]]
"""For each repetition, by side."""


class Bench:
    """One engine, of which the drafter is exchanged from call to call, and a drafter for each repetition."""

    def __init__(self, llm: LLM, repetitions: int, options: FimOptions) -> None:
        self.llm, self._options = llm, options
        self._most = llm.config.num_draft_tokens or 0
        self.repetitions = repetitions
        self.forget()
        self._turn = 0

    def forget(self) -> None:
        """Begin with drafters that have seen nothing."""
        self._drafters = [LookupDrafter(self._most) for _ in range(self.repetitions)]

    def ask(self, prompt: FimPrompt | list[int], sampling: SamplingParams, runs: Runs) -> Completion:
        """A prompt in every repetition on both sides, which take turns in beginning; its answer, which all share."""
        self._complete(prompt, replace(sampling, max_new_tokens=0), None)
        found = []
        for drafter, totals in zip(self._drafters, runs, strict=True):
            self._turn += 1
            for side in SIDES if self._turn % 2 else SIDES[::-1]:
                found.append(self._complete(prompt, sampling, drafter if side == "with" else None))
                totals[side].add(found[-1])
        assert len({answer.token_ids for answer in found}) == 1, "drafts have changed an answer"
        return found[0]

    def _complete(
        self, prompt: FimPrompt | list[int], sampling: SamplingParams, drafter: LookupDrafter | None
    ) -> Completion:  # fmt: skip
        self.llm.session._engine.scheduler._drafter = drafter
        return self.llm.complete(prompt, sampling, self._options)

    def no_totals(self) -> Runs:
        """Where a part's calls are counted."""
        return [{side: Totals() for side in SIDES} for _ in range(self.repetitions)]


def holes(count: int) -> Iterator[FimPrompt]:
    """Holes of HOLE_LINES lines, a package at a time, each in a file of its own."""
    draw = random.Random(0)
    pools = [(package, sources_of(package)) for package in PACKAGES]
    for number in range(count):
        package, pool = pools[number % len(pools)]
        path, text = pool.pop(draw.randrange(len(pool)))
        lines = text.splitlines(keepends=True)
        starts = [i for i in range(len(lines) // 3, len(lines) - 12) if lines[i].strip() and lines[i - 1].strip()]
        start, length = draw.choice(starts), draw.choice(HOLE_LINES)
        yield FimPrompt(
            "".join(lines[max(0, start - LINES_BEFORE) : start]),
            "\n" + "".join(lines[start + length : start + length + LINES_BEHIND]),
            path, extra_files=tuple(neighbours(path, text, sources_of(package))), repository=package,
        )  # fmt: skip


def sources_of(package: str) -> list[tuple[str, str]]:
    """(path, text) of the Python files of FILE_BYTES and at least 60 lines below an installed package, in order."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None, f"{package} is not installed"
    root = Path(spec.origin).parent
    files = [path for path in sorted(root.rglob("*.py")) if path.stat().st_size in FILE_BYTES]
    texts = [(path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")) for path in files]
    return [(path, text) for path, text in texts if text.count("\n") >= 60]


def neighbours(path: str, text: str, pool: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The two other files that share the most words, the closest last."""
    words = set(re.findall(r"\w{4,}", text))
    shared = [(len(words & set(re.findall(r"\w{4,}", other))), name, other) for name, other in pool if name != path]
    return [(name, other[:EXTRA_BYTES]) for _, name, other in sorted(shared)[-2:]]


def fill_and_type(bench: Bench, count: int, sampling: SamplingParams) -> tuple[Runs, Runs]:
    """`count` holes, and for each the keystroke by which part of what was shown is typed."""
    filled, typed = bench.no_totals(), bench.no_totals()
    for number, hole in enumerate(holes(count)):
        text = bench.ask(hole, sampling, filled).text
        text = text[: int(TYPED_SHARES[number % len(TYPED_SHARES)] * len(text))]
        if text:
            bench.ask(replace(hole, prefix=hole.prefix + text), sampling, typed)
        print(f"{number + 1} of {count} ({hole.repository}, {hole.path})", file=sys.stderr, flush=True)
    return filled, typed


def continue_noise(bench: Bench, count: int, new_tokens: int) -> Runs:
    """Prompts of distinct tokens, continued so that nothing repeats."""
    bench.forget()
    draw, runs = random.Random(1), bench.no_totals()
    vocab_size = bench.llm.tokenizer.vocab_size
    for seed in range(count):
        sampling = SamplingParams(max_new_tokens=new_tokens, temperature=3.0, seed=seed, ignore_eos=True)
        bench.ask(draw.sample(range(vocab_size), min(NOISE_TOKENS, vocab_size)), sampling, runs)
    return runs


def figures(runs: Runs) -> dict[str, Any]:
    """What a part comes to: medians over the repetitions; counts are sums over them."""
    drafted = [run["with"] for run in runs]
    speedups = sorted(run["without"].seconds / run["with"].seconds for run in runs)
    counts: dict[str, dict[str, int]] = {}
    for totals in drafted:
        for source, tokens in totals.drafted.items():
            found = counts.setdefault(source, {"drafted": 0, "accepted": 0})
            found["drafted"] += tokens
            found["accepted"] += totals.accepted[source]
    return {
        "answers": drafted[0].answers,
        "tokens": drafted[0].tokens,
        "tokens_per_second": {
            side: statistics.median(r[side].tokens / r[side].seconds for r in runs) for side in SIDES
        },
        "milliseconds_per_answer": {
            side: statistics.median(1e3 * r[side].seconds / r[side].answers for r in runs) for side in SIDES
        },
        "speedup": statistics.median(speedups),
        "speedups": speedups,
        "tokens_per_step": sum(t.tokens for t in drafted) / sum(t.steps for t in drafted),
        "steps_per_answer": sum(t.steps for t in drafted) / sum(t.answers for t in drafted),
        "sources": dict(sorted(counts.items())),
    }


def markdown(results: dict[str, Any], told: dict[str, Any], args: argparse.Namespace) -> str:
    """The report."""
    lines = [
        "# Drafts without a draft model", "",
        "The same prompts with drafts and without, in turn; the answers have the same ids, which the run checks. Times",
        f"are medians of {args.repetitions} repetitions, each by a drafter that has seen none of the answers.",
        "`benchmarks/drafts.py` says what is asked.", "",
        "| | " + " | ".join(results) + " |", "|:--|" + "--:|" * len(results),
    ]  # fmt: skip
    rows = [
        ("answers, tokens", lambda part: f"{part['answers']}, {part['tokens']}"),
        ("tokens per second without drafts", lambda part: f"{part['tokens_per_second']['without']:.1f}"),
        ("tokens per second with drafts", lambda part: f"{part['tokens_per_second']['with']:.1f}"),
        ("times as fast", lambda part: f"{part['speedup']:.2f}"),
        (
            "in the slowest and the fastest repetition",
            lambda part: f"{part['speedups'][0]:.2f} to {part['speedups'][-1]:.2f}",
        ),
        ("ms per answer without drafts", lambda part: f"{part['milliseconds_per_answer']['without']:.0f}"),
        ("ms per answer with drafts", lambda part: f"{part['milliseconds_per_answer']['with']:.0f}"),
        ("tokens per step with drafts", lambda part: f"{part['tokens_per_step']:.2f}"),
        ("steps per answer with drafts", lambda part: f"{part['steps_per_answer']:.1f}"),
        *(
            (f"drafted from {source}, accepted", lambda part, source=source: _share(part["sources"].get(source)))
            for source in sorted({source for part in results.values() for source in part["sources"]})
        ),
    ]
    lines += [f"| {name} | {' | '.join(cell(part) for part in results.values())} |" for name, cell in rows]
    lines += ["", "| | |", "|:--|:--|", *(f"| {name} | {value} |" for name, value in told.items()), ""]
    return "\n".join(lines)


def _share(counts: dict[str, int] | None) -> str:
    return "-" if counts is None else f"{counts['drafted']}, {counts['accepted'] / counts['drafted']:.0%}"


def show(name: str, part: dict[str, Any]) -> None:
    """Print a part."""
    rates = part["tokens_per_second"]
    print(
        f"{name:<6} {rates['without']:7.1f} -> {rates['with']:7.1f} tokens/s, {part['speedup']:.2f}x (target "
        f"{TARGETS[name]}x); {part['tokens_per_step']:.2f} tokens per step, {part['steps_per_answer']:.1f} steps per "
        f"answer, {part['tokens']} tokens"
    )
    for source, counts in part["sources"].items():
        print(f"       {source}: {_share(counts)} accepted")


def main() -> None:
    """Compare in the parts that are asked for, write the report, and print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_dir", type=Path, required=True, help="of a family with a format for extra files")
    parser.add_argument("--out", type=Path, help="folder for drafts.md and drafts.json")
    parser.add_argument("--parts", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--quantization", default="int8")
    parser.add_argument("--num_threads", type=int, default=2)
    parser.add_argument("--cases", type=int, default=16, help="holes; two thirds as many prompts of noise")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--new_tokens", type=int, default=64, help="of an answer, at most; half of it behind noise")
    parser.add_argument("--ending", default="auto")
    parser.add_argument("--kv_cache_memory_bytes", type=int, default=512 << 20)
    args = parser.parse_args()
    told = machine.provenance(f"python -m benchmarks.drafts {' '.join(sys.argv[1:])}", "auto", args.num_threads)
    with tempfile.TemporaryDirectory() as folder:
        ceilings = machine.Ceilings(Path(folder), machine.best_isa(), args.num_threads).measure()
    told["reads"] = f"{ceilings['read_gb_per_second_median']:.1f} GB/s, what the machine can do at best"
    runs: dict[str, Runs] = {}
    with LLM(
        args.model_dir, quantization=args.quantization, num_threads=args.num_threads, device="cpu",
        kv_cache_memory_bytes=args.kv_cache_memory_bytes,
    ) as llm:  # fmt: skip
        bench = Bench(llm, args.repetitions, llm.fim.interactive)
        if {"holes", "typed"} & set(args.parts):
            sampling = SamplingParams(max_new_tokens=args.new_tokens, ending=args.ending)
            runs["holes"], runs["typed"] = fill_and_type(bench, args.cases, sampling)
        if "noise" in args.parts:
            runs["noise"] = continue_noise(bench, max(args.cases * 2 // 3, 1), args.new_tokens // 2)
    results = {name: figures(runs[name]) for name in TARGETS if name in args.parts}
    for name, part in results.items():
        show(name, part)
    print(f"the machine reads {told['reads']}")
    everything = json.dumps({**told, "results": results}, default=str)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "drafts.md").write_text(markdown(results, told, args), encoding="utf-8")
        (args.out / "drafts.json").write_text(everything + "\n", encoding="utf-8")
    print(everything)


if __name__ == "__main__":
    main()
