"""What a model is: its shape, as Hugging Face's `config.json` has it, and how heads are divided among ranks.

Owns ModelConfig: frozen, validated at construction, with errors that name the remedy. Knows nothing of torch, devices,
or files other than config.json and generation_config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_infer.checks import boolean, finite, int_in, one_of, positive_int
from megatron_infer.files import read_json_object
from megatron_infer.quantization import Quantization
from megatron_infer.rope_scaling import RopeScaling, read_rope

TP_SIZES = (1, 2, 4, 8)
"""Tensor-parallel degrees of the numerics contract: a linear layer has 8 K-chunks, and a rank owns 8/tp whole ones."""

DEFAULT_MODEL_NAME = "aix3-7b-base"
"""File stem of `.pt` checkpoints where none is given: upstream's default."""

FLOAT_DTYPES = ("bfloat16", "float16", "float32")

_MAX_LAYERS = 4096
_MAX_SIZE = 2**31 - 1
"""Of every size: token ids and positions are int32."""
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
"""Sizes that every config.json must state; the others have a default."""
_DEFAULTS = {
    "num_key_value_heads": None, "head_dim": None, "rms_norm_eps": 1e-6, "attention_bias": False, "mlp_bias": False,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "use_sliding_window": False,
    "sliding_window": 4096, "max_window_layers": 28, "layer_types": None, "hidden_act": "silu", "is_causal": True,
}  # fmt: skip
"""What config.json leaves unsaid, where the family has no other default (transformers 5, configuration_llama.py and its
siblings)."""
_QWEN = {"bos_token_id": None, "eos_token_id": None, "max_position_embeddings": 32768}
_FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": ({"max_position_embeddings": 2048}, {"use_sliding_window": False}),
    "mistral": (
        {"num_key_value_heads": 8, "max_position_embeddings": 131072},
        {"attention_bias": False, "mlp_bias": False, "use_sliding_window": True, "max_window_layers": 0},
    ),
    "qwen2": (_QWEN, {"attention_bias": True, "mlp_bias": False}),
    "qwen3": ({**_QWEN, "head_dim": 128}, {"mlp_bias": False}),
}
"""By model_type: its own defaults, and what transformers computes with whatever config.json says."""


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a Llama-shaped decoder: RMSNorm, RoPE (half-split), GQA, SwiGLU. Names as in Hugging Face's config.json.

    `attention_bias` covers q, k and v; `attention_output_bias` covers o (Qwen2 has the first only, Granite both).
    `qk_norm`: each query and key head has an RMSNorm before its rotation (Qwen3).
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
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 1
    eos_token_ids: tuple[int, ...] = (2,)
    torch_dtype: str = "bfloat16"
    fim: str | None = None
    quantization: Quantization | None = None

    def __post_init__(self) -> None:
        for name in (*_REQUIRED, "num_key_value_heads", "head_dim", "max_position_embeddings"):
            largest = _MAX_LAYERS if name == "num_hidden_layers" else _MAX_SIZE
            int_in(f"model config: {name}", getattr(self, name), 1, largest)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"model config: num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"model config: head_dim must be even for RoPE, got {self.head_dim}")
        one_of("model config: torch_dtype", self.torch_dtype, FLOAT_DTYPES)
        finite("model config: rms_norm_eps", self.rms_norm_eps, low=0.0)
        finite("model config: rope_theta", self.rope_theta, low=2.0)
        for name in ("attention_bias", "attention_output_bias", "mlp_bias", "tie_word_embeddings"):
            boolean(f"model config: {name}", getattr(self, name))
        if self.bos_token_id is not None:  # only kept for whoever reads the file next, so it need not be a row
            int_in("model config: bos_token_id", self.bos_token_id, -_MAX_SIZE, _MAX_SIZE)
        for token_id in self.eos_token_ids:
            int_in("model config: eos_token_id", token_id, 0, self.vocab_size - 1)
        if self.fim is not None and not isinstance(self.fim, str):
            raise ValueError(f"model config: fim must be the name of a family, got {self.fim!r:.80}")
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
        model_type = raw.get("model_type")
        if not isinstance(model_type, str) or model_type not in _FAMILIES:
            wrong = "is missing" if model_type is None else f"{model_type!r:.80} is not supported"
            supported = f"{', '.join(_FAMILIES)} (RMSNorm, RoPE, GQA, SwiGLU decoders)"
            raise ValueError(f"model_type {wrong}; supported: {supported}")
        defaults, fixed = _FAMILIES[model_type]
        said = {**_DEFAULTS, **defaults, **raw, **fixed}
        if said["hidden_act"] not in ("silu", "swish"):
            raise ValueError(f"hidden_act {said['hidden_act']!r:.80} is not supported; only silu (SwiGLU) is")
        if said["is_causal"] is not True:
            raise ValueError(f"is_causal is {said['is_causal']!r}, but this network attends backwards only; remove it")
        if raw.get("per_layer_config"):
            raise ValueError("per_layer_config is not supported; the layers of this network are all alike")
        for name in (*_REQUIRED, "max_position_embeddings"):
            positive_int(name, said.get(name))
        longest = said["max_position_embeddings"]
        theta, scaling = read_rope(raw, longest)
        if scaling and scaling.rope_type == "yarn":
            assert scaling.original_max_position_embeddings is not None
            longest = max(longest, int(scaling.factor * scaling.original_max_position_embeddings))
        _refuse_window(said, longest)
        kv_heads, head_dim, heads = said["num_key_value_heads"], said["head_dim"], said["num_attention_heads"]
        return cls(
            **{name: said[name] for name in (*_REQUIRED, "rms_norm_eps", "attention_bias", "mlp_bias")},
            num_key_value_heads=heads if kv_heads is None else kv_heads,
            head_dim=said["hidden_size"] // heads if head_dim is None else head_dim,
            max_position_embeddings=longest,
            rope_theta=theta,
            rope_scaling=scaling,
            qk_norm=model_type == "qwen3",
            attention_output_bias=said["attention_bias"] and model_type != "qwen2",
            tie_word_embeddings=said["tie_word_embeddings"],
            bos_token_id=said["bos_token_id"],
            eos_token_ids=_token_ids(said["eos_token_id"]),
            torch_dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "bfloat16").removeprefix("torch."),
            fim=raw.get("fim"),
            quantization=Quantization.from_hf(raw.get("quantization_config")),
        )

    @classmethod
    def from_dir(cls, model_dir: str | Path) -> ModelConfig:
        """Read `config.json` of a checkpoint directory, and the end tokens that generation_config.json adds.

        Raises:
            ValueError: a file that is missing or damaged, or what `from_hf` refuses, with the path of the file.
        """
        path = Path(model_dir) / "config.json"
        if not path.exists():
            raise ValueError(f"{path} does not exist; a checkpoint directory needs a config.json")
        raw, generation = read_json_object(path), path.with_name("generation_config.json")
        ends = read_json_object(generation).get("eos_token_id") if generation.exists() else None
        try:
            config = cls.from_hf(raw)
            path = generation
            more = replace(config, eos_token_ids=_token_ids(ends))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        return replace(config, eos_token_ids=tuple(dict.fromkeys((*config.eos_token_ids, *more.eos_token_ids))))

    def to_hf(self) -> dict[str, Any]:
        """A `config.json` that both this engine and transformers read back to the same network.

        It spells the scaling as transformers 4 and 5 both read it, and once: whoever edits it edits what counts.
        """
        qkv_bias_only = self.attention_bias and not self.attention_output_bias
        model_type = "qwen3" if self.qk_norm else "qwen2" if qkv_bias_only else "llama"
        eos = self.eos_token_ids
        out: dict[str, Any] = {
            "architectures": [f"{model_type.capitalize()}ForCausalLM"],
            "model_type": model_type,
            **{name: getattr(self, name) for name in (*_REQUIRED, "num_key_value_heads", "head_dim")},
            "hidden_act": "silu",
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": self.rope_scaling.to_hf() if self.rope_scaling else None,
            "attention_bias": self.attention_bias,
            "mlp_bias": self.mlp_bias,
            "tie_word_embeddings": self.tie_word_embeddings,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos[0] if len(eos) == 1 else (list(eos) or None),
            "torch_dtype": self.torch_dtype,
        }
        if model_type != "llama":
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


def _token_ids(value: Any) -> tuple[int, ...]:
    """`eos_token_id` as the files have it: a number, a list of them, or null."""
    return tuple(value) if isinstance(value, list) else (() if value is None else (value,))


def _refuse_window(said: Mapping[str, Any], longest: int) -> None:
    """Refuse a sliding window of attention, unless it is as long as the longest context and so changes nothing."""
    window, layer_types = said["sliding_window"], said["layer_types"]
    boolean("use_sliding_window", said["use_sliding_window"])
    int_in("max_window_layers", said["max_window_layers"], 0, _MAX_LAYERS)
    slides = said["use_sliding_window"] and said["max_window_layers"] < said["num_hidden_layers"] and window is not None
    if layer_types is not None:
        for kind in layer_types if isinstance(layer_types, list) else [layer_types]:
            one_of("layer_types", kind, ("full_attention", "sliding_attention"))
        slides = "sliding_attention" in layer_types
    if not slides:
        return
    positive_int("sliding_window", window)
    if window < longest:
        raise ValueError(
            f"sliding-window attention is not supported (sliding_window {window} of {longest} positions); to use the "
            f"model up to {window} tokens, where the window changes nothing, set max_position_embeddings to {window}"
        )
