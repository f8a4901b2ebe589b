"""A checkpoint directory of any accepted kind, as one source of canonical tensors.

Owns recognising the kind, validating it from headers before a weight is read, and reading any slice of any tensor.
Knows no layers, no ranks of the running engine and no kernels.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from megatron_infer.gguf_header import GgufHeader
from megatron_infer.model.directory import existing, hf_entry, hf_files, nothing_found, shards_in
from megatron_infer.model.gguf_file import GgufFile, gguf_config
from megatron_infer.model.manifest import (
    MANIFEST_NAME,
    Manifest,
    check_identities,
    check_sizes,
    parse_shard_name,
    shard_name,
    verify_manifest,
)
from megatron_infer.model.naming import without_wrappers
from megatron_infer.model.pieces import Piece, overlaps, refuse, shard_pieces, whole_pieces
from megatron_infer.model.tensor_files import PickleFile, SafetensorsFile, TensorFile
from megatron_infer.model.weights import (
    check_num_shards,
    expected_tensors,
    gguf_name,
    gguf_tensors,
    hf_name,
    hf_tensors,
    megatron_name,
    megatron_rows,
    megatron_tensors,
)
from megatron_infer.model_config import DEFAULT_MODEL_NAME, ModelConfig

KINDS = ("sharded-safetensors", "hf-safetensors", "megatron-pt", "megatron-pt-shards", "hf-bin", "gguf")
UPSTREAM_PT_EPS = 1e-5
"""RMSNorm epsilon of upstream's Megatron path, which its `.pt` files do not state (argparse --layernorm-epsilon)."""

_COMPARED_ROWS = 4096
_Pieces = Mapping[str, Sequence[Piece]]


class Checkpoint:
    """Canonical tensors of a validated checkpoint; made by `open_checkpoint`.

    Attributes:
        kind: one of KINDS. model_dir: where it and its tokenizer lie, a `.gguf` file itself. config: the model's shape.
        pieces: where each tensor lies, by its stored_name. notes: what the reader chose or ignored, for the log.
        num_bytes: size of all tensors as read, replicas not counted.
    """

    def __init__(self, kind: str, model_dir: Path, config: ModelConfig, pieces: _Pieces, notes: Sequence[str]) -> None:
        self.kind, self.model_dir, self.config, self.notes = kind, model_dir, config, tuple(notes)
        self.pieces = pieces
        self._shapes = expected_tensors(config)
        self._is_megatron = kind not in ("hf-safetensors", "hf-bin", "gguf")
        named = {"hf-safetensors": hf_name, "hf-bin": hf_name, "gguf": gguf_name}
        self.stored_name: Callable[[str], str] = named.get(kind, megatron_name)
        self.num_bytes = sum(self.dtype_of(key).itemsize * torch.Size(s).numel() for key, s in self._shapes.items())

    def names(self) -> Iterator[str]:
        """Canonical names of all tensors."""
        return iter(self._shapes)

    def dtype_of(self, name: str) -> torch.dtype:
        """Dtype of a tensor on disk."""
        piece = self.pieces[self.stored_name(name)][0]
        dtype: torch.dtype = getattr(torch, piece.file.tensors[piece.key].dtype)
        return dtype

    def read(self, name: str, rows: tuple[int, int] | None = None, cols: tuple[int, int] | None = None) -> Tensor:
        """Rows and columns [start, stop) of a canonical tensor, contiguous, in the dtype on disk.

        Only the bytes of that slice are read. Do not write to the result: it may be a private view of the file. A
        column of a weight stored as int4 is a byte, which holds two.
        """
        shape = self._shapes.get(name)
        if shape is None or (len(shape) == 1 and cols is not None):
            raise ValueError(f"this model has no {'matrix' if shape else 'tensor'} {name!r}")
        ranges = [_checked_range(name, given, n) for given, n in zip((rows, cols), shape, strict=False)]
        col_range = ranges[1] if len(ranges) == 2 else None
        runs = megatron_rows(self.config, name, ranges[0]) if self._is_megatron else [ranges[0]]
        parts = list(overlaps(self.pieces[self.stored_name(name)], runs, col_range))
        # The readers below make tensors on torch's default device, which may be the program's GPU.
        with torch.device("cpu"):
            if len(parts) == 1:
                return parts[0].read()
            out = torch.empty([stop - start for start, stop in ranges], dtype=self.dtype_of(name))
            for part in parts:
                part.copy_into(out)
            return out

    def close(self) -> None:
        """Let go of the files."""
        for pieces in self.pieces.values():
            for piece in pieces:
                piece.file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _checked_range(name: str, given: tuple[int, int] | None, size: int) -> tuple[int, int]:
    start, stop = given or (0, size)
    if not 0 <= start <= stop <= size:
        raise ValueError(f"{name}: [{start}, {stop}) is not inside [0, {size})")
    return start, stop


