"""Every op in plain torch: its definition, on any device.

Obeys the numerics contract by using only operations that round each element by itself (+, -, *, /, sqrt) in a fixed
order; torch.matmul, sum and exp are avoided because their bits may change with the shape. Products and sums are rounded
separately here and fused in the kernels, so the two agree closely, not bitwise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_infer.ops import GROUP, INT4, QUANTIZED, BatchView, Heads, LayerKV, NormWeight, Ops, PackedLinear, Rope

KV_SPLIT = 256
_LANES = 16
_LIMITS = {torch.int8: 2047.0, INT4: 127.0}
"""Largest magnitude of a quantised activation beside weights of that type."""


class ReferenceOps(Ops):
    """The definitions."""

    def allocate_linear(
        self, out_dim: int, in_dim: int, chunk_bounds: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> PackedLinear:
        """The transposed matrix, [in_dim, out_dim], int4 as int8; scales of a quantised one, fp32 [groups, out_dim]."""
        if dtype.itemsize == 1 and dtype.is_floating_point:
            raise ValueError("the reference ops hold no fp8 weights; use quantization='int8'")
        is_quantized = dtype in QUANTIZED
        data = torch.empty(in_dim, out_dim, dtype=torch.int8 if is_quantized else dtype, device=device)
        scales_GN = None
        if is_quantized:
            scales_GN = torch.empty(-(-in_dim // GROUP), out_dim, dtype=torch.float32, device=device)
        return PackedLinear(data, out_dim, in_dim, dtype, chunk_bounds, layout=scales_GN)

    def pack_rows(self, packed: PackedLinear, row_start: int, weight_NK: Tensor) -> None:
        """Store rows row_start .. row_start + N."""
        packed.data[:, row_start : row_start + weight_NK.shape[0]] = weight_NK.T

    def pack_quantized(self, packed: PackedLinear, row_start: int, values_NK: Tensor, scales_NG: Tensor) -> None:
        """Store rows row_start .. row_start + N of a quantised weight."""
        rows = slice(row_start, row_start + values_NK.shape[0])
        packed.data[:, rows] = values_NK.T
        packed.layout[:, rows] = scales_NG.T

    def linear(self, x_TK: Tensor, packed: PackedLinear) -> Tensor:
        """The sums of the chunks, added in a binary tree; the bias last."""
        sums_of = _quantized_sums if packed.dtype in QUANTIZED else _plain_sums
        y_TN = _tree(sums_of(x_TK.float(), packed))
        return y_TN if packed.bias is None else y_TN + packed.bias

    def rms_norm(self, x_TD: Tensor, norm: NormWeight) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * weight."""
        x_TD = x_TD.float()
        mean_T1 = _sum_lanes(x_TD * x_TD, 4 * _LANES) / x_TD.shape[1]
        return x_TD * (1.0 / torch.sqrt(mean_T1 + norm.eps)) * norm.weight_D

    def add_rms_norm(self, x_TD: Tensor, residual_TD: Tensor, norm: NormWeight) -> Tensor:
        """Adds x to the residual in place and returns the norm of the sum."""
        residual_TD += x_TD
        return self.rms_norm(residual_TD, norm)

    def rope_store_kv(self, qkv_TC: Tensor, rope: Rope, batch: BatchView, kv: LayerKV, heads: Heads) -> Tensor:
        """Rotate q and k, write k and v into their slots."""
        block_size, head_dim = kv.k.shape[2:]
        heads_TNH = qkv_TC.float().reshape(qkv_TC.shape[0], -1, head_dim)
        q_TNH, k_TGH, v_TGH = heads_TNH.split([heads.num, heads.num_kv, heads.num_kv], dim=1)
        cos_T1H, sin_T1H = (table_PH[batch.positions_T.long(), None] for table_PH in rope)
        blocks_T, offsets_T = batch.slots_T // block_size, batch.slots_T % block_size
        kv.k[blocks_T, :, offsets_T] = _rotate(k_TGH, cos_T1H, sin_T1H).to(kv.k.dtype)
        kv.v[blocks_T, :, offsets_T] = v_TGH.to(kv.v.dtype)
        return _rotate(q_TNH, cos_T1H, sin_T1H)

    def paged_attention(self, q_TNH: Tensor, batch: BatchView, kv: LayerKV, scale: float) -> Tensor:
        """Sequence by sequence: gather its pages, then attend."""
        block_size, group = kv.k.shape[2], q_TNH.shape[1] // kv.k.shape[1]
        starts = batch.query_start_S1.tolist()
        o_TNH = torch.empty_like(q_TNH, dtype=torch.float32)
        for s, num_positions in enumerate(batch.context_lens_S.tolist()):
            table = batch.block_tables_SB[s, : -(-num_positions // block_size)].long()
            pages = [cache[table].transpose(1, 2).flatten(0, 1)[:num_positions] for cache in kv]
            k_PNH, v_PNH = (page.float().repeat_interleave(group, dim=1) for page in pages)
            rows = slice(starts[s], starts[s + 1])
            o_TNH[rows] = _attend(q_TNH[rows].float(), k_PNH, v_PNH, scale)
        return o_TNH

    def silu_mul(self, gate_up_T2F: Tensor) -> Tensor:
        """gate / (1 + e^-gate) * up."""
        gate_TF, up_TF = gate_up_T2F.float().chunk(2, dim=1)
        return gate_TF / (1.0 + _exp(-gate_TF)) * up_TF

    def argmax(self, logits_SV: Tensor) -> tuple[Tensor, Tensor]:
        """The largest value and its lowest index; value NaN and index 0 for a row with NaN or Inf."""
        num_rows, width = logits_SV.shape
        if width == 0:
            return logits_SV.new_full((num_rows,), float("-inf")), logits_SV.new_zeros(num_rows, dtype=torch.int64)
        non_finite_S = ~torch.isfinite(logits_SV).all(dim=1)
        values_S = logits_SV.float().amax(dim=1).masked_fill(non_finite_S, float("nan"))
        columns_V = torch.arange(width, device=logits_SV.device)
        indices_S = torch.where(logits_SV == values_S[:, None], columns_V, width).amin(dim=1)
        return values_S, indices_S.masked_fill(non_finite_S, 0)

    def gather_rows(self, table_VD: Tensor, ids_T: Tensor) -> Tensor:
        """Rows of the table as fp32."""
        return table_VD[ids_T.long()].float()


def _tree(parts: list[Tensor]) -> Tensor:
    """((p0 + p1) + (p2 + p3)) + ... of a power of two of terms."""
    while len(parts) > 1:
        parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def _plain_sums(x_TK: Tensor, packed: PackedLinear) -> list[Tensor]:
    """Per chunk; step i adds the product of every chunk's i-th k."""
    bounds = packed.chunk_bounds
    lengths = [end - begin for begin, end in zip(bounds, bounds[1:], strict=False)]
    sums_TCN = torch.zeros(x_TK.shape[0], len(lengths), packed.out_dim, dtype=torch.float32, device=x_TK.device)
    starts_C = torch.tensor(bounds[:-1], device=x_TK.device)
    longer_C = torch.tensor(lengths, device=x_TK.device)
    for i in range(max(lengths)):
        if i < min(lengths):
            k_C = starts_C + i
            sums_TCN += x_TK[:, k_C, None] * packed.data[k_C].float()
        else:
            active = (longer_C > i).nonzero()[:, 0]
            k_C = starts_C[active] + i
            sums_TCN[:, active] += x_TK[:, k_C, None] * packed.data[k_C].float()
    return list(sums_TCN.unbind(1))


def _quantized_sums(x_TK: Tensor, packed: PackedLinear) -> list[Tensor]:
    """Per chunk; each group adds float(dot) * (weight scale * row scale)."""
    limit, bounds = _LIMITS[packed.dtype], packed.chunk_bounds
    x_TGK = torch.nn.functional.pad(x_TK, (0, -x_TK.shape[1] % GROUP)).reshape(x_TK.shape[0], -1, GROUP)
    size_TG = x_TGK.abs().amax(dim=2)
    inverse_TG = torch.where(size_TG > 1e-30, limit / size_TG, 0.0)
    values_TK = torch.round(x_TGK * inverse_TG[..., None]).reshape(x_TK.shape[0], -1)
    scale_TG = size_TG / limit + (x_TGK * 0.0).amax(dim=2)  # NaN where the group has NaN or infinity
    sums = []
    for begin, end in zip(bounds, bounds[1:], strict=False):
        total_TN = torch.zeros(x_TK.shape[0], packed.out_dim, dtype=torch.float32, device=x_TK.device)
        for k in range(begin, end, GROUP):
            group, span = k // GROUP, slice(k, min(k + GROUP, end))
            # A matrix product, but of integers whose sums stay below 2^24: exact in any order.
            dot_TN = values_TK[:, span] @ packed.data[span].float()
            total_TN = total_TN + dot_TN * (packed.layout[group] * scale_TG[:, group, None])
        sums.append(total_TN)
    return sums


def _sum_lanes(x: Tensor, lanes: int) -> Tensor:
    """Sum over the last dim: lane by lane over ascending vectors of `lanes`, then by halving the 16 lanes."""
    missing = -x.shape[-1] % lanes
    vectors = torch.nn.functional.pad(x, (0, missing)).reshape(*x.shape[:-1], -1, lanes).unbind(-2)
    total = torch.zeros_like(vectors[0])
    for vector in vectors:
        total = total + vector
    if lanes > _LANES:
        total = _tree(list(total.reshape(*x.shape[:-1], -1, _LANES).unbind(-2)))
    while total.shape[-1] > 1:
        half = total.shape[-1] // 2
        total = total[..., :half] + total[..., half:]
    return total


def _rotate(x_TNH: Tensor, cos_T1H: Tensor, sin_T1H: Tensor) -> Tensor:
    low, high = x_TNH.chunk(2, dim=-1)
    return torch.cat([low * cos_T1H - high * sin_T1H, high * cos_T1H + low * sin_T1H], dim=-1)


def _exp(x: Tensor) -> Tensor:
    """e^x as the kernels compute it: 2^n (1 + r + r^2 P(r)), x clamped to [-87.3, 88] and 0 below."""
    y = torch.where(x > 88.0, 88.0, torch.where(x < -87.3, -87.3, x))
    n = torch.round(y * 1.4426950408889634)
    r = (y - n * 0.693145751953125) - n * 1.428606765330187e-06
    p = ((0.0013934545 * r + 0.008363777) * r + 0.041666456) * r
    p = (p + 0.16666573) * r + 0.5
    power = ((torch.nan_to_num(n).to(torch.int32) + 127) << 23).view(torch.float32)
    return torch.where(x < -87.3, 0.0, (p * (r * r) + r + 1.0) * power)


def _split(
    q_QNH: Tensor, k_JNH: Tensor, v_JNH: Tensor, hidden_QJ: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One KV split: row maxima [Q, N], sums of exp [Q, N], unnormalised outputs [Q, N, H]."""
    scores_QNJ = torch.zeros(*q_QNH.shape[:2], k_JNH.shape[0], dtype=torch.float32, device=q_QNH.device)
    for h in range(q_QNH.shape[2]):
        scores_QNJ += q_QNH[:, :, h, None] * k_JNH[:, :, h].T
    scores_QNJ = (scores_QNJ * scale).masked_fill(hidden_QJ[:, None], float("-inf"))
    max_QN = scores_QNJ.amax(dim=-1)
    p_QNJ = _exp(scores_QNJ - max_QN[..., None]).masked_fill(hidden_QJ[:, None], 0.0)
    o_QNH = torch.zeros_like(q_QNH)
    for j in range(k_JNH.shape[0]):
        o_QNH += (p_QNJ[:, :, j, None] * v_JNH[j]).masked_fill(hidden_QJ[:, j, None, None], 0.0)
    return max_QN, _sum_lanes(p_QNJ, _LANES)[..., 0], o_QNH


def _attend(q_QNH: Tensor, k_PNH: Tensor, v_PNH: Tensor, scale: float) -> Tensor:
    """Causal attention of the last Q of P positions, split by split."""
    num_positions = k_PNH.shape[0]
    position_Q = torch.arange(num_positions - q_QNH.shape[0], num_positions, device=q_QNH.device)
    max_QN = torch.full(q_QNH.shape[:2], float("-inf"), dtype=torch.float32, device=q_QNH.device)
    sum_QN, o_QNH = torch.zeros_like(max_QN), torch.zeros_like(q_QNH)
    for start in range(0, num_positions, KV_SPLIT):
        span = slice(start, min(start + KV_SPLIT, num_positions))
        seen = position_Q >= start
        hidden_QJ = torch.arange(span.start, span.stop, device=q_QNH.device) > position_Q[seen, None]
        split_max, split_sum, split_o = _split(q_QNH[seen], k_PNH[span], v_PNH[span], hidden_QJ, scale)
        if start:
            top = torch.where(split_max > max_QN[seen], split_max, max_QN[seen])
            old, new = _exp(max_QN[seen] - top), _exp(split_max - top)
            split_sum = split_sum * new + sum_QN[seen] * old
            split_o = split_o * new[..., None] + o_QNH[seen] * old[..., None]
            split_max = top
        max_QN[seen], sum_QN[seen], o_QNH[seen] = split_max, split_sum, split_o
    return o_QNH / sum_QN[..., None]
