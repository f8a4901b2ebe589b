"""What `eval run` costs beside the engine alone, and what a second replica brings: interleaved runs of one benchmark.

python benchmarks/eval_throughput.py --data CASES.jsonl [--model_dir DIR] [--repetitions 5]

Every side computes the same prompts with one thread per replica: `LLM.complete_batch` in this process (offline), `eval
run` in one process, and `eval run` under torchrun with two replicas. Model loading is left out of all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from megatron_infer import LLM
from megatron_infer.commands.options import DEMO_DIR
from megatron_infer.eval.cases import read_cases
from megatron_infer.eval.run.replica import in_prefix_order
from megatron_infer.eval.tasks.registry import task

ENGINE = {"num_threads": 1, "max_model_len": 1024, "kv_cache_memory_bytes": 256 << 20, "device": "cpu"}
NEW_TOKENS = 32


def offline(data: Path, model_dir: Path) -> tuple[float, int]:
    """Seconds and new tokens of the engine alone, with the prompts in the order that the command takes them in."""
    sampling = task("fim").sampling
    with LLM(model_dir, **ENGINE) as llm:
        work = in_prefix_order([(case, 0) for case in read_cases(data, task("fim"))], llm.fim.orders[0])
        began = time.perf_counter()
        budget = llm.max_model_len - NEW_TOKENS
        prompts = [
            llm.fim.encode(case.prompt, options=task("fim").options, budget_tokens=budget).ids for case, _ in work
        ]
        done = list(llm.complete_batch(prompts, replace(sampling, max_new_tokens=NEW_TOKENS), ordered=False))
        return time.perf_counter() - began, sum(c.timings.num_new_tokens for c in done)


def command(data: Path, model_dir: Path, replicas: int, out: Path) -> tuple[float, int]:
    """Seconds and new tokens of `eval run`."""
    launcher = [sys.executable]
    if replicas > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(replicas)]
    options = [part for name, value in ENGINE.items() for part in (f"--{name}", str(value))]
    subprocess.run(
        [
            *launcher, "-m", "megatron_infer", "eval", "run", "--task", "fim", "--data", str(data), "--out", str(out),
            "--model_dir", str(model_dir), "--max_new_tokens", str(NEW_TOKENS), "--tensor_parallel_size", "1", *options,
        ],
        check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    tokens = sum(json.loads(line)["num_new_tokens"] for line in (out / "timings.jsonl").read_text().splitlines())
    return json.loads((out / "_SUCCESS").read_text())["seconds"], tokens


def main() -> None:
    """Measure the sides in turn, as often as asked; medians to stdout, then one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="cases of the task fim")
    parser.add_argument("--model_dir", type=Path, default=DEMO_DIR)
    parser.add_argument("--repetitions", type=int, default=5)
    args = parser.parse_args()
    sides: dict[str, Callable[[Path], tuple[float, int]]] = {
        "offline": lambda out: offline(args.data, args.model_dir),
        "eval run, 1 replica": lambda out: command(args.data, args.model_dir, 1, out),
        "eval run, 2 replicas": lambda out: command(args.data, args.model_dir, 2, out),
    }
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.repetitions):
        for name, measure in sides.items():
            with tempfile.TemporaryDirectory() as folder:
                seconds, tokens = measure(Path(folder) / "out")
            rates[name].append(tokens / seconds)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, median in medians.items():
        print(f"{name:<22} {median:8.0f} tokens/s   of {', '.join(f'{rate:.0f}' for rate in rates[name])}")
    one, two = medians["eval run, 1 replica"], medians["eval run, 2 replicas"]
    print(f"1 replica reaches {one / medians['offline']:.1%} of offline; 2 replicas {two / one:.2f}x of 1")
    print(json.dumps({"tokens_per_second": rates, "medians": medians}))


if __name__ == "__main__":
    main()