def open_checkpoint(model_dir: str | Path, model_name: str = DEFAULT_MODEL_NAME, *, verify: bool = False) -> Checkpoint:
    """Open a checkpoint directory of any accepted kind, or a GGUF file, validated from headers before a weight is read.

    Kinds in order of preference: our sharded safetensors, Hugging Face safetensors, `{model_name}.pt`,
    `{model_name}_states_*.pt`, Hugging Face `pytorch_model*.bin`, a `.gguf`. Pickle-based files are read with
    `weights_only`, and code that a directory brings along (`auto_map`) is never run.

    Args:
        verify: first hash every file against manifest.json (sharded safetensors only; reads the whole checkpoint).

    Raises:
        ValueError: what is wrong, naming tensor and file, and what to do about it.
    """
    directory = Path(model_dir)
    is_file = directory.suffix == ".gguf" and directory.is_file()
    if not is_file and not directory.is_dir():
        raise ValueError(f"{directory} is not a directory; give a local checkpoint directory, or a .gguf file")
    open_hf = partial(_open_hf, "hf-safetensors", SafetensorsFile)
    open_hf_bin = partial(_open_hf, "hf-bin", partial(PickleFile, unwrap=False))
    candidates: list[tuple[str, list[Path], Callable[[Path, list[Path]], Checkpoint]]] = [
        ("sharded-safetensors", shards_in(directory), _open_sharded),
        ("hf-safetensors", hf_entry(directory, "model", ".safetensors"), open_hf),
        ("megatron-pt", existing(directory / f"{model_name}.pt"), _open_pt),
        ("megatron-pt-shards", sorted(directory.glob(f"{glob.escape(model_name)}_states_*.pt")), _open_pt_shards),
        ("hf-bin", hf_entry(directory, "pytorch_model", ".bin"), open_hf_bin),
        ("gguf", [directory] if is_file else sorted(directory.glob("*.gguf")), _open_gguf),
    ]
    found = [(kind, paths, opener) for kind, paths, opener in candidates if paths]
    if not found:
        raise ValueError(nothing_found(directory, model_name))
    kind, paths, opener = found[0]
    if verify:
        verify_manifest(directory)
    checkpoint = opener(directory, paths)
    others = [other for other, _, _ in found[1:]]
    also = f" (also present, not used: {', '.join(others)})" if others else ""
    checkpoint.notes = (f"reading {kind} from {directory}{also}", *checkpoint.notes)
    return checkpoint


