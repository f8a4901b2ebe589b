"""Fills a Triton cache, on any machine, with the kernels that a GPU run of the suite will ask for.

python -m benchmarks.gpu.precompile --out DIR        # then there: TRITON_CACHE_DIR=DIR python -m benchmarks.gpu_suite

A cache serves the same Triton (version and wheel, so the same Python too) and compute capability; elsewhere it merely
misses. Where it misses, run this on the GPU machine first: it compiles on all cores, the suite on one.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.gpu.workload import FULL
from megatron_infer.dispatch import selfcheck
from megatron_infer.dispatch.selfcheck_inputs import CheckInputs, CheckShape
from megatron_infer.model.formats import stored_dtypes
from megatron_infer.model_config import ModelConfig
from megatron_infer.ops import Ops, SingleOps, Stream

FORMATS = ("none", "int4", "int8", "fp8")
_PARTS = ("linear", "attention_layer", "feed_forward_layer", "others")
"""Of the self-check, compiled by a process each."""
_STEPS = (1, 2, 3, 4, 5, 6, 8, 16, 24, 32, 40, 64, 128, 512, 1000, 2048)
"""Tokens of steps; divisible by 16 or not, Triton compiles twice where it is not told otherwise."""
_NUM_SMS = 132


def shape_of(model: ModelConfig, quantization: str) -> CheckShape:
    """What the self-check is given for a bf16 model on one GPU."""
    linear_dtype, head_dtype = stored_dtypes(torch.bfloat16, quantization)
    return CheckShape(
        hidden_size=model.hidden_size, intermediate_size=model.intermediate_size,
        num_heads=model.num_attention_heads, num_kv_heads=model.num_key_value_heads, head_dim=model.head_dim,
        vocab_size=model.vocab_size, block_size=16, tp=1, dtype=torch.bfloat16, kv_dtype=torch.bfloat16,
        linear_dtype=linear_dtype, head_dtype=head_dtype,
    )  # fmt: skip


class MetaInputs(CheckInputs):
    """Inputs of the self-check without contents."""

    def __init__(self, device: torch.device, shape: CheckShape, inner: torch.dtype) -> None:
        with mock.patch.object(torch, "Generator"):  # there is none of device "meta"
            super().__init__(device, shape, inner)

    def normal(self, *size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=self.device)

    def integers(self, stop: int, *size: int) -> Tensor:
        return torch.empty(*size, dtype=torch.int64, device=self.device)

    def shuffled(self, count: int) -> Tensor:
        return torch.empty(count, dtype=torch.int64, device=self.device)


class Untold(SingleOps):
    """Stands in for the trusted ops: results that nobody looks at, and no launch."""

    def linear(self, x_TK: Tensor, packed: Any) -> Tensor:
        return x_TK.new_empty(x_TK.shape[0], packed.out_dim)

    def paged_attention(self, q_TNH: Tensor, batch: Any, kv: Any, scale: float) -> Tensor:
        return torch.empty_like(q_TNH)


def compile_selfcheck(ops: Ops, shape: CheckShape, device: torch.device, wanted: Callable[[str], bool]) -> None:
    """Launch all that the self-check launches for the wanted ops."""
    from megatron_infer.ops.vendor import VendorOps

    inputs = MetaInputs if device.type == "meta" else CheckInputs
    with mock.patch.object(selfcheck, "CheckInputs", inputs):
        check = selfcheck._Check(ops, Untold(VendorOps()), device, shape, deterministic=False)
    for compare in check.all():
        # Its comparison needs contents; `_steps` launches it.
        if wanted(compare.__name__) and compare.__name__ != "argmax":
            for _ in compare():
                pass


def _steps(ops: Ops, inputs: CheckInputs, tokens: Sequence[int]) -> None:
    """Whole steps of the engine, as they come in batches: what a batch's size changes in the choice of kernels."""
    norm, heads = inputs.norm_weight(), inputs.heads
    qkv, out, gate_up, down = (inputs.packed(name, ops)[0] for name in ("qkv", "out", "gate_up", "down"))
    steps = [(1, count) for count in tokens if count <= 128] + [(count, 1) for count in tokens if count > 1]
    for queries, sequences in steps:
        _, batch, kv = inputs.paged([(queries, max(queries, 600))] * sequences)
        num_tokens = queries * sequences
        ops.gather_rows(inputs.normal(50, inputs.shape.hidden_size, dtype=inputs.shape.dtype), batch.token_ids_T)
        ops.argmax(inputs.normal(sequences, inputs.shape.vocab_size, dtype=inputs.shape.dtype))
        stream = Stream(inputs.normal(num_tokens, inputs.shape.hidden_size, dtype=inputs.shape.dtype))
        ops.attention_layer(stream, norm, qkv, out, inputs.rope(32768), batch, kv, heads, True)
        ops.feed_forward_layer(stream, norm, gate_up, down, True)
        ops.normed(stream, norm)
        ops.linear(stream.settle(), inputs.packed("head", ops)[0])


