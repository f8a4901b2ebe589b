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

from megatron_infer.text.fim import FimPrompt, load_fim
from megatron_infer.text.text_stream import TextStream
from megatron_infer.text.tokenizer import GUARD, Tokenizer, load_tokenizer
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
code = st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.lists(
    st.sampled_from(
        [*CORPUS.split(" "), "\n", "    ", "\t", "\0", "\r\n", "é", "快", "😀", "▁", *MARKERS, *CONTROL_PIECES[:1]]
    )
).map("".join)
as_upstream = code.filter(lambda text: "<" not in text and "▁" not in text)


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
    assert any_tokenizer.decode(ids) == dummy + text


def test_control_tokens_can_be_named_and_have_no_text(sp, byte_level, llama_like) -> None:
    assert [sp.id_of(piece) for piece in CONTROL_PIECES] == list(range(259, 267))
    assert (sp.bos_id, sp.eos_id, sp.pad_id) == (1, 2, 259)
    assert sp.id_of("no such piece") is None
    assert sp.decode([1, 260, *sp.encode("x", dummy_prefix=False), 262, 2]) == "x"
    tokenizer, raw = byte_level
    for marker in MARKERS:
        assert tokenizer.id_of(marker) == raw.token_to_id(marker)
        # The file calls all of them special but one.
        assert tokenizer.decode([tokenizer.id_of(marker)]) == ("<tool_call>" if marker == "<tool_call>" else "")
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
    assert any_tokenizer.decode(any_tokenizer.encode(text, dummy_prefix=False)) == text
    with_dummy = any_tokenizer.decode(any_tokenizer.encode(text))
    assert with_dummy == (" " + text if text and any_tokenizer.has_dummy_prefix else text)


@given(text=as_upstream)
@settings(max_examples=150, deadline=None)
def test_sentencepiece_ids_are_upstream_s(sp: Tokenizer, raw_sp, text: str) -> None:
    assert sp.encode(text) == raw_sp.encode(text)
    guarded = raw_sp.encode(GUARD + text)
    head = raw_sp.encode(GUARD)
    assert guarded[: len(head)] == head
    assert sp.encode(text, dummy_prefix=False) == guarded[len(head) :]
    ids = sp.encode(text)
    assert sp.decode(ids) == raw_sp.decode([*head, *ids])[1:]


@given(text=as_upstream)
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


@pytest.mark.parametrize("text", ["▁▂▃▄▅▆▇█", "▁", " ▁ ▁▁x", "a▁\n"])
@pytest.mark.parametrize("dummy_prefix", [True, False])
def test_the_space_mark_in_text_stays_itself(any_tokenizer: Tokenizer, text: str, dummy_prefix: bool) -> None:
    dummy = " " if dummy_prefix and any_tokenizer.has_dummy_prefix else ""
    assert any_tokenizer.decode(any_tokenizer.encode(text, dummy_prefix=dummy_prefix)) == dummy + text


# ---- added tokens ---------------------------------------------------------------------------------------------------

FIM = ("<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>", "<|im_end|>")


def write_json(directory: Path, name: str, value: object, *, bom: bool = False) -> None:
    (directory / name).write_text(json.dumps(value), encoding="utf-8-sig" if bom else "utf-8")


def added_entry(content: str, *, special: bool) -> dict[str, object]:
    matching = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"content": content, "special": special, **matching}


@pytest.mark.parametrize("where", ["added_tokens.json", "added_tokens_decoder", "both"])
@pytest.mark.parametrize("bom", [True, False])
def test_a_sentencepiece_model_learns_added_tokens(tmp_path: Path, where: str, bom: bool) -> None:
    build_tiny_tokenizer(tmp_path)
    size = load_tokenizer(tmp_path).vocab_size
    ids = {content: size + i for i, content in enumerate(FIM)}
    config: dict[str, object] = {"eos_token": "<|im_end|>", "add_bos_token": False}
    if where != "added_tokens.json":
        config["added_tokens_decoder"] = {str(i): added_entry(content, special=True) for content, i in ids.items()}
    if where != "added_tokens_decoder":
        write_json(tmp_path, "added_tokens.json", ids, bom=bom)
    write_json(tmp_path, "tokenizer_config.json", config, bom=bom)
    tokenizer = load_tokenizer(tmp_path, size + 100)
    assert tokenizer.vocab_size == size + 5
    assert {content: tokenizer.id_of(content) for content in FIM} == ids
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, size + 4, 259)
    assert not tokenizer.adds_bos
    assert tokenizer.control_ids >= set(ids.values())
    assert tokenizer.decode(ids.values()) == ""
    text = "".join(FIM)
    assert tokenizer.decode(tokenizer.encode(text, dummy_prefix=False)) == text
    assert load_fim("starcoder", tokenizer).encode(FimPrompt("a", "b")).ids[0] == size


