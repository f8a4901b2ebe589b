"""How the engine runs a model: EngineConfig, frozen and validated at construction, with errors that name the remedy."""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_infer.checks import int_in, one_of, option, positive_int
from megatron_infer.model_config import TP_SIZES


@dataclass(frozen=True)
class EngineConfig:
    """Every knob of the engine. `None` and "auto" are resolved at start, and the result is printed with its source."""

    tensor_parallel_size: int | None = option(None, "tensor-parallel ranks: 1, 2, 4 or 8 (default: the world size)")
    device: str = option("auto", "auto, cpu, cuda (a GPU per rank) or cuda:N (all ranks of a host on GPU N)")
    dtype: str = option("auto", "weights: auto (as stored; float16 becomes bfloat16 on the CPU), bfloat16 or float32")
    quantization: str = option(
        "auto",
        "weights: auto (as stored), none, or rounded while loading: int8 (8.5 bits each), int4 (4.5 bits) or fp8 (8 "
        "bits, activations too; GPUs from compute capability 8.9 on)",
    )
    kv_cache_dtype: str = option("auto", "KV cache: auto (as the weights), bfloat16 or float32")
    max_model_len: int | None = option(
        None, "longest prompt + completion in tokens (default: what the model was made for)"
    )
    max_num_seqs: int = option(64, "sequences computed together")
    max_num_batched_tokens: int = option(2048, "tokens computed in one step; longer prompts are prefilled in chunks")
    block_size: int = option(16, "tokens per KV-cache block")
    kv_cache_memory_bytes: int | None = option(None, "KV cache per rank in bytes (default: from measured free memory)")
    gpu_memory_utilization: float = option(0.9, "share of a GPU's memory the engine may use")
    cuda_graph_memory_bytes: int = option(512 << 20, "GPU memory for recorded steps (CUDA graphs) in bytes; 0: none")
    enable_prefix_caching: bool = option(True, "reuse the KV cache of equal prompt heads")
    num_threads: int | None = option(None, "CPU threads per rank (default: the host's cores divided among its ranks)")
    ops: str = option(
        "auto", "implementation of all operations: auto (the fastest that proves itself), native (CPU), triton (GPU), "
        "vendor (torch's own, GPU) or reference (plain torch, slow)"
    )  # fmt: skip
    cpu_isa: str = option("auto", "instructions of the CPU kernels: auto, avx512, avx2, neon or generic; same answers")
    num_draft_tokens: int | None = option(
        None, "most tokens drafted per sequence and step from prompt and recent answers; 0: none (default: 15 on the "
        "CPU, 0 on GPUs)"
    )  # fmt: skip
    deterministic: bool = option(False, "GPU: the CPU's numerics contract, slower; the CPU always keeps it")
    verify_on_load: bool = option(
        False, "first hash the checkpoint against its manifest.json; reads all of it once more, on rank 0"
    )
    rank_timeout_seconds: float = option(
        60.0, "longest wait in a step for a rank that hangs; ten times as long while ranks start and load"
    )

    def __post_init__(self) -> None:
        if not re.fullmatch(r"cuda:\d+", self.device):
            one_of("device", self.device, ("auto", "cpu", "cuda", "cuda:N"))
        if self.dtype in ("int8", "int4", "fp8"):
            raise ValueError(f"dtype is that of activations and unrounded weights; use quantization={self.dtype!r}")
        one_of("dtype", self.dtype, ("auto", "bfloat16", "float32"))
        one_of("quantization", self.quantization, ("auto", "none", "int8", "int4", "fp8"))
        one_of("kv_cache_dtype", self.kv_cache_dtype, ("auto", "bfloat16", "float32"))
        one_of("ops", self.ops, ("auto", "native", "triton", "vendor", "reference"))
        one_of("cpu_isa", self.cpu_isa, ("auto", "avx512", "avx2", "neon", "generic"))
        if self.tensor_parallel_size is not None:
            one_of("tensor_parallel_size", self.tensor_parallel_size, TP_SIZES)
        for name in ("max_num_seqs", "max_num_batched_tokens"):
            positive_int(name, getattr(self, name))
        for name in ("max_model_len", "kv_cache_memory_bytes", "num_threads"):
            if getattr(self, name) is not None:
                positive_int(name, getattr(self, name))
        if self.num_draft_tokens is not None:
            int_in("num_draft_tokens", self.num_draft_tokens, 0, 1024)
        int_in("cuda_graph_memory_bytes", self.cuda_graph_memory_bytes, 0, 2**63 - 1)
        one_of("block_size", self.block_size, (8, 16, 32, 64))
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise ValueError(f"gpu_memory_utilization must be in (0, 1], got {self.gpu_memory_utilization}")
        if not 0.0 < self.rank_timeout_seconds <= 1e6:
            raise ValueError(f"rank_timeout_seconds must be above 0 and at most 1e6, got {self.rank_timeout_seconds}")

    @property
    def start_timeout_seconds(self) -> float:
        """Longest wait for a rank that starts or loads."""
        return 10 * self.rank_timeout_seconds
