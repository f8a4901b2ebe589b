"""GGUF files: every type and architecture reads as the `gguf` package reads it, and damaged files are refused."""

from __future__ import annotations

import struct
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_infer.gguf_header import BLOCKS, GgufHeader
from megatron_infer.model.checkpoint import open_checkpoint
from megatron_infer.model.gguf_file import gguf_config
from megatron_infer.model.weights import gguf_name
from megatron_infer.model_config import ModelConfig
from megatron_infer.sampling_params import SamplingParams
from tests.support.checkpoint_cases import CONFIGS, PLAIN, make_model
from tests.support.gguf_files import interleaved, write_gguf
from tests.support.tiny_models import Tensors, generate_on_ranks, random_tensors, tiny_config

WIDE = replace(PLAIN, hidden_size=256, intermediate_size=512, num_hidden_layers=1, head_dim=16)
"""Rows of whole blocks, also of the 256 weights that K types have."""


def bits(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.ascontiguousarray(values).view(np.uint32)


@pytest.mark.parametrize("config", [WIDE, replace(WIDE, attention_bias=True)], ids=["llama", "qwen2"])
@pytest.mark.parametrize("kind", BLOCKS)
def test_every_type_reads_as_the_gguf_package_reads_it(tmp_path: Path, kind: str, config: ModelConfig) -> None:
    stored = write_gguf(tmp_path / "m.gguf", config, make_model(config), kind)
    with open_checkpoint(tmp_path / "m.gguf") as checkpoint:
        assert checkpoint.kind == "gguf" and "m.gguf" in checkpoint.notes[0]
        for name in checkpoint.names():
            got, truth = checkpoint.read(name), torch.from_numpy(stored[gguf_name(name)])
            if not config.attention_bias and name.split(".")[-2] in ("wq", "wk"):
                got = interleaved(got, config.head_dim)
            assert np.array_equal(bits(got.float().numpy()), bits(truth.numpy())), name


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q6_K"])
def test_slices_of_blocks_are_slices_of_the_whole(tmp_path: Path, kind: str) -> None:
    write_gguf(tmp_path / "m.gguf", WIDE, make_model(WIDE), kind)
    rng = np.random.default_rng(0)
    with open_checkpoint(tmp_path / "m.gguf") as checkpoint:
        for name in ("layers.0.feed_forward.w2.weight", "layers.0.attention.wq.weight"):
            whole = checkpoint.read(name).numpy()
            for _ in range(30):
                rows, cols = (tuple(sorted(map(int, rng.integers(0, n + 1, 2)))) for n in whole.shape)
                got = checkpoint.read(name, rows, cols)
                assert got.is_contiguous()
                assert np.array_equal(bits(got.numpy()), bits(whole[slice(*rows), slice(*cols)])), (name, rows, cols)


@pytest.mark.parametrize("kind", ["F32", "BF16"])
@pytest.mark.parametrize("shape", ["llama", "qwen2"])
def test_answers_are_those_of_the_weights_it_was_made_of(tmp_path: Path, kind: str, shape: str) -> None:
    config = tiny_config(attention_bias=shape == "qwen2")
    dtype = torch.float32 if kind == "F32" else torch.bfloat16
    tensors: Tensors = random_tensors(config, dtype=dtype)
    write_gguf(tmp_path / "m.gguf", config, tensors, kind)
    prompts, greedy = [[5, 6, 7, 8], [9, 10]], SamplingParams(max_new_tokens=8, logprobs=0, ignore_eos=True)
    truth = generate_on_ranks(1, config, tensors, prompts, greedy)
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.config == replace(config, fim=None, torch_dtype=str(dtype).removeprefix("torch."))
        for size in (1, 2):
            assert generate_on_ranks(size, checkpoint.config, checkpoint, prompts, greedy) == truth


def test_quantized_answers_are_the_same_on_two_ranks_and_rounded_again_as_ever(tmp_path: Path) -> None:
    config = tiny_config(hidden_size=256, intermediate_size=512, attention_bias=True)
    write_gguf(tmp_path / "m.gguf", config, random_tensors(config), "Q5_1")
    prompts, greedy = [[5, 6, 7, 8], [9, 10]], SamplingParams(max_new_tokens=8, logprobs=0, ignore_eos=True)
    with open_checkpoint(tmp_path) as checkpoint:
        read = Tensors({name: checkpoint.read(name) for name in checkpoint.names()})
        for quantization in ("none", "int8", "int4"):
            truth = generate_on_ranks(1, config, read, prompts, greedy, quantization=quantization)
            for size in (1, 2):
                got = generate_on_ranks(size, config, checkpoint, prompts, greedy, quantization=quantization)
                assert got == truth, (quantization, size)


def test_settings_become_a_config_under_the_usual_checks(tmp_path: Path) -> None:
    for config in CONFIGS.values():
        ids = {"tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.fim_pre_token_id": 5, "tokenizer.ggml.bos_token_id": 3}
        write_gguf(tmp_path / "m.gguf", config, make_model(config), "F32", ids)
        read = gguf_config(GgufHeader.read(tmp_path / "m.gguf"))
        assert read == replace(config, eos_token_ids=(2, 7, 5), bos_token_id=3, torch_dtype="float32")


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        (
            {"general.architecture": "starcoder2"},
            "architecture 'starcoder2' is not supported; supported: llama, qwen2",
        ),
        ({"llama.rope.scaling.type": "yarn"}, r"llama.rope.scaling.type \(yarn\), which this network does not know"),
        ({"llama.expert_count": 8}, r"llama.expert_count \(8\)"),
        ({"llama.logit_scale": 0.5}, r"llama.logit_scale"),
        ({"llama.attention.head_count_kv": [4, 4]}, r"llama.attention.head_count_kv"),
        ({"llama.attention.sliding_window": 16}, r"llama.attention.sliding_window \(16\)"),
        ({"llama.block_count": None}, "has no llama.block_count"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "has no llama.attention.layer_norm_rms_epsilon"),
        ({"llama.block_count": 4_000_000_000}, "llama.block_count must be an integer from 1 to"),
        ({"llama.block_count": "two"}, "llama.block_count must be an integer from 1 to"),
        ({"llama.embedding_length": 0}, "hidden_size"),
        ({"llama.embedding_length": 64}, "token_embd.weight.* has shape"),
        ({"llama.rope.dimension_count": 2}, "llama.rope.dimension_count is 2, a head has 4"),
        ({"llama.attention.layer_norm_rms_epsilon": "x"}, "llama.attention.layer_norm_rms_epsilon is 'x'"),
        ({"tokenizer.ggml.eos_token_id": 72}, "eos_token_id must be an integer from 0 to 71"),
        ({"split.count": 3}, r"split.count 3\); join the parts with `llama-gguf-split --merge"),
    ],
    ids=str,
)
def test_what_this_network_does_not_have_is_refused(tmp_path: Path, changes: dict[str, Any], error: str) -> None:
    path = tmp_path / "m.gguf"
    if "general.architecture" in changes:
        write_gguf(path, PLAIN, make_model(PLAIN))
        path.write_bytes(path.read_bytes().replace(string("llama"), string("starcoder2"), 1))
    else:
        write_gguf(path, PLAIN, make_model(PLAIN), "BF16", changes)
    with pytest.raises(ValueError, match=error) as caught:
        open_checkpoint(path)
    assert "m.gguf" in str(caught.value)


