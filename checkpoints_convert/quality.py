"""What quantisation cost: errors layer by layer, perplexity and fill-in-the-middle exact match before and after.

Runs both networks over the same text one layer at a time, so that one layer of each is in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from checkpoints_convert.network import CPU, LayerwiseNetwork, float_dtype
from checkpoints_convert.texts import WINDOW_TOKENS, Hole, holes, read_texts, windows
from megatron_infer.dispatch.select import select_ops
from megatron_infer.model.checkpoint import Checkpoint
from megatron_infer.model.formats import dequantize, row_blocks, unpack_int4
from megatron_infer.model.weights import expected_tensors, stored_dtype
from megatron_infer.ops import Stream
from megatron_infer.text.tokenizer import load_tokenizer

_NUM_POSITIONS = WINDOW_TOKENS + 256
"""Of a prompt of WINDOW_TOKENS and the answer behind it; holes with longer answers are left out."""


@dataclass(frozen=True)
class LayerError:
    """Relative errors of B against A, root mean square: of the linear layers' weights, and of what the decoder layer
    adds to A's residual stream."""

    weights: float
    output: float


@dataclass(frozen=True)
class Score:
    """perplexity: of the next token in plain text. exact: holes whose true answer, end included, is greedy's."""

    perplexity: float
    exact: int


@dataclass(frozen=True)
class Quality:
    """layers: by decoder layer, the last one is the head (its output: the logits). scores: of A and of B.

    agreement: share of plain-text positions where both have the same most likely next token.
    """

    layers: tuple[LayerError, ...]
    scores: tuple[Score, Score]
    agreement: float
    num_tokens: int
    num_holes: int

    def __str__(self) -> str:
        a, b = self.scores
        names = [*map(str, range(len(self.layers) - 1)), "head"]
        lines = ["layer   weights    output"]
        lines += [f"{n:<5} {e.weights:9.3%} {e.output:9.3%}" for n, e in zip(names, self.layers, strict=True)]
        change = b.perplexity / a.perplexity - 1
        lines += [
            f"perplexity       {a.perplexity:.4f} -> {b.perplexity:.4f} ({change:+.2%}), {self.num_tokens:,} tokens",
            f"same next token  {self.agreement:.2%} of them",
            f"FIM exact match  {a.exact} -> {b.exact} of {self.num_holes} ends of lines, token for token, greedy",
        ]
        return "\n".join(lines)


def compare_quality(
    a: Checkpoint,
    b: Checkpoint,
    texts: Sequence[str | Path],
    *,
    num_windows: int = 128,
    num_holes: int = 300,
    progress: Callable[[int], object] | None = None,
) -> Quality:
    """Run both checkpoints of one network over held-out text.

    Args:
        texts: text files or directories of them; at most `num_windows` windows of 512 tokens and `num_holes` holes
            are drawn from them, always the same ones.
        progress: called with 1 for each layer done.
    Raises:
        ValueError: the networks differ in shape, or there is no text.
    """
    if _plain_shapes(a) != _plain_shapes(b):
        raise ValueError(f"{a.model_dir} and {b.model_dir} are not one network; compare them with verify")
    files = read_texts(texts)
    plain = windows(files, load_tokenizer(a.model_dir, a.config.vocab_size), num_windows)
    cut = [hole for hole in holes(files, a.model_dir, a.config, num_holes) if len(hole.ids) <= _NUM_POSITIONS]
    ops = select_ops(CPU, num_threads=torch.get_num_threads())
    nets = [LayerwiseNetwork(c, c.config, float_dtype(c), ops, _NUM_POSITIONS) for c in (a, b)]
    with torch.no_grad():
        streams = [net.embed([*plain, *(hole.ids for hole in cut)]) for net in nets]
        layers = []
        for layer in range(a.config.num_hidden_layers):
            output = _run_layer(nets, layer, streams, len(plain))
            layers.append(LayerError(_weights_error(a, b, f"layers.{layer}."), output))
            if progress is not None:
                progress(1)
        tally = _Tally()
        _run_head(nets, streams, plain, cut, tally)
    layers.append(LayerError(_weights_error(a, b, "output."), tally.output_error))
    scores = tuple(Score(math.exp(n / tally.num_tokens), hits) for n, hits in zip(tally.nats, tally.exact, strict=True))
    agreement = tally.num_agreed / tally.num_tokens
    return Quality(tuple(layers), (scores[0], scores[1]), agreement, tally.num_tokens, len(cut))


