"""LLM: FIM prompts in, completions out, over one Engine.

Under torchrun every public call is collective: rank 0's arguments count and every rank gets the same results. Outside
torchrun the object starts its own followers. Knows text and prompts; knows nothing of scheduling or tensors.
"""

from __future__ import annotations

import itertools
import logging
import operator
import secrets
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_infer.cache.block_pool import BlockPool
from megatron_infer.completion import Completion, CompletionStream, GrowingCompletion, Timings, TokenLogprob
from megatron_infer.config import EngineConfig, SamplingParams
from megatron_infer.engine import launch, worker
from megatron_infer.engine.engine import Engine
from megatron_infer.engine.interrupts import interrupt_deferred
from megatron_infer.engine.request import Request
from megatron_infer.engine.runner import ModelRunner
from megatron_infer.engine.scheduler import Scheduler
from megatron_infer.engine.worker import EngineDeadError, Items
from megatron_infer.fim import FimPrompt, load_fim
from megatron_infer.model.checkpoint import Checkpoint, open_checkpoint
from megatron_infer.tensor_parallel.group import RankFailure, TPGroup
from megatron_infer.tokenizer import load_tokenizer

__all__ = ["LLM", "Completion", "CompletionStream", "EngineDeadError", "Timings", "TokenLogprob"]

log = logging.getLogger("megatron_infer")

Prompt = FimPrompt | str | Sequence[int]
"""What can be completed: a FimPrompt, text (a prefix without suffix), or token ids as they are."""


