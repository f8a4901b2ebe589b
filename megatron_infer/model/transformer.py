"""The whole network: a Llama-shaped decoder (RMSNorm, RoPE, GQA, SwiGLU) of column/row-parallel layers.

Two model families differ by ModelConfig fields, never by code here. It knows no requests, tokens' text or files.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from megatron_infer.cache.kv_cache import KVCache
from megatron_infer.model.formats import TensorSource, WeightFormat
from megatron_infer.model.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    Rows,
    VocabParallelEmbedding,
    VocabParallelHead,
)
from megatron_infer.model.rope import rope_tables
from megatron_infer.model_config import ModelConfig
from megatron_infer.ops import Ops
from megatron_infer.tensor_parallel.group import TPGroup


class BatchView(Protocol):
    """The index tensors a forward pass reads; see engine.batch.Batch."""

    @property
    def token_ids_T(self) -> Tensor: ...
    @property
    def positions_T(self) -> Tensor: ...
    @property
    def slots_T(self) -> Tensor: ...
    @property
    def query_start_S1(self) -> Tensor: ...
    @property
    def context_lens_S(self) -> Tensor: ...
    @property
    def block_tables_SB(self) -> Tensor: ...
    @property
    def max_query_len(self) -> int: ...


class Attention:
    """Grouped-query attention over the paged cache: this rank's query heads and their KV heads."""

    def __init__(self, config: ModelConfig, layer: int, *, tp: TPGroup, ops: Ops, fmt: WeightFormat) -> None:
        name, dim = f"layers.{layer}.attention", config.head_dim
        query, kv = config.query_heads_on(tp.rank, tp.size), config.kv_heads_on(tp.rank, tp.size)
        self.num_heads, self.num_kv_heads = len(query), len(kv)
        self.scale = dim**-0.5
        self.ops = ops
        self.qkv = ColumnParallelLinear(
            "attention.qkv",
            config.hidden_size,
            [
                Rows(f"{name}.wq", query.start * dim, query.stop * dim),
                Rows(f"{name}.wk", kv.start * dim, kv.stop * dim),
                Rows(f"{name}.wv", kv.start * dim, kv.stop * dim),
            ],
            bias=config.attention_bias,
            fmt=fmt,
        )
        self.out = RowParallelLinear(
            "attention.out",
            f"{name}.wo",
            config.num_attention_heads * dim,
            config.hidden_size,
            bias=config.attention_output_bias,
            tp=tp,
            fmt=fmt,
        )

    def __call__(
        self,
        x_TD: Tensor | None,
        residual_TD: Tensor,
        norm: Norm,
        rope: tuple[Tensor, Tensor],
        batch: BatchView,
        kv: tuple[Tensor, Tensor],
    ) -> Tensor | None:
        """What is to be added to the residual, to which x (if any) is added first; None: it has been."""
        if self.ops.attention_layer is not None:
            partial_TD = self.ops.attention_layer(
                x_TD, residual_TD, norm.weight_D, norm.eps, self.qkv.packed, self.out.packed, *rope, batch.positions_T,
                batch.slots_T, *kv, batch.block_tables_SB, batch.query_start_S1, batch.context_lens_S,
                batch.max_query_len, self.num_heads, self.num_kv_heads, self.scale, self.out.is_whole,
            )  # fmt: skip
            return self.out.reduce(partial_TD, residual_TD)
        x_TD = norm(x_TD, residual_TD)
        q_TNH = self.ops.rope_store_kv(
            self.qkv(x_TD), *rope, batch.positions_T, batch.slots_T, *kv, self.num_heads, self.num_kv_heads
        )
        o_TNH = self.ops.paged_attention(
            q_TNH, *kv, batch.block_tables_SB, batch.query_start_S1, batch.context_lens_S, batch.max_query_len,
            self.scale,
        )  # fmt: skip
        return self.out(o_TNH.view(o_TNH.shape[0], -1), residual_TD)


class FeedForward:
    """SwiGLU: w2(silu(w1 x) * w3 x). Gate and up are cut where w2's K-chunks are, so that no rank needs another's."""

    def __init__(self, config: ModelConfig, layer: int, *, tp: TPGroup, ops: Ops, fmt: WeightFormat) -> None:
        name = f"layers.{layer}.feed_forward"
        self.ops = ops
        self.down = RowParallelLinear(
            "feed_forward.down",
            f"{name}.w2",
            config.intermediate_size,
            config.hidden_size,
            bias=config.mlp_bias,
            tp=tp,
            fmt=fmt,
        )
        self.gate_up = ColumnParallelLinear(
            "feed_forward.gate_up",
            config.hidden_size,
            [Rows(f"{name}.w1", *self.down.cols), Rows(f"{name}.w3", *self.down.cols)],
            bias=config.mlp_bias,
            fmt=fmt,
        )

    def __call__(self, x_TD: Tensor | None, residual_TD: Tensor, norm: Norm) -> Tensor | None:
        """As Attention."""
        if self.ops.feed_forward_layer is not None:
            partial_TD = self.ops.feed_forward_layer(
                x_TD, residual_TD, norm.weight_D, norm.eps, self.gate_up.packed, self.down.packed, self.down.is_whole
            )
            return self.down.reduce(partial_TD, residual_TD)
        return self.down(self.ops.silu_mul(self.gate_up(norm(x_TD, residual_TD))), residual_TD)


