"""Quantising a checkpoint: int8 or int4 linear layers with a scale per output row and group of inputs.

Owns the command and rounding to nearest; gptq.py has calibrated rounding. What is stored is model.weights' business.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from checkpoints_convert.convert import Change, Options, Summary, convert, refuse_quantized
from checkpoints_convert.export import Reader
from checkpoints_convert.gptq import CalibratedReader
from checkpoints_convert.texts import read_texts
from megatron_infer.model.checkpoint import Checkpoint
from megatron_infer.model.formats import pack_int4, row_blocks
from megatron_infer.model.formats import quantize as quantize_block
from megatron_infer.model.weights import expected_tensors, stored_dtype
from megatron_infer.ops import INT4
from megatron_infer.quantization import Quantization

Range = tuple[int, int]


def quantize(
    src: str | Path,
    out: str | Path,
    *,
    fmt: str,
    group: int = 32,
    method: str = "rtn",
    calibration: Sequence[str | Path] = (),
    tp: int = 1,
    options: Options | None = None,
) -> Summary:
    """Write `src` (of any kind) as a sharded directory with quantised linear layers, for `tp` ranks.

    Embeddings, norms and biases stay as they are; the head becomes int8 in either format. With "rtn" and groups of 32
    the numbers are those of `EngineConfig(quantization=fmt)`, which rounds while loading.

    Args:
        fmt: "int8" or "int4". group: inputs that share a scale: 32, 64 or 128.
        method: "rtn", or "gptq", which rounds each layer to keep its output on the calibration text.
        calibration: text files, or directories of them; "gptq" only.
    Raises:
        ValueError: `src` is damaged or quantised already, `out` is taken, `tp` divides neither the KV heads nor the
            groups, a tensor has NaN or infinity, there is no calibration text, or the disk is full.
    """
    target = Quantization(fmt, group, method)
    if (method == "gptq") != bool(calibration):
        raise ValueError("calibration text goes with method gptq: name files with --calibration, or use --method rtn")

    def quantized(checkpoint: Checkpoint) -> Change:
        refuse_quantized(checkpoint, "quantized again")
        config = replace(checkpoint.config, quantization=target)
        if method == "gptq":
            return Change(CalibratedReader(checkpoint, target, read_texts(calibration)).read, config)
        return Change(RoundedReader(checkpoint, target).read, config)

    with nullcontext() if method == "gptq" else _one_torch_thread():
        return convert(src, out, "sharded", tp, options or Options(), quantized)


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Rounding is many short ops, and a team of threads waits for its slowest at each, while hashing takes a core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class RoundedReader:
    """Reads a checkpoint as if its linear layers had been stored quantised, rounded to nearest.

    A weight is followed by its scales wherever tensors are written in the network's order; these are kept from the one
    to the other, so that the source is read once.
    """

    def __init__(self, checkpoint: Checkpoint, target: Quantization) -> None:
        self._read: Reader = checkpoint.read
        self._config = replace(checkpoint.config, quantization=target)
        self._group = target.group_size
        self._shapes = expected_tensors(checkpoint.config)
        self._kept: dict[tuple[str, Range], Tensor] = {}

    def read(self, name: str, rows: Range | None = None, cols: Range | None = None) -> Tensor:
        """A slice of a tensor as the quantised checkpoint stores it; `cols` in its own columns."""
        module, _, kind = name.rpartition(".")
        weight = f"{module}.weight"
        stored = stored_dtype(self._config, weight)
        if stored is None or kind == "bias":
            return self._read(name, rows, cols)
        out_dim, in_dim = self._shapes[weight]
        rows = rows or (0, out_dim)
        per_column = self._group if kind == "scales" else 2 if stored == torch.uint8 else 1
        inputs = (0, in_dim) if cols is None else (cols[0] * per_column, min(cols[1] * per_column, in_dim))
        kept = self._kept_scales(module, inputs, out_dim)
        if kind == "scales" and not bool(kept[slice(*rows)].isnan().any()):
            return kept[slice(*rows)]
        values_NK, scales_NG = self._rounded(weight, rows, inputs, INT4 if stored == torch.uint8 else torch.int8)
        kept[slice(*rows)] = scales_NG
        return scales_NG if kind == "scales" else values_NK

    def _kept_scales(self, module: str, inputs: Range, out_dim: int) -> Tensor:
        """Where the scales of a matrix or of some columns of it are kept; NaN: not computed yet."""
        layer = module.rsplit(".", 2)[0]
        if any(not other.startswith(layer) for other, _ in self._kept):
            self._kept.clear()
        if (module, inputs) not in self._kept:
            num_groups = -(-(inputs[1] - inputs[0]) // self._group)
            self._kept[module, inputs] = torch.full((out_dim, num_groups), torch.nan, dtype=torch.bfloat16)
        return self._kept[module, inputs]

    def _rounded(self, weight: str, rows: Range, inputs: Range, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        weight_NK = self._read(weight, rows, inputs)
        blocks = [quantize_block(weight_NK[slice(*b)], dtype, self._group) for b in row_blocks(*weight_NK.shape)]
        values_NK, scales_NG = (torch.cat(parts) for parts in zip(*blocks, strict=True))
        if not bool(scales_NG.isfinite().all()):
            raise ValueError(
                f"tensor {weight!r} holds NaN or infinity, which cannot be quantized; repair the checkpoint"
            )
        return (pack_int4(values_NK) if dtype == INT4 else values_NK), scales_NG
