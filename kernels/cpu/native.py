"""Launches the CPU kernels of libmegatron_infer_cpu.so through ctypes, which releases the GIL meanwhile.

Owns the library's signatures and a thread pool's lifetime; contracts are in ops/__init__.py, arithmetic in the headers
beside this file. A launch costs a few microseconds and copies nothing.
"""

from __future__ import annotations

import ctypes
import weakref
from ctypes import c_float, c_int, c_int32, c_int64, c_size_t, c_void_p
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

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

LIBRARY = Path(__file__).with_name("libmegatron_infer_cpu.so")
_ABI = 3
_LANES = 16
_VECTOR_BYTES = 64
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3, INT4: 4}
_STEP_BYTES = {
    torch.float32: (1, _VECTOR_BYTES),
    torch.bfloat16: (2, _VECTOR_BYTES),
    torch.int8: (GROUP, 32 + 16 * GROUP),
    INT4: (GROUP, 32 + 8 * GROUP),
}
"""A panel's smallest step along K: how many k, and how many bytes; see LinearShape in kernels.h."""
_SIGNATURES: dict[str, list[type]] = {
    "mi_linear": [c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_void_p],
    "mi_pack_rows": [c_void_p, c_void_p, c_void_p, c_int64, c_int, c_int64, c_int64, c_void_p],
    "mi_pack_quantized": [*[c_void_p] * 3, c_int64, c_void_p, c_int64, c_int64, c_int64, c_void_p],
    "mi_paged_attention": [*[c_void_p] * 8, c_int64, c_void_p, c_float],
    "mi_rms_norm": [c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_float],
    "mi_rope_store_kv": [*[c_void_p] * 9, c_int64, c_void_p],
    "mi_silu_mul": [c_void_p, c_void_p, c_void_p, c_int64, c_int64],
    "mi_argmax": [c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int64],
    "mi_attention_layer": [*[c_void_p] * 5, c_float, *[c_void_p] * 11, c_int64, c_int64, c_void_p, c_float],
    "mi_feed_forward_layer": [*[c_void_p] * 5, c_float, c_void_p, c_void_p, c_int64],
    "mi_gather_rows": [c_void_p, c_void_p, c_void_p, c_int, c_void_p, c_int, c_int64, c_int64],
}


class Unavailable(Exception):
    """The kernels cannot be used here; says why and what to do."""


class LinearShape(ctypes.Structure):
    """kernels.h: LinearShape."""

    _fields_ = [
        ("out_dim", c_int64),
        ("in_dim", c_int64),
        ("panel_bytes", c_int64),
        ("dtype", c_int32),
        ("num_chunks", c_int32),
        ("bounds", c_int32 * 9),
        ("chunk_bytes", c_int32 * 9),
    ]


class LayerLinear(ctypes.Structure):
    """kernels.h: LayerLinear."""

    _fields_ = [("weight", c_void_p), ("bias_N", c_void_p), ("shape", c_void_p)]


@dataclass
class Layout:
    """What a PackedLinear of these kernels carries: its shape, and itself as an argument of a whole layer."""

    shape: LinearShape
    shape_address: int
    argument: LayerLinear | None = None
    argument_address: int = 0


class AttentionShape(ctypes.Structure):
    """kernels.h: AttentionShape."""

    _fields_ = [
        ("num_heads", c_int32),
        ("num_kv_heads", c_int32),
        ("head_dim", c_int32),
        ("block_size", c_int32),
        ("dtype", c_int32),
        ("max_blocks", c_int32),
    ]