def _launch(part: str, shape: CheckShape) -> None:
    # Here and not at the top: the processes that import it must have their cache's place first.
    from megatron_infer.dispatch.triton_ops import TritonOps

    meta = torch.device("meta")
    ops = TritonOps(_NUM_SMS, meta)
    if part in ("steps", "one token"):
        _steps(ops, MetaInputs(meta, shape, shape.dtype), _STEPS if part == "steps" else (1,))
    elif part == "reading":
        from benchmarks.gpu import read_kernel

        for block, num_warps in read_kernel.TILES:
            read_kernel.read(torch.empty(FULL.ceiling_bytes // 4, device=meta), block, num_warps)
    else:
        compile_selfcheck(ops, shape, meta, lambda name: name == part or (part == "others" and name not in _PARTS))


def compile_part(part: str, quantization: str, is_overlapping: bool, arch: int, directory: str) -> int:
    """Compile one share, in a process of its own; how many kernels that were."""
    os.environ |= {"TRITON_CACHE_DIR": directory, "TRITON_STORE_BINARY_ONLY": "1"}
    from benchmarks.gpu.absent import compiling
    from benchmarks.gpu.engine import without_dependent_launch

    hashes, launcher = set(), _launcher()

    def use(kernel: Any) -> None:
        if kernel.hash not in hashes and launcher is not None:
            launcher(kernel.src, kernel.metadata)
        hashes.add(kernel.hash)

    with ExitStack() as stack:
        stack.enter_context(compiling(arch, use))
        if not is_overlapping:
            stack.enter_context(without_dependent_launch())
        _launch(part, shape_of(FULL.model, quantization))
    return len(hashes)


def _launcher() -> Callable[..., object] | None:
    """What compiles, with the machine's C compiler, the code that starts a kernel; None where there is no GPU."""
    if not torch.cuda.is_available():
        return None
    from triton.backends.nvidia.driver import CudaDriver

    launcher: Callable[..., object] = CudaDriver().launcher_cls
    return launcher


def _shares(formats: Sequence[str]) -> Iterator[tuple[str, str, bool]]:
    """Part, format, whether kernels overlap: long ones first."""
    for quantization in formats:
        yield from ((part, quantization, True) for part in (*_PARTS, "steps"))
    yield "reading", "none", True
    for quantization in formats:
        yield ("steps" if quantization == "none" else "one token"), quantization, False


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile everything; prints how many kernels, seconds and bytes that were."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the cache; what it has already is not compiled again")
    parser.add_argument("--arch", type=int, default=90, help="compute capability, 90 for H100 and H200")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args(arguments)
    began = time.perf_counter()
    run = partial(compile_part, arch=args.arch, directory=str(args.out.resolve()))
    failed = 0
    with ProcessPoolExecutor(args.jobs, get_context("spawn"), max_tasks_per_child=1) as pool:
        shares = list(_shares(args.formats))
        for share, future in [(share, pool.submit(run, *share)) for share in shares]:
            try:
                told = f"{future.result()} kernels"
            except Exception as error:  # one format's failure must not cost the others
                failed, told = failed + 1, f"FAILED: {type(error).__name__}: {error}"
            part, quantization, is_overlapping = share
            print(f"{quantization}, {part}{'' if is_overlapping else ', not overlapping'}: {told}", flush=True)
    files = [path for path in args.out.rglob("*") if path.is_file()]
    kernels, size = sum(path.suffix == ".cubin" for path in files), sum(path.stat().st_size for path in files)
    print(f"{kernels} kernels, {size / 2**20:.1f} MiB, {time.perf_counter() - began:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
