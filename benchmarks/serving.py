"""What HTTP costs: the server's streams beside `LLM.complete_batch` and `LLM.stream`, on the same prompts in one run.

python benchmarks/serving.py [--model_dir DIR] [--rounds 7] [--pairs 60]

Throughput: 64 streams at a time over HTTP, against `complete_batch` of the same 64 prompts. Time to first token: one
request at a time, against `LLM.stream`. The server is a process of its own; the sides take turns, the other one idle.
Each round has prompts of its own, so that both compute all of them. The client, too, needs the cores that the server
computes on. It counts bytes while it is timed, and only then compares the texts with the library's.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import selectors
import socket
import statistics
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import psutil

from megatron_infer import LLM, FimPrompt, SamplingParams
from megatron_infer.commands.options import DEMO_DIR

NUM_STREAMS, NEW_TOKENS = 64, 96
FIRST_TOKENS = 4
ENGINE = {"device": "cpu", "max_model_len": 1024, "kv_cache_memory_bytes": 128 << 20, "max_num_seqs": NUM_STREAMS}
PREFIX_CHARACTERS, SUFFIX_CHARACTERS = 500, 200
END = b"data: [DONE]\n\n"


def prompts() -> Iterator[FimPrompt]:
    """Holes in the standard library, each elsewhere."""
    size = PREFIX_CHARACTERS + SUFFIX_CHARACTERS
    for module in (argparse, inspect, selectors, socket, statistics, subprocess, textwrap, json, re):
        source = inspect.getsource(module)
        for number, at in enumerate(range(0, len(source) - size, size // 3)):
            # The first line is different everywhere: nothing is found in the cache.
            prefix = f"# {module.__name__} {number}\n{source[at : at + PREFIX_CHARACTERS]}"
            yield FimPrompt(prefix, source[at + PREFIX_CHARACTERS : at + size])


def request(prompt: FimPrompt, max_tokens: int) -> bytes:
    body = json.dumps(
        {"prompt": prompt.prefix, "suffix": prompt.suffix, "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
    ).encode()
    return b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body


@contextmanager
def server(model_dir: str, *options: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A server's process and port. `options`: of the command `serve`."""
    command = [sys.executable, "-m", "megatron_infer", "serve", "--model_dir", model_dir, "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        found = next(filter(None, (re.search(r" at http://.*:(\d+)$", line) for line in process.stdout)), None)
        assert found is not None, "the server did not start"
        yield process, int(found[1])
        process.terminate()


def over_http(port: int, asked: Sequence[FimPrompt]) -> tuple[float, list[bytes]]:
    """Seconds until the last of all streams has ended, and what they said."""
    chosen, said = selectors.DefaultSelector(), [bytearray() for _ in asked]
    raws = [request(prompt, NEW_TOKENS) for prompt in asked]
    began = time.perf_counter()
    for index, raw in enumerate(raws):
        connection = socket.create_connection(("127.0.0.1", port))
        connection.sendall(raw)
        chosen.register(connection, selectors.EVENT_READ, index)
    while chosen.get_map():
        for key, _ in chosen.select():
            connection, text = key.fileobj, said[key.data]
            assert isinstance(connection, socket.socket)
            text += connection.recv(1 << 16)
            if END in text[-len(END) - 16 :]:
                chosen.unregister(connection)
                connection.close()
    return time.perf_counter() - began, [bytes(text) for text in said]


def first_over_http(connection: socket.socket, prompt: FimPrompt) -> tuple[float, bytes]:
    """Seconds to the first text, on a connection that is kept, and all that was said."""
    raw, said, first = request(prompt, FIRST_TOKENS), b"", 0.0
    began = time.perf_counter()
    connection.sendall(raw)
    while not said.endswith(b"0\r\n\r\n"):
        said += connection.recv(1 << 16)
        if not first and b'"text":' in said:
            first = time.perf_counter() - began
    return first, said


def text_of(said: bytes) -> str:
    """The text of a stream's events; their frames lie in chunks of HTTP, each on lines of its own."""
    events = [json.loads(line[6:]) for line in said.decode().split("\n") if line.startswith("data: {")]
    return "".join(event["choices"][0]["text"] for event in events)


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def throughput(
    llm: LLM, server_process: psutil.Process, port: int, work: Iterator[FimPrompt], rounds: int
) -> dict[str, object]:
    sampling = SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True)
    rows = []
    for number in range(rounds + 1):
        asked = [next(work) for _ in range(NUM_STREAMS)]
        row: dict[str, float] = {}
        for side in ("library", "http") if number % 2 else ("http", "library"):
            process = psutil.Process() if side == "library" else server_process
            before = cpu_seconds(process)
            if side == "library":
                began = time.perf_counter()
                done = list(llm.complete_batch(asked, sampling))
                seconds = time.perf_counter() - began
            else:
                seconds, said = over_http(port, asked)
            row[side] = NUM_STREAMS * NEW_TOKENS / seconds
            row[f"{side}_cpu_us"] = 1e6 * (cpu_seconds(process) - before) / (NUM_STREAMS * NEW_TOKENS)
        assert [text_of(one) for one in said] == [completion.text for completion in done]
        if number:  # the first one warms both
            rows.append(row)
            print(
                f"{number:5}  {row['library']:12.0f}  {row['http']:12.0f}  {row['http'] / row['library']:6.3f}"
                f"  {row['library_cpu_us']:12.0f}  {row['http_cpu_us']:12.0f}",
                flush=True,
            )
    return {
        "library_tokens_per_second": round(statistics.median(row["library"] for row in rows), 1),
        "http_tokens_per_second": round(statistics.median(row["http"] for row in rows), 1),
        "throughput_ratio": round(statistics.median(row["http"] / row["library"] for row in rows), 4),
    }


