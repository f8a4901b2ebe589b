"""Two checkpoints of any kind, tensor by tensor.

Streams blocks of rows, so that checkpoints of any size compare in little memory. Knows no arithmetic of the network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from checkpoints_convert.tensor_writers import BLOCK_BYTES
from megatron_infer.model.checkpoint import Checkpoint
from megatron_infer.model.formats import unpack_int4
from megatron_infer.model.weights import expected_tensors
from megatron_infer.model_config import ModelConfig

_NOT_THE_NETWORK = ("torch_dtype", "fim", "bos_token_id", "eos_token_ids")
_BIT_VIEWS = {1: torch.int8, 2: torch.int16, 4: torch.int32}


@dataclass(frozen=True)
class TensorDifference:
    """A tensor whose bits differ. max_abs_diff: inf where one has a NaN or an infinity that the other has not."""

    name: str
    dtypes: tuple[str, str]
    max_abs_diff: float

    def __str__(self) -> str:
        kinds = self.dtypes[0] if self.dtypes[0] == self.dtypes[1] else " and ".join(self.dtypes)
        return f"{self.name}: max abs diff {self.max_abs_diff:g} ({kinds})"


@dataclass(frozen=True)
class Comparison:
    """What differs: fields of the config as (name, a, b), and tensors. Names are canonical."""

    num_tensors: int
    fields: tuple[tuple[str, Any, Any], ...]
    tensors: tuple[TensorDifference, ...]

    def within(self, tolerance: float) -> bool:
        """Whether it is the same network and no value differs by more than `tolerance`; 0 asks for equal bits."""
        return not self.fields and all(0 < tolerance >= t.max_abs_diff for t in self.tensors)


def compare_tensors(a: Checkpoint, b: Checkpoint, progress: Callable[[int], object] | None = None) -> Comparison:
    """Compare what two checkpoints hold, whatever their kinds; `progress` is called with 1 for each tensor done.

    Where the shapes of the networks differ, that alone is reported.
    """
    shapes = expected_tensors(a.config)
    fields = _differing_fields(a.config, b.config)
    if shapes != expected_tensors(b.config):
        return Comparison(len(shapes), fields, ())
    differences = []
    for name, shape in shapes.items():
        difference = _compare(a, b, name, shape)
        if difference is not None:
            differences.append(difference)
        if progress is not None:
            progress(1)
    return Comparison(len(shapes), fields, tuple(differences))


def _differing_fields(a: ModelConfig, b: ModelConfig) -> tuple[tuple[str, Any, Any], ...]:
    """Fields that change what the network computes."""
    ours, theirs = asdict(a), asdict(b)
    return tuple(
        (name, ours[name], theirs[name]) for name in ours if name not in _NOT_THE_NETWORK and ours[name] != theirs[name]
    )


def _compare(a: Checkpoint, b: Checkpoint, name: str, shape: tuple[int, ...]) -> TensorDifference | None:
    dtypes = a.dtype_of(name), b.dtype_of(name)
    row_bytes = torch.Size(shape[1:]).numel() * max(dtype.itemsize for dtype in dtypes)
    step = max(1, BLOCK_BYTES // row_bytes)
    worst, same = 0.0, dtypes[0] == dtypes[1]
    for start in range(0, shape[0], step):
        rows = (start, min(start + step, shape[0]))
        left, right = a.read(name, rows), b.read(name, rows)
        if dtypes[0] != dtypes[1] or not _same_bits(left, right):
            same = False
            worst = max(worst, _max_abs_diff(_numbers(left), _numbers(right)))
    names = tuple(str(dtype).removeprefix("torch.") for dtype in dtypes)
    return None if same else TensorDifference(name, (names[0], names[1]), worst)


def _same_bits(left: Tensor, right: Tensor) -> bool:
    """Equal bit for bit, so that NaNs compare too and -0 is not 0."""
    view = _BIT_VIEWS[left.dtype.itemsize]
    return torch.equal(left.view(view), right.view(view))


def _numbers(block: Tensor) -> Tensor:
    """What a block stands for in fp64; bytes hold two int4 each."""
    return (unpack_int4(block) if block.dtype == torch.uint8 else block).double()


def _max_abs_diff(left: Tensor, right: Tensor) -> float:
    equal = (left == right) | (left.isnan() & right.isnan())
    diff = torch.where(equal, 0.0, left - right).abs()
    return float(diff.nan_to_num(nan=torch.inf).max())
