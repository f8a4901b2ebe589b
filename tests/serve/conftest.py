"""A server in this process, on a free port, over a tiny model."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the server's packages are an extra: requirements-serve.txt")

import httpx
from megatron_infer import LLM, SamplingParams
from megatron_infer.serve.command import Server
from megatron_infer.serve.service import Service
from megatron_infer.serve.settings import Settings


class Running:
    """A server that answers at `url`."""

    def __init__(self, llm: LLM, **settings: Any) -> None:
        self.llm = llm
        self.service = Service(llm, Settings(port=0, **settings), SamplingParams(max_new_tokens=16))
        self.server = Server(self.service, self.service.settings.api_key)
        self._socket = self.server.config.bind_socket()
        self.url = "http://127.0.0.1:{}".format(self._socket.getsockname()[1])
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


@pytest.fixture(scope="session")
def tiny_llm(tiny_checkpoint: Path) -> Iterator[LLM]:
    with LLM(tiny_checkpoint, device="cpu", kv_cache_memory_bytes=4 << 20, max_num_seqs=8) as llm:
        yield llm


@pytest.fixture(scope="session")
def running(tiny_llm: LLM) -> Iterator[Running]:
    with Running(tiny_llm) as server:
        yield server
