"""What is measured on whom: the model, the engines with their storage formats, and the metrics with their lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_infer.model_config import ModelConfig

MODEL = ModelConfig(
    vocab_size=49152,
    hidden_size=1024,
    intermediate_size=3616,
    num_hidden_layers=24,
    num_attention_heads=16,
    num_key_value_heads=4,
    head_dim=64,
    max_position_embeddings=4096,
    rms_norm_eps=1e-5,
    rope_theta=256000.0,
    fim="aixcoder",
)
"""aiXcoder-7B with every width cut to a quarter and 24 layers: its vocabulary, its head, its grouping of KV heads."""


@dataclass(frozen=True)
class Engine:
    """One program in one storage format.

    `layer_bits`, `head_bits` and `embedding_bits` are bits per weight as stored, scales of quantized groups included.
    `peer` is llama.cpp in the same format; `needs` the packages without which the engine is skipped.
    """

    name: str
    project: str
    label: str
    storage: str
    layer_bits: float
    head_bits: float
    embedding_bits: float
    peer: str | None = None
    ranks: int = 1
    needs: tuple[str, ...] = ()


_LLAMA = ("llama_cpp", "gguf")

ENGINES = (
    Engine("ours-bf16", "megatron_infer", "megatron_infer bf16", "none", 16, 16, 16, "llama-bf16"),
    Engine("ours-int8", "megatron_infer", "megatron_infer int8", "int8", 8.5, 8.5, 16, "llama-q8_0"),
    Engine("ours-int4", "megatron_infer", "megatron_infer int4", "int4", 4.5, 8.5, 16, "llama-q4_0"),
    Engine("ours-bf16-tp2", "megatron_infer", "megatron_infer bf16, tp 2", "none", 16, 16, 16, "llama-bf16", ranks=2),
    Engine("llama-bf16", "llama.cpp", "llama.cpp bf16", "bf16", 16, 16, 16, needs=_LLAMA),
    Engine("llama-q8_0", "llama.cpp", "llama.cpp q8_0", "q8_0", 8.5, 8.5, 8.5, needs=_LLAMA),
    Engine("llama-q4_0", "llama.cpp", "llama.cpp q4_0", "q4_0", 4.5, 8.5, 4.5, needs=_LLAMA),
    Engine("transformers-bf16", "transformers", "transformers bf16", "bfloat16", 16, 16, 16, needs=("transformers",)),
    Engine("transformers-fp32", "transformers", "transformers fp32", "float32", 32, 32, 32, needs=("transformers",)),
)

INSTALL_HINT = "pip install -c constraints.txt -r requirements-dev.txt -r benchmarks/requirements-peers.txt"


@dataclass(frozen=True)
class Metric:
    """One figure in tokens per second.

    Decode is the difference of two completions, so that prefill and whatever else a call costs once cancel. Prefill is
    the time to the first token.
    """

    name: str
    title: str
    batch: int
    prompt_tokens: int
    new_tokens: tuple[int, ...]

    @property
    def is_prefill(self) -> bool:
        return self.new_tokens == (1,)

    def rate(self, seconds: Sequence[float]) -> float | None:
        """Tokens per second, from one duration per entry of `new_tokens`; None where another program disturbed them."""
        if self.is_prefill:
            return self.batch * self.prompt_tokens / seconds[0]
        shorter, longer = seconds
        if longer <= shorter:
            return None
        return self.batch * (self.new_tokens[1] - self.new_tokens[0]) / (longer - shorter)


def _metrics(short: int, long: int, single: tuple[int, int], batched: tuple[int, int]) -> tuple[Metric, ...]:
    return (
        Metric("decode", "decode", 1, 32, single),
        Metric("prefill-short", f"prefill {short}", 1, short, (1,)),
        Metric("prefill-long", f"prefill {long}", 1, long, (1,)),
        Metric("batch8", "decode, batch 8", 8, 32, batched),
        Metric("batch32", "decode, batch 32", 32, 32, batched),
    )


METRICS = _metrics(256, 2048, (16, 80), (8, 40))
QUICK_METRICS = _metrics(64, 256, (4, 20), (2, 8))
MEMORY_NEW_TOKENS = 16
"""Generated after the longest prompt before memory is looked at."""


def layer_params(config: ModelConfig) -> int:
    """Weights of all linear layers but the output head."""
    query = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    per_layer = config.hidden_size * (2 * query + 2 * kv + 3 * config.intermediate_size)
    return config.num_hidden_layers * per_layer


def head_params(config: ModelConfig) -> int:
    """Weights of the output head; the embedding table has as many."""
    return config.vocab_size * config.hidden_size


def streamed_bytes(engine: Engine, config: ModelConfig) -> float:
    """Weight bytes that every decoding step reads: all linear layers and the head."""
    return (layer_params(config) * engine.layer_bits + head_params(config) * engine.head_bits) / 8


def weight_bytes(engine: Engine, config: ModelConfig) -> float:
    """Bytes of all weights as stored, embedding table included; the norms are too small to count."""
    return streamed_bytes(engine, config) + head_params(config) * engine.embedding_bits / 8


def prefill_flops(config: ModelConfig, prompt_tokens: int) -> float:
    """Multiplications and additions of the linear layers for one prompt; only its last token needs the head."""
    return 2.0 * (layer_params(config) * prompt_tokens + head_params(config))
