"""Two tensor-parallel ranks against one: the same completions of the demo checkpoint, on one GPU or on the CPU.

python -m torch.distributed.run --standalone --nproc_per_node 2 -m benchmarks.gpu.two_ranks cuda:0   # one side of it
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from megatron_infer import LLM, Completion, EngineConfig, FimPrompt, SamplingParams
from megatron_infer.commands.options import DEMO_DIR

_ROOT = Path(__file__).resolve().parents[2]
_MODULE = "benchmarks.gpu.two_ranks"
_TIMEOUT_SECONDS = 240
MODES = {"deterministic": True, "default": False}
_PROMPTS = (
    FimPrompt("def area(width, height):\n    ", "\n\nprint(area(2, 3))\n", "shapes.py"),
    FimPrompt("import os\n\n\ndef read_lines(path):\n", "\n\n\nif __name__ == '__main__':\n    main()\n", "read.py"),
    FimPrompt(
        "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n", "", "stack.py"
    ),
)
_SAMPLING = SamplingParams(max_new_tokens=48, ignore_eos=True, logprobs=1)


def complete(device: str) -> dict[str, Any]:
    """Ids and log probabilities of every mode; collective over the ranks torchrun started."""
    answers = {}
    for mode, deterministic in MODES.items():
        config = EngineConfig(device=device, deterministic=deterministic, kv_cache_memory_bytes=64 << 20)
        with LLM(DEMO_DIR, config) as llm:
            completions = list(llm.complete_batch(_PROMPTS, _SAMPLING))
        answers[mode] = [
            {"ids": raw["token_ids"], "logprobs": raw["logprobs"]} for raw in map(Completion.to_json, completions)
        ]
    return answers


def compare(device: str) -> dict[str, Any]:
    """For each mode, how many greedy ids agree before the first difference, and whether log probabilities are equal.

    Raises:
        RuntimeError: a side failed or took too long; with the end of what it said.
    """
    processes = [_start(num_ranks, device) for num_ranks in (1, 2)]
    try:
        one, two = (_answers(process) for process in processes)
    finally:
        for process in processes:
            process.kill()
    return {mode: _compared(one[mode], two[mode]) for mode in MODES}


def _start(num_ranks: int, device: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        # All ranks on the first GPU.
        [*command, "-m", _MODULE, "cuda:0" if device == "cuda" else device],
        cwd=_ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def _answers(process: subprocess.Popen[str]) -> dict[str, Any]:
    try:
        out, err = process.communicate(timeout=_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun then ends its ranks
        _, err = process.communicate()
        raise RuntimeError(f"{_MODULE} took more than {_TIMEOUT_SECONDS} s: {err[-2000:]}") from None
    if process.returncode:
        raise RuntimeError(f"{_MODULE} ended with {process.returncode}: {err[-4000:]}")
    answers: dict[str, Any] = json.loads(out.splitlines()[-1])
    return answers


def _compared(one: list[dict[str, Any]], two: list[dict[str, Any]]) -> dict[str, Any]:
    agreeing = [first_difference(a["ids"], b["ids"]) for a, b in zip(one, two, strict=True)]
    return {
        "ids_agreeing": agreeing,
        "of": [len(answer["ids"]) for answer in one],
        "logprobs_equal": [a["logprobs"] for a in one] == [b["logprobs"] for b in two],
    }


def first_difference(a: list[int], b: list[int]) -> int:
    """How many leading ids are equal."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


if __name__ == "__main__":
    answers = complete(sys.argv[1])
    if os.environ["RANK"] == "0":
        print(json.dumps(answers))
