"""The whole network: a Llama-shaped decoder (RMSNorm, RoPE, GQA, SwiGLU) of column/row-parallel layers.

Two model families differ by ModelConfig fields, never by code here. It knows no requests, tokens' text or files.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_infer.cache.kv_cache import KVCache
from megatron_infer.model.formats import Slice, TensorSource, WeightFormat
from megatron_infer.model.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    VocabParallelHead,
)
from megatron_infer.model.rope import rope_tables
from megatron_infer.model_config import ModelConfig
from megatron_infer.ops import BatchView, Heads, LayerKV, NormWeight, Ops, Rope, Stream
from megatron_infer.tensor_parallel.group import TPGroup


class Norm:
    """RMSNorm of the residual stream, or of rows of another `dim`, whole on every rank."""

    def __init__(
        self, name: str, config: ModelConfig, *, ops: Ops, device: torch.device, dim: int | None = None
    ) -> None:
        self.name, self.ops = name, ops
        weight_D = torch.empty(dim or config.hidden_size, dtype=torch.float32, device=device)
        self.weight = NormWeight(weight_D, config.rms_norm_eps)

    def load(self, source: TensorSource) -> None:
        self.weight.weight_D.copy_(source.read(f"{self.name}.weight"))

    def __call__(self, stream: Stream) -> Tensor:
        """The norm of the stream, to which what is pending is added first."""
        return self.ops.normed(stream, self.weight)


class Attention:
    """out(attention(qkv(norm(x)))), grouped-query over the paged cache: this rank's query heads and their KV heads."""

    def __init__(self, config: ModelConfig, layer: int, *, tp: TPGroup, ops: Ops, fmt: WeightFormat) -> None:
        name, dim = f"layers.{layer}.attention", config.head_dim
        query, kv = config.query_heads_on(tp.rank, tp.size), config.kv_heads_on(tp.rank, tp.size)
        self.ops, self.heads = ops, Heads(len(query), len(kv), dim**-0.5)
        self.norm = Norm(f"{name}_norm", config, ops=ops, device=tp.device)
        named = ("q_norm", "k_norm") if config.qk_norm else ()
        self.head_norms = [Norm(f"{name}.{n}", config, ops=ops, device=tp.device, dim=dim) for n in named]
        query_rows, kv_rows = ((heads.start * dim, heads.stop * dim) for heads in (query, kv))
        parts = [Slice(f"{name}.wq", query_rows), Slice(f"{name}.wk", kv_rows), Slice(f"{name}.wv", kv_rows)]
        hidden, all_heads, bias = config.hidden_size, config.num_attention_heads * dim, config.attention_output_bias
        self.qkv = ColumnParallelLinear("attention.qkv", hidden, parts, bias=config.attention_bias, fmt=fmt)
        self.out = RowParallelLinear("attention.out", f"{name}.wo", all_heads, hidden, bias=bias, tp=tp, fmt=fmt)

    def add_to(self, stream: Stream, rope: Rope, batch: BatchView, kv: LayerKV) -> None:
        """Add the attention over x, the stream, to it; writes this step's keys and values into `kv`."""
        if self.head_norms:
            # Op by op: the halves of a layer at once know of no norm between the product and the rotation.
            q_TNH = self.ops.rope_store_kv(self._with_normed_heads(stream), rope, batch, kv, self.heads)
            o_TNH = self.ops.paged_attention(q_TNH, batch, kv, self.heads.scale)
            stream.pending_TD = self.ops.linear(o_TNH.flatten(1), self.out.packed)
        else:
            self.ops.attention_layer(
                stream, self.norm.weight, self.qkv.packed, self.out.packed, rope, batch, kv, self.heads,
                self.out.completes_sum,
            )  # fmt: skip
        self.out.reduce(stream)

    def _with_normed_heads(self, stream: Stream) -> Tensor:
        """The product qkv_TC, each of its query and key heads normed by itself (Qwen3)."""
        qkv_TC = self.qkv(self.norm(stream))
        heads_TNH = qkv_TC.view(len(qkv_TC), -1, self.head_norms[0].weight.weight_D.shape[0])
        q_TNH, k_TGH, _ = heads_TNH.split([self.heads.num, self.heads.num_kv, self.heads.num_kv], dim=1)
        for norm, x_TNH in zip(self.head_norms, (q_TNH, k_TGH), strict=True):
            x_TNH.copy_(self.ops.rms_norm(x_TNH.flatten(0, 1).contiguous(), norm.weight).view_as(x_TNH))
        return qkv_TC


