"""What a decode step costs each rank of 1 to 8 GPUs, without one: bytes, launches and messages of a token.

python -m benchmarks.gpu.plan [--config config.json] [--tp 1 2 4 8] [--quantization int4] [--read_tb_per_second 3]

The engine's own step, as a CUDA graph records it, runs on tensors without contents: launches of ours and of torch, and
what the ranks tell each other, are counted, not assumed. docs/gpu.md has the same figures by arithmetic.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu.single_kernels import packed_bytes
from megatron_infer.cache.kv_cache import KVCache
from megatron_infer.engine.batch import Batch
from megatron_infer.engine.runner import ModelRunner
from megatron_infer.model.formats import weight_formats
from megatron_infer.model.transformer import Transformer
from megatron_infer.model_config import ModelConfig

META = torch.device("meta")
_NUM_SMS, _BLOCK_SIZE = 132, 16
_SYMMETRIC_BYTES = 512 << 10
"""Up to so many, an all-reduce is one launch that adds to the residual as well (docs/gpu.md)."""


@dataclass
class Peers:
    """A rank's group as far as a step asks it; notes what is sent."""

    rank: int
    size: int
    device: torch.device = META
    sent: list[tuple[str, int]] = field(default_factory=list)
    launches: Counter[str] = field(default_factory=Counter)

    def _note(self, kind: str, x: Tensor) -> None:
        if self.size > 1:
            self.sent.append((kind, x.nbytes))
            self.launches[kind] += 1

    def all_reduce(self, x_TN: Tensor) -> Tensor:
        """As TPGroup's."""
        self._note("all_reduce", x_TN)
        return x_TN

    def add_all_reduce(self, x_TN: Tensor, residual_TN: Tensor) -> bool:
        """As TPGroup's."""
        if self.size == 1 or x_TN.nbytes > _SYMMETRIC_BYTES:
            return False
        self._note("all_reduce", x_TN)
        return True

    def all_gather(self, x_SN: Tensor) -> Tensor:
        """As TPGroup's."""
        self._note("all_gather", x_SN)
        return x_SN.new_empty(len(x_SN), x_SN.shape[1] * self.size) if self.size > 1 else x_SN


class _TorchLaunches(TorchDispatchMode):
    """Counts torch's kernels: every op but those that only allocate or look at memory."""

    def __init__(self, launches: Counter[str]) -> None:
        super().__init__()
        self._launches = launches

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not (func.is_view or name.startswith(("empty", "new_empty", "_unsafe_view", "lift", "detach", "alias"))):
            self._launches[name] += 1
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class RankPlan:
    """What one rank does for a step of one token. cache_bytes_per_position: keys and values read, of all layers."""

    weight_bytes: int
    cache_bytes_per_position: int
    launches: dict[str, int]
    sent: list[tuple[str, int]]


def plan_rank(config: ModelConfig, quantization: str, rank: int, size: int) -> RankPlan:
    """Run one rank's step of one token on nothing; compute capability 9.0, bf16 activations and cache."""
    # Here and not at the top: without triton the rest of the suite can be imported.
    from benchmarks.gpu.absent import counting
    from megatron_infer.dispatch.triton_ops import TritonOps

    group = Peers(rank, size)
    ops, dtype = TritonOps(_NUM_SMS, META), torch.bfloat16
    fmt, head_fmt = weight_formats(ops, config, dtype, quantization, META)
    model = Transformer(
        config, tp=group, ops=ops, fmt=fmt, head_fmt=head_fmt, dtype=dtype, num_positions=64  # type: ignore[arg-type]
    )  # fmt: skip
    kv_heads = len(config.kv_heads_on(rank, size))
    kv = KVCache(
        config.num_hidden_layers, 8, kv_heads, _BLOCK_SIZE, config.head_dim, dtype=dtype, device=META
    )  # fmt: skip
    runner = ModelRunner(model, kv, is_asynchronous=True)
    runner._last_ids = torch.zeros(64, dtype=torch.int64, device=META)
    with torch.no_grad(), counting(90, group.launches), _TorchLaunches(group.launches):
        runner._compute(_one_token())
    linear = [model.head.packed]
    for block in model.blocks:
        attention, ffn = block.attention, block.feed_forward
        linear += [each.packed for each in (attention.qkv, attention.out, ffn.gate_up, ffn.down)]
    norms = 4 * config.hidden_size * (2 * config.num_hidden_layers + 1)
    weight_bytes = sum(map(packed_bytes, linear)) + norms
    cache_bytes = 2 * config.num_hidden_layers * kv_heads * config.head_dim * dtype.itemsize
    return RankPlan(weight_bytes, cache_bytes, dict(group.launches), group.sent)


def _one_token() -> Batch:
    def index(*size: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(size, dtype=dtype, device=META)

    return Batch(
        token_ids_T=index(1, dtype=torch.int64), positions_T=index(1), slots_T=index(1, dtype=torch.int64),
        query_start_S1=index(2), context_lens_S=index(1), block_tables_SB=index(1, 256), max_query_len=1,
        sample_rows=index(1, dtype=torch.int64), draws_S5=index(1, 5, dtype=torch.float64),
    )  # fmt: skip


def plan(config: ModelConfig, quantization: str, size: int) -> RankPlan:
    """The fullest of `size` ranks."""
    ranks = [plan_rank(config, quantization, rank, size) for rank in range(size)]
    return max(ranks, key=lambda each: each.weight_bytes)


def main() -> None:
    """Print a row per tensor-parallel degree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="a model's config.json (default: aiXcoder-7B)")
    parser.add_argument("--quantization", choices=("none", "int8", "int4", "fp8"), default="none")
    parser.add_argument("--tp", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--context", type=int, default=4096, help="positions in the cache")
    parser.add_argument("--read_tb_per_second", type=float, default=3.35, help="of one GPU")
    args = parser.parse_args()
    config = ModelConfig.from_hf(json.loads(args.config.read_text())) if args.config else ModelConfig.aixcoder_7b()
    config = replace(config, quantization=None)
    print(f"a token of one sequence at {args.context} positions, each of tp ranks, {args.quantization} weights")
    print("| tp | weights, GB | cache, GB | floor, ms | launches, ours + torch's | messages | bytes sent |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    for size in args.tp:
        rank = plan(config, args.quantization, size)
        cache = rank.cache_bytes_per_position * args.context
        floor = (rank.weight_bytes + cache) / args.read_tb_per_second / 1e9
        ours = sum(count for name, count in rank.launches.items() if name.endswith(("_kernel", "all_reduce")))
        torchs = sum(rank.launches.values()) - ours
        told = ", ".join(f"{count} {kind}" for kind, count in Counter(kind for kind, _ in rank.sent).items())
        print(
            f"| {size} | {rank.weight_bytes / 1e9:.3f} | {cache / 1e9:.3f} | {floor:.3f} | {ours} + {torchs} | "
            f"{told or 'none'} | {sum(num_bytes for _, num_bytes in rank.sent):,} |"
        )


if __name__ == "__main__":
    main()
