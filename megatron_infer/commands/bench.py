"""The command `bench`: how fast a checkpoint runs here, and with --profile, where a token's time goes.

Drives LLM like any caller, with random token ids. The report goes to stdout from rank 0 alone; with --json it goes to
stderr, and stdout carries one JSON line.
"""

from __future__ import annotations

import argparse
import logging
import random
import resource
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_infer.commands.options import (
    Parser,
    add_model_options,
    add_option,
    add_options_of,
    build,
    log_to_stderr,
    model_dir_of,
    percentile,
    run_command,
    say,
    to_json,
)
from megatron_infer.completion import Completion, Timings
from megatron_infer.config import EngineConfig
from megatron_infer.llm import LLM
from megatron_infer.profile import ATTENTION, COLLECTIVES, PhaseTotals, Profile
from megatron_infer.sampling_params import SamplingParams
from megatron_infer.world import World

_ENGINE = "engine: planning and Python"
_NOTES = """\
Times are rank 0's. An op's time includes its launch from Python, a collective's the wait for other ranks{sync}.
GB/s counts a linear's packed weight, and the keys and values attention looks at, as read once. GFLOP/s counts 2 per
weight and token for a linear, 4 x heads x head_dim per query and position it sees for attention. With --profile every
op is a launch of its own, in the figures above as well; without it a decoder layer is two where the kernels can."""


