"""What a request may be refused for, and the form in which each dialect says so."""

from __future__ import annotations

import math
from typing import Any

from pydantic import ValidationError
from starlette.responses import JSONResponse, PlainTextResponse, Response

from megatron_infer.llm import EngineDeadError

_KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 501: "not_supported_error"}
_PATHS = (
    ("/api/", "ollama"), ("/v1/fim/", "mistral"), ("/v1/health", "tabby"), ("/v1/events", "tabby"),
    ("/v1beta/", "tabby"), ("/v1/", "openai"), ("/beta/", "openai"),
)  # fmt: skip


class Refusal(Exception):
    """A request that gets no completion: HTTP status, and the reason for the user.

    fields: (place in the body, reason, kind) where the body itself is wrong. retry_after_seconds: when to come again.
    """

    def __init__(
        self, status: int, message: str, *, fields: tuple[tuple[list[str], str, str], ...] = (),
        retry_after_seconds: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.fields = status, message, fields
        self.retry_after_seconds = retry_after_seconds

    @classmethod
    def of(cls, error: Exception) -> Refusal:
        """What the client may know of an error. An error of our own tells nothing: its text may hold code."""
        if isinstance(error, Refusal):
            return error
        if isinstance(error, ValidationError):
            details = error.errors(include_url=False, include_context=False, include_input=False)
            # Of a union each member complains; the first says enough.
            fields = tuple((["body", *map(str, d["loc"])], d["msg"], d["type"]) for d in details[:8])
            return cls(400, "; ".join(f"{'.'.join(place[1:])}: {text}" for place, text, _ in fields), fields=fields)
        if isinstance(error, ValueError):
            return cls(400, str(error))
        if isinstance(error, EngineDeadError):
            return cls(503, "the engine has stopped; the server is about to exit")
        return cls(500, "internal error; the server's log has its cause")


def envelope(dialect: str, refusal: Refusal) -> Any:
    """The body, as JSON or text, in which clients of `dialect` expect an error."""
    status, message = refusal.status, refusal.message
    kind = _KINDS.get(status, "invalid_request_error" if status < 500 else "unavailable_error")
    if dialect == "ollama":
        return {"error": message}
    if dialect == "tabby":
        return message
    if dialect == "llama.cpp":
        return {"error": {"code": status, "message": message, "type": kind}}
    if dialect == "mistral":
        if refusal.fields:
            return {"detail": [{"loc": place, "msg": text, "type": type_} for place, text, type_ in refusal.fields]}
        return {"object": "error", "message": message, "type": kind, "param": None, "code": str(status)}
    param = ".".join(refusal.fields[0][0][1:]) if refusal.fields else None
    return {"error": {"message": message, "type": kind, "param": param or None, "code": status}}


def error_response(dialect: str, refusal: Refusal) -> Response:
    """The whole answer to a refused request."""
    body = envelope(dialect, refusal)
    status = 422 if dialect == "mistral" and refusal.fields else refusal.status
    later = refusal.retry_after_seconds
    headers = {} if later is None else {"Retry-After": str(max(1, math.ceil(later)))}
    return PlainTextResponse(body, status, headers) if isinstance(body, str) else JSONResponse(body, status, headers)


def dialect_of(path: str) -> str:
    """Whose clients call `path`. (Tabby's `/v1/completions` is known by its body.)"""
    return next((dialect for start, dialect in _PATHS if path.startswith(start)), "llama.cpp")
