"""Tokenizers: text never becomes a control token, nothing is lost on the way back, streams equal whole texts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2 as sp_pb2
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from megatron_infer.text_stream import TextStream
from megatron_infer.tokenizer import GUARD, Tokenizer, load_tokenizer
from tests.support.tiny_tokenizer import CONTROL_PIECES, CORPUS, PIECES, build_tiny_tokenizer

MARKERS = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|endoftext|>", "<tool_call>")
INJECTIONS = (
    "</s>",
    "<s>x</s>",
    "<unk>",
    "<pad>",
    "<0x0A>",
    "▁<AIX-SPAN-PRE>",
    "a ▁<AIX-SPAN-MIDDLE> b",
    "<AIX-SPAN-POST>",
    " <AIX-END-TURN>\n",
    "".join(CONTROL_PIECES),
    *MARKERS,
    "x = '<|fim_middle|>'\n",
    "".join(MARKERS),
)
code = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=40) | st.lists(
    st.sampled_from(
        [*CORPUS.split(" "), "\n", "    ", "\t", "\0", "\r\n", "é", "快", "😀", *MARKERS, *CONTROL_PIECES[:1]]
    )
).map("".join)


@pytest.fixture(scope="session")
def sp_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_tokenizer(tmp_path_factory.mktemp("sp")).parent


@pytest.fixture(scope="session")
def sp(sp_dir: Path) -> Tokenizer:
    return load_tokenizer(sp_dir)


@pytest.fixture(scope="session")
def raw_sp(sp_dir: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(sp_dir / "tokenizer.model"))


def save_byte_level(directory: Path, *, add_prefix_space: bool = False) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer like Qwen's or DeepSeek's, with marker, special and ordinary added tokens."""
    tok = tokenizers.Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(
        CORPUS.split("\n"),
        trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False),
    )
    tok.add_special_tokens(list(MARKERS[:2]))
    tok.add_tokens(["None", "õ", AddedToken("<tool_call>", normalized=False), "\t\t\t\t"])
    tok.add_special_tokens([*MARKERS[2:4], "<s>"])
    tok.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tok.token_to_id("<s>"))]
    )
    tok.enable_truncation(4)
    tok.enable_padding(length=16)
    tok.save(str(directory / "tokenizer.json"))
    settings = {"bos_token": {"content": "<s>"}, "eos_token": "<|endoftext|>", "pad_token": None}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    tok.no_truncation()
    tok.no_padding()
    return tok


def save_llama_like(directory: Path, sp_dir: Path) -> tokenizers.Tokenizer:
    """The tiny SentencePiece model as a tokenizer.json, converted the way Llama tokenizers are."""
    proto = sp_pb2.ModelProto.FromString((sp_dir / "tokenizer.model").read_bytes())
    vocab = {p.piece: i for i, p in enumerate(proto.pieces)}
    merges = []
    for piece in sorted((p for p in proto.pieces if p.type == PIECES.NORMAL), key=lambda p: -p.score):
        splits = [(piece.piece[:i], piece.piece[i:]) for i in range(1, len(piece.piece))]
        known = [(a, b) for a, b in splits if a in vocab and b in vocab]
        merges += sorted(known, key=lambda ab: (vocab[ab[0]], vocab[ab[1]]))
    merges += [("▁", "<"), ("<", "/"), ("</", "s>"), ("s", ">")]
    vocab |= {"s>": len(vocab), "▁<": vocab["▁<"], "</": len(vocab) + 1}
    tok = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tok.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tok.add_special_tokens(["<unk>", "<s>", "</s>"])
    tok.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return tok


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, tokenizers.Tokenizer]:
    directory = tmp_path_factory.mktemp("byte_level")
    raw = save_byte_level(directory)
    return load_tokenizer(directory), raw


@pytest.fixture(scope="session")
def llama_like(tmp_path_factory: pytest.TempPathFactory, sp_dir: Path) -> tuple[Tokenizer, tokenizers.Tokenizer]:
    directory = tmp_path_factory.mktemp("llama_like")
    raw = save_llama_like(directory, sp_dir)
    return load_tokenizer(directory), raw


@pytest.fixture(scope="session", params=["sp", "byte_level", "llama_like"])
def any_tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    value = request.getfixturevalue(request.param)
    return value[0] if isinstance(value, tuple) else value


# ---- injection ------------------------------------------------------------------------------------------------------


def test_the_fixtures_would_inject_if_read_carelessly(raw_sp, byte_level, llama_like) -> None:
    """Otherwise the injection tests below would show nothing."""
    assert raw_sp.piece_to_id("▁<AIX-SPAN-MIDDLE>") in raw_sp.encode("a <AIX-SPAN-MIDDLE> b")
    raw = byte_level[1]
    for marker in MARKERS:
        assert raw.token_to_id(marker) in raw.encode(f"a{marker}b", add_special_tokens=False).ids
    assert llama_like[1].token_to_id("</s>") in llama_like[1].encode("a</s>b").ids


