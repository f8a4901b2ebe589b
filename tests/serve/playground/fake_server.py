"""A server for the playground whose answers a test decides: its files, and `/infill` in the form of the real one."""

from __future__ import annotations

import functools
import json
import math
import queue
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PLAYGROUND = Path(__file__).resolve().parents[3] / "megatron_infer" / "serve" / "playground"
Body = dict[str, Any]


def answer(tokens: Sequence[str], *, kept: int | None = None, trimmed_by: str | None = None) -> Body:
    """A whole answer of these tokens, of which the text has the first `kept`, in the server's form."""
    rows = [
        {
            "id": index, "token": text, "bytes": list(text.encode()), "logprob": math.log(0.75),
            "top_logprobs": [
                {"id": index, "token": text, "bytes": list(text.encode()), "logprob": math.log(0.75)},
                {"id": 99, "token": "<other>", "bytes": list(b"<other>"), "logprob": math.log(0.125)},
            ],
        }
        for index, text in enumerate(tokens)
    ]  # fmt: skip
    return {
        "index": 0, "content": "".join(tokens[:kept]), "stop": True, "stop_type": "word" if trimmed_by else "eos",
        "stopping_word": "", "tokens_predicted": len(tokens), "tokens_evaluated": 41, "truncated": False,
        "timings": {"cache_n": 32, "prompt_n": 9, "predicted_n": len(tokens)}, "completion_probabilities": rows,
        "megatron_infer": {
            "trimmed_by": [trimmed_by], "dropped_tokens": 0, "first_token_ms": 12.3, "total_ms": 4.56
        },
    }  # fmt: skip


SUM = answer(["a", "lpha", " + ", "beta"])


class Exchange:
    """One `POST /infill` in progress."""

    def __init__(self, handler: SimpleHTTPRequestHandler, body: Body) -> None:
        self.body, self.headers, self._handler = body, handler.headers, handler

    def refuse(self, status: int, message: str, **headers: str) -> None:
        """No answer, for this reason."""
        self._start(status, "application/json", **headers)
        self._handler.wfile.write(json.dumps({"error": {"code": status, "message": message}}).encode())

    def reply(self, *answers: Body) -> None:
        """Whole answers."""
        self._start(200, "application/json")
        self._handler.wfile.write(json.dumps(answers if self.body.get("n_cmpl") else answers[0]).encode())

    def stream(self, whole: Body, num_characters: int = 3) -> None:
        """The answer in pieces of its text, after a comment."""
        self._start(200, "text/event-stream")
        text = whole["content"]
        pieces = [text[start : start + num_characters] for start in range(0, len(text), num_characters)]
        self._handler.wfile.write(b": ping\n\n")
        for piece in pieces[:-1]:
            self.send({"index": 0, "content": piece, "stop": False})
        self.send({**whole, "content": "".join(pieces[-1:])})

    def send(self, event: Body) -> None:
        """One event of a stream."""
        self._handler.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")

    def begin(self) -> None:
        """The head of a stream."""
        self._start(200, "text/event-stream")

    def wait_until_gone(self) -> None:
        """Until the client has hung up."""
        while self._handler.connection.recv(1, socket.MSG_PEEK):
            pass

    def _start(self, status: int, kind: str, **headers: str) -> None:
        self._handler.send_response(status)
        self._handler.send_header("Content-Type", kind)
        for name, value in headers.items():
            self._handler.send_header(name.replace("_", "-"), value)
        self._handler.end_headers()


Answering = Callable[[Exchange], None]


class FakeServer(ThreadingHTTPServer):
    """`answering`: what is done about an `/infill`. `bodies`: of all so far. naming: the same for `/v1/models`.

    posts: (path, body) of every POST, as they come. gone: the bodies of those that were given up while held.
    """

    daemon_threads = True
    request_queue_size = 64  # A browser opens several connections at once.

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), functools.partial(_Handler, directory=str(PLAYGROUND)))
        self.url = f"http://127.0.0.1:{self.server_port}/"
        self.bodies: list[Body] = []
        self.posts: queue.Queue[tuple[str, Body]] = queue.Queue()
        self.gone: queue.Queue[Body] = queue.Queue()
        self.answering: Answering = lambda exchange: exchange.stream(SUM)
        self.naming: Answering = lambda exchange: exchange.reply({"object": "list", "data": [{"id": "fake"}]})

    def next_prefix(self) -> str:
        """Of the next request, which is waited for."""
        return self.posts.get(timeout=60)[1]["input_prefix"]

    def next_gone(self) -> str:
        """The prefix of the next request whose client hangs up, which is waited for."""
        return self.gone.get(timeout=60)["input_prefix"]

    def hold(self, exchange: Exchange) -> None:
        """Answer nothing, and note when the client gives up."""
        exchange.wait_until_gone()
        self.gone.put(exchange.body)


class _Handler(SimpleHTTPRequestHandler):
    server: FakeServer

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self.server.naming(Exchange(self, {}))
        else:
            super().do_GET()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.posts.put((self.path, body))
        if self.path != "/infill" or "n_predict" not in body:
            Exchange(self, body).reply({"content": "", "stop": True})
            return
        self.server.bodies.append(body)
        self.server.answering(Exchange(self, body))

    def log_message(self, *args: object) -> None:
        """Silent."""


@contextmanager
def fake_server() -> Iterator[FakeServer]:
    server = FakeServer()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
