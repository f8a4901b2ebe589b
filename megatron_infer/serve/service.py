"""The one call behind every dialect: an Ask is admitted, submitted and followed to its end. Knows no wire format."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial

from megatron_infer.completion import Completion, GrowingCompletion
from megatron_infer.llm import LLM, EngineDeadError, Handle, Prompt
from megatron_infer.sampling_params import SamplingParams
from megatron_infer.serve.admission import Admission
from megatron_infer.serve.context import with_context
from megatron_infer.serve.engine_thread import EngineThread
from megatron_infer.serve.errors import Refusal
from megatron_infer.serve.metrics import Metrics
from megatron_infer.serve.settings import Settings
from megatron_infer.text.fim_prompt import MAX_PROMPT_BYTES, FimOptions, FimPrompt

_SUBMITTERS = 16
"""Threads that tokenize prompts. Each waits for the step in progress: of a burst, so many prompts join at each step."""


@dataclass(frozen=True)
class Part:
    """One prompt and how it is completed. `prompt` as text: control tokens written out in it are control tokens."""

    prompt: Prompt
    sampling: SamplingParams
    options: FimOptions | None = None


@dataclass(frozen=True)
class Ask:
    """What one HTTP request wants. patience_seconds: how long it may wait for its turn. predict_seconds: how long it
    may go on after the first token, once it has a line. session_id: a newer request with it makes this one worthless.
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
    """An Ask in hand. For the event loop."""

    def __init__(self, ask: Ask, cancel: Callable[[Handle], None]) -> None:
        self.ask, self._cancel = ask, cancel
        self.began = time.monotonic()
        self.handles: list[Handle] = []
        self.num_dropped_snippets = 0
        self.failure: Exception | None = None
        self._waiter: asyncio.Future[bool] | None = None
        self._has_news = self._is_quiet = False

    @property
    def growing(self) -> list[GrowingCompletion]:
        """All completions, by index."""
        return [growing for handle in self.handles for growing in handle.completions]

    @property
    def completions(self) -> list[Completion]:
        """Those that have ended, by index."""
        return [growing.result() for growing in self.growing if growing.finish_reason is not None]

    def cancel(self) -> None:
        """Stop what still runs, in any state."""
        for handle in self.handles:
            self._cancel(handle)

    def fail(self, error: Exception) -> None:
        """End it; whoever waits for updates gets `error`."""
        self.failure = self.failure or error
        self.cancel()
        self.tell()

    async def updates(self) -> AsyncIterator[Update | None]:
        """News of every completion, until all have ended; None where somebody said that there is none.

        Raises EngineDeadError; Refusal where it was superseded, or a completion failed by itself.
        """
        waiting = dict(enumerate(self.growing))
        seen, first_at = "", 0.0
        while True:
            if self.failure is not None:
                raise self.failure
            for index, growing in list(waiting.items()):
                has_ended = growing.finish_reason is not None  # text last: the engine goes on meanwhile
                text = growing.take_new_text()
                first_at = first_at if seen or not text else time.monotonic()
                seen = "\n" if "\n" in text else seen or text
                if growing.finish_reason == "error":  # NaN in its logits, for example
                    raise Refusal(500, growing.error or "the completion failed")
                if has_ended:
                    del waiting[index]
                    yield Update(index, text, growing.result())
                elif text:
                    yield Update(index, text)
            if not waiting:
                return
            limit = self.ask.predict_seconds
            if limit is not None and seen == "\n" and time.monotonic() - first_at > limit:
                self.cancel()
            if not self._has_news:
                self._waiter = asyncio.get_running_loop().create_future()
                if not await self._waiter:
                    yield None
            self._has_news = False

    def tell(self, is_news: bool = True) -> None:
        """Wake whoever waits for updates; without news, to say so, if there was none since that was said last."""
        was_quiet, self._is_quiet = self._is_quiet, not is_news
        if self._waiter is not None and not self._waiter.done() and (is_news or was_quiet):
            self._waiter.set_result(is_news)
        elif is_news:
            self._has_news = True


