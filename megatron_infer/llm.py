"""LLM: FIM prompts in, completions out, over one Engine.

Brings all ranks up: those torchrun started, or followers of its own. Under torchrun every public call is collective:
rank 0's arguments count and every rank gets the same results. What a call does is session.py's business.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_infer.cache.block_pool import BlockPool
from megatron_infer.completion import Completion, CompletionStream, Timings, TokenLogprob
from megatron_infer.config import EngineConfig
from megatron_infer.engine import launch, topology, worker
from megatron_infer.engine.engine import Engine
from megatron_infer.engine.memory import check_memory
from megatron_infer.engine.runner import ModelRunner
from megatron_infer.engine.scheduler import Scheduler
from megatron_infer.engine.worker import EngineDeadError, Items
from megatron_infer.fim import load_fim
from megatron_infer.model.checkpoint import Checkpoint, open_checkpoint
from megatron_infer.model_config import DEFAULT_MODEL_NAME
from megatron_infer.profile import Profile
from megatron_infer.sampling_params import SamplingParams
from megatron_infer.session import Prompt, Session
from megatron_infer.tensor_parallel.group import RankFailure, TPGroup
from megatron_infer.tokenizer import load_tokenizer

__all__ = ["LLM", "Completion", "CompletionStream", "EngineDeadError", "Timings", "TokenLogprob"]

log = logging.getLogger("megatron_infer")


class LLM:
    """A loaded model that completes FIM prompts.

    Outside torchrun any number of threads may call it at the same time: whoever waits advances all requests.

    Args:
        model_dir: a checkpoint directory of any supported kind (README, "Checkpoints").
        config: the engine's knobs; keyword arguments override single fields of it.
        model_name: file stem of `.pt` checkpoints.
        fim: FIM family (see fim_templates.json); by default config.json's "fim" or what the tokenizer's pieces tell.
        order: "spm" or "psm"; by default the family's own.
        profile: where rank 0 times its ops and collectives into; None times nothing and costs nothing.
    Raises:
        ValueError: anything wrong with the directory, the configuration or the memory, before weights are read.
        EngineDeadError: another rank failed while starting.
    """

    def __init__(
        self,
        model_dir: str | Path,
        config: EngineConfig | None = None,
        *,
        model_name: str = DEFAULT_MODEL_NAME,
        fim: str | None = None,
        order: str | None = None,
        profile: Profile | None = None,
        **options: Any,
    ) -> None:
        if not str(model_dir):
            raise ValueError("model_dir is empty; give a checkpoint directory")
        self.model_dir = Path(model_dir)
        asked = replace(config or EngineConfig(), **options)
        self._spmd = topology.under_torchrun()
        with open_checkpoint(self.model_dir, model_name) as checkpoint:
            for note in checkpoint.notes:
                log.info("checkpoint: %s", note)
            self.model_config = checkpoint.config
            self.tokenizer = load_tokenizer(self.model_dir)
            if self.tokenizer.vocab_size > self.model_config.vocab_size:
                raise ValueError(
                    f"the tokenizer in {self.model_dir} has {self.tokenizer.vocab_size} pieces, the model only "
                    f"{self.model_config.vocab_size}; they do not belong together"
                )
            self.fim = load_fim(fim or self.model_config.fim, self.tokenizer)
            self.order = order
            self.config = launch.resolve(asked, self.model_config)
            check_memory(self.config, self.model_config)
            self._followers: launch.Followers | None = None
            if not self._spmd and self.config.tensor_parallel_size != 1:
                self._followers = launch.Followers(self.model_dir, model_name, self.config)
                weakref.finalize(self, self._followers.close)
            try:
                self._group = self._join()
                self._runner = self._build_runner(checkpoint, profile)
            except BaseException as error:
                if self._followers is not None:
                    self._followers.close()
                if isinstance(error, RankFailure):
                    raise EngineDeadError(f"the engine did not start: {error}") from error
                raise
        self._engine = self._build_engine(profile)
        self._session = Session(
            self._engine, self.tokenizer, self.fim, self.model_config,
            order=order, max_model_len=self.max_model_len, max_num_seqs=self.config.max_num_seqs, profile=profile,
        )  # fmt: skip
        self._log_config(asked)

    def _join(self) -> TPGroup:
        """Meet the other ranks: those that torchrun started, or our own followers."""
        size = self.config.tensor_parallel_size or 1
        deterministic = self.config.deterministic
        if self._spmd:
            device = topology.rank_device(self.config, topology.local_rank())
            return TPGroup.from_env(device, size, name="llm", deterministic=deterministic)
        device = topology.rank_device(self.config, 0)
        if self._followers is None:
            return TPGroup.single(device)
        return TPGroup.connect(
            self._followers.store, 0, size, device, "local",
            deterministic=deterministic, is_alive=self._followers.is_alive,
        )  # fmt: skip

    def _build_runner(self, checkpoint: Checkpoint, profile: Profile | None) -> ModelRunner:
        try:
            return launch.build_runner(checkpoint, self.config, self._group, profile if self.is_leader else None)
        except BaseException as error:
            self._group.abort(f"{type(error).__name__}: {error}")
            raise

    def _build_engine(self, profile: Profile | None) -> Engine:
        kv, config = self._runner.kv, self.config
        assert config.max_model_len is not None
        pool = BlockPool(kv.num_blocks, kv.block_size, config.enable_prefix_caching)
        self.max_model_len = min(config.max_model_len, kv.num_blocks * kv.block_size)
        if self.max_model_len < config.max_model_len:
            log.warning(
                "contexts are limited to %d tokens by the memory for the KV cache (asked for: %d)",
                self.max_model_len, config.max_model_len,
            )  # fmt: skip
        scheduler = Scheduler(
            pool,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=self.max_model_len,
        )
        return Engine(self._runner, scheduler, profile)

    def _log_config(self, asked: EngineConfig) -> None:
        if self._group.rank:
            return
        for name, value in asdict(self.config).items():
            given = getattr(asked, name)
            is_default = given == getattr(EngineConfig(), name)
            source = ("default" if is_default else "given") if given == value else f"resolved from {given or 'nothing'}"
            log.info("config: %s = %s (%s)", name, value, source)
        log.info("tensor parallel: %d rank(s) over %s (%s)", self._group.size, self._group.backend, self._group.why)

    @property
    def is_leader(self) -> bool:
        """True on the rank whose arguments count, and in every process outside torchrun."""
        return self._group.rank == 0

    @property
    def kv_cache_tokens(self) -> int:
        """Tokens that the KV cache holds, of all sequences together."""
        return self._runner.kv.num_blocks * self._runner.kv.block_size

    # ---- public calls -------------------------------------------------------------------------------------------

    def complete(self, prompt: Prompt, sampling: SamplingParams | None = None) -> Completion:
        """Complete one prompt.

        Raises:
            ValueError: bad prompt or parameters; nothing ran, and the next call works.
            EngineDeadError: a rank failed.
        """
        return self.complete_from(lambda: (prompt, SamplingParams() if sampling is None else sampling))

    def complete_from(self, make: Callable[[], tuple[Prompt, SamplingParams]]) -> Completion:
        """As `complete`, with prompt and parameters made on rank 0 alone: what `make` raises, every rank raises."""
        (item,) = self._collective(self._session.complete(make, single=True))
        return Completion.from_json(item)

    def complete_n(self, prompt: Prompt, sampling: SamplingParams) -> list[Completion]:
        """`sampling.n` completions of one prompt, whose prefix is computed once. Raises as `complete` does."""
        items = self._collective(self._session.complete(lambda: (prompt, sampling), single=False))
        return [Completion.from_json(item) for item in items]

    def stream(self, prompt: Prompt, sampling: SamplingParams | None = None) -> CompletionStream:
        """Text pieces as they are generated; their concatenation is `complete(...).text`, to the character."""
        sampling = SamplingParams() if sampling is None else sampling
        return CompletionStream(self._collective(self._session.stream(prompt, sampling)))

    def complete_batch(
        self,
        prompts: Iterable[Prompt | tuple[Prompt, SamplingParams]],
        sampling: SamplingParams | None = None,
        *,
        ordered: bool = True,
    ) -> Iterator[Completion]:
        """Complete many prompts; yields `n` completions for each, in order or (ordered=False) as they finish.

        Prompts are drawn from the iterable as room appears, so it may be endless. A prompt that is refused gives a
        Completion with finish_reason "error"; the others go on.
        """
        sampling = SamplingParams() if sampling is None else sampling
        for item in self._collective(self._session.batch(prompts, sampling, ordered)):
            yield Completion.from_json(item)

    def close(self) -> None:
        """Stop the followers and free the group. Idempotent; every later call raises EngineDeadError."""
        if self.is_leader:
            self._engine.close()
        else:
            self._runner.close()
        if self._followers is not None:
            self._followers.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # ---- every rank -----------------------------------------------------------------------------------------------

    def _collective(self, items: Items) -> Items:
        """Under torchrun, what rank 0 gets from `items` on every rank; elsewhere just `items`."""
        if not self._spmd or self._group.size == 1:
            return items
        return worker.lead(self._group, items) if self.is_leader else worker.follow(self._runner)
