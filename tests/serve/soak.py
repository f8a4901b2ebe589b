"""A server under mixed load for minutes: python -m tests.serve.soak [--minutes 30] [--model_dir DIR] [server options].

Clients of all dialects ask, stream, vanish, supersede each other and send nonsense. Sixty times they pause, and
once nothing is in hand the server's memory, descriptors, threads and used blocks are taken. In the end: one line of
JSON with the slopes. Exit status 1: something grew, an answer was not the library's, or the server failed.
"""

from __future__ import annotations

import argparse
import inspect
import json
import random
import re
import socket
import statistics
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import httpx
import psutil

from benchmarks.serving import server
from megatron_infer import LLM, FimPrompt, SamplingParams

NUM_CLIENTS = 8
NUM_SAMPLES = 60
MAX_GROWTH = 0.01
"""Of memory, from the middle of the run to its end."""
NUM_TOKENS = 24
_SOURCE = inspect.getsource(textwrap)
HOLES = [(_SOURCE[at - 900 : at], _SOURCE[at + 40 : at + 300]) for at in range(1000, 13000, 211)]
NONSENSE: list[tuple[str, bytes]] = [
    ("/v1/completions", b"{"),
    ("/v1/completions", b"[" * 100_000),
    ("/v1/completions", b'{"prompt": 1.5}'),
    ("/v1/completions", b'{"prompt": "x", "n": 1000000}'),
    ("/v1/completions", b'{"prompt": "x", "temperature": NaN}'),
    ("/v1/completions", b'{"prompt": [99999999]}'),
    ("/v1/completions", b'{"segments": {"prefix": 3}}'),
    ("/v1/fim/completions", b'{"suffix": "no prompt"}'),
    ("/v1/chat/completions", b'{"messages": []}'),
    ("/api/generate", b'{"prompt": "x", "options": {"num_predict": "many"}}'),
    ("/infill", b'{"input_prefix": "\xff\xfe"}'),
    ("/infill", b"null"),
    ("/completion", b'{"prompt": "x", "grammar": "root ::= x"}'),
    ("/detokenize", b'{"tokens": [-1]}'),
    ("/nowhere", b"{}"),
]


