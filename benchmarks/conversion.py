"""Convert and quantise the full 7.43B aiXcoder configuration: peak memory, and throughput beside the disk's own.

python benchmarks/conversion.py --work DIR --out DIR   (30 GB free in --work; what is written there is deleted again)

The measure is `cp` of the same source and fsync of what it wrote. The source's pages are dropped from the page cache
before every run. Bytes per second are of the source read. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from peers import machine

from checkpoints_convert.export import save_sharded
from megatron_infer.model.weights import expected_tensors
from megatron_infer.model_config import ModelConfig

ROOT = Path(__file__).resolve().parent.parent
RUNS: dict[str, list[str]] = {
    "sharded tp 1 -> tp 2": ["reshard", "--tp", "2"],
    "bf16 -> int8": ["quantize", "--format", "int8"],
    "bf16 -> int4": ["quantize", "--format", "int4"],
}
TOLD = ("command", "date", "commit", "cpu", "cores", "memory", "kernel", "python", "torch", "load average before")


class Noise:
    """Random bf16 weights of the right shapes: windows of one block of noise, so that making them costs little."""

    def __init__(self, config: ModelConfig) -> None:
        self.shapes = expected_tensors(config)
        self.noise = (0.02 * torch.randn(1 << 26, generator=torch.Generator().manual_seed(0))).to(torch.bfloat16)

    def read(self, name: str, rows: tuple[int, int] | None = None, cols: tuple[int, int] | None = None) -> torch.Tensor:
        out_dim, *in_dim = self.shapes[name]
        start, stop = rows or (0, out_dim)
        width = math.prod(in_dim)
        assert cols in (None, (0, width)), "one shard has whole rows"
        if not in_dim:
            return torch.ones(stop - start, dtype=torch.bfloat16)
        first = start * width * 7 % (len(self.noise) - (stop - start) * width)
        return self.noise[first : first + (stop - start) * width].view(stop - start, width)


def drop_pages(directory: Path) -> None:
    """Write back what is not yet on disk, and let go of the directory's pages in the page cache."""
    for path in directory.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def copy(source: Path, target: Path) -> float:
    """Seconds to copy the files and flush them to disk."""
    target.mkdir()
    drop_pages(source)
    started = time.perf_counter()
    subprocess.run(["cp", "--reflink=never", *map(str, sorted(source.iterdir())), str(target)], check=True)
    for path in target.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return time.perf_counter() - started


def convert(arguments: Sequence[str], source: Path, target: Path) -> tuple[float, int]:
    """Seconds and peak resident bytes of a conversion in a process of its own, start of the interpreter included."""
    drop_pages(source)
    command, *options = arguments
    argv = [sys.executable, "-m", "checkpoints_convert", command, str(source), str(target), *options, "--quiet"]
    started = time.perf_counter()
    process = subprocess.Popen(argv, cwd=ROOT)
    peak = 0
    while process.poll() is None:
        # The kernel's own high-water mark; rusage would carry over this process's from before the exec.
        peak = max(peak, high_water_bytes(process.pid))
        time.sleep(0.02)
    seconds = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"{command} failed")
    return seconds, peak


def high_water_bytes(pid: int) -> int:
    """VmHWM of a process; 0 once it has ended."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def size_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir())


def measure(source: Path, work: Path, repeats: int) -> list[dict[str, object]]:
    """Every run beside a copy made right before it, as a shared disk's speed drifts."""
    rows = []
    for name, arguments in RUNS.items():
        ratios, speeds, copies, peaks = [], [], [], []
        out_bytes = 0
        for _ in range(repeats):
            copy_seconds = copy(source, work / "copy")
            shutil.rmtree(work / "copy")
            seconds, peak = convert(arguments, source, work / "out")
            out_bytes = size_of(work / "out")
            shutil.rmtree(work / "out")
            copies.append(size_of(source) / copy_seconds / 1e6)
            speeds.append(size_of(source) / seconds / 1e6)
            ratios.append(copy_seconds / seconds)
            peaks.append(peak)
            print(f"{name}: {speeds[-1]:.0f} MB/s, copy {copies[-1]:.0f} MB/s, {peak >> 20} MiB", file=sys.stderr)
        rows.append(
            {
                "run": name,
                "written_bytes": out_bytes,
                "megabytes_per_second": round(statistics.median(speeds)),
                "copy_megabytes_per_second": round(statistics.median(copies)),
                "share_of_copy": round(statistics.median(ratios), 2),
                "lowest_share_of_copy": round(min(ratios), 2),
                "peak_rss_bytes": max(peaks),
            }
        )
    return rows


def report(rows: list[dict[str, object]], source_bytes: int, repeats: int, about: dict[str, object]) -> str:
    """The result page."""
    lines = [
        "# Converting and quantising 7.43 billion parameters",
        "",
        f"aiXcoder-7B's shape with random bf16 weights, a sharded directory of one file ({source_bytes:,} bytes).",
        f"Medians of {repeats} run(s), each right behind a `cp` and fsync of the same files; page cache of the source",
        "dropped before both. MB/s are source bytes over the whole process's time, its start and final fsync included.",
        "",
        "| | written, bytes | MB/s | `cp` + fsync, MB/s | share (lowest) | peak RSS, MiB |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        lines.append(
            f"| {row['run']} | {row['written_bytes']:,} | {row['megabytes_per_second']} | "
            f"{row['copy_megabytes_per_second']} | {row['share_of_copy']:.0%} ({row['lowest_share_of_copy']:.0%}) | "
            f"{int(str(row['peak_rss_bytes'])) >> 20} |"
        )
    lines += ["", "Peak RSS counts file pages that are mapped while they are read.", ""]
    lines += [f"- {name}: {about[name]}" for name in TOLD]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="directory on the disk to measure (30 GB)")
    parser.add_argument("--out", type=Path, required=True, help="directory for conversion.md")
    parser.add_argument("--repeats", type=int, default=1, help="of every run (default %(default)s)")
    args = parser.parse_args()
    command = f"python benchmarks/conversion.py --work DIR --out DIR --repeats {args.repeats}"
    about = machine.provenance(command, "", len(os.sched_getaffinity(0)))
    args.work.mkdir(parents=True)
    try:
        config = ModelConfig.aixcoder_7b()
        save_sharded(Noise(config).read, config, args.work / "source", 1)
        rows = measure(args.work / "source", args.work, args.repeats)
        source_bytes = size_of(args.work / "source")
    finally:
        shutil.rmtree(args.work)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "conversion.md").write_text(report(rows, source_bytes, args.repeats, about), encoding="utf-8")
    print(json.dumps({"runs": rows, "source_bytes": source_bytes, **{name: about[name] for name in TOLD}}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