def test_added_tokens_that_are_text_keep_it(tmp_path: Path, sp: Tokenizer) -> None:
    build_tiny_tokenizer(tmp_path)
    size = sp.vocab_size
    contents = ("None", "    x", "<div>", "[TODO]", "õ")
    # A gap in the ids, as where a row was left free.
    added = {str(size + 3 + i): added_entry(content, special=False) for i, content in enumerate(contents)}
    write_json(tmp_path, "tokenizer_config.json", {"added_tokens_decoder": added})
    tokenizer = load_tokenizer(tmp_path)
    for i, content in enumerate(contents):
        assert tokenizer.decode([size + 3 + i]) == content
    assert tokenizer.encode("a None", dummy_prefix=False)[-1] == size + 3
    assert tokenizer.encode("õ", dummy_prefix=False) == [size + 7]
    assert not {size, size + 1, size + 2, size + 5, size + 6} & set(tokenizer.encode("<div>[TODO]unused 5"))
    assert tokenizer.encode("def f", dummy_prefix=False) == sp.encode("def f", dummy_prefix=False)
    assert size not in tokenizer._ids.values(), "a gap has no piece"


def test_a_tokenizer_json_learns_what_stands_beside_it(tmp_path: Path) -> None:
    raw = save_byte_level(tmp_path)
    size = raw.get_vocab_size()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {
        str(size): added_entry("<|new|>", special=True),
        str(raw.token_to_id("<tool_call>")): added_entry("<tool_call>", special=True),
    }
    write_json(tmp_path, "tokenizer_config.json", config)
    write_json(tmp_path, "added_tokens.json", {"class_": size + 1})
    write_json(tmp_path, "special_tokens_map.json", {"additional_special_tokens": ["õ", {"content": "<s>"}]})
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.id_of("<|new|>"), tokenizer.id_of("class_")) == (size, size + 1)
    assert tokenizer.decode([size, size + 1, tokenizer.id_of("<tool_call>"), tokenizer.id_of("õ")]) == "class_"
    assert tokenizer.encode("class_") == [size + 1]
    assert tokenizer.id_of("õ") not in tokenizer.encode("õ")


@pytest.mark.parametrize("kind", ["sp", "json"])
def test_added_tokens_without_a_row_are_left_out(tmp_path: Path, caplog, kind: str) -> None:
    if kind == "sp":
        build_tiny_tokenizer(tmp_path)
    else:
        save_byte_level(tmp_path)
    size = load_tokenizer(tmp_path).vocab_size
    before = load_tokenizer(tmp_path).encode("x [PAD] None ", dummy_prefix=False)
    config = {"pad_token": "[PAD]", "added_tokens_decoder": {str(size): added_entry("[PAD]", special=True)}}
    write_json(tmp_path, "tokenizer_config.json", config)
    write_json(tmp_path, "added_tokens.json", {"PAD]": size + 1})
    assert load_tokenizer(tmp_path, size + 1).pad_id == size
    caplog.clear()
    tokenizer = load_tokenizer(tmp_path, size)
    assert tokenizer.vocab_size == size
    assert tokenizer.id_of("[PAD]") is None
    assert tokenizer.encode("x [PAD] None ", dummy_prefix=False) == before
    assert caplog.messages == ["the model has no row for the tokenizer's added '[PAD]', 'PAD]'; left out"]


@pytest.mark.parametrize("token_id", [-1, 3 * 10**8, "7", None, 1.5, True])
def test_added_tokens_with_impossible_ids_are_refused(tmp_path: Path, token_id: object) -> None:
    build_tiny_tokenizer(tmp_path)
    write_json(tmp_path, "added_tokens.json", {"<x>": token_id})
    with pytest.raises(ValueError, match=r"'<x>' with the id .*correct it"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "config", [{"bos_token": {"x": 1}}, {"eos_token": ["</s>"]}, {"added_tokens_decoder": {"x": {}}},
               {"added_tokens_decoder": [3]}, {"additional_special_tokens": [3]}]
)  # fmt: skip
def test_malformed_settings_are_named(tmp_path: Path, config: dict[str, object]) -> None:
    build_tiny_tokenizer(tmp_path)
    write_json(tmp_path, "tokenizer_config.json", config)
    with pytest.raises(ValueError, match=r"tokenizer_config\.json cannot be read"):
        load_tokenizer(tmp_path)


def test_a_byte_order_mark_is_no_harm(tmp_path: Path) -> None:
    save_byte_level(tmp_path)
    expected = load_tokenizer(tmp_path).encode("def f(x):\n")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + (tmp_path / name).read_bytes())
    assert load_tokenizer(tmp_path).encode("def f(x):\n") == expected


