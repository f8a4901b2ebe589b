"""Everything that only a GPU can tell, in one command: ceilings, our speed and memory, peers beside it, tests.

python -m benchmarks.gpu_suite --out benchmarks/results        # a GPU with room for 2 x 15 GB of weights
python -m benchmarks.gpu_suite --device cpu --out DIR          # a tiny model on the CPU: tries the suite itself

Random bf16 weights of aiXcoder-7B's shape are made on the device. Sections run in order of importance (gpu/sections.py)
while the time lasts. OUT/gpu_<device>.json, .md and .png are written anew after each. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import report
from benchmarks.gpu.sections import Section, plan
from benchmarks.gpu.worker import SectionError, Worker
from benchmarks.gpu.workload import workload_for
from benchmarks.peers.machine import provenance

_PATIENCE = 3
"""A section may take this many times its estimate, and half a minute more, before it counts as hanging."""


def run_sections(
    sections: Sequence[Section],
    worker: Worker,
    budget_seconds: float,
    results: dict[str, Any],
    write: Callable[[], None],
) -> None:
    """Run what the budget has room for, filling `results` and calling `write` after each section."""
    began = time.perf_counter()
    for section in sections:
        started = time.perf_counter()
        left = budget_seconds - (started - began)
        if section.estimate_seconds > left:
            reason = f"it takes about {section.estimate_seconds:.0f} s, and {left:.0f} s were left"
            results["skipped"][section.name] = reason
        else:
            try:
                patience = min(left, _PATIENCE * section.estimate_seconds + 30)
                results["sections"][section.name] = worker.run(section.name, patience)
            except SectionError as error:
                results["failed"][section.name] = str(error)
            results["seconds"][section.name] = round(time.perf_counter() - started, 1)
        state = next(state for state in ("skipped", "failed", "sections") if section.name in results[state])
        seconds = results["seconds"].get(section.name, 0.0)
        print(
            f"{section.name}: {'done' if state == 'sections' else state}, {seconds:.1f} s", file=sys.stderr, flush=True
        )
        write()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sections one after the other; returns 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--gpt_fast", type=Path, help="a checkout of meta-pytorch/gpt-fast to measure beside ours")
    parser.add_argument("--budget_seconds", type=float, default=540, help="sections beyond it are skipped")
    parser.add_argument("--only", nargs="+", metavar="SECTION", help="these alone, for instance what was skipped")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --device cpu tries the suite with a tiny model")
    if args.gpt_fast is not None and not (args.gpt_fast / "generate.py").is_file():
        parser.error(f"{args.gpt_fast} is not a checkout of gpt-fast: it has no generate.py")
    work = workload_for(args.device)
    sections = plan(args.device, work, args.gpt_fast)
    names = [section.name for section in sections]
    unknown = [name for name in args.only or () if name not in names]
    if unknown:
        parser.error(f"no section {', '.join(map(repr, unknown))}; there are {', '.join(map(repr, names))}")
    sections = [section for section in sections if args.only is None or section.name in args.only]
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name(0) if args.device == "cuda" else "CPU",
        "device_type": args.device,
        "provenance": _provenance(args.device, args.gpt_fast),
        "seconds": {},
        "sections": {},
        "skipped": {},
        "failed": {},
    }
    args.out.mkdir(parents=True, exist_ok=True)
    worker = Worker(args.device, args.gpt_fast)
    try:
        run_sections(sections, worker, args.budget_seconds, results, lambda: report.write(args.out, results, work))
    finally:
        worker.close()
    report.draw(args.out, results, work)
    report.write(args.out, results, work)
    print(json.dumps(results))
    for name, error in results["failed"].items():
        print(f"FAILED {name}\n{error}", file=sys.stderr)
    return 1 if results["failed"] else 0


def _provenance(device_type: str, gpt_fast: Path | None) -> dict[str, Any]:
    out = provenance("python -m benchmarks.gpu_suite", "auto", 1)
    with suppress(metadata.PackageNotFoundError):
        out["triton"] = metadata.version("triton")
    if device_type == "cuda":
        out["cuda"] = torch.version.cuda
        fields = "driver_version,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu,ecc.mode.current"
        out[fields.replace(",", ", ")] = _said("nvidia-smi", "--id=0", f"--query-gpu={fields}", "--format=csv,noheader")
    if gpt_fast is not None:
        out["gpt-fast"] = _said("git", "-C", str(gpt_fast), "rev-parse", "HEAD")
    return out


def _said(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


if __name__ == "__main__":
    sys.exit(main())
