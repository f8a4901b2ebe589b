"""The one call behind every dialect: an Ask is admitted, submitted and followed to its end. Knows no wire format.

All of it runs on the event loop, but for tokenizing, which has threads of its own, and the engine's steps.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

from megatron_infer.completion import Completion, GrowingCompletion
from megatron_infer.fim import MAX_PROMPT_BYTES, FimOptions, FimPrompt
from megatron_infer.llm import LLM, EngineDeadError, Handle, Prompt
from megatron_infer.sampling_params import SamplingParams
from megatron_infer.serve.admission import Admission
from megatron_infer.serve.context import Snippet, with_context
from megatron_infer.serve.engine_thread import EngineThread
from megatron_infer.serve.errors import Refusal
from megatron_infer.serve.metrics import Metrics, Outcome
from megatron_infer.serve.settings import Settings

_SUBMITTERS = 4
"""Threads that tokenize prompts; each may have to wait for the step in progress."""


@dataclass(frozen=True)
class Part:
    """One prompt and how it is completed. `prompt` as text: control tokens written out in it are control tokens."""

    prompt: Prompt
    sampling: SamplingParams
    options: FimOptions | None = None
    context: tuple[Snippet, ...] = ()


@dataclass(frozen=True)
class Ask:
    """What one HTTP request wants.

    patience_seconds: how long it may wait for its turn. predict_seconds: how long after the first token it may go on
    once it has a whole line. session_id: a newer request of the same session makes this one worthless.
    """

    dialect: str
    parts: tuple[Part, ...]
    patience_seconds: float | None = None
    predict_seconds: float | None = None
    session_id: str | None = None


@dataclass(frozen=True)
class Update:
    """New text of the completion with this index among all of the request; `completion` once it has ended."""

    index: int
    text: str
    completion: Completion | None = None


class Call:
    """An Ask in hand: its completions grow, those of one prompt after those of the other. For the event loop.

    pause_seconds: after so long without news `updates` yields None.
    """

    def __init__(self, ask: Ask, cancel: Callable[[Handle], None], pause_seconds: float) -> None:
        self.ask, self._cancel, self._pause_seconds = ask, cancel, pause_seconds
        self.began = time.monotonic()
        self.num_dropped_snippets = 0
        self._handles: list[Handle] = []
        self._waiter: asyncio.Future[bool] | None = None
        self._has_news = False
        self._failure: Exception | None = None

    @property
    def growing(self) -> list[GrowingCompletion]:
        """All completions, by index."""
        return [growing for handle in self._handles for growing in handle.completions]

    @property
    def completions(self) -> list[Completion]:
        """Those that have ended, by index."""
        return [growing.result() for growing in self.growing if growing.finish_reason is not None]

    def attach(self, handles: list[Handle], num_dropped_snippets: int) -> None:
        """What was submitted for it."""
        self._handles, self.num_dropped_snippets = handles, num_dropped_snippets
        self.raise_failure()

    def fail(self, error: Exception) -> None:
        """End it; whoever waits for updates gets `error`."""
        self._failure = self._failure or error
        self.cancel()
        self.tell()

    def raise_failure(self) -> None:
        """Raise the error that has ended it, if one has."""
        if self._failure is not None:
            raise self._failure

    def cancel(self) -> None:
        """Stop what still runs, in any state."""
        for handle in self._handles:
            self._cancel(handle)

    async def updates(self) -> AsyncIterator[Update | None]:
        """News of every completion, until all have ended; None where there was none for a while.

        Raises:
            EngineDeadError: a rank failed. Refusal: superseded.
        """
        waiting = dict(enumerate(self.growing))
        has_text, has_line, first_at = False, False, None
        while True:
            self.raise_failure()
            for index, growing in list(waiting.items()):
                has_ended = growing.finish_reason is not None  # text last: the engine goes on meanwhile
                text = growing.take_new_text()
                has_text, has_line = has_text or bool(text), has_line or "\n" in text
                if has_ended:
                    del waiting[index]
                    yield Update(index, text, growing.result())
                elif text:
                    yield Update(index, text)
            if not waiting:
                return
            first_at = time.monotonic() if first_at is None and has_text else first_at
            limit = self.ask.predict_seconds
            if limit is not None and has_line and first_at is not None and time.monotonic() - first_at > limit:
                self.cancel()
            if not await self._news():
                yield None

    def tell(self, is_news: bool = True) -> None:
        """Wake whoever waits for updates; without news, to say so."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(is_news)
        elif is_news:
            self._has_news = True

    async def _news(self) -> bool:
        if not self._has_news:
            loop = asyncio.get_running_loop()
            self._waiter = loop.create_future()
            pause = loop.call_later(self._pause_seconds, self.tell, False)
            try:
                return await self._waiter
            finally:
                pause.cancel()
                self._waiter = None
        self._has_news = False
        return True

    async def finish(self) -> list[Completion]:
        """All completions, by index, once they have ended. Raises as `updates` does."""
        async for _ in self.updates():
            pass
        return self.completions