class Load:
    """Clients in threads. Counts what was done, and keeps some answers to compare."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.done: Counter[str] = Counter()
        self.faults: list[str] = []
        self.answers: dict[tuple[str, int], set[str]] = {}
        self._lock = threading.Lock()
        self._may_go, self._is_over = threading.Event(), False
        self._threads = [threading.Thread(target=self._run, args=(i,)) for i in range(NUM_CLIENTS)]
        self._num_busy = 0

    def start(self) -> None:
        self._may_go.set()
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._is_over = True
        self._may_go.set()
        for thread in self._threads:
            thread.join()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """No client does anything in the block."""
        self._may_go.clear()
        while self._num_busy:
            time.sleep(0.01)
        yield
        self._may_go.set()

    def _run(self, seed: int) -> None:
        draw = random.Random(seed)
        actions = (self._whole, self._stream, self._vanish, self._supersede, self._nonsense, self._look)
        with httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=120, trust_env=False) as client:
            while not self._is_over:
                self._may_go.wait()
                with self._lock:
                    self._num_busy += 1
                (action,) = draw.choices(actions, weights=(6, 6, 3, 2, 2, 1))
                try:
                    action(draw, client)
                except Exception as error:  # what the client sees is the result
                    self.faults.append(f"{action.__name__}: {error!r}")
                with self._lock:
                    self._num_busy -= 1
                    self.done[action.__name__.strip("_")] += 1

    def _whole(self, draw: random.Random, client: httpx.Client) -> None:
        name, number = draw.choice(list(DIALECTS)), draw.randrange(len(HOLES))
        route, body, text_of = DIALECTS[name]
        answer = client.post(route, json=body(*HOLES[number]))
        assert answer.status_code == 200, answer.text
        self._keep(name, number, text_of(answer.json()))

    def _stream(self, draw: random.Random, client: httpx.Client) -> None:
        name, number = draw.choice([name for name in DIALECTS if name != "tabby"]), draw.randrange(len(HOLES))
        route, body, text_of = DIALECTS[name]
        text = ""
        with client.stream("POST", route, json={**body(*HOLES[number]), "stream": True}) as answer:
            assert answer.status_code == 200, answer.read()
            for line in answer.iter_lines():
                if (event := line.removeprefix("data: ")).startswith("{"):
                    text += text_of(json.loads(event))
        self._keep(name, number, text)

    def _keep(self, name: str, number: int, text: str) -> None:
        with self._lock:
            self.answers.setdefault((name, number), set()).add(text)

    def _vanish(self, draw: random.Random, client: httpx.Client) -> None:
        """Before the answer, after its first byte, or in the middle of the request."""
        state = draw.choice(["half a body", "at once", "first byte"])
        body = json.dumps({"prompt": draw.choice(HOLES)[0], "max_tokens": 400, "ignore_eos": True, "stream": True})
        raw = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body.encode()
        with socket.create_connection(("127.0.0.1", self.port), timeout=120) as connection:
            connection.sendall(raw[: len(raw) // 2] if state == "half a body" else raw)
            if state == "first byte":
                connection.recv(1)

    def _supersede(self, draw: random.Random, client: httpx.Client) -> None:
        """Keystrokes of one session, each sent before the one before it is answered."""
        prefix, suffix = draw.choice(HOLES)
        session_id = f"soak-{draw.random()}"
        statuses: list[object] = []

        def key(count: int) -> None:
            body = {**DIALECTS["llama.cpp"][1](prefix[: len(prefix) - 4 + count], suffix), "session_id": session_id}
            try:
                statuses.append(client.post("/infill", json=body).status_code)
            except httpx.HTTPError as error:
                statuses.append(repr(error))

        keys = [threading.Thread(target=key, args=(count,)) for count in range(4)]
        for thread in keys:
            thread.start()
            time.sleep(0.005)
        for thread in keys:
            thread.join()
        assert 200 in statuses and set(statuses) <= {200, 410}, statuses

    def _nonsense(self, draw: random.Random, client: httpx.Client) -> None:
        route, body = draw.choice(NONSENSE)
        status = client.post(route, content=body).status_code
        assert 400 <= status < 500, (route, body[:80], status)

    def _look(self, draw: random.Random, client: httpx.Client) -> None:
        route = draw.choice(
            ["/health", "/metrics", "/v1/models", "/props", "/slots", "/api/tags", "/", "/openapi.json"]
        )
        assert client.get(route).status_code == 200, route
        client.post("/tokenize", json={"content": draw.choice(HOLES)[0]}).raise_for_status()


Body = Callable[[str, str], dict[str, Any]]
Text = Callable[[Any], str]


def _mistral_text(answer: Any) -> str:
    choice = answer["choices"][0]
    return str((choice.get("message") or choice["delta"])["content"])


DIALECTS: dict[str, tuple[str, Body, Text]] = {
    "openai": (
        "/v1/completions",
        lambda prefix, suffix: {"prompt": prefix, "suffix": suffix, "max_tokens": NUM_TOKENS},
        lambda answer: str(answer["choices"][0]["text"]),
    ),
    "mistral": (
        "/v1/fim/completions",
        lambda prefix, suffix: {"prompt": prefix, "suffix": suffix, "max_tokens": NUM_TOKENS},
        _mistral_text,
    ),
    "llama.cpp": (
        "/infill",
        lambda prefix, suffix: {"input_prefix": prefix, "input_suffix": suffix, "n_predict": NUM_TOKENS},
        lambda answer: str(answer["content"]),
    ),
    "ollama": (
        "/api/generate",
        lambda prefix, suffix: {
            "prompt": prefix, "suffix": suffix, "options": {"num_predict": NUM_TOKENS}, "stream": False,
        },
        lambda answer: str(answer["response"]),
    ),
    "tabby": (
        "/v1/completions",
        lambda prefix, suffix: {"segments": {"prefix": prefix, "suffix": suffix}},
        lambda answer: str(answer["choices"][0]["text"]),
    ),
}  # fmt: skip


def measure(process: psutil.Process, port: int) -> dict[str, float]:
    """Of the server and its ranks, once nothing is in hand."""
    deadline = time.monotonic() + 60
    while True:
        text = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text
        load = {name: float(value) for name, value in re.findall(r"^megatron_infer_(\w+) (\S+)$", text, re.M)}
        if load["requests_running"] + load["requests_waiting"] == 0 or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    time.sleep(0.5)  # sockets that clients have closed
    family = [process, *process.children(recursive=True)]
    return {
        "rss_mib": sum(one.memory_info().rss for one in family) / 2**20,
        "descriptors": sum(one.num_fds() for one in family),
        "threads": sum(one.num_threads() for one in family),
        "requests": load["requests_running"] + load["requests_waiting"],
        "kv_usage_ratio": load["kv_usage_ratio"],
    }  # fmt: skip


def differing(load: Load, model_dir: str) -> list[str]:
    """Answers that are not the library's, or not always the same."""
    wrong = []
    with LLM(model_dir, device="cpu") as llm:
        for (name, number), texts in sorted(load.answers.items()):
            typed, options = name in ("llama.cpp", "tabby"), llm.fim.interactive
            # Tabby's API has no limit; the command's is 256.
            sampling = SamplingParams(max_new_tokens=256 if name == "tabby" else NUM_TOKENS)
            sampling = replace(sampling, ending="auto" if typed else "raw")
            expected = llm.complete(FimPrompt(*HOLES[number]), sampling, options if typed else None)
            if texts != {expected.text}:
                wrong.append(f"{name} {number}: {texts} is not {expected.text!r}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--model_dir", default="demo")
    args, server_options = parser.parse_known_args()
    with server(args.model_dir, *server_options) as (process, port):
        load, samples = Load(port), []
        began = time.monotonic()
        load.start()
        for _ in range(NUM_SAMPLES):
            time.sleep(60 * args.minutes / NUM_SAMPLES)
            with load.pause():
                sample = measure(psutil.Process(process.pid), load.port)
            samples.append({"minute": round((time.monotonic() - began) / 60, 2), **sample})
            print(json.dumps(samples[-1]), file=sys.stderr, flush=True)
        load.stop()
        process.terminate()
        status = process.wait(timeout=60)
    first_half, second_half = samples[: NUM_SAMPLES // 2], samples[NUM_SAMPLES // 2 :]
    minutes = [sample["minute"] for sample in second_half]
    slopes = {
        f"{name}_per_minute": round(statistics.linear_regression(minutes, [s[name] for s in second_half]).slope, 5)
        for name in ("rss_mib", "descriptors", "threads")
    }
    first, last = second_half[0], second_half[-1]
    growth = slopes["rss_mib_per_minute"] * (last["minute"] - first["minute"]) / first["rss_mib"]
    wrong = differing(load, args.model_dir)
    checks = {
        "memory": growth <= MAX_GROWTH,
        "descriptors": max(s["descriptors"] for s in second_half) <= max(s["descriptors"] for s in first_half),
        "blocks": all(s["requests"] == s["kv_usage_ratio"] == 0 for s in samples),
        "answers": not wrong, "clients": not load.faults, "exit_status": status == 0,
    }  # fmt: skip
    for line in (*wrong[:10], *load.faults[:10]):
        print(line, file=sys.stderr)
    report = {
        "minutes": round(samples[-1]["minute"]), "done": dict(load.done), "compared": len(load.answers),
        "first": samples[0], "middle": first, "last": last, **slopes, "checks": checks,
    }  # fmt: skip
    print(json.dumps(report))
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
