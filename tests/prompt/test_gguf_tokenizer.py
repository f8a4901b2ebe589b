"""Tokenizers in the metadata of GGUF files: the same ids as the tokenizer they were made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2 as sp_pb2
from tokenizers import decoders, models, pre_tokenizers, trainers

from megatron_infer import LLM, FimPrompt, SamplingParams
from megatron_infer.gguf_header import GgufHeader
from megatron_infer.text.gguf_tokenizer import gguf_tokenizer
from megatron_infer.text.tokenizer import load_tokenizer
from tests.support.gguf_files import add_value, write_gguf
from tests.support.tiny_models import random_tensors, tiny_config
from tests.support.tiny_tokenizer import CORPUS, build_tiny_tokenizer

TEXT = "  x1000 don't 'LL\r\n\n\tfn(a,b)快速é"
WORDS = {
    "gpt-2": "Ġ|Ġx|1000|Ġdon|'t|Ġ'|LL|čĊĊ|ĉ|fn|(|a|,|b|)|å¿«éĢŁÃ©",
    "mellum": "Ġ|Ġx|1000|Ġdon|'t|Ġ'|LL|čĊĊ|ĉ|fn|(|a|,|b|)|å¿«éĢŁÃ©",
    **dict.fromkeys(
        ("starcoder", "refact", "smollm", "codeshell"),
        "Ġ|Ġx|1|0|0|0|Ġdon|'t|Ġ'|LL|čĊĊ|ĉ|fn|(|a|,|b|)|å¿«éĢŁÃ©",
    ),
    "qwen2": "Ġ|Ġx|1|0|0|0|Ġdon|'t|Ġ'|LL|čĊĊ|ĉfn|(a|,b|)å¿«éĢŁÃ©",
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), "Ġ|Ġx|100|0|Ġdon|'t|Ġ'|LL|čĊĊ|ĉfn|(a|,b|)å¿«éĢŁÃ©"),
    "seed-coder": "Ġ|Ġx|1|0|0|0|Ġdon|'t|Ġ'|LL|čĊĊ|ĉfn|(a|,b|)å¿«éĢŁÃ©",
    "tekken": "Ġ|Ġx|1|0|0|0|Ġdon|'t|Ġ'|LL|čĊĊ|ĉfn|(a|,b|)å¿«éĢŁÃ©",
    "deepseek-coder": "Ġ|Ġx|1|0|0|0|Ġdon|'|t|Ġ'|LL|č|Ċ|Ċ|ĉfn|(|a|,|b|)|å¿«éĢŁ|Ã©",
}
"""How each kind of pre-tokenizer cuts TEXT, in the byte-level alphabet: Ġ space, ĉ tab, Ċ and č the line ends."""


def save_metadata(path: Path, metadata: dict[str, Any]) -> Path:
    """A GGUF file without tensors; keys without "tokenizer.ggml." in front."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        if value is not None:
            add_value(writer, f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="session")
def byte_level() -> dict[str, Any]:
    """Tokens, types and merges of a small byte-level tokenizer with tokens of every type."""
    tok = tokenizers.Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tok.train_from_iterator(CORPUS.split("\n"), trainer)
    model = json.loads(tok.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    merges = [" ".join(pair) for pair in model["merges"]]
    added = {"<s>": 3, "<|end|>": 3, "    ": 4, "def ": 4, "[PAD]": 5, "[PAD2]": 5}
    return {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": [*tokens, *added],
        "token_type": [1] * len(tokens) + list(added.values()),
        "merges": merges,
        "bos_token_id": len(tokens),
        "eos_token_id": len(tokens) + 1,
    }


@pytest.mark.parametrize("name", WORDS)
def test_pre_tokenizers_cut_where_the_models_own_do(tmp_path: Path, byte_level: dict[str, Any], name: str) -> None:
    path = save_metadata(tmp_path / "t.gguf", {**byte_level, "pre": name})
    raw, _ = gguf_tokenizer(GgufHeader.read(path))
    encoder = tokenizers.Tokenizer.from_str(json.dumps(raw))
    words = [word for word, _ in encoder.pre_tokenizer.pre_tokenize_str(TEXT)]
    assert "|".join(words) == WORDS[name]
    loaded = load_tokenizer(path)
    for text in (TEXT, CORPUS, "\r\n\r\n  \t\t\n", "0123456789" * 3):
        assert loaded.decode(loaded.encode(text)) == text


def test_only_qwen_normalizes(tmp_path: Path, byte_level: dict[str, Any]) -> None:
    for name in WORDS:
        loaded = load_tokenizer(save_metadata(tmp_path / "t.gguf", {**byte_level, "pre": name}))
        assert (loaded.decode(loaded.encode("e\u0301")) == "\u00e9") is (name == "qwen2")


def test_token_types_and_special_ids(tmp_path: Path, byte_level: dict[str, Any]) -> None:
    loaded = load_tokenizer(save_metadata(tmp_path / "t.gguf", byte_level))
    first = byte_level["bos_token_id"]
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id, loaded.adds_bos) == (first, first + 1, None, False)
    assert {first, first + 1} <= loaded.control_ids
    assert not {first, first + 1} & set(loaded.encode("<s>x<|end|>"))
    assert loaded.encode("def     x")[:2] == [first + 3, first + 2]
    assert loaded.token_bytes(first + 2) == b"    "
    assert loaded.vocab_size == first + 4 and loaded.id_of("[PAD]") is None
    adding = load_tokenizer(save_metadata(tmp_path / "t.gguf", {**byte_level, "add_bos_token": True}))
    assert adding.adds_bos
    assert load_tokenizer(save_metadata(tmp_path / "t.gguf", {**byte_level, "pre": "llama-bpe"})).adds_bos