def test_scaled_rope_biases_that_are_missing_and_foreign_tensors_are_named(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", PLAIN, make_model(PLAIN))
    data = (tmp_path / "m.gguf").read_bytes()
    for old, new, error in (
        ("blk.1.attn_norm.weight", "rope_freqs.weight", "rope_freqs.weight, which this network does not know"),
        ("token_embd.weight", "token_embd.wei", "has no token_embd.weight"),
        ("blk.1.ffn_up.weight", "blk.1.ffn_up_exps.weight", "'blk.1.ffn_up_exps.weight' in .* is not part of"),
    ):
        # The header grows, and the tensors move up to a block further.
        with pytest.raises(ValueError, match=error):
            open_bytes(tmp_path, data.replace(string(old), string(new)) + bytes(64))


def test_without_the_gguf_package_quantized_files_say_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tmp_path / "q.gguf", WIDE, make_model(WIDE), "Q4_0")
    write_gguf(tmp_path / "f.gguf", WIDE, make_model(WIDE), "F16")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"q\.gguf holds quantized weights.* pip install gguf"):
        open_checkpoint(tmp_path / "q.gguf")
    with open_checkpoint(tmp_path / "f.gguf") as checkpoint:
        assert checkpoint.read("norm.weight").dtype == torch.float16