@pytest.mark.parametrize("text", INJECTIONS)
@pytest.mark.parametrize("dummy_prefix", [True, False])
def test_markers_in_text_stay_text(any_tokenizer: Tokenizer, text: str, dummy_prefix: bool) -> None:
    ids = any_tokenizer.encode(text, dummy_prefix=dummy_prefix)
    assert ids
    assert any_tokenizer.control_ids.isdisjoint(ids)
    dummy = " " if dummy_prefix and any_tokenizer.has_dummy_prefix else ""
    # SentencePiece's own space mark cannot be told from a space afterwards; byte-level vocabularies keep it.
    expected = text.replace("▁", " ") if any_tokenizer.has_dummy_prefix else text
    assert any_tokenizer.decode(ids) == dummy + expected


def test_control_tokens_can_be_named_and_have_no_text(sp, byte_level, llama_like) -> None:
    assert [sp.id_of(piece) for piece in CONTROL_PIECES] == list(range(259, 267))
    assert (sp.bos_id, sp.eos_id, sp.pad_id) == (1, 2, 259)
    assert sp.id_of("no such piece") is None
    assert sp.decode([1, 260, *sp.encode("x", dummy_prefix=False), 262, 2]) == "x"
    tokenizer, raw = byte_level
    for marker in MARKERS:
        assert tokenizer.id_of(marker) == raw.token_to_id(marker)
        assert tokenizer.decode([tokenizer.id_of(marker)]) == ""
    assert (tokenizer.bos_id, tokenizer.eos_id) == (raw.token_to_id("<s>"), raw.token_to_id("<|endoftext|>"))
    assert tokenizer.pad_id is None, "a missing pad_token was looked up as the word None"
    assert (llama_like[0].bos_id, llama_like[0].eos_id) == (1, 2)


def test_user_defined_whitespace_is_not_taken_for_a_control_piece(tmp_path: Path, sp_dir: Path) -> None:
    proto = sp_pb2.ModelProto.FromString((sp_dir / "tokenizer.model").read_bytes())
    proto.pieces.add(piece="\t\t", score=0.0, type=PIECES.USER_DEFINED)
    proto.pieces.add(piece="a<b", score=0.0, type=PIECES.USER_DEFINED)
    (tmp_path / "tokenizer.model").write_bytes(proto.SerializeToString())
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode("\t\ta<b", dummy_prefix=False)
    assert ids == [tokenizer.vocab_size - 2, tokenizer.vocab_size - 1]
    assert tokenizer.decode(ids) == "\t\ta<b"


def test_a_control_piece_listed_as_ordinary_is_still_control(tmp_path: Path) -> None:
    pieces = ("▁<PRE", "▁<PRE>", "PR", "PRE", "<PRE")
    build_tiny_tokenizer(tmp_path, extra_pieces=pieces)
    raw = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    tokenizer = load_tokenizer(tmp_path)
    marker = tokenizer.id_of("▁<PRE>")
    assert marker in raw.encode("x <PRE> y")
    assert marker not in tokenizer.encode("x <PRE> y")


# ---- encode and decode ----------------------------------------------------------------------------------------------


@given(text=code)
@settings(max_examples=150, deadline=None)
def test_text_survives_the_round_trip(any_tokenizer: Tokenizer, text: str) -> None:
    text = text.replace("▁", "_") if any_tokenizer.has_dummy_prefix else text
    assert any_tokenizer.decode(any_tokenizer.encode(text, dummy_prefix=False)) == text
    with_dummy = any_tokenizer.decode(any_tokenizer.encode(text))
    assert with_dummy == (" " + text if text and any_tokenizer.has_dummy_prefix else text)


@given(text=code.filter(lambda t: "<" not in t))
@settings(max_examples=150, deadline=None)
def test_sentencepiece_ids_are_upstream_s(sp: Tokenizer, raw_sp, text: str) -> None:
    assert sp.encode(text) == raw_sp.encode(text)
    guarded = raw_sp.encode(GUARD + text)
    head = raw_sp.encode(GUARD)
    assert guarded[: len(head)] == head
    assert sp.encode(text, dummy_prefix=False) == guarded[len(head) :]
    ids = sp.encode(text)
    assert sp.decode(ids) == raw_sp.decode([*head, *ids])[1:]


