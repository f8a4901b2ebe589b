"""Tabby's server API, as its editor plugins call it: segments of code with declarations and snippets around them.

https://tabby.tabbyml.com/api
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import psutil
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from megatron_infer.completion import Completion
from megatron_infer.fim import FimPrompt
from megatron_infer.serve.body import Body, Fields
from megatron_infer.serve.context import Snippet
from megatron_infer.serve.errors import Refusal
from megatron_infer.serve.reply import Reply, Wire, report
from megatron_infer.serve.service import Ask, Call, Part, Service, Update

_API_VERSION = "v0.9.1"
"""Of the Tabby server whose API this is; plugins compare it."""


class CodeSnippet(Fields):
    filepath: str
    body: str
    score: float = 0.0


class Segments(Fields):
    prefix: str
    suffix: str = ""
    filepath: str = ""
    declarations: list[CodeSnippet] = []
    relevant_snippets_from_changed_files: list[CodeSnippet] = []
    relevant_snippets_from_recently_opened_files: list[CodeSnippet] = []

    def context(self) -> tuple[Snippet, ...]:
        """The most relevant last: declarations of what the code uses, then what was edited, then what was looked at."""
        changed = sorted(self.relevant_snippets_from_changed_files, key=lambda snippet: snippet.score)
        found = [*self.relevant_snippets_from_recently_opened_files, *changed, *self.declarations]
        return tuple(Snippet(snippet.filepath, snippet.body) for snippet in found)


class DebugOptions(Fields):
    UNSUPPORTED: ClassVar = {"raw_prompt": ()}

    return_prompt: bool = False
    return_snippets: bool = False


class SegmentsBody(Body):
    UNSUPPORTED: ClassVar = {"mode": ("standard",), "deadline_ms": ()}

    segments: Segments
    temperature: float | None = None
    seed: int | None = None
    debug_options: DebugOptions = DebugOptions()


class SegmentsWire(Wire):
    def __init__(self, service: Service, body: SegmentsBody, *, has_crlf: bool) -> None:
        super().__init__(service)
        self._debug, self._has_crlf = body.debug_options, has_crlf

    def whole(self, call: Call, done: list[Completion]) -> Any:
        (completion,) = done
        debug = report(call, done)
        if self._debug.return_prompt:
            debug["prompt"] = self.service.llm.tokenizer.decode(completion.prompt_token_ids)
        if self._debug.return_snippets:
            debug["snippets"] = []  # of a search on the server, which there is none
        text = completion.text.replace("\n", "\r\n") if self._has_crlf else completion.text
        return {"id": self.id, "choices": [{"index": 0, "text": text}], "debug_data": debug}

    def events(self, call: Call, update: Update) -> Iterable[Any]:
        raise AssertionError("this dialect does not stream")


def completions(request: Request, service: Service, raw: Mapping[str, Any]) -> Response:
    """`/v1/completions` with segments. Raises ValueError."""
    request.state.dialect = "tabby"
    body = SegmentsBody.model_validate(raw)
    segments = body.segments
    prefix, suffix = segments.prefix.replace("\r\n", "\n"), segments.suffix.replace("\r\n", "\n")
    has_crlf = len(prefix) + len(suffix) < len(segments.prefix) + len(segments.suffix)
    prompt = FimPrompt(prefix, suffix, segments.filepath or body.path, language=body.language)
    sampling = body.sampling(service, usual_ending="auto", temperature=body.temperature, seed=body.seed)
    part = Part(prompt, sampling, body.layout, segments.context())
    ask = Ask("tabby", (part,), session_id=body.session_id)
    return Reply(service, ask, SegmentsWire(service, body, has_crlf=has_crlf), stream=False)


def add_routes(app: FastAPI, service: Service) -> None:
    """All routes of the dialect but `/v1/completions`, which is OpenAI's too."""

    async def health() -> Any:
        service.check_health()
        config = service.llm.config
        return {
            "model": service.model_name, "device": config.device, "arch": platform.machine(),
            "cpu_info": platform.processor(), "cpu_count": psutil.cpu_count() or 1, "cuda_devices": [],
            "version": {"build_date": "", "build_timestamp": "", "git_sha": "", "git_describe": _API_VERSION},
        }  # fmt: skip

    async def server_setting() -> Any:
        return {"disable_client_side_telemetry": True}

    async def events() -> Response:
        """What users did with a suggestion: not kept."""
        return Response(status_code=200)

    app.api_route("/v1/health", methods=["GET", "POST"])(health)
    app.get("/v1beta/server_setting")(server_setting)
    app.post("/v1/events")(events)
