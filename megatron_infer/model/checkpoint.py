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

from megatron_infer.files import read_json_object
from megatron_infer.gguf_header import GgufHeader
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

_Pieces = Mapping[str, Sequence[Piece]]


class Checkpoint:
    """Canonical tensors of a validated checkpoint; made by `open_checkpoint`.

    Attributes:
        kind: one of KINDS. model_dir: where it and its tokenizer lie, a `.gguf` file itself. config: the model's shape.
        notes: what the reader chose or ignored, for the log.
        num_bytes: size of all tensors as read, replicas not counted.
    """

    def __init__(self, kind: str, model_dir: Path, config: ModelConfig, pieces: _Pieces, notes: Sequence[str]) -> None:
        self.kind, self.model_dir, self.config, self.notes = kind, model_dir, config, tuple(notes)
        self._pieces = pieces
        self._shapes = expected_tensors(config)
        self._is_megatron = kind not in ("hf-safetensors", "hf-bin", "gguf")
        named = {"hf-safetensors": hf_name, "hf-bin": hf_name, "gguf": gguf_name}
        self._stored_name: Callable[[str], str] = named.get(kind, megatron_name)
        self.num_bytes = sum(self.dtype_of(key).itemsize * torch.Size(s).numel() for key, s in self._shapes.items())

    def names(self) -> Iterator[str]:
        """Canonical names of all tensors."""
        return iter(self._shapes)

    def dtype_of(self, name: str) -> torch.dtype:
        """Dtype of a tensor on disk."""
        piece = self._pieces[self._stored_name(name)][0]
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
        parts = list(overlaps(self._pieces[self._stored_name(name)], runs, col_range))
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
        for pieces in self._pieces.values():
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
        ("sharded-safetensors", _shards_in(directory), _open_sharded),
        ("hf-safetensors", _hf_entry(directory, "model", ".safetensors"), open_hf),
        ("megatron-pt", _existing(directory / f"{model_name}.pt"), _open_pt),
        ("megatron-pt-shards", sorted(directory.glob(f"{glob.escape(model_name)}_states_*.pt")), _open_pt_shards),
        ("hf-bin", _hf_entry(directory, "pytorch_model", ".bin"), open_hf_bin),
        ("gguf", [directory] if is_file else sorted(directory.glob("*.gguf")), _open_gguf),
    ]
    found = [(kind, paths, opener) for kind, paths, opener in candidates if paths]
    if not found:
        raise ValueError(_nothing_found(directory, model_name))
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
    pieces, skipped = shard_pieces(files, megatron_tensors(config), _tied(config, "output.weight"))
    if manifest is not None:
        _check_listing(directory, manifest, pieces)
    return Checkpoint("sharded-safetensors", directory, config, pieces, _ignored_note(skipped))


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
    paths, weight_map = _hf_files(entry)
    config = _plain_config(directory)
    files = [open_file(path) for path in paths]
    pieces, skipped = whole_pieces(files, hf_tensors(config), _tied(config, "lm_head.weight"))
    problems = [
        f"tensor {key!r} is in {held[0].file.path}, but {entry[0].name} says {weight_map.get(key, 'nothing of it')}"
        for key, held in pieces.items()
        if weight_map and weight_map.get(key) != held[0].file.path.name
    ]
    refuse(problems, "Files of several downloads are mixed; download the checkpoint again")
    return Checkpoint(kind, directory, config, pieces, _ignored_note(skipped))


def _open_pt(directory: Path, paths: list[Path]) -> Checkpoint:
    file = PickleFile(paths[0], unwrap=True)
    check_identities({file.path: file.metadata}, None)
    config, note = _pt_config(directory, file)
    pieces, skipped = whole_pieces([file], megatron_tensors(config), _tied(config, "output.weight"))
    return Checkpoint("megatron-pt", directory, config, pieces, [note, *_ignored_note(skipped)])


