"""config.json in its many dialects, and the errors for what this network cannot do."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_infer.config import EngineConfig
from megatron_infer.model_config import ModelConfig, RopeScaling
from megatron_infer.sampling_params import SamplingParams

LLAMA = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def test_defaults_of_an_old_llama_config() -> None:
    config = ModelConfig.from_hf(LLAMA)
    assert config.num_key_value_heads == 4
    assert config.head_dim == 16
    assert config.rope_theta == 10000.0
    assert not config.attention_bias


def test_aixcoder_constants_survive_a_round_trip() -> None:
    config = ModelConfig.aixcoder_7b()
    assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e5}},
    ],
    ids=["type", "rope_type", "rope_parameters"],
)
def test_rope_scaling_of_every_transformers_version(scaling) -> None:
    config = ModelConfig.from_hf({**LLAMA, "rope_theta": 1e5, **scaling})
    assert config.rope_scaling == RopeScaling("linear", 4.0)
    assert config.rope_theta == 1e5
    assert ModelConfig.from_hf(config.to_hf()) == config


def test_biases_by_family() -> None:
    qwen = ModelConfig.from_hf({**LLAMA, "model_type": "qwen2"})
    assert (qwen.attention_bias, qwen.attention_output_bias) == (True, False)
    granite = ModelConfig.from_hf({**LLAMA, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True})
    assert (granite.attention_bias, granite.attention_output_bias, granite.mlp_bias) == (True, True, True)
    for config in (qwen, granite):
        assert ModelConfig.from_hf(config.to_hf()) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mixtral"}, "mixtral"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"model_type": "mistral", "sliding_window": 4096}, "sliding-window"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "llama3"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": float("nan")}}, "factor"),
        ({"num_key_value_heads": 3}, "multiple"),
        ({"hidden_size": -1}, "hidden_size"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"torch_dtype": "int8"}, "int8"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_scaling": {"type": "longrope", "short_factor": []}}, "longrope"),
        ({"rope_scaling": ["linear", 2]}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "factor"),
        ({"rope_theta": "1e4"}, "rope_theta"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
        ({"rms_norm_eps": None}, "rms_norm_eps"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"eos_token_id": -1}, "eos_token_id"),
    ],
    ids=str,
)
def test_what_this_network_cannot_do_is_refused_by_name(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf({**LLAMA, **change})


@pytest.mark.parametrize("content", [None, "{", "[]", '{"model_type": "llama"}', b"\xff\xfe"])
def test_a_broken_config_file_is_named(tmp_path: Path, content) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=r"config\.json"):
        ModelConfig.from_dir(tmp_path)


def test_heads_are_divided_and_kv_heads_replicated() -> None:
    config = ModelConfig.from_hf({**LLAMA, "num_attention_heads": 8, "num_key_value_heads": 2})
    assert [list(config.kv_heads_on(rank, 8)) for rank in range(8)] == [[0]] * 4 + [[1]] * 4
    assert [list(config.query_heads_on(rank, 4)) for rank in range(4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    for heads, good in ((28, "1, 2, 4"), (6, "1, 2")):
        odd = ModelConfig.from_hf({**LLAMA, "num_attention_heads": heads, "num_key_value_heads": 2, "head_dim": 16})
        with pytest.raises(ValueError, match=f"sizes that work: {good}$"):
            odd.validate_tp(8)


@pytest.mark.parametrize(
    "bad",
    [
        {"tensor_parallel_size": 3},
        {"device": "tpu"},
        {"max_num_seqs": 0},
        {"block_size": 7},
        {"dtype": "fp8"},
        {"dtype": "int4"},
        {"quantization": "q4_0"},
        {"cpu_isa": "sse"},
    ],
    ids=str,
)
def test_bad_engine_options_are_refused_by_name(bad) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        EngineConfig(**bad)


def test_numpy_numbers_are_as_good_as_pythons() -> None:
    params = SamplingParams(max_new_tokens=np.int64(5), temperature=np.float32(0.5), seed=np.uint32(7))
    assert params == SamplingParams(max_new_tokens=5, temperature=0.5, seed=7)
    assert type(params.seed) is int
    assert type(params.temperature) is float
