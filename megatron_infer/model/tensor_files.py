"""One file of tensors: safetensors, or a PyTorch zip archive.

Owns opening such a file safely and reading slices of it through a memory map that is let go again. Never unpickles
anything but tensors and plain containers. Knows no model, no names, no shards.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

Range = tuple[int, int]

SAFETENSORS_DTYPES = {
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "I8": "int8",
    "U8": "uint8",
}
"""The format's name of a dtype -> torch's."""
_LFS_POINTER = b"version https://git-lfs"
_REMAP_BYTES = 256 << 20
_MAX_HEADER_BYTES = 4 << 20
"""Of 30,000 tensors; 126 layers have some 1,200."""
PT_METADATA_KEY = "megatron_infer"
"""Top-level key of a `.pt` file with our own facts about it; upstream ignores whatever stands beside "model"."""


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype (torch's name without "torch.") of a stored tensor."""

    shape: tuple[int, ...]
    dtype: str


class TensorFile(Protocol):
    """A file whose tensors can be read slice by slice. `tensors` and `metadata` come from its header alone."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]

    def read(self, key: str, rows: Range, cols: Range | None) -> Tensor:
        """Rows and columns of a tensor, contiguous; may be a view of a private memory map of the file."""
        ...

    def close(self) -> None:
        """Let go of memory maps."""
        ...


class SafetensorsFile:
    """A `.safetensors` file. It is mapped anew for every read (0.1 ms), so that pages read do not stay resident."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp = file_stamp(path)
        header = _safetensors_header(path)
        self.metadata: Mapping[str, str] = header.pop("__metadata__", {})
        self.tensors: Mapping[str, TensorInfo] = {
            key: TensorInfo(tuple(entry["shape"]), SAFETENSORS_DTYPES.get(entry["dtype"], entry["dtype"]))
            for key, entry in header.items()
        }

    def read(self, key: str, rows: Range, cols: Range | None) -> Tensor:
        check_unchanged(self.path, self._stamp)
        with safe_open(self.path, "pt") as file:
            view = file.get_slice(key)
            index = slice(*rows) if cols is None else (slice(*rows), slice(*cols))
            tensor: Tensor = view[index]
        return tensor.contiguous()

    def close(self) -> None:
        pass


