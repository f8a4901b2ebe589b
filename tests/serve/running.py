"""A server in this process, on a free port, over a tiny model; and its engine, held back step by step."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from megatron_infer import LLM, SamplingParams
from megatron_infer.serve.command import Server, listen
from megatron_infer.serve.service import Service
from megatron_infer.serve.settings import Settings

PREFIX, SUFFIX, PATH = "def area(w, h):\n    return ", "\n\nprint(area(2, 3))\n", "shapes/area.py"
FOREVER = {"max_tokens": 400, "ignore_eos": True}
"""An answer that nobody sees the end of."""


class Running:
    """A server that answers at `url`."""

    def __init__(self, llm: LLM, **settings: Any) -> None:
        self.llm = llm
        self.service = Service(llm, Settings(port=0, **settings), SamplingParams(max_new_tokens=16))
        self.server = Server(self.service, self.service.settings.api_key)
        self._socket = listen("127.0.0.1", 0)
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=lambda: asyncio.run(self.server.serve([self._socket])))

    def __enter__(self) -> Running:
        self._thread.start()
        self.client = httpx.Client(base_url=self.url, timeout=60, trust_env=False)
        self.client.get("/health")
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.server.end()
        self._thread.join()
        assert self.service.stop()

    def post(self, route: str, /, **body: Any) -> Any:
        """The JSON of a request that must succeed."""
        answer = self.client.post(route, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()


class Steps:
    """Holds the engine back: it makes the steps that a test allows."""

    def __init__(self, llm: LLM) -> None:
        self._session, self._step = llm.session, llm.session.step
        self._allowed, self._made = threading.Semaphore(0), threading.Semaphore(0)
        self._is_free = False
        llm.session.step = self._guarded  # type: ignore[method-assign]

    def _guarded(self) -> None:
        if not self._is_free:
            self._allowed.acquire()
        self._step()
        self._made.release()

    def make(self, count: int) -> None:
        """Have `count` steps made."""
        for _ in range(count):
            self._allowed.release()
            assert self._made.acquire(timeout=30)

    def free(self) -> None:
        """From now on as many as there is work for."""
        self._is_free = True
        self._allowed.release(1000)

    def restore(self) -> None:
        self.free()
        del self._session.step


@pytest.fixture(scope="session")
def tiny_llm(tiny_checkpoint: Path) -> Iterator[LLM]:
    with LLM(tiny_checkpoint, device="cpu", kv_cache_memory_bytes=4 << 20, max_num_batched_tokens=64) as llm:
        yield llm


@pytest.fixture(scope="session")
def running(tiny_llm: LLM) -> Iterator[Running]:
    with Running(tiny_llm) as server:
        yield server


@pytest.fixture
def small_llm(tiny_checkpoint: Path) -> Iterator[LLM]:
    """One that computes two sequences together, and of a long prompt 64 tokens in a step."""
    with LLM(
        tiny_checkpoint, device="cpu", kv_cache_memory_bytes=4 << 20, max_num_seqs=2, max_num_batched_tokens=64
    ) as llm:
        yield llm


@pytest.fixture
def steps(small_llm: LLM) -> Iterator[Steps]:
    steps = Steps(small_llm)
    yield steps
    steps.restore()


@pytest.fixture
def held(small_llm: LLM, steps: Steps) -> Iterator[Running]:
    """A server whose engine is held back."""
    with Running(small_llm, max_queued=1, drain_seconds=0) as server:
        yield server
        steps.free()
