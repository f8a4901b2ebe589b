"""Writers of one file of tensors, block by block: safetensors, and the zip archive of `torch.save`.

Owns the two layouts on disk, so that no more than a block of a tensor is in memory; both are read back by the official
libraries. Knows no model, no names and no directories.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from megatron_infer.model.tensor_files import SAFETENSORS_DTYPES

BLOCK_BYTES = 4 << 20
"""Tensors are read, converted and written in blocks of rows of about this size."""

_SAFETENSORS_NAMES = {getattr(torch, dtype): name for name, dtype in SAFETENSORS_DTYPES.items()}
_STORAGE_NAMES = {torch.bfloat16: "BFloat16Storage", torch.float16: "HalfStorage", torch.float32: "FloatStorage"}
_ZIP_ALIGNMENT = 64
_ZIP_HEADER_BYTES = 30 + 20 + 4
"""Of a record without its name: the fixed part, 64-bit sizes, and the head of the padding."""
_ZIP_BYTES_PER_RECORD = 512

Progress = Callable[[int], None]
"""Told how many bytes of tensors were just written."""


@dataclass(frozen=True)
class TensorPlan:
    """A tensor to be written. `blocks` yields its elements in order, in pieces; it is called once."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    blocks: Callable[[], Iterator[Tensor]]

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class SafetensorsWriter:
    """A `.safetensors` file under way; its tensors are written in the order of `plans`, which is the file's.

    `reading` is the thread that makes the next block while one is written.

    Layout (safetensors, format specification): length of the header as 8 little-endian bytes, the header as JSON padded
    with spaces to a multiple of 8, then the tensors without gaps.
    """

    def __init__(
        self, path: Path, plans: Sequence[TensorPlan], metadata: Mapping[str, str], reading: Executor, *, hashed: bool
    ) -> None:
        self.path, self.plans = path, _aligned(plans)
        self._reading = reading
        self._file = path.open("wb", buffering=0)
        self._digest = _Hash(hashed)
        self._write(memoryview(_header(self.plans, metadata)))

    def write(self, plan: TensorPlan, progress: Progress) -> None:
        """Write the next tensor."""
        for view in _views(plan, self._reading):
            self._write(view)
            progress(len(view))

    def hexdigest(self) -> str:
        """SHA-256 of the file's bytes, or "" if not `hashed`."""
        return self._digest.hexdigest()

    def _write(self, view: memoryview) -> None:
        self._digest.update(view)
        write_all(self._file.write, view)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._digest.close()
        self._file.close()


def _aligned(plans: Sequence[TensorPlan]) -> list[TensorPlan]:
    """In the given order where every tensor then starts at a multiple of its element size, else wider types first."""
    start = 0
    for plan in plans:
        if start % plan.dtype.itemsize:
            return sorted(plans, key=lambda plan: -plan.dtype.itemsize)
        start += plan.num_bytes
    return list(plans)


def safetensors_bytes(plans: Sequence[TensorPlan], metadata: Mapping[str, str]) -> int:
    """Size of the file that a SafetensorsWriter makes."""
    return len(_header(plans, metadata)) + sum(plan.num_bytes for plan in plans)


def write_pt(path: Path, plans: Sequence[TensorPlan], facts: Mapping[str, str], key: str, progress: Progress) -> None:
    """Write {"model": tensors, key: facts} as `torch.save` does; `torch.load` reads it, mapped or not."""
    with (
        ThreadPoolExecutor(1) as reading,
        path.open("wb") as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
    ):
        archive.writestr(_record("archive/data.pkl"), _pickled(plans, facts, key))
        archive.writestr(_record("archive/byteorder"), "little")
        archive.writestr(_record("archive/version"), "3\n")
        for number, plan in enumerate(plans):
            record = _record(f"archive/data/{number}")
            # As torch does: tensors start at a multiple of 64 bytes, by means of an extra field of zeros tagged "FB".
            padding = -(file.tell() + _ZIP_HEADER_BYTES + len(record.filename)) % _ZIP_ALIGNMENT
            record.extra = struct.pack("<2sH", b"FB", padding) + bytes(padding)
            with archive.open(record, "w", force_zip64=True) as out:
                for view in _views(plan, reading):
                    write_all(out.write, view)
                    progress(len(view))


