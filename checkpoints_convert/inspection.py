"""What a checkpoint is and what it takes: kind, architecture, FIM family, parameters, memory by tensor-parallel size.

Reads headers only, except that the files of a checkpoint with a manifest are hashed.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from checkpoints_convert.network import float_dtype
from megatron_infer.cache.kv_cache import KVCache
from megatron_infer.model.checkpoint import open_checkpoint
from megatron_infer.model.manifest import MANIFEST_NAME, verify_manifest
from megatron_infer.model.weights import expected_tensors, memory_estimate
from megatron_infer.model_config import DEFAULT_MODEL_NAME, ModelConfig
from megatron_infer.text.fim import load_fim
from megatron_infer.text.tokenizer import load_tokenizer

_MIB, _GIB = 1 << 20, 1 << 30


@dataclass(frozen=True)
class RankMemory:
    """One rank at tensor-parallel size `tp`. `kv_tokens`: how many tokens of KV cache fit beside the weights; None
    without a given memory."""

    tp: int
    weight_bytes: int
    kv_bytes_per_token: int
    kv_tokens: int | None

    @property
    def fits(self) -> bool | None:
        """Whether weights and at least one token's KV cache fit; None without a given memory."""
        return None if self.kv_tokens is None else self.kv_tokens > 0


@dataclass(frozen=True)
class Inspection:
    """A checkpoint in numbers. `dtypes`: how many tensors are stored in each. `fim`: family, or why there is none.

    num_verified: files whose SHA-256 is that of the manifest; None where there is no manifest.
    """

    model_dir: Path
    kind: str
    architecture: str
    config: ModelConfig
    fim: str
    num_parameters: int
    num_bytes: int
    dtypes: dict[str, int]
    ranks: tuple[RankMemory, ...]
    notes: tuple[str, ...]
    num_verified: int | None

    def to_json(self) -> dict[str, Any]:
        """JSON-ready dictionary."""
        ranks = [{**asdict(rank), "fits": rank.fits} for rank in self.ranks]
        return {**asdict(self), "model_dir": str(self.model_dir), "config": self.config.to_hf(), "ranks": ranks}

    def __str__(self) -> str:
        c = self.config
        rope = f"RoPE theta {c.rope_theta:g}"
        if c.rope_scaling:
            rope += f", {c.rope_scaling.rope_type} scaling x{c.rope_scaling.factor:g}"
        biases = [
            name for name, on in (("qkv", c.attention_bias), ("o", c.attention_output_bias), ("mlp", c.mlp_bias)) if on
        ]
        lines = [
            f"kind           {self.kind}",
            f"architecture   {self.architecture}: {c.num_hidden_layers} layers, hidden {c.hidden_size}, ffn "
            f"{c.intermediate_size}, {c.num_attention_heads} query / {c.num_key_value_heads} KV heads of {c.head_dim}",
            f"               vocabulary {c.vocab_size}, {'tied' if c.tie_word_embeddings else 'separate'} head, "
            f"biases: {', '.join(biases) or 'none'}",
            f"               {rope}, {c.max_position_embeddings} positions, RMSNorm epsilon {c.rms_norm_eps:g}",
            f"FIM family     {self.fim}",
            f"parameters     {self.num_parameters:,}",
            f"quantization   {c.quantization or 'none'}",
            f"stored         {self.num_bytes:,} bytes: " + ", ".join(f"{n} x {d}" for d, n in self.dtypes.items()),
            f"integrity      {self._integrity}",
            "tp  weights/rank      KV cache/token",
            *(_rank_line(rank) for rank in self.ranks),
        ]
        return "\n".join(lines)

    @property
    def _integrity(self) -> str:
        if self.num_verified is None:
            return "unknown: there is no manifest.json to compare with"
        return f"all {self.num_verified} files are as they were written (SHA-256)"


def inspect(
    model_dir: str | Path, *, model_name: str = DEFAULT_MODEL_NAME, memory_bytes: int | None = None
) -> Inspection:
    """Look at a checkpoint of any kind.

    Args:
        memory_bytes: of one rank; says what fits into it, weights and KV cache in the dtype that is stored.
    Raises:
        ValueError: it is damaged, or not a checkpoint; also where a file is not the one that its manifest lists.
    """
    num_verified = len(verify_manifest(model_dir).files) if (Path(model_dir) / MANIFEST_NAME).is_file() else None
    with open_checkpoint(model_dir, model_name) as checkpoint:
        config = checkpoint.config
        dtypes = Counter(str(checkpoint.dtype_of(name)).removeprefix("torch.") for name in checkpoint.names())
        plain = replace(config, quantization=None)
        numel = sum(torch.Size(shape).numel() for shape in expected_tensors(plain).values())
        dtype = float_dtype(checkpoint)
        return Inspection(
            model_dir=checkpoint.model_dir,
            kind=checkpoint.kind,
            architecture=str(config.to_hf()["architectures"][0]),
            config=config,
            fim=_fim_family(checkpoint.model_dir, config),
            num_parameters=numel,
            num_bytes=checkpoint.num_bytes,
            dtypes=dict(dtypes),
            ranks=tuple(_rank(config, tp, dtype, memory_bytes) for tp in config.tp_sizes),
            notes=checkpoint.notes,
            num_verified=num_verified,
        )


def _rank(config: ModelConfig, tp: int, dtype: torch.dtype, memory_bytes: int | None) -> RankMemory:
    weights = memory_estimate(config, tp, dtype, config.quantization.format if config.quantization else "none")
    kv_heads = len(config.kv_heads_on(0, tp))
    per_token = KVCache.block_bytes(config.num_hidden_layers, kv_heads, 1, config.head_dim, dtype)
    tokens = None if memory_bytes is None else max(0, (memory_bytes - weights) // per_token)
    return RankMemory(tp, weights, per_token, tokens)


def _rank_line(rank: RankMemory) -> str:
    size = f"{rank.weight_bytes / _GIB:.2f} GiB" if rank.weight_bytes >= _GIB else f"{rank.weight_bytes / _MIB:.2f} MiB"
    line = f"{rank.tp:<3} {size:>12}      {rank.kv_bytes_per_token / 1024:10.2f} KiB"
    if rank.fits is None:
        return line
    return f"{line}      {f'fits, with {rank.kv_tokens:,} tokens of KV cache' if rank.fits else 'does not fit'}"


def _fim_family(model_dir: Path, config: ModelConfig) -> str:
    try:
        return load_fim(config.fim, load_tokenizer(model_dir, config.vocab_size)).name
    except ValueError as error:
        return f"{config.fim or 'unknown'} ({error})"
