"""Our side: the engine over the shared weights, driven as LLM drives it but without text."""

from __future__ import annotations

import gc
import itertools
import random
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu.weights import SharedWeights, kv_bytes_per_token, prefill_flops, streamed_bytes
from benchmarks.gpu.workload import COMPLETION_TOKENS, Workload
from megatron_infer.cache.block_pool import BlockPool
from megatron_infer.commands.options import percentile
from megatron_infer.config import EngineConfig
from megatron_infer.dispatch import select
from megatron_infer.engine.bring_up import build_runner
from megatron_infer.engine.engine import Engine
from megatron_infer.engine.request import Request
from megatron_infer.engine.resolve import resolve
from megatron_infer.engine.runner import ModelRunner
from megatron_infer.engine.scheduler import Scheduler
from megatron_infer.sampling_params import SamplingParams
from megatron_infer.tensor_parallel.group import TPGroup
from megatron_infer.world import World

_KEYSTROKES = 7


@contextmanager
def without_dependent_launch() -> Iterator[None]:
    """Every kernel of ours then starts after the one before it has ended."""
    from megatron_infer.kernels.triton import target

    with mock.patch.object(target, "has_dependent_launch", return_value=False):
        yield


@dataclass(frozen=True)
class Variant:
    """A way to run the engine: the weights' format, who implements the ops, whether CUDA graphs may be captured,
    whether kernels overlap, and whether faulty ops are replaced."""

    quantization: str
    ops: str
    has_graphs: bool = True
    has_overlap: bool = True
    is_checked: bool = True


