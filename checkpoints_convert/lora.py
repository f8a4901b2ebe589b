"""A PEFT LoRA adapter, checked against its base and merged slice by slice.

Owns the adapter's files and arithmetic. Works on canonical (de-fused) names, so that q, k and v deltas land right
whatever layout is read or written.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints_convert.export import converted
from megatron_infer.files import read_json_object
from megatron_infer.model.checkpoint import Checkpoint
from megatron_infer.model.tensor_files import SafetensorsFile
from megatron_infer.model.weights import expected_tensors, hf_name
from megatron_infer.model_config import ModelConfig

_KEY = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight")
_MERGEABLE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_MUST_BE_OFF = {
    "use_dora": "DoRA rescales whole rows",
    "use_qalora": "it was made for a quantized base",
    "modules_to_save": "it replaces whole modules",
    "layer_replication": "it changes the number of layers",
    "trainable_token_indices": "it changes embedding rows",
    "target_parameters": "it changes parameters that are not linear layers",
    "alora_invocation_tokens": "it acts on part of a sequence only",
    "lora_bias": "it has biases of its own",
    "fan_in_fan_out": "it is for transposed weights",
}
"""Keys of adapter_config.json that must be unset, and why the adapter cannot be merged when they are."""
_BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Delta:
    """What is added to a matrix: scale * B A, with A [r, in] and B [out, r] in fp64."""

    a: Tensor
    b: Tensor
    scale: float

    def read(self, rows: tuple[int, int], cols: tuple[int, int]) -> Tensor:
        """A slice of the delta in fp32. The product is made in fp64, so that no slicing changes a bit of it."""
        product = self.b[slice(*rows)] @ self.a[:, slice(*cols)]
        return (self.scale * product).float()


@dataclass(frozen=True)
class Adapter:
    """Deltas by canonical tensor name."""

    deltas: Mapping[str, Delta]

    @classmethod
    def open(cls, directory: Path, config: ModelConfig) -> Adapter:
        """Read and validate an adapter for a base of this shape.

        Raises:
            ValueError: not a LoRA adapter, one that is more than additions to linear layers, or one for another base.
        """
        raw = _adapter_config(directory)
        path = directory / "adapter_model.safetensors"
        if not path.is_file():
            raise ValueError(f"{path} does not exist; an adapter is read from safetensors only, save it as that")
        file = SafetensorsFile(path)
        modules = {hf_name(name).removesuffix(".weight"): name for name in expected_tensors(config)}
        pairs: dict[str, dict[str, Tensor]] = {}
        for key, info in file.tensors.items():
            match = _KEY.fullmatch(key)
            if match is None or match[1] not in modules or match[1].rpartition(".")[2] not in _MERGEABLE:
                raise ValueError(
                    f"{path}: {key!r} cannot be merged; only lora_A and lora_B of {', '.join(_MERGEABLE)} of this base "
                    "can. Merge it with PEFT, or train an adapter without it"
                )
            if len(info.shape) != 2:
                raise ValueError(f"{path}: {key!r} has shape {list(info.shape)}, a matrix is expected")
            pairs.setdefault(match[1], {})[match[2]] = file.read(key, (0, info.shape[0]), None).double()
        if not pairs:
            raise ValueError(f"{path} holds no LoRA matrices")
        shapes = expected_tensors(config)
        return cls(
            {
                modules[module]: _delta(path, module, pair, shapes[modules[module]], raw)
                for module, pair in pairs.items()
            }
        )


class MergedReader:
    """Reads a checkpoint as if the adapter were part of it; changed tensors come in `dtype` (None: as the base's)."""

    def __init__(self, base: Checkpoint, adapter: Adapter, dtype: torch.dtype | None) -> None:
        self._base, self._adapter, self._dtype = base, adapter, dtype
        self._shapes = expected_tensors(base.config)

    def read(self, name: str, rows: tuple[int, int] | None = None, cols: tuple[int, int] | None = None) -> Tensor:
        """A slice of a canonical tensor, as `Checkpoint.read`."""
        block = self._base.read(name, rows, cols)
        delta = self._adapter.deltas.get(name)
        if delta is None:
            return block
        out_dim, in_dim = self._shapes[name]
        merged = block.float() + delta.read(rows or (0, out_dim), cols or (0, in_dim))
        if not bool(merged.isfinite().all()):
            raise ValueError(f"merging makes tensor {name!r} infinite or NaN; the adapter or the base is damaged")
        return converted(merged, self._dtype or block.dtype, name)


def _adapter_config(directory: Path) -> dict[str, Any]:
    path = directory / "adapter_config.json"
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give a directory that PEFT saved an adapter in")
    raw = read_json_object(path)
    if raw.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type {raw.get('peft_type')!r} cannot be merged, only LORA can")
    for key, reason in _MUST_BE_OFF.items():
        if raw.get(key):
            raise ValueError(f"{path}: an adapter with {key} cannot be merged ({reason}); merge it with PEFT")
    if raw.get("bias", "none") != "none":
        raise ValueError(f"{path}: bias {raw['bias']!r} cannot be merged, only 'none' can; merge it with PEFT")
    start = raw.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_BASE_CHANGING):
        raise ValueError(
            f"{path}: init_lora_weights {start!r} changes the base before training, so the adapter is not an addition "
            "to the published base; convert it to a plain LoRA with PEFT first"
        )
    rank = raw.get("r")
    if not isinstance(rank, int) or rank < 1 or not isinstance(raw.get("lora_alpha"), (int, float)):
        raise ValueError(f"{path}: r must be a positive integer and lora_alpha a number")
    return raw


def _delta(
    path: Path, module: str, pair: Mapping[str, Tensor], shape: tuple[int, ...], raw: Mapping[str, Any]
) -> Delta:
    missing = [letter for letter in "AB" if letter not in pair]
    if missing:
        raise ValueError(f"{path}: lora_{missing[0]} of {module!r} is missing; save the adapter again")
    rank = int(_pattern(raw.get("rank_pattern"), module, raw["r"]))
    alpha = float(_pattern(raw.get("alpha_pattern"), module, raw["lora_alpha"]))
    expected = {"A": (rank, shape[1]), "B": (shape[0], rank)}
    for letter, tensor in pair.items():
        if tuple(tensor.shape) != expected[letter]:
            raise ValueError(
                f"{path}: lora_{letter} of {module!r} has shape {list(tensor.shape)}, expected "
                f"{list(expected[letter])} (r = {rank}); the adapter is for another base"
            )
    return Delta(pair["A"], pair["B"], alpha / (math.sqrt(rank) if raw.get("use_rslora") else rank))


def _pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's exceptions by module: the first pattern (regular expression) that is the module's name or its end."""
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", module):
            return value
    return default
