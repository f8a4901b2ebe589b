"""A step arrives at the followers exactly as rank 0 planned it."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_infer.engine.step import Step


@pytest.mark.parametrize("num_seqs", [0, 1, 2, 5, 64])
@pytest.mark.parametrize("num_copies", [0, 1, 3])
def test_a_step_survives_the_wire(num_seqs: int, num_copies: int) -> None:
    rng = np.random.default_rng(num_seqs * 10 + num_copies)

    def ints(*shape: int) -> np.ndarray:
        return rng.integers(0, 2**31 - 1, shape).astype(np.int32)

    query_lens = rng.integers(1, 9, num_seqs).astype(np.int32)
    tables = [ints(int(n)) for n in rng.integers(1, 300, num_seqs)]
    sent = Step(
        ints(int(query_lens.sum())), query_lens, ints(num_seqs), tables, ints(num_seqs), ints(num_copies, 3), True,
        op_by_op=num_copies == 1,
    )  # fmt: skip
    encoded = sent.encode()
    assert (encoded.dtype, encoded.ndim) == (np.int64, 1)
    received = Step.decode(encoded)
    for name in ("token_ids_T", "query_lens_S", "context_lens_S", "num_samples_S", "copies_C3"):
        assert getattr(received, name).dtype == np.int32
        np.testing.assert_array_equal(getattr(received, name), getattr(sent, name))
    assert len(received.block_tables) == num_seqs
    for got, wanted in zip(received.block_tables, tables, strict=True):
        np.testing.assert_array_equal(got, wanted)
    assert received.full_logits is True and received.op_by_op is (num_copies == 1)
    with pytest.raises(AssertionError, match="cut or extended"):
        Step.decode(np.append(encoded, 0))
