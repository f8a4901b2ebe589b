"""What a model is: its shape, as Hugging Face's `config.json` has it, and how heads are divided among ranks.

Owns ModelConfig and RopeScaling: frozen, validated at construction, with errors that name the remedy. Knows nothing of
torch, files other than config.json, or devices.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_infer.checks import finite, int_in, one_of, positive_int
from megatron_infer.quantization import Quantization

TP_SIZES = (1, 2, 4, 8)
"""Tensor-parallel degrees of the numerics contract: a linear layer has 8 K-chunks, and a rank owns 8/tp whole ones."""

DEFAULT_MODEL_NAME = "aix3-7b-base"
"""File stem of `.pt` checkpoints where none is given: upstream's default."""

FLOAT_DTYPES = ("bfloat16", "float16", "float32")

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "mistral": "MistralForCausalLM"}
_ROPE_SCALINGS = ("linear", "yarn")
_LLAMA_SHAPED = tuple(_ARCHITECTURES)
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
"""Sizes that every config.json must state; the others have a default."""


@dataclass(frozen=True)
class RopeScaling:
    """Stretching of rotary positions beyond the trained context.

    `linear` divides positions by `factor`; `yarn` is YaRN (arXiv 2309.00071) with the field names and defaults of
    Hugging Face's `rope_scaling`.
    """

    rope_type: Literal["linear", "yarn"]
    factor: float
    original_max_position_embeddings: int | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        one_of("rope scaling type", self.rope_type, _ROPE_SCALINGS)
        finite("rope scaling factor", self.factor, low=1.0)

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> RopeScaling | None:
        """Read `rope_scaling` (transformers 4) or `rope_parameters` (transformers 5); None for plain RoPE."""
        rope_type = raw.get("rope_type", raw.get("type", "default"))
        if rope_type == "default":
            return None
        one_of("config.json: rope scaling type", rope_type, _ROPE_SCALINGS)
        given = {name: raw[name] for name in cls.__dataclass_fields__ if raw.get(name) is not None}
        if "factor" not in given:
            raise ValueError(f"config.json: rope scaling of type {rope_type!r} has no 'factor'")
        return cls(**{**given, "rope_type": rope_type})

    def to_hf(self) -> dict[str, Any]:
        """The Hugging Face dictionary this was read from, defaults left out."""
        out: dict[str, Any] = {"rope_type": self.rope_type, "factor": self.factor}
        for name, spec in self.__dataclass_fields__.items():
            value = getattr(self, name)
            if name not in out and value != spec.default:
                out[name] = value
        return out


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a Llama-shaped decoder: RMSNorm, RoPE (half-split), GQA, SwiGLU. Names as in Hugging Face's config.json.

    `attention_bias` covers q, k and v; `attention_output_bias` covers o (Qwen2 has the first only, Granite both).
    `quantization`: of the linear layers on disk; None: they are stored in floating point.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 1
    eos_token_ids: tuple[int, ...] = (2,)
    torch_dtype: str = "bfloat16"
    fim: str | None = None
    quantization: Quantization | None = None

    def __post_init__(self) -> None:
        for name in (*_REQUIRED, "num_key_value_heads", "head_dim", "max_position_embeddings"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
                raise ValueError(f"model config: {name} must be a positive integer, got {value!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"model config: num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"model config: head_dim must be even for RoPE, got {self.head_dim}")
        one_of("model config: torch_dtype", self.torch_dtype, FLOAT_DTYPES)
        finite("model config: rms_norm_eps", self.rms_norm_eps, low=0.0)
        finite("model config: rope_theta", self.rope_theta, low=1.0)
        for token_id in (*self.eos_token_ids, *(() if self.bos_token_id is None else (self.bos_token_id,))):
            int_in("model config: bos_token_id and eos_token_id", token_id, 0, self.vocab_size - 1)
        if self.quantization and (self.hidden_size % 2 or self.intermediate_size % 2):
            raise ValueError("model config: quantized weights need an even hidden_size and intermediate_size")

    @classmethod
    def aixcoder_7b(cls) -> ModelConfig:
        """aiXcoder-7B as its Megatron checkpoint has it: the constants of upstream's `sess_megatron.py`, eps 1e-5."""
        return cls(
            vocab_size=49152,
            hidden_size=4096,
            intermediate_size=14464,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            max_position_embeddings=32768,
            rms_norm_eps=1e-5,
            rope_theta=256000.0,
            fim="aixcoder",
        )

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Build from a parsed Hugging Face `config.json`.

        Raises:
            ValueError: another architecture, a field that is missing, or a feature this network does not have.
        """
        model_type = raw.get("model_type", "llama")
        if model_type not in _LLAMA_SHAPED:
            raise ValueError(
                f"config.json: model_type {model_type!r} is not supported; supported: {', '.join(_LLAMA_SHAPED)} "
                "(RMSNorm, RoPE, GQA, SwiGLU decoders)"
            )
        if raw.get("hidden_act", "silu") not in ("silu", "swish"):
            raise ValueError(f"config.json: hidden_act {raw['hidden_act']!r} is not supported; only silu (SwiGLU) is")
        if raw.get("sliding_window") and raw.get("use_sliding_window", model_type == "mistral"):
            raise ValueError("config.json: sliding-window attention is not supported")
        for name in _REQUIRED:
            positive_int(f"config.json: {name}", raw.get(name))
        rope: dict[str, Any] = {}
        for name in ("rope_scaling", "rope_parameters"):
            if not isinstance(raw.get(name) or {}, Mapping):
                raise ValueError(f"config.json: {name} must be an object, got {raw[name]!r}")
            rope |= raw.get(name) or {}
        if any(source.get("partial_rotary_factor") not in (None, 1) for source in (raw, rope)):
            raise ValueError("config.json: partial_rotary_factor is not supported; this network rotates whole heads")
        heads = raw["num_attention_heads"]
        attention_bias = bool(raw.get("attention_bias", model_type == "qwen2"))
        eos = raw.get("eos_token_id", 2)
        dtype = str(raw.get("torch_dtype") or raw.get("dtype") or "bfloat16")
        return cls(
            **{name: raw[name] for name in _REQUIRED},
            num_key_value_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
            max_position_embeddings=raw.get("max_position_embeddings", 2048),
            rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
            rope_theta=raw.get("rope_theta") or rope.get("rope_theta") or 10000.0,
            rope_scaling=RopeScaling.from_hf(rope),
            attention_bias=attention_bias,
            attention_output_bias=attention_bias and model_type == "llama",
            mlp_bias=bool(raw.get("mlp_bias", False)),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            bos_token_id=raw.get("bos_token_id", 1),
            eos_token_ids=tuple(eos) if isinstance(eos, list) else (() if eos is None else (eos,)),
            torch_dtype=dtype.removeprefix("torch."),
            fim=raw.get("fim"),
            quantization=Quantization.from_hf(raw.get("quantization_config")),
        )

    @classmethod
    def from_dir(cls, model_dir: str | Path) -> ModelConfig:
        """Read `config.json` of a checkpoint directory."""
        path = Path(model_dir) / "config.json"
        try:
            raw = json.loads(path.read_text(encoding="utf-8-sig"))
        except FileNotFoundError:
            raise ValueError(f"{path} does not exist; a checkpoint directory needs a config.json") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not valid JSON: {error}") from None
        if not isinstance(raw, dict):
            raise ValueError(f"{path} must hold a JSON object")
        return cls.from_hf(raw)

    def to_hf(self) -> dict[str, Any]:
        """A `config.json` that both this engine and transformers read back to the same network."""
        model_type = "qwen2" if self.attention_bias and not self.attention_output_bias else "llama"
        rope: dict[str, Any] = self.rope_scaling.to_hf() if self.rope_scaling else {"rope_type": "default"}
        eos = self.eos_token_ids
        out: dict[str, Any] = {
            "architectures": [_ARCHITECTURES[model_type]],
            "model_type": model_type,
            **{name: getattr(self, name) for name in (*_REQUIRED, "num_key_value_heads", "head_dim")},
            "hidden_act": "silu",
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": self.rope_scaling.to_hf() if self.rope_scaling else None,
            "rope_parameters": {**rope, "rope_theta": self.rope_theta},
            "attention_bias": self.attention_bias,
            "mlp_bias": self.mlp_bias,
            "tie_word_embeddings": self.tie_word_embeddings,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos[0] if len(eos) == 1 else (list(eos) or None),
            "torch_dtype": self.torch_dtype,
        }
        if model_type == "qwen2":
            out["use_sliding_window"] = False
        if self.fim:
            out["fim"] = self.fim
        if self.quantization:
            out["quantization_config"] = self.quantization.to_hf()
        return out

    def validate_tp(self, tp: int) -> None:
        """Refuse a tensor-parallel degree this model cannot be split by (ValueError listing those that work)."""
        if tp not in self.tp_sizes:
            raise ValueError(
                f"tensor-parallel size {tp} does not fit this model ({self.num_attention_heads} query heads, "
                f"{self.num_key_value_heads} KV heads); sizes that work: {', '.join(map(str, self.tp_sizes))}"
            )

    @property
    def tp_sizes(self) -> tuple[int, ...]:
        """The tensor-parallel degrees that divide the query heads, and divide or replicate the KV heads."""
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        return tuple(n for n in TP_SIZES if heads % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0))

    def query_heads_on(self, rank: int, tp: int) -> range:
        """Query heads that tensor-parallel rank `rank` of `tp` computes."""
        per_rank = self.num_attention_heads // tp
        return range(rank * per_rank, (rank + 1) * per_rank)

    def kv_heads_on(self, rank: int, tp: int) -> range:
        """KV heads that rank `rank` of `tp` holds; a head is replicated on neighbours when tp > KV heads."""
        if tp <= self.num_key_value_heads:
            per_rank = self.num_key_value_heads // tp
            return range(rank * per_rank, (rank + 1) * per_rank)
        head = rank * self.num_key_value_heads // tp
        return range(head, head + 1)