class FeedForward:
    """SwiGLU of y = norm(x): w2(silu(w1 y) * w3 y). Gate and up are cut where w2's K-chunks are, rank by rank."""

    def __init__(self, config: ModelConfig, layer: int, *, tp: TPGroup, ops: Ops, fmt: WeightFormat) -> None:
        name = f"layers.{layer}.feed_forward"
        self.ops = ops
        self.norm = Norm(f"layers.{layer}.ffn_norm", config, ops=ops, device=tp.device)
        hidden, ffn, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.down = RowParallelLinear("feed_forward.down", f"{name}.w2", ffn, hidden, bias=bias, tp=tp, fmt=fmt)
        parts = [Slice(f"{name}.w1", self.down.part.cols), Slice(f"{name}.w3", self.down.part.cols)]
        self.gate_up = ColumnParallelLinear("feed_forward.gate_up", hidden, parts, bias=bias, fmt=fmt)

    def add_to(self, stream: Stream) -> None:
        """Add the feed-forward network over x, the stream, to it."""
        self.ops.feed_forward_layer(
            stream, self.norm.weight, self.gate_up.packed, self.down.packed, self.down.completes_sum
        )
        self.down.reduce(stream)


class Block:
    """One decoder layer."""

    def __init__(self, config: ModelConfig, layer: int, *, tp: TPGroup, ops: Ops, fmt: WeightFormat) -> None:
        self.attention = Attention(config, layer, tp=tp, ops=ops, fmt=fmt)
        self.feed_forward = FeedForward(config, layer, tp=tp, ops=ops, fmt=fmt)

    def load(self, source: TensorSource) -> None:
        """Read this rank's slice of the layer's tensors, one at a time."""
        attention, ffn = self.attention, self.feed_forward
        for norm in (attention.norm, *attention.head_norms, ffn.norm):
            norm.load(source)
        for linear in (attention.qkv, attention.out, ffn.gate_up, ffn.down):
            linear.load(source)

    def __call__(self, stream: Stream, rope: Rope, batch: BatchView, kv: LayerKV) -> None:
        self.attention.add_to(stream, rope, batch, kv)
        self.feed_forward.add_to(stream)


class Transformer:
    """The decoder of one tensor-parallel rank.

    Args:
        config: the model's shape.
        tp: this rank's group; the layers divide themselves by it.
        ops: what computes it, and halves of its layers. dtype: of the embedding table.
        fmt, head_fmt: how the weights of the blocks and of the head are stored.
        num_positions: how many positions the rotary tables cover.
    """

    def __init__(
        self, config: ModelConfig, *, tp: TPGroup, ops: Ops, fmt: WeightFormat, head_fmt: WeightFormat,
        dtype: torch.dtype, num_positions: int,
    ) -> None:  # fmt: skip
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
        self.rope = Rope(cos_PH.to(tp.device), sin_PH.to(tp.device))

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
        stream = Stream(self.embedding(batch.token_ids_T))
        for block, layer_kv in zip(self.blocks, kv.layers, strict=True):
            block(stream, self.rope, batch, layer_kv)
        return self.norm(stream)

    def logits(self, hidden_SD: Tensor) -> Tensor:
        """This rank's logits [S, its share of the vocabulary]; see VocabParallelHead.gather for all of them."""
        return self.head(hidden_SD)
