"""The calls of LLM, each a loop over Session.submit, step and cancel: whoever waits advances the requests of all.

Ctrl-C may come at any moment and its traceback keep every local variable, so that no handle is dropped by itself: one
is owned before Ctrl-C can act, and cancelled again where Ctrl-C came before cancel() had begun.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import cast

from megatron_infer.completion import Completion, GrowingCompletion, Items, Timings
from megatron_infer.engine.interrupts import interrupt_deferred
from megatron_infer.sampling_params import SamplingParams
from megatron_infer.session import Handle, Prompt, Session
from megatron_infer.text.fim import FimOptions, FimPrompt

Entry = Prompt | tuple[Prompt, SamplingParams]


def complete(
    session: Session, make: Callable[[], tuple[Prompt, SamplingParams]], options: FimOptions | None, *, single: bool
) -> Items:
    """The `n` completions of what `make` returns, all at once."""
    prompt, sampling = make()
    handles: list[Handle] = []
    try:
        with interrupt_deferred():
            handles.append(handle := session.submit(prompt, _require_one(sampling) if single else sampling, options))
        while not handle.is_finished:
            session.step()
        yield from handle.results()
    finally:
        try:
            _cancel(session, handles)
        except KeyboardInterrupt:
            _cancel(session, handles)
            raise


def stream(session: Session, prompt: Prompt, sampling: SamplingParams, options: FimOptions | None = None) -> Items:
    """Pieces of text, then the completion."""
    handles: list[Handle] = []
    try:
        with interrupt_deferred():
            handles.append(handle := session.submit(prompt, _require_one(sampling), options))
        (growing,) = handle.completions
        while True:
            # Text last: another thread may finish the request in between.
            is_finished = handle.is_finished
            if piece := growing.take_new_text():
                yield piece
            elif is_finished:
                break
            else:
                session.step()
        yield growing.result()
    finally:
        try:
            _cancel(session, handles)
        except KeyboardInterrupt:
            _cancel(session, handles)
            raise


def batch(
    session: Session, prompts: Iterable[Entry], default: SamplingParams, options: FimOptions | None, ordered: bool
) -> Items:
    """Completions of any number of prompts, drawn as room appears."""
    if isinstance(prompts, (str, FimPrompt)):
        raise ValueError("complete_batch() takes an iterable of prompts; for one prompt use complete()")
    room = session.max_num_seqs * (2 if ordered else 1)
    waiting: deque[tuple[Handle | None, GrowingCompletion | Completion]] = deque()
    source = enumerate(prompts)
    is_exhausted = False
    try:
        while True:
            while not is_exhausted and len(waiting) < room:
                entry = next(source, None)
                if entry is None:
                    is_exhausted = True
                else:
                    with interrupt_deferred():
                        waiting.extend(_submit_or_refuse(session, *entry, default, options))
            ready = _take_finished(waiting, ordered)
            yield from ready
            if not waiting and is_exhausted:
                return
            if not ready:
                session.step()
    finally:
        try:
            _cancel(session, (handle for handle, _ in waiting))
        except KeyboardInterrupt:
            _cancel(session, (handle for handle, _ in waiting))
            raise


def _cancel(session: Session, handles: Iterable[Handle | None]) -> None:
    for handle in handles:
        if handle is not None:
            session.cancel(handle)


def _submit_or_refuse(
    session: Session, index: int, entry: Entry, default: SamplingParams, options: FimOptions | None
) -> Iterator[tuple[Handle | None, GrowingCompletion | Completion]]:
    """Every sample of a prompt, with the handle that keeps it alive."""
    is_pair = isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[1], SamplingParams)
    prompt, sampling = cast("tuple[Prompt, SamplingParams]", entry if is_pair else (entry, default))
    try:
        handle = session.submit(prompt, sampling, options, prompt_index=index)
    except ValueError as error:
        refused = Completion("", (), "error", Timings(0.0, 0.0, 0, 0), prompt_index=index, error=str(error))
        return ((None, replace(refused, sample_index=sample)) for sample in range(sampling.n))
    return ((handle, growing) for growing in handle.completions)


def _require_one(sampling: SamplingParams) -> SamplingParams:
    """For calls that return one completion. Raises ValueError: more are asked for."""
    if isinstance(sampling, SamplingParams) and sampling.n != 1:
        raise ValueError("complete() and stream() return one completion; for n > 1 use complete_n()")
    return sampling


def _take_finished(
    waiting: deque[tuple[Handle | None, GrowingCompletion | Completion]], ordered: bool
) -> list[Completion]:
    """Remove and return what is finished: the head of the queue, or with ordered=False all of it."""
    ready = []
    for _ in range(len(waiting)):
        _, sample = waiting[0]
        if isinstance(sample, Completion):
            ready.append(sample)
        elif sample.finish_reason is not None:
            ready.append(sample.result())
        elif ordered:
            break
        else:
            waiting.rotate(-1)
            continue
        waiting.popleft()  # only now: who is not finished never leaves the queue
    return ready
