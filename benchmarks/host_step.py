"""What a decode step costs the host when the device costs nothing: planning, laying out, events.

python -m benchmarks.host_step [--batches 1 8 32 128] [--context 2048] [--steps 200]

A recorded step whose replay does nothing stands for the GPU; what CUDA takes to copy and to launch a graph comes on
top. A step of the GPU must take longer than this, or the GPU waits. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch

from benchmarks.gpu.weights import SharedWeights
from benchmarks.gpu.workload import SMALL
from benchmarks.peers.machine import provenance
from megatron_infer.cache.block_pool import BlockPool
from megatron_infer.cache.kv_cache import KVCache
from megatron_infer.commands.options import percentile
from megatron_infer.dispatch.select import select_ops
from megatron_infer.engine.engine import Engine
from megatron_infer.engine.graphs import Outputs
from megatron_infer.engine.request import Request
from megatron_infer.engine.runner import ModelRunner
from megatron_infer.engine.scheduler import Scheduler
from megatron_infer.model.formats import weight_formats
from megatron_infer.model.transformer import Transformer
from megatron_infer.sampling_params import SamplingParams
from megatron_infer.tensor_parallel.group import TPGroup

CPU = torch.device("cpu")
BLOCK_SIZE = 16


class Nothing:
    """A recording that leaves its outputs as they are."""

    def __init__(self, work: Callable[[], Outputs]) -> None:
        self.outputs = work()

    def replay(self) -> None:
        """Takes no time."""


class InstantDevice:
    """Records what then takes no time."""

    def record(self, work: Callable[[], Outputs]) -> Nothing:
        """Run it once, for its outputs' shapes."""
        return Nothing(work)

    def used_bytes(self) -> int:
        """None."""
        return 0


def engine_of(batch: int, max_model_len: int) -> Engine:
    """An engine that decodes `batch` sequences on the instant device."""
    model_config = SMALL.model
    ops, group = select_ops(CPU, num_threads=1), TPGroup.single(CPU)
    fmt, head_fmt = weight_formats(ops, model_config, torch.bfloat16, "none", CPU)
    model = Transformer(
        model_config, tp=group, ops=ops, fmt=fmt, head_fmt=head_fmt, dtype=torch.bfloat16, num_positions=max_model_len
    )
    for _ in model.load(SharedWeights.random(model_config, CPU)):
        continue
    num_blocks = (batch + 1) * -(-max_model_len // BLOCK_SIZE)
    kv = KVCache(
        model_config.num_hidden_layers, num_blocks, model_config.num_key_value_heads, BLOCK_SIZE,
        model_config.head_dim, dtype=torch.bfloat16, device=CPU,
    )  # fmt: skip
    runner = ModelRunner(model, kv, is_asynchronous=True)
    keys = [(batch, 1, 1)]
    runner.record_graphs(InstantDevice(), keys, max_model_len=max_model_len, max_num_seqs=batch, memory_bytes=1 << 30)
    scheduler = Scheduler(
        BlockPool(num_blocks, BLOCK_SIZE, True), max_num_seqs=batch, max_num_batched_tokens=1 << 20,
        max_model_len=max_model_len,
    )  # fmt: skip
    return Engine(runner, scheduler)


def measure(batch: int, context: int, steps: int) -> dict[str, float]:
    """Microseconds of Engine.step, median and 99th percentile, while `batch` sequences decode."""
    max_model_len = context + steps + 64
    engine = engine_of(batch, max_model_len)
    sampling = SamplingParams(max_new_tokens=steps + 32, ignore_eos=True)
    for i in range(batch):
        prompt = [(7 * i + j) % SMALL.model.vocab_size for j in range(context)]
        engine.add(Request(i, prompt, sampling, max_model_len, frozenset()))
    engine.step()  # all prompts at once
    engine.step()
    samples = []
    for _ in range(steps):
        began = time.perf_counter()
        engine.step()
        samples.append(1e6 * (time.perf_counter() - began))
    return {"batch": batch, "p50_us": percentile(samples, 50), "p99_us": percentile(samples, 99)}


def main() -> None:
    """Print a table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure(batch, args.context, args.steps) for batch in args.batches]
    for row in rows:
        print(f"batch {row['batch']:>4}: {row['p50_us']:8.0f} us per step (p99 {row['p99_us']:.0f})")
    print(
        json.dumps({**provenance("python -m benchmarks.host_step", "auto", 1), "context": args.context, "rows": rows})
    )


if __name__ == "__main__":
    main()