def pt_bytes(plans: Sequence[TensorPlan]) -> int:
    """Size of the file that `write_pt` makes, at most."""
    return sum(plan.num_bytes + _ZIP_BYTES_PER_RECORD for plan in plans) + 8 * _ZIP_BYTES_PER_RECORD


def write_all(write: Callable[[memoryview], int | None], data: memoryview) -> None:
    """Write all of `data`, however little the system takes at a time."""
    while data:
        data = data[write(data) :]


def _views(plan: TensorPlan, reading: Executor) -> Iterator[memoryview]:
    """The tensor's bytes, block by block; refuses a reader that yields something else than was planned."""
    written = 0
    for block in _ahead(plan.blocks(), reading):
        assert block.dtype == plan.dtype
        view = block.contiguous().view(torch.uint8).flatten().numpy().data
        written += len(view)
        yield view
    assert written == plan.num_bytes, plan.name


def _ahead(blocks: Iterator[Tensor], reading: Executor) -> Iterator[Tensor]:
    """The same blocks, each read and converted on another thread while the one before it is written."""
    pending = reading.submit(next, blocks, None)
    while (block := pending.result()) is not None:
        pending = reading.submit(next, blocks, None)
        yield block


class _Hash:
    """SHA-256 on a thread of its own: it takes about as long as writing, and both let go of the interpreter."""

    def __init__(self, enabled: bool) -> None:
        self._digest = hashlib.sha256()
        self._pool = ThreadPoolExecutor(1) if enabled else None
        self._pending: Future[None] | None = None

    def update(self, data: memoryview) -> None:
        """Hash `data` in the background; waits for what was given before, so that two blocks at most are held."""
        if self._pool is not None:
            self._wait()
            self._pending = self._pool.submit(self._digest.update, data)

    def hexdigest(self) -> str:
        """The result in hexadecimal."""
        self._wait()
        return self._digest.hexdigest() if self._pool is not None else ""

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()

    def close(self) -> None:
        """End the thread."""
        if self._pool is not None:
            self._pool.shutdown()


def _header(plans: Sequence[TensorPlan], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    start = 0
    for plan in plans:
        stop = start + plan.num_bytes
        dtype = _SAFETENSORS_NAMES[plan.dtype]
        entries[plan.name] = {"dtype": dtype, "shape": list(plan.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _record(name: str) -> zipfile.ZipInfo:
    return zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))


def _pickled(plans: Sequence[TensorPlan], facts: Mapping[str, str], key: str) -> bytes:
    """The archive's data.pkl, written opcode by opcode (protocol 2), since there are no tensors to pickle yet."""
    model = [(plan.name, _pickled_tensor(plan, number)) for number, plan in enumerate(plans)]
    inner = [(name, _text(value)) for name, value in facts.items()]
    return b"\x80\x02" + _dict([("model", _dict(model)), (key, _dict(inner))]) + b"."


def _pickled_tensor(plan: TensorPlan, number: int) -> bytes:
    """A call of torch._utils._rebuild_tensor_v2(storage, offset, shape, stride, requires_grad, hooks)."""
    strides = [torch.Size(plan.shape[axis + 1 :]).numel() for axis in range(len(plan.shape))]
    numel = _int(torch.Size(plan.shape).numel())
    storage = (_text("storage"), _global("torch", _STORAGE_NAMES[plan.dtype]), _text(str(number)), _text("cpu"), numel)
    no_hooks = _global("collections", "OrderedDict") + b")R"
    shape, stride = (_tuple(map(_int, sizes)) for sizes in (plan.shape, strides))
    arguments = (_tuple(storage) + b"Q", _int(0), shape, stride, b"\x89", no_hooks)
    return _global("torch._utils", "_rebuild_tensor_v2") + _tuple(arguments) + b"R"


def _dict(items: Sequence[tuple[str, bytes]]) -> bytes:
    return b"}(" + b"".join(_text(name) + value for name, value in items) + b"u"


def _tuple(items: Iterable[bytes]) -> bytes:
    return b"(" + b"".join(items) + b"t"


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _int(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little")
    return b"\x8a" + bytes([len(data)]) + data


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()
