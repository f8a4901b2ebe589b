"""A run of `eval run` that is killed again and again, with another number of ranks each time, until it is finished.

python -m tests.eval.killed_runs --kills 50      # by hand: where it strikes is left to chance; test_run.py chooses
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from tests.session.test_torchrun import ROOT, torchrun

PYTHON = [sys.executable, "-m", "megatron_infer"]
QUICK = ["--device", "cpu", "--num_threads", "1", "--max_num_seqs", "4", "--kv_cache_memory_bytes", str(16 << 20)]


def shapes(*program: str) -> list[list[str]]:
    """Ways to start it: one process; one replica of two ranks; two replicas; two replicas of two ranks."""
    return [
        [sys.executable, *program],
        torchrun(2, *program),
        [*torchrun(2, *program), "--tensor_parallel_size=1"],
        [*torchrun(4, *program), "--tensor_parallel_size=2"],
    ]


def command_of(shape: list[str], *arguments: str) -> list[str]:
    """`eval run` on ranks of that shape."""
    options = [part for part in shape if part.startswith("--tensor_parallel_size")]
    return [*(part for part in shape if part not in options), "eval", "run", *arguments, *options, *QUICK]


def write_cases(path: Path, count: int) -> Path:
    """A benchmark of so many small holes; several share a file."""
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            prefix = f"def area_{i // 4}(w, h):\n    left = [v for v in values[{i}:]]\n    return "
            row = {
                "task_id": f"case/{i}",
                "path": f"src/{i // 4}.py",
                "prefix": prefix,
                "suffix": "\n",
                "reference": "w",
            }
            file.write(json.dumps(row) + "\n")
    return path


def kill_until_finished(arguments: list[str], out: Path, kills: int, seed: int = 0) -> int:
    """Kill a rank or the launcher of so many attempts, then let one finish; returns how many were killed."""
    rng = random.Random(seed)
    killed = 0
    while True:
        command = command_of(rng.choice(shapes("-m", "megatron_infer")), *arguments, "--out", str(out))
        with tempfile.TemporaryFile() as log:
            process = psutil.Popen(command, cwd=ROOT, stdout=log, stderr=log)
            was_killed = killed < kills and _kill_after_progress(process, out, rng)
            status = process.wait(timeout=120)
            killed += was_killed
            if not was_killed:
                log.seek(0)
                assert status == 0, log.read().decode()
                return killed


def _kill_after_progress(process: psutil.Popen, out: Path, rng: random.Random) -> bool:
    """SIGKILL one of an attempt's processes once it has written some lines; False where it ended before."""
    wanted = _num_lines(out) + rng.randrange(1, 9)
    while _num_lines(out) < wanted:
        if process.poll() is not None or (out / "_SUCCESS").exists():
            return False
        time.sleep(0.01)
    family = [process, *process.children(recursive=True)]
    try:
        rng.choice(family).send_signal(signal.SIGKILL)
    except psutil.NoSuchProcess:
        return False
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive, f"outlived a killed rank or launcher: {alive}"
    return True


def _num_lines(out: Path) -> int:
    return sum(part.read_bytes().count(b"\n") for part in (out / "parts").glob("*.jsonl"))


def main() -> None:
    """Kill as often as asked with the bundled demo, then compare with an undisturbed run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        data = write_cases(Path(folder) / "cases.jsonl", 12 * args.kills)
        arguments = ["--task", "fim", "--data", str(data), "--max_new_tokens", "8", "--max_model_len", "512"]
        calm, troubled = Path(folder) / "calm", Path(folder) / "troubled"
        subprocess.run(command_of(PYTHON, *arguments, "--out", str(calm)), cwd=ROOT, check=True)
        killed = kill_until_finished(arguments, troubled, args.kills)
        same = all(
            (calm / n).read_bytes() == (troubled / n).read_bytes() for n in ("completions.jsonl", "predictions.jsonl")
        )
        attempts = json.loads((troubled / "manifest.json").read_text())["attempts"]
        print(f"{killed} attempts killed of {len(attempts)}; files equal to the undisturbed run's: {same}")
        sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
