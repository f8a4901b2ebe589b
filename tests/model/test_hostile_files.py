"""Files made to hurt: each is refused by file and field at once, before a weight is read."""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from megatron_infer import LLM
from megatron_infer.files import read_json_object
from megatron_infer.model.checkpoint import open_checkpoint
from tests.support.checkpoint_cases import HF, NAME, save
from tests.support.tiny_models import write_tokenizer

SECONDS = 5.0
"""Of processor time. Each takes less than one; without its bound, from 12 to endless."""
INDEX = "model.safetensors.index.json"
S0 = "model-rank0-of-2.safetensors"
DEEP = '{"a":' + "[" * 200_000 + "]" * 200_000 + "}"


def text(name: str, content: str) -> Callable[[Path], Any]:
    return lambda directory: (directory / name).write_text(content)


def replaced(name: str, make: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """Something else in the place of a file."""

    def damage(directory: Path) -> None:
        (directory / name).unlink(missing_ok=True)
        make(directory / name)

    return damage


def config(**changes: object) -> Callable[[Path], Any]:
    def damage(directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return damage


def ghosts(number: int) -> Callable[[Path], Any]:
    """Tensors of no element."""

    def damage(directory: Path) -> None:
        entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
        header = json.dumps({f"ghost.{i}": entry for i in range(number)}).encode()
        (directory / HF).write_bytes(struct.pack("<Q", len(header)) + header)

    return damage


def long_header(directory: Path) -> None:
    header = b'{"a":"' + b"x" * (90 << 20) + b'"}'
    (directory / HF).write_bytes(struct.pack("<Q", len(header)) + header)


def weight_map(name: object) -> Callable[[Path], Any]:
    return lambda d: (d / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))


HOSTILE: list[tuple[str, Callable[[Path], Any], str]] = [
    ("hf", config(num_hidden_layers=10**9), r"config\.json: .*num_hidden_layers"),
    ("sharded-2", config(num_hidden_layers=10**9), r"config\.json: .*num_hidden_layers"),
    ("hf", config(num_hidden_layers=4096), r"layers\.\d+\..* is missing"),
    ("hf", config(vocab_size=2**31 - 1), r"embed_tokens\.weight.*expected \[2147483647"),
    ("hf", config(hidden_size=10**30), r"config\.json: .*hidden_size"),
    ("hf", config(rope_theta=10**400), r"config\.json: .*rope_theta"),
    ("hf", config(rms_norm_eps=10**400), r"config\.json: .*rms_norm_eps"),
    ("hf", config(model_type="x" * 1_000_000), r"config\.json: .*model_type"),
    ("hf", config(fim=["aixcoder"]), r"config\.json: .*fim"),
    ("hf", config(torch_dtype={"a": [1] * 100_000}), r"config\.json: .*torch_dtype"),
    ("hf", config(quantization_config=[["int8"]]), r"config\.json: .*quantized by another tool"),
    ("hf", config(layer_types=[["sliding_attention"]] * 100_000), r"config\.json: .*layer_types"),
    ("hf", text("config.json", DEEP), r"config\.json .*recursion"),
    ("hf", text("config.json", '{"vocab_size": ' + "9" * 5000 + "}"), r"config\.json .*digit"),
    ("hf", text("config.json", "\ud7ff" * 2), r"config\.json is not valid JSON"),
    ("hf", replaced("config.json", lambda path: path.mkdir()), r"config\.json .*not a file"),
    ("hf", replaced("config.json", os.mkfifo), r"config\.json .*not a file"),
    ("hf", replaced("config.json", lambda path: path.symlink_to("/dev/zero")), r"config\.json .*not a file"),
    ("hf", replaced("config.json", lambda path: path.symlink_to(path.name)), r"config\.json"),
    ("hf", replaced("generation_config.json", os.mkfifo), r"generation_config\.json.*not a file"),
    ("hf", text("generation_config.json", DEEP), r"generation_config\.json .*recursion"),
    ("hf", ghosts(40_000), r"all 40000 names begin with 'ghost\.', which is no part of this model"),
    ("hf", ghosts(100_000), r"model\.safetensors cannot be read: header too large"),
    ("hf", long_header, r"model\.safetensors cannot be read: header too large"),
    ("hf-indexed", text(INDEX, DEEP), r"index\.json .*recursion"),
    ("hf-indexed", weight_map("x" * 1_000_000), r"index\.json points .*at no file"),
    ("hf-indexed", weight_map("é" * 200), r"index\.json points .*at no file"),
    ("hf-indexed", weight_map("a\0b"), r"index\.json says .*does not exist"),
    ("hf-indexed", weight_map(["a"]), r"index\.json points"),
    ("sharded-2", text("manifest.json", DEEP), r"manifest\.json .*recursion"),
    ("sharded-2", replaced(S0, os.mkfifo), r"rank0-of-2\.safetensors is missing"),
    ("sharded-2", lambda d: (d / S0).rename(d / f"model-rank0-of-{10**9}.safetensors"), r"rank0-of-2\S* is missing"),
]


@pytest.mark.parametrize(("writer", "damage", "message"), HOSTILE, ids=[f"{i}-{c[0]}" for i, c in enumerate(HOSTILE)])
def test_refused_at_once_by_file_and_field(
    tmp_path: Path, writer: str, damage: Callable[[Path], Any], message: str
) -> None:
    directory = save(tmp_path, writer)
    damage(directory)
    started = time.process_time()
    with pytest.raises(ValueError, match=f"(?s){message}") as refusal:
        open_checkpoint(directory, NAME)
    assert time.process_time() - started < SECONDS
    assert len(str(refusal.value)) < 2000


def test_a_context_whose_rotary_tables_cannot_be_held_is_refused(tmp_path: Path) -> None:
    directory = save(tmp_path, "hf")
    config(max_position_embeddings=2**31 - 1, head_dim=8192, num_attention_heads=1, num_key_value_heads=1)(directory)
    tensors = load_file(directory / HF)
    for layer in range(2):
        for name, shape in (("q", (8192, 32)), ("k", (8192, 32)), ("v", (8192, 32)), ("o", (32, 8192))):
            key = f"model.layers.{layer}.self_attn.{name}_proj.weight"
            tensors[key] = tensors[key].new_zeros(shape)
    config(vocab_size=512)(directory)
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[key] = tensors[key].new_zeros((512, 32))
    save_file(tensors, directory / HF)
    write_tokenizer(directory)
    with pytest.raises(ValueError, match=r"rotary tables of 2147483647 positions need .* smaller max_model_len"):
        LLM(directory, tensor_parallel_size=1, fim="aixcoder")


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_every_json_file_may_begin_with_a_byte_order_mark(tmp_path: Path, bom: bytes) -> None:
    for writer in ("sharded-2", "hf-indexed"):
        directory = save(tmp_path / bom.hex(), writer)
        for path in directory.glob("*.json"):
            path.write_bytes(bom + path.read_bytes())
            assert read_json_object(path)
        (directory / "manifest.json").unlink(missing_ok=writer == "hf-indexed")
        open_checkpoint(directory).close()
