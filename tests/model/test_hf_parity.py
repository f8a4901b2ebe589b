"""The network computes what transformers computes: logits within 1e-4 in fp32, and the same greedy tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers

from megatron_infer.engine.batch import Layout, Uploads
from megatron_infer.engine.step import Step
from megatron_infer.model.weights import hf_name
from megatron_infer.model_config import ModelConfig
from megatron_infer.sampling_params import SamplingParams
from megatron_infer.tensor_parallel.group import TPGroup
from tests.support.tiny_models import (
    CPU,
    Tensors,
    generate,
    generate_on_ranks,
    make_engine,
    make_runner,
    on_ranks,
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
    raw = {**tiny_config().to_hf()}
    config = tiny_config(**{k: v for k, v in changes.items() if k != "rope_scaling"})
    if "rope_scaling" not in changes:
        return config
    raw = {**config.to_hf(), "rope_scaling": None, "rope_parameters": {**changes["rope_scaling"], "rope_theta": 1e4}}
    return ModelConfig.from_hf({**raw, "rope_theta": 1e4})


def reference_model(config: ModelConfig, tensors: Tensors) -> torch.nn.Module:
    kind = transformers.Qwen2ForCausalLM if config.to_hf()["model_type"] == "qwen2" else transformers.LlamaForCausalLM
    raw = {k: v for k, v in config.to_hf().items() if k not in ("architectures", "torch_dtype", "rope_scaling", "fim")}
    raw["rope_parameters"] = {k: v for k, v in raw["rope_parameters"].items()}
    model = kind(kind.config_class(**raw)).float().eval()
    missing, unexpected = model.load_state_dict({hf_name(n): t for n, t in tensors.items()}, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model


def all_logits(config: ModelConfig, tensors: Tensors, prompt: list[int], size: int) -> torch.Tensor:
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


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_greedy_tokens_equal_transformers(name: str) -> None:
    config = config_of(MODELS[name])
    tensors = random_tensors(config, seed=len(name))
    reference = reference_model(config, tensors)
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


def test_contexts_past_4096_tokens_equal_transformers() -> None:
    """Where the model's original engine crashes."""
    config = tiny_config(num_hidden_layers=1, max_position_embeddings=32768)
    tensors = random_tensors(config, seed=4)
    prompt = torch.randint(3, config.vocab_size, (4500,), generator=torch.Generator().manual_seed(2)).tolist()
    with torch.no_grad():
        expected_V = reference_model(config, tensors)(torch.tensor([prompt]), logits_to_keep=1).logits[0, -1]
    runner = make_runner(config, tensors, TPGroup.single(CPU), num_blocks=300)
    sampling = SamplingParams(max_new_tokens=1, logprobs=1, ignore_eos=True)
    ((token, logprob),) = generate(make_engine(runner, max_num_batched_tokens=1024), [prompt], sampling)[0]
    assert token == expected_V.argmax()
    assert abs(logprob - expected_V.log_softmax(0)[token]) < 1e-4
