"""The answer to an Ask, whole or as a stream of events; a dialect says only how each looks."""

from __future__ import annotations

import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from megatron_infer.completion import Completion
from megatron_infer.llm import EngineDeadError
from megatron_infer.serve.errors import Refusal, envelope
from megatron_infer.serve.service import Ask, Call, Service, Update


class Wire(ABC):
    """How one answer looks in one dialect. `last`: what ends a stream."""

    media_type = "text/event-stream"
    last: tuple[str, ...] = ()

    def __init__(self, service: Service, id_prefix: str = "cmpl") -> None:
        self.service = service
        self.id = f"{id_prefix}-{secrets.token_hex(12)}"
        self.created = int(time.time())

    @abstractmethod
    def whole(self, call: Call, done: list[Completion]) -> Any:
        """The body, once all completions have ended."""

    @abstractmethod
    def events(self, call: Call, update: Update) -> Iterable[Any]:
        """What a stream says of new text."""

    def end(self, call: Call, done: list[Completion]) -> Iterable[Any]:
        """What a stream says once all have ended."""
        return ()

    def frame(self, event: Any) -> bytes:
        """An event on the wire."""
        return b"data: " + compact(event) + b"\n\n"

    def ping(self) -> bytes:
        """What keeps a stream alive that has no news."""
        return b": ping\n\n"


class Reply(Response):
    """Follows an Ask while it answers: the client's going, which cancels the task that runs this, ends it."""

    def __init__(self, service: Service, ask: Ask, wire: Wire, *, stream: bool) -> None:
        self._service, self._ask, self._wire, self._is_stream = service, ask, wire, stream
        self.background = None
        self.status_code = 200

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        wire = self._wire
        async with self._service.call(self._ask) as call:
            if not self._is_stream:
                done = await call.finish()
                raise_errors(done)
                body = compact(wire.whole(call, done))
                await send(_start(b"application/json", [(b"content-length", str(len(body)).encode())]))
                await send({"type": "http.response.body", "body": body})
                return
            await send(_start(wire.media_type.encode(), [(b"cache-control", b"no-cache")]))
            async for chunk in self._chunks(call):
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b""})

    async def _chunks(self, call: Call) -> Any:
        wire = self._wire
        try:
            async for update in call.updates():
                if update is None:
                    yield wire.ping()
                    continue
                if update.completion is not None:
                    raise_errors([update.completion])
                if chunk := b"".join(map(wire.frame, wire.events(call, update))):
                    yield chunk
            yield b"".join(map(wire.frame, wire.end(call, call.completions)))
        except (EngineDeadError, Refusal) as error:
            yield wire.frame(envelope(self._ask.dialect, Refusal.of(error)))
        yield "".join(f"data: {text}\n\n" for text in wire.last).encode()


def _start(content_type: bytes, headers: list[tuple[bytes, bytes]]) -> dict[str, Any]:
    return {"type": "http.response.start", "status": 200, "headers": [(b"content-type", content_type), *headers]}


def compact(value: Any) -> bytes:
    """JSON on one line without spaces: llama.vim looks for `"content":"` in the text."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def raise_errors(done: list[Completion]) -> None:
    """Raise Refusal where a completion failed by itself, e.g. by NaN in its logits."""
    for completion in done:
        if completion.finish_reason == "error":
            raise Refusal(500, completion.error or "the completion failed")


def usage(done: list[Completion]) -> dict[str, Any]:
    """Tokens of an answer, as OpenAI and Mistral count them."""
    first = [completion for completion in done if completion.sample_index == 0]
    num_prompt = sum(completion.timings.num_prompt_tokens for completion in first)
    num_new = sum(completion.timings.num_new_tokens for completion in done)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_new,
        "total_tokens": num_prompt + num_new,
        "prompt_tokens_details": {"cached_tokens": sum(completion.num_cached_tokens for completion in first)},
    }


def report(call: Call, done: list[Completion]) -> dict[str, Any]:
    """What we add to every dialect's answer: why it ended, what was cut, how long it took."""
    return {
        "trimmed_by": [completion.trimmed_by for completion in done],
        "stopped_by": [growing.stopped_by for growing in call.growing],
        "dropped_tokens": sum(completion.num_dropped_tokens for completion in done if completion.sample_index == 0),
        "dropped_snippets": call.num_dropped_snippets,
        "first_token_ms": round(1000 * min(completion.timings.first_token_seconds for completion in done), 3),
        "total_ms": round(1000 * max(completion.timings.total_seconds for completion in done), 3),
    }


def finish_reason(completion: Completion) -> str:
    """As OpenAI and Mistral name it; an answer that a time limit cut has a length limit in their eyes."""
    return "stop" if completion.finish_reason == "stop" else "length"
