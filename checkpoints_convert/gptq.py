"""Calibrated rounding of a checkpoint's linear layers: GPTQ (Frantar et al. 2022, arXiv 2210.17323).

Owns the rounding of one matrix, and the walk over the network that collects what each layer's inputs are. One decoder
layer is in memory, with its Hessians and the calibration text's residual streams.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from checkpoints_convert.network import CPU, LayerwiseNetwork, float_dtype
from checkpoints_convert.texts import WINDOW_TOKENS, Text, windows
from megatron_infer.dispatch.select import select_ops
from megatron_infer.model.checkpoint import Checkpoint
from megatron_infer.model.formats import group_scales, pack_int4, round_to_steps
from megatron_infer.model.weights import expected_tensors, stored_dtype
from megatron_infer.ops import INT4, Ops, PackedLinear, SingleOps, Stream
from megatron_infer.quantization import Quantization
from megatron_infer.text.tokenizer import load_tokenizer

_NUM_WINDOWS = 64
_DAMPING = 0.01
_COLUMNS = 128
"""Columns whose errors are fed to the columns behind them in one product; a multiple of every group size."""
_INPUTS = {
    "wq": "attention.qkv",
    "wk": "attention.qkv",
    "wv": "attention.qkv",
    "wo": "attention.out",
    "w1": "feed_forward.gate_up",
    "w3": "feed_forward.gate_up",
    "w2": "feed_forward.down",
    "output": "head",
}
"""Linear layer -> the packed matrix that it is a part of in the network, whose inputs are its own."""

Range = tuple[int, int]


def gptq(weight_NK: Tensor, inverse_KK: Tensor, dtype: torch.dtype, group_size: int = 32) -> tuple[Tensor, Tensor]:
    """Round a weight column by column, each column's error made up for by the columns behind it.

    Args:
        weight_NK: [N, K], floating. dtype: torch.int8 or INT4.
        inverse_KK: what `inverse_factor` makes of the layer's inputs.
    Returns:
        As model.formats.quantize: int8 values_NK and bf16 scales_NG.
    """
    w_KN = weight_NK.float().T.contiguous()
    in_dim, num_rows = w_KN.shape
    values_KN = torch.empty(in_dim, num_rows, dtype=torch.int8)
    scales_GN = torch.empty(-(-in_dim // group_size), num_rows, dtype=torch.bfloat16)
    for start in range(0, in_dim, _COLUMNS):
        stop = min(start + _COLUMNS, in_dim)
        errors_BN = torch.empty(stop - start, num_rows)
        for k in range(start, stop):
            group = k // group_size
            if k % group_size == 0:
                scales_GN[group] = group_scales(w_KN[k : k + group_size].T, dtype)
            steps_N = scales_GN[group].float()
            rounded_N = round_to_steps(w_KN[k], steps_N, dtype)
            values_KN[k] = rounded_N.to(torch.int8)
            error_N = (w_KN[k] - rounded_N * steps_N) / inverse_KK[k, k]
            w_KN[k:stop].addr_(inverse_KK[k, k:stop], error_N, alpha=-1)
            errors_BN[k - start] = error_N
        w_KN[stop:].addmm_(inverse_KK[start:stop, stop:].T, errors_BN, alpha=-1)
    return values_KN.T.contiguous(), scales_GN.T.contiguous()


def inverse_factor(hessian_KK: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped sum of x x^T over a layer's inputs x.

    Overwrites its argument.

    Raises:
        ValueError: the inputs hold NaN or infinity.
    """
    diagonal_K = hessian_KK.diagonal()
    if not bool(diagonal_K.isfinite().all()):
        raise ValueError("the network gives NaN or infinity on the calibration text; repair the checkpoint")
    diagonal_K[diagonal_K == 0] = 1.0
    diagonal_K += _DAMPING * diagonal_K.mean()
    lower_KK = torch.linalg.cholesky(hessian_KK)
    upper_KK: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(lower_KK), upper=True)
    return upper_KK


