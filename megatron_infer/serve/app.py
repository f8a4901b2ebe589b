"""The web application: the routes of all dialects over one Service, errors in each one's form, health and metrics."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from megatron_infer.llm import EngineDeadError
from megatron_infer.serve.dialects import llama_cpp, mistral, ollama, openai, tabby
from megatron_infer.serve.errors import Refusal, dialect_of, error_response
from megatron_infer.serve.gate import Gate
from megatron_infer.serve.service import Service

PLAYGROUND = Path(__file__).with_name("playground")


def make_app(service: Service, keys: tuple[str, ...] = ()) -> ASGIApp:
    """Everything, behind the gate. `keys`: of whom may come in."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield

    said: dict[int | str, Any] = {"4XX": {"description": "refused"}, "5XX": {"description": "not now"}}
    app = FastAPI(title="megatron_infer", lifespan=lifespan, docs_url=None, redoc_url=None, responses=said)
    for dialect in (openai, mistral, llama_cpp, ollama, tabby):
        dialect.add_routes(app, service)
    for kind in (Refusal, ValueError, EngineDeadError, HTTPException, Exception):
        app.exception_handler(kind)(_answer)

    @app.get("/health")
    async def health() -> Any:
        """200 while the engine steps, or has nothing to do."""
        service.check_health()
        return {"status": "ok", "model": service.model_name, "num_steps": service.engine.num_steps}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    document = app.openapi()
    document["components"] = {"schemas": {}}
    for operation in (operation for path in document["paths"].values() for operation in path.values()):
        document["components"]["schemas"] |= operation.get("requestBody", {}).pop("$defs", {})
    app.mount("/", StaticFiles(directory=PLAYGROUND, html=True))
    return Gate(app, keys, service.settings.max_body_bytes)


async def _answer(request: Request, error: Exception) -> Response:
    dialect = getattr(request.state, "dialect", dialect_of(request.scope["path"]))
    if isinstance(error, HTTPException):
        # The page's files stand behind every path that is no route, and they refuse the method first.
        is_route = request.scope["path"] in {getattr(route, "path", None) for route in request.app.routes}
        is_nowhere = error.status_code == 405 and not is_route
        error = Refusal(404, "there is no such route") if is_nowhere else Refusal(error.status_code, str(error.detail))
    return error_response(dialect, Refusal.of(error))
