"""transformers on the very same weights, eager with a growing cache and compiled with a static one."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers import LlamaConfig as HfConfig

from benchmarks.gpu.ceilings import synchronize
from benchmarks.gpu.engine import SharedWeights
from benchmarks.gpu.workload import Workload


def load(weights: SharedWeights, device: torch.device) -> PreTrainedModel:
    """transformers' model over the shared tensors; no weight is copied."""
    raw = weights.config.to_hf()
    config = HfConfig(**{name: value for name, value in raw.items() if name not in ("architectures", "model_type")})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    model.load_state_dict(dict(weights.tensors), strict=True, assign=True)
    # What is no weight was made on the meta device as well.
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    return model.eval()


def greedy(
    model: PreTrainedModel, prompt: list[int], new_tokens: int, device: torch.device, **options: Any
) -> list[int]:
    """Ids of a greedy completion."""
    ids = torch.tensor([prompt], device=device)
    with torch.no_grad():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new_tokens,
            min_new_tokens=new_tokens, pad_token_id=0, **options,
        )  # fmt: skip
    return out[0, len(prompt) :].tolist()


def measure(model: PreTrainedModel, work: Workload, device: torch.device) -> dict[str, Any]:
    """Milliseconds per decoded token, from two lengths of completion so that the prefill cancels out."""
    prompt = [i % work.model.vocab_size for i in range(work.peer_context)]
    sides: dict[str, dict[str, Any]] = {"eager": {}, "static cache, compiled": {"cache_implementation": "static"}}
    if device.type != "cuda":
        del sides["static cache, compiled"]
    figures = {}
    for name, options in sides.items():
        short, long = 8, 8 + work.new_tokens
        for length in (short, long):
            greedy(model, prompt, length, device, **options)
        samples = []
        for _ in range(work.repetitions):
            seconds = []
            for length in (short, long):
                synchronize(device)
                began = time.perf_counter()
                greedy(model, prompt, length, device, **options)
                synchronize(device)
                seconds.append(time.perf_counter() - began)
            samples.append((seconds[1] - seconds[0]) / work.new_tokens)
        figures[name] = {"inter_token_latency_ms": 1e3 * sorted(samples)[len(samples) // 2]}
    return figures
