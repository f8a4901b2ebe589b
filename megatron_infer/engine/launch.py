"""Brings one rank up: knobs, model, KV cache, CUDA graphs; and starts local followers where torchrun did not.

What can be refused is refused here or in memory.py, before a weight is read. Knows no requests and no text.
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

import torch
from torch._C._distributed_c10d import TCPStore
from tqdm import tqdm

from megatron_infer.cache.kv_cache import KVCache
from megatron_infer.config import EngineConfig
from megatron_infer.engine.graphs import CudaRecorder, graph_keys
from megatron_infer.engine.memory import TORCH_DTYPES, gib, num_kv_blocks
from megatron_infer.engine.resolve import check_fp8
from megatron_infer.engine.runner import ModelRunner
from megatron_infer.engine.topology import local_ranks, under_torchrun, usable_cores, use_device
from megatron_infer.model.checkpoint import Checkpoint
from megatron_infer.model.formats import stored_dtypes, weight_formats
from megatron_infer.model.transformer import Transformer
from megatron_infer.model_config import ModelConfig
from megatron_infer.ops import Ops
from megatron_infer.ops.dispatch import CheckShape, select_ops
from megatron_infer.profile import Profile
from megatron_infer.tensor_parallel.group import TPGroup

log = logging.getLogger("megatron_infer")


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


def build_runner(
    checkpoint: Checkpoint, config: EngineConfig, group: TPGroup, profile: Profile | None = None
) -> ModelRunner:
    """Load this rank's share of the model and allocate its KV cache; collective over the group.

    Args:
        checkpoint: an open checkpoint of any kind.
        config: a resolved EngineConfig.
        group: this rank's tensor-parallel group.
        profile: where ops and collectives are timed into, if anywhere.
    """
    use_device(group.device)
    model_config = checkpoint.config
    ops = select_ops(
        group.device,
        num_threads=config.num_threads or 1,
        isa=config.cpu_isa,
        deterministic=config.deterministic,
        shape=_check_shape(config, model_config, group),
        force=None if config.ops == "auto" else config.ops,
    )
    if group.rank == 0:
        for chosen, names in _grouped(ops.report).items():
            log.info("ops: %s: %s", chosen, ", ".join(names))
    if profile is not None:
        ops = profile.timed_ops(ops, group.device)
        group.record(profile)
    model = _load(checkpoint, config, group, ops)
    kv = KVCache(
        model_config.num_hidden_layers,
        num_kv_blocks(config, model_config, group),
        len(model_config.kv_heads_on(group.rank, group.size)),
        config.block_size,
        model_config.head_dim,
        dtype=TORCH_DTYPES[config.kv_cache_dtype],
        device=group.device,
    )
    runner = ModelRunner(model, kv)
    if ops.is_recordable and group.is_recordable and config.cuda_graph_memory_bytes:
        _record_graphs(runner, config)
    return runner


def _load(checkpoint: Checkpoint, config: EngineConfig, group: TPGroup, ops: Ops) -> Transformer:
    model_config, dtype = checkpoint.config, TORCH_DTYPES[config.dtype]
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
    return model


def _check_shape(config: EngineConfig, model: ModelConfig, group: TPGroup) -> CheckShape:
    """What this rank's kernels must get right before they are taken."""
    dtype = TORCH_DTYPES[config.dtype]
    linear_dtype, head_dtype = stored_dtypes(dtype, config.quantization)
    return CheckShape(
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_heads=len(model.query_heads_on(group.rank, group.size)),
        num_kv_heads=len(model.kv_heads_on(group.rank, group.size)),
        head_dim=model.head_dim,
        vocab_size=-(-model.vocab_size // group.size),
        block_size=config.block_size,
        tp=group.size,
        dtype=dtype,
        kv_dtype=TORCH_DTYPES[config.kv_cache_dtype],
        linear_dtype=linear_dtype,
        head_dtype=head_dtype,
    )


def _record_graphs(runner: ModelRunner, config: EngineConfig) -> None:
    assert config.max_model_len is not None
    runner.record_graphs(
        CudaRecorder(runner.tp.device),
        graph_keys(config.max_num_seqs),
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        memory_bytes=config.cuda_graph_memory_bytes,
    )
    assert runner.graphs is not None
    if runner.tp.rank == 0:
        shapes, size = len(runner.graphs.keys), gib(runner.graphs.memory_bytes)
        log.info("CUDA graphs: %d shapes of steps recorded in %s", shapes, size)


def _grouped(report: Sequence[str]) -> dict[str, list[str]]:
    """Lines "op: choice" as choice -> ops: most often all ops have one."""
    by_choice: dict[str, list[str]] = {}
    for line in report:
        name, _, chosen = line.partition(": ")
        by_choice.setdefault(chosen, []).append(name)
    return by_choice


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
