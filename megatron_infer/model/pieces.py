"""Which file holds which part of a stored tensor.

Owns the check of files' headers against what a model must have, and the arithmetic from a slice of a stored tensor to
slices of files. Knows no directory layouts and no canonical names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from megatron_infer.model.naming import is_derived
from megatron_infer.model.tensor_files import Range, TensorFile
from megatron_infer.model.weights import StoredTensor
from megatron_infer.model_config import FLOAT_DTYPES

_SHOWN = 5
_REMEDY = (
    "The download may be incomplete, or the files do not belong to the config.json beside them (or, without one, to "
    "aiXcoder-7B)"
)
_TIE = "If the model's head is its embedding, set tie_word_embeddings to true in config.json"


@dataclass(frozen=True)
class Piece:
    """A stored tensor, or one shard of it: tensor `key` of `file` holds [start, stop) of dimension `axis`."""

    file: TensorFile
    key: str
    axis: int | None = None
    start: int = 0
    stop: int = 0


@dataclass(frozen=True)
class Part:
    """Rows and columns to read from a piece, and where they go in the result."""

    piece: Piece
    rows: Range
    cols: Range | None
    out_row: int
    out_col: int = 0

    def read(self) -> Tensor:
        """The slice, as the file has it."""
        return self.piece.file.read(self.piece.key, self.rows, self.cols)

    def copy_into(self, out: Tensor) -> None:
        """Read the slice into its place in the result."""
        place = out[self.out_row : self.out_row + self.rows[1] - self.rows[0]]
        if self.cols is not None:
            place = place[:, self.out_col : self.out_col + self.cols[1] - self.cols[0]]
        place.copy_(self.read())


def overlaps(pieces: Sequence[Piece], runs: Iterable[Range], cols: Range | None) -> Iterator[Part]:
    """What to read for row runs of a stored tensor, laid one after the other in the result."""
    out_row = 0
    for start, stop in runs:
        for piece in pieces:
            if piece.axis is None:
                yield Part(piece, (start, stop), cols, out_row)
            elif piece.axis == 0:
                low, high = max(start, piece.start), min(stop, piece.stop)
                if low < high:
                    yield Part(piece, (low - piece.start, high - piece.start), cols, out_row + low - start)
            else:
                assert cols is not None
                low, high = max(cols[0], piece.start), min(cols[1], piece.stop)
                if low < high:
                    yield Part(piece, (start, stop), (low - piece.start, high - piece.start), out_row, low - cols[0])
        out_row += stop - start


def whole_pieces(
    files: Sequence[TensorFile], tensors: Mapping[str, StoredTensor], names: Mapping[str, str]
) -> tuple[dict[str, list[Piece]], list[str]]:
    """Match files that together hold every tensor once; returns the pieces and the names that were ignored.

    Args:
        names: of those tensors that a file has under another name, by that name.
    Raises:
        ValueError: a tensor is missing, unexpected, duplicated, of another shape or of a dtype that is not read.
    """
    pieces: dict[str, list[Piece]] = {}
    problems, skipped = [], []
    for file in files:
        for key in file.tensors:
            name = names.get(key, key)
            if name in pieces:
                problems.append(f"tensor {key!r} is both in {pieces[name][0].file.path} and in {file.path}")
            elif name in tensors:
                problems += _mismatch(file, key, tensors[name], tensors[name].shape)
                pieces[name] = [Piece(file, key)]
            elif is_derived(key):
                skipped.append(key)
            else:
                problems.append(f"tensor {key!r} in {file.path} is not part of this model")
    where = files[0].path if len(files) == 1 else f"all {len(files)} files in {files[0].path.parent}"
    missing = [key for key in tensors if key not in pieces]
    refuse([*problems, *(f"tensor {key!r} is missing from {where}" for key in missing)], _remedy(missing))
    return pieces, skipped


def shard_pieces(
    files: Sequence[TensorFile], tensors: Mapping[str, StoredTensor]
) -> tuple[dict[str, list[Piece]], list[str]]:
    """Match tensor-parallel shards, in rank order, with the rules that divide each tensor; else as `whole_pieces`."""
    size = len(files)
    _check_count(files, tensors)
    pieces: dict[str, list[Piece]] = {key: [] for key in tensors}
    problems, skipped, missing = [], [], []
    for rank, file in enumerate(files):
        for key, stored in tensors.items():
            if key not in file.tensors:
                missing.append(key)
                problems.append(f"tensor {key!r} is missing from {file.path}")
                continue
            problems += _mismatch(file, key, stored, stored.shard_shape(rank, size))
            if pieces[key] and pieces[key][0].file.tensors[key].dtype != file.tensors[key].dtype:
                problems.append(f"tensor {key!r} has another dtype in {file.path} than in {files[0].path}")
            if stored.axis is not None:
                pieces[key].append(Piece(file, key, stored.axis, *stored.shard_range(rank, size)))
            elif rank == 0:
                pieces[key].append(Piece(file, key))
        for key in file.tensors:
            if key not in tensors and is_derived(key):
                skipped.append(key)
            elif key not in tensors:
                problems.append(f"tensor {key!r} in {file.path} is not part of this model")
    refuse(problems, _remedy(missing))
    return pieces, sorted(set(skipped))


def _remedy(missing: Sequence[str]) -> str:
    return _TIE if set(missing) in ({"lm_head.weight"}, {"output.weight"}) else _REMEDY


def refuse(problems: Sequence[str], remedy: str) -> None:
    """Raise one ValueError for all problems, the first few by name; nothing if there are none."""
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise ValueError(f"{'; '.join(problems[:_SHOWN])}{more}. {remedy}")


def _check_count(files: Sequence[TensorFile], tensors: Mapping[str, StoredTensor]) -> None:
    """Refuse a number of shards other than the one the shapes in the first file were cut for."""
    for key, stored in tensors.items():
        info = files[0].tensors.get(key)
        if stored.axis is None or info is None or len(info.shape) != len(stored.shape):
            continue
        full, have = stored.shape[stored.axis], info.shape[stored.axis]
        others_match = all(
            a == b for i, (a, b) in enumerate(zip(info.shape, stored.shape, strict=True)) if i != stored.axis
        )
        if others_match and have and full % have == 0 and full // have != len(files):
            raise ValueError(
                f"{files[0].path} is a shard of {full // have} (tensor {key!r} has shape {list(info.shape)} of "
                f"{list(stored.shape)}), but {len(files)} such file(s) were found; put all {full // have} shards, and "
                "no others, into the directory"
            )
        return


def _mismatch(file: TensorFile, key: str, stored: StoredTensor, shape: tuple[int, ...]) -> list[str]:
    info = file.tensors[key]
    problems = []
    if info.shape != shape:
        problems.append(f"tensor {key!r} in {file.path} has shape {list(info.shape)}, expected {list(shape)}")
    if stored.dtype is not None and info.dtype != str(stored.dtype).removeprefix("torch."):
        problems.append(f"tensor {key!r} in {file.path} has dtype {info.dtype}, expected {stored.dtype}")
    elif stored.dtype is None and info.dtype not in FLOAT_DTYPES:
        problems.append(
            f"tensor {key!r} in {file.path} has dtype {info.dtype}; only {', '.join(FLOAT_DTYPES)} are read, weights "
            "quantized by other tools are not"
        )
    return problems
