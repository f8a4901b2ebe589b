"""What is measured: the model's shape and the sizes of every measurement, full and small."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_infer.model_config import ModelConfig

COMPLETION_TOKENS = 32
"""Of the completion whose latency an editor's user feels."""
KEYSTROKE_TOKENS = 6 + COMPLETION_TOKENS
"""What a warm prompt grows by, at most, while keystrokes are measured."""


@dataclass(frozen=True)
class Workload:
    """Sizes of one run of the suite.

    contexts: of batch-1 decoding, in tokens. prefills: prompt lengths. keystroke_context: a warm prompt to which a few
    tokens are appended. batches: sequences decoded together at batch_context. peer_contexts: where peers are timed, the
    first one also where greedy ids are compared. matmul: of the ceiling's square matrices. prefill_rows: tokens of the
    ceiling's products in the shapes of the model's own layers. kernel_tokens: of single linear layers.
    evicting_bytes: read between two uses of a weight or cache, so that no cache of the device still has it.
    """

    model: ModelConfig
    contexts: tuple[int, ...]
    prefills: tuple[int, ...]
    keystroke_context: int
    batches: tuple[int, ...]
    batch_context: int
    peer_contexts: tuple[int, ...]
    new_tokens: int
    repetitions: int
    ceiling_bytes: int
    matmul: int
    prefill_rows: int
    kernel_tokens: tuple[int, ...]
    evicting_bytes: int

    @property
    def max_model_len(self) -> int:
        """The longest sequence of all measurements."""
        longest = max(*self.contexts, *self.prefills, *self.peer_contexts, self.keystroke_context, self.batch_context)
        return longest + max(2 * self.new_tokens, KEYSTROKE_TOKENS)

    @property
    def prompt(self) -> list[int]:
        """The prompt whose greedy continuation every variant and peer gives."""
        return [(7 * i) % self.model.vocab_size for i in range(self.peer_contexts[0])]

    def kv_tokens(self, batch: int) -> int:
        """Tokens the KV cache must hold for `batch` sequences at batch_context, or for two of the longest."""
        return max(2 * self.max_model_len, batch * (self.batch_context + 2 * self.new_tokens + 64))


FULL = Workload(
    model=ModelConfig.aixcoder_7b(),
    contexts=(512, 4096, 16384),
    prefills=(2048, 8192),
    keystroke_context=8192,
    batches=(8, 32, 128),
    batch_context=512,
    peer_contexts=(512, 4096),
    new_tokens=64,
    repetitions=3,
    ceiling_bytes=4 << 30,
    matmul=8192,
    prefill_rows=2048,
    kernel_tokens=(1, 2, 4, 16),
    evicting_bytes=256 << 20,
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
    peer_contexts=(32, 64),
    new_tokens=6,
    repetitions=2,
    ceiling_bytes=1 << 22,
    matmul=128,
    prefill_rows=64,
    kernel_tokens=(1, 3),
    evicting_bytes=1 << 18,
)


def workload_for(device_type: str) -> Workload:
    """The full size for a GPU, the small one to try the suite on the CPU."""
    return FULL if device_type == "cuda" else SMALL
