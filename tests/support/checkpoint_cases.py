"""A small model whose tensors are known, and writers of every kind of checkpoint, for the checkpoint tests."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints_convert import export
from megatron_infer.model.checkpoint import Checkpoint
from megatron_infer.model.weights import expected_tensors, hf_name
from megatron_infer.model_config import ModelConfig
from tests.support.gguf_files import write_gguf

NAME = "tiny"
HF = "model.safetensors"
PT = f"{NAME}.pt"
W1 = "layers.1.feed_forward.w1.weight"
PLAIN = ModelConfig(
    vocab_size=72,
    hidden_size=32,
    intermediate_size=56,
    num_hidden_layers=2,
    num_attention_heads=16,
    num_key_value_heads=4,
    head_dim=4,
    max_position_embeddings=64,
    rms_norm_eps=1e-6,
)
CONFIGS = {
    "plain": PLAIN,
    "qkv-bias": replace(PLAIN, attention_bias=True),
    "qk-norm": replace(PLAIN, qk_norm=True),
    "all-biases-tied": replace(
        PLAIN, attention_bias=True, attention_output_bias=True, mlp_bias=True, tie_word_embeddings=True
    ),
}


@dataclass(frozen=True)
class Model:
    """A random model held in memory: the truth that checkpoints are compared with."""

    config: ModelConfig
    tensors: dict[str, Tensor]

    def read(self, name: str, rows: tuple[int, int] | None = None, cols: tuple[int, int] | None = None) -> Tensor:
        tensor = self.tensors[name]
        tensor = tensor if rows is None else tensor[slice(*rows)]
        return tensor if cols is None else tensor[:, slice(*cols)]


def make_model(config: ModelConfig) -> Model:
    generator = torch.Generator().manual_seed(1)
    return Model(
        config,
        {
            name: torch.randn(shape, generator=generator).to(torch.bfloat16)
            for name, shape in expected_tensors(config).items()
        },
    )


def save_hf_bin(model: Model, out: Path) -> None:
    out.mkdir()
    (out / "config.json").write_text(json.dumps(model.config.to_hf()))
    torch.save({hf_name(name): tensor for name, tensor in model.tensors.items()}, out / "pytorch_model.bin")


def save_gguf(model: Model, out: Path) -> None:
    out.mkdir()
    write_gguf(out / "m.gguf", model.config, model)


WRITERS: dict[str, tuple[str, Callable[[Model, Path], Any]]] = {
    **{
        f"sharded-{n}": ("sharded-safetensors", lambda m, out, n=n: export.save_sharded(m.read, m.config, out, n))
        for n in (1, 2, 4)
    },
    "pt": ("megatron-pt", lambda m, out: export.save_upstream_pt(m.read, m.config, out, NAME, 1)),
    **{
        f"pt-{n}": ("megatron-pt-shards", lambda m, out, n=n: export.save_upstream_pt(m.read, m.config, out, NAME, n))
        for n in (2, 4)
    },
    "hf": ("hf-safetensors", lambda m, out: export.save_hf(m.read, m.config, out)),
    "hf-indexed": ("hf-safetensors", lambda m, out: export.save_hf(m.read, m.config, out, max_file_bytes=9000)),
    "hf-bin": ("hf-bin", save_hf_bin),
    "gguf": ("gguf", save_gguf),
}


MODEL = make_model(PLAIN)


def save(tmp_path: Path, writer: str) -> Path:
    """Write MODEL with one of WRITERS; returns the directory."""
    WRITERS[writer][1](MODEL, tmp_path / writer)
    return tmp_path / writer


def assert_same(checkpoint: Checkpoint, model: Model) -> None:
    """Every tensor whole, every tensor-parallel slice, and random slices equal the truth."""
    rng = random.Random(0)
    assert list(checkpoint.names()) == list(model.tensors)
    for name, truth in model.tensors.items():
        ranges = []
        for size in truth.shape:
            cuts = [(size * r // n, size * (r + 1) // n) for n in (1, 2, 4, 8) for r in range(n)]
            cuts += [tuple(sorted(rng.sample(range(size + 1), 2))) for _ in range(4)]
            ranges.append([None, (0, 0), (size, size), *cuts])
        for rows in ranges[0]:
            for cols in ranges[1] if truth.dim() == 2 and rows in (None, *ranges[0][-2:]) else [None]:
                got = checkpoint.read(name, rows, cols)
                assert got.is_contiguous()
                assert torch.equal(got, model.read(name, rows, cols)), (name, rows, cols)
