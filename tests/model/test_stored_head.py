"""A head stored beside `tie_word_embeddings` counts where it is no copy of the embedding, as with transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoints_convert import hf2megatron, megatron2hf, reshard
from megatron_infer.model.checkpoint import Checkpoint, open_checkpoint
from megatron_infer.model_config import ModelConfig
from tests.support.parity import PROMPT, SMALL, all_logits, stored, transformers_logits, write_hf
from tests.support.tiny_models import random_tensors

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
RAW: dict[str, Any] = {**SMALL, "tie_word_embeddings": True, "vocab_size": 5000}
"""Of more rows than are compared at a time."""


def tensors_with(head: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    named = stored(random_tensors(ModelConfig.from_hf(RAW), seed=3))
    return {**named, HEAD: head(named[EMBEDDING].clone())}


def changed(at: tuple[int, int]) -> Callable[[Tensor], Tensor]:
    def change(head_VD: Tensor) -> Tensor:
        head_VD[at] += 3.0
        return head_VD

    return change


def assert_parity(checkpoint: Checkpoint, expected_TV: Tensor) -> None:
    alone_TV, on_two_TV = (all_logits(checkpoint.config, checkpoint, PROMPT, size) for size in (1, 2))
    assert (alone_TV - expected_TV).abs().max() < 1e-4
    assert torch.equal(alone_TV, on_two_TV)


@pytest.mark.parametrize("at", [(0, 0), (4999, 63)], ids=["first", "last"])
def test_a_head_that_is_no_copy_is_used_and_said(tmp_path: Path, at: tuple[int, int]) -> None:
    directory = write_hf(tmp_path / "hf", RAW, tensors_with(changed(at)))
    with open_checkpoint(directory) as checkpoint:
        assert not checkpoint.config.tie_word_embeddings
        assert any("tie_word_embeddings" in note and HEAD in note for note in checkpoint.notes)
        assert_parity(checkpoint, transformers_logits(directory))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_copy_is_ignored_in_whatever_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    named = {name: tensor.bfloat16() for name, tensor in tensors_with(lambda head_VD: head_VD).items()}
    named[HEAD] = named[HEAD].to(dtype)
    directory = write_hf(tmp_path / "hf", RAW, named)
    with open_checkpoint(directory) as checkpoint:
        assert checkpoint.config.tie_word_embeddings
        assert HEAD in checkpoint.notes[-1]
        assert "output.weight" not in list(checkpoint.names())
        assert_parity(checkpoint, transformers_logits(directory))


def test_a_head_of_another_shape_is_refused_by_name(tmp_path: Path) -> None:
    directory = write_hf(tmp_path / "hf", RAW, tensors_with(lambda head_VD: head_VD[:-1]))
    with pytest.raises(ValueError, match=r"'lm_head\.weight' .*has shape \[4999, 64\], expected \[5000, 64\]"):
        open_checkpoint(directory)


def test_a_missing_head_suggests_that_it_is_tied(tmp_path: Path) -> None:
    named = tensors_with(lambda head_VD: head_VD)
    del named[HEAD]
    directory = write_hf(tmp_path / "hf", {**RAW, "tie_word_embeddings": False}, named)
    with pytest.raises(ValueError, match=r"lm_head\.weight' is missing.*set tie_word_embeddings to true"):
        open_checkpoint(directory)
    write_hf(directory, RAW, named)
    with open_checkpoint(directory) as checkpoint:
        assert_parity(checkpoint, transformers_logits(directory))


@pytest.mark.parametrize("fmt", ["sharded", "pt"])
def test_conversions_keep_the_head_that_counts(tmp_path: Path, fmt: str) -> None:
    directory = write_hf(tmp_path / "hf", RAW, tensors_with(changed((7, 0))))
    expected_TV = transformers_logits(directory)
    hf2megatron(directory, tmp_path / "megatron", tp=2, fmt=fmt)
    megatron2hf(tmp_path / "megatron", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["tie_word_embeddings"] is False
    for converted in ("megatron", "back"):
        with open_checkpoint(tmp_path / converted) as checkpoint:
            assert_parity(checkpoint, expected_TV)
    assert (transformers_logits(tmp_path / "back") - expected_TV).abs().max() < 1e-5


@pytest.mark.parametrize("fmt", ["sharded", "pt"])
def test_the_head_of_megatron_files_is_compared_too(tmp_path: Path, fmt: str) -> None:
    """Files that hold a head, beside a config.json that was edited to tie it."""
    for name, head, is_tied in (("other", changed((7, 0)), False), ("copy", lambda head_VD: head_VD, True)):
        untied = {**RAW, "tie_word_embeddings": False}
        write_hf(tmp_path / name, untied, tensors_with(head))
        hf2megatron(tmp_path / name, tmp_path / f"{name}-2", tp=2, fmt=fmt)
        path = tmp_path / f"{name}-2" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": True}))
        (tmp_path / f"{name}-2" / "manifest.json").unlink(missing_ok=True)
        with open_checkpoint(tmp_path / f"{name}-2") as checkpoint:
            assert checkpoint.config.tie_word_embeddings is is_tied
            assert_parity(checkpoint, transformers_logits(tmp_path / name))
        reshard(tmp_path / f"{name}-2", tmp_path / f"{name}-1", tp=1)
        with open_checkpoint(tmp_path / f"{name}-1") as checkpoint:
            assert checkpoint.config.tie_word_embeddings is is_tied