def first_token(llm: LLM, port: int, work: Iterator[FimPrompt], pairs: int) -> dict[str, object]:
    sampling = SamplingParams(max_new_tokens=FIRST_TOKENS, ignore_eos=True)
    rows: list[tuple[float, float]] = []
    with socket.create_connection(("127.0.0.1", port)) as connection:
        for number in range(pairs + 3):
            prompt, found = next(work), {}
            for side in ("library", "http") if number % 2 else ("http", "library"):
                if side == "http":
                    found[side], said = first_over_http(connection, prompt)
                else:
                    began = time.perf_counter()
                    stream = llm.stream(prompt, sampling)
                    text = next(stream)
                    found[side] = time.perf_counter() - began
                    text += "".join(stream)
            assert text_of(said) == text
            if number >= 3:  # the first ones warm both
                rows.append((1000 * found["library"], 1000 * found["http"]))
    library, http = ([row[side] for row in rows] for side in (0, 1))
    return {
        "library_ttft_ms": round(statistics.median(library), 3), "http_ttft_ms": round(statistics.median(http), 3),
        "http_adds_ms": round(statistics.median(http) - statistics.median(library), 3),
        "http_adds_ms_paired": round(statistics.median(b - a for a, b in rows), 3),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_dir", default=str(DEMO_DIR))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--pairs", type=int, default=60)
    args = parser.parse_args()
    work = prompts()
    options = [part for name, value in ENGINE.items() for part in (f"--{name}", str(value))]
    with server(args.model_dir, *options) as (process, port), LLM(args.model_dir, **ENGINE) as llm:
        print("tokens/s and CPU microseconds per token")
        print(f"round  {'library':>12}  {'http':>12}  {'ratio':>6}  {'library CPU':>12}  {'server CPU':>12}")
        report = throughput(llm, psutil.Process(process.pid), port, work, args.rounds)
        report |= first_token(llm, port, work, args.pairs)
    print(
        json.dumps(
            {"streams": NUM_STREAMS, "new_tokens": NEW_TOKENS, "rounds": args.rounds, "pairs": args.pairs, **report}
        )
    )


if __name__ == "__main__":
    main()
