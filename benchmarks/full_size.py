"""Load and run the full 7.43B aiXcoder configuration from a sharded directory; report memory, load time and speed.

python benchmarks/full_size.py --work DIR   (writes 14.9 GB of random bf16 weights into DIR once, then runs tp 1 and 2)

Memory is sampled from /proc: `anonymous` is what the process allocated, `peak_rss` also counts file pages that are
mapped while a tensor is read. Ends with one JSON line per run.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import torch

from checkpoints_convert.export import save_sharded
from megatron_infer import LLM, SamplingParams
from megatron_infer.model.weights import expected_tensors
from megatron_infer.model_config import ModelConfig

GIB = 2**30
PROMPT_TOKENS, NEW_TOKENS = 64, 8


class RandomWeights:
    """Weights of the right shapes and scale, cut from one block of noise so that making them costs little."""

    def __init__(self, config: ModelConfig) -> None:
        self.shapes = expected_tensors(config)
        self.noise = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)

    def read(self, name: str, rows: tuple[int, int] | None = None, cols: tuple[int, int] | None = None) -> torch.Tensor:
        shape = self.shapes[name]
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        count = math.prod(shape)
        repeats = -(-count // len(self.noise))
        full = self.noise.repeat(repeats)[:count].view(shape) * shape[1] ** -0.5
        full = full if rows is None else full[rows[0] : rows[1]]
        return full if cols is None else full[:, cols[0] : cols[1]]


class MemorySampler(threading.Thread):
    """Peak anonymous and peak resident bytes of processes, sampled every 20 ms, summed over them."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.processes = [psutil.Process()]
        self.anonymous = self.resident = 0
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.02):
            self.processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
            anonymous = resident = 0
            for process in self.processes:
                try:
                    fields = dict(
                        line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines()
                    )
                except OSError:
                    continue
                anonymous += int(fields.get("RssAnon", "0 kB").split()[0]) * 1024
                resident += int(fields.get("VmRSS", "0 kB").split()[0]) * 1024
            self.anonymous = max(self.anonymous, anonymous)
            self.resident = max(self.resident, resident)


def measure(model_dir: Path, size: int) -> dict[str, object]:
    """One session at tensor-parallel size `size`: load, prefill, decode."""
    sampler = MemorySampler()
    sampler.start()
    started = time.perf_counter()
    with LLM(
        model_dir, device="cpu", tensor_parallel_size=size, max_model_len=4096, kv_cache_memory_bytes=GIB // size
    ) as llm:
        loaded = time.perf_counter() - started
        prompt = [100 + i for i in range(PROMPT_TOKENS)]
        completion = llm.complete(prompt, SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True))
    sampler.done.set()
    sampler.join()
    weight_bytes = 2 * sum(math.prod(shape) for shape in expected_tensors(llm.model_config).values())
    return {
        "tensor_parallel_size": size,
        "load_seconds": round(loaded, 1),
        "weights_gib": round(weight_bytes / GIB, 2),
        "peak_anonymous_gib": round(sampler.anonymous / GIB, 2),
        "peak_rss_gib": round(sampler.resident / GIB, 2),
        "prefill_tokens_per_second": round(PROMPT_TOKENS / completion.timings.first_token_seconds, 1),
        "decode_tokens_per_second": round(completion.timings.decode_tokens_per_second, 3),
        "token_ids": list(completion.token_ids),
        "threads_per_rank": llm.config.num_threads,
        "cpu": platform.processor() or platform.machine(),
        "torch": torch.__version__,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="directory for the random checkpoint (15 GB)")
    parser.add_argument("--tokenizer", type=Path, default=Path("demo/tokenizer.model"), help="any tokenizer.model")
    parser.add_argument("--measure", type=int, metavar="TP", help="(internal) measure one size in this process")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.work / "checkpoint", args.measure)))
        return 0
    if not (args.work / "checkpoint").exists():
        args.work.mkdir(parents=True, exist_ok=True)
        config = ModelConfig.aixcoder_7b()
        save_sharded(RandomWeights(config).read, config, args.work / "checkpoint", 2, extra_files=[args.tokenizer])
    for size in (1, 2):
        command = [sys.executable, __file__, "--work", str(args.work), "--measure", str(size)]
        subprocess.run(command, check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
