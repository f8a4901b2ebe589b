"""Megatron's parallel layers (arXiv 1909.08053): column, row and vocabulary parallel.

A layer knows which slice of a full tensor its rank owns and reads just that. It does not know the weight format, the
kernels, or how ranks talk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatron_infer.model.formats import READ_ROWS, Slice, TensorSource, WeightFormat
from megatron_infer.ops import NUM_CHUNKS, Ops, Stream
from megatron_infer.tensor_parallel.group import TPGroup


class ColumnParallelLinear:
    """y_TN = x_TK W^T + b with the output features divided among the ranks; needs no communication.

    Several layers that read the same input (q, k, v; gate, up) are one matrix here: `parts` in order. `label` is the
    name of that matrix in profiles.
    """

    def __init__(self, label: str, in_dim: int, parts: Sequence[Slice], *, bias: bool, fmt: WeightFormat) -> None:
        self.parts, self.has_bias, self.fmt, self.ops = tuple(parts), bias, fmt, fmt.ops
        self.packed = fmt.allocate(label, sum(map(_num_rows, parts)), fmt.chunk_bounds(in_dim))

    def load(self, source: TensorSource) -> None:
        """Read and pack this rank's rows."""
        biases, offset = [], 0
        for part in self.parts:
            self.fmt.load(self.packed, offset, source, part)
            offset += _num_rows(part)
            if self.has_bias:
                biases.append(source.read(f"{part.name}.bias", rows=part.rows).float())
        if biases:
            self.packed = replace(self.packed, bias=torch.cat(biases).to(self.packed.data.device))

    def __call__(self, x_TK: Tensor) -> Tensor:
        return self.ops.linear(x_TK, self.packed)


def _num_rows(part: Slice) -> int:
    assert part.rows is not None
    return part.rows[1] - part.rows[0]


class RowParallelLinear:
    """y_TN = x_TK W^T + b with the input features divided among the ranks; the partial sums are all-reduced.

    Rank r owns whole K-chunks, hence a subtree of the sum, and the all-reduce adds the subtrees in the tree's order:
    the result has the same bits at every tensor-parallel degree.

    completes_sum: this rank's product is the result, neither other ranks' nor a bias are to be added to it.
    """

    def __init__(
        self, label: str, name: str, in_dim: int, out_dim: int, *, bias: bool, tp: TPGroup, fmt: WeightFormat
    ) -> None:
        bounds = fmt.chunk_bounds(in_dim)
        per_rank = NUM_CHUNKS // tp.size
        own = bounds[tp.rank * per_rank : (tp.rank + 1) * per_rank + 1]
        self.part = Slice(name, (0, out_dim), (own[0], own[-1]))
        self.has_bias, self.tp, self.fmt = bias, tp, fmt
        self.completes_sum = tp.size == 1 and not bias
        self.bias_N: Tensor | None = None
        self.packed = fmt.allocate(label, out_dim, tuple(b - own[0] for b in own))

    def load(self, source: TensorSource) -> None:
        """Read and pack this rank's columns; the bias is whole on every rank and added once, after the reduction."""
        self.fmt.load(self.packed, 0, source, self.part)
        if self.has_bias:
            self.bias_N = source.read(f"{self.part.name}.bias").float().to(self.packed.data.device)

    def reduce(self, stream: Stream) -> None:
        """Turn this rank's product, pending on the stream, into the result: the sum over all ranks, and the bias."""
        if self.completes_sum:
            return
        partial_TN = stream.pending_TD
        assert partial_TN is not None, "only a product that completes the sum may be added to the residual"
        if not self.has_bias and self.tp.add_all_reduce(partial_TN, stream.residual_TD):
            stream.pending_TD = None
            return
        y_TN = self.tp.all_reduce(partial_TN)
        stream.pending_TD = y_TN if self.bias_N is None else y_TN.add_(self.bias_N)


def vocab_range(vocab_size: int, rank: int, size: int) -> tuple[int, int]:
    """Token ids owned by `rank`: equal, contiguous, the last ones shorter when the vocabulary does not divide."""
    width = -(-vocab_size // size)
    return min(rank * width, vocab_size), min((rank + 1) * width, vocab_size)


class VocabParallelEmbedding:
    """Token embedding with the vocabulary divided among the ranks; foreign ids give zeros, summed away.

    The table's last row is those zeros. A sum of ranks turns -0.0 into +0.0, so the table holds no -0.0 to begin with
    and one rank alone gives the same bits.
    """

    def __init__(self, name: str, vocab_size: int, dim: int, *, tp: TPGroup, ops: Ops, dtype: torch.dtype) -> None:
        self.name, self.tp, self.ops = name, tp, ops
        self.start, self.stop = vocab_range(vocab_size, tp.rank, tp.size)
        self.table_VD = torch.zeros(self.stop - self.start + 1, dim, dtype=dtype, device=tp.device)

    def load(self, source: TensorSource) -> None:
        """Read this rank's rows of the table."""
        for start in range(self.start, self.stop, READ_ROWS):
            rows_VD = source.read(f"{self.name}.weight", rows=(start, min(start + READ_ROWS, self.stop)))
            self.table_VD[start - self.start :][: len(rows_VD)].copy_(rows_VD).add_(0.0)

    def __call__(self, ids_T: Tensor) -> Tensor:
        if self.tp.size == 1:
            return self.ops.gather_rows(self.table_VD, ids_T)
        local_T = ids_T - self.start
        local_T.masked_fill_((ids_T < self.start) | (ids_T >= self.stop), self.stop - self.start)
        return self.tp.all_reduce(self.ops.gather_rows(self.table_VD, local_T))


class VocabParallelHead(ColumnParallelLinear):
    """Output head with the vocabulary divided among the ranks: each has the logits of its own token ids."""

    def __init__(self, name: str, dim: int, vocab_size: int, *, tp: TPGroup, fmt: WeightFormat) -> None:
        self.vocab_size, self.tp = vocab_size, tp
        self.start, self.stop = vocab_range(vocab_size, tp.rank, tp.size)
        super().__init__("head", dim, [Slice(name, (self.start, self.stop))], bias=False, fmt=fmt)

    def gather(self, local_SV: Tensor) -> Tensor:
        """All logits [S, vocab_size] on every rank."""
        missing = -(-self.vocab_size // self.tp.size) - local_SV.shape[1]
        if missing:
            local_SV = torch.nn.functional.pad(local_SV, (0, missing))
        return self.tp.all_gather(local_SV)[:, : self.vocab_size]
