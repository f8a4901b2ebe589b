"""Chooses, once at load, who implements each op, and says why every better candidate was refused.

Knows which candidates exist for a device and in which order they are wanted; knows nothing of their arithmetic. On a
GPU, what is not torch itself is used only after dispatch.selfcheck has found no fault in it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import torch

from megatron_infer.dispatch.selfcheck import find_faults
from megatron_infer.dispatch.selfcheck_inputs import CheckShape as CheckShape
from megatron_infer.kernels.cpu import abi, native
from megatron_infer.ops import OP_NAMES, Ops
from megatron_infer.ops.optional import ApexOps, FlashAttentionOps
from megatron_infer.ops.reference import ReferenceOps
from megatron_infer.ops.vendor import VendorOps

CANDIDATES = ("native", "triton", "vendor", "reference")
"""In the order in which they are wanted."""
_REPLACED = {"flash-attn": ("paged_attention",), "apex": ("rms_norm", "add_rms_norm")}
"""Ops of torch's own that a package replaces."""
_LAYERS = ("attention_layer", "feed_forward_layer")
_LINEAR = ("allocate_linear", "pack_rows", "pack_quantized", "linear")

log = logging.getLogger("megatron_infer")


@dataclass(frozen=True)
class Candidate:
    """An implementation: either its ops, or the reason why it cannot be used."""

    name: str
    detail: str = ""
    ops: Ops | None = None
    refusal: str = ""
    faults: Mapping[str, str] = field(default_factory=dict)
    """Op -> why torch's is in its place."""

    def proven(self, device: torch.device, shape: CheckShape | None, deterministic: bool) -> Candidate:
        """With torch's ops in place of faulty ones; refused where these would break the promise of `deterministic`, and
        where neither linear layers nor attention are left."""
        if self.ops is None or shape is None:
            return self
        faults: dict[str, str] = {}
        for fault in find_faults(
            self.ops, VendorOps(), device, shape, names=_REPLACED.get(self.name), deterministic=deterministic
        ):
            log.warning("%s ops: %s. Please report this.\n%s", self.name, fault.reason, fault.details)
            if self.name != "triton" or deterministic or {"linear", "paged_attention"} <= {*faults, fault.op}:
                return Candidate(self.name, refusal=next(iter(faults.values()), fault.reason))
            faults |= dict.fromkeys(_mend(self.ops, fault.op), fault.reason)
        return replace(self, faults=faults)


def _mend(ops: Ops, faulty: str) -> tuple[str, ...]:
    """Put torch's ops in the place of a faulty one and of what shares its layout of weights, single ops in that of half
    a layer; the names of all."""
    torchs, names = VendorOps(), (*_LINEAR, *_LAYERS) if faulty == "linear" else (faulty,)
    for name in names:
        setattr(ops, name, partial(getattr(Ops, name), ops) if name in _LAYERS else getattr(torchs, name))
    ops.is_recordable = ops.is_recordable and faulty != "paged_attention"
    return names


def _native(device: torch.device, num_threads: int, isa: str) -> Candidate:
    if device.type != "cpu":
        return Candidate("native", refusal=f"runs on the CPU, not on {device.type}")
    try:
        kernels = native.CpuKernels(num_threads, isa)
    except abi.Unavailable as error:
        return Candidate("native", refusal=str(error))
    threads = "1 thread" if num_threads == 1 else f"{num_threads} threads"
    return Candidate("native", f"{kernels.isa}, {threads}", kernels)


def _triton(device: torch.device, deterministic: bool) -> Candidate:
    if device.type != "cuda":
        return Candidate("triton", refusal=f"runs on CUDA, not on {device.type}")
    if not torch.cuda.is_available():
        return Candidate("triton", refusal="torch finds no usable GPU")
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        has = f"this GPU has {capability[0]}.{capability[1]}"
        return Candidate("triton", refusal=f"needs compute capability 8.0, {has}")
    if find_spec("triton") is None:
        return Candidate("triton", refusal="triton is not installed")
    # Here alone, so that a machine without a GPU never loads triton.
    from megatron_infer.dispatch import triton_ops

    num_sms = torch.cuda.get_device_properties(device).multi_processor_count
    detail = f"sm_{capability[0]}{capability[1]}, {num_sms} SMs{', deterministic' if deterministic else ''}"
    made = triton_ops.DeterministicTritonOps if deterministic else triton_ops.TritonOps
    return Candidate("triton", detail, made(num_sms, device))


def _vendor(device: torch.device, deterministic: bool, forced: bool) -> Candidate:
    if not forced and device.type == "cpu":
        return Candidate("vendor", refusal="its bits depend on the batch; on the CPU they never may")
    if not forced and deterministic:
        return Candidate("vendor", refusal="its bits depend on the batch, and deterministic is set")
    return Candidate("vendor", "torch", VendorOps())


