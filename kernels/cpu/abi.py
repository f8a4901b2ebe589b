"""The C interface of libmegatron_infer_cpu.so: finding the library, its thread pools, and the arguments of each op.

The arguments of an op travel as one record: `struct` packs it faster than ctypes converts as many arguments or fills a
Structure, and every call has its own. ctypes releases the GIL while an op runs.
"""

from __future__ import annotations

import ctypes
import struct
import weakref
import zlib
from collections.abc import Callable
from ctypes import c_char_p, c_int, c_int32, c_int64, c_size_t, c_uint32, c_void_p
from pathlib import Path

LIBRARY = Path(__file__).with_name("libmegatron_infer_cpu.so")
HEADER = Path(__file__).with_name("kernels.h")
_FUNCTIONS: dict[str, tuple[type | None, list[type]]] = {
    "mi_header_crc32": (c_uint32, []),
    "mi_pool_create": (c_void_p, [c_int, c_char_p]),
    "mi_pool_destroy": (None, [c_void_p]),
    "mi_pool_variant": (c_char_p, [c_void_p]),
    "mi_find_op": (c_void_p, [c_void_p, c_char_p, c_size_t]),
    "mi_run": (c_int, [c_void_p, c_char_p]),
    "mi_advise_huge_pages": (None, [c_void_p, c_size_t]),
}


class Unavailable(Exception):
    """The kernels cannot be used here; says why and what to do."""


class LinearShape(ctypes.Structure):
    """kernels.h: LinearShape. Ops get its address, which is valid as long as the object lives."""

    _fields_ = [
        ("out_dim", c_int64),
        ("in_dim", c_int64),
        ("panel_bytes", c_int64),
        ("dtype", c_int32),
        ("num_chunks", c_int32),
        ("bounds", c_int32 * 9),
        ("chunk_bytes", c_int32 * 9),
    ]

    def __init__(self, *fields: int) -> None:
        super().__init__(*fields)
        self.address = ctypes.addressof(self)


class Op:
    """An op of kernels.h: its name and the fields of its record in order, those of nested records among them.

    A field is a code of `struct`: P an address, q int64, i int32, f float.
    """

    def __init__(self, name: str, **fields: str) -> None:
        record = struct.Struct("".join(fields.values()) + "0P")  # 0P: as C pads the end of a record
        self.name, self.pack, self.num_bytes = name, record.pack, record.size


def _linear(name: str) -> dict[str, str]:
    return {f"{name}_weight": "P", f"{name}_bias_N": "P", f"{name}_shape": "P"}


_RMS_NORM = {"y_TD": "P", "x_TD": "P", "residual_TD": "P", "norm_D": "P", "eps": "f"}
_ROPE = {"cos_PH": "P", "sin_PH": "P"}
_SHAPE = dict.fromkeys(("num_heads", "num_kv_heads", "head_dim", "block_size", "cache_dtype", "max_blocks"), "i")
_LAYER_KV = {"k_cache": "P", "v_cache": "P", **_SHAPE}
_TOKENS = {"positions_T": "P", "slots_T": "P", "T": "q"}
_SEQUENCES = {"block_tables_SB": "P", "query_start_S1": "P", "context_lens_S": "P", "S": "q"}
_ROWS = {"weight": "P", "shape": "P", "row_start": "q", "num_rows": "q"}

LINEAR = Op("linear", y_TN="P", x_TK="P", **_linear("packed"), T="q")
PACK_ROWS = Op("pack_rows", **_ROWS, rows_NK="P", row_stride="q", dtype="q")
PACK_QUANTIZED = Op("pack_quantized", **_ROWS, q_NK="P", q_stride="q", scales_NG="P", scale_stride="q")
PAGED_ATTENTION = Op("paged_attention", o_TNH="P", q_TNH="P", **_LAYER_KV, **_SEQUENCES, scale="f")
RMS_NORM = Op("rms_norm", **_RMS_NORM, T="q", D="q")
ROPE_STORE_KV = Op("rope_store_kv", q_TNH="P", qkv_TC="P", **_ROPE, **_LAYER_KV, **_TOKENS)
SILU_MUL = Op("silu_mul", y_TF="P", gate_up_T2F="P", T="q", F="q")
ARGMAX = Op("argmax", values_S="P", indices_S="P", logits_SV="P", S="q", V="q")
GATHER_ROWS = Op("gather_rows", y_TD="P", table_VD="P", ids_T="P", dtype="i", ids_are_64_bit="i", T="q", D="q")
ATTENTION_LAYER = Op(
    "attention_layer",
    **{**_RMS_NORM, **_linear("qkv"), **_linear("out"), **_ROPE, **_LAYER_KV, **_TOKENS, **_SEQUENCES},
    scale="f",
)
FEED_FORWARD_LAYER = Op("feed_forward_layer", **_RMS_NORM, **_linear("gate_up"), **_linear("down"), T="q")


def _unusable(reason: str) -> Unavailable:
    return Unavailable(f"{LIBRARY} does not load ({reason}); run `pip install -e .` to build it again")


def load_library() -> ctypes.CDLL:
    """The library with its signatures set. Raises Unavailable."""
    if not LIBRARY.exists():
        raise Unavailable(f"{LIBRARY} is missing; with g++ or clang++ installed, run `pip install -e .` to build it")
    try:
        library = ctypes.CDLL(str(LIBRARY))
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        is_current = library.mi_header_crc32() == zlib.crc32(HEADER.read_bytes())
    except (OSError, AttributeError) as error:
        raise _unusable(str(error)) from error
    if not is_current:
        raise _unusable("it was built from other sources")
    return library


class KernelPool:
    """Threads, and the ops that run on them for one instruction set.

    Raises:
        Unavailable: no library, or the CPU lacks the instruction set.
    """

    def __init__(self, num_threads: int, isa: str) -> None:
        self._library = load_library()
        self._handle = self._library.mi_pool_create(num_threads, b"" if isa == "auto" else isa.encode())
        if not self._handle:
            raise Unavailable(f"this CPU lacks {isa}, or {num_threads} threads are too many")
        weakref.finalize(self, self._library.mi_pool_destroy, self._handle)
        self.isa: str = self._library.mi_pool_variant(self._handle).decode()
        self.advise_huge_pages: Callable[[int, int], None] = self._library.mi_advise_huge_pages

    def launcher(self, op: Op) -> Callable[..., None]:
        """A function of the record's fields that runs the op: addresses as int, 0 for none. Valid while the pool lives.

        Any number of threads may call it; ops take turns. It raises MemoryError.
        """
        run, pack = self._library.mi_run, op.pack
        found = self._library.mi_find_op(self._handle, op.name.encode(), op.num_bytes)
        if not found:
            raise _unusable(f"its {op.name} takes other arguments")

        def launch(*fields: float) -> None:
            if run(found, pack(*fields)):
                raise MemoryError("no memory left for the scratch space of a CPU kernel; lower max_num_batched_tokens")

        return launch