def _open_pt_shards(directory: Path, paths: list[Path]) -> Checkpoint:
    files = [PickleFile(path, unwrap=True) for path in paths]
    check_identities({file.path: file.metadata for file in files}, None)
    seen: dict[tuple[int, ...], Path] = {}
    for file in files:
        twin = seen.setdefault(file.checksums(), file.path)
        if twin is not file.path:
            raise ValueError(f"{file.path} is a copy of {twin}, not another shard; copy the right file")
    config, note = _pt_config(directory, files[0])
    pieces, skipped = shard_pieces(files, megatron_tensors(config), _tied(config, "output.weight"))
    check_num_shards(config, len(files))
    norms = [file.read("norm.weight", (0, config.hidden_size), None) for file in files]
    for file, norm in zip(files, norms, strict=True):
        if not torch.equal(norm, norms[0]):
            raise ValueError(
                f"tensor 'norm.weight' differs between {files[0].path} and {file.path}, so these are not shards of one "
                "checkpoint; copy them again"
            )
    return Checkpoint("megatron-pt-shards", directory, config, pieces, [note, *_ignored_note(skipped)])


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
    pieces, skipped = whole_pieces([GgufFile(header, config)], gguf_tensors(config), frozenset())
    return Checkpoint("gguf", paths[0], config, pieces, _ignored_note(skipped))


def _plain_config(directory: Path) -> ModelConfig:
    config = ModelConfig.from_dir(directory)
    if config.quantization is not None:
        raise ValueError(
            f"{directory / 'config.json'} says that the weights are quantized ({config.quantization}), which only "
            "sharded directories are; put the config.json there that belongs to these weights"
        )
    return config


def _shards_in(directory: Path) -> list[Path]:
    return sorted(path for path in directory.glob("model-rank*.safetensors") if parse_shard_name(path.name))


def _existing(path: Path) -> list[Path]:
    return [path] if path.is_file() else []


def _hf_entry(directory: Path, stem: str, suffix: str) -> list[Path]:
    """What announces a Hugging Face checkpoint: its single file, else its index, else shards that lack one."""
    found = _existing(directory / f"{stem}{suffix}") or _existing(directory / f"{stem}{suffix}.index.json")
    return found or sorted(directory.glob(f"{stem}-[0-9]*-of-[0-9]*{suffix}"))


def _hf_files(entry: list[Path]) -> tuple[list[Path], dict[str, str]]:
    """Files to read, and the index's map of tensor name to file name (empty for a single file)."""
    index = entry[0]
    if index.suffix != ".json":
        unlisted = [f"{path} lies there without an index" for path in entry if "-of-" in path.name]
        refuse(unlisted, "Download the .index.json file too")
        return entry, {}
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map; download it again")
    paths: dict[str, Path] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{index} points outside its directory ({name!r}); refused")
        paths[name] = index.parent / name
        if not paths[name].is_file():
            raise ValueError(f"{index} says tensor {tensor!r} is in {name}, which does not exist; download {name}")
    return [paths[name] for name in sorted(paths)], weight_map


def _tied(config: ModelConfig, head: str) -> frozenset[str]:
    """Names to ignore: the copy of the embedding that some tools save as a tied model's head."""
    return frozenset([head]) if config.tie_word_embeddings else frozenset()


def _ignored_note(skipped: Sequence[str]) -> list[str]:
    more = f" and {len(skipped) - 3} more" if len(skipped) > 3 else ""
    return [f"ignored: {', '.join(skipped[:3])}{more} (derived or tied)"] if skipped else []


def _nothing_found(directory: Path, model_name: str) -> str:
    names = sorted(path.name for path in directory.iterdir())
    listed = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "") or "nothing"
    other = [name for name in names if name.endswith(".pt")]
    hint = f". For {other[0]} pass its name without .pt (or without _states_N.pt) as model_name" if other else ""
    return (
        f"{directory} holds no checkpoint; accepted are model-rankR-of-N.safetensors (converted), model.safetensors or "
        f"its shards with model.safetensors.index.json, {model_name}.pt, {model_name}_states_*.pt, "
        f"pytorch_model.bin or its shards with an index, and one .gguf file; found: {listed}{hint}"
    )
