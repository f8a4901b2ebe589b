"""Random weights made on the device, and what reading and multiplying with them costs. Knows no engine."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_infer.model.weights import expected_tensors, hf_name, memory_estimate
from megatron_infer.model_config import ModelConfig


@dataclass(frozen=True)
class SharedWeights:
    """Random weights under Hugging Face's names, so that peers can hold the very same tensors.

    Reads like a checkpoint.
    """

    config: ModelConfig
    tensors: Mapping[str, Tensor]

    @classmethod
    def random(cls, config: ModelConfig, device: torch.device) -> SharedWeights:
        """bf16 weights that keep activations near unit scale."""
        torch.manual_seed(0)
        tensors = {}
        for name, shape in expected_tensors(config).items():
            if len(shape) == 1:
                tensors[hf_name(name)] = torch.ones(shape, dtype=torch.bfloat16, device=device)
            else:
                noise = torch.empty(shape, dtype=torch.bfloat16, device=device).normal_()
                tensors[hf_name(name)] = noise if "embeddings" in name else noise.mul_(shape[1] ** -0.5)
        return cls(config, tensors)

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def read(self, name: str, rows: tuple[int, int] | None = None, cols: tuple[int, int] | None = None) -> Tensor:
        """A slice of a tensor by its canonical name."""
        tensor = self.tensors[hf_name(name)]
        tensor = tensor if rows is None else tensor[rows[0] : rows[1]]
        return tensor if cols is None else tensor[:, cols[0] : cols[1]]


def streamed_bytes(config: ModelConfig, quantization: str) -> int:
    """Weights that a decoding step must read: all but the embedding table, of which it reads single rows."""
    embedding = config.vocab_size * config.hidden_size * torch.bfloat16.itemsize
    return memory_estimate(config, 1, torch.bfloat16, quantization) - embedding


def kv_bytes_per_token(config: ModelConfig) -> int:
    """Of a bf16 cache, over all layers."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * torch.bfloat16.itemsize


def prefill_flops(config: ModelConfig, num_tokens: int) -> int:
    """Of a whole prompt: its linear layers, and both products of causal attention. The head sees one token only."""
    shapes = expected_tensors(config)
    linear = sum(math.prod(shape) for name, shape in shapes.items() if len(shape) == 2 and name.startswith("layers."))
    seen = num_tokens * (num_tokens + 1) // 2
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * seen
    return 2 * linear * num_tokens + attention