class Run:
    """One engine and what is measured with it."""

    def __init__(self, engine: Engine, work: Workload, weight_bytes: int) -> None:
        self.engine, self._work, self._weight_bytes = engine, work, weight_bytes
        self._random, self._ids = random.Random(0), itertools.count()

    def random_prompt(self, length: int) -> list[int]:
        """Random ids; none is like an earlier prompt, so the prefix cache never helps unasked."""
        return [self._random.randrange(self._work.model.vocab_size) for _ in range(length)]

    def complete(self, prompts: list[list[int]], new_tokens: int) -> list[list[tuple[float, int]]]:
        """For each prompt, every new token with the seconds after which it came."""
        sampling = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
        began = time.perf_counter()
        arrivals: dict[int, list[tuple[float, int]]] = {}
        for prompt in prompts:
            number = next(self._ids)
            arrivals[number] = []
            self.engine.add(Request(number, prompt, sampling, self._work.max_model_len, frozenset()))
        while self.engine.has_work:
            events = self.engine.step()
            now = time.perf_counter() - began
            for event in events:
                if event.error is not None:
                    raise RuntimeError(f"a request failed: {event.error}")
                if event.sampled is not None:
                    arrivals[event.request.request_id].append((now, event.sampled.token_id))
        return list(arrivals.values())

    def times(self, prompts: list[list[int]], new_tokens: int) -> list[list[float]]:
        """The seconds alone."""
        return [[seconds for seconds, _ in arrivals] for arrivals in self.complete(prompts, new_tokens)]

    def greedy(self) -> list[int]:
        """The continuation of the workload's prompt, to compare with others'."""
        (arrivals,) = self.complete([self._work.prompt], self._work.new_tokens)
        return [token_id for _, token_id in arrivals]

    def decode(self, context: int, batch: int) -> dict[str, Any]:
        """Latency between tokens and tokens per second while all sequences decode, and the bytes a step must read."""
        new_tokens = 2 * self._work.new_tokens
        gaps: list[float] = []
        for _ in range(self._work.repetitions):
            all_times = self.times([self.random_prompt(context) for _ in range(batch)], new_tokens)
            # Prompts are prefilled one after the other, so that sequences begin, and end, at different steps.
            first, last = max(times[0] for times in all_times), min(times[-1] for times in all_times)
            moments = sorted({moment for times in all_times for moment in times if first <= moment <= last})
            gaps += [b - a for a, b in itertools.pairwise(moments)]
        step = statistics.fmean(gaps)
        kv_bytes = kv_bytes_per_token(self._work.model) * (context + new_tokens // 2) * batch
        return {
            "context": context,
            "batch": batch,
            "ms_per_step": 1e3 * step,
            "inter_token_latency_ms": {f"p{p}": 1e3 * percentile(gaps, p) for p in (50, 95, 99)},
            "tokens_per_second": batch / step,
            "gb_per_second": (self._weight_bytes + kv_bytes) / step / 1e9,
        }

    def prefill(self, length: int) -> dict[str, Any]:
        """Time to the first token of a new prompt."""
        samples = [self.times([self.random_prompt(length)], 1)[0][0] for _ in range(self._work.repetitions)]
        seconds = statistics.median(samples)
        return {
            "tokens": length,
            "time_to_first_token_ms": 1e3 * seconds,
            "tokens_per_second": length / seconds,
            "tflop_per_second": prefill_flops(self._work.model, length) / seconds / 1e12,
        }

    def keystroke(self, context: int) -> dict[str, Any]:
        """First token, and a whole completion, of a prompt that is a computed one and three tokens more."""
        first, completion = [], []
        for _ in range(_KEYSTROKES):
            prompt = self.random_prompt(context)
            self.times([prompt], 1)
            prompt = prompt + self.random_prompt(3)
            first.append(self.times([prompt], 1)[0][0])
            prompt = prompt + self.random_prompt(3)
            completion.append(self.times([prompt], COMPLETION_TOKENS)[0][-1])
        return {
            "context": context,
            "time_to_first_token_ms": 1e3 * statistics.median(first),
            "completion_tokens": COMPLETION_TOKENS,
            "completion_ms": 1e3 * statistics.median(completion),
        }


@contextmanager
def running(
    weights: SharedWeights, work: Workload, device: torch.device, variant: Variant, batch: int = 1
) -> Iterator[Run]:
    """An engine for up to `batch` long sequences; its memory is given back at the end."""
    asked = EngineConfig(
        tensor_parallel_size=1,
        device=device.type,
        dtype="bfloat16",
        quantization=variant.quantization,
        max_model_len=work.max_model_len,
        max_num_seqs=max(batch, EngineConfig.max_num_seqs),
        kv_cache_memory_bytes=work.kv_tokens(batch) * kv_bytes_per_token(work.model),
        gpu_memory_utilization=0.95,
    )
    if not variant.has_graphs:
        asked = replace(asked, cuda_graph_memory_bytes=0)
    # Not among what is asked for: on the CPU it would be refused.
    config = replace(resolve(asked, work.model, World()), ops=variant.ops)
    with ExitStack() as stack:
        if not variant.has_overlap:
            stack.enter_context(without_dependent_launch())
        if not variant.is_checked:
            stack.enter_context(mock.patch.object(select, "find_faults", return_value=()))
        yield from _built(weights, work, device, variant, config)


def _built(
    weights: SharedWeights, work: Workload, device: torch.device, variant: Variant, config: EngineConfig
) -> Iterator[Run]:
    runner = build_runner(weights, config, World(), TPGroup.single(device))  # type: ignore[arg-type]
    scheduler = Scheduler(
        BlockPool(runner.kv.num_blocks, runner.kv.block_size, True),
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=work.max_model_len,
    )
    engine = Engine(runner, scheduler)
    del runner
    run = Run(engine, work, streamed_bytes(work.model, variant.quantization))
    try:
        yield run
    finally:
        engine.close()
        # What the caller still holds is the run, so it must let go of the device's memory.
        del engine, run.engine
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def measure(weights: SharedWeights, work: Workload, device: torch.device, variant: Variant) -> dict[str, Any]:
    """One sequence at a time: memory after loading, decoding, prefill, and the keystroke of an editor's user."""
    before = _device_memory(device)
    with running(weights, work, device, variant) as run:
        loaded = _device_memory(device)
        run.times([run.random_prompt(work.batch_context)], 4)
        return {
            **_facts(run.engine.runner, variant),
            "greedy_ids": run.greedy(),
            "decode": [run.decode(context, 1) for context in work.contexts],
            "prefill": [run.prefill(length) for length in work.prefills],
            "keystroke": run.keystroke(work.keystroke_context),
            "memory": _memory(run.engine.runner, loaded - before),
        }


def measure_batches(weights: SharedWeights, work: Workload, device: torch.device, variant: Variant) -> dict[str, Any]:
    """Many sequences at once."""
    with running(weights, work, device, variant, max(work.batches)) as run:
        run.times([run.random_prompt(work.batch_context)] * 2, 4)
        return {
            **_facts(run.engine.runner, variant),
            "batches": [run.decode(work.batch_context, batch) for batch in work.batches],
        }


def _facts(runner: ModelRunner, variant: Variant) -> dict[str, Any]:
    """What ran: the ops by who implements them, and which steps were captured."""
    by_choice: dict[str, list[str]] = {}
    for line in runner.model.ops.report:
        name, _, chosen = line.partition(": ")
        by_choice.setdefault(chosen, []).append(name)
    facts: dict[str, Any] = {"quantization": variant.quantization, "ops": by_choice, "graphs": None}
    if runner.graphs is not None:
        facts["graphs"] = {"captured": sorted(runner.graphs.keys), "memory_bytes": runner.graphs.memory_bytes}
    return facts


def _device_memory(device: torch.device) -> int:
    """Bytes in use on the device, by whatever program, once torch has given back what it only keeps."""
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def _memory(runner: ModelRunner, loaded_bytes: int) -> dict[str, int] | None:
    """What loading took; the cache apart, since its size is the benchmark's choice. None on the CPU."""
    if not loaded_bytes:
        return None
    cache = runner.kv.blocks.nbytes
    return {"without_cache_bytes": loaded_bytes - cache, "cache_bytes": cache}
