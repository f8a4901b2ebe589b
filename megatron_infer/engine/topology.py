"""What a rank gets of its host: a device, and cores."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from megatron_infer.config import EngineConfig
from megatron_infer.world import World


def usable_cores() -> int:
    """Cores this process may use: its affinity mask, cut by a cgroup v2 CPU quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file():
        limit, period = quota.read_text().split()
        if limit != "max":
            cores = min(cores, max(1, int(limit) // int(period)))
    return cores


def has_own_gpu(world: World) -> bool:
    """Whether the launcher shows each process its own GPU alone, as number 0: Slurm's --gpus-per-task does."""
    return world.local_size > 1 and torch.cuda.device_count() == 1 and "CUDA_VISIBLE_DEVICES" in os.environ


def rank_device(config: EngineConfig, world: World) -> torch.device:
    """The device of this rank."""
    own = 0 if has_own_gpu(world) else world.local_rank
    return torch.device("cuda", own) if config.device == "cuda" else torch.device(config.device)


def use_device(device: torch.device) -> None:
    """Make a GPU the current device of this thread, which is where Triton launches its kernels whatever they read."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def ranks_per_device(config: EngineConfig, world: World) -> int:
    """How many ranks share a rank's GPU, or the host's memory."""
    return 1 if config.device == "cuda" else world.local_size
