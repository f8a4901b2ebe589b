"""Keystrokes over real source files, sent to this server and to llama.cpp's: milliseconds to the usable answer.

python benchmarks/keystrokes.py --model_dir DIR --gguf FILE --llama_server PROGRAM --out DIR

Each side is a server of its own with `--threads` threads, and every keystroke goes to all of them in turn as the same
POST /infill, for at most `--n_predict` tokens. Ours may end an answer before, where the hole ends; llama.cpp does not.
Ends with one JSON line. With `--whole_text`, llama.cpp runs a second time with a batch that cuts no prompt, and the
files are named keystrokes_whole_text; `--places 2 --keys 9` is enough of that, since every keystroke takes seconds.
(A file named typing.py would shadow Python's own for every script beside it.)
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.util
import json
import signal
import socket
import statistics
import subprocess
import sys
import sysconfig
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peers import machine

SOURCES = ("argparse.py", "asyncio/streams.py", "json/decoder.py", "tarfile.py", "zipfile.py", "configparser.py")
"""Of the standard library: what is typed into, one place each."""
BEFORE, AFTER, HOLE = 150, 120, 4
"""Lines before and after the cursor at the first keystroke, and lines that are typed."""
START_SECONDS, ANSWER_SECONDS = 600.0, 600.0


@dataclass(frozen=True)
class Keystroke:
    """What an editor knows when a key was pressed; `rest_of_line` is what its user will go on to type on this line."""

    place: str
    prefix: str
    suffix: str
    rest_of_line: str


@dataclass(frozen=True)
class Server:
    """One side: its name in the tables, how it is started on a port, and what it asks for beside prefix and suffix."""

    name: str
    command: Callable[[int], list[str]]
    fields: dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """One side's answer to one keystroke. `prompt_tokens` were computed, `cached_tokens` were not."""

    milliseconds: float
    prompt_tokens: int
    cached_tokens: int
    decoded_tokens: int
    is_first_line_right: bool


