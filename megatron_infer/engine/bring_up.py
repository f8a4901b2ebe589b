"""Brings one rank up, leader or follower: group, ops, model, KV cache, CUDA graphs.

What can be refused without reading a weight is refused before, in resolve.py and memory.py. Knows no requests.
"""

from __future__ import annotations

import itertools
import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from megatron_infer.cache.kv_cache import KVCache
from megatron_infer.config import EngineConfig
from megatron_infer.dispatch.select import CANDIDATES, CheckShape, select_ops
from megatron_infer.engine.graphs import CudaRecorder, graph_keys
from megatron_infer.engine.memory import TORCH_DTYPES, gib, num_kv_blocks
from megatron_infer.engine.runner import ModelRunner
from megatron_infer.engine.topology import rank_device, use_device
from megatron_infer.model.checkpoint import Checkpoint
from megatron_infer.model.formats import stored_dtypes, weight_formats
from megatron_infer.model.transformer import Transformer
from megatron_infer.model_config import ModelConfig
from megatron_infer.ops import Ops
from megatron_infer.profile import Profile
from megatron_infer.tensor_parallel.group import TPGroup
from megatron_infer.tensor_parallel.symmetric_memory import gpu_uuid
from megatron_infer.world import World

_OF_ONE_RANK = {
    "num_threads", "cpu_isa", "kv_cache_memory_bytes", "gpu_memory_utilization", "rank_timeout_seconds",
    "verify_on_load",
}  # fmt: skip
"""Fields of EngineConfig that may differ, as from host to host."""

log = logging.getLogger("megatron_infer")


def bring_up(
    checkpoint: Checkpoint, config: EngineConfig, world: World, join: Callable[[torch.device], TPGroup],
    profile: Profile | None = None, *, gaps: Sequence[tuple[int, int]] = (),
) -> ModelRunner:  # fmt: skip
    """Join the group, load this rank's share of the model and allocate its KV cache; collective over the group.

    Args:
        checkpoint: an open checkpoint of any kind.
        config: a resolved EngineConfig.
        world: where this rank runs.
        join: meets the other ranks, given this rank's device.
        profile: where rank 0 times its ops and collectives into, if anywhere.
        gaps: ranges of ids that are never sampled; see ModelRunner.

    Raises:
        RankFailure: another rank failed. What is raised here, the others are told.
    """
    group = join(rank_device(config, world))
    with group.reporting_failure():
        return build_runner(checkpoint, config, world, group, profile if group.rank == 0 else None, gaps=gaps)


def build_runner(
    checkpoint: Checkpoint, config: EngineConfig, world: World, group: TPGroup, profile: Profile | None = None, *,
    gaps: Sequence[tuple[int, int]] = (),
) -> ModelRunner:  # fmt: skip
    """The same in a group that has been joined."""
    use_device(group.device)
    model_config = checkpoint.config
    _check_agreement(group, {**asdict(config), **asdict(model_config), "bytes of the checkpoint": checkpoint.num_bytes})
    if config.device == "cuda" and len(gpus := group.gather_text(gpu_uuid(group.device))) > len(set(gpus)):
        raise ValueError("ranks share a GPU; have the launcher give each its own, or put all on one with 'cuda:0'")
    ops = _agreed_ops(config, model_config, group, is_first_here=not world.local_rank)
    if group.rank == 0:
        for chosen, names in _grouped(ops.report).items():
            log.info("ops: %s: %s", chosen, ", ".join(names))
    if profile is not None:
        ops = profile.timed_ops(ops, group.device)
        group.wrap(lambda backend: profile.timed_backend(backend, group.device))
    model = _load(checkpoint, config, group, ops)
    kv = KVCache(
        model_config.num_hidden_layers, num_kv_blocks(config, model_config, world, group),
        len(model_config.kv_heads_on(group.rank, group.size)), config.block_size, model_config.head_dim,
        dtype=TORCH_DTYPES[config.kv_cache_dtype], device=group.device,
    )  # fmt: skip
    runner = ModelRunner(model, kv, gaps=gaps)
    if ops.is_recordable and group.is_recordable and config.cuda_graph_memory_bytes:
        _record_graphs(runner, config)
    group.set_patience(config.rank_timeout_seconds)
    return runner


def _check_agreement(group: TPGroup, own: Mapping[str, Any]) -> None:
    """Raise ValueError, on every rank, where the ranks were given different things to do: they would wait for ever."""
    told = [json.loads(text) for text in group.gather_text(json.dumps(own, default=str))]
    for name in sorted(told[0].keys() - _OF_ONE_RANK):
        for rank, theirs in enumerate(told):
            if (other := theirs.get(name)) != (first := told[0][name]):
                raise ValueError(
                    f"the ranks disagree: {name} is {first!r} on rank 0 and {other!r} on rank {rank}; start all with "
                    "the same options and the same checkpoint"
                )


def _agreed_ops(config: EngineConfig, model: ModelConfig, group: TPGroup, *, is_first_here: bool) -> Ops:
    """The same implementation on every rank: where one cannot use what others can, none does.

    The first rank of a host compiles the kernels of a GPU; the others find them in Triton's cache.
    """
    select = partial(
        select_ops, group.device, num_threads=config.num_threads or 1, isa=config.cpu_isa,
        deterministic=config.deterministic, shape=_check_shape(config, model, group),
    )  # fmt: skip
    for is_my_turn in (is_first_here, not is_first_here):
        if is_my_turn:
            ops = select(force=None if config.ops == "auto" else config.ops)
        group.gather_text("")
    told = group.gather_text(json.dumps(_choices(ops)))
    if len(set(told)) > 1:
        names = [[name for name in json.loads(text).values() if name in CANDIDATES] for text in told]
        least = max(itertools.chain(*names), key=CANDIDATES.index)
        rank = next(rank for rank, those in enumerate(names) if least in those)
        log.warning("rank %d has %s ops, but rank %d only %s: all take these", group.rank, ops.chosen, rank, least)
        ops = select(force=least)
    _check_agreement(group, _choices(ops))
    return ops


def _choices(ops: Ops) -> dict[str, str]:
    """Op -> the name of who implements it."""
    return dict(line.split(" (", 1)[0].split(": ") for line in ops.report)


def _load(checkpoint: Checkpoint, config: EngineConfig, group: TPGroup, ops: Ops) -> Transformer:
    model_config, dtype = checkpoint.config, TORCH_DTYPES[config.dtype]
    fmt, head_fmt = weight_formats(ops, model_config, dtype, config.quantization, group.device)
    assert config.max_model_len is not None
    model = Transformer(
        model_config, tp=group, ops=ops, fmt=fmt, head_fmt=head_fmt, dtype=dtype, num_positions=config.max_model_len
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
        graph_keys(config.max_num_seqs, has_drafts=bool(config.num_draft_tokens)),
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