class Service:
    """One model behind any number of requests. defaults: what holds where a request does not say; so does `ending`."""

    def __init__(self, llm: LLM, settings: Settings, defaults: SamplingParams, ending: str | None = None) -> None:
        self.llm, self.settings, self.defaults, self.ending = llm, settings, defaults, ending
        self.model_name = settings.model_alias or llm.model_dir.resolve().name
        self.created = int(time.time())
        self.for_typing = llm.fim.interactive
        """How prompts are laid out that are sent at every keystroke."""
        self.admission = Admission(llm.config.max_num_seqs, settings.max_queued, settings.max_wait_seconds)
        self.metrics = Metrics(llm)
        self.engine = EngineThread(llm, lambda: self._soon(self._fail_all))
        self.on_failure: Callable[[], None] = lambda: None
        self._submitters = ThreadPoolExecutor(_SUBMITTERS, "submit")
        self._calls: set[Call] = set()
        self._grown: deque[Call] = deque()
        self._is_told = False
        self._sessions: dict[str | None, Call] = {}

    def start(self) -> None:
        """Begin, on the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._ping()
        self.engine.thread.start()

    def stop(self) -> bool:
        """End what is in hand, and the engine's thread; False where a step does not come back."""
        for call in list(self._calls):
            call.cancel()
        self._submitters.shutdown(wait=False, cancel_futures=True)
        return self.engine.stop(timeout_seconds=5)

    @asynccontextmanager
    async def call(self, ask: Ask) -> AsyncIterator[Call]:
        """`ask` in hand for the length of the block, and cancelled with it; counted and logged in the end.

        Raises ValueError, Refusal or EngineDeadError: nothing was queued.
        """
        call, outcome, num_admitted = Call(ask, self.llm.session.cancel), "refused", 0
        try:
            if self.engine.failure is not None:
                raise EngineDeadError(self.engine.failure)
            total = sum(part.sampling.n for part in ask.parts)
            if total > self.settings.max_choices:
                raise ValueError(f"{total} completions in one request; {self.settings.max_choices} are allowed")
            self.admission.enter(total, ask.patience_seconds)
            num_admitted = total
            self._calls.add(call)
            if older := self._sessions.pop(ask.session_id, None):
                older.fail(Refusal(410, "a newer request of the same session_id has taken its place"))
            if ask.session_id is not None:
                self._sessions[ask.session_id] = call
            submit = asyncio.get_running_loop().run_in_executor(self._submitters, self._submit, call)
            call.handles, call.num_dropped_snippets = await submit
            outcome = "error"
            yield call
            outcome = "ok"
        except asyncio.CancelledError:
            outcome = "cancelled"
            raise
        finally:
            outcome = "superseded" if isinstance(call.failure, Refusal) else outcome
            call.cancel()
            self._calls.discard(call)
            if self._sessions.get(ask.session_id) is call:
                del self._sessions[ask.session_id]
            seconds = time.monotonic() - call.began
            self.admission.leave(num_admitted, seconds if outcome == "ok" else None)
            self.metrics.record(ask.dialect, outcome, seconds, call.completions, call.num_dropped_snippets)

    def check_health(self) -> None:
        """Raises Refusal: the engine has stopped, or a step in progress is late, as where a rank hangs."""
        late, step_seconds = self.settings.late_seconds, self.engine.step_seconds
        if self.engine.failure is not None:
            raise Refusal(503, "the engine has stopped")
        if step_seconds > late:
            raise Refusal(503, f"a step has taken {step_seconds:.0f} s, and {late:g} s are expected at most")

    def tokenize(self, text: str, *, is_marked: bool) -> list[int]:
        """Ids of `text`; control tokens written out in it are control tokens where it `is_marked`. Takes its time."""
        if len(text) > MAX_PROMPT_BYTES:
            raise ValueError(f"the text is longer than {MAX_PROMPT_BYTES} bytes")
        tokenizer = self.llm.tokenizer
        return tokenizer.encode_marked(text) if is_marked else tokenizer.encode(text)

    def _submit(self, call: Call) -> tuple[list[Handle], int]:
        """In a thread of its own. Handles that nobody takes, as the client has gone, are cancelled as they drop."""
        handles, num_dropped = [], 0
        for part in call.ask.parts:
            prompt = part.prompt
            if isinstance(prompt, FimPrompt) and prompt.extra_files:
                prompt, num_more = with_context(self.llm, prompt, part.sampling.max_new_tokens)
                num_dropped += num_more
            elif isinstance(prompt, str):
                ids, bos = self.tokenize(prompt, is_marked=True), self.llm.tokenizer.bos_id
                prompt = [bos, *ids] if self.llm.tokenizer.adds_bos and bos is not None and ids[:1] != [bos] else ids
            if call.failure is not None:
                raise call.failure
            notify = partial(self._notify, call)
            handles.append(self.llm.session.submit(prompt, part.sampling, part.options, notify=notify))
            self.engine.wake()
        return handles, num_dropped

    def _notify(self, call: Call) -> None:
        """`call` has grown. From any thread, at once: a step tells many calls, and wakes the event loop once."""
        self._grown.append(call)
        if not self._is_told:
            self._is_told = True
            self._soon(self._tell)

    def _soon(self, action: Callable[[], None]) -> None:
        """Have the event loop do it. From any thread."""
        with suppress(RuntimeError):  # it is closed: nobody waits any more
            self._loop.call_soon_threadsafe(action)

    def _tell(self) -> None:
        self._is_told = False
        while self._grown:
            self._grown.popleft().tell()

    def _ping(self) -> None:
        """One timer for all: to set and to cancel one at each token would cost as much as to write it."""
        for call in list(self._calls):
            call.tell(False)
        self._loop.call_later(self.settings.ping_seconds, self._ping)

    def _fail_all(self) -> None:
        for call in list(self._calls):
            call.fail(EngineDeadError(self.engine.failure or ""))
        self.on_failure()
