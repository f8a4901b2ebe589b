"""From the knobs a user gave to those an engine runs with: every "auto" and None decided, or refused with the remedy.

Reads no weight and starts no process.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from megatron_infer.config import EngineConfig
from megatron_infer.engine.topology import has_own_gpu, usable_cores
from megatron_infer.model_config import ModelConfig
from megatron_infer.ops import fp8
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
    if device == "cuda" and sharing > torch.cuda.device_count() and not has_own_gpu(world):
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
    # On a GPU the steps that are planned ahead of their samples are worth more than drafts, which do without them.
    num_draft_tokens = (15 if device == "cpu" else 0) if config.num_draft_tokens is None else config.num_draft_tokens
    return replace(
        config,
        tensor_parallel_size=size,
        device=device,
        dtype=dtype,
        quantization=quantization,
        kv_cache_dtype=dtype if config.kv_cache_dtype == "auto" else config.kv_cache_dtype,
        max_model_len=longest,
        num_draft_tokens=num_draft_tokens,
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


def check_fp8(model: ModelConfig, config: EngineConfig, tp: int, capability: tuple[int, int] | None) -> None:
    """Refuse fp8 weights where they cannot be multiplied, before any is read.

    Args:
        tp: the tensor-parallel degree. capability: of the GPU; None on the CPU.
    Raises:
        ValueError: with what to use instead.
    """
    needs = f"quantization 'fp8' needs a GPU of compute capability {'.'.join(map(str, fp8.CAPABILITY))} or more"
    if capability is None:
        raise ValueError(f"{needs}; on the CPU use quantization='int8', which works everywhere")
    if capability < fp8.CAPABILITY:
        raise ValueError(f"{needs}, this one has {'.'.join(map(str, capability))}; use quantization='int8'")
    if config.deterministic:
        raise ValueError(
            "quantization 'fp8' rounds and sums in the order of torch's kernels, which deterministic=True rules out; "
            "use quantization='int8', or leave deterministic off"
        )
    query, kv = (len(heads(0, tp)) * model.head_dim for heads in (model.query_heads_on, model.kv_heads_on))
    sizes = {
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        f"query columns on each of {tp} ranks": query,
        f"key columns on each of {tp} ranks": 2 * kv,
    }
    odd = [f"{what} {size}" for what, size in sizes.items() if size % fp8.UNIT]
    if odd:
        raise ValueError(
            f"quantization 'fp8' needs linear layers of multiples of {fp8.UNIT}, but this model has "
            f"{' and '.join(odd)}; use quantization='int8'"
        )
