"""Tabby's API (https://tabby.tabbyml.com/api), as its editor plugins call it: code with snippets from elsewhere."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from typing import Any, ClassVar

import psutil
from fastapi import FastAPI, Request, Response
from pydantic import Field

from megatron_infer.completion import Completion
from megatron_infer.serve.dialects.base import Body, Fields, Wire, report
from megatron_infer.serve.service import Call, Service

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
    declarations: list[CodeSnippet] = Field([])
    relevant_snippets_from_changed_files: list[CodeSnippet] = Field([])
    relevant_snippets_from_recently_opened_files: list[CodeSnippet] = Field([])

    def context(self) -> list[tuple[str, str]]:
        """The most relevant last: declarations of what the code uses, before them what was edited, or looked at."""
        changed = sorted(self.relevant_snippets_from_changed_files, key=lambda snippet: snippet.score)
        found = [*self.relevant_snippets_from_recently_opened_files, *changed, *self.declarations]
        return [(snippet.filepath, snippet.body) for snippet in found]


class SegmentsBody(Body):
    refuses: ClassVar = "tabby"

    segments: Segments


class SegmentsWire(Wire):
    """Line ends go out as they came in."""

    dialect = "tabby"
    has_crlf = False

    def whole(self, call: Call, done: Sequence[Completion]) -> Any:
        text = done[0].text.replace("\n", "\r\n") if self.has_crlf else done[0].text
        return {"id": self.id, "choices": [{"index": 0, "text": text}], "debug_data": report(call, done)}


def completions(request: Request, service: Service, raw: dict[str, Any]) -> Response:
    """`/v1/completions` with segments. Raises ValueError."""
    request.state.dialect = "tabby"
    body = SegmentsBody.model_validate({**raw, "stream": False})
    wire, segments = SegmentsWire(service), body.segments
    prefix, suffix = segments.prefix.replace("\r\n", "\n"), segments.suffix.replace("\r\n", "\n")
    wire.has_crlf = (prefix, suffix) != (segments.prefix, segments.suffix)
    hole = body.hole(prefix, suffix, segments.filepath, segments.context())
    sampling = body.sampling(service, "auto")
    return body.reply(wire, [body.part(hole, sampling, service.for_typing)])


def add_routes(app: FastAPI, service: Service) -> None:
    @app.get("/v1/health")
    @app.post("/v1/health")
    async def health() -> Any:
        service.check_health()
        return {
            "model": service.model_name, "device": service.llm.config.device, "arch": platform.machine(),
            "cpu_info": platform.processor(), "cpu_count": psutil.cpu_count() or 1, "cuda_devices": [],
            "version": {"build_date": "", "build_timestamp": "", "git_sha": "", "git_describe": _API_VERSION},
        }  # fmt: skip

    @app.get("/v1beta/server_setting")
    async def server_setting() -> Any:
        return {"disable_client_side_telemetry": True}

    @app.post("/v1/events", response_class=Response)
    async def events() -> Response:
        """What users did with a suggestion is not kept."""
        return Response()
