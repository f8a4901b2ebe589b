"""Writers of checkpoint directories: sharded safetensors, upstream Megatron `.pt`, Hugging Face.

Owns which tensors go into which file. Takes them from a reader of canonical slices, so any checkpoint converts to any
other, and streams them: no more than a few blocks of rows are in memory, whatever the size of model and tensor.
"""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from checkpoints_convert.output_dir import appearing
from checkpoints_convert.tensor_writers import (
    BLOCK_BYTES,
    Progress,
    SafetensorsWriter,
    TensorPlan,
    pt_bytes,
    safetensors_bytes,
    write_pt,
)
from megatron_infer.files import sha256_of
from megatron_infer.gguf_header import GgufHeader
from megatron_infer.model.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    FileEntry,
    Manifest,
    TensorEntry,
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
from megatron_infer.model_config import ModelConfig
from megatron_infer.text.gguf_tokenizer import gguf_tokenizer

TOKENIZER_FILES = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "generation_config.json", "chat_template.jinja", "example.json",
)  # fmt: skip
"""Files beside the weights that a converted checkpoint takes along, where they exist."""

_SMALL_FILES_BYTES = 1 << 20
"""Allowance for config, index and manifest when the free space is checked."""

Range = tuple[int, int]


class Reader(Protocol):
    """Canonical tensors by slice; `Checkpoint.read` is one."""

    def __call__(self, name: str, rows: Range | None = None, cols: Range | None = None) -> Tensor: ...


def tokenizer_files(model_dir: str | Path) -> tuple[Path, ...]:
    """Those of TOKENIZER_FILES that a directory has, for `extra_files`."""
    return tuple(path for name in TOKENIZER_FILES if (path := Path(model_dir) / name).is_file())


