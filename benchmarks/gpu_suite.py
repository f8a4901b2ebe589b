"""Everything that only a GPU can tell, in one command: tests, ceilings, our speed and memory, transformers beside it.

python -m benchmarks.gpu_suite --out benchmarks/results        # a GPU with room for 2 x 15 GB of weights; minutes
python -m benchmarks.gpu_suite --device cpu --out DIR          # a tiny model on the CPU: tries the suite itself

Random bf16 weights of aiXcoder-7B's shape are made on the device. A section that fails is reported as failed; the
others go on. Writes OUT/gpu_<device>.json and .md, and ends with one JSON line.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import ceilings, engine
from benchmarks.gpu.report import markdown
from benchmarks.gpu.workload import FULL, SMALL, Workload
from benchmarks.peers.machine import provenance

KINDS = {"cuda": ("triton", "vendor"), "cpu": ("native", "vendor")}
"""Implementations of the ops to measure."""
FORMATS = ("none", "int8", "int4")


def run_tests() -> dict[str, Any]:
    """The tests that need a GPU."""
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "tests/test_gpu.py"]
    done = subprocess.run(command, capture_output=True, text=True)
    output = (done.stdout + done.stderr).strip()
    return {"status": done.returncode, "summary": output.splitlines()[-1], "output": output[-4000:]}


def against_peer(weights: engine.SharedWeights, work: Workload, device: torch.device) -> dict[str, Any]:
    """transformers' speed, and how many greedy ids agree before the first difference."""
    # Here and not at the top: without transformers the other sections still run.
    from benchmarks.gpu import peers

    model = peers.load(weights, device)
    figures = peers.measure(model, work, device)
    prompt = [(7 * i) % work.model.vocab_size for i in range(work.peer_context)]
    theirs = peers.greedy(model, prompt, work.new_tokens, device)
    agreeing = {}
    for ops in KINDS[device.type]:
        with engine.running(weights, work, device, "none", ops) as run:
            ours = run.greedy(prompt, work.new_tokens)
        agreeing[ops] = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), len(ours))
    return {"sides": figures, "greedy_ids_agreeing": agreeing, "of": work.new_tokens}


def device_name(device: torch.device) -> str:
    """For file names and headings."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def main() -> int:
    """Run the sections one after the other; returns 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --device cpu tries the suite with a tiny model")
    device = torch.device(args.device, 0) if args.device == "cuda" else torch.device("cpu")
    work = FULL if args.device == "cuda" else SMALL
    weights = engine.SharedWeights.random(work.model, device)
    sections: dict[str, Callable[[], Any]] = {
        "tests": run_tests,
        "ceilings": lambda: ceilings.measure(device, work.ceiling_bytes, work.matmul),
        **{
            f"engine {ops} {name}": partial(engine.measure, weights, work, device, name, ops)
            for ops, name in itertools.product(KINDS[device.type], FORMATS)
        },
        "transformers": lambda: against_peer(weights, work, device),
    }
    results: dict[str, Any] = {"provenance": _provenance(device), "sections": {}, "failed": {}}
    for name, section in sections.items():
        began = time.perf_counter()
        try:
            results["sections"][name] = section()
        except Exception:
            results["failed"][name] = traceback.format_exc()
        print(f"{name}: {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    stem = "gpu_" + re.sub(r"\W+", "_", device_name(device).lower())
    (args.out / f"{stem}.json").write_text(json.dumps(results, indent=1) + "\n")
    (args.out / f"{stem}.md").write_text(markdown(device_name(device), results))
    print(json.dumps(results["sections"]))
    for name, error in results["failed"].items():
        print(f"FAILED {name}\n{error}", file=sys.stderr)
    return 1 if results["failed"] else 0


def _provenance(device: torch.device) -> dict[str, Any]:
    out = provenance("python -m benchmarks.gpu_suite", "auto", 1)
    if device.type == "cuda":
        driver = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,power.limit", "--format=csv,noheader"]
        out["driver, SM clock, power limit"] = subprocess.run(driver, capture_output=True, text=True).stdout.strip()
        out["cuda"] = torch.version.cuda
    return out


if __name__ == "__main__":
    sys.exit(main())