class PickleFile:
    """A file of `torch.save`, mapped and restricted to `weights_only`.

    Args:
        unwrap: look for the tensors below Megatron's wrappers (["model"]["module"]["llama_model"], dotted prefixes).
    """

    _WRAPPERS = ("model", "module", "llama_model", "language_model", "_orig_mod")

    def __init__(self, path: Path, *, unwrap: bool) -> None:
        self.path = path
        self._stamp = file_stamp(path)
        self._unwrap = unwrap
        self._mapped: dict[str, Tensor] | None = None
        self._bytes_read = 0
        self.metadata: Mapping[str, str] = {}
        self.tensors: Mapping[str, TensorInfo] = {
            key: TensorInfo(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            for key, tensor in self._map().items()
        }

    def read(self, key: str, rows: Range, cols: Range | None) -> Tensor:
        tensor = self._map()[key][slice(*rows)]
        if cols is not None:
            tensor = tensor[:, slice(*cols)]
        self._bytes_read += tensor.nbytes
        if self._bytes_read > _REMAP_BYTES:
            # Mapping costs milliseconds of unpickling, so unlike safetensors the map is kept for a while, not for good.
            self.close()
        return tensor.contiguous()

    def close(self) -> None:
        self._mapped = None
        self._bytes_read = 0

    def checksums(self) -> tuple[int, ...]:
        """CRC-32 of every record in the archive, as its directory states them; equal for equal files."""
        with zipfile.ZipFile(self.path) as archive:
            return tuple(record.CRC for record in archive.infolist())

    def _map(self) -> dict[str, Tensor]:
        if self._mapped is None:
            check_unchanged(self.path, self._stamp)
            self._mapped = self._tensors_in(_load_pickle(self.path))
        return self._mapped

    def _tensors_in(self, state: Any) -> dict[str, Tensor]:
        if not isinstance(state, Mapping):
            raise ValueError(f"{self.path} holds a {type(state).__name__}, not a dictionary of tensors")
        if self._unwrap:
            own = state.get(PT_METADATA_KEY)
            if isinstance(own, Mapping):
                self.metadata = {str(key): str(value) for key, value in own.items()}
            for wrapper in self._WRAPPERS:
                if isinstance(state.get(wrapper), Mapping):
                    state = state[wrapper]
        out: dict[str, Tensor] = {}
        for key, tensor in _strided_tensors(self.path, state):
            name = self._without_prefix(key) if self._unwrap else key
            if name in out:
                raise ValueError(f"{self.path} holds tensor {name!r} twice, under different prefixes; save it again")
            out[name] = tensor
        if not out:
            raise ValueError(f"{self.path} holds no tensors where a checkpoint has them (top level, or under 'model')")
        return out

    def _without_prefix(self, key: str) -> str:
        head, _, rest = key.partition(".")
        return self._without_prefix(rest) if rest and head in self._WRAPPERS else key


def _strided_tensors(path: Path, state: Mapping[Any, Any]) -> Iterator[tuple[str, Tensor]]:
    for key, value in state.items():
        if not isinstance(value, Tensor):
            continue
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
            raise ValueError(
                f"{path}: tensor {key!r} is not a plain dense tensor; save the checkpoint as plain tensors"
            )
        yield str(key), value.detach()


def _load_pickle(path: Path) -> Any:
    try:
        with zipfile.ZipFile(path) as archive:
            data = [record for record in archive.infolist() if "/data/" in record.filename]
    except (zipfile.BadZipFile, EOFError):
        reason = "it is not a zip archive of torch.save (truncated, or a format from before PyTorch 1.6)"
        raise _unreadable(path, reason) from None
    if any(record.compress_type != zipfile.ZIP_STORED for record in data):
        raise ValueError(f"{path} was repacked with compression and cannot be mapped; repack it without (zip -0)")
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # damaged archives raise whatever the unpickler trips over
        text = str(error)
        if "weights only" not in text.lower().replace("_", " "):
            raise _unreadable(path, text.split("\n", 1)[0]) from None
        # torch's own text recommends weights_only=False, which runs whatever the file says.
        culprit = re.search(r"GLOBAL ([\w.]+)", text)
        raise ValueError(
            f"{path} cannot be read: it holds something other than tensors and plain containers"
            f"{f' ({culprit[1]})' if culprit else ''}, which is never executed; ask its publisher for safetensors, or "
            "save its state dict again as tensors only"
        ) from None


def _safetensors_header(path: Path) -> dict[str, Any]:
    """A file's header, which its own library has found valid; asking that for each tensor takes 20 times as long."""
    with path.open("rb") as file:
        num_bytes = int.from_bytes(file.read(8), "little")
        if num_bytes > _MAX_HEADER_BYTES:
            raise _unreadable(path, f"header too large ({num_bytes} bytes)")
        text = file.read(num_bytes)
    try:
        with safe_open(path, "pt"):
            header: dict[str, Any] = json.loads(text)
            return header
    except SafetensorError as error:
        raise _unreadable(path, str(error)) from None


def _unreadable(path: Path, reason: str) -> ValueError:
    with path.open("rb") as file:
        start = file.read(len(_LFS_POINTER))
    if start == _LFS_POINTER:
        return ValueError(f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` or download it again")
    return ValueError(f"{path} cannot be read: {reason}. If the file is incomplete or damaged, download it again")


def file_stamp(path: Path) -> tuple[int, int]:
    """What changes when a file does: its size in bytes and the time of its last change."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def check_unchanged(path: Path, stamp: tuple[int, int]) -> None:
    """Refuse to go on with a file that is not the one whose `file_stamp` was taken (ValueError)."""
    if file_stamp(path) != stamp:
        raise ValueError(f"{path} changed while the checkpoint was being read; start again")
