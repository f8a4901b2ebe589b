"""Shared fixtures: one tiny checkpoint on disk for every test that starts whole sessions."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from checkpoints_convert.export import save_sharded
from megatron_infer.model_config import ModelConfig
from tests.support.tiny_models import Tensors, random_tensors, tiny_config
from tests.support.tiny_tokenizer import build_tiny_tokenizer


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded directory (two files) of a random model with an aiXcoder-like tokenizer."""
    root = tmp_path_factory.mktemp("tiny")
    tokenizer = build_tiny_tokenizer(root / "tokenizer")
    config = tiny_config()
    tensors = random_tensors(config, seed=9, dtype=torch.bfloat16)
    out = root / "checkpoint"
    save_sharded(tensors.read, config, out, 2, extra_files=[tokenizer])
    return out


@pytest.fixture(scope="session")
def config() -> ModelConfig:
    return tiny_config()


@pytest.fixture(scope="session")
def tensors(config: ModelConfig) -> Tensors:
    """Weights for tests that start engines without a checkpoint; nobody writes to them."""
    return random_tensors(config, seed=3, dtype=torch.bfloat16)


@pytest.fixture(autouse=True, scope="session")
def ctrl_c_interrupts() -> None:
    """However the tests were started: the jobs that a shell runs in the background are born ignoring Ctrl-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
