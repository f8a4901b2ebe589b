"""Brings one rank up: device, threads, memory, model, KV cache; and starts local followers where torchrun did not.

Everything that can be refused is refused here, before a weight is read. Knows no requests and no text.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import torch
from torch._C._distributed_c10d import TCPStore
from tqdm import tqdm

from megatron_infer.cache.kv_cache import KVCache
from megatron_infer.config import EngineConfig, ModelConfig
from megatron_infer.engine.runner import ModelRunner
from megatron_infer.model.checkpoint import Checkpoint
from megatron_infer.model.formats import weight_formats
from megatron_infer.model.transformer import Transformer
from megatron_infer.model.weights import memory_estimate
from megatron_infer.ops.dispatch import select_ops
from megatron_infer.profile import Profile
from megatron_infer.tensor_parallel.group import TPGroup

log = logging.getLogger("megatron_infer")

_TORCH_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_CPU_KV_SHARE = 0.25
"""Share of the host's free memory that the KV cache may come to use by default, beside at least one full context."""


def resolve(config: EngineConfig, model: ModelConfig) -> EngineConfig:
    """Fill in every knob that can be known before the weights are loaded, and check it against model and host.

    Raises:
        ValueError: the model cannot be split that way, it is stored quantised in another format, or the device is not
            there.
    """
    world = int(os.environ.get("WORLD_SIZE", 1)) if under_torchrun() else 1
    size = config.tensor_parallel_size or world
    model.validate_tp(size)
    sharing = local_ranks(replace(config, tensor_parallel_size=size))
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "device 'cuda' was asked for, but torch sees no GPU; use device='cpu' or a CUDA build of torch"
        )
    if device == "cuda" and sharing > torch.cuda.device_count():
        raise ValueError(
            f"{sharing} ranks on this host but only {torch.cuda.device_count()} GPUs; start fewer ranks or use "
            "device='cpu'"
        )
    dtype = config.dtype
    if dtype == "auto":
        dtype = "float32" if model.torch_dtype == "float32" else "bfloat16"
    longest = config.max_model_len or model.max_position_embeddings
    if longest > model.max_position_embeddings:
        raise ValueError(
            f"max_model_len {longest} exceeds the model's {model.max_position_embeddings} positions; lower it"
        )
    return replace(
        config,
        tensor_parallel_size=size,
        device=device,
        dtype=dtype,
        quantization=_quantization(config.quantization, model),
        kv_cache_dtype=dtype if config.kv_cache_dtype == "auto" else config.kv_cache_dtype,
        max_model_len=longest,
        num_threads=config.num_threads or max(1, _usable_cores() // sharing),
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


def under_torchrun() -> bool:
    """Whether torchrun (or a compatible launcher) set up this process's rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ and "MASTER_ADDR" in os.environ


def local_rank() -> int:
    """This process's rank on its host, as torchrun numbers it."""
    return int(os.environ.get("LOCAL_RANK", 0))


def local_ranks(config: EngineConfig) -> int:
    """How many ranks share this host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if under_torchrun() else config.tensor_parallel_size or 1


def _usable_cores() -> int:
    """Cores this process may use: its affinity mask, cut by a cgroup v2 CPU quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file():
        limit, period = quota.read_text().split()
        if limit != "max":
            cores = min(cores, max(1, int(limit) // int(period)))
    return cores


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


def rank_device(config: EngineConfig, local_rank: int) -> torch.device:
    """The device of a rank on its host."""
    return torch.device("cuda", local_rank) if config.device == "cuda" else torch.device("cpu")


def check_memory(config: EngineConfig, model: ModelConfig) -> None:
    """Refuse, before anything is read, a model whose weights and one full context cannot fit (ValueError)."""
    size = config.tensor_parallel_size or 1
    weights = memory_estimate(model, size, _TORCH_DTYPES[config.dtype], config.quantization)
    cache = _block_bytes(config, model, 0) * -(-(config.max_model_len or 0) // config.block_size)
    if config.device == "cuda":
        sharing, free = 1, int(torch.cuda.mem_get_info()[0] * config.gpu_memory_utilization)
    else:
        sharing, free = local_ranks(config), free_memory_bytes()
    log.info(
        "memory: %s of weights per rank, %d rank(s) here, %s for one context of %d tokens; %s free",
        _gib(weights), sharing, _gib(cache), config.max_model_len, _gib(free),
    )  # fmt: skip
    if weights * sharing > free:
        raise ValueError(
            f"the weights need {_gib(weights)} on each of {sharing} rank(s) here, but {_gib(free)} are free; use more "
            f"tensor-parallel ranks on more devices, a machine with more memory, dtype='bfloat16', or quantization "
            f"'int8' or 'int4'"
        )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


def _block_bytes(config: EngineConfig, model: ModelConfig, rank: int) -> int:
    heads = len(model.kv_heads_on(rank, config.tensor_parallel_size or 1))
    dtype = _TORCH_DTYPES[config.kv_cache_dtype]
    return KVCache.block_bytes(model.num_hidden_layers, heads, config.block_size, model.head_dim, dtype)


def build_runner(
    checkpoint: Checkpoint,
    config: EngineConfig,
    group: TPGroup,
    profile: Profile | None = None,
    *,
    force_ops: str | None = None,
) -> ModelRunner:
    """Load this rank's share of the model and allocate its KV cache; collective over the group.

    Args:
        checkpoint: an open checkpoint of any kind.
        config: a resolved EngineConfig.
        group: this rank's tensor-parallel group.
        profile: where ops and collectives are timed into, if anywhere.
        force_ops: one implementation of all ops, to compare it with others; see select_ops.
    """
    model_config = checkpoint.config
    ops = select_ops(
        group.device,
        num_threads=config.num_threads or 1,
        isa=config.cpu_isa,
        deterministic=config.deterministic,
        force=force_ops,
    )
    dtype = _TORCH_DTYPES[config.dtype]
    if group.rank == 0:
        for chosen, names in _grouped(ops.report).items():
            log.info("ops: %s: %s", chosen, ", ".join(names))
    if profile is not None:
        ops = profile.timed_ops(ops, group.device)
        group.record(profile)
    fmt, head_fmt = weight_formats(ops, model_config, dtype, config.quantization, group.device)
    assert config.max_model_len is not None
    model = Transformer(
        model_config,
        tp=group,
        ops=ops,
        fmt=fmt,
        head_fmt=head_fmt,
        dtype=dtype,
        num_positions=config.max_model_len,
    )
    # disable=None: a bar on a terminal only. Rank 0 speaks for all.
    steps = model_config.num_hidden_layers + 2
    hidden = True if group.rank or sys.stderr is None else None
    for _ in tqdm(model.load(checkpoint), total=steps, desc="loading weights", disable=hidden, leave=False):
        continue
    num_blocks = _num_blocks(config, model_config, group)
    kv = KVCache(
        model_config.num_hidden_layers,
        num_blocks,
        len(model_config.kv_heads_on(group.rank, group.size)),
        config.block_size,
        model_config.head_dim,
        dtype=_TORCH_DTYPES[config.kv_cache_dtype],
        device=group.device,
    )
    return ModelRunner(model, kv)


def _grouped(report: Sequence[str]) -> dict[str, list[str]]:
    """Lines "op: choice" as choice -> ops: most often all ops have one."""
    by_choice: dict[str, list[str]] = {}
    for line in report:
        name, _, chosen = line.partition(": ")
        by_choice.setdefault(chosen, []).append(name)
    return by_choice


def _num_blocks(config: EngineConfig, model: ModelConfig, group: TPGroup) -> int:
    """Blocks of the KV cache: from the memory measured free now, the fewest over all ranks."""
    per_block = _block_bytes(config, model, group.rank)
    assert config.max_model_len is not None
    one_context = -(-config.max_model_len // config.block_size)
    if config.kv_cache_memory_bytes is not None:
        wanted = config.kv_cache_memory_bytes // per_block
    elif config.device == "cuda":
        free, total = torch.cuda.mem_get_info(group.device)
        wanted = int(free - (1 - config.gpu_memory_utilization) * total) // per_block
    else:
        share = free_memory_bytes() // local_ranks(config)
        wanted = max(int(share * _CPU_KV_SHARE), min(one_context * per_block, int(share * 0.8))) // per_block
    wanted = max(0, min(wanted, one_context * config.max_num_seqs))
    fewest = int(group.all_gather(torch.tensor([[float(wanted)]], dtype=torch.float32, device=group.device)).min())
    if fewest < 1:
        raise ValueError(
            f"no room for a KV cache: a block of {config.block_size} tokens takes {per_block} bytes; free memory, use "
            "more tensor-parallel ranks, or raise kv_cache_memory_bytes"
        )
    if group.rank == 0:
        log.info("KV cache: %d blocks of %d tokens, %s per rank", fewest, config.block_size, _gib(fewest * per_block))
    return fewest


_FOLLOWER = (
    "import sys; sys.path[:] = filter(None, sys.path); from megatron_infer.engine import follower; follower.main()"
)
"""What a follower runs: not `-m`, which would import from the current directory first."""


class Followers:
    """Ranks 1.. on this host as child processes; they die with this process, however it dies."""

    def __init__(self, model_dir: Path, model_name: str, config: EngineConfig) -> None:
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        root = str(Path(__file__).resolve().parents[2])
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))}
        self.processes: list[subprocess.Popen[bytes]] = []
        for rank in range(1, config.tensor_parallel_size or 1):
            spec = {
                "port": self.store.port,
                "rank": rank,
                "model_dir": str(model_dir),
                "model_name": model_name,
                "config": asdict(config),
            }
            command = [sys.executable, "-c", _FOLLOWER, json.dumps(spec)]
            # A session of its own: Ctrl-C in a terminal or notebook is for rank 0 to handle.
            process = subprocess.Popen(command, stdin=subprocess.PIPE, env=env, start_new_session=True)
            self.processes.append(process)

    def is_alive(self, rank: int) -> bool:
        """Whether a rank's process still runs; this process is rank 0."""
        return rank == 0 or self.processes[rank - 1].poll() is None

    def close(self) -> None:
        """Close their stdin, upon which they end; kill what does not."""
        for process in self.processes:
            if process.stdin is not None:
                process.stdin.close()
        for process in self.processes:
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
