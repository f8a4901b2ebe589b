"""The manifest of a sharded checkpoint directory: which files belong together, and what is in them.

Owns `manifest.json`, the names of shard files and the identity every shard carries in its own header, so that a renamed
or mixed-up shard is recognised without hashing gigabytes. Knows no tensors' contents.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_infer.files import read_json_object, sha256_of

FORMAT = "megatron_infer-sharded"
FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
_SHARD_NAME = re.compile(r"model-rank(\d{1,4})-of-(\d{1,4})\.safetensors")


@dataclass(frozen=True)
class FileEntry:
    """A file of the directory: its size and the SHA-256 of its bytes in hexadecimal."""

    size: int
    sha256: str


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of the checkpoint: full shape, dtype, and the axis its shards divide (None: whole in each)."""

    shape: tuple[int, ...]
    dtype: str
    shard_axis: int | None


@dataclass(frozen=True)
class Manifest:
    """What `save_sharded` wrote. `checkpoint_id` is random and also stands in every shard's header."""

    checkpoint_id: str
    tensor_parallel_size: int
    files: Mapping[str, FileEntry]
    tensors: Mapping[str, TensorEntry]

    def to_json(self) -> str:
        """The text of manifest.json."""
        return json.dumps({"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def load(cls, model_dir: Path) -> Manifest | None:
        """Read a directory's manifest; None where there is none. ValueError when it is damaged or too new."""
        path = model_dir / MANIFEST_NAME
        if not path.is_file():
            return None
        raw = read_json_object(path)
        if raw.get("format") != FORMAT or raw.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"{path} is format {raw.get('format')!r} version {raw.get('format_version')!r}; this version reads "
                f"{FORMAT!r} version {FORMAT_VERSION}. Update megatron_infer or convert the checkpoint again"
            )
        try:
            return cls(
                checkpoint_id=str(raw["checkpoint_id"]),
                tensor_parallel_size=int(raw["tensor_parallel_size"]),
                files={name: FileEntry(int(e["size"]), str(e["sha256"])) for name, e in raw["files"].items()},
                tensors={
                    name: TensorEntry(tuple(e["shape"]), str(e["dtype"]), e["shard_axis"])
                    for name, e in raw["tensors"].items()
                },
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{path} is damaged ({type(error).__name__}: {error}); convert the checkpoint again"
            ) from None


def shard_name(rank: int, size: int) -> str:
    """File name of shard `rank` of `size`."""
    return f"model-rank{rank}-of-{size}.safetensors"


def parse_shard_name(name: str) -> tuple[int, int] | None:
    """(rank, size) of a shard's file name; None for other names."""
    match = _SHARD_NAME.fullmatch(name)
    return (int(match[1]), int(match[2])) if match else None


def shard_identity(checkpoint_id: str, rank: int, size: int) -> dict[str, str]:
    """What a shard says of itself in its header."""
    return {"checkpoint_id": checkpoint_id, "tensor_parallel_rank": str(rank), "tensor_parallel_size": str(size)}


def check_identities(shards: Mapping[Path, Mapping[str, str]], manifest: Manifest | None) -> None:
    """Compare what shards, in rank order, say of themselves with their place and with the manifest (ValueError).

    Shards without an identity (written by other tools) pass when there is no manifest either.
    """
    size = len(shards)
    checkpoint_id = manifest.checkpoint_id if manifest else None
    for rank, (path, said) in enumerate(shards.items()):
        if "tensor_parallel_rank" not in said:
            if manifest is not None:
                raise ValueError(f"{path} is not the file {MANIFEST_NAME} was written for: its header names no rank")
            continue
        if said["tensor_parallel_rank"] != str(rank) or said.get("tensor_parallel_size") != str(size):
            raise ValueError(
                f"{path} says in its header that it is shard {said['tensor_parallel_rank']} of "
                f"{said.get('tensor_parallel_size')}, but it stands in the place of shard {rank} of {size}: files were "
                "swapped or renamed. Give every shard the name it was written with, or copy the checkpoint again"
            )
        checkpoint_id = checkpoint_id or said.get("checkpoint_id")
        if said.get("checkpoint_id") != checkpoint_id:
            raise ValueError(
                f"{path} belongs to another checkpoint than its neighbours (id {said.get('checkpoint_id')}, expected "
                f"{checkpoint_id}); copy all shards from one conversion"
            )


def check_sizes(model_dir: Path, manifest: Manifest, names: Iterable[str]) -> None:
    """Compare the presence and size of files with the manifest (ValueError naming the file)."""
    for name in names:
        path, entry = model_dir / name, manifest.files[name]
        if Path(name).name != name or not path.is_file():
            raise ValueError(f"{path} is listed in {MANIFEST_NAME} but does not exist; copy the checkpoint again")
        if path.stat().st_size != entry.size:
            raise ValueError(
                f"{path} has {path.stat().st_size} bytes, {MANIFEST_NAME} says {entry.size}: it is truncated or was "
                "changed. Copy it again"
            )


def verify_manifest(model_dir: str | Path) -> Manifest:
    """Hash every file the manifest lists; reads the whole checkpoint.

    Raises:
        ValueError: there is no manifest, or a file is missing or not the one that was written.
    """
    directory = Path(model_dir)
    manifest = Manifest.load(directory)
    if manifest is None:
        raise ValueError(f"{directory} has no {MANIFEST_NAME}; only converted (sharded) checkpoints can be verified")
    check_sizes(directory, manifest, manifest.files)
    for name, entry in manifest.files.items():
        if sha256_of(directory / name) != entry.sha256:
            raise ValueError(f"{directory / name} does not match the SHA-256 in {MANIFEST_NAME}; copy it again")
    return manifest