def _open_sharded(directory: Path, paths: list[Path]) -> Checkpoint:
    parsed = {parse_shard_name(path.name): path for path in paths}
    sizes = {size for _, size in filter(None, parsed)}
    if len(sizes) > 1:
        raise ValueError(f"{directory} holds shards of several conversions (of {sorted(sizes)}); keep one set")
    size = sizes.pop()
    missing = [shard_name(rank, size) for rank in range(size) if (rank, size) not in parsed]
    refuse([f"{directory / name} is missing" for name in missing], "Copy all shards of the conversion")
    ordered = [parsed[rank, size] for rank in range(size)]
    refuse([f"{p} is not one of {size} shards" for p in paths if p not in ordered], "Remove it")
    config = ModelConfig.from_dir(directory)
    check_num_shards(config, size)
    manifest = Manifest.load(directory)
    if manifest is not None:
        listed = {name for name in manifest.files if parse_shard_name(name)}
        if listed != {path.name for path in ordered}:
            raise ValueError(f"{directory / MANIFEST_NAME} lists other shards than are there: {sorted(listed)}")
        check_sizes(directory, manifest, listed)
    files = [SafetensorsFile(path) for path in ordered]
    check_identities({file.path: file.metadata for file in files}, manifest)
    stored = _with_stored_head(config, files, "output.weight", {})
    pieces, skipped = shard_pieces(files, megatron_tensors(stored))
    if manifest is not None:
        _check_listing(directory, manifest, pieces)
    return _settled(Checkpoint("sharded-safetensors", directory, stored, pieces, ()), config, skipped)


def _check_listing(directory: Path, manifest: Manifest, pieces: _Pieces) -> None:
    stored = {key: ps[0].file.tensors[key] for key, ps in pieces.items()}
    problems = [
        f"tensor {key!r} is {info.dtype}, axis {pieces[key][0].axis} in {pieces[key][0].file.path}"
        for key, info in stored.items()
        if (entry := manifest.tensors.get(key)) is None
        or (entry.dtype, entry.shard_axis) != (info.dtype, pieces[key][0].axis)
    ]
    refuse(problems, f"{directory / MANIFEST_NAME} says otherwise; copy the checkpoint again")


def _open_hf(kind: str, open_file: Callable[[Path], TensorFile], directory: Path, entry: list[Path]) -> Checkpoint:
    paths, weight_map = hf_files(entry)
    config = _plain_config(directory)
    files = [open_file(path) for path in paths]
    tensors = hf_tensors(replace(config, tie_word_embeddings=False))
    names = without_wrappers([key for file in files for key in file.tensors], tensors)
    stored = _with_stored_head(config, files, "lm_head.weight", names)
    pieces, skipped = whole_pieces(files, hf_tensors(stored), names)
    problems = [
        f"tensor {piece.key!r} is in {piece.file.path}, but {entry[0].name} says "
        f"{weight_map.get(piece.key, 'nothing of it')}"
        for (piece,) in pieces.values()
        if weight_map and weight_map.get(piece.key) != piece.file.path.name
    ]
    refuse(problems, "Files of several downloads are mixed; download the checkpoint again")
    notes = [f"{len(names)} names are read without their wrappers, as {a!r} as {b!r}" for a, b in [*names.items()][:1]]
    return _settled(Checkpoint(kind, directory, stored, pieces, notes), config, skipped)


def _open_pt(directory: Path, paths: list[Path]) -> Checkpoint:
    file = PickleFile(paths[0], unwrap=True)
    check_identities({file.path: file.metadata}, None)
    config, note = _pt_config(directory, file)
    stored = _with_stored_head(config, [file], "output.weight", {})
    pieces, skipped = whole_pieces([file], megatron_tensors(stored), {})
    return _settled(Checkpoint("megatron-pt", directory, stored, pieces, [note]), config, skipped)


def _open_pt_shards(directory: Path, paths: list[Path]) -> Checkpoint:
    files = [PickleFile(path, unwrap=True) for path in paths]
    check_identities({file.path: file.metadata for file in files}, None)
    seen: dict[tuple[int, ...], Path] = {}
    for file in files:
        twin = seen.setdefault(file.checksums(), file.path)
        if twin is not file.path:
            raise ValueError(f"{file.path} is a copy of {twin}, not another shard; copy the right file")
    config, note = _pt_config(directory, files[0])
    stored = _with_stored_head(config, files, "output.weight", {})
    pieces, skipped = shard_pieces(files, megatron_tensors(stored))
    check_num_shards(config, len(files))
    norms = [file.read("norm.weight", (0, config.hidden_size), None) for file in files]
    for file, norm in zip(files, norms, strict=True):
        if not torch.equal(norm, norms[0]):
            raise ValueError(
                f"tensor 'norm.weight' differs between {files[0].path} and {file.path}, so these are not shards of one "
                "checkpoint; copy them again"
            )
    return _settled(Checkpoint("megatron-pt-shards", directory, stored, pieces, [note]), config, skipped)


