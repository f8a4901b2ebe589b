"""Rank 0's side of every call: prompts become requests, engine events become completions.

submit(), step() and cancel() may be called from any thread, at any time. Knows nothing of ranks and devices.
"""

from __future__ import annotations

import itertools
import logging
import math
import operator
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

from megatron_infer.completion import Completion, GrowingCompletion
from megatron_infer.engine.engine import Engine
from megatron_infer.engine.interrupts import interrupt_deferred
from megatron_infer.engine.request import Event, FinishReason, Request
from megatron_infer.model_config import ModelConfig
from megatron_infer.profile import Profile
from megatron_infer.sampling_params import SamplingParams
from megatron_infer.text.fim import FimFormat, FimOptions, FimPrompt
from megatron_infer.text.healing import Healing, TokenTable, heal
from megatron_infer.text.tokenizer import Tokenizer

log = logging.getLogger("megatron_infer")

Prompt = FimPrompt | str | Sequence[int]
"""What can be completed: a FimPrompt, text (a prefix without suffix), or token ids as they are."""


class Handle:
    """One submitted prompt on its way: `completions` grow, one per sample. A handle that is dropped is cancelled."""

    completions: tuple[GrowingCompletion, ...] = ()

    def __init__(self, session: Session, completions: tuple[GrowingCompletion, ...]) -> None:
        self._session, self.completions = session, completions

    @property
    def is_finished(self) -> bool:
        """Whether every sample has ended."""
        return all(growing.finish_reason is not None for growing in self.completions)

    def results(self) -> list[Completion]:
        """The samples in order, once all are finished; of one that was cancelled, what was there ("abort")."""
        return [growing.result() for growing in self.completions]

    def __del__(self) -> None:
        self._session.cancel(self)


@dataclass(frozen=True)
class _Encoded:
    """A prompt as the engine takes it. `prompt`: None where it was token ids."""

    prompt: FimPrompt | None
    ids: Sequence[int]
    stop_token_ids: frozenset[int]
    num_dropped_tokens: int = 0
    stop: tuple[str, ...] = ()
    healing: Healing | None = None
    prefix: range | None = None


