"""The files of the benchmark's model: one set of random weights in every format that an engine reads.

Written once per work directory. Knows no engine.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints_convert.export import save_hf, save_sharded
from megatron_infer.model.weights import expected_tensors
from megatron_infer.model_config import ModelConfig

SEED = 20240607

_GGUF_LAYER_NAMES = {
    "attention_norm": "attn_norm",
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "ffn_norm": "ffn_norm",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w3": "ffn_up",
    "feed_forward.w2": "ffn_down",
}
_GGUF_TOP_NAMES = {"tok_embeddings": "token_embd", "norm": "output_norm", "output": "output"}


@lru_cache(maxsize=4)  # writers ask for a few rows at a time, q, k and v in turns
def _draw(name: str, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(SEED + zlib.crc32(name.encode()))
    noise = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        return (1 + 0.1 * noise).to(torch.bfloat16)
    scale = 1.0 if name.startswith("tok_embeddings") else 1 / math.sqrt(shape[1])
    return (scale * noise).to(torch.bfloat16)


class RandomWeights:
    """Weights of the right shapes, drawn per name, of a scale that keeps activations near one.

    Norms differ from one and layers from each other, so that engines that disagree about a name or an order disagree
    about the answers.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.shapes = expected_tensors(config)

    def tensor(self, name: str) -> Tensor:
        """A whole tensor, bfloat16."""
        return _draw(name, self.shapes[name])

    def read(self, name: str, rows: tuple[int, int] | None = None, cols: tuple[int, int] | None = None) -> Tensor:
        """A slice of a tensor, as the checkpoint writers want it."""
        full = self.tensor(name)
        full = full if rows is None else full[rows[0] : rows[1]]
        return full if cols is None else full[:, cols[0] : cols[1]]


class ModelFiles:
    """Where the model's files are below a work directory, and how they come to be."""

    def __init__(self, work: Path, config: ModelConfig) -> None:
        shape = (
            config.vocab_size, config.hidden_size, config.num_hidden_layers, config.num_attention_heads,
            config.num_key_value_heads, config.head_dim, config.intermediate_size,
        )  # fmt: skip
        self.config = config
        # Another shape is another directory: no run can take up the files of an older version of this benchmark.
        self.directory = work / ("model-" + "-".join(map(str, shape)))
        self.checkpoint = self.directory / "checkpoint"
        self.hf = self.directory / "huggingface"

    def gguf(self, storage: str) -> Path:
        return self.directory / f"model-{storage}.gguf"

    def write(self, projects: Iterable[tuple[str, str]], tokenizer: Path) -> None:
        """Write what is missing for (project, storage format) pairs."""
        self.directory.mkdir(parents=True, exist_ok=True)
        weights = RandomWeights(self.config)
        for project, storage in projects:
            if project == "megatron_infer" and not self.checkpoint.exists():
                save_sharded(weights.read, self.config, self.checkpoint, 2, extra_files=[tokenizer])
            elif project == "transformers" and not self.hf.exists():
                save_hf(weights.read, self.config, self.hf)
            elif project == "llama.cpp" and not self.gguf(storage).exists():
                partial = self.gguf(storage).with_suffix(".partial")
                write_gguf(weights, self.config, partial, storage)
                partial.rename(self.gguf(storage))
        _draw.cache_clear()


def write_gguf(weights: RandomWeights, config: ModelConfig, path: Path, storage: str) -> None:
    """A llama.cpp file with weights in `storage` (bf16, q8_0 or q4_0) and no tokenizer.

    Norms are fp32. In the q4_0 file the output head is q8_0, as it is in this engine's int4.
    """
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_tokenizer_model("none")  # llama.cpp then has `vocab_size` dummy tokens
    kinds = {"bf16": gguf.GGMLQuantizationType.BF16, "q8_0": gguf.GGMLQuantizationType.Q8_0}
    kinds["q4_0"] = gguf.GGMLQuantizationType.Q4_0
    for name, shape in expected_tensors(config).items():
        kind = kinds[storage]
        if len(shape) == 1:
            kind = gguf.GGMLQuantizationType.F32
        elif name == "output.weight" and storage == "q4_0":
            kind = kinds["q8_0"]
        values = _in_gguf_order(weights.tensor(name), name, config)
        writer.add_tensor(_gguf_name(name), _quantized(gguf, values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _quantized(gguf: Any, values: Tensor, kind: Any) -> Any:
    return gguf.quants.quantize(values.float().numpy(), kind)


def _gguf_name(name: str) -> str:
    module, _, _ = name.rpartition(".")
    if module in _GGUF_TOP_NAMES:
        return f"{_GGUF_TOP_NAMES[module]}.weight"
    _, layer, rest = module.split(".", 2)
    return f"blk.{layer}.{_GGUF_LAYER_NAMES[rest]}.weight"


def _in_gguf_order(values: Tensor, name: str, config: ModelConfig) -> Tensor:
    """q and k with their rows moved: llama.cpp rotates neighbours (2i, 2i + 1), a checkpoint (i, i + head_dim / 2)."""
    heads = {"wq": config.num_attention_heads, "wk": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return values
    halves = values.view(heads, 2, config.head_dim // 2, values.shape[1])
    return halves.transpose(1, 2).reshape(values.shape)