def write_gguf_tokenizer(file: Path, folder: Path) -> None:
    """Write what a GGUF file's metadata says of its tokenizer as the files that other kinds of checkpoint have."""
    content, settings = gguf_tokenizer(GgufHeader.read(file))
    if isinstance(content, bytes):
        (folder / "tokenizer.model").write_bytes(content)
    else:
        (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")


def save_sharded(
    read: Reader, config: ModelConfig, out_dir: str | Path, num_shards: int, dtype: torch.dtype | None = None,
    extra_files: Sequence[str | Path] = (), *, force: bool = False, progress: Progress | None = None,
) -> Manifest:  # fmt: skip
    """Write a sharded safetensors directory: one file per tensor-parallel rank, config.json and manifest.json.

    The directory appears under its name only when complete and flushed to disk.

    Args:
        dtype: convert all floating tensors to it, but the scales of a quantised one; None keeps each as it is.
        extra_files: copied beside the weights (tokenizer).
        force: replace a checkpoint that stands at out_dir.
        progress: called with the number of tensor bytes just written.

    Raises:
        ValueError: num_shards does not divide the KV heads, out_dir is taken, the disk is too small, or a value does
            not fit into `dtype`.
    """
    check_num_shards(config, num_shards)
    checkpoint_id = secrets.token_hex(16)
    stored = megatron_tensors(config)
    shards = [_shard_plans(read, config, rank, num_shards, dtype) for rank in range(num_shards)]
    entries = {plan.name: _entry(plan, stored[plan.name]) for plan in shards[0]}
    common = {"format": "pt", "format_version": str(FORMAT_VERSION)}
    metadata = [{**common, **shard_identity(checkpoint_id, rank, num_shards)} for rank in range(num_shards)]
    sizes = [safetensors_bytes(plans, said) for plans, said in zip(shards, metadata, strict=True)]
    files: dict[str, FileEntry] = {}
    with appearing(out_dir, sum(sizes) + _small_bytes(extra_files), force=force) as directory:
        with ExitStack() as stack:
            reading = stack.enter_context(ThreadPoolExecutor(1))
            paths = [directory / shard_name(rank, num_shards) for rank in range(num_shards)]
            writers = [
                stack.enter_context(SafetensorsWriter(path, plans, said, reading, hashed=True))
                for path, plans, said in zip(paths, shards, metadata, strict=True)
            ]
            # Tensor by tensor rather than shard by shard: the source is read once, from its start to its end.
            for shares in zip(*(writer.plans for writer in writers), strict=True):
                for writer, plan in zip(writers, shares, strict=True):
                    writer.write(plan, progress or _silent)
            for writer in writers:
                files[writer.path.name] = FileEntry(writer.path.stat().st_size, writer.hexdigest())
        _write_config(directory, config, entries["tok_embeddings.weight"].dtype)
        _copy(extra_files, directory)
        others = [path for path in directory.iterdir() if path.name not in files]
        files |= {path.name: FileEntry(path.stat().st_size, sha256_of(path)) for path in others}
        manifest = Manifest(checkpoint_id, num_shards, dict(sorted(files.items())), entries)
        (directory / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def save_upstream_pt(
    read: Reader, config: ModelConfig, out_dir: str | Path, model_name: str, num_shards: int,
    dtype: torch.dtype | None = None, extra_files: Sequence[str | Path] = (), *, force: bool = False,
    progress: Progress | None = None,
) -> None:  # fmt: skip
    """Write upstream's Megatron files: `{model_name}.pt` for one shard, else `{model_name}_states_{rank}.pt`.

    Tensors stand below ["model"]. Beside it stand our own facts (rank, epsilon), which upstream does not look at.
    Arguments and errors as `save_sharded`; upstream also needs dimensions that num_shards divides.
    """
    check_num_shards(config, num_shards)
    for name, tensor in megatron_tensors(config).items():
        if tensor.axis is not None and tensor.shape[tensor.axis] % num_shards:
            raise ValueError(
                f"dimension {tensor.axis} of {name!r} ({tensor.shape[tensor.axis]}) is not a multiple of {num_shards}, "
                "as upstream needs; write fewer shards, or sharded safetensors"
            )
    checkpoint_id = secrets.token_hex(16)
    shards = [_shard_plans(read, config, rank, num_shards, dtype) for rank in range(num_shards)]
    num_bytes = sum(map(pt_bytes, shards)) + _small_bytes(extra_files)
    with appearing(out_dir, num_bytes, force=force) as directory:
        for rank, plans in enumerate(shards):
            facts = {**shard_identity(checkpoint_id, rank, num_shards), "rms_norm_eps": repr(config.rms_norm_eps)}
            path = directory / (f"{model_name}.pt" if num_shards == 1 else f"{model_name}_states_{rank}.pt")
            write_pt(path, plans, facts, PT_METADATA_KEY, progress or _silent)
        _write_config(directory, config, _dtype_name(_find(shards[0], "tok_embeddings.weight").dtype))
        _copy(extra_files, directory)


def save_hf(
    read: Reader, config: ModelConfig, out_dir: str | Path, dtype: torch.dtype | None = None,
    extra_files: Sequence[str | Path] = (), max_file_bytes: int = 5 << 30, *, force: bool = False,
    progress: Progress | None = None,
) -> None:  # fmt: skip
    """Write a Hugging Face directory: model.safetensors, or numbered files with an index past `max_file_bytes`.

    A tied head is left out, as transformers does. Arguments and errors as `save_sharded`.
    """
    plans = [_hf_plan(read, name, shape, dtype) for name, shape in expected_tensors(config).items()]
    groups = _groups(plans, max_file_bytes)
    weight_map: dict[str, str] = {}
    metadata = {"format": "pt"}
    num_bytes = sum(safetensors_bytes(group, metadata) for group in groups) + _small_bytes(extra_files)
    with appearing(out_dir, num_bytes, force=force) as directory, ThreadPoolExecutor(1) as reading:
        for number, group in enumerate(groups, 1):
            count = len(groups)
            file_name = "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            with SafetensorsWriter(directory / file_name, group, metadata, reading, hashed=False) as writer:
                for plan in writer.plans:
                    writer.write(plan, progress or _silent)
            weight_map |= dict.fromkeys((plan.name for plan in group), file_name)
        if len(groups) > 1:
            total = {"total_size": sum(plan.num_bytes for plan in plans)}
            _write_json(directory / "model.safetensors.index.json", {"metadata": total, "weight_map": weight_map})
        _write_config(directory, config, _dtype_name(_find(plans, hf_name("tok_embeddings.weight")).dtype))
        _copy(extra_files, directory)


def _groups(plans: Sequence[TensorPlan], max_bytes: int) -> list[list[TensorPlan]]:
    """Tensors by output file, each file filled up to `max_bytes`."""
    groups: list[list[TensorPlan]] = [[]]
    filled = 0
    for plan in plans:
        if groups[-1] and filled + plan.num_bytes > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(plan)
        filled += plan.num_bytes
    return groups


def _hf_plan(read: Reader, name: str, shape: tuple[int, ...], dtype: torch.dtype | None) -> TensorPlan:
    target = dtype or _stored_dtype(read, name)
    return TensorPlan(hf_name(name), shape, target, lambda: _blocks(read, name, shape, (0, shape[0]), None, target))


def _shard_plans(
    read: Reader, config: ModelConfig, rank: int, size: int, dtype: torch.dtype | None
) -> list[TensorPlan]:
    """What shard `rank` of `size` holds, under Megatron names."""
    return [
        _shard_plan(read, config, name, stored, rank, size, dtype) for name, stored in megatron_tensors(config).items()
    ]


def _shard_plan(
    read: Reader, config: ModelConfig, name: str, stored: StoredTensor, rank: int, size: int, dtype: torch.dtype | None
) -> TensorPlan:
    shape = stored.shard_shape(rank, size)
    rows, cols = (0, shape[0]), None
    if stored.axis == 0:
        rows = stored.shard_range(rank, size)
    elif stored.axis == 1:
        cols = stored.shard_range(rank, size)
    if not is_fused(name):
        target = stored.dtype or dtype or _stored_dtype(read, name)
        return TensorPlan(name, shape, target, lambda: _blocks(read, name, stored.shape, rows, cols, target))
    groups = range(rows[0] // stored.unit, rows[1] // stored.unit)
    parts = [part for group in groups for part in fused_parts(config, name, group)]
    target = stored.dtype or dtype or _common_dtype(read, [part for part, _ in parts[:3]], name)

    def blocks() -> Iterator[Tensor]:
        for part, part_rows in parts:
            yield from _blocks(read, part, stored.shape, part_rows, None, target)

    return TensorPlan(name, shape, target, blocks)


def _blocks(
    read: Reader, name: str, shape: tuple[int, ...], rows: Range, cols: Range | None, dtype: torch.dtype
) -> Iterator[Tensor]:
    """Rows and columns of a canonical tensor, a few rows at a time, in `dtype`. `shape`: of a tensor as wide as it."""
    width = 1 if len(shape) == 1 else cols[1] - cols[0] if cols else shape[1]
    step = max(1, BLOCK_BYTES // (width * dtype.itemsize))
    for start in range(*rows, step):
        yield converted(read(name, (start, min(start + step, rows[1])), cols), dtype, name)


def converted(block: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """`block` in `dtype`; refuses what would overflow (ValueError naming the tensor)."""
    if block.dtype == dtype:
        return block
    out = block.to(dtype)
    # The extremes tell without temporary copies that there is nothing to look into.
    suspicious = bool(out.numel()) and not all(map(torch.isfinite, out.aminmax()))
    if suspicious and bool((out.isinf() & block.isfinite()).any()):
        raise ValueError(f"tensor {name!r} has values that {_dtype_name(dtype)} cannot hold; choose another dtype")
    return out


def _common_dtype(read: Reader, parts: Sequence[str], name: str) -> torch.dtype:
    """The dtype of the parts of a fused tensor; ValueError where they have several."""
    dtypes = {_stored_dtype(read, part) for part in parts}
    if len(dtypes) > 1:
        raise ValueError(f"{', '.join(parts)} are of different dtypes and share one tensor {name!r}; name a dtype")
    return dtypes.pop()


def _stored_dtype(read: Reader, name: str) -> torch.dtype:
    return read(name, (0, 1)).dtype


def _find(plans: Sequence[TensorPlan], name: str) -> TensorPlan:
    return next(plan for plan in plans if plan.name == name)


def _entry(plan: TensorPlan, stored: StoredTensor) -> TensorEntry:
    return TensorEntry(stored.shape, _dtype_name(plan.dtype), stored.axis)


def _silent(num_bytes: int) -> None:
    """Nobody is told."""


def _small_bytes(extra_files: Sequence[str | Path]) -> int:
    return _SMALL_FILES_BYTES + sum(Path(file).stat().st_size for file in extra_files if Path(file).exists())


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _write_config(directory: Path, config: ModelConfig, dtype_name: str) -> None:
    _write_json(directory / "config.json", replace(config, torch_dtype=dtype_name).to_hf())


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _copy(files: Sequence[str | Path], directory: Path) -> None:
    for file in map(Path, files):
        if (directory / file.name).exists():
            raise ValueError(f"extra file {file} would replace {file.name} of the checkpoint; leave it out")
        shutil.copyfile(file, directory / file.name)
