"""Ollama's `/api/generate` with suffix, and the routes by which its clients find out about the model.

https://docs.ollama.com/api
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any, ClassVar

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

import megatron_infer
from megatron_infer.completion import Completion
from megatron_infer.fim import FimPrompt
from megatron_infer.serve.body import Body, Fields, Stop, read_body, stop_strings
from megatron_infer.serve.reply import Reply, Wire, compact, finish_reason, report
from megatron_infer.serve.service import Ask, Call, Part, Service, Update


class Options(Fields):
    """litellm puts the suffix here."""

    UNSUPPORTED: ClassVar = {
        "repeat_penalty": (1,), "presence_penalty": (0,), "frequency_penalty": (0,), "typical_p": (1,), "mirostat": (0,),
        "tfs_z": (1,),
    }  # fmt: skip

    num_predict: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    stop: Stop | None = None
    seed: int | None = None
    suffix: str = ""


class GenerateBody(Body):
    UNSUPPORTED: ClassVar = {
        "images": ([],), "format": ("",), "system": ("",), "template": ("",), "context": ([],), "think": (False,),
        "logprobs": (False,), "top_logprobs": (0,), "deadline_ms": (),
    }  # fmt: skip

    prompt: str = ""
    suffix: str = ""
    stream: bool = True
    raw: bool = False
    options: Options = Options()


class GenerateWire(Wire):
    """One JSON object per line. There is no line that clients would skip, so nothing is said while there is no news."""

    media_type = "application/x-ndjson"

    def frame(self, event: Any) -> bytes:
        return compact(event) + b"\n"

    def ping(self) -> bytes:
        return b""

    def whole(self, call: Call, done: list[Completion]) -> Any:
        (completion,) = done
        return {**self._head(completion.text), **_end(call, completion)}

    def events(self, call: Call, update: Update) -> Iterable[Any]:
        if update.text:
            yield {**self._head(update.text), "done": False}
        if update.completion is not None:
            yield {**self._head(""), **_end(call, update.completion)}

    def _head(self, text: str) -> dict[str, Any]:
        return {"model": self.service.model_name, "created_at": _now(), "response": text}


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _end(call: Call, completion: Completion) -> dict[str, Any]:
    timings = completion.timings
    first, total = timings.first_token_seconds, timings.total_seconds
    return {
        "done": True, "done_reason": finish_reason(completion),
        "total_duration": _nanoseconds(time.monotonic() - call.began), "load_duration": 0,
        "prompt_eval_count": timings.num_prompt_tokens, "prompt_eval_duration": _nanoseconds(first),
        "eval_count": timings.num_new_tokens, "eval_duration": _nanoseconds(total - first),
        "megatron_infer": {**report(call, [completion]), "cached_tokens": completion.num_cached_tokens},
    }  # fmt: skip


def _nanoseconds(seconds: float) -> int:
    return round(1e9 * max(0.0, seconds))


def add_routes(app: FastAPI, service: Service) -> None:
    """All routes of the dialect."""

    @app.post("/api/generate")
    async def generate(request: Request) -> Response:
        body = await read_body(request, GenerateBody)
        options, suffix = body.options, body.suffix or body.options.suffix
        if not body.prompt and not suffix:  # how clients have a model loaded
            loaded = {"model": service.model_name, "created_at": _now(), "response": "", "done": True}
            return JSONResponse({**loaded, "done_reason": "load"})
        limit = options.num_predict
        sampling = body.sampling(
            service, usual_ending="raw", max_new_tokens=None if limit is None or limit < 0 else limit,
            temperature=options.temperature, top_p=options.top_p, top_k=options.top_k, min_p=options.min_p,
            stop=stop_strings(options.stop), seed=options.seed,
        )  # fmt: skip
        prompt = FimPrompt(body.prompt, suffix, body.path, repository=body.repository, language=body.language)
        ask = Ask("ollama", (Part(prompt, sampling, body.layout),), session_id=body.session_id)
        return Reply(service, ask, GenerateWire(service), stream=body.stream)

    async def tags() -> Any:
        return {"models": [{"name": service.model_name, "size": 0, "digest": "", **_about(service)}]}

    async def show() -> Any:
        llm = service.llm
        suffix = "{{ .Suffix }}" if llm.fim.orders else ""
        return {
            **_about(service), "parameters": f"num_ctx {llm.max_model_len}", "template": "{{ .Prompt }}" + suffix,
            "modelfile": "", "model_info": {"general.architecture": "llama", "llama.context_length": llm.max_model_len},
            "capabilities": ["completion", *(["insert"] if llm.fim.orders else [])],
        }  # fmt: skip

    async def version() -> Any:
        return {"version": megatron_infer.__version__}

    app.get("/api/tags")(tags)
    app.post("/api/show")(show)
    app.get("/api/version")(version)


def _about(service: Service) -> dict[str, Any]:
    config = service.llm.config
    details = {
        "parent_model": "", "format": "safetensors", "family": service.llm.fim.name,
        "families": [service.llm.fim.name], "parameter_size": "",
        "quantization_level": config.dtype if config.quantization == "none" else config.quantization,
    }  # fmt: skip
    modified = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(service.created))
    return {"model": service.model_name, "modified_at": modified, "details": details}
