"""Token healing by itself: how far a prefix is taken back, and that its text always comes back, in any tokens."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from megatron_infer.text.fim import FimFormat, FimOptions, FimPrompt, load_fim
from megatron_infer.text.healing import Healing, TokenTable, heal
from megatron_infer.text.text_stream import TextStream
from megatron_infer.text.tokenizer import Tokenizer, load_tokenizer
from tests.prompt.test_fim import family_tokenizer
from tests.support.tiny_tokenizer import CORPUS, build_tiny_tokenizer

CODELLAMA = ("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>")
FAMILIES = ["aixcoder", "codellama", "qwen2.5-coder", "codestral", "seed-coder", "none"]
SUFFIX = "\n    return values\n"


class Words(Tokenizer):
    """A vocabulary given as bytes, cut greedily; the last id is a control token."""

    def __init__(self, *texts: bytes) -> None:
        self.vocab_size, self.control_ids, self._texts = len(texts) + 1, frozenset({len(texts)}), [*texts, b""]

    def _encode(self, text: str, dummy_prefix: bool) -> list[int]:
        raise NotImplementedError


def healed(table: TokenTable, ids: list[int]) -> tuple[list[int], bytes]:
    kept, healing = heal(ids, range(len(ids)), table)
    return kept, healing.text if healing else b""


@pytest.fixture(scope="module", params=FAMILIES)
def fim(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[FimFormat, Tokenizer]:
    """SentencePiece with its dummy space, and byte-level BPE; suffix first, suffix last, and no suffix."""
    family, directory = request.param, tmp_path_factory.mktemp("tokenizer")
    if family in ("aixcoder", "codellama"):
        build_tiny_tokenizer(directory, extra_pieces=CODELLAMA if family == "codellama" else ())
        tokenizer = load_tokenizer(directory)
    else:
        tokenizer = family_tokenizer(directory, family)
    return load_fim(family, tokenizer), tokenizer


def test_several_tokens_are_taken_back_to_the_longest_boundary() -> None:
    table = TokenTable(Words(b"a", b"b", b"c", b"abc", b"x", b"abcd"))
    assert healed(table, [4, 0, 1]) == ([4], b"ab"), "abc goes on from a and b"
    assert healed(table, [4, 3]) == ([4], b"abc"), "abcd goes on from abc"
    assert healed(table, [4, 5]) == ([4, 5], b"")
    assert healed(table, [0, 4]) == ([0, 4], b""), "nothing goes on from x"
    assert healed(table, [1, 2]) == ([1, 2], b"")


def test_a_gap_in_the_chain_does_not_hide_a_longer_token() -> None:
    """Nothing goes on from the last token alone, but something does from the last two."""
    table = TokenTable(Words(b"a", b"q", b"aqua", b"z"))
    assert healed(table, [3, 0, 1]) == ([3], b"aq")


def test_the_first_token_of_a_prompt_stays() -> None:
    table = TokenTable(Words(b"a", b"b", b"abc"))
    assert healed(table, [0, 1]) == ([0, 1], b"")
    kept, healing = heal([3, 0, 1], range(1, 3), table)
    assert kept == [3] and healing is not None and healing.text == b"ab"


def test_control_tokens_neither_go_on_nor_are_allowed() -> None:
    table = TokenTable(Words(b"a", b"ab"))
    healing = Healing(b"a", table)
    assert healing.allowed([]) is not None and healing.allowed([]).tolist() == [0, 1]  # type: ignore[union-attr]


def test_a_token_that_leads_to_where_none_fits_is_not_allowed() -> None:
    """After ab no token is or begins with d; after a there is bd."""
    healing = Healing(b"abd", TokenTable(Words(b"a", b"ab", b"bd", b"abde", b"b")))
    assert [None if i is None else i.tolist() for i in map(healing.allowed, ([], [0], [3], [0, 2]))] == [
        [0, 3], [2], None, None,
    ]  # fmt: skip


def test_a_wrong_draft_is_not_bound_by_what_it_has_missed() -> None:
    assert Healing(b"ab", TokenTable(Words(b"a", b"b", b"ab"))).allowed([1]) is None


@pytest.mark.parametrize("order", [None, "psm", "spm"])
def test_any_prefix_comes_back_whole(fim: tuple[FimFormat, Tokenizer], order: str | None) -> None:
    """Whatever of the allowed tokens is drawn: the prefix's text is written anew, and the answer starts behind it."""
    form, tokenizer = fim
    if order is not None and order not in form.orders:
        pytest.skip("the family has one order")
    table, draw = TokenTable(tokenizer), random.Random(4)
    text = CORPUS.split("<s>")[0] + "Zürich, café, naïve, 快速排序算法 🦙"
    num_healed = 0
    for _ in range(150):
        end = draw.randrange(2, len(text) + 1)
        prompt = FimPrompt(text[max(0, end - 60) : end], SUFFIX if form.orders else "")
        encoding = form.encode(prompt, options=FimOptions(order=order))
        at, ids = encoding.prefix, encoding.ids
        kept, healing = heal(ids, at, table)
        if healing is None:
            assert kept == ids
            continue
        num_healed += 1
        num_taken = len(ids) - len(kept)
        assert 0 < num_taken <= len(at)
        assert kept == ids[: at.stop - num_taken] + ids[at.stop :]
        taken = ids[at.stop - num_taken : at.stop]
        assert b"".join(map(tokenizer.token_bytes, taken)) == healing.text
        assert prompt.prefix.encode().endswith(healing.text.lstrip(b" "))
        stream, written, new_ids = TextStream(tokenizer, skip_bytes=len(healing.text)), b"", []
        while (allowed := healing.allowed(new_ids)) is not None:
            assert len(new_ids) == 0 or len(written) < len(healing.text)
            assert allowed.tolist() == sorted(set(allowed.tolist()))
            new_ids.append(draw.choice(allowed.tolist()))
            assert new_ids[-1] not in tokenizer.control_ids
            written = b"".join(map(tokenizer.token_bytes, new_ids))
            assert written.startswith(healing.text[: len(written)])
        shown = "".join(map(stream.feed, new_ids))
        assert written.startswith(healing.text)
        assert written[len(healing.text) :].startswith(shown.encode()), "from the cursor on"
        for position, token_id in enumerate(taken):
            allowed = healing.allowed(taken[:position])
            assert allowed is not None and token_id in allowed, "the prefix's own tokens are one of the ways"
    assert num_healed > 50


def test_the_dummy_space_is_no_part_of_the_answer(tmp_path: Path) -> None:
    """SentencePiece writes the prefix `wor` with a space before it; both are written anew."""
    build_tiny_tokenizer(tmp_path, extra_pieces=("▁word",))
    tokenizer = load_tokenizer(tmp_path)
    encoding = load_fim("aixcoder", tokenizer).encode(FimPrompt("wor", "\n"))
    kept, healing = heal(encoding.ids, encoding.prefix, TokenTable(tokenizer))
    assert healing is not None and healing.text == b" wor"
    assert kept == encoding.ids[: encoding.prefix.start]
    whole = tokenizer.id_of("▁word")
    assert whole is not None and healing.allowed([]) is not None and whole in healing.allowed([])  # type: ignore[operator]
    assert TextStream(tokenizer, skip_bytes=len(healing.text)).feed(whole) == "d"
