"""`gguf2megatron`: the same weights, to bf16 or rounded again, and a tokenizer that gives the same ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
import transformers
from sentencepiece import sentencepiece_model_pb2 as sp_pb2
from tokenizers.pre_tokenizers import ByteLevel

from checkpoints_convert.__main__ import main
from megatron_infer.model.checkpoint import open_checkpoint
from megatron_infer.model.formats import Slice, pack_int4, quantize, read_quantized
from megatron_infer.ops import INT4
from megatron_infer.text.tokenizer import load_tokenizer
from tests.support.gguf_files import write_gguf
from tests.support.tiny_models import random_tensors, tiny_config
from tests.support.tiny_tokenizer import CORPUS, build_tiny_tokenizer


@pytest.fixture(scope="module", params=["llama, SentencePiece", "qwen2, byte-level"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("gguf")
    metadata: dict[str, Any]
    if request.param.startswith("llama"):
        proto = sp_pb2.ModelProto.FromString(build_tiny_tokenizer(directory).read_bytes())
        metadata = {
            "model": "llama",
            "tokens": [p.piece for p in proto.pieces],
            "scores": [p.score for p in proto.pieces],
            "token_type": [p.type for p in proto.pieces],
        }
    else:
        alphabet = sorted(ByteLevel.alphabet())
        tokens = [*alphabet, "Ġd", "ef", "Ġdef", "<s>", "<e>", "[PAD]"]
        types = [1] * (len(tokens) - 3) + [3, 3, 5]
        metadata = {"model": "gpt2", "pre": "qwen2", "tokens": tokens, "token_type": types}
        metadata |= {"merges": ["Ġ d", "e f", "Ġd ef"], "add_bos_token": False}
    config = tiny_config(
        vocab_size=len(metadata["tokens"]), hidden_size=256, intermediate_size=512,
        attention_bias=request.param.startswith("qwen2"), bos_token_id=259, eos_token_ids=(260,), num_hidden_layers=1,
    )  # fmt: skip
    keys = {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    write_gguf(directory / "m.gguf", config, random_tensors(config), "Q5_0", keys)
    return directory / "m.gguf"


@pytest.mark.parametrize("fmt", ["sharded", "hf", "pt"])
def test_weights_become_bf16_and_the_tokenizer_files(source: Path, tmp_path: Path, fmt: str) -> None:
    command = ["gguf2megatron", str(source), str(tmp_path / "out"), "--quiet", "--format", fmt]
    assert main(command) == 0
    with open_checkpoint(source) as a, open_checkpoint(tmp_path / "out") as b:
        assert b.config == a.config
        for name in a.names():
            assert torch.equal(a.read(name).bfloat16(), b.read(name)), name
    ours, theirs = load_tokenizer(source), load_tokenizer(tmp_path / "out")
    assert ours.control_ids == theirs.control_ids
    assert (ours.bos_id, ours.eos_id, ours.adds_bos) == (theirs.bos_id, theirs.eos_id, theirs.adds_bos)
    assert ours.encode(CORPUS) == theirs.encode(CORPUS)


def test_transformers_reads_the_tokenizer_that_is_written(source: Path, tmp_path: Path) -> None:
    assert main(["gguf2megatron", str(source), str(tmp_path / "out"), "--quiet", "--format", "hf"]) == 0
    if (tmp_path / "out" / "tokenizer.model").is_file():
        theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "out" / "tokenizer.model"))
        assert theirs.encode("def f") == load_tokenizer(source).encode("def f")
    else:
        theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
        text = CORPUS.split("<s>")[0]  # transformers takes control tokens out of text
        assert theirs(text, add_special_tokens=False)["input_ids"] == load_tokenizer(source).encode(text)


@pytest.mark.parametrize("fmt", ["int8", "int4"])
def test_blocks_are_rounded_again_from_fp32(source: Path, tmp_path: Path, fmt: str) -> None:
    assert main(["gguf2megatron", str(source), str(tmp_path / "out"), "--quiet", "--format", fmt]) == 0
    dtype = torch.int8 if fmt == "int8" else INT4
    with open_checkpoint(source) as a, open_checkpoint(tmp_path / "out") as b:
        assert b.config.quantization is not None and b.config.quantization.format == fmt
        name = "layers.0.feed_forward.w2"
        values, scales = quantize(a.read(f"{name}.weight"), dtype)
        got, got_scales = read_quantized(b, Slice(name), dtype, 32)
        assert torch.equal(got, values if fmt == "int8" else pack_int4(values))
        assert torch.equal(got_scales, scales)
        assert b.dtype_of("tok_embeddings.weight") == torch.bfloat16


def test_a_tokenizer_that_is_not_known_stops_it_before_anything_is_written(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(source.read_bytes().replace(b"tokenizer.ggml.model", b"tokenizer.ggml.mudel"))
    assert main(["gguf2megatron", str(broken), str(tmp_path / "out")]) == 2
    assert "broken.gguf: tokenizer None" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
