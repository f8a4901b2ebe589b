"""Many kinds of calls on two sessions for a long time: right answers, and nothing that grows.

python -m tests.soak --minutes 30 --seed 0      # exit status 0: answers equal, slopes flat

Two sessions of the demo, of one rank with drafts and of two ranks without, have KV caches so small that requests are
preempted all the time. Threads complete, stream, batch, cancel, walk away and send bad input. Between rounds nothing
may be left over. Once a minute answers are asked again of a fresh engine with a roomy cache, bit for bit.
"""

from __future__ import annotations

import argparse
import faulthandler
import math
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from megatron_infer import LLM, Completion, FimOptions, FimPrompt, SamplingParams
from tests.support.invariants import check_scheduler

ROOT = Path(__file__).resolve().parents[1]
MAX_MODEL_LEN, NUM_BLOCKS, BLOCK_SIZE = 256, 18, 16
BLOCK_BYTES = 2 * 5 * 2 * 32 * 2 * BLOCK_SIZE
"""Of the demo with one rank: keys and values, 5 layers, 2 heads of 32, bfloat16."""
NUM_CLIENTS, ACTIONS_PER_ROUND = 6, 6
COMPARED_PER_CHECK = 12
ROUND_LIMIT_SECONDS = 300
LIMITS = {"rss_mib": 0.25, "descriptors": 0.01, "threads": 0.01, "free_blocks": 0.01}
"""The steepest slope per minute that counts as flat. A leak of one page per answer would be tenfold the first."""

Answer = tuple[object, ...]


@dataclass(frozen=True)
class Question:
    """One completion that can be asked again."""

    prompt: FimPrompt
    sampling: SamplingParams
    options: FimOptions


@dataclass
class Soak:
    """What all clients share. `running`: what each is at, for the report of a crash."""

    seed: int
    sessions: Sequence[LLM]
    texts: Sequence[str]
    running: dict[int, str] = field(default_factory=dict)
    answered: list[tuple[Question, Answer]] = field(default_factory=list)


def answer_of(done: Completion) -> Answer:
    """All of a completion that does not depend on time, cache or drafts."""
    return (
        done.text, done.token_ids, done.finish_reason, done.logprobs, done.prompt_logprobs, done.num_dropped_tokens,
        done.trimmed_by, done.raw_text,
    )  # fmt: skip


def question(rng: random.Random, texts: Sequence[str]) -> Question:
    """A hole in real code, often the one of a moment ago with another few characters typed."""
    text = rng.choice(texts)
    cursor = rng.randrange(len(text)) // 200 * 200 + rng.randrange(8)
    prefix = text[max(0, cursor - rng.choice((40, 200, 500))) : cursor]
    prompt = FimPrompt(prefix, text[cursor + 40 : cursor + 40 + rng.choice((0, 30, 200))], f"src/m{cursor % 5}.py")
    is_greedy = rng.random() < 0.5
    sampling = SamplingParams(
        max_new_tokens=rng.choice((1, 8, 32, 64, 120)), temperature=0.0 if is_greedy else rng.choice((0.3, 1.0)),
        top_p=rng.choice((1.0, 0.9)), seed=rng.randrange(1000), ending=rng.choice(("raw", "line", "block", "auto")),
        logprobs=rng.choice((None, None, 0, 3)), prompt_logprobs=rng.choice((None, None, None, 1)),
        stop=rng.choice(((), (), ("\n\n",))), repetition_penalty=rng.choice((1.0, 1.0, 1.1)),
        ignore_eos=rng.random() < 0.3,
    )  # fmt: skip
    return Question(prompt, sampling, FimOptions(token_healing=rng.random() < 0.4))


def client(soak: Soak, number: int, round_number: int) -> list[str]:
    """The actions of one client in a round, by name; they depend on seed, round and number alone."""
    rng = random.Random(f"{soak.seed}/{round_number}/{number}")
    names = []
    for _ in range(ACTIONS_PER_ROUND):
        name, action = rng.choice(list(ACTIONS.items()))
        llm, asked = rng.choice(soak.sessions), question(rng, soak.texts)
        soak.running[number] = f"{name} on tp {llm.config.tensor_parallel_size}: {asked}"
        action(soak, llm, asked, rng)
        del soak.running[number]
        names.append(name)
    return names


# ---- what a client does ---------------------------------------------------------------------------------------------


def complete(soak: Soak, llm: LLM, asked: Question, rng: random.Random) -> None:
    done = llm.complete(asked.prompt, asked.sampling, asked.options)
    soak.answered.append((asked, answer_of(done)))


