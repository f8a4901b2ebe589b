"""How the weights of a linear layer are stored and multiplied.

A format knows its storage, where the K dimension may be cut, and its matmul. Layers hold a format and never ask which.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_infer.config import EngineConfig
from megatron_infer.model_config import ModelConfig
from megatron_infer.ops import GROUP, INT4, QUANTIZED, Ops, PackedLinear, chunk_bounds, fp8

Range = tuple[int, int]

_BLOCK_ELEMENTS = 1 << 19
"""Weights quantised at a time: the temporaries stay in the cache."""
_LIMITS = {torch.int8: (-127, 127), INT4: (-8, 7)}


class TensorSource(Protocol):
    """Where weights come from: any slice of a stored tensor by its canonical name."""

    def read(self, name: str, rows: Range | None = None, cols: Range | None = None) -> Tensor: ...


class WeightFormat(Protocol):
    """Storage and arithmetic of a weight matrix [out_dim, in_dim]."""

    def chunk_bounds(self, in_dim: int) -> tuple[int, ...]:
        """The 9 bounds of the 8 K-chunks of the numerics contract; a tensor-parallel cut falls on one of them."""
        ...

    def allocate(self, out_dim: int, bounds: tuple[int, ...]) -> PackedLinear:
        """Empty storage for the K range and chunks that `bounds` (starting at 0) describe."""
        ...

    def load_rows(
        self,
        packed: PackedLinear,
        row_start: int,
        source: TensorSource,
        name: str,
        rows: Range | None = None,
        cols: Range | None = None,
    ) -> None:
        """Read rows and columns of the linear layer `name`, and store them from row `row_start` on."""
        ...

    def matmul(self, x_TK: Tensor, packed: PackedLinear) -> Tensor:
        """y_TN = x_TK @ W^T (+ bias), accumulated as the numerics contract says."""
        ...


@dataclass(frozen=True)
class PlainFormat:
    """bf16 or fp32 weights as they are, packed once into the layout the kernels read."""

    ops: Ops
    dtype: torch.dtype
    device: torch.device

    def chunk_bounds(self, in_dim: int) -> tuple[int, ...]:
        return chunk_bounds(in_dim)

    def allocate(self, out_dim: int, bounds: tuple[int, ...]) -> PackedLinear:
        return self.ops.allocate_linear(out_dim, bounds[-1], bounds, self.dtype, self.device)

    def load_rows(
        self,
        packed: PackedLinear,
        row_start: int,
        source: TensorSource,
        name: str,
        rows: Range | None = None,
        cols: Range | None = None,
    ) -> None:
        self.ops.pack_rows(packed, row_start, source.read(f"{name}.weight", rows, cols))

    def matmul(self, x_TK: Tensor, packed: PackedLinear) -> Tensor:
        return self.ops.linear(x_TK, packed)


@dataclass(frozen=True)
class Fp8Format(PlainFormat):
    """float8_e4m3fn weights with an fp32 scale per row of this rank's slice, rounded by the op table.

    K is cut at multiples of what torch's fp8 product takes. Tensor-parallel degrees round differently.
    """

    def chunk_bounds(self, in_dim: int) -> tuple[int, ...]:
        return chunk_bounds(in_dim, fp8.UNIT)

    def load_rows(
        self,
        packed: PackedLinear,
        row_start: int,
        source: TensorSource,
        name: str,
        rows: Range | None = None,
        cols: Range | None = None,
    ) -> None:
        weight_NK = source.read(f"{name}.weight", rows, cols)
        for start, stop in row_blocks(weight_NK.shape[0], weight_NK.shape[1]):
            self.ops.pack_rows(packed, row_start + start, weight_NK[start:stop])


@dataclass(frozen=True)
class RoundingFormat(PlainFormat):
    """int8 or int4 weights with a scale per output row and GROUP of k, rounded to nearest while loading.

    K is cut at multiples of GROUP, so that every tensor-parallel degree rounds the same groups to the same numbers.
    """

    def chunk_bounds(self, in_dim: int) -> tuple[int, ...]:
        return chunk_bounds(in_dim, GROUP)

    def load_rows(
        self,
        packed: PackedLinear,
        row_start: int,
        source: TensorSource,
        name: str,
        rows: Range | None = None,
        cols: Range | None = None,
    ) -> None:
        weight_NK = source.read(f"{name}.weight", rows, cols)
        for block in row_blocks(weight_NK.shape[0], weight_NK.shape[1]):
            values_NK, scales_NG = quantize(weight_NK[slice(*block)], self.dtype)
            self.ops.pack_quantized(packed, row_start + block[0], values_NK, scales_NG)


@dataclass(frozen=True)
class QuantizedFormat(RoundingFormat):
    """The same from a checkpoint that was quantised: integers and scales as they are stored.

    group_size: k that share a stored scale, a multiple of GROUP.
    """

    group_size: int

    def load_rows(
        self,
        packed: PackedLinear,
        row_start: int,
        source: TensorSource,
        name: str,
        rows: Range | None = None,
        cols: Range | None = None,
    ) -> None:
        values_NK, scales_NG = read_quantized(source, name, self.dtype, self.group_size, rows, cols)
        low, high = _LIMITS[self.dtype]
        for block in row_blocks(values_NK.shape[0], packed.in_dim):
            block_NK, block_NG = values_NK[slice(*block)], scales_NG[slice(*block)]
            if not bool(block_NG.isfinite().all()):
                raise ValueError(f"tensor '{name}.scales' holds NaN or infinity; quantize or copy the checkpoint again")
            if self.dtype == INT4:
                block_NK = unpack_int4(block_NK)
            elif block_NK.numel() and int(block_NK.min()) < low:
                raise ValueError(
                    f"tensor '{name}.weight' has values outside [{low}, {high}]; quantize or copy the checkpoint again"
                )
            self.ops.pack_quantized(packed, row_start + block[0], block_NK, block_NG)


def weight_formats(
    ops: Ops, config: ModelConfig, dtype: torch.dtype, quantization: str, device: torch.device
) -> tuple[WeightFormat, WeightFormat]:
    """Formats of the blocks' linear layers and of the head, for a checkpoint of this config.

    Args:
        dtype: of weights that are not quantised.
        quantization: "none", "int8", "int4" or "fp8"; the checkpoint's own where it is quantised.
    """
    stored = config.quantization
    assert stored is None or stored.format == quantization

    def make(weights: torch.dtype, is_stored: bool) -> WeightFormat:
        if weights not in QUANTIZED:
            return Fp8Format(ops, weights, device) if weights == fp8.FP8 else PlainFormat(ops, weights, device)
        if stored is None or not is_stored:
            return RoundingFormat(ops, weights, device)
        return QuantizedFormat(ops, weights, device, stored.group_size)

    linear_dtype, head_dtype = stored_dtypes(dtype, quantization)
    # A tied head is the embedding table, which is never stored quantised.
    return make(linear_dtype, True), make(head_dtype, not config.tie_word_embeddings)


def stored_dtypes(dtype: torch.dtype, quantization: str) -> tuple[torch.dtype, torch.dtype]:
    """Of the blocks' linear layers and of the head.

    int4 leaves the head int8, and fp8 leaves it in `dtype`: its errors go straight to the logits.
    """
    return {
        "none": (dtype, dtype),
        "int8": (torch.int8, torch.int8),
        "int4": (INT4, torch.int8),
        "fp8": (fp8.FP8, dtype),
    }[quantization]


def check_fp8(model: ModelConfig, config: EngineConfig, tp: int, capability: tuple[int, int] | None) -> None:
    """Refuse fp8 weights where they cannot be multiplied, before any is read.

    Args:
        tp: the tensor-parallel degree. capability: of the GPU; None on the CPU.
    Raises:
        ValueError: with what to use instead.
    """
    needs = f"quantization 'fp8' needs a GPU of compute capability {'.'.join(map(str, fp8.CAPABILITY))} or more"
    if capability is None:
        raise ValueError(f"{needs}; on the CPU use quantization='int8', which works everywhere")
    if capability < fp8.CAPABILITY:
        raise ValueError(f"{needs}, this one has {'.'.join(map(str, capability))}; use quantization='int8'")
    if config.deterministic:
        raise ValueError(
            "quantization 'fp8' rounds and sums in the order of torch's kernels, which deterministic=True rules out; "
            "use quantization='int8', or leave deterministic off"
        )
    query, kv = (len(heads(0, tp)) * model.head_dim for heads in (model.query_heads_on, model.kv_heads_on))
    sizes = {
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        f"query columns on each of {tp} ranks": query,
        f"key columns on each of {tp} ranks": 2 * kv,
    }
    odd = [f"{what} {size}" for what, size in sizes.items() if size % fp8.UNIT]
    if odd:
        raise ValueError(
            f"quantization 'fp8' needs linear layers of multiples of {fp8.UNIT}, but this model has "
            f"{' and '.join(odd)}; use quantization='int8'"
        )


def bytes_per_weight(dtype: torch.dtype) -> float:
    """Storage of one weight, its share of the scale included; of fp8, whose rows share one, without it."""
    return {torch.int8: 1 + 2 / GROUP, INT4: 0.5 + 2 / GROUP}.get(dtype, float(dtype.itemsize))


def row_blocks(num_rows: int, in_dim: int) -> list[Range]:
    """Row ranges [start, stop) of a matrix, small enough for temporaries in fp32."""
    step = max(1, _BLOCK_ELEMENTS // max(1, in_dim))
    return [(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]


def quantize(weight_NK: Tensor, dtype: torch.dtype, group_size: int = GROUP) -> tuple[Tensor, Tensor]:
    """Round a weight to nearest, symmetrically, in groups of `group_size` along K.

    Args:
        weight_NK: [N, K], floating. dtype: torch.int8 or INT4.
    Returns:
        values_NK: int8 within [-127, 127] or [-8, 7]. scales_NG: bf16, ceil(K / group_size) per row, NaN for a group
        with NaN or infinity; the weight is about value * scale.
    """
    num_rows, in_dim = weight_NK.shape
    num_groups = -(-in_dim // group_size)
    w_NGK = torch.nn.functional.pad(weight_NK.float(), (0, -in_dim % group_size)).view(num_rows, num_groups, group_size)
    scales_NG = group_scales(w_NGK, dtype)
    values_NGK = round_to_steps(w_NGK, scales_NG[..., None], dtype)
    return values_NGK.to(torch.int8).view(num_rows, num_groups * group_size)[:, :in_dim], scales_NG


def group_scales(w_NGK: Tensor, dtype: torch.dtype) -> Tensor:
    """scales_NG in bf16 of groups along the last dimension.

    int8 maps a group's largest magnitude to 127. int4 maps the value of largest magnitude to -8, whatever its sign, as
    llama.cpp's Q4_0 does: the 16 steps have no positive counterpart of it.
    """
    low, high = _LIMITS[dtype]
    if dtype == torch.int8:
        scales_NG = w_NGK.abs().amax(dim=-1) / high
    else:
        smallest_NG, largest_NG = w_NGK.amin(dim=-1), w_NGK.amax(dim=-1)
        scales_NG = torch.where(largest_NG > -smallest_NG, largest_NG, smallest_NG) / low
    return torch.where(scales_NG.isfinite(), scales_NG, float("nan")).to(torch.bfloat16)


def round_to_steps(w: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The integers, in fp32, nearest to w / scales; 0 where the scale is NaN."""
    steps = scales.float()
    return (w / torch.where(steps == 0, 1.0, steps)).round_().clamp_(*_LIMITS[dtype]).nan_to_num_(0.0)


