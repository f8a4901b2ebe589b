"""Paged attention in Triton, interpreted on the CPU: softmax attention for any mixture of sequences, whatever lies in
unwritten slots and in the padding of block tables; and a row's bits are its own, or its sequence's."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tests.triton.interpreter import interpreter  # first: what follows imports triton

from megatron_infer.kernels.triton import attention_decode  # isort: skip
from megatron_infer.kernels.triton.attention import make_counters, paged_attention  # isort: skip
from megatron_infer.ops import BatchView, LayerKV  # isort: skip

from tests.support.ops_cases import CPU, Paged, attention_float64, paged_case  # isort: skip

BOUNDS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Largest error over the largest value: in 16 bits the weights and the result are rounded, in fp32 only sums are."""
FINE, COARSE, NONE = 132, 2, 0
"""Streaming multiprocessors: so many that every tile is a partial; so few that spans of eight tiles are, or that one
program takes all."""


def arguments(case: Paged) -> tuple:
    """As the launcher takes them."""
    batch = case.batch
    tables = (batch.block_tables_SB, batch.query_start_S1, batch.context_lens_S)
    return (case.q_TNH, *case.kv, *tables, batch.max_query_len, case.scale)


def attend(case: Paged, num_sms: int = FINE, *, deterministic: bool = False) -> Tensor:
    counters = make_counters(CPU)
    o_TNH = paged_attention(*arguments(case), num_sms=num_sms, counters=counters, deterministic=deterministic)
    assert not counters.any()
    return o_TNH


def close(actual: Tensor, case: Paged) -> bool:
    expected = attention_float64(case)
    error = (actual.double() - expected).abs().max() / expected.abs().max()
    return actual.shape == expected.shape and actual.dtype == case.q_TNH.dtype and bool(error <= BOUNDS[actual.dtype])


def typed_case(lengths: list[tuple[int, int]], dtype: torch.dtype = torch.float32, **shape: int) -> Paged:
    case = paged_case(lengths, dtype=dtype, **shape)
    case.q_TNH = case.q_TNH.to(dtype)
    return case