def _flash_attention(ops: Ops, device: torch.device, shape: CheckShape) -> Candidate:
    capability = torch.cuda.get_device_capability(device)
    if find_spec("flash_attn_interface") is None:
        if find_spec("flash_attn") is None:
            return Candidate("flash-attn", refusal="not installed")
        # Gathering the pages before each call would need their number on the host: no step could be a CUDA graph.
        takes = f"multiples of 256 tokens, the cache has blocks of {shape.block_size}; FlashAttention 3 takes any"
        return Candidate("flash-attn", refusal=f"version 2 takes pages of {takes}")
    if not (8, 0) <= capability < (10, 0):
        has = f"this GPU has {capability[0]}.{capability[1]}"
        return Candidate("flash-attn", refusal=f"version 3 has kernels for compute capability 8 and 9, {has}")
    if shape.dtype not in (torch.bfloat16, torch.float16) or shape.kv_dtype != shape.dtype:
        return Candidate("flash-attn", refusal=f"takes q and cache in bfloat16, not {shape.dtype}, {shape.kv_dtype}")
    try:
        call = import_module("flash_attn_interface").flash_attn_with_kvcache
    except (ImportError, AttributeError, OSError) as error:
        return Candidate("flash-attn", refusal=f"cannot be loaded: {error}")
    return Candidate("flash-attn", "version 3", FlashAttentionOps(ops, call))


def _apex(ops: Ops) -> Candidate:
    if find_spec("fused_layer_norm_cuda") is None:
        why = "built without its CUDA extensions" if find_spec("apex") is not None else "not installed"
        return Candidate("apex", refusal=why)
    try:
        call = import_module("fused_layer_norm_cuda").rms_forward_affine_mixed_dtypes
    except (ImportError, AttributeError, OSError) as error:
        return Candidate("apex", refusal=f"cannot be loaded: {error}")
    return Candidate("apex", "fused RMSNorm", ApexOps(ops, call))


def _replacing(chosen: Candidate, device: torch.device, shape: CheckShape, deterministic: bool) -> list[Candidate]:
    """Packages that may replace single ops of the chosen ones, each on top of those before it."""
    if deterministic:
        reason = "its bits depend on the batch, and deterministic is set"
        return [Candidate(name, refusal=reason) for name in _REPLACED]
    if chosen.name != "vendor":
        reason = f"it replaces ops of vendor, not of {chosen.name}, whose layers call no other package"
        return [Candidate(name, refusal=reason) for name in _REPLACED]
    assert chosen.ops is not None
    apex = _apex(chosen.ops).proven(device, shape, deterministic)
    return [apex, _flash_attention(apex.ops or chosen.ops, device, shape).proven(device, shape, deterministic)]


def _assembled(chosen: Candidate, refused: list[Candidate], replacing: list[Candidate]) -> Ops:
    """The chosen ops with what others replace of them, and a line for each op."""
    because = "".join(f"; {other.name} refused: {other.refusal}" for other in refused)
    report = []
    for op in OP_NAMES:
        line = f"{chosen.name} ({chosen.detail}){because}"
        if op in chosen.faults:
            line = f"vendor (torch){because}; {chosen.name} refused: {chosen.faults[op]}"
        for other in replacing:
            if op not in _REPLACED[other.name]:
                continue
            if other.ops is None:
                line += f"; {other.name} refused: {other.refusal}"
            else:
                line = f"{other.name} ({other.detail}){because}"
        report.append(f"{op}: {line}")
    *_, ops = (candidate.ops for candidate in (chosen, *replacing) if candidate.ops is not None)
    ops.report, ops.chosen = tuple(report), chosen.name
    return ops


def select_ops(
    device: torch.device, *, num_threads: int, isa: str = "auto", deterministic: bool = False,
    shape: CheckShape | None = None, force: str | None = None,
) -> Ops:  # fmt: skip
    """The best implementation of every op on `device`.

    Args:
        num_threads: of the CPU kernels; the calling thread counts.
        isa: their instruction set; "auto" takes the best this CPU has, and all give the same bits.
        deterministic: only implementations whose bits do not depend on the batch.
        shape: of the model: GPU kernels other than torch's are then run on inputs of that shape and compared with
            torch's before they are taken, and packages that replace single ops are looked for.
        force: "native", "triton", "vendor" (with what replaces its ops) or "reference" only, else ValueError.

    Raises:
        ValueError: `force` cannot be had; the message says why.
        RuntimeError: a kernel left the GPU unusable to this process.
    """
    if num_threads < 1:
        raise ValueError(f"num_threads is {num_threads}; it must be at least 1")
    shape = shape if device.type == "cuda" else None
    make: dict[str, Callable[[], Candidate]] = {
        "native": lambda: _native(device, num_threads, isa),
        "triton": lambda: _triton(device, deterministic).proven(device, shape, deterministic),
        "vendor": lambda: _vendor(device, deterministic, force is not None),
        "reference": lambda: Candidate("reference", "plain torch, slow", ReferenceOps()),
    }
    if force not in (None, *make):
        raise ValueError(f"force is {force!r}; it must be one of {', '.join(make)}")
    refused: list[Candidate] = []
    for name in [force] if force else CANDIDATES:
        candidate = make[name]()
        if candidate.ops is not None:
            replacing = _replacing(candidate, device, shape, deterministic) if shape is not None else []
            return _assembled(candidate, refused, replacing)
        if name == "native" and device.type == "cpu" and isa != "auto":
            raise ValueError(f"cpu_isa {isa!r} cannot be used: {candidate.refusal}. Leave it at auto.")
        refused.append(candidate)
    raise ValueError(f"{force} ops cannot be used on {device}: {refused[-1].refusal}")
