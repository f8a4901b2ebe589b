"""What stands before every route: keys, origins, limits on the body, and that the client is still there.

It reads the path as the server parsed it and trusts no header to say where a request goes.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
from contextlib import suppress
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megatron_infer.serve.errors import Refusal, dialect_of, error_response
from megatron_infer.serve.settings import Settings

OPEN_PATHS = ("/health",)
_ALLOWED = {"Access-Control-Allow-Methods": "GET, POST", "Access-Control-Allow-Headers": "*"}


class Gate:
    """An ASGI application around another. `keys`: any of them opens; none: everyone may come in."""

    def __init__(self, app: ASGIApp, settings: Settings, keys: tuple[str, ...]) -> None:
        self._app, self._settings = app, settings
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            raise RuntimeError(f"{scope['type']} is not served")
        headers, path = Headers(scope=scope), scope["path"]
        try:
            origin = self._check_origin(headers)
            send = _with_headers(send, {"Access-Control-Allow-Origin": origin} if origin else {})
            if origin and scope["method"] == "OPTIONS":
                await Response(headers=_ALLOWED)(scope, receive, send)
                return
            self._check_key(path, headers)
            body = await self._read(headers, receive)
        except Refusal as refusal:
            answer = error_response(dialect_of(path), refusal)
            if refusal.status == 401:
                # Of a page a browser asks for the key, as the password, and sends it with all the page asks for.
                answer.headers["WWW-Authenticate"] = "Basic" if scope["method"] == "GET" else "Bearer"
            await answer(scope, receive, send)
            return
        except ConnectionResetError:
            return
        await self._run(scope, body, receive, send)

    def _check_key(self, path: str, headers: Headers) -> None:
        if not self._digests or path in OPEN_PATHS:
            return
        given = hashlib.sha256(_given_key(headers).encode("utf-8", "replace")).digest()
        # All are compared, and each in constant time.
        if not sum(hmac.compare_digest(given, digest) for digest in self._digests):
            raise Refusal(401, "send the API key as: Authorization: Bearer KEY")

    def _check_origin(self, headers: Headers) -> str:
        """The origin of another page that may read the answer; "" where none asks. Raises Refusal.

        Only browsers send it, and a page on the web must not make use of a server on its reader's machine.
        """
        origin = headers.get("origin", "")
        if not origin or origin in self._settings.allow_origin:
            return origin
        try:
            site = urlsplit(origin)
            own = site.hostname in ("localhost", "127.0.0.1", "::1") and site.netloc == headers.get("host")
            # With a key, which browsers keep per origin, the page's own address may have any name.
            if own or (self._digests and site.netloc == headers.get("host")):
                return ""
        except ValueError:
            pass
        raise Refusal(403, "pages of this origin may not call the server; see --allow_origin")

    async def _read(self, headers: Headers, receive: Receive) -> bytes:
        limit = self._settings.max_body_bytes
        too_long = Refusal(413, f"the body is longer than {limit} bytes")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > limit:
            raise too_long
        chunks, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ConnectionResetError
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            if size > limit:
                raise too_long
            if not message.get("more_body", False):
                return b"".join(chunks)

    async def _run(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Run the application until it is done or the client goes, which cancels it."""
        messages: list[Message] = [{"type": "http.request", "body": body}]
        never = asyncio.Event()

        async def replay() -> Message:
            if not messages:
                await never.wait()
            return messages.pop()

        answer = asyncio.ensure_future(self._app(scope, replay, send))
        gone = asyncio.ensure_future(receive())
        try:
            await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                answer.result()
        finally:
            gone.cancel()
            if not answer.done():
                answer.cancel()
                with suppress(asyncio.CancelledError):
                    await answer


def _with_headers(send: Send, extra: dict[str, str]) -> Send:
    fixed = [(b"x-content-type-options", b"nosniff"), *((k.lower().encode(), v.encode()) for k, v in extra.items())]

    async def send_with(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), *fixed]}
        await send(message)

    return send_with


def _given_key(headers: Headers) -> str:
    """By whichever header it comes; an empty one is none."""
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and value.strip():
        return value.strip()
    if scheme.lower() == "basic":
        with suppress(binascii.Error, ValueError):
            return base64.b64decode(value.strip()).decode().partition(":")[2]
    return headers.get("x-api-key") or headers.get("api-key") or ""
