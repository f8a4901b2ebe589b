"""One model, one machine, three programs: this engine, transformers and llama.cpp on the CPU, side by side.

python benchmarks/cpu_vs_peers.py --work DIR --out DIR   (3.5 GB of random weights below --work, written once)

Each engine lives in a worker process. Every repetition asks all of them in turn for every metric, the machine's
ceilings among them, so that a busy moment hits all alike; the figures are medians. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import random
import signal
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peers import machine, report
from peers.engines import Logprobs
from peers.model_files import ModelFiles
from peers.plan import (
    ENGINES,
    INSTALL_HINT,
    MEMORY_NEW_TOKENS,
    METRICS,
    MODEL,
    QUICK_METRICS,
    Engine,
    Metric,
)
from peers.worker import Worker, WorkerError, serve

SCORED_PREFIXES = (4, 8, 16, 24, 32, 48, 64, 96)
"""Lengths of the heads of one prompt at which the engines' next-token distributions are compared."""

BITS = {engine.name: engine.layer_bits for engine in ENGINES}

WORST_DIFFERENCE = 0.3
"""Of a log probability between engines with 16-bit weights: rounding stays well below it, another network above."""


class Bench:
    """The workers, what they were asked, and what they answered."""

    def __init__(self, workers: list[Worker], ceilings: machine.Ceilings, seed: int) -> None:
        self.workers, self._ceilings = workers, ceilings
        self._random = random.Random(seed)
        self.engines: dict[str, dict[str, Any]] = {
            worker.engine.name: {"settings": {}, "samples": {}, "idle_cpu_seconds": 0.0, "idle_seconds": 0.0}
            for worker in workers
        }
        self.ceilings: list[dict[str, float]] = []
        self.reference = ""
        self.disturbance = {"cpu_seconds": 0.0, "seconds": 0.0}

    def _prompts(self, count: int, length: int) -> list[list[int]]:
        """Fresh random ids: no prefix cache can know them. The lowest ids are special tokens of the vocabulary."""
        return [[self._random.randrange(100, MODEL.vocab_size) for _ in range(length)] for _ in range(count)]

    def _ask(self, worker: Worker, operation: str, **arguments: Any) -> dict[str, Any] | None:
        """Ask one worker, watching that the others rest; a worker that fails is left out from then on."""
        workers = list(self.workers)
        used_before, busy_before = [each.cpu_seconds() for each in workers], machine.busy_seconds()
        try:
            answer = worker.ask(operation, **arguments)
        except WorkerError as error:
            tell(str(error))
            self.workers.remove(worker)
            self.engines.pop(worker.engine.name)
            worker.close()
            return None
        if seconds := answer.get("seconds"):
            used = [each.cpu_seconds() - before for each, before in zip(workers, used_before, strict=True)]
            self.disturbance["cpu_seconds"] += machine.busy_seconds() - busy_before - sum(used)
            self.disturbance["seconds"] += seconds
            for other, cpu_seconds in zip(workers, used, strict=True):
                if other is not worker:
                    self.engines[other.engine.name]["idle_cpu_seconds"] += cpu_seconds
                    self.engines[other.engine.name]["idle_seconds"] += seconds
        return answer

    def load(self, longest_prompt: int) -> None:
        """Load every engine, then let each compute one prompt of that length and look at its memory."""
        for worker in list(self.workers):
            tell(f"loading {worker.engine.label}")
            (prompt,) = self._prompts(1, 32)
            loaded = self._ask(worker, "load", prompt=prompt)
            if loaded is None:
                continue
            self.engines[worker.engine.name] |= loaded
            (prompt,) = self._prompts(1, longest_prompt)
            used = self._ask(worker, "memory", prompt=prompt, new_tokens=MEMORY_NEW_TOKENS)
            if used is not None:
                self.engines[worker.engine.name]["memory"] = used

    def compare_answers(self) -> None:
        """Next-token distributions of every engine on heads of one prompt."""
        (prompt,) = self._prompts(1, max(SCORED_PREFIXES))
        tops: dict[str, list[Logprobs]] = {}
        for worker in list(self.workers):
            answer = self._ask(worker, "score", prompts=[prompt[:length] for length in SCORED_PREFIXES])
            if answer is not None:
                tops[worker.engine.name] = [{int(i): value for i, value in top} for top in answer["top"]]
        if not tops:
            return
        reference = "transformers-fp32" if "transformers-fp32" in tops else next(iter(tops))
        self.reference = reference
        for name, top in tops.items():
            self.engines[name]["agreement"] = found = agreement(top, tops[reference])
            if found["largest_difference"] > WORST_DIFFERENCE and min(BITS[name], BITS[reference]) >= 16:
                tell(f"WARNING: {name} and {reference} seem to run different networks: {found}")

    def tune(self, metrics: Sequence[Metric]) -> None:
        """Warm every engine up for every metric; engines with settings choose them here."""
        for metric in metrics:
            for worker in list(self.workers):
                tell(f"warming up: {metric.title}, {worker.engine.label}")
                prompts = self._prompts(metric.batch, metric.prompt_tokens)
                answer = self._ask(worker, "tune", prompts=prompts, new_tokens=metric.new_tokens[-1])
                if answer is not None and answer["setting"]:
                    self.engines[worker.engine.name]["settings"][metric.name] = answer["setting"]

    def repeat(self, metrics: Sequence[Metric], repetition: int) -> None:
        """One repetition: every metric on every engine in turn, each time beginning with another one."""
        for metric in metrics:
            self.ceilings.append(self._ceilings.measure())
            first = repetition % max(1, len(self.workers))
            for worker in self.workers[first:] + self.workers[:first]:
                seconds = []
                for new_tokens in metric.new_tokens:
                    prompts = self._prompts(metric.batch, metric.prompt_tokens)
                    answer = self._ask(worker, "time", prompts=prompts, new_tokens=new_tokens)
                    if answer is None:
                        break
                    seconds.append(answer["seconds"])
                else:
                    rate = metric.rate(seconds)
                    told = "disturbed, left out" if rate is None else f"{rate:.1f} tok/s"
                    tell(f"repetition {repetition + 1}: {metric.title}, {worker.engine.label}: {told}")
                    if rate is not None:
                        self.engines[worker.engine.name]["samples"].setdefault(metric.name, []).append(rate)

    def results(self) -> dict[str, Any]:
        """Everything measured; medians beside their samples."""
        for record in self.engines.values():
            record["medians"] = {name: statistics.median(values) for name, values in record["samples"].items()}
        ceilings = {
            "read_gb_per_second": statistics.median(c["read_gb_per_second_median"] for c in self.ceilings),
            "read_gb_per_second_max": max(c["read_gb_per_second_max"] for c in self.ceilings),
            "fma_gflop_per_second": statistics.median(c["fma_gflop_per_second_median"] for c in self.ceilings),
            "fma_gflop_per_second_max": max(c["fma_gflop_per_second_max"] for c in self.ceilings),
            "samples": self.ceilings,
        }
        return {
            "engines": self.engines,
            "ceilings": ceilings,
            "reference": self.reference,
            "disturbance": self.disturbance,
        }


