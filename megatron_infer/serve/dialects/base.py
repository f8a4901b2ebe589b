"""What the dialects share: reading a request, our own fields in it, and answering whole or as a stream.

Unknown fields are ignored, as clients send many; a known one that would change the answer is honoured or refused.
"""

from __future__ import annotations

import asyncio
import json
import math
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from fastapi import Request, Response
from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.json_schema import models_json_schema
from pydantic_core import from_json
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send
from typing_extensions import Self

from megatron_infer.completion import Completion
from megatron_infer.llm import EngineDeadError, Prompt
from megatron_infer.sampling_params import SamplingParams
from megatron_infer.serve.errors import Refusal, envelope
from megatron_infer.serve.service import Ask, Call, Part, Service, Update
from megatron_infer.text.fim_prompt import FimOptions, FimPrompt

_UNSUPPORTED = json.loads(Path(__file__).with_name("unsupported.json").read_text(encoding="utf-8"))
_SAMPLING = {field.name for field in fields(SamplingParams)}
_OUR_NAMES = {"repeat_penalty": "repetition_penalty", "min_tokens": "min_new_tokens"}
_TokenId = Annotated[str, Field(pattern="^[0-9]{1,9}$")]
_Pair = Annotated[list[float | bool], Field(min_length=2, max_length=2)]
_OFF_THE_LOOP_BYTES = 64 << 10
"""A longer body is parsed in a thread."""


