"""A run of `eval run` that is killed again and again, with another number of ranks each time, until it is finished.

python -m tests.eval.killed_runs --kills 50 --seed 0     # by hand: chance says where it strikes; test_run.py chooses
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
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.session.test_torchrun import ROOT, torchrun

PYTHON = [sys.executable, "-m", "megatron_infer"]
_MARK = "KILLED_RUNS_ATTEMPT"
_LIMIT_SECONDS = 10.0
"""So long after a kill none of an attempt's processes may be left."""
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


def worlds(*program: str) -> dict[str, list[str]]:
    """All shapes, three replicas, and one replica whose second rank is a follower of its own."""
    alone, split, replicas, both = shapes(*program)
    return {
        "1 process": alone,
        "1 process and a follower, tp 2": [*alone, "--tensor_parallel_size=2"],
        "torchrun, 2 ranks, tp 2": split,
        "torchrun, 2 ranks, tp 1": replicas,
        "torchrun, 3 ranks, tp 1": [*torchrun(3, *program), "--tensor_parallel_size=1"],
        "torchrun, 4 ranks, tp 2": both,
    }


@dataclass(frozen=True)
class Death:
    """How an attempt was ended. `seconds`: until the last of its processes was gone."""

    victim: str
    is_start_up: bool
    seconds: float
    num_processes: int


def kill_until_finished(arguments: list[str], out: Path, kills: int, seed: int = 0) -> list[Death]:
    """Kill so many attempts, then let one finish; raises AssertionError where that one fails."""
    rng = random.Random(seed)
    deaths: list[Death] = []
    while True:
        name, shape = rng.choice(list(worlds("-m", "megatron_infer").items()))
        command = command_of(shape, *arguments, "--out", str(out))
        mark = f"{os.getpid()}.{time.monotonic_ns()}"
        with tempfile.TemporaryFile() as log:
            process = psutil.Popen(command, cwd=ROOT, stdout=log, stderr=log, env={**os.environ, _MARK: mark})
            death = _kill(process, mark, out, rng) if len(deaths) < kills else None
            status = process.wait(timeout=300)
            if death is not None:
                deaths.append(death)
                print(f"{len(deaths)}: {name}: {death}", flush=True)
            else:
                log.seek(0)
                assert len(deaths) == kills, f"finished before it was killed {kills} times; give it more cases"
                assert status == 0, log.read().decode()
                return deaths


def _kill(process: psutil.Popen, mark: str, out: Path, rng: random.Random) -> Death | None:
    """End an attempt at a moment left to chance; None where it ended by itself before."""
    victim = rng.choice(("a rank", "the launcher", "the launcher, by SIGTERM", "all at once"))
    is_start_up = rng.random() < 0.4
    wanted = 0 if is_start_up else _num_lines(out) + rng.randrange(1, 9)
    while _num_lines(out) < wanted:
        if process.poll() is not None:
            return None
        time.sleep(0.01)
    time.sleep(rng.uniform(0, 8) if is_start_up else rng.uniform(0, 0.3))
    family = _marked(mark)
    ranks = [one for one in family if one != process] or [process]
    doomed = {"a rank": [rng.choice(ranks)], "all at once": family}.get(victim, [process])
    if process.poll() is not None:
        return None
    for one in doomed:
        with suppress(psutil.NoSuchProcess):
            one.send_signal(signal.SIGTERM if "SIGTERM" in victim else signal.SIGKILL)
    began = time.monotonic()
    while left := _marked(mark):  # also those that were born meanwhile
        assert time.monotonic() - began < 120, f"outlived {victim} by two minutes: {left}"
        process.poll()
        time.sleep(0.05)
    return Death(victim, is_start_up, time.monotonic() - began, len(family))


def _marked(mark: str) -> list[psutil.Process]:
    """The living processes of an attempt: what it starts inherits its environment."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(_MARK) == mark:
                found.append(process)
    return found


def _num_lines(out: Path) -> int:
    return sum(part.read_bytes().count(b"\n") for part in (out / "parts").glob("*.jsonl"))


def main() -> int:
    """Kill as often as asked with the bundled demo, then compare with an undisturbed run."""
    parser = argparse.ArgumentParser(prog="python -m tests.eval.killed_runs", description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        data = write_cases(Path(folder) / "cases.jsonl", 12 * args.kills)
        arguments = ["--task", "fim", "--data", str(data), "--max_new_tokens", "8", "--max_model_len", "512"]
        calm, troubled = Path(folder) / "calm", Path(folder) / "troubled"
        subprocess.run(command_of(PYTHON, *arguments, "--out", str(calm)), cwd=ROOT, check=True)
        deaths = kill_until_finished(arguments, troubled, args.kills, args.seed)
        names = ("completions.jsonl", "predictions.jsonl")
        same = all((calm / name).read_bytes() == (troubled / name).read_bytes() for name in names)
        num_survived = sum(death.seconds > _LIMIT_SECONDS for death in deaths)
        victims = Counter(death.victim for death in deaths)
        print(
            f"{len(deaths)} attempts killed ({', '.join(f'{victim} {n}' for victim, n in sorted(victims.items()))}; "
            f"{sum(death.is_start_up for death in deaths)} while starting), seed {args.seed}; all gone after at most "
            f"{max(death.seconds for death in deaths):.1f} s, {num_survived} after more than {_LIMIT_SECONDS:g} s; "
            f"files equal to the undisturbed run's: {same}"
        )
        return 0 if same and not num_survived else 1


if __name__ == "__main__":
    sys.exit(main())
