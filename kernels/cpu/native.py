"""The CPU kernels as ops: checks tensors, makes room for results, and hands addresses to libmegatron_infer_cpu.so.

Contracts are in ops/__init__.py, arithmetic in the headers beside this file. A launch costs a few microseconds and
copies nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_infer.kernels.cpu import abi
from megatron_infer.ops import (
    GROUP,
    INT4,
    QUANTIZED,
    BatchView,
    Heads,
    LayerKV,
    NormWeight,
    Ops,
    PackedLinear,
    Rope,
    Stream,
)

_LANES = 16
_VECTOR_BYTES = 64
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3, INT4: 4}
_CACHE_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_STEP_BYTES = {
    torch.float32: (1, _VECTOR_BYTES),
    torch.bfloat16: (2, _VECTOR_BYTES),
    torch.int8: (GROUP, 32 + 16 * GROUP),
    INT4: (GROUP, 32 + 8 * GROUP),
}
"""A panel's smallest step along K: how many k, and how many bytes; see LinearShape in kernels.h."""


def _fp32(*shape: int) -> Tensor:
    """Room for a result, whatever defaults the program has given torch."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


class _Arena:
    """Room for weights, one behind the other in blocks of huge pages. A weight by itself would have few of them: they
    begin at multiples of 2 MB. What a block has left over is never touched and takes no memory."""

    _BLOCK_BYTES = 256 << 20
    _HUGE_PAGE_BYTES = 2 << 20

    def __init__(self, advise_huge_pages: Callable[[int, int], None]) -> None:
        self._advise_huge_pages = advise_huge_pages
        self._block = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._used = 0

    def take(self, num_bytes: int) -> Tensor:
        """uint8 [num_bytes], 64-byte aligned; its block lives as long as any part of it is in use."""
        if self._used + num_bytes > self._block.numel():
            size = max(num_bytes, self._BLOCK_BYTES)
            block = torch.empty(size + self._HUGE_PAGE_BYTES, dtype=torch.uint8, device="cpu")
            self._block = block[-block.data_ptr() % self._HUGE_PAGE_BYTES :][:size]
            self._advise_huge_pages(self._block.data_ptr(), size)
            self._used = 0
        taken = self._block[self._used : self._used + num_bytes]
        self._used += -(-num_bytes // _VECTOR_BYTES) * _VECTOR_BYTES
        return taken


def _linear(packed: PackedLinear) -> tuple[int, int, int]:
    """Fields of a PackedLinear of kernels.h."""
    bias_N = packed.bias
    return packed.data.data_ptr(), 0 if bias_N is None else bias_N.data_ptr(), packed.layout.address


def _layer_kv(kv: LayerKV, num_heads: int, max_blocks: int) -> tuple[int, ...]:
    """Fields of a LayerKV of kernels.h."""
    k, v = kv
    _, kv_heads, block_size, head_dim = k.shape
    dtype = _CACHE_DTYPES.get(k.dtype)
    if dtype is None:
        raise ValueError(f"the CPU kernels keep the KV cache as bfloat16 or float32, not {k.dtype}")
    if head_dim % 2 or head_dim > 1024 or num_heads % kv_heads:
        raise ValueError(f"{num_heads} heads over {kv_heads} KV heads of dim {head_dim}: not supported")
    return k.data_ptr(), v.data_ptr(), num_heads, kv_heads, head_dim, block_size, dtype, max_blocks


class CpuKernels(Ops):
    """The ops of megatron_infer.ops on one thread pool.

    Args:
        num_threads: the calling thread counts; 1 starts no threads.
        isa: "avx512", "avx2", "neon" or "generic"; "auto" takes the best this CPU has. All give the same bits.

    Raises:
        Unavailable: no library, or the CPU lacks the instruction set.
    """

    def __init__(self, num_threads: int, isa: str = "auto") -> None:
        pool = self._pool = abi.KernelPool(num_threads, isa)
        self.isa, self.num_threads = pool.isa, num_threads
        self._arena = _Arena(pool.advise_huge_pages)
        self._pack_rows, self._pack_quantized = pool.launcher(abi.PACK_ROWS), pool.launcher(abi.PACK_QUANTIZED)
        self._linear, self._paged_attention = pool.launcher(abi.LINEAR), pool.launcher(abi.PAGED_ATTENTION)
        self._rms_norm, self._rope_store_kv = pool.launcher(abi.RMS_NORM), pool.launcher(abi.ROPE_STORE_KV)
        self._silu_mul, self._argmax = pool.launcher(abi.SILU_MUL), pool.launcher(abi.ARGMAX)
        self._gather_rows, self._attention_layer = pool.launcher(abi.GATHER_ROWS), pool.launcher(abi.ATTENTION_LAYER)
        self._feed_forward_layer = pool.launcher(abi.FEED_FORWARD_LAYER)

    def allocate_linear(
        self, out_dim: int, in_dim: int, chunk_bounds: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> PackedLinear:
        """See megatron_infer.ops; panels of 16 columns as kernels.h describes, on huge pages where they fit."""
        if dtype not in _STEP_BYTES:
            raise ValueError(
                f"the CPU kernels hold weights as bfloat16, float32, int8 or int4, not {dtype}; set dtype to bfloat16"
            )
        assert device.type == "cpu"
        step, step_bytes = _STEP_BYTES[dtype]
        assert dtype not in QUANTIZED or not any(bound % GROUP for bound in chunk_bounds[:-1])
        chunk_bytes = [0]
        for begin, end in zip(chunk_bounds, chunk_bounds[1:], strict=False):
            chunk_bytes.append(chunk_bytes[-1] + -(-(end - begin) // step) * step_bytes)
        shape = abi.LinearShape(out_dim, in_dim, chunk_bytes[-1], _DTYPES[dtype], len(chunk_bounds) - 1)
        shape.bounds[: len(chunk_bounds)] = chunk_bounds
        shape.chunk_bytes[: len(chunk_bytes)] = chunk_bytes
        data = self._arena.take(-(-out_dim // _LANES) * chunk_bytes[-1])
        if out_dim % _LANES:
            data[-chunk_bytes[-1] :] = 0  # columns that are multiplied, though never stored
        return PackedLinear(data, out_dim, in_dim, dtype, chunk_bounds, layout=shape)

    def pack_rows(self, packed: PackedLinear, row_start: int, weight_NK: Tensor) -> None:
        """See megatron_infer.ops; reads the rows where they are."""
        num_rows, in_dim = weight_NK.shape
        assert in_dim == packed.in_dim and row_start >= 0 and row_start + num_rows <= packed.out_dim
        if weight_NK.dtype not in _DTYPES:
            weight_NK = weight_NK.float()
        if weight_NK.stride(1) != 1:
            weight_NK = weight_NK.contiguous()
        rows = (packed.data.data_ptr(), packed.layout.address, row_start, num_rows)
        self._pack_rows(*rows, weight_NK.data_ptr(), weight_NK.stride(0), _DTYPES[weight_NK.dtype])

    def pack_quantized(self, packed: PackedLinear, row_start: int, values_NK: Tensor, scales_NG: Tensor) -> None:
        """See megatron_infer.ops."""
        num_rows, in_dim = values_NK.shape
        assert in_dim == packed.in_dim and row_start >= 0 and row_start + num_rows <= packed.out_dim
        assert packed.dtype in QUANTIZED and values_NK.dtype is torch.int8 and scales_NG.dtype is torch.bfloat16
        assert scales_NG.shape == (num_rows, -(-in_dim // GROUP))
        if not values_NK.numel():
            return
        values_NK, scales_NG = (t if t.stride(1) == 1 else t.contiguous() for t in (values_NK, scales_NG))
        rows = (packed.data.data_ptr(), packed.layout.address, row_start, num_rows)
        scales = (scales_NG.data_ptr(), scales_NG.stride(0))
        self._pack_quantized(*rows, values_NK.data_ptr(), values_NK.stride(0), *scales)

    def linear(self, x_TK: Tensor, packed: PackedLinear) -> Tensor:
        """See megatron_infer.ops."""
        num_tokens, in_dim = x_TK.shape
        assert in_dim == packed.in_dim and x_TK.dtype is torch.float32 and x_TK.is_contiguous()
        y_TN = _fp32(num_tokens, packed.out_dim)
        weight, bias = packed.data.data_ptr(), 0 if packed.bias is None else packed.bias.data_ptr()
        self._linear(y_TN.data_ptr(), x_TK.data_ptr(), weight, bias, packed.layout.address, num_tokens)
        return y_TN

    def rms_norm(self, x_TD: Tensor, norm: NormWeight) -> Tensor:
        """See megatron_infer.ops."""
        (num_tokens, dim), (weight_D, eps) = x_TD.shape, norm
        assert x_TD.dtype is torch.float32 is weight_D.dtype and x_TD.is_contiguous() and weight_D.shape[0] == dim
        y_TD = _fp32(num_tokens, dim)
        self._rms_norm(y_TD.data_ptr(), x_TD.data_ptr(), 0, weight_D.data_ptr(), eps, num_tokens, dim)
        return y_TD

    def add_rms_norm(self, x_TD: Tensor, residual_TD: Tensor, norm: NormWeight) -> Tensor:
        """See megatron_infer.ops."""
        (num_tokens, dim), (weight_D, eps) = x_TD.shape, norm
        assert x_TD.dtype is torch.float32 is weight_D.dtype and weight_D.shape[0] == dim
        assert residual_TD.shape == x_TD.shape and x_TD.is_contiguous() and residual_TD.is_contiguous()
        y_TD = _fp32(num_tokens, dim)
        y, x, residual, weight = y_TD.data_ptr(), x_TD.data_ptr(), residual_TD.data_ptr(), weight_D.data_ptr()
        self._rms_norm(y, x, residual, weight, eps, num_tokens, dim)
        return y_TD

    def rope_store_kv(self, qkv_TC: Tensor, rope: Rope, batch: BatchView, kv: LayerKV, heads: Heads) -> Tensor:
        """See megatron_infer.ops."""
        (num_tokens, width), (cos_PH, sin_PH), (num_heads, num_kv_heads, _) = qkv_TC.shape, rope, heads
        cache = _layer_kv(kv, num_heads, 0)
        head_dim = cache[4]
        assert width == (num_heads + 2 * num_kv_heads) * head_dim and qkv_TC.is_contiguous() and kv.k.is_contiguous()
        assert batch.positions_T.dtype is torch.int32 and batch.slots_T.dtype is torch.int64
        assert qkv_TC.dtype is torch.float32 is cos_PH.dtype and cos_PH.is_contiguous() and sin_PH.is_contiguous()
        q_TNH = _fp32(num_tokens, num_heads, head_dim)
        angles = (cos_PH.data_ptr(), sin_PH.data_ptr())
        tokens = (batch.positions_T.data_ptr(), batch.slots_T.data_ptr(), num_tokens)
        self._rope_store_kv(q_TNH.data_ptr(), qkv_TC.data_ptr(), *angles, *cache, *tokens)
        return q_TNH

    def paged_attention(self, q_TNH: Tensor, batch: BatchView, kv: LayerKV, scale: float) -> Tensor:
        """See megatron_infer.ops; the lengths themselves are read, not their maximum."""
        tables_SB, starts_S1, contexts_S = batch.block_tables_SB, batch.query_start_S1, batch.context_lens_S
        num_sequences, max_blocks = tables_SB.shape
        cache = _layer_kv(kv, q_TNH.shape[1], max_blocks)
        assert q_TNH.dtype is torch.float32 and q_TNH.is_contiguous() and kv.k.is_contiguous()
        assert tables_SB.dtype is starts_S1.dtype is contexts_S.dtype is torch.int32
        assert tables_SB.is_contiguous() and kv.v.is_contiguous()
        o_TNH = _fp32(*q_TNH.shape)
        sequences = (tables_SB.data_ptr(), starts_S1.data_ptr(), contexts_S.data_ptr(), num_sequences)
        self._paged_attention(o_TNH.data_ptr(), q_TNH.data_ptr(), *cache, *sequences, scale)
        return o_TNH

    def attention_layer(
        self, stream: Stream, norm: NormWeight, qkv: PackedLinear, out: PackedLinear, rope: Rope, batch: BatchView,
        kv: LayerKV, heads: Heads, completes_sum: bool,
    ) -> None:  # fmt: skip
        """See megatron_infer.ops; the next half's norm adds the product to the residual, at no cost."""
        residual_TD, x_TD, tables_SB = stream.residual_TD, stream.pending_TD, batch.block_tables_SB
        (num_tokens, dim), (num_sequences, max_blocks) = residual_TD.shape, tables_SB.shape
        cache = _layer_kv(kv, heads.num, max_blocks)
        head_dim = cache[4]
        assert residual_TD.dtype is torch.float32 and residual_TD.is_contiguous() and dim == qkv.in_dim
        assert x_TD is None or (
            x_TD.dtype is torch.float32 and x_TD.is_contiguous() and x_TD.shape == residual_TD.shape
        )
        assert qkv.out_dim == (heads.num + 2 * heads.num_kv) * head_dim and out.in_dim == heads.num * head_dim
        y_TD = _fp32(num_tokens, out.out_dim)
        x, residual, weight = 0 if x_TD is None else x_TD.data_ptr(), residual_TD.data_ptr(), norm.weight_D.data_ptr()
        angles = (rope.cos_PH.data_ptr(), rope.sin_PH.data_ptr())
        tokens = (batch.positions_T.data_ptr(), batch.slots_T.data_ptr(), num_tokens)
        starts, contexts = batch.query_start_S1.data_ptr(), batch.context_lens_S.data_ptr()
        self._attention_layer(
            y_TD.data_ptr(), x, residual, weight, norm.eps, *_linear(qkv), *_linear(out), *angles, *cache, *tokens,
            tables_SB.data_ptr(), starts, contexts, num_sequences, heads.scale,
        )  # fmt: skip
        stream.pending_TD = y_TD

    def feed_forward_layer(
        self, stream: Stream, norm: NormWeight, gate_up: PackedLinear, down: PackedLinear, completes_sum: bool
    ) -> None:
        """See megatron_infer.ops; attention always leaves something pending."""
        residual_TD, x_TD = stream.residual_TD, stream.pending_TD
        assert x_TD is not None
        num_tokens, dim = x_TD.shape
        assert x_TD.dtype is torch.float32 is residual_TD.dtype and residual_TD.shape == x_TD.shape
        assert x_TD.is_contiguous() and residual_TD.is_contiguous() and dim == gate_up.in_dim
        assert gate_up.out_dim == 2 * down.in_dim
        y_TD = _fp32(num_tokens, down.out_dim)
        y, x, residual, weight = y_TD.data_ptr(), x_TD.data_ptr(), residual_TD.data_ptr(), norm.weight_D.data_ptr()
        self._feed_forward_layer(y, x, residual, weight, norm.eps, *_linear(gate_up), *_linear(down), num_tokens)
        stream.pending_TD = y_TD

    def silu_mul(self, gate_up_T2F: Tensor) -> Tensor:
        """See megatron_infer.ops."""
        num_tokens, width = gate_up_T2F.shape
        assert gate_up_T2F.dtype is torch.float32 and gate_up_T2F.is_contiguous() and width % 2 == 0
        y_TF = _fp32(num_tokens, width // 2)
        self._silu_mul(y_TF.data_ptr(), gate_up_T2F.data_ptr(), num_tokens, width // 2)
        return y_TF

    def argmax(self, logits_SV: Tensor) -> tuple[Tensor, Tensor]:
        """See megatron_infer.ops."""
        num_rows, width = logits_SV.shape
        assert logits_SV.dtype is torch.float32 and logits_SV.is_contiguous() and width < 1 << 24
        values_S, indices_S = _fp32(num_rows), torch.empty(num_rows, dtype=torch.int64, device="cpu")
        values, indices = values_S.data_ptr(), indices_S.data_ptr()
        self._argmax(values, indices, logits_SV.data_ptr(), num_rows, width)
        return values_S, indices_S

    def gather_rows(self, table_VD: Tensor, ids_T: Tensor) -> Tensor:
        """See megatron_infer.ops; ids are int32 or int64 and must be rows of the table."""
        num_ids, dim = ids_T.shape[0], table_VD.shape[1]
        assert table_VD.is_contiguous() and ids_T.is_contiguous() and ids_T.dtype in (torch.int32, torch.int64)
        y_TD = _fp32(num_ids, dim)
        table, dtype, wide = table_VD.data_ptr(), _DTYPES[table_VD.dtype], ids_T.dtype is torch.int64
        self._gather_rows(y_TD.data_ptr(), table, ids_T.data_ptr(), dtype, wide, num_ids, dim)
        return y_TD
