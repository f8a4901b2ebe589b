"""Mistral's `/v1/fim/completions` (https://docs.mistral.ai/api/#tag/fim): answers are shaped like chat."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, ClassVar

from fastapi import FastAPI, Request, Response
from pydantic import Field

from megatron_infer.completion import Completion
from megatron_infer.serve.dialects.base import Body, Wire, finish_reason, report, takes, usage
from megatron_infer.serve.service import Call, Service, Update


class FimBody(Body):
    refuses: ClassVar = "mistral"

    prompt: str
    suffix: str = ""
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=0)] | None = None
    random_seed: int | None = None


class FimWire(Wire):
    """Every event has one choice, and the last one the usage: some clients look at `choices[0]` unasked."""

    dialect = "mistral"
    last = "data: [DONE]\n\n"

    def whole(self, call: Call, done: Sequence[Completion]) -> Any:
        message = {"message": {"role": "assistant", "content": done[0].text, "tool_calls": None}}
        return self._answer("chat.completion", message, call, done[0])

    def events(self, call: Call, update: Update) -> Iterable[Any]:
        delta = {"delta": {"role": "assistant", "content": update.text}}
        yield self._answer("chat.completion.chunk", delta, call, update.completion)

    def _answer(self, kind: str, text: dict[str, Any], call: Call, done: Completion | None) -> dict[str, Any]:
        choice = {"index": 0, **text, "finish_reason": None if done is None else finish_reason(done)}
        answer = {
            "id": self.id, "object": kind, "created": self.created, "model": self.service.model_name,
            "choices": [choice],
        }  # fmt: skip
        return answer if done is None else {**answer, "usage": usage([done]), "megatron_infer": report(call, [done])}


def add_routes(app: FastAPI, service: Service) -> None:
    @app.post("/v1/fim/completions", openapi_extra=takes(FimBody, streams="text/event-stream"))
    async def completions(request: Request) -> Response:
        body = await FimBody.read(request)
        limit = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
        sampling = body.sampling(service, "raw", seed=body.random_seed, max_new_tokens=limit)
        return body.reply(FimWire(service), [body.part(body.hole(body.prompt, body.suffix), sampling)])
