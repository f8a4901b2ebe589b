"""Checks on a real checkpoint: python -m tests.real_models CHECKPOINT [--gguf FILE] [--only NAME ...].

Each check prints one line: its name, figures, and "ok" or "FAILED". Exit status: 0 if all are ok. Needs transformers
and, for GGUF files, the package gguf; memory for two copies of the model in fp32.
"""

from __future__ import annotations

import argparse
import math
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from checkpoints_convert.convert import Options, megatron2hf
from checkpoints_convert.network import CPU, one_sequence, one_sequence_cache
from checkpoints_convert.texts import WINDOW_TOKENS, read_texts, windows
from megatron_infer.cache.kv_cache import KVCache
from megatron_infer.dispatch.select import select_ops
from megatron_infer.hub import local_path
from megatron_infer.model.checkpoint import Checkpoint, open_checkpoint
from megatron_infer.model.formats import weight_formats
from megatron_infer.model.transformer import Transformer
from megatron_infer.model.weights import hf_name
from megatron_infer.sampling_params import SamplingParams
from megatron_infer.tensor_parallel.group import TPGroup
from megatron_infer.text.tokenizer import load_tokenizer
from tests.support.tiny_models import generate_on_ranks

PROMPTS = (
    "def quick_sort(values):\n",
    "import os\n\n\ndef list_files(folder, suffix):\n    ",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    "# Read a CSV file and print the sum of its second column\nimport csv\n\n",
    "function fibonacci(n) {\n  ",
)
LOGIT_TOLERANCE = 1e-4
LONG_LOGIT_TOLERANCE = 1e-3
"""Of contexts of thousands of tokens, whose fp32 sums transformers takes in another order."""
PERPLEXITY_LIMITS = {"int8": 1.02, "int4": 1.5}
"""Times the perplexity before rounding; beyond it something is broken."""
_CHUNK = 512


@dataclass(frozen=True)
class Given:
    """What the command line says."""

    model: Path
    gguf: Path | None
    short_tokens: int
    context_tokens: int
    new_tokens: int
    text_tokens: int


@dataclass(frozen=True)
class Result:
    figures: str
    is_ok: bool


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.real_models", description=__doc__, allow_abbrev=False)
    parser.add_argument("model", help="checkpoint of any kind, or its name on the hub")
    parser.add_argument("--gguf", type=Path, help="a GGUF file to check as well")
    parser.add_argument("--only", choices=CHECKS, action="append", help="may be repeated")
    parser.add_argument("--short_tokens", type=int, default=200, metavar="N", help="default %(default)s")
    parser.add_argument("--context_tokens", type=int, default=8192, metavar="N", help="default %(default)s")
    parser.add_argument("--new_tokens", type=int, default=64, metavar="N", help="default %(default)s")
    parser.add_argument("--text_tokens", type=int, default=20_480, metavar="N", help="default %(default)s")
    args = vars(parser.parse_args(argv))
    only = args.pop("only") or list(CHECKS)
    given = Given(**{**args, "model": local_path(args["model"])})
    all_ok = True
    for name in only:
        if name == "gguf" and given.gguf is None:
            continue
        started = time.perf_counter()
        with torch.no_grad():
            result = CHECKS[name](given)
        seconds = time.perf_counter() - started
        print(f"{name}: {result.figures} ({seconds:.0f} s) {'ok' if result.is_ok else 'FAILED'}", flush=True)
        all_ok &= result.is_ok
    return 0 if all_ok else 1


# ---- the two networks -----------------------------------------------------------------------------------------------


def network(checkpoint: Checkpoint, dtype: torch.dtype, num_positions: int, quantization: str = "none") -> Transformer:
    """Ours, on one rank."""
    ops = select_ops(CPU, num_threads=torch.get_num_threads())
    fmt, head_fmt = weight_formats(ops, checkpoint.config, dtype, quantization, CPU)
    model = Transformer(
        checkpoint.config, tp=TPGroup.single(CPU), ops=ops, fmt=fmt, head_fmt=head_fmt, dtype=dtype,
        num_positions=num_positions,
    )  # fmt: skip
    for _ in model.load(checkpoint):
        continue
    return model


def logits_in_chunks(model: Transformer, ids: list[int], kv: KVCache) -> Iterator[tuple[int, Tensor]]:
    """First position and logits of every _CHUNK positions: those of all together may be gigabytes."""
    for start in range(0, len(ids), _CHUNK):
        hidden_TD = model.forward(one_sequence(ids[start : start + _CHUNK], start, kv.num_blocks), kv)
        yield start, model.logits(hidden_TD)[:, : model.config.vocab_size]


def reference(model: Path) -> Any:
    """transformers' own, in fp32; of a GGUF file through its own GGUF loader."""
    load = transformers.AutoModelForCausalLM.from_pretrained
    with open_checkpoint(model) as checkpoint:
        kind = checkpoint.kind
    if kind == "gguf":
        return load(model.parent, gguf_file=model.name, dtype=torch.float32).eval()
    if kind == "hf-safetensors":
        return load(model, dtype=torch.float32).eval()
    with tempfile.TemporaryDirectory() as folder:
        megatron2hf(model, Path(folder) / "hf", options=Options(dtype="float32"))
        return load(Path(folder) / "hf", dtype=torch.float32).eval()


