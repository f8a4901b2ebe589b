"""A GGUF file as tensors and a ModelConfig.

Owns what GGUF says otherwise than Hugging Face: names of settings, the order of llama's q and k rows, blocks.
How a block is decoded is the `gguf` package's knowledge. Knows no ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_infer.checks import int_in
from megatron_infer.gguf_header import BLOCKS, GgufHeader
from megatron_infer.model.pieces import refuse
from megatron_infer.model.tensor_files import Range, TensorInfo, check_unchanged, file_stamp
from megatron_infer.model_config import ModelConfig

_ARCHITECTURES = ("llama", "qwen2", "qwen3")
_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_SETTINGS = {
    "block_count": "num_hidden_layers", "context_length": "max_position_embeddings", "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size", "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps", "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim", "rope.freq_base": "rope_theta",
}  # fmt: skip
"""Settings of an architecture, and what config.json calls them; the first six are in every file."""
_NUM_REQUIRED = 6
_UNUSED = ("vocab_size", "attention.value_length", "rope.dimension_count", "tensor_data_layout")
_OFF = (
    ("rope.scaling.type", "none"), ("expert_count", "0"), ("expert_used_count", "0"), ("attention.causal", "True"),
    ("attention.sliding_window", "0"),
)  # fmt: skip
"""Features that this network does not have, and the value that turns them off."""
_END_TOKENS = (
    "eos", "eot", "eom", "fim_pre", "fim_suf", "fim_mid", "fim_pad", "fim_rep", "fim_sep", "prefix", "suffix", "middle",
)  # fmt: skip
_BLOCK_WEIGHTS = 1 << 16
"""Weights decoded at a time: numpy's temporaries stay in the cache."""


def gguf_config(header: GgufHeader) -> ModelConfig:
    """The shape of a GGUF file's model, under the checks that a config.json goes through.

    Raises:
        ValueError: another architecture, a setting that is missing or wrong, or one that this network does not have.
    """
    architecture, tensors = header.get("general.architecture", str), header.tensors
    if architecture not in _ARCHITECTURES:
        raise ValueError(
            f"{header.path}: architecture {architecture!r} is not supported; supported: {', '.join(_ARCHITECTURES)}"
        )
    given = {
        key.removeprefix(f"{architecture}."): value
        for key, value in header.metadata.items()
        if key.startswith(f"{architecture}.")
    }
    foreign = [f"{architecture}.{key} ({str(value)[:40]})" for key, value in given.items() if _is_foreign(key, value)]
    foreign += [name for name in ("rope_freqs.weight",) if name in tensors]
    refuse(
        [f"{header.path} has {name}, which this network does not know" for name in foreign],
        "If the model's safetensors load, take those",
    )
    missing = [f"{architecture}.{key}" for key in list(_SETTINGS)[:_NUM_REQUIRED] if key not in given]
    missing += [name for name in ("token_embd.weight",) if name not in tensors]
    refuse([f"{header.path} has no {name}" for name in missing], "Download or convert the model again")
    ids = [header.get(f"tokenizer.ggml.{name}_token_id", int) for name in _END_TOKENS]
    kinds = {info.type for info in tensors.values() if len(info.shape) > 1}
    raw: dict[str, Any] = {
        **{name: given[key] for key, name in _SETTINGS.items() if key in given},
        "model_type": architecture,
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": header.get("tokenizer.ggml.bos_token_id", int),
        "eos_token_id": list(dict.fromkeys(i for i in ids if i is not None)),
        "torch_dtype": _FLOATS[kinds.pop()] if kinds in ({"F32"}, {"F16"}) else "bfloat16",
    }
    # The file has it in fp32: 1e-6 comes back as 9.99999997e-07.
    raw["rms_norm_eps"] = float(f"{header.get(f'{architecture}.attention.layer_norm_rms_epsilon', float):.6g}")
    int_in(f"{header.path}: {architecture}.block_count", raw["num_hidden_layers"], 1, len(tensors))
    try:
        config = ModelConfig.from_hf(raw)
    except ValueError as error:
        raise ValueError(f"{header.path}: its metadata, read as a config.json: {error}") from None
    for key in ("attention.value_length", "rope.dimension_count"):
        if given.get(key, config.head_dim) != config.head_dim:
            raise ValueError(f"{header.path}: {architecture}.{key} is {given[key]}, a head has {config.head_dim}")
    return config