class Fields(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False, protected_namespaces=())
    refuses: ClassVar = ""
    """Where unsupported.json lists fields that would change the answer, with the values that ask for nothing."""

    @model_validator(mode="before")
    @classmethod
    def _check(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            raise ValueError("must be a JSON object")
        # null is as good as absent, and 16.0 is a whole number.
        is_whole = {name: isinstance(value, float) and value.is_integer() for name, value in given.items()}
        given = {name: int(v) if is_whole[name] else v for name, v in given.items() if v is not None}
        for name, neutral in _UNSUPPORTED.get(cls.refuses, {}).items():
            if name in given and given[name] not in neutral:
                raise ValueError(f"{name} is not supported")
        return given

    @classmethod
    async def read(cls, request: Request) -> Self:
        return cls.model_validate(await read_json(request))


class Body(Fields):
    """A request body. Beside the fields of its dialect, each takes these of ours.

    path, language, repository: of the code, for the prompt's header and the rules that end an answer. ending, order,
    token_healing, deadline_ms: as in SamplingParams and FimOptions. session_id: a newer request with it ends this one.
    parse_special: control tokens written out in a prompt without suffix are control tokens.
    """

    path: str = ""
    language: str = ""
    repository: str = ""
    ending: Literal["raw", "line", "block", "auto"] | None = None
    order: Literal["psm", "spm"] | None = None
    token_healing: bool | None = None
    session_id: str | None = Field(None, max_length=256)
    parse_special: bool | None = None
    stream: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    repeat_penalty: float | None = None
    min_tokens: int | None = None
    deadline_ms: int | None = None
    logit_bias: dict[_TokenId, float] | list[_Pair] | None = None

    def sampling(self, service: Service, ending: str, **others: Any) -> SamplingParams:
        """The server's defaults, then the fields that SamplingParams has, then `others`. Raises ValueError."""
        asked = ((_OUR_NAMES.get(name, name), value) for name, value in (*self, *others.items()))
        given = {name: value for name, value in asked if name in _SAMPLING and value is not None}
        if "logit_bias" in given:  # llama.cpp has false for never
            pairs = dict(given["logit_bias"]).items()
            given["logit_bias"] = [(int(i), -math.inf if bias is False else bias) for i, bias in pairs]
        if "seed" in given:
            given["seed"] = None if given["seed"] == -1 else given["seed"] % 2**63
        return replace(service.defaults, **{"ending": service.ending or ending, **given})

    def part(self, prompt: Prompt, sampling: SamplingParams, usual: FimOptions | None = None) -> Part:
        """`prompt`, laid out as was asked for, or else as `usual`."""
        usual = usual or FimOptions()
        healing = usual.token_healing if self.token_healing is None else self.token_healing
        return Part(prompt, sampling, replace(usual, order=self.order or usual.order, token_healing=healing))

    def hole(self, prefix: str, suffix: str = "", path: str = "", more: Iterable[tuple[str, str]] = ()) -> FimPrompt:
        """The prompt, with what was said of the code. `more`: other files, path and text, the most relevant last."""
        files = tuple((" ".join(name.split()), text) for name, text in more)
        return FimPrompt(prefix, suffix, path or self.path, files, self.repository, self.language)

    def continued(self, service: Service, text: str) -> Prompt:
        """Text without suffix: as it is, with control tokens in it, where that was asked for."""
        is_marked = service.settings.parse_special if self.parse_special is None else self.parse_special
        return text if is_marked else self.hole(text)

    def reply(self, wire: Wire, parts: Iterable[Part], **limits: float) -> Reply:
        patience = {} if self.deadline_ms is None else {"patience_seconds": self.deadline_ms / 1000}
        ask = Ask(wire.dialect, tuple(parts), session_id=self.session_id, **{**patience, **limits})
        return Reply(ask, wire, is_stream=self.stream)


def takes(*bodies: type[Fields], streams: str = "") -> dict[str, Any]:
    """What the OpenAPI document says of a route that reads one of `bodies`, and may answer in the media type `streams`.

    Definitions come along as $defs of the body; `make_app` moves them to the document's components.
    """
    place = "#/components/schemas/{model}"
    found, definitions = models_json_schema([(body, "validation") for body in bodies], ref_template=place)
    content = {"application/json": {"schema": {"anyOf": list(found.values())}}}
    described: dict[str, Any] = {"requestBody": {"required": True, "content": content, **definitions}}
    return {**described, "responses": {"200": {"content": {streams: {}}}}} if streams else described


async def read_json(request: Request) -> Any:
    """The body as plain values. Raises Refusal."""
    raw = await request.body()
    try:
        if len(raw) > _OFF_THE_LOOP_BYTES:
            return await asyncio.to_thread(from_json, raw, allow_inf_nan=False)
        return from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise Refusal(400, f"the body is not JSON: {error}") from None


class Wire(ABC):
    """How one answer looks in one dialect. `last`: what ends a stream."""

    dialect = ""
    media_type = "text/event-stream"
    last = ""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.id, self.created = f"cmpl-{secrets.token_hex(12)}", int(time.time())

    @abstractmethod
    def whole(self, call: Call, done: Sequence[Completion]) -> Any:
        """The body, once all completions have ended."""

    def events(self, call: Call, update: Update) -> Iterable[Any]:
        """What a stream says of new text; a dialect may have no streams."""
        return ()

    def end(self, call: Call, done: Sequence[Completion]) -> Iterable[Any]:
        """What a stream says once all have ended."""
        return ()

    def frame(self, event: Any) -> bytes:
        """An event on the wire; None says that there is no news, which keeps a connection alive."""
        return b": ping\n\n" if event is None else b"data: " + compact(event) + b"\n\n"


class Reply(Response):
    """Follows an Ask while it answers. Whoever cancels the task that runs this ends the request."""

    def __init__(self, ask: Ask, wire: Wire, *, is_stream: bool) -> None:
        super().__init__()
        self._ask, self._wire, self._is_stream = ask, wire, is_stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._wire.service.call(self._ask) as call:
            if self._is_stream:
                now = {"cache-control": "no-cache"}
                answer: Response = StreamingResponse(self._chunks(call), headers=now, media_type=self._wire.media_type)
            else:
                async for _ in call.updates():
                    pass
                answer = Response(compact(self._wire.whole(call, call.completions)), media_type="application/json")
            await answer(scope, receive, send)

    async def _chunks(self, call: Call) -> AsyncIterator[bytes]:
        wire = self._wire
        try:
            async for update in call.updates():
                yield b"".join(map(wire.frame, [None] if update is None else wire.events(call, update)))
            yield b"".join(map(wire.frame, wire.end(call, call.completions)))
        except (EngineDeadError, Refusal) as error:
            yield wire.frame(envelope(wire.dialect, Refusal.of(error)))
        yield wire.last.encode()


def compact(value: Any) -> bytes:
    """JSON on one line without spaces: llama.vim looks for `"content":"` in the text."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def usage(done: Sequence[Completion]) -> dict[str, Any]:
    """Tokens of an answer, as OpenAI and Mistral count them."""
    first = [completion for completion in done if completion.sample_index == 0]
    num_prompt = sum(completion.timings.num_prompt_tokens for completion in first)
    num_new = sum(completion.timings.num_new_tokens for completion in done)
    return {
        "prompt_tokens": num_prompt, "completion_tokens": num_new, "total_tokens": num_prompt + num_new,
        "prompt_tokens_details": {"cached_tokens": sum(completion.num_cached_tokens for completion in first)},
    }  # fmt: skip


def report(call: Call, done: Sequence[Completion]) -> dict[str, Any]:
    """What we add to every dialect's answer: why it ended, what was cut, how long it took."""
    first = [completion for completion in done if completion.sample_index == 0]
    return {
        "trimmed_by": [completion.trimmed_by for completion in done],
        "cached_tokens": sum(completion.num_cached_tokens for completion in first),
        "dropped_tokens": sum(completion.num_dropped_tokens for completion in first),
        "draft_tokens": sum(completion.num_draft_tokens for completion in done),
        "draft_accepted": sum(completion.num_draft_accepted for completion in done),
        "dropped_snippets": call.num_dropped_snippets,
        "first_token_ms": round(1000 * min(completion.timings.first_token_seconds for completion in done), 3),
        "total_ms": round(1000 * max(completion.timings.total_seconds for completion in done), 3),
    }


def finish_reason(completion: Completion) -> str:
    """As OpenAI and Mistral name it; a time limit, too, is one of length in their eyes."""
    return "stop" if completion.finish_reason == "stop" else "length"