def real_code(model: Path, count: int) -> list[list[int]]:
    """Windows of Python's own library as token ids, at least `count` tokens together where there are so many."""
    library = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return windows(read_texts(library), load_tokenizer(model), -(-count // (WINDOW_TOKENS - 1)))


# ---- the checks -----------------------------------------------------------------------------------------------------


def check_logits(given: Given, num_tokens: int, tolerance: float) -> Result:
    ids = [i for window in real_code(given.model, num_tokens) for i in window][:num_tokens]
    theirs = reference(given.model)
    hidden_TD = theirs.model(torch.tensor([ids]), use_cache=False).last_hidden_state[0]
    largest, num_equal = 0.0, 0
    with open_checkpoint(given.model) as checkpoint:
        ours = network(checkpoint, torch.float32, len(ids))
        kv = one_sequence_cache(checkpoint.config, checkpoint.config.num_hidden_layers, len(ids))
        for start, logits_TV in logits_in_chunks(ours, ids, kv):
            expected_TV = theirs.lm_head(hidden_TD[start : start + len(logits_TV)])
            largest = max(largest, float((logits_TV - expected_TV).abs().nan_to_num(nan=math.inf).max()))
            num_equal += int((logits_TV.argmax(1) == expected_TV.argmax(1)).sum())
    figures = f"{len(ids)} tokens, largest difference {largest:.2g}, {num_equal} greedy tokens equal"
    return Result(figures, largest <= tolerance)


def greedy_of(model: Path, prompts: list[list[int]], num_new: int, size: int = 1) -> list[list[tuple[int, Any]]]:
    sampling = SamplingParams(max_new_tokens=num_new, logprobs=0, ignore_eos=True)
    with open_checkpoint(model) as checkpoint:
        return generate_on_ranks(size, checkpoint.config, checkpoint, prompts, sampling)


def encoded_prompts(model: Path) -> list[list[int]]:
    tokenizer = load_tokenizer(model)
    head = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
    return [head + tokenizer.encode(prompt) for prompt in PROMPTS]


def check_greedy(given: Given, model: Path | None = None, theirs: Any = None) -> Result:
    model = model or given.model
    prompts = encoded_prompts(model)
    theirs = theirs or reference(model)
    expected = []
    for prompt in prompts:
        settings = transformers.GenerationConfig(
            max_new_tokens=given.new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        ids = torch.tensor([prompt])
        output = theirs.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        expected.append(output[0, len(prompt) :].tolist())
    got = [[token for token, _ in output] for output in greedy_of(model, prompts, given.new_tokens)]
    num_equal = sum(a == b for a, b in zip(got, expected, strict=True))
    return Result(f"{num_equal} of {len(prompts)} continuations of {given.new_tokens} tokens equal", got == expected)


def check_tp(given: Given) -> Result:
    prompts = encoded_prompts(given.model)
    with open_checkpoint(given.model) as checkpoint:
        sizes = [size for size in checkpoint.config.tp_sizes if size <= 2]
    one, *others = (greedy_of(given.model, prompts, given.new_tokens, size) for size in sizes)
    figures = f"sizes {sizes}, {sum(map(len, one))} tokens and log probabilities, bit for bit"
    return Result(figures, all(other == one for other in others))


def check_quantized(given: Given) -> Result:
    texts = real_code(given.model, given.text_tokens)
    figures, base, is_ok = [], None, True
    for quantization in ("none", *PERPLEXITY_LIMITS):
        started = time.perf_counter()
        with open_checkpoint(given.model) as checkpoint:
            model = network(checkpoint, torch.bfloat16, WINDOW_TOKENS, quantization)
            seconds = time.perf_counter() - started
            kv = one_sequence_cache(checkpoint.config, checkpoint.config.num_hidden_layers, WINDOW_TOKENS)
        nats, chosen = 0.0, []
        for ids in texts:
            for _, logits_TV in logits_in_chunks(model, ids, kv):
                targets_T = torch.tensor(ids[1:])
                loss = torch.nn.functional.cross_entropy(logits_TV[:-1].double(), targets_T, reduction="sum")
                nats += float(loss)
                chosen += logits_TV[:-1].argmax(1).tolist()
        perplexity = math.exp(nats / len(chosen))
        base = base or (perplexity, chosen)
        agreed = sum(a == b for a, b in zip(chosen, base[1], strict=True)) / len(chosen)
        name = "bfloat16" if quantization == "none" else quantization
        figures.append(f"{name} perplexity {perplexity:.3f}, same greedy {agreed:.1%}, loaded in {seconds:.1f} s")
        is_ok &= perplexity <= base[0] * PERPLEXITY_LIMITS.get(quantization, 1.0)
    assert base is not None
    return Result(f"{len(base[1])} tokens: " + "; ".join(figures), is_ok)


def check_gguf(given: Given) -> Result:
    assert given.gguf is not None
    theirs = reference(given.gguf)
    state = theirs.state_dict()
    with open_checkpoint(given.gguf) as checkpoint:
        names = list(checkpoint.names())
        num_equal = sum(torch.equal(checkpoint.read(name).float(), state[hf_name(name)]) for name in names)
    greedy = check_greedy(given, given.gguf, theirs)
    figures = f"{num_equal} of {len(names)} tensors equal transformers' GGUF loader, {greedy.figures}"
    return Result(figures, num_equal == len(names) and greedy.is_ok)


CHECKS: dict[str, Callable[[Given], Result]] = {
    "logits": lambda given: check_logits(given, given.short_tokens, LOGIT_TOLERANCE),
    "long": lambda given: check_logits(given, given.context_tokens, LONG_LOGIT_TOLERANCE),
    "greedy": check_greedy,
    "tp": check_tp,
    "quantized": check_quantized,
    "gguf": check_gguf,
}

if __name__ == "__main__":
    sys.exit(main())
