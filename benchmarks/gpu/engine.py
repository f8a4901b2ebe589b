"""Our side: the engine over random weights that were made on the device, driven as LLM drives it but without text."""

from __future__ import annotations

import itertools
import math
import random
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.workload import Workload
from megatron_infer.cache.block_pool import BlockPool
from megatron_infer.config import EngineConfig, ModelConfig, SamplingParams
from megatron_infer.engine import launch
from megatron_infer.engine.engine import Engine
from megatron_infer.engine.request import Request
from megatron_infer.engine.scheduler import Scheduler
from megatron_infer.model.weights import expected_tensors, hf_name, memory_estimate
from megatron_infer.options import percentile
from megatron_infer.tensor_parallel.group import TPGroup


@dataclass(frozen=True)
class SharedWeights:
    """Random weights under Hugging Face's names, so that transformers can hold the very same tensors.

    Reads like a checkpoint.
    """

    config: ModelConfig
    tensors: Mapping[str, Tensor]

    @classmethod
    def random(cls, config: ModelConfig, device: torch.device) -> SharedWeights:
        """bf16 weights that keep activations near unit scale."""
        torch.manual_seed(0)
        tensors = {}
        for name, shape in expected_tensors(config).items():
            if len(shape) == 1:
                tensors[hf_name(name)] = torch.ones(shape, dtype=torch.bfloat16, device=device)
            else:
                noise = torch.empty(shape, dtype=torch.bfloat16, device=device).normal_()
                tensors[hf_name(name)] = noise if "embeddings" in name else noise.mul_(shape[1] ** -0.5)
        return cls(config, tensors)

    def read(self, name: str, rows: tuple[int, int] | None = None, cols: tuple[int, int] | None = None) -> Tensor:
        """A slice of a tensor by its canonical name."""
        tensor = self.tensors[hf_name(name)]
        tensor = tensor if rows is None else tensor[rows[0] : rows[1]]
        return tensor if cols is None else tensor[:, cols[0] : cols[1]]


class Run:
    """One engine and what is measured with it."""

    def __init__(self, engine: Engine, work: Workload, device: torch.device, weight_bytes: float) -> None:
        self._engine, self._work, self._device = engine, work, device
        self._weight_bytes = weight_bytes
        self._random, self._ids = random.Random(0), itertools.count()

    def prompt(self, length: int) -> list[int]:
        """Random ids; none is like an earlier prompt, so the prefix cache never helps unasked."""
        return [self._random.randrange(self._work.model.vocab_size) for _ in range(length)]

    def complete(self, prompts: list[list[int]], new_tokens: int) -> list[list[float]]:
        """For each prompt, the seconds after which each of its new tokens came."""
        sampling = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
        began = time.perf_counter()
        times: dict[int, list[float]] = {}
        for prompt in prompts:
            number = next(self._ids)
            times[number] = []
            self._engine.add(Request(number, prompt, sampling, self._work.max_model_len, frozenset()), seed=0)
        while self._engine.has_work:
            events = self._engine.step()
            now = time.perf_counter() - began
            for event in events:
                times[event.request_id].append(now)
        return list(times.values())

    def decode(self, context: int, batch: int) -> dict[str, Any]:
        """Latency between tokens and tokens per second once all sequences decode, with the bytes a step must read."""
        gaps: list[float] = []
        for _ in range(self._work.repetitions):
            all_times = self.complete([self.prompt(context) for _ in range(batch)], 2 * self._work.new_tokens)
            last_first = max(times[0] for times in all_times)
            moments = sorted({moment for times in all_times for moment in times if moment >= last_first})
            gaps += [b - a for a, b in itertools.pairwise(moments)]
        model = self._work.model
        step = statistics.median(gaps)
        kv_bytes = 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim * 2 * context * batch
        return {
            "context": context,
            "batch": batch,
            "inter_token_latency_ms": {f"p{p}": 1e3 * percentile(gaps, p) for p in (50, 95, 99)},
            "tokens_per_second": batch / step,
            "gb_per_second": (self._weight_bytes + kv_bytes) / step / 1e9,
        }

    def prefill(self, length: int) -> dict[str, Any]:
        """Time to the first token of a new prompt."""
        seconds = [self.complete([self.prompt(length)], 1)[0][0] for _ in range(self._work.repetitions)]
        median = statistics.median(seconds)
        model = self._work.model
        linear = sum(
            math.prod(s) for n, s in expected_tensors(model).items() if len(s) == 2 and n.startswith("layers.")
        )
        return {
            "tokens": length,
            "time_to_first_token_ms": 1e3 * median,
            "tokens_per_second": length / median,
            "tflop_per_second": 2 * linear * length / median / 1e12,
        }

    def keystroke(self, context: int) -> dict[str, Any]:
        """First token, and 32 tokens, of a prompt that is a computed one and three tokens more."""
        first, completion = [], []
        for _ in range(max(5, self._work.repetitions)):
            warm = self.prompt(context)
            self.complete([warm], 1)
            typed = self.prompt(3)
            first.append(self.complete([warm + typed], 1)[0][0])
            completion.append(self.complete([warm + typed + self.prompt(3)], 32)[0][-1])
        return {
            "context": context,
            "time_to_first_token_ms": 1e3 * statistics.median(first),
            "completion_of_32_ms": 1e3 * statistics.median(completion),
        }

    def greedy(self, prompt: list[int], new_tokens: int) -> list[int]:
        """Ids, to compare with a peer's."""
        sampling = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
        self._engine.add(Request(next(self._ids), prompt, sampling, self._work.max_model_len, frozenset()), seed=0)
        ids = []
        while self._engine.has_work:
            ids += [event.token_id for event in self._engine.step() if event.token_id is not None]
        return ids


