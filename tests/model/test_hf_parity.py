"""The network computes what transformers computes: logits within 1e-4 in fp32, and the same greedy tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_infer.model_config import ModelConfig
from megatron_infer.sampling_params import SamplingParams
from megatron_infer.tensor_parallel.group import TPGroup
from tests.support.parity import all_logits, load_tensors, transformers_model
from tests.support.tiny_models import (
    CPU,
    Tensors,
    generate,
    generate_on_ranks,
    make_engine,
    make_runner,
    random_tensors,
    tiny_config,
)

LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
MODELS: dict[str, dict[str, Any]] = {
    "mha": {"num_key_value_heads": 8},
    "gqa 4:1, head_dim 128": {"head_dim": 128, "num_attention_heads": 4, "num_key_value_heads": 1},
    "gqa 8:1, head_dim 64": {"head_dim": 64, "num_key_value_heads": 1},
    "explicit head_dim": {"head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 2},
    "qkv bias": {"attention_bias": True},
    "all biases, tied head": {
        "attention_bias": True,
        "attention_output_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
    },
    "linear scaling": {"rope_scaling": LINEAR},
    "yarn": {"rope_scaling": YARN, "max_position_embeddings": 512},
    "vocabulary and ffn that divide unevenly": {"vocab_size": 509, "intermediate_size": 200},
}
TP_SIZES = (1, 2, 4)
NUM_NEW_TOKENS = 64


def config_of(changes: dict[str, Any]) -> ModelConfig:
    config = tiny_config(**{k: v for k, v in changes.items() if k != "rope_scaling"})
    if "rope_scaling" not in changes:
        return config
    return ModelConfig.from_hf({**config.to_hf(), "rope_theta": 1e4, "rope_scaling": changes["rope_scaling"]})


def reference_model(config: ModelConfig, tensors: Tensors, directory: Path) -> torch.nn.Module:
    model = transformers_model(config.to_hf(), directory)
    load_tensors(model, tensors)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_greedy_tokens_equal_transformers(tmp_path: Path, name: str) -> None:
    config = config_of(MODELS[name])
    tensors = random_tensors(config, seed=len(name))
    reference = reference_model(config, tensors, tmp_path)
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(3, config.vocab_size, (150,), generator=generator).tolist()
    with torch.no_grad():
        expected_TV = reference(torch.tensor([prompt])).logits[0]
        ids = reference.generate(
            torch.tensor([prompt]), max_new_tokens=NUM_NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0, len(prompt) :].tolist()
    sampling = SamplingParams(max_new_tokens=NUM_NEW_TOKENS, ignore_eos=True)
    for size in TP_SIZES:
        logits_TV = all_logits(config, tensors, prompt, size)
        assert (logits_TV - expected_TV).abs().max() < 1e-4, f"tp {size}"
        output = generate_on_ranks(size, config, tensors, [prompt], sampling)[0]
        assert [token for token, _ in output] == ids, f"tp {size}"


def test_contexts_past_4096_tokens_equal_transformers(tmp_path: Path) -> None:
    """Where the model's original engine crashes."""
    config = tiny_config(num_hidden_layers=1, max_position_embeddings=32768)
    tensors = random_tensors(config, seed=4)
    prompt = torch.randint(3, config.vocab_size, (4500,), generator=torch.Generator().manual_seed(2)).tolist()
    with torch.no_grad():
        expected_V = reference_model(config, tensors, tmp_path)(torch.tensor([prompt]), logits_to_keep=1).logits[0, -1]
    runner = make_runner(config, tensors, TPGroup.single(CPU), num_blocks=300)
    sampling = SamplingParams(max_new_tokens=1, logprobs=1, ignore_eos=True)
    ((token, logprob),) = generate(make_engine(runner, max_num_batched_tokens=1024), [prompt], sampling)[0]
    assert token == expected_V.argmax()
    assert abs(logprob - expected_V.log_softmax(0)[token]) < 1e-4