def agreement(top: Sequence[Logprobs], reference: Sequence[Logprobs]) -> dict[str, float]:
    """How well two engines agree on next tokens: positions with the same likeliest token, tokens common to both lists
    on average, and the largest difference of their log probabilities."""
    pairs = list(zip(top, reference, strict=True))
    common = [a.keys() & b.keys() for a, b in pairs]
    differences = [abs(a[token] - b[token]) for (a, b), tokens in zip(pairs, common, strict=True) for token in tokens]
    return {
        "same_top": sum(max(a, key=a.__getitem__) == max(b, key=b.__getitem__) for a, b in pairs),
        "common": statistics.mean(map(len, common)),
        "largest_difference": max(differences, default=math.inf),
    }


def tell(message: str) -> None:
    """Progress, beside the results."""
    print(message, file=sys.stderr, flush=True)


def installed(engines: Sequence[Engine]) -> list[Engine]:
    """Those engines whose packages are there; says which are not and what to do."""
    usable = []
    for engine in engines:
        missing = [package for package in engine.needs if importlib.util.find_spec(package) is None]
        if missing:
            tell(f"skipping {engine.label}: {', '.join(missing)} is not installed; {INSTALL_HINT}")
        else:
            usable.append(engine)
    return usable


def start(engines: Sequence[Engine], args: argparse.Namespace, workers: list[Worker]) -> None:
    """Start a worker per engine, appending to `workers` so that the caller can close them whatever happens."""
    logs = args.work / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    # OMP_WAIT_POLICY stays as the caller has it: without it libgomp's threads spin for milliseconds and then sleep, so
    # idle workers cost nothing, and "passive" makes llama.cpp and torch sleep at every barrier, which is faster only
    # where other programs take the cores. The report tells both.
    environment = {"OMP_NUM_THREADS": str(args.threads), **machine.isa_environment(args.isa)}
    for engine in engines:
        command = [sys.executable, __file__, "--worker", engine.name, "--work", str(args.work)]
        command += ["--threads", str(args.threads), "--isa", args.isa]
        workers.append(Worker(engine, command, environment, logs / f"{engine.name}.log"))


