"""Knobs that depend on model and host: what does not fit together is refused before a weight is read."""

from __future__ import annotations

from megatron_infer.config import EngineConfig
from megatron_infer.model_config import ModelConfig
from megatron_infer.ops import fp8


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