def _is_foreign(key: str, value: Any) -> bool:
    """Whether a setting may change the network in a way that would go unnoticed."""
    known = key in _SETTINGS or key in _UNUSED or (key, str(value)) in _OFF
    return not known or not isinstance(value, int | float | str)


class GgufFile:
    """A `.gguf` file as a TensorFile. It is mapped anew for every read, so that pages read do not stay resident."""

    def __init__(self, header: GgufHeader, config: ModelConfig) -> None:
        self.path, self._header, self._head_dim = header.path, header, config.head_dim
        self._stamp = file_stamp(header.path)
        self._interleaves = header.metadata["general.architecture"] == "llama"
        self.metadata: Mapping[str, str] = {}
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(info.shape, _FLOATS.get(info.type, "float32")) for name, info in header.tensors.items()
        }
        self._decoder = _decoder(header)

    def read(self, key: str, rows: Range, cols: Range | None) -> Tensor:
        if not self._interleaves or key.split(".")[-2] not in ("attn_q", "attn_k"):
            return self._read(key, rows, cols)
        # llama.cpp rotates neighbouring rows of a head, we (as Hugging Face) rows half a head apart.
        dim = self._head_dim
        start, stop = rows[0] // dim * dim, -(-rows[1] // dim) * dim
        stored = self._read(key, (start, stop), cols)
        heads = stored.view((stop - start) // dim, dim // 2, 2, *stored.shape[1:])
        return heads.transpose(1, 2).flatten(0, 2)[rows[0] - start : rows[1] - start]

    def close(self) -> None:
        pass

    def _read(self, key: str, rows: Range, cols: Range | None) -> Tensor:
        """As the file has it; whole blocks are decoded, and what lies outside of the columns is cut off."""
        check_unchanged(self.path, self._stamp)
        info = self._header.tensors[key]
        block, block_bytes = BLOCKS[info.type]
        row_blocks = info.shape[1] // block if len(info.shape) > 1 else 1
        low, high = (0, row_blocks * block) if cols is None else cols
        first, last = low // block, -(-high // block)
        start = self._header.first_byte + info.offset + rows[0] * row_blocks * block_bytes
        shape = (rows[1] - rows[0], row_blocks * block_bytes)
        if not shape[0] or low == high:
            empty = (shape[0], high - low)[: len(info.shape)]
            return torch.empty(empty, dtype=getattr(torch, self.tensors[key].dtype))
        data = np.memmap(self.path, np.uint8, "c", start, shape)[:, first * block_bytes : last * block_bytes]
        if info.type in _FLOATS:
            tensor = torch.from_numpy(data).view(getattr(torch, _FLOATS[info.type]))
        else:
            tensor = self._decode(data, info.type, (last - first) * block)
            tensor = tensor[:, low - first * block : high - first * block]
        return tensor.contiguous() if len(info.shape) > 1 else tensor.flatten()

    def _decode(self, data: np.ndarray[Any, Any], kind: str, num_cols: int) -> Tensor:
        """Block by block, in threads: numpy works without the interpreter's lock."""
        out = np.empty((len(data), num_cols), np.float32)
        step = max(1, _BLOCK_WEIGHTS // num_cols)

        def decode(start: int) -> None:
            part = out[start : start + step]
            with np.errstate(all="ignore"):
                part[:] = self._decoder(data[start : start + step].reshape(1, -1), kind).reshape(part.shape)

        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            list(threads.map(decode, range(0, len(data), step)))
        return torch.from_numpy(out)


def _decoder(header: GgufHeader) -> Callable[[np.ndarray[Any, Any], str], np.ndarray[Any, Any]]:
    """Bytes of blocks of a type to fp32. Raises ValueError where that needs a package that is not there."""
    quantized = [name for name, info in header.tensors.items() if info.type not in _FLOATS]
    try:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError:
        refuse([f"{header.path} holds quantized weights" for _ in quantized[:1]], "To read them, pip install gguf")
    return lambda data, kind: dequantize(data, GGMLQuantizationType[kind])