@pytest.fixture(scope="session")
def sentencepiece_metadata(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = build_tiny_tokenizer(tmp_path_factory.mktemp("sp"))
    proto = sp_pb2.ModelProto.FromString(path.read_bytes())
    return {
        "model": "llama",
        "tokens": [p.piece for p in proto.pieces],
        "scores": [p.score for p in proto.pieces],
        "token_type": [p.type for p in proto.pieces],
        "unknown_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


@pytest.mark.parametrize("dummy_prefix", [True, False])
def test_a_sentencepiece_model_comes_back(
    tmp_path: Path, sentencepiece_metadata: dict[str, Any], dummy_prefix: bool
) -> None:
    directory = build_tiny_tokenizer(tmp_path).parent
    proto = sp_pb2.ModelProto.FromString((directory / "tokenizer.model").read_bytes())
    proto.normalizer_spec.add_dummy_prefix = dummy_prefix
    (directory / "tokenizer.model").write_bytes(proto.SerializeToString())
    truth = load_tokenizer(directory)
    metadata = {**sentencepiece_metadata, "add_space_prefix": dummy_prefix}
    loaded = load_tokenizer(save_metadata(tmp_path / "t.gguf", metadata))
    assert (loaded.bos_id, loaded.eos_id, loaded.adds_bos) == (truth.bos_id, truth.eos_id, truth.adds_bos)
    assert (loaded.control_ids, loaded.has_dummy_prefix) == (truth.control_ids, truth.has_dummy_prefix)
    for text in (*CORPUS.split("\n"), CORPUS, "  two", "快速é\t\0😀", "<s>▁<AIX-SPAN-PRE>"):
        for with_space in (True, False):
            assert loaded.encode(text, dummy_prefix=with_space) == truth.encode(text, dummy_prefix=with_space)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"model": "bert"}, "tokenizer 'bert' of 406 tokens is not known"),
        ({"model": None}, "tokenizer None"),
        ({"tokens": None}, "tokenizer 'gpt2' of 0 tokens"),
        ({"tokens": "abc"}, "tokenizer.ggml.tokens is 'abc', which is not of type list"),
        ({"pre": "default"}, "pre-tokenizer 'default' is not known; known: gpt-2"),
        ({"pre": None}, "pre-tokenizer None is not known"),
        ({"token_type": [1, 2]}, "tokenizer.ggml.token_type is not an array of 406 numbers"),
        ({"eos_token_id": 406}, "'eos': 406.* is not below 406"),
        ({"merges": ["one"]}, "t.gguf cannot be read"),
        ({"merges": ["q zz"]}, "t.gguf cannot be read"),
        ({"model": "llama"}, "tokenizer.ggml.scores is not an array of 406 numbers"),
        ({"add_bos_token": 1}, "tokenizer.ggml.add_bos_token is '1', which is not of type bool"),
    ],
    ids=str,
)
def test_what_is_not_known_is_refused(
    tmp_path: Path, byte_level: dict[str, Any], changes: dict[str, Any], error: str
) -> None:
    path = save_metadata(tmp_path / "t.gguf", {**byte_level, **changes})
    with pytest.raises(ValueError, match=error) as caught:
        load_tokenizer(path)
    assert "t.gguf" in str(caught.value)


def test_a_token_that_stands_there_twice_is_refused(tmp_path: Path, byte_level: dict[str, Any]) -> None:
    tokens = [*byte_level["tokens"][:-1], byte_level["tokens"][0]]
    with pytest.raises(ValueError, match="has a token twice"):
        load_tokenizer(save_metadata(tmp_path / "t.gguf", {**byte_level, "tokens": tokens}))


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_mutated_metadata_loads_or_is_refused(
    tmp_path: Path, byte_level: dict[str, Any], sentencepiece_metadata: dict[str, Any], data: st.DataObject
) -> None:
    path = save_metadata(tmp_path / "t.gguf", data.draw(st.sampled_from([byte_level, sentencepiece_metadata])))
    mutated = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(mutated) - 8))
        new = data.draw(st.binary(min_size=1, max_size=8))
        mutated[at : at + len(new)] = new
    path.write_bytes(mutated)
    refusal = "t.gguf"
    try:
        load_tokenizer(path).encode("def f(x):")
    except ValueError as error:
        refusal = str(error)
    assert "t.gguf" in refusal


def test_one_file_is_a_whole_checkpoint(tmp_path: Path, sentencepiece_metadata: dict[str, Any]) -> None:
    """Completions from the file alone, on one rank and on two; without a FIM family in it, plain continuation."""
    num_tokens = len(sentencepiece_metadata["tokens"])
    config = tiny_config(vocab_size=num_tokens, max_position_embeddings=128)
    metadata = {f"tokenizer.ggml.{key}": value for key, value in sentencepiece_metadata.items()}
    write_gguf(tmp_path / "m.gguf", config, random_tensors(config), "F32", metadata)
    prompt, sampling = FimPrompt("def area(w, h):\n", "\n", "a.py"), SamplingParams(max_new_tokens=6)
    answers = []
    for path, size in ((tmp_path / "m.gguf", 1), (tmp_path, 2)):
        with LLM(path, tensor_parallel_size=size, device="cpu", max_model_len=64) as llm:
            assert llm.fim.name == "aixcoder"
            answers.append(llm.complete(prompt, sampling).token_ids)
    assert answers[0] == answers[1] and answers[0]
