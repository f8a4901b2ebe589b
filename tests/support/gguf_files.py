"""GGUF files of small models, written by the `gguf` package."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, quants
from torch import Tensor

from megatron_infer.model.formats import TensorSource
from megatron_infer.model.weights import expected_tensors, gguf_name
from megatron_infer.model_config import ModelConfig


def architecture_of(config: ModelConfig) -> str:
    if config.qk_norm:
        return "qwen3"
    return "qwen2" if config.attention_bias and not config.attention_output_bias else "llama"


def interleaved(tensor: Tensor, head_dim: int) -> Tensor:
    """Rows of q or k in the order that llama.cpp's converter gives them: halves of a head, row by row in turn."""
    heads = tensor.reshape(-1, 2, head_dim // 2, *tensor.shape[1:])
    return heads.transpose(1, 2).reshape(tensor.shape)


def raw_blocks(tensor: Tensor, kind: str, seed: int) -> np.ndarray[Any, Any]:
    """The tensor in blocks of a type; of K types, which `gguf` only reads, random blocks of its shape."""
    number = GGMLQuantizationType[kind]
    values = tensor.float().numpy()
    if not kind.endswith("_K"):
        return quants.quantize(values, number)
    block, block_bytes = gguf.GGML_QUANT_SIZES[number]
    shape = (*values.shape[:-1], values.shape[-1] // block * block_bytes)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_gguf(
    path: Path, config: ModelConfig, source: TensorSource, kind: str = "BF16", metadata: Mapping[str, Any] | None = None
) -> dict[str, np.ndarray[Any, Any]]:
    """Write matrices in type `kind`, vectors in it or else in fp32; `metadata` replaces keys, None leaves one out.

    Returns each tensor's stored values, by its name in the file, in fp32 as the `gguf` package reads them.
    """
    arch = architecture_of(config)
    writer = gguf.GGUFWriter(path, arch)
    values: dict[str, Any] = {
        f"{arch}.block_count": config.num_hidden_layers,
        f"{arch}.context_length": config.max_position_embeddings,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": config.num_attention_heads,
        f"{arch}.attention.head_count_kv": config.num_key_value_heads,
        f"{arch}.attention.key_length": config.head_dim,
        f"{arch}.attention.value_length": config.head_dim,
        f"{arch}.rope.dimension_count": config.head_dim,
        f"{arch}.rope.freq_base": config.rope_theta,
        f"{arch}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "tokenizer.ggml.bos_token_id": config.bos_token_id,
        "tokenizer.ggml.eos_token_id": config.eos_token_ids[0],
        **(metadata or {}),
    }
    for key, value in values.items():
        if value is not None:
            add_value(writer, key, value)
    stored = {}
    for seed, name in enumerate(expected_tensors(config)):
        tensor = source.read(name)
        if arch == "llama" and name.split(".")[-2] in ("wq", "wk"):
            tensor = interleaved(tensor, config.head_dim)
        own = kind if tensor.dim() > 1 or kind in ("BF16", "F16") else "F32"
        raw = raw_blocks(tensor, own, seed)
        writer.add_tensor(gguf_name(name), raw, raw_dtype=GGMLQuantizationType[own])
        with np.errstate(all="ignore"):
            stored[gguf_name(name)] = quants.dequantize(raw, GGMLQuantizationType[own])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    kinds.get(type(value), writer.add_array)(key, value)
