"""What drafts bring: the same prompts in two engines over one model, with drafts and without, in turn.

python -m benchmarks.drafts --model_dir DIR [--quantization int8] [--num_threads 2] [--cases 20]

Holes are cut from the sources of installed Python packages, the same in every run; two files of the same package that
share the most words go with each. "typed" types the answer to a hole after it was shown. "noise" is text in which
nothing repeats: distinct random tokens, continued at a high temperature. All but the last token of a prompt is in the
KV cache before the time is taken, which is that of the whole call. Prints tokens per second, acceptance and the
machine's ceiling, and ends with one JSON line.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.peers import machine
from megatron_infer import LLM, Completion, FimPrompt, SamplingParams

PACKAGES = ("_pytest", "hypothesis", "jinja2", "numpy.lib", "packaging", "torch.optim", "torch.utils.data", "tqdm")
FILE_BYTES = range(2_500, 30_000)
EXTRA_BYTES = 8_000
"""Of each extra file, its head."""
LINES_BEFORE, LINES_BEHIND, HOLE_LINES = 60, 40, range(3, 9)
TYPED_SHARES = (0.02, 0.25, 0.5)
"""Of an answer's characters: how much of it the user has typed."""
TARGETS = {"holes": 1.3, "typed": 2.0, "noise": 0.97}
SIDES = ("without", "with")


@dataclass
class Totals:
    """Sums over the calls of one side."""

    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0
    drafted: Counter[str] = field(default_factory=Counter)
    accepted: Counter[str] = field(default_factory=Counter)

    def add(self, completion: Completion) -> None:
        """Count one call."""
        timings = completion.timings
        self.tokens += timings.num_new_tokens
        self.steps += len(set(timings.token_seconds))
        self.seconds += timings.total_seconds
        for source, (drafted, accepted) in completion.draft_sources.items():
            self.drafted[source] += drafted
            self.accepted[source] += accepted


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
            "".join(lines[start + length : start + length + LINES_BEHIND]),
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


def compare(
    sides: dict[str, LLM], prompts: Iterable[tuple[FimPrompt | list[int], SamplingParams]]
) -> tuple[dict[str, Totals], list[Completion]]:
    """Every prompt on both sides, which take turns in beginning; their totals, and the answers."""
    totals = {name: Totals() for name in sides}
    answers = []
    for number, (prompt, sampling) in enumerate(prompts):
        found = {}
        for name in SIDES if number % 2 else SIDES[::-1]:
            llm = sides[name]
            ids = llm.fim.encode(prompt).ids if isinstance(prompt, FimPrompt) else prompt
            llm.complete(ids[:-1], SamplingParams(max_new_tokens=1))
            found[name] = llm.complete(prompt, sampling)
            totals[name].add(found[name])
        answer, drafted = (found[name] for name in SIDES)
        assert answer.token_ids == drafted.token_ids, "drafts have changed an answer"
        answers.append(answer)
    return totals, answers


def typed(shown: Iterable[tuple[FimPrompt, Completion]]) -> Iterator[FimPrompt]:
    """The prompts of a user who types what was shown; shares of less than a character are left out."""
    for prompt, answer in shown:
        for share in TYPED_SHARES:
            text = answer.text[: int(share * len(answer.text))]
            if share == TYPED_SHARES[0] or text:
                yield FimPrompt(prompt.prefix + text, prompt.suffix, prompt.path, prompt.extra_files, prompt.repository)


def noise(count: int, vocab_size: int, new_tokens: int) -> Iterator[tuple[list[int], SamplingParams]]:
    """Prompts of distinct tokens, and how to continue them so that nothing repeats."""
    draw = random.Random(1)
    for seed in range(count):
        sampling = SamplingParams(max_new_tokens=new_tokens, temperature=3.0, seed=seed, ignore_eos=True)
        yield draw.sample(range(vocab_size), min(1000, vocab_size)), sampling


def figures(totals: dict[str, Totals]) -> dict[str, Any]:
    """What a comparison comes to."""
    without, drafted = (totals[name] for name in SIDES)
    return {
        "tokens": drafted.tokens,
        "tokens_per_second": {name: totals[name].tokens / totals[name].seconds for name in SIDES},
        "speedup": without.seconds / drafted.seconds,
        "tokens_per_step": drafted.tokens / drafted.steps,
        "sources": {
            source: {"drafted": tokens, "accepted": drafted.accepted[source]}
            for source, tokens in sorted(drafted.drafted.items())
        },
    }


def show(name: str, result: dict[str, Any]) -> None:
    """Print a comparison."""
    rates = result["tokens_per_second"]
    print(
        f"{name:<6} {rates['without']:7.1f} -> {rates['with']:7.1f} tokens/s, {result['speedup']:.2f}x (target "
        f"{TARGETS[name]}x); {result['tokens_per_step']:.2f} tokens per step, {result['tokens']} tokens"
    )
    for source, counts in result["sources"].items():
        share = counts["accepted"] / counts["drafted"]
        print(f"       {source}: {counts['drafted']} drafted, {share:.0%} accepted")


def main() -> None:
    """Compare in the three scenarios, and print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_dir", type=Path, required=True, help="of a family with a format for extra files")
    parser.add_argument("--quantization", default="int8")
    parser.add_argument("--num_threads", type=int, default=2)
    parser.add_argument("--cases", type=int, default=20)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--ending", default="auto")
    parser.add_argument("--kv_cache_memory_bytes", type=int, default=512 << 20)
    args = parser.parse_args()
    command = "python -m benchmarks.drafts " + " ".join(f"--{name} {value}" for name, value in vars(args).items())
    told = machine.provenance(command, "auto", args.num_threads)
    with tempfile.TemporaryDirectory() as folder:
        told["ceilings"] = machine.Ceilings(Path(folder), machine.best_isa(), args.num_threads).measure()
    options = {
        "quantization": args.quantization, "num_threads": args.num_threads, "device": "cpu",
        "kv_cache_memory_bytes": args.kv_cache_memory_bytes,
    }  # fmt: skip
    results = {}
    with (
        LLM(args.model_dir, num_draft_tokens=0, **options) as without,
        LLM(args.model_dir, num_draft_tokens=None, **options) as drafting,
    ):
        sides = dict(zip(SIDES, (without, drafting), strict=True))
        sampling = SamplingParams(max_new_tokens=args.new_tokens, ending=args.ending)
        prompts = list(holes(args.cases))
        totals, answers = compare(sides, ((prompt, sampling) for prompt in prompts))
        results["holes"] = figures(totals)
        show("holes", results["holes"])
        shown = zip(prompts, answers, strict=True)
        results["typed"] = figures(compare(sides, ((prompt, sampling) for prompt in typed(shown)))[0])
        show("typed", results["typed"])
        vocab_size = without.tokenizer.vocab_size
        results["noise"] = figures(compare(sides, noise(args.cases, vocab_size, args.new_tokens))[0])
        show("noise", results["noise"])
    print(f"reads {told['ceilings']} (machine's ceiling)")
    print(json.dumps({**told, "results": results}, default=str))


if __name__ == "__main__":
    main()
