"""transformers on the very same weights: eager with a growing cache, and compiled with a static one.

Both through `generate`, greedy, one sequence. A static cache makes `generate` compile the decoding step by itself on a
GPU: torch.compile(mode="reduce-overhead"), that is with CUDA graphs; the prefill stays eager.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers import LlamaConfig as HfConfig
from transformers.generation import StoppingCriteria, StoppingCriteriaList

from benchmarks.gpu.ceilings import synchronize
from benchmarks.gpu.weights import SharedWeights
from benchmarks.gpu.workload import Workload

SHORT = 8
"""New tokens of the completion that is taken from a longer one, so that the prefill cancels out."""


class StopAt(StoppingCriteria):
    """Ends a completion at a length, whatever `max_new_tokens` makes the cache's size. Does not wait for the device."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __call__(self, input_ids: Tensor, scores: object, **_: Any) -> Tensor:
        num_sequences, length = input_ids.shape
        return torch.full((num_sequences,), length >= self._length, dtype=torch.bool, device=input_ids.device)


def load(weights: SharedWeights, device: torch.device) -> PreTrainedModel:
    """transformers' model over the shared tensors; no weight is copied."""
    raw = weights.config.to_hf()
    config = HfConfig(**{name: value for name, value in raw.items() if name not in ("architectures", "model_type")})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    model.load_state_dict(dict(weights.tensors), strict=True, assign=True)
    # What is no weight was made on the meta device as well.
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    # Random weights may give the end token at any time.
    model.generation_config.eos_token_id = None
    return model.eval()


def complete(
    model: PreTrainedModel, prompt: list[int], new_tokens: int, room: int, device: torch.device, **options: Any
) -> list[int]:
    """Ids of a greedy completion of `new_tokens`, in a cache (where its size is fixed) with room for `room` of them."""
    ids = torch.tensor([prompt], device=device)
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=room,
            stopping_criteria=StoppingCriteriaList([StopAt(len(prompt) + new_tokens)]),
            pad_token_id=0,
            **options,
        )
    return out[0, len(prompt) :].tolist()


def measure(
    weights: SharedWeights, work: Workload, device: torch.device, contexts: tuple[int, ...], *, is_compiled: bool
) -> dict[str, Any]:
    """Milliseconds per decoded token at every context, and the greedy ids if the workload's prompt is among them."""
    model = load(weights, device)
    options = {"cache_implementation": "static"} if is_compiled else {}
    # Two more than are asked for: both lengths then end by the same criterion, not one of them by the cache's end.
    room = SHORT + work.new_tokens + 2
    figures: dict[str, Any] = {"decode": []}
    try:
        for context in contexts:
            prompt = [(7 * i) % work.model.vocab_size for i in range(context)]

            def run(new_tokens: int, prompt: list[int] = prompt) -> list[int]:
                return complete(model, prompt, new_tokens, room, device, **options)

            figures["decode"].append({"context": context, "ms_per_step": ms_per_token(run, work, device)})
            if prompt == work.prompt:
                figures["greedy_ids"] = run(work.new_tokens)
        if is_compiled:
            figures["compiled"] = hasattr(model, "_compiled_call")
    finally:
        # Compiled code keeps the static caches and the graphs' memory alive.
        torch.compiler.reset()
    return figures


def ms_per_token(run: Callable[[int], object], work: Workload, device: torch.device) -> float:
    """Median over the repetitions of what a token costs in a long completion beyond a short one."""
    lengths = (SHORT, SHORT + work.new_tokens)
    for length in (*lengths, *lengths):
        run(length)
    samples = []
    for _ in range(work.repetitions):
        seconds = []
        for length in lengths:
            synchronize(device)
            began = time.perf_counter()
            run(length)
            synchronize(device)
            seconds.append(time.perf_counter() - began)
        samples.append((seconds[1] - seconds[0]) / work.new_tokens)
    return 1e3 * statistics.median(samples)
