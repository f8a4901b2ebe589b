"""Chooses, once at load, who implements each op, and says why every better candidate was refused.

Knows which candidates exist for a device and in which order they are wanted; knows nothing of their arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from megatron_infer.kernels.cpu import native
from megatron_infer.ops import Ops, reference, vendor

OP_NAMES = (
    "allocate_linear",
    "pack_rows",
    "pack_quantized",
    "linear",
    "rms_norm",
    "add_rms_norm",
    "rope_store_kv",
    "paged_attention",
    "silu_mul",
    "argmax",
    "gather_rows",
)

LAYER_OPS = ("attention_layer", "feed_forward_layer")
"""Single launches for several ops, where a candidate has them."""

OpTable = dict[str, Callable[..., Any]]


@dataclass(frozen=True)
class Candidate:
    """A set of implementations: either the ops it offers, or the reason why it cannot be used."""

    name: str
    detail: str = ""
    ops: OpTable | None = None
    refusal: str = ""


def _native(device: torch.device, num_threads: int, isa: str) -> Candidate:
    if device.type != "cpu":
        return Candidate("native", refusal=f"runs on the CPU, not on {device.type}")
    try:
        kernels = native.CpuKernels(num_threads, isa)
    except native.Unavailable as error:
        return Candidate("native", refusal=str(error))
    names = (*OP_NAMES, *LAYER_OPS)
    threads = "1 thread" if num_threads == 1 else f"{num_threads} threads"
    return Candidate("native", f"{kernels.isa}, {threads}", {name: getattr(kernels, name) for name in names})


def _triton(device: torch.device, deterministic: bool) -> Candidate:
    if device.type != "cuda":
        return Candidate("triton", refusal=f"runs on CUDA, not on {device.type}")
    if not torch.cuda.is_available():
        return Candidate("triton", refusal="torch finds no usable GPU")
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return Candidate(
            "triton", refusal=f"needs compute capability 8.0, this GPU has {capability[0]}.{capability[1]}"
        )
    if find_spec("triton") is None:
        return Candidate("triton", refusal="triton is not installed")
    # Here alone, so that a machine without a GPU never loads triton.
    from megatron_infer.ops import triton_ops

    num_sms = torch.cuda.get_device_properties(device).multi_processor_count
    detail = f"sm_{capability[0]}{capability[1]}, {num_sms} SMs{', deterministic' if deterministic else ''}"
    return Candidate("triton", detail, triton_ops.table(num_sms, deterministic=deterministic))


def _vendor(device: torch.device, deterministic: bool, forced: bool) -> Candidate:
    if not forced and device.type == "cpu":
        return Candidate("vendor", refusal="its bits depend on the batch; on the CPU they never may")
    if not forced and deterministic:
        return Candidate("vendor", refusal="its bits depend on the batch, and deterministic is set")
    return Candidate("vendor", "torch", {name: getattr(vendor, name) for name in OP_NAMES})


def _reference() -> Candidate:
    return Candidate("reference", "plain torch, slow", {name: getattr(reference, name) for name in OP_NAMES})


def select_ops(
    device: torch.device,
    *,
    num_threads: int,
    isa: str = "auto",
    deterministic: bool = False,
    force: str | None = None,
) -> Ops:
    """The best implementation of every op on `device`.

    Args:
        num_threads: of the CPU kernels; the calling thread counts.
        isa: their instruction set; "auto" takes the best this CPU has, and all give the same bits.
        deterministic: only implementations whose bits do not depend on the batch.
        force: "native", "triton", "vendor" or "reference" only, else ValueError.

    Raises:
        ValueError: `force` cannot be had; the message says why.
    """
    if num_threads < 1:
        raise ValueError(f"num_threads is {num_threads}; it must be at least 1")
    make: dict[str, Callable[[], Candidate]] = {
        "native": lambda: _native(device, num_threads, isa),
        "vendor": lambda: _vendor(device, deterministic, force is not None),
        # Behind vendor as long as nobody has seen these kernels run on a GPU: they are what deterministic takes.
        "triton": lambda: _triton(device, deterministic),
        "reference": _reference,
    }
    if force not in (None, *make):
        raise ValueError(f"force is {force!r}; it must be one of {', '.join(make)}")
    wanted = [force] if force else list(make)
    refused: list[Candidate] = []
    for name in wanted:
        candidate = make[name]()
        if candidate.ops is not None:
            because = "".join(f"; {other.name} refused: {other.refusal}" for other in refused)
            report = tuple(f"{op}: {candidate.name} ({candidate.detail}){because}" for op in OP_NAMES)
            return Ops(**candidate.ops, report=report)
        if name == "native" and device.type == "cpu" and isa != "auto":
            raise ValueError(f"cpu_isa {isa!r} cannot be used: {candidate.refusal}. Leave it at auto.")
        refused.append(candidate)
    raise ValueError(f"{force} ops cannot be used on {device}: {refused[-1].refusal}")