def dequantize(values_NK: Tensor, scales_NG: Tensor, group_size: int) -> Tensor:
    """The weight in fp32 that integers and scales stand for."""
    return values_NK.float() * scales_NG.float().repeat_interleave(group_size, dim=1)[:, : values_NK.shape[1]]


def read_quantized(
    source: TensorSource, name: str, dtype: torch.dtype, group_size: int, rows: Range | None, cols: Range | None
) -> tuple[Tensor, Tensor]:
    """Integers as stored (int4: two to a byte) and scales, one per GROUP of k, of a slice of the linear layer `name`.

    `cols` starts at a multiple of GROUP.
    """
    repeats = group_size // GROUP
    if cols is None:
        values_NK = source.read(f"{name}.weight", rows)
        in_dim = values_NK.shape[1] * (2 if dtype == INT4 else 1)
        scales_NG = source.read(f"{name}.scales", rows).repeat_interleave(repeats, dim=1)
        return values_NK, scales_NG[:, : -(-in_dim // GROUP)]
    start, stop = cols
    assert start % GROUP == 0
    per_byte = 2 if dtype == INT4 else 1
    values_NK = source.read(f"{name}.weight", rows, (start // per_byte, stop // per_byte))
    first, last = start // group_size, -(-stop // group_size)
    scales_NG = source.read(f"{name}.scales", rows, (first, last)).repeat_interleave(repeats, dim=1)
    skipped = start // GROUP - first * repeats
    return values_NK, scales_NG[:, skipped : skipped + -(-(stop - start) // GROUP)]


def pack_int4(values_NK: Tensor) -> Tensor:
    """int8 values within [-8, 7] as uint8 [N, K / 2]: even k in the low half of a byte, odd k in the high half."""
    return ((values_NK[:, ::2] & 15) | (values_NK[:, 1::2] << 4)).view(torch.uint8)


def unpack_int4(bytes_NK: Tensor) -> Tensor:
    """What `pack_int4` packed: int8 [N, K]."""
    signed_NK = bytes_NK.view(torch.int8)
    return torch.stack(((signed_NK << 4) >> 4, signed_NK >> 4), dim=-1).flatten(1)