def chosen(names: str | None, all_of: Sequence[Any], what: str) -> list[Any]:
    """Those of `all_of` that a comma-separated option names, all without one (ValueError for an unknown name)."""
    if names is None:
        return list(all_of)
    wanted = [name.strip() for name in names.split(",")]
    known = {item.name: item for item in all_of}
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(f"unknown {what} {', '.join(unknown)}; known: {', '.join(known)}")
    return [item for item in all_of if item.name in wanted]


def run(args: argparse.Namespace, engines: Sequence[Engine], metrics: Sequence[Metric]) -> dict[str, Any]:
    """Measure; the workers are gone when this returns or raises."""
    isa = machine.best_isa() if args.isa == "auto" else args.isa
    provenance = machine.provenance(told_command(), isa, args.threads)
    if os.getloadavg()[0] > machine.BUSY_LOAD:
        tell(f"WARNING: this machine is busy (load average {machine.load_average()}); do not keep these figures")
    files = ModelFiles(args.work, MODEL)
    tell("writing the model's files, where they are missing")
    files.write({(engine.project, engine.storage) for engine in engines}, args.tokenizer)
    workers: list[Worker] = []
    with tempfile.TemporaryDirectory() as directory:
        try:
            ceilings = machine.Ceilings(Path(directory), isa, args.threads)
            start(engines, args, workers)
            bench = Bench(workers, ceilings, seed=0)
            bench.load(max(metric.prompt_tokens for metric in (QUICK_METRICS if args.quick else METRICS)))
            bench.compare_answers()
            bench.tune(metrics)
            for repetition in range(args.repetitions):
                bench.repeat(metrics, repetition)
        finally:
            for worker in workers:  # all first, so that they end at the same time
                worker.hang_up()
            for worker in workers:
                worker.close()
    if not bench.workers:
        raise ValueError(f"no engine is left to report on; their logs are in {args.work / 'logs'}")
    return {
        "provenance": {**provenance, "load average after": machine.load_average()},
        "repetitions": args.repetitions,
        "metrics": [metric.name for metric in metrics],
        "scored_prefixes": SCORED_PREFIXES,
        **bench.results(),
    }


def told_command() -> str:
    """The command line without the paths of the machine it ran on."""
    out = ["python", "benchmarks/cpu_vs_peers.py"]
    arguments = iter(sys.argv[1:])
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if name in ("--work", "--out", "--tokenizer"):
            out += [name, "FILE" if name == "--tokenizer" else "DIR"]
            if not equals:
                next(arguments, None)
        else:
            out.append(argument)
    return " ".join(out)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="directory for the model's files and the logs")
    parser.add_argument("--out", type=Path, help="directory for cpu_vs_peers.md, .png and .json")
    parser.add_argument("--repetitions", type=int, help="of every metric (default: 5; with --quick 1)")
    parser.add_argument(
        "--quick", action="store_true", help="a smoke run: short prompts, few tokens, no figure to keep"
    )
    parser.add_argument("--engines", help=f"comma-separated, of: {', '.join(e.name for e in ENGINES)}")
    parser.add_argument("--metrics", help=f"comma-separated, of: {', '.join(m.name for m in METRICS)}")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of every engine (default: 2)")
    parser.add_argument(
        "--isa", choices=("auto", "avx512", "avx2", "neon", "generic"), default="auto",
        help="instruction set of this engine, of torch and of the ceilings; llama.cpp has the one it was built for "
        "(LLAMA_CPP_LIB_PATH chooses another build)",
    )  # fmt: skip
    parser.add_argument("--tokenizer", type=Path, default=Path("demo/tokenizer.model"), help="any tokenizer.model")
    parser.add_argument("--worker", metavar="NAME", help="(internal) be the worker of one engine")
    args = parser.parse_args(argv)
    args.work = args.work.resolve()
    args.repetitions = args.repetitions or (1 if args.quick else 5)
    return args


def main() -> int:
    args = parse()
    if args.worker:
        (engine,) = chosen(args.worker, ENGINES, "engine")
        serve(engine, ModelFiles(args.work, MODEL), args.threads, args.isa)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does: in order
    try:
        engines = installed(chosen(args.engines, ENGINES, "engine"))
        metrics = chosen(args.metrics, QUICK_METRICS if args.quick else METRICS, "metric")
        results = run(args, engines, metrics)
    except ValueError as error:
        tell(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        tell("interrupted; the workers are stopped")
        return 130
    print(report.markdown(results, metrics))
    if args.out:
        report.write(args.out, results, metrics)
    print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
