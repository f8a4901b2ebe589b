"""The logits of this network and of transformers for one config.json, read by each in its own way."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

from megatron_infer.engine.batch import Layout, Uploads
from megatron_infer.engine.step import Step
from megatron_infer.model.formats import TensorSource
from megatron_infer.model.weights import hf_name
from megatron_infer.model_config import ModelConfig
from megatron_infer.tensor_parallel.group import TPGroup
from tests.support.tiny_models import CPU, Tensors, make_runner, on_ranks

SMALL: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "torch_dtype": "float32",
}
PROMPT = torch.randint(3, 96, (150,), generator=torch.Generator().manual_seed(1)).tolist()


def all_logits(config: ModelConfig, tensors: TensorSource, prompt: list[int], size: int) -> torch.Tensor:
    """logits_TV of the network on `size` ranks, in fp32."""
    length = len(prompt)
    step = Step(
        token_ids_T=np.array(prompt, dtype=np.int32),
        query_lens_S=np.array([length], dtype=np.int32),
        context_lens_S=np.array([length], dtype=np.int32),
        block_tables=[np.arange(-(-length // 16), dtype=np.int32)],
        num_samples_S=np.array([1], dtype=np.int32),
        copies_C3=np.zeros((0, 3), dtype=np.int32),
        full_logits=True,
    )

    def work(group: TPGroup) -> torch.Tensor:
        runner = make_runner(config, tensors, group)
        with torch.no_grad():
            layout = Layout.of(step)
            batch = layout.batch(layout.upload(step, 16, Uploads(CPU)))
            hidden_TD = runner.model.forward(batch, runner.kv)
            return runner.model.head.gather(runner.model.logits(hidden_TD))

    return on_ranks(size, work)[0]


def transformers_model(raw: dict[str, Any], directory: Path) -> torch.nn.Module:
    """What transformers makes of this config.json, its weights random."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(raw))
    config = transformers.AutoConfig.from_pretrained(directory)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def load_tensors(model: torch.nn.Module, tensors: Tensors) -> None:
    """Give a transformers model these weights, all of which it must know."""
    missing, unexpected = model.load_state_dict({hf_name(n): t for n, t in tensors.items()}, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    model.tie_weights()


def write_hf(directory: Path, raw: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> Path:
    """A Hugging Face directory of a config.json and tensors under the names they are stored by; returns it."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(raw))
    save_file(
        {name: tensor.clone() for name, tensor in tensors.items()}, directory / "model.safetensors", {"format": "pt"}
    )
    return directory


def stored(tensors: Tensors) -> dict[str, torch.Tensor]:
    """Tensors under Hugging Face names."""
    return {hf_name(name): tensor for name, tensor in tensors.items()}


def transformers_logits(directory: Path) -> torch.Tensor:
    """logits_TV of PROMPT, by what transformers loads from a directory."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        logits_TV: torch.Tensor = model(torch.tensor([PROMPT])).logits[0]
    return logits_TV