class _WatchedOps(SingleOps):
    """Shows the name and the inputs of every linear layer."""

    def __init__(self, ops: Ops, watch: Callable[[str, Tensor], None]) -> None:
        super().__init__(ops)
        self._watch = watch

    def linear(self, x_TK: Tensor, packed: PackedLinear) -> Tensor:
        self._watch(packed.name, x_TK)
        return self.ops.linear(x_TK, packed)


class CalibratedReader:
    """Reads a checkpoint as if its linear layers had been stored quantised, each rounded for its inputs.

    Layers are quantised when they are first asked for; a layer's inputs are those behind the already quantised ones.
    """

    def __init__(self, checkpoint: Checkpoint, target: Quantization, texts: Sequence[Text]) -> None:
        self._checkpoint, self._group = checkpoint, target.group_size
        self._config = replace(checkpoint.config, quantization=target)
        self._shapes = expected_tensors(self._config)
        self._sequences = windows(
            texts, load_tokenizer(checkpoint.model_dir, checkpoint.config.vocab_size), _NUM_WINDOWS
        )
        self._hessians: dict[str, Tensor] = {}
        ops = select_ops(CPU, num_threads=torch.get_num_threads())
        dtype = float_dtype(checkpoint)
        watched = _WatchedOps(ops, self._watch)
        self._plain = LayerwiseNetwork(checkpoint, checkpoint.config, dtype, watched, WINDOW_TOKENS)
        self._quantized = LayerwiseNetwork(self, self._config, dtype, ops, WINDOW_TOKENS)
        self._start()

    def read(self, name: str, rows: Range | None = None, cols: Range | None = None) -> Tensor:
        """A slice of a tensor as the quantised checkpoint stores it; `cols` in its own columns."""
        if stored_dtype(self._config, name) is None:
            return self._checkpoint.read(name, rows, cols)
        wanted = self._config.num_hidden_layers if name.startswith("output.") else int(name.split(".")[1])
        if wanted < self._layer:
            self._start()
        while self._layer < wanted:
            self._quantize_next_layer()
        tensor = self._tensors[name]
        tensor = tensor if rows is None else tensor[slice(*rows)]
        return tensor if cols is None else tensor[:, slice(*cols)].contiguous()

    def _start(self) -> None:
        self._layer = -1
        self._tensors: dict[str, Tensor] = {}
        self._residuals = self._plain.embed(self._sequences)

    @torch.no_grad()
    def _quantize_next_layer(self) -> None:
        self._layer += 1
        self._tensors.clear()
        if self._layer == self._config.num_hidden_layers:
            norm = self._plain.norm()
            for residual_TD in self._residuals:
                self._watch("head", norm(Stream(residual_TD)))
            self._round("output")
            return
        block = self._plain.block(self._layer)
        for residual_TD in self._residuals:
            self._plain.run(block, residual_TD)
        del block
        self._round(f"layers.{self._layer}.")
        block = self._quantized.block(self._layer)
        for i, residual_TD in enumerate(self._residuals):
            self._residuals[i] = self._quantized.run(block, residual_TD)

    def _round(self, prefix: str) -> None:
        """Quantise every linear layer whose name starts with `prefix` and let go of the Hessians."""
        names = [name for name in self._shapes if name.startswith(prefix) and name.endswith(".scales")]
        for label, hessian_KK in self._hessians.items():
            inverse_KK = inverse_factor(hessian_KK)
            for module in (name.removesuffix(".scales") for name in names):
                if _INPUTS[module.rpartition(".")[2]] != label:
                    continue
                weight = f"{module}.weight"
                dtype = INT4 if stored_dtype(self._config, weight) == torch.uint8 else torch.int8
                values_NK, scales_NG = gptq(self._checkpoint.read(weight), inverse_KK, dtype, self._group)
                if not bool(scales_NG.isfinite().all()):
                    raise ValueError(f"tensor {weight!r} holds NaN or infinity; repair the checkpoint")
                self._tensors[weight] = pack_int4(values_NK) if dtype == INT4 else values_NK
                self._tensors[f"{module}.scales"] = scales_NG
        self._hessians.clear()

    def _watch(self, label: str, x_TK: Tensor) -> None:
        if label not in self._hessians:
            self._hessians[label] = torch.zeros(x_TK.shape[1], x_TK.shape[1])
        self._hessians[label].addmm_(x_TK.T, x_TK)