class LLM:
    """A loaded model that completes FIM prompts.

    Outside torchrun any number of threads may call it at the same time: whoever waits advances all requests.

    Args:
        model_dir: a checkpoint directory of any supported kind (README, "Checkpoints").
        config: the engine's knobs; keyword arguments override single fields of it.
        model_name: file stem of `.pt` checkpoints.
        fim: FIM family (see fim_templates.json); by default config.json's "fim" or what the tokenizer's pieces tell.
        order: "spm" or "psm"; by default the family's own.
    Raises:
        ValueError: anything wrong with the directory, the configuration or the memory, before weights are read.
        EngineDeadError: another rank failed while starting.
    """

    def __init__(
        self,
        model_dir: str | Path,
        config: EngineConfig | None = None,
        *,
        model_name: str = "aix3-7b-base",
        fim: str | None = None,
        order: str | None = None,
        **options: Any,
    ) -> None:
        if not str(model_dir):
            raise ValueError("model_dir is empty; give a checkpoint directory")
        self.model_dir = Path(model_dir)
        asked = replace(config or EngineConfig(), **options)
        self._active: dict[int, GrowingCompletion] = {}
        self._ids = itertools.count()
        self._lock = threading.RLock()
        self._spmd = launch.under_torchrun()
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
            launch.check_memory(self.config, self.model_config)
            self._followers: launch.Followers | None = None
            if not self._spmd and self.config.tensor_parallel_size != 1:
                self._followers = launch.Followers(self.model_dir, model_name, self.config)
                weakref.finalize(self, self._followers.close)
            try:
                self._group = self._join()
                self._runner = self._build_runner(checkpoint)
            except BaseException as error:
                if self._followers is not None:
                    self._followers.close()
                if isinstance(error, RankFailure):
                    raise EngineDeadError(f"the engine did not start: {error}") from error
                raise
        self._engine = self._build_engine()
        self._log_config(asked)

    def _join(self) -> TPGroup:
        """Meet the other ranks: those that torchrun started, or our own followers."""
        size = self.config.tensor_parallel_size or 1
        deterministic = self.config.deterministic
        if self._spmd:
            device = launch.rank_device(self.config, launch.local_rank())
            return TPGroup.from_env(device, size, name="llm", deterministic=deterministic)
        device = launch.rank_device(self.config, 0)
        if self._followers is None:
            return TPGroup.single(device)
        return TPGroup.connect(
            self._followers.store, 0, size, device, "local",
            deterministic=deterministic, is_alive=self._followers.is_alive,
        )  # fmt: skip

    def _build_runner(self, checkpoint: Checkpoint) -> ModelRunner:
        try:
            return launch.build_runner(checkpoint, self.config, self._group)
        except BaseException as error:
            self._group.abort(f"{type(error).__name__}: {error}")
            raise

    def _build_engine(self) -> Engine:
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
        return Engine(self._runner, scheduler)

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
        (item,) = self._collective(self._complete_items(make, single=True))
        return Completion.from_json(item)

    def complete_n(self, prompt: Prompt, sampling: SamplingParams) -> list[Completion]:
        """`sampling.n` completions of one prompt, whose prefix is computed once. Raises as `complete` does."""
        items = self._collective(self._complete_items(lambda: (prompt, sampling), single=False))
        return [Completion.from_json(item) for item in items]

    def stream(self, prompt: Prompt, sampling: SamplingParams | None = None) -> CompletionStream:
        """Text pieces as they are generated; their concatenation is `complete(...).text`, to the character."""
        sampling = SamplingParams() if sampling is None else sampling
        return CompletionStream(self._collective(self._stream_items(prompt, sampling)))

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
        for item in self._collective(self._batch_items(prompts, sampling, ordered)):
            yield Completion.from_json(item)

    def close(self) -> None:
        """Stop the followers and free the group. Idempotent; every later call raises EngineDeadError."""
        if self.is_leader:
            self._engine.close()
        else:
            self._group.close()
        if self._followers is not None:
            self._followers.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # ---- rank 0 ---------------------------------------------------------------------------------------------------

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """One thread at a time, and no Ctrl-C half-way: other calls' requests are in hand as well."""
        with self._lock, interrupt_deferred():
            yield

    def _submit(
        self, prompt: Prompt, sampling: SamplingParams, *, prompt_index: int, single: bool = False
    ) -> list[GrowingCompletion]:
        """Encode, validate and queue a prompt: one request per sample."""
        self._engine.ensure_alive()
        if not isinstance(sampling, SamplingParams):
            raise ValueError(f"sampling must be SamplingParams, not {type(sampling).__name__}")
        if single and sampling.n != 1:
            raise ValueError("complete() and stream() return one completion; for n > 1 use complete_n()")
        too_high = [i for i in sampling.stop_token_ids if i >= self.model_config.vocab_size]
        if too_high:
            raise ValueError(f"stop_token_ids {too_high} are outside the vocabulary of {self.model_config.vocab_size}")
        ids, stop_ids, dropped = self._encode(prompt, sampling)
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        growing = []
        with self._undisturbed():
            for choice in range(sampling.n):
                request = Request(next(self._ids), ids, sampling, self.max_model_len, stop_ids)
                self._engine.add(request, seed=seed, choice=choice)
                grown = GrowingCompletion(
                    request, self.tokenizer, prompt_index=prompt_index, sample_index=choice, num_dropped_tokens=dropped
                )
                self._active[request.request_id] = grown
                growing.append(grown)
        return growing

    def _encode(self, prompt: Prompt, sampling: SamplingParams) -> tuple[Sequence[int], frozenset[int], int]:
        budget = self.max_model_len - sampling.max_new_tokens
        if budget < 1:
            raise ValueError(
                f"max_new_tokens {sampling.max_new_tokens} leaves no room for a prompt in {self.max_model_len} tokens; "
                "lower it or raise max_model_len"
            )
        end_ids = frozenset(self.model_config.eos_token_ids)
        if isinstance(prompt, (FimPrompt, str)):
            fim_prompt = FimPrompt(prompt) if isinstance(prompt, str) else prompt
            encoding = self.fim.encode(fim_prompt, order=self.order, budget_tokens=budget)
            dropped = encoding.dropped_prefix_tokens + encoding.dropped_suffix_tokens
            return encoding.ids, end_ids | frozenset(encoding.stop_token_ids), dropped
        try:
            ids = [operator.index(i) for i in (None if isinstance(prompt, bytes) else prompt)]  # type: ignore[union-attr]
        except TypeError:
            raise ValueError(f"a prompt must be a FimPrompt, text or token ids, not {type(prompt).__name__}") from None
        vocab = self.model_config.vocab_size
        if not ids or not all(0 <= i < vocab for i in ids):
            raise ValueError(f"a prompt of token ids must be non-empty integers from 0 to {vocab - 1}")
        if len(ids) > budget:
            raise ValueError(
                f"the prompt's {len(ids)} tokens and max_new_tokens {sampling.max_new_tokens} exceed the context of "
                f"{self.max_model_len} tokens"
            )
        return ids, end_ids | self.fim.stop_token_ids, 0

    def _advance(self) -> None:
        """One engine step; its events go to whichever call waits for them."""
        with self._undisturbed():
            for event in self._engine.step():
                growing = self._active.get(event.request_id)
                if growing is None:
                    continue
                growing.receive(event)
                if growing.finish_reason is not None:
                    del self._active[event.request_id]
                    self._engine.abort(event.request_id)
            assert self._engine.has_work or not self._active, "a call waits for a request that the engine does not have"

    def _drop(self, growing: Iterable[GrowingCompletion]) -> None:
        """Abort what is unfinished: the caller went away."""
        with self._undisturbed():
            for g in growing:
                if self._active.pop(g.request.request_id, None) is not None:
                    self._engine.abort(g.request.request_id)

    def _complete_items(self, make: Callable[[], tuple[Prompt, SamplingParams]], *, single: bool) -> Items:
        prompt, sampling = make()
        growing = self._submit(prompt, sampling, prompt_index=0, single=single)
        try:
            while any(g.finish_reason is None for g in growing):
                self._advance()
            yield from (g.result().to_json() for g in growing)
        finally:
            self._drop(growing)

    def _stream_items(self, prompt: Prompt, sampling: SamplingParams) -> Items:
        growing = self._submit(prompt, sampling, prompt_index=0, single=True)
        try:
            while True:
                # Text first: while this generator was suspended, other calls' steps may have finished the request.
                if piece := growing[0].take_new_text():
                    yield piece
                elif growing[0].finish_reason is not None:
                    break
                else:
                    self._advance()
            yield growing[0].result().to_json()
        finally:
            self._drop(growing)

    def _batch_items(
        self, prompts: Iterable[Prompt | tuple[Prompt, SamplingParams]], default: SamplingParams, ordered: bool
    ) -> Items:
        if isinstance(prompts, (str, FimPrompt)):
            raise ValueError("complete_batch() takes an iterable of prompts; for one prompt use complete()")
        room = 2 * self.config.max_num_seqs
        waiting: deque[GrowingCompletion | Completion] = deque()
        source = enumerate(prompts)
        exhausted = False
        try:
            while True:
                while not exhausted and len(waiting) < room:
                    entry = next(source, None)
                    if entry is None:
                        exhausted = True
                    else:
                        waiting.extend(self._submit_or_refuse(*entry, default))
                ready = _take_finished(waiting, ordered)
                for done in ready:
                    yield (done if isinstance(done, Completion) else done.result()).to_json()
                if not waiting and exhausted:
                    return
                if not ready:
                    self._advance()
        finally:
            self._drop(w for w in waiting if isinstance(w, GrowingCompletion))

    def _submit_or_refuse(
        self, index: int, entry: Prompt | tuple[Prompt, SamplingParams], default: SamplingParams
    ) -> Sequence[GrowingCompletion | Completion]:
        prompt, sampling = _with_sampling(entry, default)
        try:
            return self._submit(prompt, sampling, prompt_index=index)
        except ValueError as error:
            refused = Completion("", (), "error", Timings(0.0, 0.0, 0, 0), prompt_index=index, error=str(error))
            return [replace(refused, sample_index=sample) for sample in range(sampling.n)]

    # ---- every rank -----------------------------------------------------------------------------------------------

    def _collective(self, items: Items) -> Items:
        """Under torchrun, what rank 0 gets from `items` on every rank; elsewhere just `items`."""
        if not self._spmd or self._group.size == 1:
            return items
        return worker.lead(self._group, items) if self.is_leader else worker.follow(self._runner)


def _with_sampling(
    entry: Prompt | tuple[Prompt, SamplingParams], default: SamplingParams
) -> tuple[Prompt, SamplingParams]:
    if isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[1], SamplingParams):
        return entry[0], entry[1]
    return entry, default


def _take_finished(
    waiting: deque[GrowingCompletion | Completion], ordered: bool
) -> list[GrowingCompletion | Completion]:
    """Remove and return what is finished: the head of the queue, or with ordered=False all of it."""
    ready = []
    for _ in range(len(waiting)):
        entry = waiting.popleft()
        if isinstance(entry, Completion) or entry.finish_reason is not None:
            ready.append(entry)
        elif ordered:
            waiting.appendleft(entry)
            break
        else:
            waiting.append(entry)
    return ready