def _pt_config(directory: Path, file: PickleFile) -> tuple[ModelConfig, str]:
    """Config of a `.pt` checkpoint and where its epsilon comes from: config.json beside it is Hugging Face's (1e-6)."""
    if "rms_norm_eps" in file.metadata:
        eps, source = float(file.metadata["rms_norm_eps"]), f"stated in {file.path.name}"
    else:
        eps, source = UPSTREAM_PT_EPS, "upstream's for .pt files"
    if (directory / "config.json").exists():
        config, shape = _plain_config(directory), "config.json"
    else:
        config, shape = ModelConfig.aixcoder_7b(), "aiXcoder-7B's constants (there is no config.json)"
    return replace(config, rms_norm_eps=eps), f"model shape: {shape}; RMSNorm epsilon {eps:g}: {source}"


def _open_gguf(directory: Path, paths: list[Path]) -> Checkpoint:
    if len(paths) > 1:
        names = ", ".join(path.name for path in paths)
        raise ValueError(f"{directory} holds several GGUF files; name the one to read, such as {paths[0]} ({names})")
    header = GgufHeader.read(paths[0])
    config = gguf_config(header)
    pieces, _ = whole_pieces([GgufFile(header, config)], gguf_tensors(config), {})
    return Checkpoint("gguf", paths[0], config, pieces, ())


def _plain_config(directory: Path) -> ModelConfig:
    config = ModelConfig.from_dir(directory)
    if config.quantization is not None:
        raise ValueError(
            f"{directory / 'config.json'} says that the weights are quantized ({config.quantization}), which only "
            "sharded directories are; put the config.json there that belongs to these weights"
        )
    return config


def _with_stored_head(
    config: ModelConfig, files: Sequence[TensorFile], head: str, names: Mapping[str, str]
) -> ModelConfig:
    """As untied, if files of a tied model hold a head: what that is, its values must tell."""
    is_there = any(names.get(key, key) == head for file in files for key in file.tensors)
    return replace(config, tie_word_embeddings=config.tie_word_embeddings and not is_there)


def _settled(checkpoint: Checkpoint, config: ModelConfig, skipped: list[str]) -> Checkpoint:
    """A checkpoint that was read as `_with_stored_head` says: the head of a tied model counts if it is no copy.

    So does transformers 5. A copy takes as long to tell as reading both; others differ in their first rows already.
    """
    notes, head = list(checkpoint.notes), checkpoint.stored_name("output.weight")
    if config != checkpoint.config:
        if _equal(checkpoint, "tok_embeddings.weight", "output.weight"):
            skipped = [head, *skipped]
        else:
            config = checkpoint.config
            notes.append(f"tie_word_embeddings is set, but {head} is not the embedding: it is used as the head")
    if skipped:
        more = f" and {len(skipped) - 3} more" if len(skipped) > 3 else ""
        notes.append(f"ignored: {', '.join(skipped[:3])}{more} (derived or tied)")
    return Checkpoint(checkpoint.kind, checkpoint.model_dir, config, checkpoint.pieces, notes)


def _equal(checkpoint: Checkpoint, name: str, other: str) -> bool:
    """Whether two matrices of one shape hold the same numbers, a few rows at a time."""
    num_rows = checkpoint.config.vocab_size
    blocks = ((start, min(start + _COMPARED_ROWS, num_rows)) for start in range(0, num_rows, _COMPARED_ROWS))
    return all(bool((checkpoint.read(name, rows) == checkpoint.read(other, rows)).all()) for rows in blocks)