def _run_layer(nets: list[LayerwiseNetwork], layer: int, streams: list[list[Tensor]], num_compared: int) -> float:
    """Advance both networks' streams by a layer; the error of what B's layer adds to the first of A's streams."""
    block_a, block_b = (net.block(layer) for net in nets)
    error = size = 0.0
    for i, (before_a, before_b) in enumerate(zip(*streams, strict=True)):
        after_a = nets[0].run(block_a, before_a)
        if i < num_compared:
            error += _square(nets[1].run(block_b, before_a) - after_a)
            size += _square(after_a - before_a)
        streams[0][i], streams[1][i] = after_a, nets[1].run(block_b, before_b)
    return math.sqrt(error / size)


class _Tally:
    """Sums over all positions; pairs are of A and of B."""

    def __init__(self) -> None:
        self.nats, self.exact = [0.0, 0.0], [0, 0]
        self.num_tokens = self.num_agreed = 0
        self.error = self.size = 0.0

    @property
    def output_error(self) -> float:
        return math.sqrt(self.error / self.size)


def _run_head(
    nets: list[LayerwiseNetwork], streams: list[list[Tensor]], plain: list[list[int]], cut: list[Hole], tally: _Tally
) -> None:
    norms, heads = [net.norm() for net in nets], [net.head() for net in nets]
    for i, pair in enumerate(zip(*streams, strict=True)):
        hidden = [norm(Stream(residual_TD)) for norm, residual_TD in zip(norms, pair, strict=True)]
        if i >= len(plain):
            hole = cut[i - len(plain)]
            for which, head in enumerate(heads):
                tally.exact[which] += _is_exact(head(hidden[which][hole.start - 1 :]), hole)
            continue
        targets_T = torch.tensor(plain[i][1:])
        logits = [head(hidden_TD[:-1]) for head, hidden_TD in zip(heads, hidden, strict=True)]
        tally.error += _square(heads[1](hidden[0][:-1]) - logits[0])
        tally.size += _square(logits[0])
        tally.num_tokens += len(targets_T)
        tally.num_agreed += int((logits[0].argmax(dim=1) == logits[1].argmax(dim=1)).sum())
        for which in range(2):
            loss = torch.nn.functional.cross_entropy(logits[which].double(), targets_T, reduction="sum")
            tally.nats[which] += float(loss)


def _is_exact(logits_TV: Tensor, hole: Hole) -> bool:
    """Whether greedy decoding gives the answer's own tokens and then ends."""
    *answer, end = logits_TV.argmax(dim=1).tolist()
    return answer == hole.ids[hole.start :] and end in hole.ends


def _weights_error(a: Checkpoint, b: Checkpoint, prefix: str) -> float:
    """Relative error of B's linear layers whose names start with `prefix`; 0 where there are none (a tied head)."""
    error = size = 0.0
    for name, (out_dim, *in_dims) in _plain_shapes(a).items():
        if not in_dims or not name.startswith(prefix):
            continue
        for rows in row_blocks(out_dim, in_dims[0]):
            true_NK = _weight_rows(a, name, rows)
            error += _square(_weight_rows(b, name, rows) - true_NK)
            size += _square(true_NK)
    return math.sqrt(error / size) if size else 0.0


def _weight_rows(checkpoint: Checkpoint, name: str, rows: tuple[int, int]) -> Tensor:
    """Rows of a weight in fp32, whether stored quantised or not."""
    stored = stored_dtype(checkpoint.config, name)
    values_NK = checkpoint.read(name, rows)
    if stored is None:
        return values_NK.float()
    assert checkpoint.config.quantization is not None
    scales_NG = checkpoint.read(f"{name.removesuffix('.weight')}.scales", rows)
    values_NK = unpack_int4(values_NK) if stored == torch.uint8 else values_NK
    return dequantize(values_NK, scales_NG, checkpoint.config.quantization.group_size)


def _plain_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    return expected_tensors(replace(checkpoint.config, quantization=None))


def _square(x: Tensor) -> float:
    return float(x.double().square().sum())
