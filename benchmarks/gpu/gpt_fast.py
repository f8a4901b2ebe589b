"""gpt-fast (meta-pytorch/gpt-fast) on the same weights: its own model.py and generate.py, imported from a checkout.

Nothing of it is here: this file renames our tensors, and times its `generate`, greedy, compiled as its `main` does.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.peers import SHORT, ms_per_token
from benchmarks.gpu.weights import SharedWeights
from benchmarks.gpu.workload import Workload
from megatron_infer.model_config import ModelConfig

_MODULES = ("model", "generate", "tokenizer")
_NAMES = {
    "model.embed_tokens": "tok_embeddings",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.norm": "norm",
    "lm_head": "output",
    "model.layers": "layers",
}


@contextmanager
def imported(checkout: Path) -> Iterator[ModuleType]:
    """Its generate module; the names it takes at the top level, and the compiler settings it makes, last for the block.

    Raises:
        ValueError: something else goes by one of those names already.
    """
    taken = [name for name in _MODULES if name in sys.modules]
    if taken:
        raise ValueError(f"gpt-fast's modules {', '.join(taken)} would replace others of that name")
    # Its tokenizer wants packages that token ids do not.
    tokenizer = ModuleType("tokenizer")
    vars(tokenizer)["get_tokenizer"] = None
    sys.modules["tokenizer"] = tokenizer
    path = list(sys.path)
    sys.path.insert(0, str(checkout.resolve()))
    settings = {name: getattr(torch._inductor.config, name) for name in ("coordinate_descent_tuning", "fx_graph_cache")}
    try:
        with torch._inductor.config.patch(settings):
            yield importlib.import_module("generate")
    finally:
        sys.path[:] = path
        for name in _MODULES:
            sys.modules.pop(name, None)


def state_dict(weights: SharedWeights) -> dict[str, Tensor]:
    """The shared tensors by gpt-fast's names; q, k and v become one copy, its heads' rows in the order it rotates."""
    config, tensors = weights.config, weights.tensors
    state = {}
    for name, tensor in tensors.items():
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            continue
        for theirs, ours in _NAMES.items():
            name = name.replace(theirs, ours)
        state[name] = tensor
    for layer in range(config.num_hidden_layers):
        q, k, v = (tensors[f"model.layers.{layer}.self_attn.{letter}_proj.weight"] for letter in "qkv")
        rows = [_interleaved(q, config.head_dim), _interleaved(k, config.head_dim), v]
        state[f"layers.{layer}.attention.wqkv.weight"] = torch.cat(rows)
    return state


def _interleaved(weight_NK: Tensor, head_dim: int) -> Tensor:
    """Rows of every head in the order 0, h, 1, h + 1, ... with h = head_dim / 2: it rotates neighbours, HF halves."""
    halves = weight_NK.unflatten(0, (-1, 2, head_dim // 2))
    return halves.transpose(1, 2).flatten(0, 2)


def load(gpt_fast: ModuleType, weights: SharedWeights, block_size: int) -> torch.nn.Module:
    """Its Transformer for sequences of up to `block_size` tokens."""
    config = weights.config
    check(config)
    its_model = sys.modules["model"]
    arguments = its_model.ModelArgs(
        block_size=block_size,
        vocab_size=config.vocab_size,
        n_layer=config.num_hidden_layers,
        n_head=config.num_attention_heads,
        dim=config.hidden_size,
        intermediate_size=config.intermediate_size,
        n_local_heads=config.num_key_value_heads,
        rope_base=config.rope_theta,
        norm_eps=config.rms_norm_eps,
    )
    with torch.device("meta"):
        model: torch.nn.Module = gpt_fast.Transformer(arguments)
    model.load_state_dict(state_dict(weights), strict=True, assign=True)
    return model.eval()


def check(config: ModelConfig) -> None:
    """Refuse, with a ValueError, what its network does not have."""
    if config.attention_bias or config.attention_output_bias or config.mlp_bias or config.tie_word_embeddings:
        raise ValueError("gpt-fast has neither biases nor a tied head")
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        raise ValueError("gpt-fast's heads divide the hidden size")


def measure(weights: SharedWeights, work: Workload, device: torch.device, checkout: Path) -> dict[str, Any]:
    """Milliseconds per decoded token at the peers' first context, and the greedy ids there."""
    prompt = torch.tensor(work.prompt, device=device)
    with imported(checkout) as gpt_fast, torch.compiler.set_stance(_stance(device)):
        # As its main() does before it generates.
        gpt_fast.decode_one_token = torch.compile(gpt_fast.decode_one_token, mode="reduce-overhead", fullgraph=True)
        model = load(gpt_fast, weights, len(work.prompt) + SHORT + work.new_tokens)

        def run(new_tokens: int) -> Tensor:
            # Temperature 0 leaves the largest logit alone; top_k would cost it time and change nothing.
            options = {"interactive": False, "draft_model": None, "temperature": 0.0, "top_k": None}
            ids, _ = gpt_fast.generate(model, prompt, new_tokens, 1, **options)
            return ids[0, len(prompt) :]

        try:
            # The longest first: the caches it makes then stay.
            run(SHORT + work.new_tokens)
            milliseconds = ms_per_token(run, work, device)
            ids = run(work.new_tokens).tolist()
        finally:
            torch.compiler.reset()
    return {"decode": [{"context": len(prompt), "ms_per_step": milliseconds}], "greedy_ids": ids}


def _stance(device: torch.device) -> str:
    """Compiling is for a GPU; a CPU would spend a minute on it."""
    return "default" if device.type == "cuda" else "force_eager"