def test_a_vocabulary_with_absurd_ids_is_refused(tmp_path: Path) -> None:
    save_byte_level(tmp_path)
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    raw["model"]["vocab"]["def"] = 3 * 10**8
    write_json(tmp_path, "tokenizer.json", raw)
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read .*no integer from 0 to"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("normalizer", "fails_at_load"),
    [
        ({"type": "Replace", "pattern": {"String": ""}, "content": "x"}, True),
        ({"type": "Prepend", "prepend": ""}, True),
        ({"type": "Precompiled", "precompiled_charsmap": "AAAA"}, True),
        ({"type": "Replace", "pattern": {"Regex": "(x+x+)+y"}, "content": "x"}, False),
    ],
    ids=["empty pattern", "empty prefix", "damaged map", "a pattern that backtracks"],
)
def test_a_panic_of_the_library_is_an_error_like_any_other(tmp_path: Path, normalizer, fails_at_load: bool) -> None:
    save_byte_level(tmp_path)
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    write_json(tmp_path, "tokenizer.json", {**raw, "normalizer": normalizer})
    if fails_at_load:
        with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read \(ValueError: .*gave up"):
            load_tokenizer(tmp_path)
        return
    tokenizer = load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"gave up on tokenizer\.json"):
        tokenizer.encode("x" * 60)
    assert tokenizer.decode(tokenizer.encode("def f():")) == "def f():"


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
    with pytest.raises(ValueError, match=r"tokenizer\.json (cannot be read|is of a kind|is not valid|must hold)"):
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


def match_end(text: str, at: int, stop: str) -> int | None:
    """Where `stop` ends that starts at `at`; a bare newline in it may be a CRLF of the text."""
    before = ""
    for character in stop:
        if character == "\n" and before != "\r" and text[at : at + 2] == "\r\n":
            at += 2
        elif text[at : at + 1] == character:
            at += 1
        else:
            return None
        before = character
    return at


def cut_at_first(text: str, stop: tuple[str, ...]) -> tuple[str, str | None]:
    """The definition that streams must meet, written over the whole text."""
    found = [(at, len(s), s) for s in stop for at in range(len(text)) if match_end(text, at, s) is not None]
    return (text[: min(found)[0]], min(found)[2]) if found else (text, None)


def check_stream(tokenizer: Tokenizer, ids: list[int], stop: tuple[str, ...]) -> None:
    stream = TextStream(tokenizer, stop)
    pieces = [stream.feed(i) for i in ids] + [stream.finish()]
    text, matched = cut_at_first(tokenizer.decode(ids), stop)
    assert "".join(pieces) == text
    assert stream.stopped == matched


stops = st.lists(
    st.text("ab\r\né", min_size=1, max_size=4) | st.sampled_from(["return", "\n\n", "self.", "\ufffd", " "]), max_size=4
).map(tuple)


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_streams_equal_the_whole_text_for_any_ids(any_tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, any_tokenizer.vocab_size + 2), max_size=60))
    check_stream(any_tokenizer, ids, data.draw(stops))


@given(text=st.text("ab\r\né😀", max_size=60), stop=stops)
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


@pytest.mark.parametrize("character", ["é", "中", "🦙"])
@pytest.mark.parametrize("stop", [(), ("\n",)])
def test_text_ends_before_a_character_that_only_begins(sp: Tokenizer, character: str, stop: tuple[str, ...]) -> None:
    data = character.encode()
    for cut in range(1, len(data)):
        ids = [3 + byte for byte in b"x" + data[:cut]]
        assert sp.decode(ids) == "x"
        stream = TextStream(sp, stop)
        assert "".join([*map(stream.feed, ids), stream.finish()]) == "x"
    assert sp.decode([3 + byte for byte in data[:1] + b"y"]) == "\ufffdy", "this can never become a character"


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("a\r\nb", "\n", "a"),
        ("a\r\n\r\nb", "\n\n", "a"),
        ("a\r\n\nb", "\n\n", "a"),
        ("a\r\nb\r\nc", "b\nc", "a\r\n"),
        ("a\nb\r\nc", "\r\n", "a\nb"),
        ("a\rb\nc", "\r", "a"),
        ("a\r\nb", "c", "a\r\nb"),
        ("a\r", "\n", "a\r"),
    ],
)
def test_a_newline_in_a_stop_string_is_any_line_end(sp: Tokenizer, text: str, stop: str, expected: str) -> None:
    for ids in (sp.encode(text, dummy_prefix=False), [3 + byte for byte in text.encode()]):
        stream = TextStream(sp, (stop,))
        assert "".join([*map(stream.feed, ids), stream.finish()]) == expected


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
