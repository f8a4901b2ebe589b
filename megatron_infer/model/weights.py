"""Names, shapes and shard rules of a model's weights.

Owns the canonical (de-fused) names, their two stored spellings (Hugging Face, Megatron with interleaved QKV) and how
Megatron divides each tensor among ranks. Knows no files and reads nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from megatron_infer.model.formats import bytes_per_weight, stored_dtypes
from megatron_infer.model_config import ModelConfig

RowRange = tuple[int, int]
"""Rows [start, stop) of a tensor's first dimension."""

_HF_LAYER_NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_HF_TOP_NAMES = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_GGUF_NAMES = {
    "tok_embeddings": "token_embd", "norm": "output_norm", "output": "output", "attention.wq": "attn_q",
    "attention.wk": "attn_k", "attention.wv": "attn_v", "attention.wo": "attn_output", "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down", "feed_forward.w3": "ffn_up", "attention_norm": "attn_norm", "ffn_norm": "ffn_norm",
    "attention.q_norm": "attn_q_norm", "attention.k_norm": "attn_k_norm",
}  # fmt: skip
_FUSED = "query_key_value"
_LINEARS = ("wq", "wk", "wv", "wo", "w1", "w2", "w3", "output", _FUSED)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a checkpoint stores it.

    Attributes:
        shape: of the whole tensor, over all shards.
        axis: dimension that tensor parallelism divides; None: every shard has the whole tensor.
        unit: the division falls on multiples of this many rows (a whole KV group of the fused QKV matrix).
        dtype: the only one it may have; None: any floating one.
    """

    shape: tuple[int, ...]
    axis: int | None = None
    unit: int = 1
    dtype: torch.dtype | None = None

    def shard_range(self, rank: int, size: int) -> tuple[int, int]:
        """What shard `rank` of `size` holds of dimension `axis`."""
        assert self.axis is not None
        units = self.shape[self.axis] // self.unit
        return units * rank // size * self.unit, units * (rank + 1) // size * self.unit

    def shard_shape(self, rank: int, size: int) -> tuple[int, ...]:
        """Shape of the tensor inside shard `rank` of `size`."""
        if self.axis is None:
            return self.shape
        start, stop = self.shard_range(rank, size)
        return (*self.shape[: self.axis], stop - start, *self.shape[self.axis + 1 :])


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name -> full shape as stored of every tensor this model has, in the order the network uses them.

    A quantised linear layer has the tensors `weight`, int8 or two int4 to a byte, and `scales`.
    """
    hidden, ffn = config.hidden_size, config.intermediate_size
    query = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    out: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (config.vocab_size, hidden)}
    linears = (
        ("attention.wq", query, hidden, config.attention_bias),
        ("attention.wk", kv, hidden, config.attention_bias),
        ("attention.wv", kv, hidden, config.attention_bias),
        ("attention.wo", hidden, query, config.attention_output_bias),
        ("feed_forward.w1", ffn, hidden, config.mlp_bias),
        ("feed_forward.w3", ffn, hidden, config.mlp_bias),
        ("feed_forward.w2", hidden, ffn, config.mlp_bias),
    )
    for layer in range(config.num_hidden_layers):
        out[f"layers.{layer}.attention_norm.weight"] = (hidden,)
        out[f"layers.{layer}.ffn_norm.weight"] = (hidden,)
        if config.qk_norm:
            out |= {f"layers.{layer}.attention.{name}_norm.weight": (config.head_dim,) for name in "qk"}
        for name, out_dim, in_dim, bias in linears:
            out |= _linear_tensors(config, f"layers.{layer}.{name}", out_dim, in_dim)
            if bias:
                out[f"layers.{layer}.{name}.bias"] = (out_dim,)
    out["norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        out |= _linear_tensors(config, "output", config.vocab_size, hidden)
    return out


def _linear_tensors(config: ModelConfig, name: str, out_dim: int, in_dim: int) -> dict[str, tuple[int, ...]]:
    weight, stored = f"{name}.weight", config.quantization
    if stored is None:
        return {weight: (out_dim, in_dim)}
    columns = in_dim // 2 if stored_dtype(config, weight) == torch.uint8 else in_dim
    return {weight: (out_dim, columns), f"{name}.scales": (out_dim, -(-in_dim // stored.group_size))}


def stored_dtype(config: ModelConfig, name: str) -> torch.dtype | None:
    """The dtype that a tensor of a quantised checkpoint must have; None: any floating one."""
    module, kind = name.split(".")[-2:]
    if kind == "scales":
        return torch.bfloat16
    if config.quantization is None or kind != "weight" or module not in _LINEARS:
        return None
    return torch.int8 if config.quantization.format == "int8" or module == "output" else torch.uint8


def hf_name(name: str) -> str:
    """The Hugging Face Llama-family name of a canonical tensor."""
    if name in _HF_TOP_NAMES:
        return _HF_TOP_NAMES[name]
    _, layer, rest = name.split(".", 2)
    module, kind = rest.rsplit(".", 1)
    return f"model.layers.{layer}.{_HF_LAYER_NAMES[module]}.{kind}"


def hf_tensors(config: ModelConfig) -> dict[str, StoredTensor]:
    """Hugging Face name -> stored tensor. That format is never divided, so `axis` is None throughout."""
    return {
        hf_name(name): StoredTensor(shape, dtype=stored_dtype(config, name))
        for name, shape in expected_tensors(config).items()
    }


def gguf_name(name: str) -> str:
    """The GGUF name of a canonical tensor."""
    module, kind = name.rsplit(".", 1)
    if not module.startswith("layers."):
        return f"{_GGUF_NAMES[module]}.{kind}"
    _, layer, module = module.split(".", 2)
    return f"blk.{layer}.{_GGUF_NAMES[module]}.{kind}"


def gguf_tensors(config: ModelConfig) -> dict[str, StoredTensor]:
    """GGUF name -> stored tensor; never divided, and quantised in ways that reading it undoes."""
    return {gguf_name(name): StoredTensor(shape) for name, shape in expected_tensors(config).items()}


def megatron_name(name: str) -> str:
    """The Megatron name of a canonical tensor; q, k and v share one fused tensor."""
    head, _, kind = name.rpartition(".")
    if head.endswith((".attention.wq", ".attention.wk", ".attention.wv")):
        return f"{head[:-2]}{_FUSED}.{kind}"
    return name


def megatron_tensors(config: ModelConfig) -> dict[str, StoredTensor]:
    """Megatron name -> stored tensor with the rule that divides it: column dim 0, row dim 1, vocabulary dim 0.

    The fused QKV matrix is interleaved by KV group (its query heads, then K, then V), so that a contiguous cut at a
    group boundary is a rank's share (aiXcoder-7B, megatron_mini/model/transformer.py).
    """
    group = group_rows(config)
    out: dict[str, StoredTensor] = {}
    for name, shape in expected_tensors(config).items():
        stored, dtype = megatron_name(name), stored_dtype(config, name)
        module, kind = name.split(".")[-2:]
        if stored != name:
            fused = (config.num_key_value_heads * group, *shape[1:])
            out[stored] = StoredTensor(fused, axis=0, unit=group, dtype=dtype)
        elif module in ("wo", "w2"):
            out[stored] = StoredTensor(shape, axis=None if kind == "bias" else 1, dtype=dtype)
        elif module in ("w1", "w3", "tok_embeddings", "output"):
            out[stored] = StoredTensor(shape, axis=0, dtype=dtype)
        else:
            out[stored] = StoredTensor(shape)
    return out


def group_rows(config: ModelConfig) -> int:
    """Rows of one KV group in the fused QKV matrix: its query heads, one key head, one value head."""
    return (config.num_attention_heads // config.num_key_value_heads + 2) * config.head_dim


def megatron_rows(config: ModelConfig, name: str, rows: RowRange) -> list[RowRange]:
    """Where rows [start, stop) of a canonical tensor lie in its Megatron tensor: ascending runs, in order."""
    start, stop = rows
    if megatron_name(name) == name:
        return [rows]
    width, offset = _width_and_offset(config, name)
    group = group_rows(config)
    runs = []
    while start < stop:
        index, inside = divmod(start, width)
        count = min(width - inside, stop - start)
        first = index * group + offset + inside
        runs.append((first, first + count))
        start += count
    return runs


def fused_parts(config: ModelConfig, name: str, group: int) -> list[tuple[str, RowRange]]:
    """Canonical tensors and rows that make up KV group `group` of the fused tensor `name`, in stored order."""
    head, _, kind = name.rpartition(".")
    prefix = head.removesuffix(_FUSED)
    parts = []
    for letter in "qkv":
        canonical = f"{prefix}w{letter}.{kind}"
        width, _ = _width_and_offset(config, canonical)
        parts.append((canonical, (group * width, (group + 1) * width)))
    return parts


def is_fused(name: str) -> bool:
    """Whether a Megatron tensor is the interleaved QKV matrix or its bias."""
    return name.split(".")[-2] == _FUSED


def _width_and_offset(config: ModelConfig, name: str) -> tuple[int, int]:
    """Rows of wq, wk or wv inside one KV group, and where they start in it."""
    dim = config.head_dim
    query = config.num_attention_heads // config.num_key_value_heads * dim
    return {"wq": (query, 0), "wk": (dim, query), "wv": (dim, query + dim)}[name.split(".")[-2]]


def check_num_shards(config: ModelConfig, num_shards: int) -> None:
    """Refuse a number of shards that whole KV groups, and whole groups of quantised weights, cannot be divided into.

    Raises:
        ValueError: listing the numbers that work.
    """
    kv_heads = config.num_key_value_heads
    good = [n for n in range(1, kv_heads + 1) if kv_heads % n == 0]
    what = f"the {kv_heads} KV heads"
    if config.quantization is not None:
        size = config.quantization.group_size
        in_dims = (config.num_attention_heads * config.head_dim, config.intermediate_size)
        good = [n for n in good if n == 1 or all(in_dim % (n * size) == 0 for in_dim in in_dims)]
        what += f" and the groups of {size} of {in_dims[0]} and {in_dims[1]} columns"
    if num_shards not in good:
        raise ValueError(
            f"{what} cannot be divided into {num_shards} shards; numbers that work: "
            f"{', '.join(map(str, good))} (any of them can be loaded at any tensor-parallel size)"
        )


def memory_estimate(config: ModelConfig, tp: int, dtype: torch.dtype, quantization: str = "none") -> int:
    """Bytes of weights on the fullest of `tp` ranks: matrices in `dtype` or quantised, norms and biases in fp32.

    A tied head counts twice, as the embedding is looked up by rows and the head is packed for multiplication; KV heads
    count on every rank that holds a copy. Padding of the packed layout and the scales of fp8 rows (well under 1%) are
    left out.
    """
    config.validate_tp(tp)
    hidden = config.hidden_size
    query = len(config.query_heads_on(0, tp)) * config.head_dim
    kv = len(config.kv_heads_on(0, tp)) * config.head_dim
    ffn, vocab = -(-config.intermediate_size // tp), -(-config.vocab_size // tp)
    matrices = hidden * (query + 2 * kv) + hidden * query + 3 * hidden * ffn
    vectors = 2 * hidden + 2 * config.head_dim * config.qk_norm
    vectors += (query + 2 * kv) * config.attention_bias + hidden * config.attention_output_bias
    vectors += (2 * ffn + hidden) * config.mlp_bias
    layers = config.num_hidden_layers
    fp32_bytes = 4
    linear_bytes, head_bytes = map(bytes_per_weight, stored_dtypes(dtype, quantization))
    weight_bytes = layers * matrices * linear_bytes + vocab * hidden * (dtype.itemsize + head_bytes)
    return math.ceil(weight_bytes) + (layers * vectors + hidden) * fp32_bytes
