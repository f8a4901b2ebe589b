"""From the knobs a user gave to those an engine runs with: every "auto" and None decided, or refused with the remedy.

Reads no weight and starts no process.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from megatron_infer.config import EngineConfig
from megatron_infer.engine.topology import usable_cores
from megatron_infer.model.formats import check_fp8
from megatron_infer.model_config import ModelConfig
from megatron_infer.world import World


def resolve(config: EngineConfig, model: ModelConfig, world: World) -> EngineConfig:
    """Fill in every knob that can be known before the weights are loaded, and check it against model and host.

    Raises:
        ValueError: the model cannot be split that way, it is stored quantised in another format, or the device is not
            there.
    """
    size = config.tensor_parallel_size or world.size
    model.validate_tp(size)
    sharing = world.local_size if world.is_launched else size
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device != "cpu" and not torch.cuda.is_available():
        raise ValueError(
            f"device {device!r} was asked for, but torch sees no GPU; use device='cpu' or a CUDA build of torch"
        )
    if device == "cuda" and sharing > torch.cuda.device_count():
        raise ValueError(
            f"{sharing} ranks on this host but only {torch.cuda.device_count()} GPUs; start fewer ranks, use "
            "device='cpu', or put all ranks on one GPU with device='cuda:0' (slower than one rank)"
        )
    if device not in ("cpu", "cuda") and torch.device(device).index >= torch.cuda.device_count():
        raise ValueError(f"device {device!r} was asked for, but the last GPU is cuda:{torch.cuda.device_count() - 1}")
    if device == "cpu" and config.ops in ("triton", "vendor"):
        raise ValueError(
            f"ops {config.ops!r} are for GPUs; on the CPU no answer depends on the batch, which 'auto', 'native' and "
            "'reference' keep to"
        )
    dtype = config.dtype
    if dtype == "auto":
        dtype = "float32" if model.torch_dtype == "float32" else "bfloat16"
    longest = config.max_model_len or model.max_position_embeddings
    if longest > model.max_position_embeddings:
        raise ValueError(
            f"max_model_len {longest} exceeds the model's {model.max_position_embeddings} positions; lower it"
        )
    quantization = _quantization(config.quantization, model)
    if quantization == "fp8":
        capability = None if device == "cpu" else torch.cuda.get_device_capability(device)
        check_fp8(model, config, size, capability)
    return replace(
        config,
        tensor_parallel_size=size,
        device=device,
        dtype=dtype,
        quantization=quantization,
        kv_cache_dtype=dtype if config.kv_cache_dtype == "auto" else config.kv_cache_dtype,
        max_model_len=longest,
        num_threads=config.num_threads or max(1, usable_cores() // sharing),
    )


def _quantization(asked: str, model: ModelConfig) -> str:
    stored = model.quantization.format if model.quantization else None
    if asked == "auto":
        return stored or "none"
    if stored and asked != stored:
        raise ValueError(
            f"quantization {asked!r} was asked for, but the checkpoint is stored in {stored}; leave it at 'auto', or "
            "take the checkpoint before quantization (python -m checkpoints_convert quantize makes others from it)"
        )
    return asked