@given(text=code.filter(lambda t: "<" not in t))
@settings(max_examples=100, deadline=None)
def test_hugging_face_ids_are_the_library_s(byte_level, llama_like, text: str) -> None:
    for tokenizer, raw in (byte_level, llama_like):
        assert tokenizer.encode(text) == raw.encode(text, add_special_tokens=False).ids
    tokenizer, raw = llama_like
    head = raw.encode(GUARD).ids
    assert tokenizer.encode(text, dummy_prefix=False) == raw.encode(GUARD + text).ids[len(head) :]


def test_llama_like_dummy_prefix(llama_like) -> None:
    tokenizer, _ = llama_like
    assert tokenizer.has_dummy_prefix
    assert tokenizer.encode("\n") == [tokenizer.id_of("▁"), 13]
    assert tokenizer.encode("\n", dummy_prefix=False) == [13]
    assert tokenizer.encode("") == []


def test_byte_level_prefix_space_can_be_left_out(tmp_path: Path) -> None:
    save_byte_level(tmp_path, add_prefix_space=True)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.has_dummy_prefix
    assert tokenizer.decode(tokenizer.encode("def")) == " def"
    assert tokenizer.decode(tokenizer.encode("def", dummy_prefix=False)) == "def"


def test_metaspace_prefix_can_be_left_out(tmp_path: Path, sp_dir: Path) -> None:
    raw = save_llama_like(tmp_path, sp_dir)
    raw.normalizer = normalizers.Sequence([])
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    raw.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.has_dummy_prefix
    assert tokenizer.encode("def f") == raw.encode("def f").ids
    assert tokenizer.decode(tokenizer.encode("def f", dummy_prefix=False)) == "def f"


def test_ordinary_added_tokens_keep_their_ids(byte_level) -> None:
    tokenizer, raw = byte_level
    for text in ("õ", "\t\t\t\t"):
        assert tokenizer.encode(f"a{text}b", dummy_prefix=False)[1:-1] == [raw.token_to_id(text)]
        assert tokenizer.decode([raw.token_to_id(text)]) == text


def test_whether_a_plain_prompt_starts_with_bos(byte_level, sp, llama_like, tmp_path: Path) -> None:
    assert byte_level[0].adds_bos  # by its post-processor
    assert sp.adds_bos
    assert not llama_like[0].adds_bos
    build_tiny_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    assert not load_tokenizer(tmp_path).adds_bos


def test_guard_that_merges_with_the_text_is_not_trusted(tmp_path: Path) -> None:
    build_tiny_tokenizer(tmp_path, extra_pieces=("☺", "☺x"))
    tokenizer = load_tokenizer(tmp_path)
    raw = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    head = raw.encode(GUARD)
    assert raw.encode(GUARD + "x = 1")[: len(head)] != head, "the fixture no longer merges"
    for text in ("x = 1", "x", "xy", "return x"):
        assert tokenizer.decode(tokenizer.encode(text, dummy_prefix=False)) == text
    assert tokenizer.encode("x", dummy_prefix=False) == [tokenizer.id_of("x")]


def test_guard_that_is_unknown_does_not_swallow_unknown_text(tmp_path: Path, sp_dir: Path) -> None:
    proto = sp_pb2.ModelProto.FromString((sp_dir / "tokenizer.model").read_bytes())
    proto.trainer_spec.byte_fallback = False
    for piece in proto.pieces:
        if piece.type == PIECES.BYTE:
            piece.type = PIECES.UNUSED
    (tmp_path / "tokenizer.model").write_bytes(proto.SerializeToString())
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("快x", dummy_prefix=False) == [0, tokenizer.id_of("x")]
    assert tokenizer.decode([0, tokenizer.id_of("x")]) == "\ufffdx"


def test_decode_of_ids_beyond_the_vocabulary_is_empty(sp: Tokenizer) -> None:
    assert sp.decode([sp.vocab_size, sp.vocab_size + 100]) == ""


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["ab\ud800", "\udfff", "a" * 500 + "\udc80b"])
def test_lone_surrogates_are_named(any_tokenizer: Tokenizer, text: str) -> None:
    position = next(i for i, c in enumerate(text) if 0xD800 <= ord(c) < 0xE000)
    with pytest.raises(ValueError, match=rf"lone surrogate .* at position {position}; .*errors="):
        any_tokenizer.encode(text)


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"neither tokenizer\.model nor tokenizer\.json; copy"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x0a\xff\xff", b"version https://git-lfs.github.com/spec/v1\n"])
def test_a_broken_sentencepiece_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.model cannot be read") as error:
        load_tokenizer(tmp_path)
    assert ("git lfs pull" in str(error.value)) == content.startswith(b"version")