def together(cases: list[Paged], width: int) -> Paged:
    """One batch of one-sequence cases with one cache each; the tables get `width` columns of which few are used."""
    block_size = cases[0].kv.k.shape[2]
    tables = torch.full((len(cases), width), -7, dtype=torch.int32)
    offset = 0
    for row, case in zip(tables, cases, strict=True):
        used = -(-int(case.batch.context_lens_S[0]) // block_size)
        row[:used] = case.batch.block_tables_SB[0, :used] + offset
        offset += case.kv.k.shape[0]
    batch = BatchView(
        **{
            name: torch.cat([getattr(case.batch, name) for case in cases])
            for name in ("token_ids_T", "positions_T", "slots_T", "context_lens_S")
        },
        query_start_S1=torch.tensor([0, *(len(case.q_TNH) for case in cases)]).cumsum(0).to(torch.int32),
        block_tables_SB=tables,
        max_query_len=max(len(case.q_TNH) for case in cases),
    )
    kv = LayerKV(*(torch.cat(caches) for caches in zip(*(case.kv for case in cases), strict=True)))
    return Paged(torch.cat([case.q_TNH for case in cases]), batch, kv, cases[0].scale)


@pytest.mark.parametrize("num_sms", [FINE, COARSE, NONE])
@pytest.mark.parametrize("lengths", [[(1, 1), (1, 128), (1, 129), (1, 1100)], [(16, 16)], [(3, 3), (5, 130), (1, 40)]])
def test_decode_and_verification(lengths: list, num_sms: int) -> None:
    case = typed_case(lengths, num_heads=2, num_kv_heads=1)
    assert close(attend(case, num_sms), case)


@pytest.mark.parametrize("lengths", [[(17, 17)], [(90, 233)], [(1, 140), (40, 75), (2, 2), (17, 80), (70, 70), (1, 9)]])
@pytest.mark.parametrize("deterministic", [False, True])
def test_prefill_and_mixtures(lengths: list, deterministic: bool) -> None:
    case = typed_case(lengths, num_heads=2, num_kv_heads=1)
    assert close(attend(case, deterministic=deterministic), case)


@pytest.mark.parametrize(
    ("dtype", "heads", "kv_heads", "head_dim", "block_size"),
    [
        (torch.bfloat16, 2, 2, 32, 8),
        (torch.float32, 4, 2, 64, 16),
        (torch.float16, 3, 1, 80, 32),
        (torch.bfloat16, 5, 1, 96, 16),
        (torch.bfloat16, 8, 2, 128, 64),
        (torch.float16, 7, 1, 128, 16),
        (torch.bfloat16, 8, 1, 256, 16),
        (torch.float32, 2, 1, 20, 8),
    ],
)
def test_shapes_of_models(dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, block_size: int) -> None:
    shape = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": head_dim, "block_size": block_size}
    case = typed_case([(2, 135), (18, 50)], dtype, **shape)
    assert close(attend(case), case)


def test_bits_depend_on_neither_the_batch_nor_the_draft_nor_the_cut_of_the_work() -> None:
    lengths = [(3, 1300), (1, 33), (20, 60)]  # the first takes eight tiles and three more
    cases = [typed_case([pair], num_heads=2, num_kv_heads=1, seed=10 * i) for i, pair in enumerate(lengths)]
    alone = [attend(case, FINE) for case in cases]
    for order, width, num_sms in [((1, 2, 0), 82, COARSE), ((0, 1), 90, FINE), ((1, 0), 90, NONE)]:
        whole = together([cases[i] for i in order], width)
        o_TNH = attend(whole, num_sms)
        for s, i in enumerate(order):
            assert torch.equal(o_TNH[whole.rows(s)], alone[i])
    assert torch.equal(attend(cases[0].part(0, 1, 2), COARSE), alone[0][1:2])


def test_the_last_program_merges_whichever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter runs programs one by one in ascending order; here, descending."""
    case = typed_case([(2, 300), (1, 20), (1, 1100)], num_heads=4, num_kv_heads=2)
    ascending, indices = attend(case), interpreter.InterpreterBuilder.set_grid_idx

    def reversed_partials(builder, x: int, y: int, z: int) -> None:
        indices(builder, x, builder.grid_dim[1] - 1 - y, z)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "set_grid_idx", reversed_partials)
    assert torch.equal(attend(case), ascending)


def test_counters_may_be_too_few() -> None:
    case = typed_case([(1, 300), (1, 20)], num_heads=2, num_kv_heads=1)
    few = torch.zeros(1, dtype=torch.int32)
    assert torch.equal(paged_attention(*arguments(case), num_sms=FINE, counters=few), attend(case))


def test_prefill_bits_do_not_depend_on_chunks_of_more_than_16() -> None:
    case = typed_case([(80, 130)], num_heads=2, num_kv_heads=1)
    chunks = [attend(case.part(0, first, last)) for first, last in [(0, 31), (31, 48), (48, 80)]]
    assert torch.equal(torch.cat(chunks), attend(case))


def in_chunks(case: Paged, sizes: list[int], *, deterministic: bool) -> Tensor:
    cuts = torch.tensor([0, *sizes]).cumsum(0).tolist()
    return torch.cat([attend(case.part(0, *cut), deterministic=deterministic) for cut in pairwise(cuts)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deterministic_bits_do_not_depend_on_any_chunks(dtype: torch.dtype) -> None:
    case = typed_case([(103, 1100)], dtype, num_heads=2, num_kv_heads=1)
    whole = attend(case, deterministic=True)
    for sizes in ([1, 5, 16, 17, 64], [87, 16]):
        assert torch.equal(in_chunks(case, sizes, deterministic=True), whole)
    both = together([case.part(0, 102, 103), case.part(0, 80, 103)], 80)
    assert torch.equal(attend(both, deterministic=True), torch.cat([whole[-1:], whole[80:]]))
    assert not torch.equal(in_chunks(case, [16, 17, 70], deterministic=False), attend(case))


def test_another_order_of_folding_gives_other_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    case = typed_case([(1, 1200)], num_heads=2, num_kv_heads=1)
    spans = attend(case)
    monkeypatch.setattr(attention_decode, "FOLD", 16)
    assert not torch.equal(attend(case), spans)


@pytest.mark.parametrize("query_len", [1, 17])
def test_a_non_finite_sequence_spoils_no_other(query_len: int) -> None:
    case = typed_case([(query_len, 40), (query_len, 25)], torch.bfloat16, num_heads=2, num_kv_heads=1)
    clean = attend(case)
    case.q_TNH[query_len - 1, 1, 3] = float("nan")
    non_finite = attend(case)
    assert non_finite[query_len - 1, 1].isnan().all()
    non_finite[query_len - 1, 1] = clean[query_len - 1, 1]
    assert torch.equal(non_finite, clean)


def test_how_the_work_is_cut() -> None:
    tiles, cut = attention_decode.decode_tiles, attention_decode.cut_work
    assert tiles(128, 4, 2) == (16, 128) and tiles(256, 7, 4) == (16, 16) and tiles(64, 16, 2) == (32, 128)
    assert cut(8, 32, 132) == attention_decode.WorkCut(32, 64, 8)
    assert cut(8, 256, 132) == attention_decode.WorkCut(64, 64, 8)
    assert cut(128, 256, 132) == attention_decode.WorkCut(32, 0, 8)
    assert (
        cut(136, 256, 132)
        == cut(264, 256, 132)
        == cut(8, 256, 132, is_prompt=True)
        == attention_decode.WorkCut(1, 0, 256)
    )
