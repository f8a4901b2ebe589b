"""The command: it says where it is, serves under torchrun, ends in order at SIGTERM, and with status 1 when it dies."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from megatron_infer.serve import command
from megatron_infer.serve.command import listen
from tests.serve.running import FOREVER, PREFIX
from tests.support.processes import wait_until

ROOT = Path(__file__).resolve().parents[2]
QUICK = ["--port", "0", "--device", "cpu", "--kv_cache_memory_bytes", str(4 << 20)]
SERVE = ["-m", "megatron_infer", "serve"]


@contextmanager
def serving(
    model_dir: Path, log: Path, *arguments: str, ranks: int = 0
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """The process (torchrun, where ranks are given) and the address it told."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks else []
    serve = [*launcher, *SERVE, "--model_dir", str(model_dir), *QUICK, *arguments]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with log.open("wb") as out:
        process = subprocess.Popen([sys.executable, *serve], stdout=out, stderr=out, env=env)
    children: list[psutil.Process] = []
    try:
        wait_until(lambda: process.poll() is not None or b" at http://" in log.read_bytes())
        url = re.search(r" at (http://\S+)", log.read_text())
        assert url, log.read_text()
        children = psutil.Process(process.pid).children(recursive=True)
        wait_until(lambda: status_of(url[1]) == 200)
        yield process, url[1]
    finally:
        for child in children:
            if child.is_running():
                child.kill()
        process.kill()
        process.wait()


def status_of(url: str) -> int:
    """Of its health; 0 while it cannot be reached."""
    try:
        return httpx.get(f"{url}/health", trust_env=False).status_code
    except httpx.TransportError:
        return 0


def streaming(url: str, n: int) -> AbstractContextManager[httpx.Response]:
    """A request for `n` long completions, as they come."""
    body = {"prompt": PREFIX, "stream": True, "n": n, **FOREVER}
    return httpx.stream("POST", f"{url}/v1/completions", json=body, trust_env=False, timeout=60)


@pytest.mark.parametrize("ranks", [0, 2], ids=["alone", "torchrun"])
def test_sigterm_lets_requests_finish(tiny_checkpoint: Path, tmp_path: Path, ranks: int) -> None:
    log = tmp_path / "log"
    with serving(tiny_checkpoint, log, ranks=ranks) as (process, url):
        with streaming(url, 40) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = list(lines)
        assert rest[-2:] == ["data: [DONE]", ""]
        assert sum('"finish_reason":"length"' in line for line in rest) == 40
        status = process.wait(timeout=60)
        assert status == 0 or ranks, log.read_text()
    assert '"message": "request"' in log.read_text()
    assert '"outcome": "ok"' in log.read_text()


def test_a_second_sigterm_does_not_wait(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with (
        serving(tiny_checkpoint, tmp_path / "log", "--drain_seconds", "3600") as (process, url),
        streaming(url, 60) as answer,
    ):
        next(answer.iter_lines())
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: status_of(url) == 0)
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)


def test_health_sees_a_rank_that_hangs_and_its_death_ends_the_server(tiny_checkpoint: Path, tmp_path: Path) -> None:
    arguments = ("--tensor_parallel_size", "2", "--late_seconds", "0.3")
    with serving(tiny_checkpoint, tmp_path / "log", *arguments) as (process, url):
        (follower,) = psutil.Process(process.pid).children()
        with streaming(url, 60) as answer:
            lines = answer.iter_lines()
            next(lines)
            follower.suspend()  # alive, but it does nothing
            wait_until(lambda: status_of(url) == 503)
            follower.resume()
            wait_until(lambda: status_of(url) == 200)
            follower.kill()
            text = "\n".join(lines)
        assert "the engine has stopped" in text
        assert process.wait(timeout=60) == 1


def test_options_that_would_be_unsafe_are_refused(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "keys"
    empty.write_text("\n")
    taken = listen("127.0.0.1", 0)
    taken.listen()
    port = str(taken.getsockname()[1])
    for arguments in (
        ["--port", port],
        ["--host", "0.0.0.0"],
        ["--api_key_file", str(empty)],
        ["--port", "99999"],
        ["--api_key", " "],
    ):
        assert command.main(["--model_dir", str(tiny_checkpoint), *arguments]) == 2
        assert capsys.readouterr().err.startswith("error: ")
    taken.close()
