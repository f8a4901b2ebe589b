"""Everything that only a GPU can tell, in one command: ceilings, our speed and memory, peers beside it, tests.

python -m benchmarks.gpu_suite --out benchmarks/results        # a GPU with room for 2 x 15 GB of weights
python -m benchmarks.gpu_suite --device cpu --out DIR          # a tiny model on the CPU: tries the suite itself

Random bf16 weights of aiXcoder-7B's shape are made on the device. Sections run in the order of their worth
(gpu/sections.py) while the time lasts; gpu/RUN.md plans a short loan. OUT/gpu_<device>.json, .md and .png are written
anew after each. Ends with the table of targets.
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

_SHOWN = 2000
"""Characters of a failure's end on stderr; all of it is in the results."""


def run_sections(
    sections: Sequence[Section],
    worker: Worker,
    budget_seconds: float,
    results: dict[str, Any],
    write: Callable[[], None],
) -> None:
    """Run what the budget has room for, filling `results` and calling `write` after each section.

    Figures of an earlier call stay until there are new ones.
    """
    began = time.perf_counter()
    for section in sections:
        started = time.perf_counter()
        left, name = budget_seconds - (started - began), section.name
        for was in ("skipped", "failed", "warnings"):
            results[was].pop(name, None)
        if section.estimate_seconds > left:
            state, took = "skipped", 0.0
            results[state][name] = f"it takes about {section.estimate_seconds:.0f} s, and {left:.0f} s were left"
        else:
            try:
                answer = worker.run(name, min(left, section.patience * section.estimate_seconds + 30))
                state, results["sections"][name], warnings = "done", *answer
            except SectionError as error:
                state, results["failed"][name], warnings = "failed", str(error), error.warnings
            if warnings:
                results["warnings"][name] = warnings
            took = results["seconds"][name] = round(time.perf_counter() - started, 1)
        print(f"{name}: {state}, {took:.1f} s", file=sys.stderr, flush=True)
        write()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sections one after the other; returns 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--gpt_fast", type=Path, help="a checkout of meta-pytorch/gpt-fast to measure beside ours")
    parser.add_argument("--budget_seconds", type=float, default=540, help="sections beyond it are skipped")
    parser.add_argument("--sections", nargs="+", metavar="SECTION", help="these alone, in this order")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="a result (.json) that this run adds to")
    parser.add_argument("--unproven", action="store_true", help="run our kernels even where the self-check finds fault")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --device cpu tries the suite with a tiny model")
    if args.gpt_fast is not None and not (args.gpt_fast / "generate.py").is_file():
        parser.error(f"{args.gpt_fast} is not a checkout of gpt-fast: it has no generate.py")
    work = workload_for(args.device)
    planned = {section.name: section for section in plan(args.device, work, args.gpt_fast)}
    unknown = [name for name in args.sections or () if name not in planned]
    if unknown:
        parser.error(f"no section {', '.join(map(repr, unknown))}; there are {', '.join(map(repr, planned))}")
    results = _results(args.device, args.gpt_fast, args.unproven)
    if args.resume is not None:
        try:
            results = _merged(json.loads(args.resume.read_text()), results)
        except (OSError, ValueError) as error:
            parser.error(f"--resume {args.resume}: {error}")
    names = args.sections or [name for name in planned if name not in results["sections"]]
    args.out.mkdir(parents=True, exist_ok=True)
    worker = Worker(args.device, args.gpt_fast, is_checked=not args.unproven)

    def write() -> None:
        report.write(args.out, results, work)

    try:
        run_sections([planned[name] for name in names], worker, args.budget_seconds, results, write)
    finally:
        worker.close()
    report.draw(args.out, results, work)
    write()
    for name, error in results["failed"].items():
        print(f"FAILED {name}\n{error[-_SHOWN:]}", file=sys.stderr)
    sys.stderr.flush()
    print(*report.targets_table(results["sections"], work), sep="\n", flush=True)
    return 1 if results["failed"] else 0


def _results(device_type: str, gpt_fast: Path | None, is_unproven: bool) -> dict[str, Any]:
    made = _provenance(device_type, gpt_fast)
    if is_unproven:
        made["self-check"] = "not asked: figures are of our kernels, right or wrong"
    return {
        "device": torch.cuda.get_device_name(0) if device_type == "cuda" else "CPU",
        "device_type": device_type,
        "provenance": made,
        "earlier": [],
        "seconds": {},
        "sections": {},
        "skipped": {},
        "failed": {},
        "warnings": {},
    }


def _merged(earlier: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """The earlier result as one that goes on now; what was skipped is forgotten.

    Raises:
        ValueError: it is no result, or another device's.
    """
    if not isinstance(earlier, dict) or not now.keys() <= earlier.keys():
        raise ValueError("this is no result of this suite")
    if earlier["device"] != now["device"]:
        raise ValueError(f"it was measured on {earlier['device']}, this is {now['device']}")
    kept = {name: earlier[name] for name in ("seconds", "sections", "failed", "warnings")}
    return {**now, **kept, "earlier": [*earlier["earlier"], earlier["provenance"]]}


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
