"""python -m tests.bits: one hash per way of running the bundled demo, over every token id and log probability.

test_bits.py holds them against `HASHES`: a change of structure may change none. By the numerics contract the ways of
one weight format share a hash. A change that is meant to change answers brings new hashes, and says so.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from megatron_infer import LLM, FimPrompt, SamplingParams
from megatron_infer.profile import Profile

DEMO = Path(__file__).resolve().parents[1] / "demo"
HASHES = {
    "bfloat16": "486f50cf774394e2",
    "int8": "6511476dda7e5f94",
    "int4": "1f54cfe8656b398e",
    "reference": "86fc05fb2c595f08",
}
"""Of the weight formats through the CPU kernels, and of bfloat16 through plain torch, whose sums round otherwise."""

WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "bfloat16": ("bfloat16", {}),
    "bfloat16, op by op": ("bfloat16", {"profile": "op by op"}),
    "bfloat16, tp 2": ("bfloat16", {"tensor_parallel_size": 2}),
    "bfloat16, tp 4": ("bfloat16", {"tensor_parallel_size": 4}),
    "int8": ("int8", {"quantization": "int8"}),
    "int8, tp 2": ("int8", {"quantization": "int8", "tensor_parallel_size": 2}),
    "int8, tp 4": ("int8", {"quantization": "int8", "tensor_parallel_size": 4}),
    "int4": ("int4", {"quantization": "int4"}),
    "int4, tp 2": ("int4", {"quantization": "int4", "tensor_parallel_size": 2}),
    "int4, tp 4": ("int4", {"quantization": "int4", "tensor_parallel_size": 4}),
    "reference": ("reference", {"ops": "reference"}),
}
"""Name -> which of HASHES, and what differs from the defaults."""


def requests() -> Iterator[tuple[FimPrompt, SamplingParams]]:
    """Short and long prompts, with and without suffix and path; greedy, and drawn in every way."""
    body = "".join(f"    total = total + values[{i}] * weights[{i % 7}]\n" for i in range(40))
    prompts = [
        FimPrompt("def area(w, h):\n    return ", "\n\n\ndef volume(w, h, d):\n    return w * h * d\n", "shapes.py"),
        FimPrompt("# 快速排序算法", "\n", "test.py"),
        FimPrompt(f"def weigh(values, weights):\n    total = 0\n{body}    re", "\n", "pkg/weigh.py"),
        FimPrompt("class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, x):\n"),
    ]
    samplings = [
        SamplingParams(max_new_tokens=20, logprobs=2),
        SamplingParams(max_new_tokens=20),
        SamplingParams(max_new_tokens=12, temperature=0.9, top_k=40, top_p=0.95, seed=7, n=2, logprobs=0),
        SamplingParams(max_new_tokens=12, temperature=0.7, min_p=0.02, seed=11, ignore_eos=True),
    ]
    for prompt in prompts:
        for sampling in samplings:
            yield prompt, sampling


def digest(way: str) -> str:
    """SHA-256 of what the demo answers when it is run in one of WAYS."""
    _, options = WAYS[way]
    profile = Profile(op_by_op=True) if options.get("profile") else None
    knobs = {name: value for name, value in options.items() if name != "profile"}
    with (
        LLM(DEMO, profile=profile, max_model_len=2048, num_threads=1, **knobs) as llm,
        profile.recording() if profile else nullcontext(),
    ):
        done = list(llm.complete_batch(requests()))
    assert all(completion.error is None for completion in done)
    logprobs = [[(p.token_id, p.logprob.hex(), p.top) for p in c.logprobs or ()] for c in done]
    answers = [(c.prompt_index, c.sample_index, c.finish_reason, list(c.token_ids)) for c in done]
    return hashlib.sha256(json.dumps([answers, logprobs]).encode()).hexdigest()[:16]


if __name__ == "__main__":
    for name in sys.argv[1:] or WAYS:
        print(f"{digest(name)}  {name}", flush=True)
