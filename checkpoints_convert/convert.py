"""From any kind of checkpoint to any other: which writer, which shards, and what is told while it runs.

Owns the commands' meaning; the formats themselves are megatron_infer.model's business.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tqdm import tqdm

from checkpoints_convert.export import (
    Reader,
    save_hf,
    save_sharded,
    save_upstream_pt,
    tokenizer_files,
    write_gguf_tokenizer,
)
from checkpoints_convert.lora import Adapter, MergedReader
from checkpoints_convert.tensor_writers import Progress
from megatron_infer.model.checkpoint import Checkpoint, open_checkpoint
from megatron_infer.model.weights import expected_tensors, stored_dtype
from megatron_infer.model_config import DEFAULT_MODEL_NAME, FLOAT_DTYPES, ModelConfig

FORMATS = ("sharded", "pt", "hf")


@dataclass(frozen=True)
class Options:
    """What all conversions share.

    model_name: file stem of `.pt` checkpoints, read or written. dtype: convert to it ("bfloat16", "float16",
    "float32"); None keeps each tensor's. verify: first hash the source against its manifest. force: replace a
    checkpoint that stands at the output. progress: draw a bar on stderr.
    """

    model_name: str = DEFAULT_MODEL_NAME
    dtype: str | None = None
    verify: bool = False
    force: bool = False
    progress: bool = False

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in FLOAT_DTYPES:
            raise ValueError(f"dtype {self.dtype!r} is not one of {', '.join(FLOAT_DTYPES)}")
        if not self.model_name or Path(self.model_name).name != self.model_name:
            raise ValueError(f"model name {self.model_name!r} is not a plain file stem")


@dataclass(frozen=True)
class Summary:
    """What a conversion did."""

    source_kind: str
    out_dir: Path
    num_bytes: int
    seconds: float

    def __str__(self) -> str:
        rate = self.num_bytes / 1e6 / max(self.seconds, 1e-9)
        return (
            f"{self.source_kind} -> {self.out_dir}: {self.num_bytes:,} bytes of tensors in {self.seconds:.1f} s, "
            f"{rate:,.0f} MB/s, flushed to disk"
        )


def hf2megatron(
    src: str | Path, out: str | Path, *, tp: int = 1, fmt: str = "sharded", options: Options | None = None
) -> Summary:
    """Write `src` (of any kind) as a sharded directory or as upstream's `.pt`, for `tp` tensor-parallel ranks.

    Raises:
        ValueError: `src` is damaged, `out` is taken, `tp` does not divide the KV heads, or the disk is full.
    """
    if fmt not in ("sharded", "pt"):
        raise ValueError(f"format {fmt!r} is not one of sharded, pt; for a Hugging Face directory use megatron2hf")
    return convert(src, out, fmt, tp, options or Options())


def megatron2hf(src: str | Path, out: str | Path, *, options: Options | None = None) -> Summary:
    """Write `src` (of any kind) as a Hugging Face directory that transformers loads. Raises as `hf2megatron`."""
    return convert(src, out, "hf", 1, options or Options())


def reshard(src: str | Path, out: str | Path, *, tp: int, options: Options | None = None) -> Summary:
    """Write `src` for `tp` ranks: `.pt` stays `.pt`, everything else becomes a sharded directory."""
    options = options or Options()
    with open_checkpoint(src, options.model_name) as checkpoint:
        fmt = "pt" if _format_of(checkpoint) == "pt" else "sharded"
    return convert(src, out, fmt, tp, options)


def gguf2megatron(
    src: str | Path, out: str | Path, *, tp: int = 1, fmt: str = "sharded", options: Options | None = None
) -> Summary:
    """Write a GGUF file as a directory of any of FORMATS, its tokenizer beside it; weights in blocks become bf16.

    Raises as `hf2megatron`. To int8 or int4 a GGUF file goes as any other checkpoint does: `quantize`.
    """
    return convert(src, out, fmt, tp, options or Options())


def merge_lora(
    base: str | Path,
    adapter: str | Path,
    out: str | Path,
    *,
    tp: int = 1,
    fmt: str | None = None,
    options: Options | None = None,
) -> Summary:
    """Write W + scale * B A for every matrix that a PEFT LoRA adapter changes, all else as it is.

    The sum is made in fp32 and rounded once, to the dtype of the base or of `options`.

    Args:
        fmt: "sharded", "pt" or "hf"; None keeps the base's.
    Raises:
        ValueError: as `hf2megatron`, or the adapter is of a sort that cannot be merged, or is not for this base.
    """
    if fmt is not None and fmt not in FORMATS:
        raise ValueError(f"format {fmt!r} is not one of {', '.join(FORMATS)}")
    options = options or Options()

    def merged(checkpoint: Checkpoint) -> Change:
        refuse_quantized(checkpoint, "merged with an adapter")
        dtype = None if options.dtype is None else getattr(torch, options.dtype)
        reader = MergedReader(checkpoint, Adapter.open(Path(adapter), checkpoint.config), dtype)
        return Change(reader.read, checkpoint.config)

    return convert(base, out, fmt or "same", tp, options, merged)


@dataclass(frozen=True)
class Change:
    """What is written instead of a checkpoint's own tensors and config."""

    read: Reader
    config: ModelConfig