class Session:
    """All prompts in hand over one engine.

    Args:
        max_model_len: prompt and completion together, in tokens.
        max_num_seqs: sequences the engine computes together; a batch that must stay in order keeps twice as many.
        profile: told when a step is over.
        clock: in seconds.
    """

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, fim: FimFormat, model: ModelConfig, *, max_model_len: int,
        max_num_seqs: int, profile: Profile | None = None, clock: Callable[[], float] = time.perf_counter,
    ) -> None:  # fmt: skip
        self._engine, self._tokenizer, self._fim = engine, tokenizer, fim
        self._vocab_size, self._end_ids = model.vocab_size, frozenset(model.eos_token_ids)
        self._num_pieces = model.vocab_size - sum(stop - start for start, stop in tokenizer.gaps(model.vocab_size))
        self._max_model_len, self.max_num_seqs = max_model_len, max_num_seqs
        self._profile, self._clock = profile, clock
        self._has_said_clamped = False
        self._ids = itertools.count()
        self._active: dict[int, tuple[GrowingCompletion, Callable[[], None] | None]] = {}
        self._due: deque[Callable[[], None]] = deque()
        self._grown: deque[Callable[[], None]] = deque()
        """Of completions that have grown or ended since those who wait for them were told."""
        self._turn, self._lock = threading.Lock(), threading.Lock()

    def submit(
        self, prompt: Prompt, sampling: SamplingParams, options: FimOptions | None = None, *, prompt_index: int = 0,
        notify: Callable[[], None] | None = None,
    ) -> Handle:  # fmt: skip
        """Encode, validate and queue a prompt: one request per sample.

        Args:
            options: how the prompt is laid out; None as its family does.
            prompt_index: for the completions to carry.
            notify: called, in the thread that found it out, when a completion has grown or ended. It returns at once
                and waits for no lock: that thread may be in a garbage collection.

        Raises:
            ValueError: bad prompt or parameters; nothing was queued.
            EngineDeadError: a rank failed.
        """
        submitted = self._clock()
        self._engine.ensure_alive()
        if not isinstance(sampling, SamplingParams):
            raise ValueError(f"sampling must be SamplingParams, not {type(sampling).__name__}")
        for name, ids in (("stop_token_ids", sampling.stop_token_ids), ("logit_bias", dict(sampling.logit_bias))):
            too_high = [i for i in ids if i >= self._vocab_size]
            if too_high:
                raise ValueError(f"{name} {too_high} are outside the vocabulary of {self._vocab_size}")
        bad_words = self._bad_words(sampling)
        encoded = self._encode(prompt, sampling, options)
        self._tell_if_clamped(sampling.max_new_tokens, len(encoded.ids))
        # A control token has no text that a stop string could be found in.
        control = [i for text in sampling.stop if (i := self._tokenizer.control_id_of(text)) is not None]
        stop, stop_ids = (*sampling.stop, *encoded.stop), (*sampling.stop_token_ids, *control)
        sampling = replace(sampling, stop=stop, stop_token_ids=stop_ids)
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        requests = [
            Request(
                next(self._ids), encoded.ids, sampling, self._max_model_len, encoded.stop_token_ids,
                seed=seed, choice=choice, bad_words=bad_words, guide=encoded.healing, prefix=encoded.prefix,
            )
            for choice in range(sampling.n)
        ]  # fmt: skip
        completions = tuple(
            GrowingCompletion(
                request, encoded.prompt, self._tokenizer,
                prompt_index=prompt_index, num_dropped_tokens=encoded.num_dropped_tokens,
                submitted=submitted, skip_bytes=len(encoded.healing.text) if encoded.healing is not None else 0,
            )
            for request in requests
        )  # fmt: skip
        handle = Handle(self, completions)
        try:
            with self.undisturbed():
                for growing in completions:
                    self._engine.add(growing.request)
                    self._active[growing.request.request_id] = (growing, notify)
        except BaseException:
            self.cancel(handle)
            raise
        return handle

    def step(self) -> None:
        """One engine step; its events go to whoever waits for them. Raises EngineDeadError: a rank failed.

        Prompts whose deadline has passed end, in any state: before the step, which then is not made, so that who waits
        is told at once, and after it.
        """
        with self.undisturbed():
            if self._end_late():
                return
            events, now = self._engine.step(), self._clock()
            for event in events:
                request_id = event.request.request_id
                if request_id not in self._active:
                    continue
                growing, notify = self._active[request_id]
                growing.receive(event, now)
                if notify is not None:
                    self._grown.append(notify)
                if growing.finish_reason is not None:
                    del self._active[request_id]
                    if event.finish_reason is None:  # a stop string, or a rule
                        self._engine.abort(request_id)
            self._end_late()
            assert self._engine.has_work or not self._active, "a call waits for a request that the engine does not have"
            if self._profile is not None:
                self._profile.end_step()

    def cancel(self, handle: Handle) -> None:
        """End what is unfinished of a handle, in any state: at once, or after the step in progress. Never waits."""
        if not handle.is_finished:
            completions = handle.completions  # not the handle, which may be on its way out
            self.soon(lambda: self._drop(completions, "abort"))

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self._engine.has_work

    @property
    def load(self) -> tuple[int, int, float]:
        """Requests that run and that wait, and the share of the KV cache in use; during a step, of somewhere in it."""
        scheduler, pool = self._engine.scheduler, self._engine.scheduler.pool
        return *scheduler.counts, 1 - pool.num_free / pool.num_blocks

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """One thread at a time, in turn, and no Ctrl-C half-way: the requests of others are in hand as well."""
        is_held = False
        try:
            with interrupt_deferred():
                try:
                    # A loop of steps would take the lock again before anyone else wakes up, were it not for the turn.
                    with self._turn:
                        is_held = self._lock.acquire()
                    self._do_due()  # who released the lock a moment ago may not have come to it
                    yield
                finally:
                    if is_held:
                        self._lock.release()
        finally:
            self._settle()

    def soon(self, action: Callable[[], None]) -> None:
        """Run `action` undisturbed: now, or once the thread that keeps others out is done, in that thread.

        Never waits: a garbage collection may come here in the middle of a step. `action` must not raise.
        """
        self._due.append(action)
        self._settle()

    def close(self) -> None:
        """Close the engine. Idempotent."""
        with self.undisturbed():
            self._engine.close()

    def _settle(self) -> None:
        """Do what is due, and tell who waits. Whoever holds the lock comes here after releasing it."""
        if not (self._due or self._grown):
            return
        with interrupt_deferred():
            while self._due and self._lock.acquire(blocking=False):
                try:
                    self._do_due()
                finally:
                    self._lock.release()
            while True:
                try:
                    notify = self._grown.popleft()
                except IndexError:
                    return
                try:
                    notify()
                except Exception:  # it must not fail the call of somebody else
                    log.exception("the notify of a prompt failed")

    def _do_due(self) -> None:
        while self._due:
            self._due.popleft()()

    def _end_late(self) -> bool:
        """End what has passed its deadline; whether there was any."""
        now = self._clock()
        late = [growing for growing, _ in self._active.values() if growing.is_late(now)]
        self._drop(late, "deadline")
        return bool(late)

    def _drop(self, completions: Iterable[GrowingCompletion], reason: FinishReason) -> None:
        for growing in completions:
            request_id = growing.request.request_id
            if request_id in self._active:
                _, notify = self._active.pop(request_id)
                self._engine.abort(request_id)
                growing.receive(Event(growing.request, None, reason), self._clock())
                if notify is not None:
                    self._grown.append(notify)

    def _tell_if_clamped(self, max_new_tokens: int, num_prompt: int) -> None:
        room = self._max_model_len - num_prompt
        if 0 < room < max_new_tokens and not self._has_said_clamped:
            self._has_said_clamped = True
            log.warning(
                "max_new_tokens %d is clamped to %d: the context of %d tokens has no more room behind the prompt's %d "
                "(said once)", max_new_tokens, room, self._max_model_len, num_prompt,
            )  # fmt: skip

    def _bad_words(self, sampling: SamplingParams) -> list[tuple[int, ...]]:
        """Every word as ids, as it stands and behind a space. Raises ValueError: no token could ever be drawn."""
        texts = {start + word for word in sampling.bad_words for start in ("", "" if word[0].isspace() else " ")}
        words = [tuple(self._tokenizer.encode(text, dummy_prefix=False)) for text in sorted(texts)]
        forbidden = {word[-1] for word in words} | {i for i, bias in sampling.logit_bias if bias == -math.inf}
        if sampling.min_new_tokens:
            forbidden |= self._end_ids | self._fim.stop_token_ids | set(sampling.stop_token_ids)
        if sampling.edits_logits and self._num_pieces <= len(forbidden):
            raise ValueError("logit_bias, bad_words and min_new_tokens together may forbid every token; lift some")
        return words

    @cached_property
    def _token_table(self) -> TokenTable:
        return TokenTable(self._tokenizer)

    def _encode(self, prompt: Prompt, sampling: SamplingParams, options: FimOptions | None) -> _Encoded:
        if isinstance(prompt, (FimPrompt, str)):
            fim_prompt = FimPrompt(prompt) if isinstance(prompt, str) else prompt
            # A long prompt keeps half of the context; the engine clamps the completion to what is left.
            longest = self._max_model_len - min(sampling.max_new_tokens, self._max_model_len // 2)
            encoding = self._fim.encode(fim_prompt, budget_tokens=longest, options=options)
            num_dropped = encoding.dropped_prefix_tokens + encoding.dropped_suffix_tokens
            ends = self._end_ids | encoding.stop_token_ids
            ids, prefix, healing = encoding.ids, encoding.prefix, None
            if options is not None and options.token_healing and fim_prompt.prefix:
                ids, healing = heal(ids, prefix, self._token_table)
                prefix = range(prefix.start, prefix.stop + len(ids) - len(encoding.ids))
            return _Encoded(fim_prompt, ids, ends, num_dropped, encoding.stop, healing, prefix)
        ids = _token_ids(prompt, self._vocab_size)
        return _Encoded(None, ids, self._end_ids | self._fim.stop_token_ids)


def _token_ids(prompt: Sequence[int], vocab_size: int) -> list[int]:
    not_a_prompt = ValueError(f"a prompt must be a FimPrompt, text or token ids, not {type(prompt).__name__}")
    if isinstance(prompt, bytes):
        raise not_a_prompt
    try:
        ids = [operator.index(i) for i in prompt]
    except TypeError:
        raise not_a_prompt from None
    if not ids or not all(0 <= i < vocab_size for i in ids):
        raise ValueError(f"a prompt of token ids must be non-empty integers from 0 to {vocab_size - 1}")
    return ids
