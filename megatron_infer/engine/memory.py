"""How much memory there is, what a model takes of it, and how many KV-cache blocks that leaves.

Refuses what cannot fit before anything is read. Allocates nothing.
"""

from __future__ import annotations

import logging
from pathlib import Path

import psutil
import torch

from megatron_infer.cache.kv_cache import KVCache
from megatron_infer.config import EngineConfig
from megatron_infer.engine.topology import rank_device, ranks_per_device
from megatron_infer.model.weights import memory_estimate
from megatron_infer.model_config import ModelConfig
from megatron_infer.tensor_parallel.group import TPGroup
from megatron_infer.world import World

log = logging.getLogger("megatron_infer")

TORCH_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_CPU_KV_SHARE = 0.25
"""Share of the host's free memory that the KV cache may come to use by default, beside at least one full context."""


def free_memory_bytes() -> int:
    """Memory this process could still allocate on the host: the system's estimate, cut by a cgroup v2 limit."""
    free = int(psutil.virtual_memory().available)
    limit, usage = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and usage.is_file() and (text := limit.read_text().strip()) != "max":
        reclaimable = 0
        for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines():
            if line.startswith("inactive_file "):
                reclaimable = int(line.split()[1])
        free = min(free, int(text) - int(usage.read_text()) + reclaimable)
    return free


def check_memory(config: EngineConfig, model: ModelConfig, world: World) -> None:
    """Refuse, before anything is read, a model whose weights and one full context cannot fit (ValueError)."""
    size = config.tensor_parallel_size or 1
    weights = memory_estimate(model, size, TORCH_DTYPES[config.dtype], config.quantization)
    cache = _block_bytes(config, model, 0) * -(-(config.max_model_len or 0) // config.block_size)
    sharing, device = ranks_per_device(config, world), rank_device(config, world)
    if device.type == "cuda":
        free = int(torch.cuda.mem_get_info(device)[0] * config.gpu_memory_utilization)
    else:
        free = free_memory_bytes()
    log.info(
        "memory: %s of weights per rank, %d rank(s) here, %s for one context of %d tokens; %s free",
        gib(weights), sharing, gib(cache), config.max_model_len, gib(free),
    )  # fmt: skip
    tables = 4 * (config.max_model_len or 0) * (model.head_dim // 2) * torch.float32.itemsize  # while they are made
    if tables * sharing > free:
        raise ValueError(
            f"the rotary tables of {config.max_model_len} positions need {gib(tables)} on each of {sharing} rank(s) "
            f"here, but {gib(free)} are free; give a smaller max_model_len"
        )
    if weights * sharing > free:
        raise ValueError(
            f"the weights need {gib(weights)} on each of {sharing} rank(s) here, but {gib(free)} are free; use more "
            f"tensor-parallel ranks on more devices, a machine with more memory, dtype='bfloat16', or quantization "
            f"'int8' or 'int4'"
        )


def gib(num_bytes: int) -> str:
    """Bytes as a text in GiB."""
    return f"{num_bytes / 2**30:.2f} GiB"


def _block_bytes(config: EngineConfig, model: ModelConfig, rank: int) -> int:
    heads = len(model.kv_heads_on(rank, config.tensor_parallel_size or 1))
    dtype = TORCH_DTYPES[config.kv_cache_dtype]
    return KVCache.block_bytes(model.num_hidden_layers, heads, config.block_size, model.head_dim, dtype)


def num_kv_blocks(config: EngineConfig, model: ModelConfig, world: World, group: TPGroup) -> int:
    """Blocks of the KV cache: from the memory measured free now, the fewest over all ranks."""
    per_block = _block_bytes(config, model, group.rank)
    assert config.max_model_len is not None
    one_context = -(-config.max_model_len // config.block_size)
    if config.kv_cache_memory_bytes is not None:
        wanted = config.kv_cache_memory_bytes // per_block
    elif group.device.type == "cuda":
        sharing = ranks_per_device(config, world)
        if sharing > 1:
            group.gather_number(0)  # waits until all have loaded their weights
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(group.device)
        usable = free - (1 - config.gpu_memory_utilization) * total
        wanted = int(usable / sharing - config.cuda_graph_memory_bytes) // per_block
    else:
        share = free_memory_bytes() // world.local_size
        wanted = max(int(share * _CPU_KV_SHARE), min(one_context * per_block, int(share * 0.8))) // per_block
    wanted = max(0, min(wanted, one_context * config.max_num_seqs))
    fewest = min(group.gather_number(wanted))
    if fewest < 1:
        raise ValueError(
            f"no room for a KV cache: a block of {config.block_size} tokens takes {per_block} bytes; free memory, use "
            "more tensor-parallel ranks, or raise kv_cache_memory_bytes"
        )
    if group.rank == 0:
        log.info("KV cache: %d blocks of %d tokens, %s per rank", fewest, config.block_size, gib(fewest * per_block))
    return fewest
