"""How the weights of a linear layer are stored, and rounded where they are.

A format knows its storage and where the K dimension may be cut. Layers hold a format and never ask which.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from megatron_infer.model_config import ModelConfig
from megatron_infer.ops import GROUP, INT4, QUANTIZED, Ops, PackedLinear, chunk_bounds, fp8

Range = tuple[int, int]

READ_ROWS = 2048
"""Rows of a weight read at a time."""
_BLOCK_ELEMENTS = 1 << 19
"""Weights quantised at a time: the temporaries stay in the cache."""
_LIMITS = {torch.int8: (-127, 127), INT4: (-8, 7)}


class TensorSource(Protocol):
    """Where weights come from: any slice of a stored tensor by its canonical name."""

    def read(self, name: str, rows: Range | None = None, cols: Range | None = None) -> Tensor: ...


@dataclass(frozen=True)
class Slice:
    """Rows and columns [start, stop) of the linear layer `name`; None: all of them."""

    name: str
    rows: Range | None = None
    cols: Range | None = None


Encode = Callable[[TensorSource, Slice], Iterator[tuple[int, Tensor, Tensor | None]]]
"""A slice as it is stored, block by block: (first row within it, values, scales), scales of int8 and int4 only."""


@dataclass(frozen=True)
class WeightFormat:
    """How the weights of a linear layer are stored. They are multiplied by `ops`, which packs them.

    Attributes:
        dtype: of the weights as stored.
        unit: K is cut at multiples of it, so that a group that shares a scale is whole on one rank.
        encode: makes of a checkpoint's tensor what is packed.
    """

    ops: Ops
    dtype: torch.dtype
    device: torch.device
    unit: int
    encode: Encode

    def chunk_bounds(self, in_dim: int) -> tuple[int, ...]:
        """The 9 bounds of the 8 K-chunks of the numerics contract; a tensor-parallel cut falls on one of them."""
        return chunk_bounds(in_dim, self.unit)

    def allocate(self, label: str, out_dim: int, bounds: tuple[int, ...]) -> PackedLinear:
        """Empty storage, called `label` in profiles, for the K range and chunks that `bounds` (from 0) describe."""
        packed = self.ops.allocate_linear(out_dim, bounds[-1], bounds, self.dtype, self.device)
        packed.name = label
        return packed

    def load(self, packed: PackedLinear, row_start: int, source: TensorSource, part: Slice) -> None:
        """Read `part` and store it from row `row_start` on."""
        for row, values_NK, scales_NG in self.encode(source, part):
            if scales_NG is None:
                self.ops.pack_rows(packed, row_start + row, values_NK)
            else:
                self.ops.pack_quantized(packed, row_start + row, values_NK, scales_NG)


def _read(source: TensorSource, part: Slice) -> Iterator[tuple[int, Tensor]]:
    """As it is, some rows at a time: what a file decodes to fp32 is never in memory as a whole."""
    assert part.rows is not None
    first, last = part.rows
    for start in range(first, last, READ_ROWS):
        yield start - first, source.read(f"{part.name}.weight", (start, min(start + READ_ROWS, last)), part.cols)


def _plain(source: TensorSource, part: Slice) -> Iterator[tuple[int, Tensor, None]]:
    """As it is."""
    for row, weight_NK in _read(source, part):
        yield row, weight_NK, None


def _in_blocks(source: TensorSource, part: Slice) -> Iterator[tuple[int, Tensor, None]]:
    """As it is, in small blocks: the ops round fp8 themselves, with a scale per row of this rank's slice."""
    for row, weight_NK in _read(source, part):
        for start, stop in row_blocks(*weight_NK.shape):
            yield row + start, weight_NK[start:stop], None


def _rounded(dtype: torch.dtype, source: TensorSource, part: Slice) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Rounded to nearest, with a scale per row and GROUP of k."""
    for start, weight_NK, _ in _in_blocks(source, part):
        yield start, *quantize(weight_NK, dtype)


def _stored(
    dtype: torch.dtype, group_size: int, source: TensorSource, part: Slice
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Integers and scales as a quantised checkpoint has them; group_size: k that share one, a multiple of GROUP."""
    values_NK, scales_NG = read_quantized(source, part, dtype, group_size)
    low, high = _LIMITS[dtype]
    in_dim = values_NK.shape[1] * (2 if dtype == INT4 else 1)
    for start, stop in row_blocks(values_NK.shape[0], in_dim):
        block_NK, block_NG = values_NK[start:stop], scales_NG[start:stop]
        if not bool(block_NG.isfinite().all()):
            raise ValueError(
                f"tensor '{part.name}.scales' holds NaN or infinity; quantize or copy the checkpoint again"
            )
        if dtype == INT4:
            block_NK = unpack_int4(block_NK)
        elif block_NK.numel() and int(block_NK.min()) < low:
            raise ValueError(
                f"tensor '{part.name}.weight' has values outside [{low}, {high}]; quantize or copy the checkpoint again"
            )
        yield start, block_NK, block_NG


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
            unit, encode = (fp8.UNIT, _in_blocks) if weights == fp8.FP8 else (1, _plain)
            return WeightFormat(ops, weights, device, unit, encode)
        if stored is None or not is_stored:
            return WeightFormat(ops, weights, device, GROUP, partial(_rounded, weights))
        return WeightFormat(ops, weights, device, GROUP, partial(_stored, weights, stored.group_size))

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


def read_quantized(source: TensorSource, part: Slice, dtype: torch.dtype, group_size: int) -> tuple[Tensor, Tensor]:
    """Integers as stored (int4: two to a byte) and scales, one per GROUP of k. Columns begin at a multiple of GROUP."""
    repeats, per_byte = group_size // GROUP, 2 if dtype == INT4 else 1
    weight, scales = f"{part.name}.weight", f"{part.name}.scales"
    if part.cols is None:
        values_NK = source.read(weight, part.rows)
        scales_NG = source.read(scales, part.rows).repeat_interleave(repeats, dim=1)
        return values_NK, scales_NG[:, : -(-values_NK.shape[1] * per_byte // GROUP)]
    start, stop = part.cols
    assert start % GROUP == 0
    values_NK = source.read(weight, part.rows, (start // per_byte, stop // per_byte))
    first, last = start // group_size, -(-stop // group_size)
    scales_NG = source.read(scales, part.rows, (first, last)).repeat_interleave(repeats, dim=1)
    skipped = start // GROUP - first * repeats
    return values_NK, scales_NG[:, skipped : skipped + -(-(stop - start) // GROUP)]


def pack_int4(values_NK: Tensor) -> Tensor:
    """int8 values within [-8, 7] as uint8 [N, K / 2]: even k in the low half of a byte, odd k in the high half."""
    return ((values_NK[:, ::2] & 15) | (values_NK[:, 1::2] << 4)).view(torch.uint8)


def unpack_int4(bytes_NK: Tensor) -> Tensor:
    """What `pack_int4` packed: int8 [N, K]."""
    signed_NK = bytes_NK.view(torch.int8)
    return torch.stack(((signed_NK << 4) >> 4, signed_NK >> 4), dim=-1).flatten(1)