@dataclass(frozen=True)
class Workload:
    """Sequences together, tokens of each, and how often all of it is repeated."""

    batch: int = 1
    prompt_tokens: int = 256
    new_tokens: int = 64
    repetitions: int = 5

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("prompt_tokens", 1), ("new_tokens", 2), ("repetitions", 1)):
            value = getattr(self, name)
            if value < least:
                why = "; latency between tokens needs two" if least == 2 else ""
                raise ValueError(f"--{name} must be at least {least}, got {value}{why}")

    def check_fits(self, llm: LLM) -> None:
        """Refuse what would be turned away, or preempted half-way (ValueError)."""
        length = self.prompt_tokens + self.new_tokens
        if length > llm.max_model_len:
            raise ValueError(
                f"--prompt_tokens and --new_tokens come to {length}, the context to {llm.max_model_len} tokens; lower "
                "one of them, or raise --max_model_len or --kv_cache_memory_bytes"
            )
        block_size = llm.config.block_size
        needed = self.batch * (-(-length // block_size) + 1) * block_size
        if needed > llm.kv_cache_tokens and self.batch > 1:
            raise ValueError(
                f"{self.batch} sequences of {length} tokens need a KV cache of {needed} tokens, this one has "
                f"{llm.kv_cache_tokens}; raise --kv_cache_memory_bytes or lower --batch"
            )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m megatron_infer bench`. Returns the exit status."""
    return run_command(lambda world: _run(_parser(world).parse_args(argv), world))


def _run(args: argparse.Namespace, world: World) -> int:
    config, model_dir = build(EngineConfig, args, replace(EngineConfig(), num_draft_tokens=0)), model_dir_of(args)
    workload = Workload(args.batch, args.prompt_tokens, args.new_tokens, args.repetitions)
    if workload.batch > config.max_num_seqs:
        raise ValueError(
            f"--batch {workload.batch} exceeds --max_num_seqs {config.max_num_seqs}; raise the one or lower the other"
        )
    log_to_stderr(world, logging.WARNING)
    profile = Profile(op_by_op=args.profile)
    began = time.perf_counter()
    with LLM(model_dir, config, model_name=args.model_name, profile=profile, world=world) as llm:
        load_seconds = time.perf_counter() - began
        workload.check_fits(llm)
        num_profiled = workload.repetitions if args.profile else 1
        repetitions = _measure(llm, workload, profile, num_profiled)
        if world.is_first:
            figures = {
                "model_dir": str(model_dir),
                "engine": asdict(llm.config),
                **asdict(workload),
                "load_seconds": load_seconds,
                **_figures(repetitions, workload, profile, num_profiled, llm.config.tensor_parallel_size or 1),
                "peak_memory_bytes": _peak_memory_bytes(llm.config.device),
            }
            _report(figures, workload, profile, args)
    return 0


def _measure(llm: LLM, workload: Workload, profile: Profile, num_profiled: int) -> list[list[Completion]]:
    """Completions of every sequence of every repetition; the profile is of `num_profiled` further ones."""
    prompts = random_prompts(workload, llm.model_config.vocab_size)
    _complete(llm, next(prompts), new_tokens=2)  # warms up
    repetitions = [_complete(llm, next(prompts), workload.new_tokens) for _ in range(workload.repetitions)]
    for _ in range(num_profiled):
        fresh = next(prompts)
        with profile.recording() if llm.is_leader else nullcontext():
            _complete(llm, fresh, workload.new_tokens)
    return repetitions


def random_prompts(workload: Workload, vocab_size: int) -> Iterator[list[list[int]]]:
    """Batches of prompts without end, the same in every run; none is like an earlier one, so none is cached."""
    generator = random.Random(0)
    while True:
        yield [[generator.randrange(vocab_size) for _ in range(workload.prompt_tokens)] for _ in range(workload.batch)]


def _complete(llm: LLM, prompts: list[list[int]], new_tokens: int) -> list[Completion]:
    completions = list(llm.complete_batch(prompts, SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)))
    for completion in completions:
        if completion.error is not None:
            raise ValueError(completion.error)
    return completions


def _figures(
    completions: list[list[Completion]], workload: Workload, profile: Profile, num_profiled: int, size: int
) -> dict[str, Any]:
    """What the repetitions come to. Weights and operations are those of all ranks: `size` times rank 0's."""
    repetitions = [[completion.timings for completion in completions_S] for completions_S in completions]
    every = [timings for timings_S in repetitions for timings in timings_S]
    # The tokens of one step come together.
    gaps = [b - a for t in every for a, b in zip(t.token_seconds, t.token_seconds[1:], strict=False) if b > a]
    prefill_seconds = statistics.median(max(t.first_token_seconds for t in timings_S) for timings_S in repetitions)
    decode = [(t.num_new_tokens - 1) / (t.token_seconds[-1] - t.token_seconds[0]) for t in every]
    drafted = [item for completions_S in completions for c in completions_S for item in c.draft_sources.items()]
    drafts = [(source, [counts for name, counts in drafted if name == source]) for source in sorted(dict(drafted))]
    totals = profile.phases["decode"]
    weight_bytes = sum(op.num_bytes for name, op in totals.ops.items() if name != ATTENTION) / totals.num_steps
    prefill_flops = sum(op.flops for op in profile.phases["prefill"].ops.values()) / num_profiled
    return {
        "time_to_first_token_ms": 1e3 * statistics.median(t.first_token_seconds for t in every),
        "prefill_tokens_per_second": workload.batch * workload.prompt_tokens / prefill_seconds,
        "prefill_gflop_per_second": size * prefill_flops / prefill_seconds / 1e9,
        "inter_token_latency_ms": {f"p{p}": 1e3 * percentile(gaps, p) for p in (50, 95, 99)},
        "decode_tokens_per_second_per_sequence": statistics.median(decode),
        "decode_tokens_per_second": statistics.median(_total_rate(timings_S) for timings_S in repetitions),
        "decode_weights_gb_per_second": size * weight_bytes / percentile(gaps, 50) / 1e9,
        "engine_ms_per_decode_step": 1e3 * statistics.median(totals.engine_seconds),
        "draft_sources": {source: [sum(numbers) for numbers in zip(*counts, strict=True)] for source, counts in drafts},
    }


def _total_rate(timings_S: list[Timings]) -> float:
    """Tokens per second of all sequences, from when each of them has its first."""
    began = max(t.token_seconds[0] for t in timings_S)
    ended = max(t.token_seconds[-1] for t in timings_S)
    return sum(second > began for t in timings_S for second in t.token_seconds) / (ended - began)


def _peak_memory_bytes(device: str) -> int:
    """Rank 0's: what torch allocated on the GPU, or the process's largest resident set (mapped file pages included)."""
    if device != "cpu":
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# ---- showing it -----------------------------------------------------------------------------------------------------


def _report(figures: dict[str, Any], workload: Workload, profile: Profile, args: argparse.Namespace) -> None:
    lines = [*_summary(figures, workload)]
    if args.profile:
        for name, totals in profile.phases.items():
            lines += _table(name, totals)
        sync = ", both the wait for the GPU" if figures["engine"]["device"] == "cuda" else ""
        lines += ["", _NOTES.format(sync=sync)]
        figures = {**figures, "profile": {name: _to_json(totals) for name, totals in profile.phases.items()}}
    show = say if args.json else print
    for line in lines:
        show(line)
    if args.json:
        print(to_json(figures))
    sys.stdout.flush()


def _summary(figures: dict[str, Any], workload: Workload) -> Iterator[str]:
    engine, latency = figures["engine"], figures["inter_token_latency_ms"]
    weights = engine["dtype"] if engine["quantization"] == "none" else engine["quantization"]
    yield (
        f"model                {Path(figures['model_dir']).name}, tp {engine['tensor_parallel_size']}, "
        f"{engine['device']}, {weights} weights, {engine['num_threads']} thread(s) per rank"
    )
    yield (
        f"workload             {workload.batch} sequence(s) of {workload.prompt_tokens} + {workload.new_tokens} tokens,"
        f" {workload.repetitions} repetition(s) after a warm-up"
    )
    drafts = f"at most {engine['num_draft_tokens']} drafts a step" if engine["num_draft_tokens"] else "no drafts"
    yield f"                     random token ids, fresh in every repetition: the prefix cache never helps; {drafts}"
    yield f"load                 {figures['load_seconds']:.2f} s"
    yield (
        f"time to first token  {figures['time_to_first_token_ms']:.2f} ms (median); prefill "
        f"{figures['prefill_tokens_per_second']:.0f} tokens/s, {figures['prefill_gflop_per_second']:.1f} GFLOP/s"
    )
    yield (
        f"inter-token latency  p50 {latency['p50']:.2f} ms, p95 {latency['p95']:.2f} ms, p99 {latency['p99']:.2f} ms"
    )
    yield (
        f"decode               {figures['decode_tokens_per_second_per_sequence']:.1f} tokens/s per sequence, "
        f"{figures['decode_tokens_per_second']:.1f} in total; "
        f"{figures['decode_weights_gb_per_second']:.2f} GB/s of weights"
    )
    for source, (tokens, right) in figures["draft_sources"].items():
        yield f"drafts               {tokens} tokens from {source}, {right / tokens:.0%} right"
    yield (
        f"engine               {figures['engine_ms_per_decode_step']:.3f} ms per decode step outside kernels and "
        "collectives (median)"
    )
    yield f"peak memory          {figures['peak_memory_bytes'] / 2**30:.2f} GiB on rank 0"


def _table(phase: str, totals: PhaseTotals) -> Iterator[str]:
    yield ""
    if not totals.num_steps:
        yield f"{phase}: no steps"
        return
    step_ms = 1e3 * totals.seconds / totals.num_steps
    yield f"{phase}: {totals.num_steps} steps of {step_ms:.3f} ms on average"
    yield f"  {'op':<28} {'calls/step':>10} {'ms/step':>9} {'%':>6} {'GB/s':>8} {'GFLOP/s':>8}"
    for row in _rows(totals):
        share = 100 * row["ms_per_step"] / step_ms
        calls, reads, flops = (
            f"{row[key]:.{digits}f}" if row[key] else ""
            for key, digits in (("calls_per_step", 1), ("gb_per_second", 2), ("gflop_per_second", 2))
        )
        line = f"  {row['op']:<28} {calls:>10} {row['ms_per_step']:9.4f} {share:6.1f} {reads:>8} {flops:>8}"
        yield line.rstrip()
    yield f"  {'total':<28} {'':10} {step_ms:9.4f} {100:6.1f}"


def _rows(totals: PhaseTotals) -> Iterator[dict[str, Any]]:
    """A row per op in the order of the network, then the collectives, then what is left: the engine."""
    order = [name for name in totals.ops if name not in COLLECTIVES] + [n for n in COLLECTIVES if n in totals.ops]
    for name in order:
        op = totals.ops[name]
        yield {
            "op": name,
            "calls_per_step": op.calls / totals.num_steps,
            "ms_per_step": 1e3 * op.seconds / totals.num_steps,
            "gb_per_second": op.num_bytes / op.seconds / 1e9,
            "gflop_per_second": op.flops / op.seconds / 1e9,
        }
    engine_ms = 1e3 * sum(totals.engine_seconds) / totals.num_steps
    yield {"op": _ENGINE, "calls_per_step": 0, "ms_per_step": engine_ms, "gb_per_second": 0, "gflop_per_second": 0}


def _to_json(totals: PhaseTotals) -> dict[str, Any]:
    if not totals.num_steps:
        return {"steps": 0, "ms_per_step": 0.0, "ops": []}
    step_ms = 1e3 * totals.seconds / totals.num_steps
    return {"steps": totals.num_steps, "ms_per_step": step_ms, "ops": list(_rows(totals))}


# ---- options --------------------------------------------------------------------------------------------------------


def _parser(world: World) -> Parser:
    parser = Parser(
        world,
        "python -m megatron_infer bench",
        "Measure prefill and decode speed of a checkpoint with random token ids, and where the time goes. "
        "Also under torchrun: torchrun --nproc_per_node N -m megatron_infer bench. "
        "Every option may be spelled with - or _.",
    )
    add_model_options(parser)
    what = parser.add_argument_group("workload")
    for name, text in (
        ("batch", "sequences computed together"),
        ("prompt_tokens", "tokens of each prompt"),
        ("new_tokens", "tokens generated after each"),
        ("repetitions", "how often, each time with fresh prompts"),
    ):
        value, shown = getattr(Workload, name), f"{text} (default: %(default)s)"
        add_option(what, name, type=int, default=value, metavar="INT", help=shown)
    out = parser.add_argument_group("output")
    add_option(out, "profile", action="store_true", help="show the time of every op, of collectives and of the engine")
    add_option(out, "json", action="store_true", help="end with one JSON line on stdout; the report goes to stderr")
    add_options_of(EngineConfig, parser, "engine")
    return parser
