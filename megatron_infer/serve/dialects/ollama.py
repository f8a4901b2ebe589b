"""Ollama's API (https://docs.ollama.com/api): generating with a suffix, and what clients ask about the model."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from fastapi import FastAPI, Request
from pydantic import Field
from starlette.responses import JSONResponse, Response

import megatron_infer
from megatron_infer.completion import Completion
from megatron_infer.serve.dialects.base import Body, Wire, compact, finish_reason, read_json, report, takes
from megatron_infer.serve.service import Call, Service, Update


class GenerateBody(Body):
    refuses: ClassVar = "ollama"

    prompt: str = ""
    suffix: str = ""
    stream: bool = True
    num_predict: int = -1
    options: dict[str, Any] = Field({})


class GenerateWire(Wire):
    """One JSON object per line. There is no line that clients would skip, so nothing is said while there is no news."""

    dialect = "ollama"
    media_type = "application/x-ndjson"

    def frame(self, event: Any) -> bytes:
        return b"" if event is None else compact(event) + b"\n"

    def whole(self, call: Call, done: Sequence[Completion]) -> Any:
        return self._line(call, done[0].text, done[0])

    def events(self, call: Call, update: Update) -> Iterable[Any]:
        yield self._line(call, update.text, update.completion)

    def _line(self, call: Call, text: str, done: Completion | None) -> dict[str, Any]:
        line = {"model": self.service.model_name, "created_at": _time(time.time()), "response": text, "done": False}
        if done is None:
            return line
        timings = done.timings
        first, total = timings.first_token_seconds, timings.total_seconds
        return {
            **line, "done": True, "done_reason": finish_reason(done),
            "total_duration": round(1e9 * (time.monotonic() - call.began)), "load_duration": 0,
            "prompt_eval_count": timings.num_prompt_tokens, "prompt_eval_duration": round(1e9 * first),
            "eval_count": timings.num_new_tokens, "eval_duration": round(1e9 * max(0.0, total - first)),
            "megatron_infer": report(call, [done]),
        }  # fmt: skip


def add_routes(app: FastAPI, service: Service) -> None:
    llm, can_insert = service.llm, bool(service.llm.fim.orders)
    details = {
        "parent_model": "", "format": "safetensors", "family": llm.fim.name, "families": [llm.fim.name],
        "parameter_size": "", "quantization_level": llm.config.quantization,
    }  # fmt: skip
    about = {"model": service.model_name, "modified_at": _time(service.created), "details": details}

    @app.post("/api/generate", openapi_extra=takes(GenerateBody, streams="application/x-ndjson"))
    async def generate(request: Request) -> Response:
        raw = await read_json(request)
        if isinstance(raw, dict) and isinstance(options := raw.get("options"), dict):
            raw = {**options, **raw}  # litellm has the suffix among them
        body = GenerateBody.model_validate(raw)
        if not body.prompt and not body.suffix:  # how clients have a model loaded
            loaded = {"model": service.model_name, "created_at": _time(time.time()), "response": "", "done": True}
            return JSONResponse({**loaded, "done_reason": "load"})
        limit = body.num_predict if body.num_predict >= 0 else None
        sampling = body.sampling(service, "raw", max_new_tokens=limit)
        return body.reply(GenerateWire(service), [body.part(body.hole(body.prompt, body.suffix), sampling)])

    @app.get("/api/tags")
    async def tags() -> Any:
        return {"models": [{"name": service.model_name, "size": 0, "digest": "", **about}]}

    @app.post("/api/show")
    async def show() -> Any:
        return {
            **about, "parameters": f"num_ctx {llm.max_model_len}", "modelfile": "",
            "template": "{{ .Prompt }}{{ .Suffix }}" if can_insert else "{{ .Prompt }}",
            "model_info": {"general.architecture": "llama", "llama.context_length": llm.max_model_len},
            "capabilities": ["completion", "insert"] if can_insert else ["completion"],
        }  # fmt: skip

    @app.get("/api/version")
    async def version() -> Any:
        return {"version": megatron_infer.__version__}


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
