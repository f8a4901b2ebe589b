"""Small random models for the tests: weights, checkpoint directories, and ranks that run as threads."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.distributed import HashStore

from megatron_infer.cache.block_pool import BlockPool
from megatron_infer.cache.kv_cache import KVCache
from megatron_infer.dispatch.select import select_ops
from megatron_infer.engine.engine import Engine
from megatron_infer.engine.request import Request
from megatron_infer.engine.runner import ModelRunner
from megatron_infer.engine.scheduler import Drafter, Scheduler
from megatron_infer.engine.worker import serve
from megatron_infer.model.formats import TensorSource, weight_formats
from megatron_infer.model.transformer import Transformer
from megatron_infer.model.weights import expected_tensors
from megatron_infer.model_config import ModelConfig
from megatron_infer.ops import Ops
from megatron_infer.sampling_params import SamplingParams
from megatron_infer.tensor_parallel.group import TPGroup

Result = TypeVar("Result")
CPU = torch.device("cpu")


def tiny_config(**changes: object) -> ModelConfig:
    """A model of a few hundred thousand parameters: GQA 4:1, three layers."""
    fields: dict[str, object] = {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 208,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "rope_theta": 256000.0,
        "fim": "aixcoder",
        **changes,
    }
    return ModelConfig(**fields)  # type: ignore[arg-type]


class Tensors(dict[str, torch.Tensor]):
    """A state dict under the engine's canonical names that can be read like a checkpoint."""

    def read(self, name: str, rows: tuple[int, int] | None = None, cols: tuple[int, int] | None = None) -> torch.Tensor:
        tensor = self[name]
        tensor = tensor if rows is None else tensor[rows[0] : rows[1]]
        return tensor if cols is None else tensor[:, cols[0] : cols[1]]


def random_tensors(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensors:
    """Weights that keep activations near unit scale and make the logits differ clearly."""
    generator = torch.Generator().manual_seed(seed)
    tensors = Tensors()
    for name, shape in expected_tensors(config).items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith("norm.weight"):
            noise = 1 + 0.1 * noise
        elif len(shape) == 2 and "embeddings" not in name:
            noise /= math.sqrt(shape[1])
        elif len(shape) == 1:
            noise *= 0.3
        tensors[name] = noise.to(dtype)
    return tensors


def on_ranks(size: int, work: Callable[[TPGroup], Result]) -> list[Result]:
    """Run `work(group)` on every rank of a real group, each rank a thread of this process; results in rank order."""
    if size == 1:
        return [work(TPGroup.single(CPU))]
    store = HashStore()
    results: dict[int, Result] = {}
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            group = TPGroup.connect(store, rank, size, CPU, name="test")
            try:
                results[rank] = work(group)
            except BaseException as error:
                group.abort(repr(error))
                raise
            finally:
                group.close()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[rank] for rank in range(size)]


def make_runner(
    config: ModelConfig,
    tensors: TensorSource,
    group: TPGroup,
    *,
    ops: Ops | None = None,
    dtype: torch.dtype = torch.float32,
    num_blocks: int = 64,
    block_size: int = 16,
    num_threads: int = 1,
    quantization: str = "none",
    is_asynchronous: bool | None = None,
) -> ModelRunner:
    """A loaded runner without an LLM around it."""
    ops = ops or select_ops(CPU, num_threads=num_threads)
    fmt, head_fmt = weight_formats(ops, config, dtype, quantization, CPU)
    model = Transformer(
        config,
        tp=group,
        ops=ops,
        fmt=fmt,
        head_fmt=head_fmt,
        dtype=dtype,
        num_positions=config.max_position_embeddings,
    )
    for _ in model.load(tensors):
        continue
    kv_heads = len(config.kv_heads_on(group.rank, group.size))
    kv = KVCache(config.num_hidden_layers, num_blocks, kv_heads, block_size, config.head_dim, dtype=dtype, device=CPU)
    return ModelRunner(model, kv, is_asynchronous=is_asynchronous)


def make_engine(
    runner: ModelRunner,
    *,
    max_num_seqs: int = 16,
    max_num_batched_tokens: int = 256,
    enable_prefix_caching: bool = True,
    drafter: Drafter | None = None,
) -> Engine:
    """An engine on rank 0 over `runner`."""
    pool = BlockPool(runner.kv.num_blocks, runner.kv.block_size, enable_prefix_caching)
    scheduler = Scheduler(
        pool,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=min(runner.model.config.max_position_embeddings, runner.kv.num_blocks * runner.kv.block_size),
        drafter=drafter,
    )
    return Engine(runner, scheduler)


_ids = itertools.count()
"""An engine may hold an ended request, and its id, until the step ahead is over."""

Output = list[tuple[int, float | None]]
"""Generated (token id, log probability) pairs of one request."""


def drain(engine: Engine, outputs: dict[int, Output]) -> None:
    """Step until nothing is left, appending to `outputs` by request id."""
    while engine.has_work:
        for event in engine.step():
            if event.sampled is not None:
                pair = event.sampled.token_id, event.sampled.logprob
                outputs.setdefault(event.request.request_id, []).append(pair)


def generate(engine: Engine, prompts: list[list[int]], sampling: SamplingParams, *, seed: int = 7) -> list[Output]:
    """All prompts at once through `engine`."""
    outputs: dict[int, Output] = {}
    max_len = engine.scheduler.max_model_len
    added = [engine.add(Request(next(_ids), prompt, sampling, max_len, frozenset(), seed=seed)) for prompt in prompts]
    drain(engine, outputs)
    return [outputs[request_id] for request_id in added]


def generate_on_ranks(
    size: int,
    config: ModelConfig,
    tensors: TensorSource,
    prompts: list[list[int]],
    sampling: SamplingParams,
    dtype: torch.dtype = torch.float32,
    quantization: str = "none",
    **options: Any,
) -> list[Output]:
    """The same at tensor-parallel size `size`, over real collectives."""

    def work(group: TPGroup) -> list[Output] | None:
        runner = make_runner(config, tensors, group, dtype=dtype, quantization=quantization)
        if group.rank:
            serve(runner)
            return None
        engine = make_engine(runner, **options)
        outputs = generate(engine, prompts, sampling)
        engine.close()
        return outputs

    outputs = on_ranks(size, work)[0]
    assert outputs is not None
    return outputs


def write_tokenizer(directory: Path) -> None:
    """A small aiXcoder-like SentencePiece model in `directory`."""
    from tests.support.tiny_tokenizer import build_tiny_tokenizer

    build_tiny_tokenizer(directory)