def load_library() -> ctypes.CDLL:
    """The kernels with their signatures set. Raises Unavailable."""
    if not LIBRARY.exists():
        raise Unavailable(f"{LIBRARY} is missing; with g++ or clang++ installed, run `pip install -e .` to build it")
    try:
        library = ctypes.CDLL(str(LIBRARY))
        if library.mi_abi() != _ABI:
            raise OSError(f"it was built from other sources: {library.mi_abi()}, not {_ABI}")
        library.mi_pool_create.argtypes = [c_int, ctypes.c_char_p]
        library.mi_pool_create.restype = c_void_p
        library.mi_pool_destroy.argtypes = [c_void_p]
        library.mi_pool_destroy.restype = None
        library.mi_pool_variant.argtypes = [c_void_p]
        library.mi_pool_variant.restype = ctypes.c_char_p
        library.mi_advise_huge_pages.argtypes = [c_void_p, c_size_t]
        library.mi_advise_huge_pages.restype = None
        for name, argtypes in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = argtypes, c_int
    except (OSError, AttributeError) as error:
        raise Unavailable(f"{LIBRARY} does not load ({error}); run `pip install -e .` to build it again") from error
    return library


def _fp32(*shape: int) -> Tensor:
    """Room for a result, whatever defaults the program has given torch."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def _check(status: int) -> None:
    if status:
        raise MemoryError("no memory left for the scratch space of a CPU kernel; lower max_num_batched_tokens")


class _Arena:
    """Room for weights, one behind the other in blocks of huge pages. A weight by itself would have few of them: they
    begin at multiples of 2 MB. What a block has left over is never touched and takes no memory."""

    _BLOCK_BYTES = 256 << 20
    _HUGE_PAGE_BYTES = 2 << 20

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._block = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._used = 0

    def take(self, num_bytes: int) -> Tensor:
        """uint8 [num_bytes], 64-byte aligned; its block lives as long as any part of it is in use."""
        if self._used + num_bytes > self._block.numel():
            size = max(num_bytes, self._BLOCK_BYTES)
            block = torch.empty(size + self._HUGE_PAGE_BYTES, dtype=torch.uint8, device="cpu")
            self._block = block[-block.data_ptr() % self._HUGE_PAGE_BYTES :][:size]
            self._library.mi_advise_huge_pages(self._block.data_ptr(), size)
            self._used = 0
        taken = self._block[self._used : self._used + num_bytes]
        self._used += -(-num_bytes // _VECTOR_BYTES) * _VECTOR_BYTES
        return taken


def _layer_linear(packed: PackedLinear) -> int:
    """Address of the weight as an argument of a whole layer, made anew when it or its bias has moved."""
    layout: Layout = packed.layout
    weight, bias = packed.data.data_ptr(), packed.bias
    known = layout.argument
    bias_address = None if bias is None else bias.data_ptr()
    if known is None or known.weight != weight or known.bias_N != bias_address:
        known = layout.argument = LayerLinear(weight, bias_address, layout.shape_address)
        layout.argument_address = ctypes.addressof(known)
    return layout.argument_address


class CpuKernels(Ops):
    """The ops of megatron_infer.ops on one thread pool.

    Args:
        num_threads: the calling thread counts; 1 starts no threads.
        isa: "avx512", "avx2", "neon" or "generic"; "auto" takes the best this CPU has. All give the same bits.

    Raises:
        Unavailable: no library, or the CPU lacks the instruction set.
    """

    def __init__(self, num_threads: int, isa: str = "auto") -> None:
        library = load_library()
        handle = library.mi_pool_create(num_threads, b"" if isa == "auto" else isa.encode())
        if not handle:
            raise Unavailable(f"this CPU lacks {isa}, or {num_threads} threads are too many")
        self._library, self._pool = library, handle
        self.isa: str = library.mi_pool_variant(handle).decode()
        self.num_threads = num_threads
        self._arena = _Arena(library)
        self._attention_shapes: dict[tuple[object, ...], tuple[int, AttentionShape]] = {}
        self._linear, self._pack_rows = library.mi_linear, library.mi_pack_rows
        self._rms_norm, self._silu_mul = library.mi_rms_norm, library.mi_silu_mul
        self._rope, self._attention = library.mi_rope_store_kv, library.mi_paged_attention
        self._attention_layer, self._feed_forward_layer = library.mi_attention_layer, library.mi_feed_forward_layer
        weakref.finalize(self, library.mi_pool_destroy, handle)

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
        shape = LinearShape(out_dim, in_dim, chunk_bytes[-1], _DTYPES[dtype], len(chunk_bounds) - 1)
        shape.bounds[: len(chunk_bounds)] = chunk_bounds
        shape.chunk_bytes[: len(chunk_bytes)] = chunk_bytes
        data = self._arena.take(-(-out_dim // _LANES) * chunk_bytes[-1])
        if out_dim % _LANES:
            data[-chunk_bytes[-1] :] = 0  # columns that are multiplied, though never stored
        return PackedLinear(data, out_dim, in_dim, dtype, chunk_bounds, layout=Layout(shape, ctypes.addressof(shape)))

    def pack_rows(self, packed: PackedLinear, row_start: int, weight_NK: Tensor) -> None:
        """See megatron_infer.ops; reads the rows where they are."""
        num_rows, in_dim = weight_NK.shape
        assert in_dim == packed.in_dim and row_start >= 0 and row_start + num_rows <= packed.out_dim
        if weight_NK.dtype not in _DTYPES:
            weight_NK = weight_NK.float()
        if weight_NK.stride(1) != 1:
            weight_NK = weight_NK.contiguous()
        status = self._pack_rows(
            self._pool,
            packed.data.data_ptr(),
            weight_NK.data_ptr(),
            weight_NK.stride(0),
            _DTYPES[weight_NK.dtype],
            row_start,
            num_rows,
            packed.layout.shape_address,
        )
        _check(status)

    def pack_quantized(self, packed: PackedLinear, row_start: int, values_NK: Tensor, scales_NG: Tensor) -> None:
        """See megatron_infer.ops."""
        num_rows, in_dim = values_NK.shape
        assert in_dim == packed.in_dim and row_start >= 0 and row_start + num_rows <= packed.out_dim
        assert packed.dtype in QUANTIZED and values_NK.dtype is torch.int8 and scales_NG.dtype is torch.bfloat16
        assert scales_NG.shape == (num_rows, -(-in_dim // GROUP))
        if not values_NK.numel():
            return
        values_NK, scales_NG = (t if t.stride(1) == 1 else t.contiguous() for t in (values_NK, scales_NG))
        status = self._library.mi_pack_quantized(
            self._pool,
            packed.data.data_ptr(),
            values_NK.data_ptr(),
            values_NK.stride(0),
            scales_NG.data_ptr(),
            scales_NG.stride(0),
            row_start,
            num_rows,
            packed.layout.shape_address,
        )
        _check(status)

    def linear(self, x_TK: Tensor, packed: PackedLinear) -> Tensor:
        """See megatron_infer.ops."""
        num_tokens, in_dim = x_TK.shape
        assert in_dim == packed.in_dim and x_TK.dtype is torch.float32 and x_TK.is_contiguous()
        y_TN = _fp32(num_tokens, packed.out_dim)
        bias_N = packed.bias
        bias = None if bias_N is None else bias_N.data_ptr()
        data = packed.data.data_ptr()
        if self._linear(
            self._pool, y_TN.data_ptr(), x_TK.data_ptr(), data, bias, num_tokens, packed.layout.shape_address
        ):
            _check(1)
        return y_TN

    def rms_norm(self, x_TD: Tensor, norm: NormWeight) -> Tensor:
        """See megatron_infer.ops."""
        (num_tokens, dim), (weight_D, eps) = x_TD.shape, norm
        assert x_TD.dtype is torch.float32 is weight_D.dtype and x_TD.is_contiguous() and weight_D.shape[0] == dim
        y_TD = _fp32(num_tokens, dim)
        y, x, weight = y_TD.data_ptr(), x_TD.data_ptr(), weight_D.data_ptr()
        self._rms_norm(self._pool, y, x, None, weight, num_tokens, dim, eps)
        return y_TD

    def add_rms_norm(self, x_TD: Tensor, residual_TD: Tensor, norm: NormWeight) -> Tensor:
        """See megatron_infer.ops."""
        (num_tokens, dim), (weight_D, eps) = x_TD.shape, norm
        assert x_TD.dtype is torch.float32 is weight_D.dtype and weight_D.shape[0] == dim
        assert residual_TD.shape == x_TD.shape and x_TD.is_contiguous() and residual_TD.is_contiguous()
        y_TD = _fp32(num_tokens, dim)
        y, x, weight = y_TD.data_ptr(), x_TD.data_ptr(), weight_D.data_ptr()
        self._rms_norm(self._pool, y, x, residual_TD.data_ptr(), weight, num_tokens, dim, eps)
        return y_TD

    def _attention_shape(self, num_heads: int, cache: Tensor, max_blocks: int) -> int:
        """Address of the shape, which lives as long as this object."""
        key = (num_heads, max_blocks, cache.shape, cache.dtype)
        known = self._attention_shapes.get(key)
        if known is None:
            kv_heads, block_size, head_dim = cache.shape[1:]
            if cache.dtype not in (torch.float32, torch.bfloat16):
                raise ValueError(f"the CPU kernels keep the KV cache as bfloat16 or float32, not {cache.dtype}")
            if head_dim % 2 or head_dim > 1024 or num_heads % kv_heads:
                raise ValueError(f"{num_heads} heads over {kv_heads} KV heads of dim {head_dim}: not supported")
            shape = AttentionShape(num_heads, kv_heads, head_dim, block_size, _DTYPES[cache.dtype], max_blocks)
            known = self._attention_shapes[key] = (ctypes.addressof(shape), shape)
        return known[0]

    def rope_store_kv(self, qkv_TC: Tensor, rope: Rope, batch: BatchView, kv: LayerKV, heads: Heads) -> Tensor:
        """See megatron_infer.ops."""
        num_tokens, head_dim = qkv_TC.shape[0], kv.k.shape[3]
        assert qkv_TC.shape[1] == (heads.num + 2 * heads.num_kv) * head_dim and qkv_TC.is_contiguous()
        assert batch.positions_T.dtype is torch.int32 and batch.slots_T.dtype is torch.int64 and kv.k.is_contiguous()
        assert qkv_TC.dtype is torch.float32 is rope.cos_PH.dtype
        assert rope.cos_PH.is_contiguous() and rope.sin_PH.is_contiguous()
        shape = self._attention_shape(heads.num, kv.k, 0)
        q_TNH = _fp32(num_tokens, heads.num, head_dim)
        self._rope(
            self._pool,
            q_TNH.data_ptr(),
            qkv_TC.data_ptr(),
            rope.cos_PH.data_ptr(),
            rope.sin_PH.data_ptr(),
            batch.positions_T.data_ptr(),
            batch.slots_T.data_ptr(),
            kv.k.data_ptr(),
            kv.v.data_ptr(),
            num_tokens,
            shape,
        )
        return q_TNH

    def paged_attention(self, q_TNH: Tensor, batch: BatchView, kv: LayerKV, scale: float) -> Tensor:
        """See megatron_infer.ops; the lengths themselves are read, not their maximum."""
        tables_SB = batch.block_tables_SB
        num_sequences, max_blocks = tables_SB.shape
        shape = self._attention_shape(q_TNH.shape[1], kv.k, max_blocks)
        assert q_TNH.dtype is torch.float32 and q_TNH.is_contiguous() and kv.k.is_contiguous()
        assert tables_SB.dtype is batch.query_start_S1.dtype is batch.context_lens_S.dtype is torch.int32
        assert tables_SB.is_contiguous() and kv.v.is_contiguous()
        o_TNH = _fp32(*q_TNH.shape)
        status = self._attention(
            self._pool,
            o_TNH.data_ptr(),
            q_TNH.data_ptr(),
            kv.k.data_ptr(),
            kv.v.data_ptr(),
            tables_SB.data_ptr(),
            batch.query_start_S1.data_ptr(),
            batch.context_lens_S.data_ptr(),
            num_sequences,
            shape,
            scale,
        )
        _check(status)
        return o_TNH

    def attention_layer(
        self, stream: Stream, norm: NormWeight, qkv: PackedLinear, out: PackedLinear, rope: Rope, batch: BatchView,
        kv: LayerKV, heads: Heads, completes_sum: bool,
    ) -> None:  # fmt: skip
        """See megatron_infer.ops; the next half's norm adds the product to the residual, at no cost."""
        residual_TD, x_TD = stream.residual_TD, stream.pending_TD
        num_tokens, dim = residual_TD.shape
        num_sequences, max_blocks = batch.block_tables_SB.shape
        head_dim = kv.k.shape[3]
        assert residual_TD.dtype is torch.float32 and residual_TD.is_contiguous() and dim == qkv.in_dim
        assert x_TD is None or (
            x_TD.dtype is torch.float32 and x_TD.is_contiguous() and x_TD.shape == residual_TD.shape
        )
        assert qkv.out_dim == (heads.num + 2 * heads.num_kv) * head_dim and out.in_dim == heads.num * head_dim
        y_TD = _fp32(num_tokens, out.out_dim)
        status = self._attention_layer(
            self._pool,
            y_TD.data_ptr(),
            None if x_TD is None else x_TD.data_ptr(),
            residual_TD.data_ptr(),
            norm.weight_D.data_ptr(),
            norm.eps,
            _layer_linear(qkv),
            _layer_linear(out),
            rope.cos_PH.data_ptr(),
            rope.sin_PH.data_ptr(),
            batch.positions_T.data_ptr(),
            batch.slots_T.data_ptr(),
            kv.k.data_ptr(),
            kv.v.data_ptr(),
            batch.block_tables_SB.data_ptr(),
            batch.query_start_S1.data_ptr(),
            batch.context_lens_S.data_ptr(),
            num_tokens,
            num_sequences,
            self._attention_shape(heads.num, kv.k, max_blocks),
            heads.scale,
        )
        _check(status)
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
        first, second = _layer_linear(gate_up), _layer_linear(down)
        status = self._feed_forward_layer(self._pool, y, x, residual, weight, norm.eps, first, second, num_tokens)
        _check(status)
        stream.pending_TD = y_TD

    def silu_mul(self, gate_up_T2F: Tensor) -> Tensor:
        """See megatron_infer.ops."""
        num_tokens, width = gate_up_T2F.shape
        assert gate_up_T2F.dtype is torch.float32 and gate_up_T2F.is_contiguous() and width % 2 == 0
        y_TF = _fp32(num_tokens, width // 2)
        self._silu_mul(self._pool, y_TF.data_ptr(), gate_up_T2F.data_ptr(), num_tokens, width // 2)
        return y_TF

    def argmax(self, logits_SV: Tensor) -> tuple[Tensor, Tensor]:
        """See megatron_infer.ops."""
        num_rows, width = logits_SV.shape
        assert logits_SV.dtype is torch.float32 and logits_SV.is_contiguous() and width < 1 << 24
        values_S, indices_S = _fp32(num_rows), torch.empty(num_rows, dtype=torch.int64, device="cpu")
        values, indices = values_S.data_ptr(), indices_S.data_ptr()
        self._library.mi_argmax(self._pool, values, indices, logits_SV.data_ptr(), num_rows, width)
        return values_S, indices_S

    def gather_rows(self, table_VD: Tensor, ids_T: Tensor) -> Tensor:
        """See megatron_infer.ops; ids are int32 or int64 and must be rows of the table."""
        num_ids, dim = ids_T.shape[0], table_VD.shape[1]
        assert table_VD.is_contiguous() and ids_T.is_contiguous() and ids_T.dtype in (torch.int32, torch.int64)
        y_TD = _fp32(num_ids, dim)
        table, dtype, wide = table_VD.data_ptr(), _DTYPES[table_VD.dtype], ids_T.dtype is torch.int64
        self._library.mi_gather_rows(self._pool, y_TD.data_ptr(), table, dtype, ids_T.data_ptr(), wide, num_ids, dim)
        return y_TD
