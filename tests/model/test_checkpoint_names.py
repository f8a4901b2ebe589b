"""The names that other programs save tensors under: read as what they are, or refused by the name of what they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_infer.model.checkpoint import open_checkpoint
from megatron_infer.model.naming import is_derived
from megatron_infer.model.weights import hf_tensors, megatron_tensors
from megatron_infer.model_config import ModelConfig
from tests.support.checkpoint_cases import CONFIGS
from tests.support.parity import SMALL, stored, write_hf
from tests.support.tiny_models import random_tensors

CONFIG = ModelConfig.from_hf(SMALL)
TENSORS = stored(random_tensors(CONFIG, seed=3))
NORM = "model.norm.weight"


def assert_read(directory: Path) -> tuple[str, ...]:
    """Every tensor is the one of its name; returns the notes."""
    with open_checkpoint(directory) as checkpoint:
        for name, tensor in random_tensors(CONFIG, seed=3).items():
            assert torch.equal(checkpoint.read(name), tensor), name
        return checkpoint.notes


BUFFERS = [
    "model.layers.0.self_attn.rotary_emb.inv_freq",
    "model.layers.1.self_attn.rotary_emb.cos_cached",
    "model.layers.1.self_attn.rotary_emb.sin_cached",
    "model.rotary_emb.inv_freq",
    "model.rotary_emb.original_inv_freq",
    "rope.freqs",
    "freqs_cis",
    "model.layers.0.attn.bias",
    "model.layers.0.self_attn.bias",
    "model.layers.0.attn.masked_bias",
    "model.causal_mask",
    "model.embed_tokens.position_ids",
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool], ids=str)
def test_derived_buffers_are_ignored_with_a_note(tmp_path: Path, dtype: torch.dtype) -> None:
    notes = assert_read(
        write_hf(tmp_path / "hf", SMALL, {**TENSORS, **{n: torch.ones(1, 1, 4, 2).to(dtype) for n in BUFFERS}})
    )
    assert BUFFERS[0] in notes[-1] or f"and {len(BUFFERS) - 3} more" in notes[-1]


def test_no_weight_is_taken_for_a_buffer() -> None:
    for config in CONFIGS.values():
        for name in [*hf_tensors(config), *megatron_tensors(config)]:
            assert not is_derived(name), name
    for name in ("model.layers.0.self_attn.q_proj.bias", "lm_head.bias", "model.layers.0.mlp.gate.bias", "lora.a"):
        assert not is_derived(name), name


Renaming = Callable[[str], str]
LOADS: dict[str, Renaming] = {
    "module.": lambda n: f"module.{n}",
    "_orig_mod.": lambda n: f"_orig_mod.{n}",
    "module._orig_mod.": lambda n: f"module._orig_mod.{n}",
    "_orig_mod.module.": lambda n: f"_orig_mod.module.{n}",
    "an extra model.": lambda n: f"model.{n}",
    "module.model.": lambda n: f"module.model.{n}",
    "no model.": lambda n: n.removeprefix("model."),
    "module. and no model.": lambda n: "module." + n.removeprefix("model."),
    "_orig_mod. within": lambda n: n.replace("model.", "model._orig_mod."),
    "FSDP around each layer": lambda n: n.replace("self_attn", "_fsdp_wrapped_module.self_attn"),
    "a checkpointed layer": lambda n: n.replace(".mlp.", "._checkpoint_wrapped_module.mlp."),
}


@pytest.mark.parametrize("name", LOADS)
@pytest.mark.parametrize("kind", ["safetensors", "indexed", "bin"])
def test_names_in_a_wrapper_are_read_and_said(tmp_path: Path, name: str, kind: str) -> None:
    renamed = {LOADS[name](key): tensor for key, tensor in TENSORS.items()}
    renamed[LOADS[name](BUFFERS[0])] = torch.ones(8)
    directory = write_hf(tmp_path / "hf", SMALL, renamed)
    if kind == "bin":
        (directory / "model.safetensors").unlink()
        torch.save(renamed, directory / "pytorch_model.bin")
    elif kind == "indexed":
        (directory / "model.safetensors").unlink()
        files = {key: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, key in enumerate(renamed)}
        for file in set(files.values()):
            save_file({key: renamed[key].clone() for key in renamed if files[key] == file}, directory / file)
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    notes = assert_read(directory)
    changed = sum(LOADS[name](key) != key for key in TENSORS)
    assert any(f"{changed} names are read without their wrappers" in note for note in notes)


def test_names_as_they_should_be_are_not_remarked_on(tmp_path: Path) -> None:
    assert len(assert_read(write_hf(tmp_path / "hf", SMALL, TENSORS))) == 1


REFUSED: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "an unknown wrapper": (
        lambda t: {f"policy.net.{key}": value for key, value in t.items()},
        r"all 21 names begin with 'policy\.net\.(model\.)?', .*save the model that is inside",
    ),
    "one tensor under two names": (
        lambda t: {**t, f"module.{NORM}": t[NORM]},
        rf"tensor 'module\.{NORM}' .* is not part of this model",
    ),
    "a PEFT model": (
        lambda t: {
            **{f"base_model.model.{key}": value for key, value in t.items()},
            "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight": torch.ones(2, 64),
        },
        r"PEFT model .*checkpoints_convert merge-lora BASE ADAPTER OUT",
    ),
    "a PEFT model under names of its own": (
        lambda t: {**t, "model.layers.0.self_attn.q_proj.base_layer.weight": torch.ones(64, 64)},
        r"base_layer.*PEFT model",
    ),
    "an adapter beside the weights": (
        lambda t: {**t, "model.layers.0.self_attn.q_proj.lora_B.weight": torch.ones(64, 2)},
        r"lora_B.*PEFT model",
    ),
    "a tensor of another network": (
        lambda t: {**t, "model.layers.0.self_attn.q_norm.weight": torch.ones(16)},
        r"'model\.layers\.0\.self_attn\.q_norm\.weight' .* is not part of this model",
    ),
    "a wrapped tensor missing": (
        lambda t: {f"module.{key}": value for key, value in t.items() if key != NORM},
        rf"tensor '{NORM}' is missing",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_names_are_refused_by_what_they_are(tmp_path: Path, name: str) -> None:
    change, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        open_checkpoint(write_hf(tmp_path / "hf", SMALL, change(dict(TENSORS))))


def test_an_adapter_given_as_a_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"It holds a PEFT adapter: merge it with python -m checkpoints_convert"):
        open_checkpoint(tmp_path)