def trace(num_places: int, num_keys: int) -> Iterator[Keystroke]:
    """`num_keys` keystrokes at each place: from the first assignment below a file's middle on, lines are typed again.

    Indentation is not typed: editors write it themselves.
    """
    for source in SOURCES[:num_places]:
        text = Path(sysconfig.get_paths()["stdlib"], source).read_text(encoding="utf-8")
        lines = text.splitlines(keepends=True)
        statements = [node.lineno - 1 for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Assign)]
        first = min(line for line in statements if line >= len(lines) // 2)
        prefix, suffix = "".join(lines[first - BEFORE : first]), "".join(lines[first + HOLE : first + HOLE + AFTER])
        hole = "".join(lines[first : first + HOLE]).removesuffix("\n")
        typed = [i for i in range(len(hole)) if hole[:i].rpartition("\n")[2].strip() or hole[i] not in " \n"]
        for position in typed[:num_keys]:
            rest = hole[position:].partition("\n")[0]
            yield Keystroke(source, prefix + hole[:position], "\n" + suffix, rest)


def sides(arguments: argparse.Namespace) -> list[Server]:
    """Ours, and llama.cpp with the share of a prompt that it keeps by itself; if asked for, with the whole text too."""
    engine = ["--num_threads", str(arguments.threads), "--quantization", "int8"]

    def ours(port: int) -> list[str]:
        command = [sys.executable, "-m", "megatron_infer", "serve", "--model_dir", str(arguments.model_dir)]
        return [*command, "--port", str(port), *engine]

    def theirs(batch: int) -> Callable[[int], list[str]]:
        threads = ["-t", str(arguments.threads), "-tb", str(arguments.threads)]
        options = ["-c", "8192", "-b", str(batch), "-np", "1", "--no-webui", *threads]
        return lambda port: [str(arguments.llama_server), "-m", str(arguments.gguf), "--port", str(port), *options]

    predict = {"n_predict": arguments.n_predict, "temperature": 0.0, "cache_prompt": True}
    found = [
        Server("megatron_infer", ours, predict),
        Server("llama.cpp, its own budgets", theirs(2048), predict),
    ]
    return [*found, Server("llama.cpp, the whole text", theirs(8192), predict)] if arguments.whole_text else found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """The answer's JSON. Raises OSError for any status but 200."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as response:
        answer: dict[str, Any] = json.loads(response.read())
        return answer


@contextlib.contextmanager
def running(server: Server, log: Path) -> Iterator[str]:
    """The base URL of a started server that says it is ready; ended when the block is left."""
    port = free_port()
    with log.open("w") as out:
        process = subprocess.Popen(server.command(port), stdout=out, stderr=subprocess.STDOUT)
    url, until = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
    try:
        while True:
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"{server.name} did not start; its output is in {log}")
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                break
            time.sleep(0.2)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def ask(url: str, server: Server, key: Keystroke) -> Answer:
    """Send one keystroke, and wait for the whole answer."""
    cut = key.prefix.rfind("\n") + 1  # as llama.vim does it: the line up to the cursor goes into `prompt`
    body = {"input_prefix": key.prefix[:cut], "prompt": key.prefix[cut:], "input_suffix": key.suffix, **server.fields}
    began = time.perf_counter()
    answer = post(f"{url}/infill", body)
    milliseconds = 1e3 * (time.perf_counter() - began)
    timings = answer["timings"]
    first_line = answer["content"].partition("\n")[0]
    counts = timings["prompt_n"], timings.get("cache_n", 0), timings["predicted_n"]
    return Answer(milliseconds, *counts, first_line.rstrip() == key.rest_of_line.rstrip())


def measure(servers: Sequence[Server], keys: Sequence[Keystroke], logs: Path) -> dict[str, list[Answer]]:
    """Every keystroke to every server, who comes first changing from one to the next."""
    answers: dict[str, list[Answer]] = {server.name: [] for server in servers}
    with contextlib.ExitStack() as stack:
        urls = [stack.enter_context(running(s, logs / f"server-{i}.log")) for i, s in enumerate(servers)]
        for url, server in zip(urls, servers, strict=True):
            post(f"{url}/infill", {"input_prefix": "x = ", "input_suffix": "\n", **server.fields})
        for number, key in enumerate(keys):
            for turn in range(len(servers)):
                i = (number + turn) % len(servers)
                answers[servers[i].name].append(ask(urls[i], servers[i], key))
            told = ", ".join(f"{name} {got[-1].milliseconds:.0f} ms" for name, got in answers.items())
            print(f"{number + 1} of {len(keys)} ({key.place}): {told}", file=sys.stderr, flush=True)
    return answers


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest rank: the smallest value that at least `share` of all values do not exceed."""
    return sorted(values)[max(-int(-share * len(values) // 1) - 1, 0)]


def summary(answers: Sequence[Answer]) -> dict[str, float]:
    """The figures of one side."""
    milliseconds = [answer.milliseconds for answer in answers]
    computed, cached = sum(a.prompt_tokens for a in answers), sum(a.cached_tokens for a in answers)
    return {
        "p50 ms": percentile(milliseconds, 0.5),
        "p95 ms": percentile(milliseconds, 0.95),
        "prompt tokens computed (median)": statistics.median(a.prompt_tokens for a in answers),
        "tokens decoded (median)": statistics.median(a.decoded_tokens for a in answers),
        "share of prompt cached": cached / max(cached + computed, 1),
        "first line right": sum(a.is_first_line_right for a in answers),
    }


def markdown(results: dict[str, Any], name: str) -> str:
    """The report, of which the files have this name."""
    figures = results["summary"]
    names = list(figures)
    ours, *peers = figures.values()
    rows = [f"| {row} | {' | '.join(f'{side[row]:.4g}' for side in figures.values())} |" for row in ours]
    ratios = [
        f"- against {other}: p50 1/{peer['p50 ms'] / ours['p50 ms']:.1f}, p95 1/{peer['p95 ms'] / ours['p95 ms']:.1f}"
        for other, peer in zip(names[1:], peers, strict=True)
    ]
    provenance = [f"| {what} | {value} |" for what, value in results["provenance"].items()]
    return "\n".join(
        [
            "# Milliseconds from a keystroke to the usable answer", "",
            f"{results['num_keystrokes']} keystrokes in {len(results['places'])} files of the standard library: "
            f"{', '.join(results['places'])}. {BEFORE} lines before and {AFTER} after the\n"
            "cursor; each server is asked one after another, at every keystroke.", "",
            f"| | {' | '.join(names)} |", f"|{':--|' + '--:|' * len(names)}", *rows, "",
            "Time to the usable answer, ours as a fraction of theirs:", "", *ratios, "",
            f"![milliseconds per keystroke]({name}.png)", "", "| | |", "|:--|:--|", *provenance, "",
        ]
    )  # fmt: skip


def plot(answers: dict[str, list[Answer]], path: Path) -> None:
    """Milliseconds of every keystroke, on a logarithmic axis."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4))
    for name, got in answers.items():
        axes.semilogy([answer.milliseconds for answer in got], ".-", label=name, linewidth=0.7)
    axes.set(xlabel="keystroke", ylabel="milliseconds to the usable answer", ylim=(10, None))
    axes.legend()
    axes.grid(True, which="both", alpha=0.25)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_dir", required=True, help="the checkpoint, rounded to int8 while loading")
    parser.add_argument("--gguf", type=Path, required=True, help="the same weights for llama.cpp, as q8_0")
    parser.add_argument("--llama_server", type=Path, required=True, help="llama.cpp's llama-server, built natively")
    parser.add_argument("--out", type=Path, required=True, help="directory for the report")
    parser.add_argument("--places", type=int, default=4, choices=range(1, len(SOURCES) + 1))
    parser.add_argument("--keys", type=int, default=40, help="keystrokes at each place")
    parser.add_argument("--n_predict", type=int, default=32, help="tokens of an answer, at most")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--whole_text", action="store_true", help="llama.cpp also with a batch that cuts no prompt")
    arguments = parser.parse_args()
    keys = list(trace(arguments.places, arguments.keys))
    arguments.out.mkdir(parents=True, exist_ok=True)
    provenance = machine.provenance(f"python {' '.join(sys.argv)}", machine.best_isa(), arguments.threads)
    version = subprocess.run([arguments.llama_server, "--version"], capture_output=True, text=True, check=False)
    provenance["llama.cpp"] = (version.stderr or version.stdout).strip().splitlines()[0]
    answers = measure(sides(arguments), keys, arguments.out)
    results = {
        "num_keystrokes": len(keys),
        "places": sorted({key.place for key in keys}),
        "summary": {name: summary(got) for name, got in answers.items()},
        "provenance": provenance,
    }
    name = "keystrokes_whole_text" if arguments.whole_text else "keystrokes"
    if importlib.util.find_spec("matplotlib") is not None:
        plot(answers, arguments.out / f"{name}.png")
    (arguments.out / f"{name}.md").write_text(markdown(results, name), encoding="utf-8")
    everything = {**results, "answers": {name: [asdict(a) for a in got] for name, got in answers.items()}}
    (arguments.out / f"{name}.json").write_text(json.dumps(everything) + "\n", encoding="utf-8")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
