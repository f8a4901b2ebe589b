"""Every way a config.json may say it: what transformers computes, to 1e-4, or a refusal that names the fields."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_infer.model_config import ModelConfig
from tests.support.parity import PROMPT, SMALL, all_logits, load_tensors, transformers_model
from tests.support.tiny_models import random_tensors

YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}
ABSENT = ...
MISTRAL = {"model_type": "mistral", "sliding_window": None}
QWEN2 = {"model_type": "qwen2"}
QWEN3 = {"model_type": "qwen3", "head_dim": 16}


def yarn(**changes: Any) -> dict[str, Any]:
    return {"rope_scaling": {**YARN, **changes}}


ACCEPTED: dict[str, dict[str, Any]] = {
    "llama": {},
    "what llama leaves unsaid": {"num_key_value_heads": ABSENT, "max_position_embeddings": ABSENT},
    "null for a default": {"num_key_value_heads": None, "head_dim": None, "rope_scaling": None, "eos_token_id": None},
    "an explicit head_dim": {"head_dim": 24},
    "all biases": {"attention_bias": True, "mlp_bias": True},
    "a tied head": {"tie_word_embeddings": True},
    "uneven sizes": {"vocab_size": 251, "intermediate_size": 75},
    "swish": {"hidden_act": "swish"},
    "another epsilon": {"rms_norm_eps": 1e-3},
    "theta at the top": {"rope_theta": 500000.0},
    "theta in rope_parameters": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "theta twice, the same": {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "theta an integer": {"rope_theta": 1000000},
    "linear, as transformers 4 has it": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "linear by both names": {"rope_scaling": {"type": "linear", **LINEAR}},
    "linear in rope_parameters": {"rope_parameters": {**LINEAR, "rope_theta": 1e5}},
    "linear over default rope_parameters": {"rope_scaling": LINEAR, "rope_parameters": DEFAULT},
    "empty rope_scaling beside rope_parameters": {"rope_scaling": {}, "rope_parameters": {**LINEAR}},
    "null rope_scaling beside rope_parameters": {"rope_scaling": None, "rope_parameters": {**LINEAR}},
    "a scaling said twice, the same": {"rope_scaling": LINEAR, "rope_parameters": {**LINEAR, "rope_theta": 1e4}},
    "a default that has a factor": {"rope_scaling": {"rope_type": "default", "factor": 4.0}},
    "original context of no scaling": {"original_max_position_embeddings": 64},
    "yarn": yarn(),
    "yarn pasted over rope_parameters": {**yarn(), "rope_parameters": DEFAULT},
    "yarn pasted, theta at the top": {
        **yarn(),
        "rope_theta": 1e6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    "yarn in rope_parameters": {"rope_parameters": {"rope_theta": 1e5, **yarn(rope_type="yarn")["rope_scaling"]}},
    "yarn, original context at the top": {
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
        "original_max_position_embeddings": 32,
    },
    "yarn, original context twice, the same": {**yarn(), "original_max_position_embeddings": 64},
    "yarn without an original context": {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
    "yarn of an odd factor": yarn(factor=3.3),
    "yarn of factor 1": yarn(factor=1),
    "yarn, betas": yarn(beta_fast=16, beta_slow=2),
    "yarn, betas of 0": yarn(beta_fast=0, beta_slow=0),
    "yarn, null betas": yarn(beta_fast=None, beta_slow=None, mscale=None),
    "yarn, one mscale": yarn(mscale=0.7),
    "yarn, both mscales": yarn(mscale=0.7, mscale_all_dim=1.3),
    "yarn, attention_factor": yarn(attention_factor=1.7),
    "yarn, attention_factor 0": yarn(attention_factor=0.0),
    "yarn, not truncated": yarn(truncate=False),
    "yarn and fields of another type": yarn(low_freq_factor=1.0),
    "llama3": {"rope_theta": 500000.0, "rope_scaling": LLAMA3},
    "llama3 in rope_parameters": {"rope_parameters": {**LLAMA3, "rope_theta": 500000.0}},
    "llama3, a wide blend": {"rope_scaling": {**LLAMA3, "factor": 32.0, "low_freq_factor": 0.5}, "head_dim": 32},
    "llama3, original context at the top": {
        "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "original_max_position_embeddings"},
        "original_max_position_embeddings": 32,
    },
    "llama3 without an original context": {
        "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "original_max_position_embeddings"},
    },
    "llama has no window": {"sliding_window": 16},
    "mistral, no window": MISTRAL,
    "mistral, a window as long as the context": {**MISTRAL, "sliding_window": 256},
    "mistral, the default window as long as the context": {
        "model_type": "mistral",
        "sliding_window": ABSENT,
        "max_position_embeddings": 4096,
    },
    "mistral has no biases": {**MISTRAL, "attention_bias": True, "mlp_bias": True},
    "mistral has 8 KV heads": {**MISTRAL, "num_key_value_heads": ABSENT, "num_attention_heads": 16},
    "qwen2": QWEN2,
    "qwen2 has its biases": {**QWEN2, "attention_bias": False},
    "qwen2, a window that is off": {**QWEN2, "sliding_window": 16, "use_sliding_window": False},
    "qwen2, a window of no layer": {**QWEN2, "sliding_window": 16, "use_sliding_window": True},
    "qwen2, layers without a window": {**QWEN2, "layer_types": ["full_attention"] * 2},
    "qwen2, tied, yarn": {**QWEN2, **yarn(), "tie_word_embeddings": True, "rope_theta": 1e6},
    "qwen3": QWEN3,
    "qwen3, its head_dim": {**QWEN3, "head_dim": ABSENT},
    "qwen3, all biases": {**QWEN3, "attention_bias": True},
    "qwen3, tied, a head_dim of its own": {**QWEN3, "head_dim": 40, "tie_word_embeddings": True, "rope_theta": 1e6},
    "qwen3, one KV head, yarn": {**QWEN3, **yarn(), "num_key_value_heads": 1, "rms_norm_eps": 1e-2},
    "qwen3, a window that is off": {**QWEN3, "sliding_window": 16, "use_sliding_window": False},
    "begin token that is no row": {"bos_token_id": 96},
    "begin token -1": {"bos_token_id": -1},
    "several end tokens": {"eos_token_id": [2, 5]},
    "two dtypes": {"dtype": "float32", "torch_dtype": "float16"},
}


def config_json(changes: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in {**SMALL, **changes}.items() if value is not ABSENT}


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted_is_what_transformers_computes(tmp_path: Path, name: str) -> None:
    raw = config_json(ACCEPTED[name])
    model = transformers_model(raw, tmp_path)
    config = ModelConfig.from_dir(tmp_path)
    tensors = random_tensors(config, seed=len(name))
    load_tensors(model, tensors)
    with torch.no_grad():
        expected_TV = model(torch.tensor([PROMPT])).logits[0]
    alone_TV, on_two_TV = (all_logits(config, tensors, PROMPT, size) for size in (1, 2))
    assert (alone_TV - expected_TV).abs().max() < 1e-4
    assert torch.equal(alone_TV, on_two_TV)
    assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


def test_the_cases_differ_where_they_should(tmp_path: Path) -> None:
    """Were a scaling lost, the comparison above would notice: each kind moves the logits far more than 1e-4."""
    base = ModelConfig.from_hf(config_json({}))
    tensors = random_tensors(base, seed=0)
    plain_TV = all_logits(base, tensors, PROMPT, 1)
    for name in ("linear by both names", "yarn", "yarn, betas", "yarn, one mscale", "llama3", "theta at the top"):
        config = ModelConfig.from_hf(config_json(ACCEPTED[name]))
        assert (all_logits(config, tensors, PROMPT, 1) - plain_TV).abs().max() > 1e-2, name


@pytest.mark.parametrize(
    ("changes", "usable"),
    [
        (yarn(), 256),
        (yarn(factor=8.0), 512),
        (yarn(original_max_position_embeddings=16), 256),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, 1024),
        ({"rope_scaling": LINEAR}, 256),
        ({"rope_scaling": LLAMA3}, 256),
    ],
    ids=str,
)
def test_yarn_raises_the_usable_length_to_what_it_promises(changes: dict[str, Any], usable: int) -> None:
    config = ModelConfig.from_hf(config_json(changes))
    assert config.max_position_embeddings == usable
    assert ModelConfig.from_hf(config.to_hf()) == config


REFUSED: list[tuple[dict[str, Any], str]] = [
    # statements that contradict each other
    (
        {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        "rope_theta.*rope_parameters",
    ),
    (
        {**yarn(), "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        "rope_parameters.rope_theta.*rope_scal",
    ),
    ({"rope_scaling": {**LINEAR, "rope_theta": 1e5}, "rope_theta": 1e4}, "rope_theta.*rope_scaling"),
    ({"rope_scaling": LINEAR, "rope_parameters": {"rope_theta": 1e4, **YARN}}, "rope_scaling and rope_parameters"),
    ({"rope_scaling": {"type": "default"}, "rope_parameters": LINEAR}, "rope_scaling and rope_parameters"),
    (
        {**yarn(), "original_max_position_embeddings": 32},
        "original_max_position_embeddings is 32 .* 64 in rope_scaling",
    ),
    (yarn(rope_type="linear"), "rope_type 'linear' and type 'yarn'"),
    ({"is_causal": False}, "is_causal"),
    ({"is_causal": None}, "is_causal"),
    ({"model_type": ABSENT}, "model_type is missing"),
    ({"model_type": ["llama"]}, "model_type"),
    # what this network does not have
    ({"rope_scaling": {"factor": 4.0}}, "rope scaling has factor but no rope_type"),
    ({"rope_parameters": {"rope_theta": 1e4, "factor": 4.0}}, "factor but no rope_type"),
    (
        {"rope_parameters": {"full_attention": dict(LINEAR)}},
        "rope_parameters has settings of its own for full_attention",
    ),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope scaling type .*'dynamic'"),
    ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}}, "rope scaling type .*'longrope'"),
    ({"rope_scaling": {"rope_type": None, "factor": 2.0}}, "rope scaling type"),
    ({"rope_scaling": {"rope_type": ["yarn"], "factor": 2.0}}, "rope scaling type"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"per_layer_config": {"0": {"rms_norm_eps": 1e-2}}}, "per_layer_config"),
    (
        {"model_type": "mistral", "sliding_window": ABSENT, "max_position_embeddings": 8192},
        "sliding_window 4096 of 8192",
    ),
    ({"model_type": "mistral", "max_position_embeddings": ABSENT}, "sliding_window 4096 of 131072"),
    ({**MISTRAL, "sliding_window": 255}, "set max_position_embeddings to 255"),
    ({**MISTRAL, "sliding_window": 256, **yarn(factor=8.0)}, "sliding_window 256 of 512"),
    ({**MISTRAL, "sliding_window": 0}, "sliding_window must be"),
    ({**QWEN2, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}, "sliding-window"),
    ({**QWEN2, "sliding_window": 16, "layer_types": ["full_attention", "sliding_attention"]}, "sliding-window"),
    ({**QWEN2, "sliding_window": None, "layer_types": ["sliding_attention"] * 2}, "sliding_window"),
    ({**QWEN3, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}, "sliding-window"),
    ({**QWEN2, "layer_types": 5}, "layer_types"),
    ({**QWEN2, "layer_types": ["full_attention", "linear_attention"]}, "layer_types"),
    # values that are no values of their field
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "llama3.*low_freq_factor"),
    ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "high_freq_factor"),
    ({"rope_scaling": {**LLAMA3, "low_freq_factor": "1"}}, "low_freq_factor"),
    ({"rope_scaling": {"rope_type": "linear"}}, "has no 'factor'"),
    (yarn(factor="4"), "factor"),
    (yarn(factor=0.5), "factor"),
    (yarn(factor=True), "factor"),
    (yarn(beta_fast="x"), "beta_fast"),
    (yarn(beta_slow=-1), "beta_slow"),
    (yarn(mscale="x"), "mscale"),
    (yarn(mscale=1.0, mscale_all_dim=-10.0), "mscale_all_dim"),
    (yarn(attention_factor=float("nan")), "attention_factor"),
    (yarn(truncate="false"), "truncate"),
    (yarn(original_max_position_embeddings="x"), "original_max_position_embeddings"),
    (yarn(original_max_position_embeddings=0), "original_max_position_embeddings"),
    (yarn(factor=1e300), "max_position_embeddings"),
    ({"rope_scaling": "yarn"}, "rope_scaling"),
    ({"rope_theta": "1e4"}, "rope_theta"),
    ({"rope_theta": None}, "rope_theta"),
    ({"rope_theta": 10**400}, "rope_theta"),
    ({"rope_theta": 1.0, **yarn()}, "rope_theta"),
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false, got 'false'"),
    ({"tie_word_embeddings": "no"}, "tie_word_embeddings"),
    ({"tie_word_embeddings": None}, "tie_word_embeddings"),
    ({"attention_bias": "false"}, "attention_bias"),
    ({"mlp_bias": 0}, "mlp_bias"),
    ({**QWEN2, "use_sliding_window": "false"}, "use_sliding_window"),
    ({"num_key_value_heads": 0}, "num_key_value_heads"),
    ({"head_dim": 0}, "head_dim"),
    ({"head_dim": 15}, "head_dim must be even"),
    ({"hidden_size": 64.0}, "hidden_size"),
    ({"max_position_embeddings": None}, "max_position_embeddings"),
    ({"max_position_embeddings": 2**31}, "max_position_embeddings"),
    ({"vocab_size": 2**63}, "vocab_size"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers must be an integer from 1 to 4096"),
    ({"num_attention_heads": "9" * 1000000}, "num_attention_heads .*9{50}"),
    ({"rms_norm_eps": "1e-6"}, "rms_norm_eps"),
    ({"rms_norm_eps": float("inf")}, "rms_norm_eps"),
    ({"eos_token_id": [2, None]}, "eos_token_id"),
    ({"eos_token_id": 96}, "eos_token_id must be an integer from 0 to 95, got 96"),
    ({"eos_token_id": True}, "eos_token_id"),
    ({"eos_token_id": {"a": 1}}, "eos_token_id"),
    ({"bos_token_id": [1]}, "bos_token_id"),
    ({"bos_token_id": "1"}, "bos_token_id"),
    ({"fim": ["aixcoder"]}, "fim"),
    ({"fim": {"name": "aixcoder"}}, "fim"),
    ({"quantization_config": {"quant_method": "awq"}}, "awq"),
    ({"torch_dtype": ["float32"]}, "torch_dtype"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[str(changes)[:60] for changes, _ in REFUSED])
def test_refused_by_the_names_of_file_and_fields(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_json(changes)))
    with pytest.raises(ValueError, match=re.compile(rf"config\.json: .*{message}", re.DOTALL)) as refusal:
        ModelConfig.from_dir(tmp_path)
    assert len(str(refusal.value)) < 600