@contextmanager
def running(
    weights: SharedWeights, work: Workload, device: torch.device, quantization: str, ops: str | None = None
) -> Iterator[Run]:
    """An engine over the weights, with one implementation of all ops if named; its memory is given back at the end."""
    blocks_bytes = (
        work.kv_tokens * work.model.num_hidden_layers * 2 * work.model.num_key_value_heads * work.model.head_dim
    )
    asked = EngineConfig(
        device=device.type,
        dtype="bfloat16",
        quantization=quantization,
        max_model_len=work.max_model_len,
        max_num_seqs=max(work.batches),
        kv_cache_memory_bytes=2 * blocks_bytes,
        gpu_memory_utilization=0.95,
    )
    config = launch.resolve(asked, work.model)
    runner = launch.build_runner(weights, config, TPGroup.single(device), force_ops=ops)  # type: ignore[arg-type]
    scheduler = Scheduler(
        BlockPool(runner.kv.num_blocks, runner.kv.block_size, True),
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=work.max_model_len,
    )
    engine = Engine(runner, scheduler)
    embedding = work.model.vocab_size * work.model.hidden_size * 2
    weight_bytes = memory_estimate(work.model, 1, torch.bfloat16, quantization) - embedding
    try:
        yield Run(engine, work, device, weight_bytes)
    finally:
        engine.close()
        del engine, runner
        if device.type == "cuda":
            torch.cuda.empty_cache()


def measure(
    weights: SharedWeights, work: Workload, device: torch.device, quantization: str, ops: str
) -> dict[str, Any]:
    """Everything that is measured with one weight format and one implementation of the ops."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    with running(weights, work, device, quantization, ops) as run:
        run.complete([run.prompt(work.batch_context)], 4)
        figures: dict[str, Any] = {
            "quantization": quantization,
            "ops": ops,
            "decode": [run.decode(context, 1) for context in work.contexts],
            "prefill": [run.prefill(length) for length in work.prefills],
            "keystroke": run.keystroke(work.keystroke_context),
            "batches": [run.decode(work.batch_context, batch) for batch in work.batches],
        }
        if device.type == "cuda":
            figures["peak_memory_bytes"] = torch.cuda.max_memory_allocated(device) - before
    return figures
