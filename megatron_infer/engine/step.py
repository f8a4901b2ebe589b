"""The plan of one step: everything a rank needs to execute it, in integers.

Owns the wire form that rank 0 broadcasts. Knows nothing of requests, sampling parameters or tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Step:
    """S sequences, T tokens packed one sequence after the other; all arrays int32.

    A rank first executes `copies_C3`, then runs the tokens: those of sequence s are its positions
    `context_lens_S[s] - query_lens_S[s]` to `context_lens_S[s] - 1`.
    """

    token_ids_T: Ints
    """-1 - j: the j-th sample of the step before, which is not known yet."""
    query_lens_S: Ints
    context_lens_S: Ints
    """Tokens in the KV cache once this step has run, those of this step included."""
    block_tables: list[Ints]
    """Per sequence, the blocks that hold its `context_lens_S[s]` tokens."""
    num_samples_S: Ints
    """How many of the sequence's last tokens of this step yield a sample: 0, 1, or one more than drafts."""
    copies_C3: Ints
    """(source block, destination block, number of leading tokens); no destination is another copy's source."""
    full_logits: bool
    """False: the arg-max of each sampled row is enough."""
    op_by_op: bool = False
    """No rank may replay a recording of this step, because rank 0 times its operations."""

    def encode(self) -> npt.NDArray[np.int64]:
        """A 1-D int64 array: pairs of int32 values, lengths first."""
        table_lens_S = [len(table) for table in self.block_tables]
        flags = int(self.full_logits) | int(self.op_by_op) << 1
        header = [len(self.token_ids_T), len(self.query_lens_S), len(self.copies_C3), flags]
        size = len(header) + header[0] + 4 * header[1] + 3 * header[2] + sum(table_lens_S)
        flat = np.zeros(size + size % 2, dtype=np.int32)
        parts: list[Sequence[int] | Ints] = [header, table_lens_S, self.query_lens_S, self.context_lens_S]
        parts += [self.num_samples_S, self.token_ids_T, self.copies_C3.reshape(-1), *self.block_tables]
        start = 0
        for part in parts:
            flat[start : start + len(part)] = part
            start += len(part)
        assert start == size, "the arrays of a step disagree on the number of sequences"
        return flat.view(np.int64)

    @classmethod
    def decode(cls, encoded: npt.NDArray[np.int64]) -> Step:
        """The step that `encode` was called on; its arrays are views of `encoded`."""
        flat = np.ascontiguousarray(encoded, dtype=np.int64).view(np.int32)
        num_tokens, num_seqs, num_copies, flags = (int(value) for value in flat[:4])
        ends = 4 + np.cumsum([num_seqs, num_seqs, num_seqs, num_seqs, num_tokens, 3 * num_copies])
        parts = np.split(flat[4:], ends - 4)
        table_lens_S, query_lens_S, context_lens_S, num_samples_S, token_ids_T, copies, tables = parts
        table_ends = np.cumsum(table_lens_S)
        size = int(table_ends[-1]) if num_seqs else 0
        assert len(tables) - size in (0, 1), f"a step of {len(flat)} values was cut or extended on its way"
        starts = table_ends - table_lens_S
        return cls(
            token_ids_T=token_ids_T,
            query_lens_S=query_lens_S,
            context_lens_S=context_lens_S,
            block_tables=[tables[start:end] for start, end in zip(starts.tolist(), table_ends.tolist(), strict=True)],
            num_samples_S=num_samples_S,
            copies_C3=copies.reshape(-1, 3),
            full_logits=bool(flags & 1),
            op_by_op=bool(flags & 2),
        )
