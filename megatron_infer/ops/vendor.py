"""Every op through torch's own matrix products and attention: fast on a GPU, its bits depend on the batch.

Activations have the weights' dtype on CUDA and are fp32 on the CPU; norms, rotations and softmax work in fp32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_infer.ops import GROUP, QUANTIZED, BatchView, Heads, LayerKV, NormWeight, PackedLinear, Rope
from megatron_infer.ops.fp8 import FP8, quantize_rows, scaled_matmul
from megatron_infer.ops.reference import ReferenceOps


class VendorOps(ReferenceOps):
    """What torch has of its own; what it has not is as defined."""

    def allocate_linear(
        self, out_dim: int, in_dim: int, chunk_bounds: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> PackedLinear:
        """The matrix as it is, [out_dim, in_dim], int4 as int8; the scales of a quantised one, bf16 [out_dim, groups].

        fp8 has one fp32 scale per row.
        """
        is_quantized = dtype in QUANTIZED
        data = torch.empty(out_dim, in_dim, dtype=torch.int8 if is_quantized else dtype, device=device)
        scales = None
        if is_quantized:
            scales = torch.empty(out_dim, -(-in_dim // GROUP), dtype=torch.bfloat16, device=device)
        elif dtype == FP8:
            scales = torch.empty(out_dim, dtype=torch.float32, device=device)
        return PackedLinear(data, out_dim, in_dim, dtype, chunk_bounds, layout=scales)

    def pack_rows(self, packed: PackedLinear, row_start: int, weight_NK: Tensor) -> None:
        """Store rows row_start .. row_start + N; fp8 rounds each with a scale of its own."""
        rows = slice(row_start, row_start + weight_NK.shape[0])
        if packed.dtype == FP8:
            packed.data[rows], packed.layout[rows] = quantize_rows(weight_NK.to(packed.data.device))
        else:
            packed.data[rows] = weight_NK

    def pack_quantized(self, packed: PackedLinear, row_start: int, values_NK: Tensor, scales_NG: Tensor) -> None:
        """Store rows row_start .. row_start + N of a quantised weight."""
        rows = slice(row_start, row_start + values_NK.shape[0])
        packed.data[rows], packed.layout[rows] = values_NK, scales_NG

    def linear(self, x_TK: Tensor, packed: PackedLinear) -> Tensor:
        """x W^T + b in the dtype of x, whole K at once.

        An int8 or int4 weight is expanded anew: saves memory, not time.
        """
        bias_N = None if packed.bias is None else packed.bias.to(x_TK.dtype)
        if packed.dtype == FP8:
            y_TN = scaled_matmul(x_TK, packed.data, packed.layout)
            return y_TN if bias_N is None else y_TN + bias_N
        weight_NK = packed.data.to(x_TK.dtype)
        if packed.dtype in QUANTIZED:
            weight_NK *= packed.layout.to(x_TK.dtype).repeat_interleave(GROUP, dim=1)[:, : packed.in_dim]
        return F.linear(x_TK, weight_NK, bias_N)

    def rms_norm(self, x_TD: Tensor, norm: NormWeight) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * weight, computed in fp32, in the dtype of x."""
        x = x_TD.float()
        y_TD = x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + norm.eps) * norm.weight_D
        return y_TD.to(x_TD.dtype)

    def rope_store_kv(self, qkv_TC: Tensor, rope: Rope, batch: BatchView, kv: LayerKV, heads: Heads) -> Tensor:
        """Rotate q and k in fp32, write k and v into their slots; q in the dtype of qkv."""
        return super().rope_store_kv(qkv_TC, rope, batch, kv, heads).to(qkv_TC.dtype)

    def paged_attention(self, q_TNH: Tensor, batch: BatchView, kv: LayerKV, scale: float) -> Tensor:
        """Gathers the padded pages and calls torch's attention.

        Sequences with as many queries each need no host synchronisation; a mixture goes sequence by sequence.
        """
        num_sequences, block_size = batch.block_tables_SB.shape[0], kv.k.shape[2]

        def pages_of(tables_SB: Tensor) -> tuple[Tensor, Tensor]:
            # The tables' padding may be any number.
            tables = tables_SB.long().clamp(0, kv.k.shape[0] - 1)
            k, v = (cache[tables].transpose(1, 2).flatten(2, 3) for cache in kv)
            return k, v

        if q_TNH.shape[0] == num_sequences * batch.max_query_len:
            q_SNQH = q_TNH.unflatten(0, (num_sequences, batch.max_query_len)).transpose(1, 2)
            o_SNQH = _attend(q_SNQH, pages_of(batch.block_tables_SB), batch.context_lens_S, scale)
            return o_SNQH.transpose(1, 2).flatten(0, 1)
        starts, lengths = batch.query_start_S1.tolist(), batch.context_lens_S.tolist()
        parts = []
        for s, length in enumerate(lengths):
            pages = pages_of(batch.block_tables_SB[s : s + 1, : -(-length // block_size)])
            q_1NQH = q_TNH[starts[s] : starts[s + 1]].transpose(0, 1)[None]
            parts.append(_attend(q_1NQH, pages, batch.context_lens_S[s : s + 1], scale)[0].transpose(0, 1))
        return torch.cat(parts)

    def silu_mul(self, gate_up_T2F: Tensor) -> Tensor:
        """silu(gate) * up."""
        gate_TF, up_TF = gate_up_T2F.chunk(2, dim=1)
        return F.silu(gate_TF) * up_TF

    def gather_rows(self, table_VD: Tensor, ids_T: Tensor) -> Tensor:
        """Rows of the table: fp32 on the CPU, the table's dtype elsewhere."""
        rows_TD = table_VD[ids_T.long()]
        return rows_TD.float() if table_VD.device.type == "cpu" else rows_TD


def _attend(q_SNQH: Tensor, pages: tuple[Tensor, Tensor], context_lens_S: Tensor, scale: float) -> Tensor:
    """The last Q positions of each sequence, o_SNQH. `pages` are k and v as [S, G, P, H], P the padded context."""
    num_positions, num_queries = pages[0].shape[2], q_SNQH.shape[2]
    position_P = torch.arange(num_positions, device=q_SNQH.device)
    first_S1 = (context_lens_S - num_queries)[:, None]
    position_SQ = first_S1 + torch.arange(num_queries, device=q_SNQH.device)
    visible_SQP = position_P <= position_SQ[:, :, None]
    # Unwritten slots may hold NaN, which a weight of zero does not remove.
    written_S1P1 = (position_P < context_lens_S[:, None])[:, None, :, None]
    k, v = (torch.where(written_S1P1, page, 0.0).to(q_SNQH.dtype) for page in pages)
    return F.scaled_dot_product_attention(q_SNQH, k, v, visible_SQP[:, None], scale=scale, enable_gqa=True)
