"""Where this rank runs: its place among the host's ranks, its device, its share of the cores."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from megatron_infer.config import EngineConfig


def under_torchrun() -> bool:
    """Whether torchrun (or a compatible launcher) set up this process's rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ and "MASTER_ADDR" in os.environ


def local_rank() -> int:
    """This process's rank on its host, as torchrun numbers it."""
    return int(os.environ.get("LOCAL_RANK", 0))


def local_ranks(config: EngineConfig) -> int:
    """How many ranks share this host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if under_torchrun() else config.tensor_parallel_size or 1


def usable_cores() -> int:
    """Cores this process may use: its affinity mask, cut by a cgroup v2 CPU quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file():
        limit, period = quota.read_text().split()
        if limit != "max":
            cores = min(cores, max(1, int(limit) // int(period)))
    return cores


def rank_device(config: EngineConfig, local_rank: int) -> torch.device:
    """The device of a rank on its host."""
    return torch.device("cuda", local_rank) if config.device == "cuda" else torch.device(config.device)


def use_device(device: torch.device) -> None:
    """Make a GPU the current device of this thread, which is where Triton launches its kernels whatever they read."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def ranks_per_device(config: EngineConfig) -> int:
    """How many ranks share a rank's GPU, or the host's memory."""
    return 1 if config.device == "cuda" else local_ranks(config)