def convert(
    src: str | Path,
    out: str | Path,
    fmt: str,
    tp: int,
    options: Options,
    change: Callable[[Checkpoint], Change] | None = None,
) -> Summary:
    """Write `src`, or what `change` makes of it, in one of FORMATS ("same": the one it has). Raises ValueError."""
    started = time.perf_counter()
    if Path(src).resolve() == Path(out).resolve():
        raise ValueError(f"{out} is the source itself; choose another output directory")
    with open_checkpoint(src, options.model_name, verify=options.verify) as checkpoint:
        changed = Change(checkpoint.read, checkpoint.config) if change is None else change(checkpoint)
        fmt = _format_of(checkpoint) if fmt == "same" else fmt
        if fmt != "sharded":
            refuse_quantized(
                checkpoint, "written as " + {"hf": "a Hugging Face directory", "pt": "upstream's .pt"}[fmt]
            )
        if options.dtype is not None:
            refuse_quantized(checkpoint, "converted to another dtype")
        if options.progress:
            print("\n".join(checkpoint.notes), file=sys.stderr)
        # Blocks are decoded to fp32, which has more digits than they had.
        dtype = options.dtype or (checkpoint.config.torch_dtype if checkpoint.kind == "gguf" else None)
        target = None if dtype is None else getattr(torch, dtype)
        written = _Written(_num_bytes(checkpoint, changed.config, target), options.progress)
        with TemporaryDirectory(prefix="checkpoints_convert-") as folder, written.bar:
            tokenizer_dir = checkpoint.model_dir
            if checkpoint.kind == "gguf":
                tokenizer_dir = Path(folder)
                write_gguf_tokenizer(checkpoint.model_dir, tokenizer_dir)
            _write(changed, tokenizer_dir, out, fmt, tp, target, options, written)
    return Summary(checkpoint.kind, Path(out), written.num_bytes, time.perf_counter() - started)


def refuse_quantized(checkpoint: Checkpoint, what: str) -> None:
    """ValueError where the weights are quantised, so that they cannot be `what`."""
    if checkpoint.config.quantization is not None:
        raise ValueError(
            f"{checkpoint.model_dir} holds quantized weights ({checkpoint.config.quantization}), which cannot be "
            f"{what}; take the checkpoint before quantization"
        )


class _Written:
    """Counts written bytes and draws the bar; replicas make the count a little more than the expected size."""

    def __init__(self, expected_bytes: int, show: bool) -> None:
        self.num_bytes = 0
        self.bar = tqdm(total=expected_bytes, unit="B", unit_scale=True, disable=not show, leave=False)

    def __call__(self, num_bytes: int) -> None:
        self.num_bytes += num_bytes
        self.bar.update(num_bytes)


def _write(
    change: Change,
    tokenizer_dir: Path,
    out: str | Path,
    fmt: str,
    tp: int,
    dtype: torch.dtype | None,
    options: Options,
    progress: Progress,
) -> None:
    read, config, extra, force = change.read, change.config, tokenizer_files(tokenizer_dir), options.force
    if fmt == "hf":
        save_hf(read, config, out, dtype, extra, force=force, progress=progress)
    elif fmt == "pt":
        save_upstream_pt(read, config, out, options.model_name, tp, dtype, extra, force=force, progress=progress)
    else:
        save_sharded(read, config, out, tp, dtype, extra, force=force, progress=progress)


def _format_of(checkpoint: Checkpoint) -> str:
    if checkpoint.kind.startswith("megatron-pt"):
        return "pt"
    return "sharded" if checkpoint.kind == "sharded-safetensors" else "hf"


def _num_bytes(checkpoint: Checkpoint, config: ModelConfig, dtype: torch.dtype | None) -> int:
    """Size of all tensors as written, replicas not counted."""
    return sum(
        torch.Size(shape).numel() * (stored_dtype(config, name) or dtype or checkpoint.dtype_of(name)).itemsize
        for name, shape in expected_tensors(config).items()
    )
