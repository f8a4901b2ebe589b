"""The header of a GGUF file: its metadata, and where its tensors lie.

Owns reading and bounding every count, length and offset in it; format: ggml's docs/gguf.md, versions 2 and 3. Knows no
models, no tokenizers, and not how blocks of quantized weights are decoded.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from megatron_infer.files import broken_file

_T = TypeVar("_T")

_MAGIC = b"GGUF"
_SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "|b1", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
"""The format's number of a value type -> numpy's name of it."""
_STRING, _ARRAY = 8, 9
_MAX_KEYS, _MAX_TENSORS, _MAX_DIMENSIONS = 1 << 12, 1 << 16, 4
_MAX_STRINGS = 1 << 21
"""In all arrays together: a vocabulary of 512 Ki tokens and its merges are half of it, and take half a second."""
_MAX_STRING_BYTES = 1 << 24
_MAX_ALIGNMENT = 1 << 16

BLOCKS = {
    "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22),
    "Q5_1": (32, 24), "Q8_0": (32, 34), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210),
}  # fmt: skip
"""Tensor types that are read: weights in a block, bytes of a block."""
_TYPE_NAMES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip


@dataclass(frozen=True)
class GgufTensor:
    """A tensor: shape, rows first (the file has it the other way round), type of BLOCKS, and where its bytes lie."""

    shape: tuple[int, ...]
    type: str
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class GgufHeader:
    """Metadata (scalars, strings, lists of strings, numpy arrays) and tensors; offsets count from `first_byte`."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]
    first_byte: int

    @classmethod
    def read(cls, path: Path) -> GgufHeader:
        """Parse a header, in less than a second.

        Raises:
            ValueError: damaged, of a tensor type or version that is not read, or part of a split file; names the field.
        """
        with path.open("rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                raise broken_file(path, "is not a GGUF file (it does not begin with GGUF)")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                try:
                    return _parse(path, _Cursor(data))
                except _DamagedError as error:
                    raise broken_file(path, f"is damaged: {error}") from None

    def get(self, key: str, kind: type[_T], default: _T | None = None) -> _T | None:
        """A value of the metadata, of this type (ValueError); the default where there is none."""
        value = self.metadata.get(key, default)
        if value is not default and (not isinstance(value, kind) or isinstance(value, bool) is not (kind is bool)):
            raise ValueError(f"{self.path}: {key} is {str(value)[:80]!r}, which is not of type {kind.__name__}")
        return value

    def numbers(self, key: str, count: int, default: float | None = None) -> list[Any]:
        """An array of numbers in the metadata, of this length (ValueError); of defaults where it may be left out."""
        value = self.metadata.get(key)
        if value is None and default is not None:
            return [default] * count
        if not isinstance(value, np.ndarray) or len(value) != count:
            raise ValueError(f"{self.path}: {key} is not an array of {count} numbers; convert the model again")
        return list(value.tolist())


class _DamagedError(Exception):
    """What is wrong with which field."""


class _Cursor:
    """Reads values one after the other, none beyond the end of the file."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.size, self.at, self.strings_left = data, len(data), 4, _MAX_STRINGS

    def take(self, count: int, size: int, field: str) -> int:
        """Step over `count` items of `size` bytes; returns where they begin."""
        if count * size > self.size - self.at:
            raise _DamagedError(f"{field} ({count} items of {size} bytes) goes beyond the end of the file")
        self.at += count * size
        return self.at - count * size

    def integer(self, code: str, field: str, limit: int | None = None) -> int:
        size = struct.calcsize(code)
        (value,) = struct.unpack_from(code, self.data, self.take(1, size, field))
        if limit is not None and value > limit:
            raise _DamagedError(f"{field} is {value}, more than {limit}")
        return int(value)

    def string(self, field: str) -> str:
        length = self.integer("<Q", f"the length of {field}", _MAX_STRING_BYTES)
        start = self.take(length, 1, field)
        try:
            return self.data[start : start + length].decode("utf-8")
        except UnicodeDecodeError:
            raise _DamagedError(f"{field} is not UTF-8") from None

    def value(self, kind: int, field: str) -> Any:
        if kind == _STRING:
            return self.string(field)
        if kind == _ARRAY:
            kind, count = self.integer("<I", f"the type of {field}"), self.integer("<Q", f"the length of {field}")
            if kind == _STRING:
                self.strings_left -= count
                if self.strings_left < 0:
                    raise _DamagedError(f"{field} has {count} strings, more than are read ({_MAX_STRINGS})")
                return [self.string(field) for _ in range(count)]
            return self.numbers(kind, count, field)
        return self.numbers(kind, 1, field)[0].item()

    def numbers(self, kind: int, count: int, field: str) -> np.ndarray[Any, Any]:
        if kind not in _SCALARS:
            raise _DamagedError(f"{field} is of type {kind}, which is neither a number nor a string")
        dtype = np.dtype(_SCALARS[kind])
        start = self.take(count, dtype.itemsize, field)
        return np.frombuffer(self.data[start : self.at], dtype)


def _parse(path: Path, cursor: _Cursor) -> GgufHeader:
    version = cursor.integer("<I", "the version")
    if version not in (2, 3):
        why = "big-endian" if version and not version & 0xFFFF else f"version {version}"
        raise ValueError(f"{path} is {why}; little-endian GGUF of versions 2 and 3 is read, convert the model again")
    num_tensors = cursor.integer("<Q", "the number of tensors", _MAX_TENSORS)
    metadata: dict[str, Any] = {}
    for index in range(cursor.integer("<Q", "the number of keys", _MAX_KEYS)):
        key = cursor.string(f"key {index}")
        if key in metadata:
            raise _DamagedError(f"key {key!r} stands there twice")
        metadata[key] = cursor.value(cursor.integer("<I", f"the type of {key!r}"), repr(key))
    if metadata.get("split.count", 1) not in (0, 1):
        raise ValueError(
            f"{path} is a part of a split model (split.count {metadata['split.count']}); join the parts with "
            "`llama-gguf-split --merge FIRST_PART OUT.gguf`"
        )
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 8 <= alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
        raise _DamagedError(f"general.alignment is {alignment!r}, not a power of two from 8 to {_MAX_ALIGNMENT}")
    tensors: dict[str, GgufTensor] = {}
    for index in range(num_tensors):
        name = cursor.string(f"the name of tensor {index}")
        if name in tensors:
            raise _DamagedError(f"tensor {name!r} stands there twice")
        tensors[name] = _tensor(path, cursor, name, alignment)
    first_byte = -(-cursor.at // alignment) * alignment
    _check_places(tensors, cursor.size - first_byte)
    return GgufHeader(path, metadata, tensors, first_byte)


def _tensor(path: Path, cursor: _Cursor, name: str, alignment: int) -> GgufTensor:
    field = f"tensor {name!r}"
    num_dimensions = cursor.integer("<I", f"the number of dimensions of {field}", _MAX_DIMENSIONS)
    shape = tuple(cursor.integer("<Q", f"the shape of {field}") for _ in range(num_dimensions))[::-1]
    number = cursor.integer("<I", f"the type of {field}")
    kind = _TYPE_NAMES.get(number, f"number {number}")
    offset = cursor.integer("<Q", f"the offset of {field}")
    if kind not in BLOCKS:
        raise ValueError(
            f"{path}: {field} is of type {kind}, which is not read; take a file of types {', '.join(BLOCKS)} only, "
            "such as Q8_0 or Q4_K_M, or the model's safetensors"
        )
    block, block_bytes = BLOCKS[kind]
    if not shape or 0 in shape or shape[-1] % block or len(shape) == 1 < block:
        raise _DamagedError(f"{field} has shape {list(shape)}: no rows of whole blocks of {block} weights ({kind})")
    if offset % alignment:
        raise _DamagedError(f"the offset of {field}, {offset}, is not a multiple of {alignment}")
    return GgufTensor(shape, kind, offset, math.prod(shape) // block * block_bytes)


def _check_places(tensors: Mapping[str, GgufTensor], num_bytes: int) -> None:
    """Refuse tensors that overlap, or end beyond the `num_bytes` that follow the header."""
    end, before = 0, ""
    for name, info in sorted(tensors.items(), key=lambda item: item[1].offset):
        if info.offset < end:
            raise _DamagedError(f"tensors {before!r} and {name!r} overlap")
        end, before = info.offset + info.num_bytes, name
        if end > num_bytes:
            raise _DamagedError(f"tensor {name!r} goes {end - num_bytes} bytes beyond the end of the file")
