"""The network on one CPU rank: whole, or one decoder layer at a time, so that no more of it is in memory.

Lays out sequences itself, each in a KV cache of its own; knows nothing of the engine.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_infer.cache.kv_cache import KVCache
from megatron_infer.model.checkpoint import Checkpoint
from megatron_infer.model.formats import TensorSource, WeightFormat, weight_formats
from megatron_infer.model.layers import VocabParallelEmbedding, VocabParallelHead
from megatron_infer.model.rope import rope_tables
from megatron_infer.model.transformer import Block, Norm, Transformer
from megatron_infer.model_config import ModelConfig
from megatron_infer.ops import BatchView, Ops, Rope, Stream
from megatron_infer.tensor_parallel.group import TPGroup

CPU = torch.device("cpu")
_BLOCK_SIZE = 16


def one_sequence(ids: list[int], start: int, num_blocks: int) -> BatchView:
    """`ids` as the positions `start` and up of one sequence; position i lies in slot i."""
    positions = torch.arange(start, start + len(ids))
    return BatchView(
        token_ids_T=torch.tensor(ids),
        positions_T=positions.int(),
        slots_T=positions,
        query_start_S1=torch.tensor([0, len(ids)], dtype=torch.int32),
        context_lens_S=torch.tensor([start + len(ids)], dtype=torch.int32),
        block_tables_SB=torch.arange(num_blocks, dtype=torch.int32).unsqueeze(0),
        max_query_len=len(ids),
    )


def float_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """What the engine holds weights in that are not quantised: float32 where that is stored, else bfloat16."""
    if checkpoint.kind == "gguf":  # whose blocks are decoded to fp32, whatever they are held in
        return torch.float32 if checkpoint.config.torch_dtype == "float32" else torch.bfloat16
    return torch.float32 if checkpoint.dtype_of("tok_embeddings.weight") == torch.float32 else torch.bfloat16


def one_sequence_cache(config: ModelConfig, num_layers: int, num_tokens: int) -> KVCache:
    """An fp32 KV cache for one sequence of at most `num_tokens`."""
    num_blocks = -(-num_tokens // _BLOCK_SIZE)
    shape = (num_layers, num_blocks, config.num_key_value_heads, _BLOCK_SIZE, config.head_dim)
    return KVCache(*shape, dtype=torch.float32, device=CPU)


def load_network(
    source: TensorSource, config: ModelConfig, dtype: torch.dtype, ops: Ops, num_positions: int
) -> Transformer:
    """All of it; `dtype` is that of weights which are not quantised."""
    fmt, head_fmt = _formats(config, dtype, ops)
    model = Transformer(
        config, tp=TPGroup.single(CPU), ops=ops, fmt=fmt, head_fmt=head_fmt, dtype=dtype, num_positions=num_positions
    )
    for _ in model.load(source):
        continue
    return model


class LayerwiseNetwork:
    """The network part by part, over sequences of at most `num_positions` tokens that are held as residual streams."""

    def __init__(
        self, source: TensorSource, config: ModelConfig, dtype: torch.dtype, ops: Ops, num_positions: int
    ) -> None:
        self.config = config
        self._source, self._dtype, self._ops = source, dtype, ops
        self._tp = TPGroup.single(CPU)
        self._fmt, self._head_fmt = _formats(config, dtype, ops)
        self._rope = Rope(*rope_tables(config, num_positions))
        self._kv = one_sequence_cache(config, 1, num_positions)

    def embed(self, sequences: list[list[int]]) -> list[Tensor]:
        """A residual stream [T, D] in fp32 for each sequence of token ids."""
        config = self.config
        embedding = VocabParallelEmbedding(
            "tok_embeddings", config.vocab_size, config.hidden_size, tp=self._tp, ops=self._ops, dtype=self._dtype
        )
        embedding.load(self._source)
        return [embedding(torch.tensor(ids)) for ids in sequences]

    def block(self, layer: int) -> Block:
        """A decoder layer with its weights."""
        block = Block(self.config, layer, tp=self._tp, ops=self._ops, fmt=self._fmt)
        block.load(self._source)
        return block

    def run(self, block: Block, residual_TD: Tensor) -> Tensor:
        """The residual stream behind `block`; the one given stays as it is."""
        stream = Stream(residual_TD.clone())
        block(stream, self._rope, one_sequence([0] * len(residual_TD), 0, self._kv.num_blocks), self._kv.layers[0])
        return stream.settle()

    def norm(self) -> Norm:
        """The norm in front of the head."""
        norm = Norm("norm", self.config, ops=self._ops, device=CPU)
        norm.load(self._source)
        return norm

    def head(self) -> VocabParallelHead:
        """The output head."""
        config = self.config
        name = "tok_embeddings" if config.tie_word_embeddings else "output"
        head = VocabParallelHead(name, config.hidden_size, config.vocab_size, tp=self._tp, fmt=self._head_fmt)
        head.load(self._source)
        return head


def _formats(config: ModelConfig, dtype: torch.dtype, ops: Ops) -> tuple[WeightFormat, WeightFormat]:
    stored = config.quantization
    return weight_formats(ops, config, dtype, stored.format if stored else "none", CPU)
