"""Writers of checkpoint directories: sharded safetensors, upstream Megatron `.pt`, Hugging Face.

Owns the order of writing that makes a directory appear whole or not at all. Takes tensors from a reader of canonical
slices, so any checkpoint converts to any other; holds one output file in memory at a time.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_infer.config import ModelConfig
from megatron_infer.model.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    FileEntry,
    Manifest,
    TensorEntry,
    sha256_of,
    shard_identity,
    shard_name,
)
from megatron_infer.model.tensor_files import PT_METADATA_KEY
from megatron_infer.model.weights import (
    StoredTensor,
    check_num_shards,
    expected_tensors,
    fused_parts,
    hf_name,
    is_fused,
    megatron_tensors,
)

TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
)
"""Files beside the weights that a converted checkpoint takes along, where they exist."""


class Reader(Protocol):
    """Canonical tensors by slice; `Checkpoint.read` is one."""

    def __call__(
        self, name: str, rows: tuple[int, int] | None = None, cols: tuple[int, int] | None = None
    ) -> Tensor: ...


def tokenizer_files(model_dir: str | Path) -> tuple[Path, ...]:
    """Those of TOKENIZER_FILES that a directory has, for `extra_files`."""
    return tuple(path for name in TOKENIZER_FILES if (path := Path(model_dir) / name).is_file())


def save_sharded(
    read: Reader,
    config: ModelConfig,
    out_dir: str | Path,
    num_shards: int,
    dtype: torch.dtype | None = None,
    extra_files: Sequence[str | Path] = (),
) -> Manifest:
    """Write a sharded safetensors directory: one file per tensor-parallel rank, config.json and manifest.json.

    The directory appears under its name only when complete and flushed to disk. Peak memory is one shard, since the
    safetensors library writes a file from one dictionary.

    Args:
        dtype: convert all tensors to it; None keeps each as it is.
        extra_files: copied beside the weights (tokenizer).

    Raises:
        ValueError: num_shards does not divide the KV heads, or out_dir is not empty.
    """
    check_num_shards(config, num_shards)
    checkpoint_id = secrets.token_hex(16)
    stored = megatron_tensors(config)
    entries: dict[str, TensorEntry] = {}
    with _appearing(out_dir) as directory:
        for rank in range(num_shards):
            shard = {name: _shard(read, config, name, stored[name], rank, num_shards, dtype) for name in stored}
            for name, tensor in shard.items():
                entries[name] = TensorEntry(stored[name].shape, _dtype_name(tensor), stored[name].axis)
            metadata = {
                "format": "pt",
                "format_version": str(FORMAT_VERSION),
                **shard_identity(checkpoint_id, rank, num_shards),
            }
            save_file(shard, directory / shard_name(rank, num_shards), metadata=metadata)
            del shard
        _write_config(directory, config, entries["tok_embeddings.weight"].dtype)
        _copy(extra_files, directory)
        files = {p.name: FileEntry(p.stat().st_size, sha256_of(p)) for p in sorted(directory.iterdir())}
        manifest = Manifest(checkpoint_id, num_shards, files, entries)
        (directory / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def save_upstream_pt(
    read: Reader,
    config: ModelConfig,
    out_dir: str | Path,
    model_name: str,
    num_shards: int,
    dtype: torch.dtype | None = None,
    extra_files: Sequence[str | Path] = (),
) -> None:
    """Write upstream's Megatron files: `{model_name}.pt` for one shard, else `{model_name}_states_{rank}.pt`.

    Tensors stand below ["model"]. Beside it stand our own facts (rank, epsilon), which upstream does not look at.
    Peak memory is one shard. Errors as `save_sharded`; upstream also needs dimensions that num_shards divides.
    """
    check_num_shards(config, num_shards)
    stored = megatron_tensors(config)
    for name, tensor in stored.items():
        if tensor.axis is not None and tensor.shape[tensor.axis] % num_shards:
            raise ValueError(
                f"dimension {tensor.axis} of {name!r} ({tensor.shape[tensor.axis]}) is not a multiple of {num_shards}, "
                "as upstream needs; write fewer shards, or sharded safetensors"
            )
    checkpoint_id = secrets.token_hex(16)
    with _appearing(out_dir) as directory:
        for rank in range(num_shards):
            shard = {name: _shard(read, config, name, stored[name], rank, num_shards, dtype) for name in stored}
            facts = {**shard_identity(checkpoint_id, rank, num_shards), "rms_norm_eps": repr(config.rms_norm_eps)}
            file_name = f"{model_name}.pt" if num_shards == 1 else f"{model_name}_states_{rank}.pt"
            torch.save({"model": shard, PT_METADATA_KEY: facts}, directory / file_name)
            name = _dtype_name(shard["tok_embeddings.weight"])
            del shard
        _write_config(directory, config, name)
        _copy(extra_files, directory)


def save_hf(
    read: Reader,
    config: ModelConfig,
    out_dir: str | Path,
    dtype: torch.dtype | None = None,
    extra_files: Sequence[str | Path] = (),
    max_file_bytes: int = 5 << 30,
) -> None:
    """Write a Hugging Face directory: model.safetensors, or numbered files with an index past `max_file_bytes`.

    Peak memory is one file. A tied head is left out, as transformers does.

    Raises:
        ValueError: out_dir is not empty.
    """
    groups = _groups(read, config, dtype, max_file_bytes)
    weight_map: dict[str, str] = {}
    total_bytes = 0
    with _appearing(out_dir) as directory:
        for number, names in enumerate(groups, 1):
            tensors = {hf_name(name): _owned(read(name), dtype) for name in names}
            count = len(groups)
            file_name = "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            save_file(tensors, directory / file_name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, file_name)
            total_bytes += sum(tensor.nbytes for tensor in tensors.values())
            stored_dtype = _dtype_name(next(iter(tensors.values())))
            del tensors
        if len(groups) > 1:
            index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
            _write_json(directory / "model.safetensors.index.json", index)
        _write_config(directory, config, stored_dtype)
        _copy(extra_files, directory)


def _groups(read: Reader, config: ModelConfig, dtype: torch.dtype | None, max_bytes: int) -> list[list[str]]:
    """Tensor names by output file, each file filled up to `max_bytes`."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, shape in expected_tensors(config).items():
        itemsize = (dtype or read(name, rows=(0, 1)).dtype).itemsize
        size = torch.Size(shape).numel() * itemsize
        if groups[-1] and filled + size > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def _shard(
    read: Reader, config: ModelConfig, name: str, stored: StoredTensor, rank: int, size: int, dtype: torch.dtype | None
) -> Tensor:
    """What shard `rank` of `size` holds of a Megatron tensor."""
    if stored.axis is None:
        return _owned(read(name), dtype)
    bounds = stored.shard_range(rank, size)
    if stored.axis == 1:
        return _owned(read(name, cols=bounds), dtype)
    if not is_fused(name):
        return _owned(read(name, rows=bounds), dtype)
    first = bounds[0] // stored.unit
    groups = range(first, first + (bounds[1] - bounds[0]) // stored.unit)
    return torch.cat([_owned(read(part, rows=r), dtype) for g in groups for part, r in fused_parts(config, name, g)])


def _owned(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A copy in memory of its own: readers may return views of one file map, which safetensors refuses to save."""
    return tensor.to(dtype or tensor.dtype, copy=True).contiguous()


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _write_config(directory: Path, config: ModelConfig, dtype_name: str) -> None:
    _write_json(directory / "config.json", replace(config, torch_dtype=dtype_name).to_hf())


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _copy(files: Sequence[str | Path], directory: Path) -> None:
    for file in map(Path, files):
        if (directory / file.name).exists():
            raise ValueError(f"extra file {file} would replace {file.name} of the checkpoint; leave it out")
        shutil.copyfile(file, directory / file.name)


@contextmanager
def _appearing(out_dir: str | Path) -> Iterator[Path]:
    """A temporary directory that becomes `out_dir` when the block succeeds, and vanishes when it fails."""
    target = Path(out_dir).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists and is not an empty directory; choose another output directory")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.part-", dir=target.parent))
    try:
        yield temporary
        temporary.chmod(0o755)  # mkdtemp's 0700 would hide the checkpoint from everyone but its writer
        for path in (*temporary.iterdir(), temporary):
            _flush(path)
        os.replace(temporary, target)
        _flush(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
