"""Mistral's `/v1/fim/completions`: code between prompt and suffix, in answers shaped like chat.

https://docs.mistral.ai/api/#tag/fim
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, ClassVar

from fastapi import FastAPI
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from megatron_infer.completion import Completion
from megatron_infer.fim import FimPrompt
from megatron_infer.serve.body import Body, Stop, read_body, stop_strings
from megatron_infer.serve.reply import Reply, Wire, finish_reason, report, usage
from megatron_infer.serve.service import Ask, Call, Part, Service, Update


class FimBody(Body):
    UNSUPPORTED: ClassVar = {
        "min_tokens": (0,), "presence_penalty": (0,), "frequency_penalty": (0,), "n": (1,), "messages": (),
        "response_format": ({"type": "text"},), "tools": ([],), "deadline_ms": (),
    }  # fmt: skip

    prompt: str
    suffix: str = ""
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop: Stop | None = None
    random_seed: int | None = None
    stream: bool = False


class FimWire(Wire):
    """Every event has one choice, and the last one the usage: some clients look at `choices[0]` unasked."""

    last = ("[DONE]",)

    def whole(self, call: Call, done: list[Completion]) -> Any:
        (completion,) = done
        message = {"role": "assistant", "content": completion.text, "tool_calls": None}
        choice = {"index": 0, "message": message, "finish_reason": finish_reason(completion)}
        return {
            **self._head("chat.completion", choice), "usage": usage(done), "megatron_infer": report(call, done)
        }  # fmt: skip

    def events(self, call: Call, update: Update) -> Iterable[Any]:
        done = update.completion
        delta = {"role": "assistant", "content": update.text}
        choice = {"index": 0, "delta": delta, "finish_reason": None if done is None else finish_reason(done)}
        event = self._head("chat.completion.chunk", choice)
        if done is not None:
            event |= {"usage": usage([done]), "megatron_infer": report(call, [done])}
        yield event

    def _head(self, kind: str, choice: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": self.id, "object": kind, "created": self.created, "model": self.service.model_name,
            "choices": [choice],
        }  # fmt: skip


def add_routes(app: FastAPI, service: Service) -> None:
    """The one route of the dialect."""

    @app.post("/v1/fim/completions")
    async def completions(request: Request) -> Response:
        body = await read_body(request, FimBody)
        sampling = body.sampling(
            service, usual_ending="raw", temperature=body.temperature, top_p=body.top_p, seed=body.random_seed,
            max_new_tokens=body.max_tokens if body.max_tokens is not None else body.max_completion_tokens,
            stop=stop_strings(body.stop),
        )  # fmt: skip
        prompt = FimPrompt(body.prompt, body.suffix, body.path, repository=body.repository, language=body.language)
        ask = Ask("mistral", (Part(prompt, sampling, body.layout),), session_id=body.session_id)
        return Reply(service, ask, FimWire(service), stream=body.stream)