def test_a_directory_with_one_gguf_file_is_that_file(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", PLAIN, make_model(PLAIN))
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.model_dir == tmp_path / "a.gguf"
    write_gguf(tmp_path / "b.gguf", PLAIN, make_model(PLAIN))
    with pytest.raises(ValueError, match=r"several GGUF files; name the one to read.*a\.gguf, b\.gguf"):
        open_checkpoint(tmp_path)


def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", PLAIN, make_model(PLAIN))
    with open_checkpoint(tmp_path) as checkpoint:
        data = (tmp_path / "a.gguf").read_bytes()
        (tmp_path / "a.gguf").write_bytes(data[:-32])
        with pytest.raises(ValueError, match="changed while"):
            checkpoint.read("norm.weight")


# ---- hostile bytes --------------------------------------------------------------------------------------------------


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def header(
    keys: bytes = b"", tensors: bytes = b"", *, num_keys: int = 0, num_tensors: int = 0, version: int = 3
) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_keys) + keys + tensors


def scalar(key: str, value: int) -> bytes:
    return string(key) + struct.pack("<II", 4, value)


def array(key: str, kind: int, count: int, items: bytes = b"") -> bytes:
    return string(key) + struct.pack("<IIQ", 9, kind, count) + items


def info(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def number_of(kind: str) -> int:
    return int(GGMLQuantizationType[kind])


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is not a GGUF file"),
    "other file": (b"PK\x03\x04" * 9, "is not a GGUF file"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid", "it is a Git LFS pointer"),
    "ends in the counts": (header()[:14], "the number of tensors .* beyond the end"),
    "version 1": (header(version=1), "is version 1"),
    "big-endian": (header(version=3 << 24), "is big-endian"),
    "keys": (header(num_keys=1 << 60), "the number of keys is .*, more than"),
    "tensors": (header(num_tensors=1 << 60), "the number of tensors is .*, more than"),
    "key's length": (header(struct.pack("<Q", 1 << 63), num_keys=1), "the length of key 0 is .*, more than"),
    "key's bytes": (header(struct.pack("<Q", 3) + b"\xff\xfe\xfd", num_keys=1), "key 0 is not UTF-8"),
    "type": (header(string("a") + struct.pack("<I", 77), num_keys=1), "'a' is of type 77"),
    "nested": (header(array("a", 9, 1) * 1, num_keys=1), "'a' is of type 9"),
    "numbers": (header(array("a", 10, 1 << 61), num_keys=1), "'a' .* beyond the end"),
    "strings": (header(array("a", 8, 1 << 40), num_keys=1), "more than are read"),
    "string in strings": (header(array("a", 8, 2, string("x")), num_keys=1), "the length of 'a' .* beyond the end"),
    "key twice": (header(scalar("a", 1) * 2, num_keys=2), "key 'a' stands there twice"),
    "alignment 0": (header(scalar("general.alignment", 0), num_keys=1), "general.alignment is 0"),
    "alignment 48": (header(scalar("general.alignment", 48), num_keys=1), "general.alignment is 48"),
    "alignment 2 GiB": (header(scalar("general.alignment", 1 << 31), num_keys=1), "general.alignment is"),
    "dimensions": (header(tensors=string("t") + struct.pack("<I", 9), num_tensors=1), "dimensions of tensor 't' is 9"),
    "no dimension": (header(tensors=info("t", ()), num_tensors=1), r"has shape \[\]"),
    "empty shape": (header(tensors=info("t", (4, 0)), num_tensors=1), r"has shape \[0, 4\]"),
    "part of a block": (header(tensors=info("t", (33, 2), 8), num_tensors=1), "whole blocks of 32 weights"),
    "vector in blocks": (header(tensors=info("t", (32,), 8), num_tensors=1), "whole blocks of 32 weights"),
    "huge shape": (header(tensors=info("t", (1 << 60, 1 << 60)), num_tensors=1), "'t' goes .* beyond the end"),
    "far offset": (header(tensors=info("t", (4,), 0, 1 << 62), num_tensors=1), "'t' goes .* beyond the end"),
    "odd offset": (header(tensors=info("t", (4,), 0, 8), num_tensors=1), "'t', 8, is not a multiple of 32"),
    "tensor twice": (header(tensors=info("t", (4,)) * 2, num_tensors=2), "'t' stands there twice"),
    "overlap": (
        header(tensors=info("t", (4, 4)) + info("u", (4,), 0, 32), num_tensors=2) + bytes(256), "'t' and 'u' overlap",
    ),
    **{
        kind: (header(tensors=info("t", (256, 2), number_of(kind)), num_tensors=1), f"type {kind}, which is not read")
        for kind in ("Q2_K", "IQ2_XXS", "IQ4_NL", "TQ1_0", "MXFP4", "I8", "F64")
    },
    "unknown type": (header(tensors=info("t", (256, 2), 99), num_tensors=1), "type number 99, which is not read"),
}  # fmt: skip


def open_bytes(tmp_path: Path, data: bytes) -> ModelConfig:
    (tmp_path / "hostile.gguf").write_bytes(data)
    with open_checkpoint(tmp_path / "hostile.gguf") as checkpoint:
        return checkpoint.config


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_bytes_are_refused_by_field(tmp_path: Path, case: str) -> None:
    data, error = HOSTILE[case]
    with pytest.raises(ValueError, match=error) as caught:
        open_bytes(tmp_path, data)
    assert "hostile.gguf" in str(caught.value)


@pytest.fixture(scope="module")
def good_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    tokens = {"tokenizer.ggml.tokens": [f"piece{i}" for i in range(72)], "tokenizer.ggml.token_type": [1] * 72}
    write_gguf(path, PLAIN, make_model(PLAIN), "BF16", tokens)
    return path.read_bytes()


@settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_mutated_and_truncated_files_never_crash(tmp_path: Path, good_bytes: bytes, data: st.DataObject) -> None:
    """They load, or are refused with a ValueError; and no more is allocated than a few times the file's size."""
    mutated = bytearray(good_bytes[: data.draw(st.integers(0, len(good_bytes)) | st.just(len(good_bytes)))])
    for _ in range(data.draw(st.integers(0, 4))):
        if mutated:
            at = data.draw(st.integers(0, min(len(mutated), 4096) - 1))
            new = data.draw(st.binary(min_size=1, max_size=8) | st.sampled_from([b"\xff" * 8, bytes(8), b"\x7f" * 4]))
            mutated[at : at + len(new)] = new[: len(mutated) - at]
    refusal = "hostile.gguf"
    tracemalloc.start()
    try:
        open_bytes(tmp_path, bytes(mutated))
    except ValueError as error:
        refusal = str(error)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "hostile.gguf" in refusal
    assert peak_bytes < 10 * len(good_bytes)
