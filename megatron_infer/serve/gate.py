"""What stands before every route: keys, origins, a limit on the body, and whether the client is still there."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import logging
from contextlib import suppress
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megatron_infer.serve.errors import Refusal, dialect_of, error_response

log = logging.getLogger("megatron_infer.serve")

OPEN_PATHS = ("/health",)


class Gate:
    """An ASGI application around another. `keys`: any of them opens it; without one it is open."""

    def __init__(self, app: ASGIApp, keys: tuple[str, ...], max_body_bytes: int) -> None:
        self._app, self._max_body_bytes = app, max_body_bytes
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        assert scope["type"] == "http", scope["type"]
        headers, path = Headers(scope=scope), scope["path"]
        if scope["method"] == "HEAD":  # as GET; the body is left out where it would be sent
            scope = {**scope, "method": "GET"}
        try:
            self._check_origin(headers)
            self._check_key(path, headers)
            body = await self._read(receive)
        except Refusal as refusal:
            answer = error_response(dialect_of(path), refusal)
            if refusal.status == 401:
                # A browser asks for the key, as the password of the page, and sends it with all that the page asks for.
                answer.headers["WWW-Authenticate"] = "Basic" if scope["method"] == "GET" else "Bearer"
            await answer(scope, receive, send)
            return
        if body is not None:
            await self._run(scope, body, receive, send)

    def _check_key(self, path: str, headers: Headers) -> None:
        # By the path as it was parsed: no header says where a request goes.
        if not self._digests or path in OPEN_PATHS:
            return
        given = hashlib.sha256(_given_key(headers).encode("utf-8", "replace")).digest()
        # All are compared, and each in constant time.
        if not sum(hmac.compare_digest(given, digest) for digest in self._digests):
            raise Refusal(401, "send the API key as: Authorization: Bearer KEY")

    def _check_origin(self, headers: Headers) -> None:
        """Only browsers send it. A page on the web must not make use of a server on its reader's machine."""
        origin = headers.get("origin", "")
        with suppress(ValueError):
            site = urlsplit(origin)
            # With a key, which browsers keep for each origin, the page's own address may have any name.
            is_here = site.hostname in ("localhost", "127.0.0.1", "::1") or bool(self._digests)
            if not origin or (is_here and site.netloc == headers.get("host")):
                return
        raise Refusal(403, "from a browser only the server's own page may call it")

    async def _read(self, receive: Receive) -> bytes | None:
        """The body; None where the client has gone. Raises Refusal."""
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self._max_body_bytes:
                raise Refusal(413, f"the body is longer than {self._max_body_bytes} bytes")
            if not message.get("more_body", False):
                return bytes(body)

    async def _run(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Run the application until it is done, or the client goes: then it is cancelled, wherever it is."""
        messages: list[Message] = [{"type": "http.request", "body": body}]

        async def replay() -> Message:
            if not messages:
                await asyncio.Event().wait()
            return messages.pop()

        answer = asyncio.ensure_future(self._app(scope, replay, send))
        gone = asyncio.ensure_future(receive())
        try:
            await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            answer.cancel()
            try:
                with suppress(asyncio.CancelledError):
                    await answer
            except Exception:  # the client has been told, as far as it could be
                log.exception("a request failed")


def _given_key(headers: Headers) -> str:
    """By whichever header it comes; an empty one is none."""
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and value.strip():
        return value.strip()
    if scheme.lower() == "basic":
        with suppress(ValueError):
            return base64.b64decode(value.strip()).decode().partition(":")[2]
    return headers.get("x-api-key") or headers.get("api-key") or ""
