"""Rank 0's side of every call: prompts become requests, engine events become completions.

Any number of calls and threads may be in progress at once: whoever waits advances the requests of all. Items are JSON
values, ready to be shared with the other ranks. Knows nothing of ranks, devices or checkpoints.
"""

from __future__ import annotations

import itertools
import operator
import secrets
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from megatron_infer.completion import Completion, GrowingCompletion, Timings
from megatron_infer.engine.engine import Engine
from megatron_infer.engine.interrupts import interrupt_deferred
from megatron_infer.engine.request import Request
from megatron_infer.engine.worker import Items
from megatron_infer.fim import FimFormat, FimPrompt
from megatron_infer.model_config import ModelConfig
from megatron_infer.profile import Profile
from megatron_infer.sampling_params import SamplingParams
from megatron_infer.tokenizer import Tokenizer

Prompt = FimPrompt | str | Sequence[int]
"""What can be completed: a FimPrompt, text (a prefix without suffix), or token ids as they are."""


class Session:
    """All calls in progress over one engine.

    Args:
        order: FIM order, None for the family's own. max_model_len: prompt and completion together, in tokens.
        max_num_seqs: sequences the engine computes together; a batch that must stay in order keeps twice as many.
        profile: told when a step is over.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        fim: FimFormat,
        model: ModelConfig,
        *,
        order: str | None,
        max_model_len: int,
        max_num_seqs: int,
        profile: Profile | None = None,
    ) -> None:
        self._engine, self._tokenizer, self._fim, self._order = engine, tokenizer, fim, order
        self._vocab_size, self._end_ids = model.vocab_size, frozenset(model.eos_token_ids)
        self._max_model_len, self._max_num_seqs = max_model_len, max_num_seqs
        self._profile = profile
        self._active: dict[int, GrowingCompletion] = {}
        self._ids = itertools.count()
        self._lock = threading.RLock()

    def complete(self, make: Callable[[], tuple[Prompt, SamplingParams]], *, single: bool) -> Items:
        """The `n` completions of what `make` returns, all at once."""
        prompt, sampling = make()
        growing = self._submit(prompt, sampling, prompt_index=0, single=single)
        try:
            while any(g.finish_reason is None for g in growing):
                self._advance()
            yield from (g.result().to_json() for g in growing)
        finally:
            self._drop(growing)

    def stream(self, prompt: Prompt, sampling: SamplingParams) -> Items:
        """Pieces of text, then the completion."""
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

    def batch(
        self, prompts: Iterable[Prompt | tuple[Prompt, SamplingParams]], default: SamplingParams, ordered: bool
    ) -> Items:
        """Completions of any number of prompts, drawn as room appears."""
        if isinstance(prompts, (str, FimPrompt)):
            raise ValueError("complete_batch() takes an iterable of prompts; for one prompt use complete()")
        room = self._max_num_seqs * (2 if ordered else 1)
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
        too_high = [i for i in sampling.stop_token_ids if i >= self._vocab_size]
        if too_high:
            raise ValueError(f"stop_token_ids {too_high} are outside the vocabulary of {self._vocab_size}")
        ids, stop_ids, dropped = self._encode(prompt, sampling)
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        growing = []
        with self._undisturbed():
            for choice in range(sampling.n):
                request = Request(
                    next(self._ids), ids, sampling, self._max_model_len, stop_ids, seed=seed, choice=choice
                )
                self._engine.add(request)
                grown = GrowingCompletion(
                    request,
                    self._tokenizer,
                    prompt_index=prompt_index,
                    sample_index=choice,
                    num_dropped_tokens=dropped,
                )
                self._active[request.request_id] = grown
                growing.append(grown)
        return growing

    def _encode(self, prompt: Prompt, sampling: SamplingParams) -> tuple[Sequence[int], frozenset[int], int]:
        budget = self._max_model_len - sampling.max_new_tokens
        if budget < 1:
            raise ValueError(
                f"max_new_tokens {sampling.max_new_tokens} leaves no room for a prompt in a context of "
                f"{self._max_model_len} tokens; lower it or raise max_model_len"
            )
        if isinstance(prompt, (FimPrompt, str)):
            fim_prompt = FimPrompt(prompt) if isinstance(prompt, str) else prompt
            encoding = self._fim.encode(fim_prompt, order=self._order, budget_tokens=budget)
            dropped = encoding.dropped_prefix_tokens + encoding.dropped_suffix_tokens
            return encoding.ids, self._end_ids | encoding.stop_token_ids, dropped
        not_a_prompt = ValueError(f"a prompt must be a FimPrompt, text or token ids, not {type(prompt).__name__}")
        if isinstance(prompt, bytes):
            raise not_a_prompt
        try:
            ids = [operator.index(i) for i in prompt]
        except TypeError:
            raise not_a_prompt from None
        vocab = self._vocab_size
        if not ids or not all(0 <= i < vocab for i in ids):
            raise ValueError(f"a prompt of token ids must be non-empty integers from 0 to {vocab - 1}")
        if len(ids) > budget:
            raise ValueError(
                f"the prompt's {len(ids)} tokens and max_new_tokens {sampling.max_new_tokens} exceed the context of "
                f"{self._max_model_len} tokens"
            )
        return ids, self._end_ids | self._fim.stop_token_ids, 0

    def _advance(self) -> None:
        """One engine step; its events go to whichever call waits for them."""
        with self._undisturbed():
            for event in self._engine.step():
                request_id = event.request.request_id
                growing = self._active.get(request_id)
                if growing is None:
                    continue
                growing.receive(event)
                if growing.finish_reason is not None:
                    del self._active[request_id]
                    if event.finish_reason is None:  # a stop string
                        self._engine.abort(request_id)
            assert self._engine.has_work or not self._active, "a call waits for a request that the engine does not have"
            if self._profile is not None:
                self._profile.end_step()

    def _drop(self, growing: Iterable[GrowingCompletion]) -> None:
        """Abort what is unfinished: the caller went away."""
        with self._undisturbed():
            for g in growing:
                if self._active.pop(g.request.request_id, None) is not None:
                    self._engine.abort(g.request.request_id)

    def _submit_or_refuse(
        self, index: int, entry: Prompt | tuple[Prompt, SamplingParams], default: SamplingParams
    ) -> Sequence[GrowingCompletion | Completion]:
        prompt, sampling = _with_sampling(entry, default)
        try:
            return self._submit(prompt, sampling, prompt_index=index)
        except ValueError as error:
            refused = Completion("", (), "error", Timings(0.0, 0.0, 0, 0), prompt_index=index, error=str(error))
            return [replace(refused, sample_index=sample) for sample in range(sampling.n)]


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