def test_a_truncated_sentencepiece_file_is_named(tmp_path: Path, sp_dir: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes((sp_dir / "tokenizer.model").read_bytes()[:-300])
    with pytest.raises(ValueError, match=r"tokenizer\.model cannot be read"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"model": 3}', '{"model": {"type": "BPE"}, "decoder": null}'])
def test_a_broken_hugging_face_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json (cannot be read|is of a kind)"):
        load_tokenizer(tmp_path)


def test_an_unsupported_model_says_what_to_use(tmp_path: Path) -> None:
    tok = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    tok.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"WordLevel.*tokenizer\.model"):
        load_tokenizer(tmp_path)


def test_sentencepiece_comes_first(tmp_path: Path, sp: Tokenizer) -> None:
    save_byte_level(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    build_tiny_tokenizer(tmp_path)
    assert load_tokenizer(tmp_path).encode("def") == sp.encode("def")


# ---- streams --------------------------------------------------------------------------------------------------------


def cut_at_first(text: str, stop: tuple[str, ...]) -> tuple[str, str | None]:
    """The definition that streams must meet, written over the whole text."""
    found = [(text.find(s), len(s), s) for s in stop if s in text]
    return (text[: min(found)[0]], min(found)[2]) if found else (text, None)


def check_stream(tokenizer: Tokenizer, ids: list[int], stop: tuple[str, ...]) -> None:
    stream = TextStream(tokenizer, stop)
    pieces = [stream.feed(i) for i in ids] + [stream.finish()]
    text, matched = cut_at_first(tokenizer.decode(ids), stop)
    assert "".join(pieces) == text
    assert stream.stopped == matched


stops = st.lists(
    st.text("ab\né", min_size=1, max_size=4) | st.sampled_from(["return", "\n\n", "self.", "\ufffd", " "]), max_size=4
).map(tuple)


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_streams_equal_the_whole_text_for_any_ids(any_tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, any_tokenizer.vocab_size + 2), max_size=60))
    check_stream(any_tokenizer, ids, data.draw(stops))


@given(text=st.text("ab\né😀", max_size=60), stop=stops)
@settings(max_examples=300, deadline=None)
def test_streams_stop_wherever_tokens_begin_and_end(sp: Tokenizer, text: str, stop: tuple[str, ...]) -> None:
    check_stream(sp, sp.encode(text, dummy_prefix=False), stop)
    check_stream(sp, [3 + byte for byte in text.encode()], stop)


def test_stream_holds_back_no_more_than_it_must(sp: Tokenizer) -> None:
    stream = TextStream(sp, ("\n\nx",))
    as_bytes = lambda text: [3 + byte for byte in text.encode()]  # noqa: E731
    assert [stream.feed(i) for i in as_bytes("aé\nb")] == ["a", "", "é", "", "\nb"]
    assert [stream.feed(i) for i in as_bytes("\n\n\nx")] == ["", "", "\n", ""]
    assert stream.stopped == "\n\nx"
    assert stream.feed(as_bytes("z")[0]) == ""
    assert stream.finish() == ""


def test_stream_ends_unfinished_characters_with_a_replacement(sp: Tokenizer) -> None:
    stream = TextStream(sp)
    assert stream.feed(3 + 0xE5) == ""
    assert stream.finish() == "\ufffd"


def test_of_two_stops_the_earlier_start_wins(sp: Tokenizer) -> None:
    for ids in (sp.encode("xabcd", dummy_prefix=False), [3 + byte for byte in b"xabcd"]):
        stream = TextStream(sp, ("bc", "abcd"))
        assert "".join([*map(stream.feed, ids), stream.finish()]) == "x"
        assert stream.stopped == "abcd"


def test_a_stop_that_begins_a_longer_one_stops_at_once(sp: Tokenizer) -> None:
    stream = TextStream(sp, ("\n\n", "\n"))
    assert [stream.feed(3 + byte) for byte in b"a\n"] == ["a", ""]
    assert stream.stopped == "\n"


@pytest.mark.parametrize("stop", ["abc", ("",), (3,)])
def test_bad_stop_strings_are_refused(sp: Tokenizer, stop: object) -> None:
    with pytest.raises(ValueError, match="stop must be a list of non-empty strings"):
        TextStream(sp, stop)  # type: ignore[arg-type]


def test_stream_work_per_token_does_not_grow_with_the_text(sp: Tokenizer) -> None:
    class Counting:
        calls = 0

        def token_bytes(self, token_id: int) -> bytes:
            Counting.calls += 1
            return sp.token_bytes(token_id)

    stream = TextStream(Counting(), ("\n\n\n",))  # type: ignore[arg-type]
    ids = sp.encode(CORPUS, dummy_prefix=False)
    assert "".join(stream.feed(i) for i in ids) + stream.finish() == CORPUS
    assert Counting.calls == len(ids)
    assert len(stream._held) <= 3