def stream(soak: Soak, llm: LLM, asked: Question, rng: random.Random) -> None:
    pieces = llm.stream(asked.prompt, asked.sampling, asked.options)
    text = "".join(pieces)
    assert text == pieces.completion.text
    soak.answered.append((asked, answer_of(pieces.completion)))


def walk_away(soak: Soak, llm: LLM, asked: Question, rng: random.Random) -> None:
    pieces = iter(llm.stream(asked.prompt, asked.sampling, asked.options))
    for _ in range(rng.randrange(4)):
        next(pieces, None)


def batch(soak: Soak, llm: LLM, asked: Question, rng: random.Random) -> None:
    """Of several prompts, one of them bad; half of the time it is left before its end."""
    prompts = [question(rng, soak.texts).prompt for _ in range(rng.randrange(1, 8))]
    bad = rng.randrange(len(prompts) + 1)
    left_at = rng.randrange(2 * len(prompts))
    entries: list[FimPrompt | list[int]] = [*prompts]
    entries.insert(bad, [llm.model_config.vocab_size])
    for number, done in enumerate(llm.complete_batch(entries, asked.sampling, asked.options)):
        assert (done.error is not None) == (done.prompt_index == bad), done
        if done.error is None:
            prompt = entries[done.prompt_index]
            assert isinstance(prompt, FimPrompt)
            soak.answered.append((Question(prompt, asked.sampling, asked.options), answer_of(done)))
        if number == left_at:
            break


def cancel(soak: Soak, llm: LLM, asked: Question, rng: random.Random) -> None:
    handle = llm.session.submit(asked.prompt, asked.sampling, asked.options)
    for _ in range(rng.randrange(4)):
        llm.session.step()
    llm.session.cancel(handle)
    llm.session.step()
    assert handle.is_finished


def hurry(soak: Soak, llm: LLM, asked: Question, rng: random.Random) -> None:
    sampling = SamplingParams(max_new_tokens=120, deadline_ms=rng.randrange(1, 80), ending=asked.sampling.ending)
    assert llm.complete(asked.prompt, sampling, asked.options).error is None


def bad_input(soak: Soak, llm: LLM, asked: Question, rng: random.Random) -> None:
    vocab = llm.model_config.vocab_size
    calls: list[Callable[[], object]] = [
        lambda: llm.complete([]),
        lambda: llm.complete([vocab]),
        lambda: llm.complete([1] * MAX_MODEL_LEN),
        lambda: llm.complete("\ud800"),
        lambda: llm.complete(b"bytes"),  # type: ignore[arg-type]
        lambda: llm.complete(asked.prompt, SamplingParams(temperature=math.nan)),
        lambda: llm.complete(asked.prompt, SamplingParams(stop_token_ids=(vocab,))),
        lambda: llm.complete(asked.prompt, SamplingParams(n=2)),
    ]
    try:
        rng.choice(calls)()
    except ValueError:
        return
    raise AssertionError("bad input was not refused")


ACTIONS: dict[str, Callable[[Soak, LLM, Question, random.Random], None]] = {
    action.__name__: action for action in (complete, stream, walk_away, batch, cancel, hurry, bad_input)
}


# ---- between rounds -------------------------------------------------------------------------------------------------


def open_session(size: int, num_draft_tokens: int, num_blocks: int, *, caching: bool = True) -> LLM:
    return LLM(
        ROOT / "demo", tensor_parallel_size=size, device="cpu", num_threads=1, max_model_len=MAX_MODEL_LEN,
        block_size=BLOCK_SIZE, kv_cache_memory_bytes=num_blocks * BLOCK_BYTES // size, max_num_seqs=8,
        max_num_batched_tokens=256, num_draft_tokens=num_draft_tokens, enable_prefix_caching=caching,
    )  # fmt: skip


def measure(sessions: Iterable[LLM]) -> dict[str, float]:
    """Of this process and its followers, while nothing runs; what a call has left over is an AssertionError."""
    me = psutil.Process()
    family = [me, *me.children(recursive=True)]
    free = 0
    for llm in sessions:
        scheduler = llm.session._engine.scheduler
        assert not llm.session.has_work, "requests are left over"
        check_scheduler(scheduler)
        free += scheduler.pool.num_free
    return {
        "rss_mib": sum(process.memory_info().rss for process in family) / 2**20,
        "descriptors": sum(process.num_fds() for process in family),
        "threads": sum(process.num_threads() for process in family),
        "free_blocks": free,
    }