class Service:
    """One model behind any number of requests. `defaults`: what holds where a request does not say.

    Args:
        ending: for every dialect; None leaves it to each.
    """

    def __init__(self, llm: LLM, settings: Settings, defaults: SamplingParams, ending: str | None = None) -> None:
        self.llm, self.settings, self.defaults, self.ending = llm, settings, defaults, ending
        self.model_name = settings.model_alias or llm.model_dir.resolve().name
        self.created = int(time.time())
        self.admission = Admission(llm.config.max_num_seqs, settings.max_queued, settings.max_wait_seconds)
        self.metrics = Metrics(llm, lambda: self.admission.num_queued)
        self.engine = EngineThread(llm, self._engine_failed)
        self.on_failure: Callable[[], None] = lambda: None
        self._submitters = ThreadPoolExecutor(_SUBMITTERS, "submit")
        self._calls: set[Call] = set()
        self._grown: deque[Call] = deque()
        self._is_told = False
        self._sessions: dict[str, Call] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Begin, on the running event loop."""
        self._loop = asyncio.get_running_loop()
        self.engine.start()

    def stop(self) -> bool:
        """End what is in hand, and the engine's thread; False where a step does not come back."""
        for call in list(self._calls):
            call.cancel()
        self._submitters.shutdown(wait=False, cancel_futures=True)
        return self.engine.stop(timeout_seconds=5)

    @asynccontextmanager
    async def call(self, ask: Ask) -> AsyncIterator[Call]:
        """`ask` in hand for the length of the block, and cancelled with it; counted and logged in the end.

        Raises:
            ValueError, Refusal: nothing was queued. EngineDeadError: a rank failed.
        """
        total = sum(part.sampling.n for part in ask.parts)
        call, outcome, is_admitted = Call(ask, self.llm.session.cancel, self.settings.ping_seconds), "refused", False
        try:
            if total > self.settings.max_choices:
                raise ValueError(f"{total} completions in one request; {self.settings.max_choices} are allowed")
            if self.engine.failure is not None:
                raise EngineDeadError(self.engine.failure)
            self.admission.enter(total, ask.patience_seconds)
            is_admitted = True
            self._calls.add(call)
            self._supersede(call)
            call.attach(*await asyncio.get_running_loop().run_in_executor(self._submitters, self._submit, call))
            outcome = "error"
            yield call
            outcome = "ok"
        except asyncio.CancelledError:
            outcome = "cancelled"
            raise
        except Refusal as refusal:
            outcome = "superseded" if refusal.status == 410 else outcome
            raise
        finally:
            call.cancel()
            self._calls.discard(call)
            if ask.session_id is not None and self._sessions.get(ask.session_id) is call:
                del self._sessions[ask.session_id]
            seconds = time.monotonic() - call.began
            if is_admitted:
                self.admission.leave(total, seconds if outcome == "ok" else None)
            self.metrics.record(Outcome(ask.dialect, outcome, seconds, call.completions, call.num_dropped_snippets))

    def check_health(self) -> None:
        """Raises Refusal: the engine has stopped, or a step in progress is late, as where a rank hangs."""
        late, step_seconds = self.settings.late_seconds, self.engine.step_seconds
        if self.engine.failure is not None:
            raise Refusal(503, "the engine has stopped")
        if step_seconds > late:
            raise Refusal(503, f"a step has taken {step_seconds:.0f} s, and {late:g} s are expected at most")

    def _submit(self, call: Call) -> tuple[list[Handle], int]:
        """In a thread of its own. Handles that nobody takes, as the client has gone, are cancelled as they drop."""
        handles, num_dropped = [], 0
        for part in call.ask.parts:
            call.raise_failure()
            prompt, num_dropped_here = self._prompt(part)
            num_dropped += num_dropped_here
            handles.append(
                self.llm.session.submit(prompt, part.sampling, part.options, notify=partial(self._notify, call))
            )
        self.engine.wake()
        return handles, num_dropped

    def _prompt(self, part: Part) -> tuple[Prompt, int]:
        """What the engine takes, and how many snippets did not fit."""
        prompt, tokenizer = part.prompt, self.llm.tokenizer
        if isinstance(prompt, FimPrompt):
            found = with_context(self.llm, prompt, part.context, part.sampling.max_new_tokens)
            return found.prompt, found.num_dropped
        if isinstance(prompt, str):
            if len(prompt) > MAX_PROMPT_BYTES:
                raise ValueError(f"the prompt is longer than {MAX_PROMPT_BYTES} bytes")
            ids = tokenizer.encode_marked(prompt)
            if tokenizer.adds_bos and tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]:
                ids.insert(0, tokenizer.bos_id)
            return ids, 0
        return prompt, 0

    def _notify(self, call: Call) -> None:
        """`call` has grown. From any thread, at once: a step tells many calls, and wakes the event loop once."""
        self._grown.append(call)
        if not self._is_told and self._loop is not None and not self._loop.is_closed():
            self._is_told = True
            self._loop.call_soon_threadsafe(self._tell)

    def _tell(self) -> None:
        self._is_told = False
        while self._grown:
            self._grown.popleft().tell()

    def _supersede(self, call: Call) -> None:
        session_id = call.ask.session_id
        if session_id is None:
            return
        older = self._sessions.get(session_id)
        if older is not None:
            older.fail(Refusal(410, "a newer request of the same session_id has taken its place"))
        self._sessions[session_id] = call

    def _engine_failed(self) -> None:
        """In the engine's thread."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._fail_all)

    def _fail_all(self) -> None:
        for call in list(self._calls):
            call.fail(EngineDeadError(self.engine.failure or ""))
        self.on_failure()