class Norm:
    """RMSNorm of the residual stream, whole on every rank."""

    def __init__(self, name: str, config: ModelConfig, *, ops: Ops, device: torch.device) -> None:
        self.name, self.eps, self.ops = name, config.rms_norm_eps, ops
        self.weight_D = torch.empty(config.hidden_size, dtype=torch.float32, device=device)

    def load(self, source: TensorSource) -> None:
        self.weight_D.copy_(source.read(f"{self.name}.weight"))

    def __call__(self, x_TD: Tensor | None, residual_TD: Tensor) -> Tensor:
        """Adds x, what the last half layer left to add (if anything), to the residual in place; the norm of that."""
        if x_TD is None:
            return self.ops.rms_norm(residual_TD, self.weight_D, self.eps)
        return self.ops.add_rms_norm(x_TD, residual_TD, self.weight_D, self.eps)


class Block:
    """One decoder layer. The residual stream is updated in place; norms are fused with the additions."""

    def __init__(self, config: ModelConfig, layer: int, *, tp: TPGroup, ops: Ops, fmt: WeightFormat) -> None:
        self.attention_norm = Norm(f"layers.{layer}.attention_norm", config, ops=ops, device=tp.device)
        self.attention = Attention(config, layer, tp=tp, ops=ops, fmt=fmt)
        self.ffn_norm = Norm(f"layers.{layer}.ffn_norm", config, ops=ops, device=tp.device)
        self.feed_forward = FeedForward(config, layer, tp=tp, ops=ops, fmt=fmt)

    def load(self, source: TensorSource) -> None:
        """Read this rank's slice of the layer's tensors, one at a time."""
        for part in (
            self.attention_norm,
            self.attention.qkv,
            self.attention.out,
            self.ffn_norm,
            self.feed_forward.gate_up,
            self.feed_forward.down,
        ):
            part.load(source)


class Transformer:
    """The decoder of one tensor-parallel rank.

    Args:
        config: the model's shape.
        tp: this rank's group; the layers divide themselves by it.
        ops: the op table. dtype: of the embedding table.
        fmt, head_fmt: how the weights of the blocks and of the head are stored.
        num_positions: how many positions the rotary tables cover.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        tp: TPGroup,
        ops: Ops,
        fmt: WeightFormat,
        head_fmt: WeightFormat,
        dtype: torch.dtype,
        num_positions: int,
    ) -> None:
        config.validate_tp(tp.size)
        self.config, self.tp, self.ops = config, tp, ops
        self.embedding = VocabParallelEmbedding(
            "tok_embeddings", config.vocab_size, config.hidden_size, tp=tp, ops=ops, dtype=dtype
        )
        self.blocks = [Block(config, i, tp=tp, ops=ops, fmt=fmt) for i in range(config.num_hidden_layers)]
        self.norm = Norm("norm", config, ops=ops, device=tp.device)
        head = "tok_embeddings" if config.tie_word_embeddings else "output"
        self.head = VocabParallelHead(head, config.hidden_size, config.vocab_size, tp=tp, fmt=head_fmt)
        cos_PH, sin_PH = rope_tables(config, num_positions)
        self.rope = (cos_PH.to(tp.device), sin_PH.to(tp.device))

    def load(self, source: TensorSource) -> Iterator[str]:
        """Read this rank's slice of every tensor, one at a time; yields what was just loaded, for a progress bar."""
        self.embedding.load(source)
        yield "embedding"
        for i, block in enumerate(self.blocks):
            block.load(source)
            yield f"layer {i}"
        self.norm.load(source)
        self.head.load(source)
        yield "head"

    def forward(self, batch: BatchView, kv: KVCache) -> Tensor:
        """hidden_TD after the final norm, fp32 on the CPU; writes this step's keys and values into `kv`."""
        residual_TD, x_TD = self.embedding(batch.token_ids_T), None
        for block, layer_kv in zip(self.blocks, kv.layers, strict=True):
            x_TD = block.attention(x_TD, residual_TD, block.attention_norm, self.rope, batch, layer_kv)
            x_TD = block.feed_forward(x_TD, residual_TD, block.ffn_norm)
        return self.norm(x_TD, residual_TD)

    def logits(self, hidden_SD: Tensor) -> Tensor:
        """This rank's logits [S, its share of the vocabulary]; see VocabParallelHead.gather for all of them."""
        return self.head(hidden_SD)
