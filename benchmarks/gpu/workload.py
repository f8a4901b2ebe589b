"""What is measured: the model's shape and the sizes of every measurement, full and small."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_infer.config import ModelConfig


@dataclass(frozen=True)
class Workload:
    """Sizes of one run of the suite.

    contexts: of batch-1 decoding, in tokens. prefills: prompt lengths. keystroke_context: a warm prompt to which a few
    tokens are appended. batches: sequences decoded together at batch_context. matmul: of the ceiling's square matrices.
    peer_context: where transformers is timed.
    """

    model: ModelConfig
    contexts: tuple[int, ...]
    prefills: tuple[int, ...]
    keystroke_context: int
    batches: tuple[int, ...]
    batch_context: int
    peer_context: int
    new_tokens: int
    repetitions: int
    ceiling_bytes: int
    matmul: int

    @property
    def max_model_len(self) -> int:
        """The longest sequence of all measurements."""
        return max(*self.contexts, *self.prefills, self.keystroke_context, self.batch_context) + 2 * self.new_tokens

    @property
    def kv_tokens(self) -> int:
        """Tokens the KV cache must hold together."""
        return max(2 * self.max_model_len, max(self.batches) * (self.batch_context + 2 * self.new_tokens + 64))


FULL = Workload(
    model=ModelConfig.aixcoder_7b(),
    contexts=(512, 4096, 16384),
    prefills=(2048, 8192),
    keystroke_context=8192,
    batches=(8, 32, 128),
    batch_context=512,
    peer_context=512,
    new_tokens=64,
    repetitions=3,
    ceiling_bytes=4 << 30,
    matmul=8192,
)

SMALL = Workload(
    model=ModelConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=208,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
    ),
    contexts=(32, 64),
    prefills=(48,),
    keystroke_context=64,
    batches=(2, 4),
    batch_context=16,
    peer_context=32,
    new_tokens=6,
    repetitions=2,
    ceiling_bytes=1 << 22,
    matmul=128,
)