def compare(soak: Soak, rng: random.Random) -> int:
    """Ask some of the answered questions again of a fresh engine; returns how many."""
    sample = rng.sample(soak.answered, min(COMPARED_PER_CHECK, len(soak.answered)))
    soak.answered.clear()
    size, num_drafts = rng.choice((1, 2)), rng.choice((0, 15))
    with open_session(size, num_drafts, 8 * NUM_BLOCKS, caching=False) as fresh:
        for asked, answer in sample:
            soak.running[-1] = f"compared with tp {size}, {num_drafts} drafts: {asked}"
            again = answer_of(fresh.complete(asked.prompt, asked.sampling, asked.options))
            assert again == answer, f"{asked}\nwas  {answer}\nnow  {again}"
    soak.running.pop(-1, None)
    return len(sample)


def slope(times: Sequence[float], values: Sequence[float]) -> float:
    """Of the straight line with the least squared distance."""
    mean_time, mean = sum(times) / len(times), sum(values) / len(values)
    spread = sum((t - mean_time) ** 2 for t in times)
    return sum((t - mean_time) * (v - mean) for t, v in zip(times, values, strict=True)) / spread


def verdict(minutes: Sequence[float], samples: Sequence[dict[str, float]]) -> tuple[list[str], bool]:
    """A line for each figure, and whether all are flat. The first third is left out: caches of all kinds fill."""
    start = len(samples) // 3
    lines, is_flat = [], True
    for name, limit in LIMITS.items():
        values = [sample[name] for sample in samples[start:]]
        steepness = slope(minutes[start:], values)
        is_ok = abs(steepness) <= limit
        is_flat &= is_ok
        lines.append(
            f"{name}: {values[0]:g} to {values[-1]:g} (least {min(values):g}, most {max(values):g}), slope "
            f"{steepness:+.4f} per minute, limit {limit:g}: {'flat' if is_ok else 'NOT FLAT'}"
        )
    return lines, is_flat


def soak_for(minutes: float, seed: int) -> bool:
    """Rounds until the time is over, and at least three; whether all slopes are flat. Raises what a client raised."""
    texts = [path.read_text(encoding="utf-8")[:6000] for path in sorted((ROOT / "megatron_infer").glob("*.py"))]
    sessions = (open_session(1, 15, NUM_BLOCKS), open_session(2, 0, NUM_BLOCKS))
    soak = Soak(seed, sessions, [text for text in texts if len(text) > 1000])
    times: list[float] = []
    samples: list[dict[str, float]] = []
    counts: Counter[str] = Counter()
    num_compared, next_check, began = 0, 0.0, time.monotonic()
    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        try:
            while (elapsed := (time.monotonic() - began) / 60) < minutes or len(samples) < 3:
                faulthandler.dump_traceback_later(ROUND_LIMIT_SECONDS, exit=True)
                print(f"seed {seed}, round {len(samples)}, {elapsed:.1f} minutes", flush=True)
                for future in [pool.submit(client, soak, number, len(samples)) for number in range(NUM_CLIENTS)]:
                    counts.update(future.result())
                if elapsed >= next_check:
                    num_compared += compare(soak, random.Random(f"{seed}/{len(samples)}"))
                    next_check = elapsed + 1
                times.append((time.monotonic() - began) / 60)
                samples.append(measure(sessions))
        except BaseException:
            print(f"seed {seed}, round {len(samples)}; running:", *soak.running.values(), sep="\n    ", file=sys.stderr)
            raise
    faulthandler.cancel_dump_traceback_later()
    preemptions = [llm.session._engine.scheduler.num_preemptions for llm in sessions]
    for llm in sessions:
        llm.close()
    lines, is_flat = verdict(times, samples)
    print(
        f"{len(samples)} rounds in {times[-1]:.1f} minutes:",
        ", ".join(f"{name} {count}" for name, count in sorted(counts.items())),
    )
    print(f"{num_compared} answers equal to a fresh engine's, bit for bit; preemptions {preemptions}")
    print(*lines, sep="\n")
    return is_flat and all(preemptions)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__, allow_abbrev=False)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    faulthandler.enable()
    try:
        is_ok = soak_for(args.minutes, args.seed)
    except Exception:
        traceback.print_exc()
        is_ok = False
    print("ok" if is_ok else "FAILED")
    return 0 if is_ok else 1


if __name__ == "__main__":
    sys.exit(main())
