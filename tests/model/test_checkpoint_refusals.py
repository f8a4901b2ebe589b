"""A damaged, mixed-up or hostile checkpoint is refused before a weight is read, naming the tensor and the file."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints_convert import export
from megatron_infer.model.checkpoint import open_checkpoint
from megatron_infer.model.manifest import verify_manifest
from tests.support.checkpoint_cases import HF, MODEL, NAME, PT, W1, assert_same, save

# What is done to a good directory; REFUSALS says what the error must then say.


def edit_safetensors(name: str, edit: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    """Rewrite a safetensors file with its tensors edited and its header's metadata kept."""

    def damage(directory: Path) -> None:
        path = directory / name
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
        edit(tensors)
        path.unlink()
        save_file(tensors, path, metadata=metadata)
        (directory / "manifest.json").unlink(missing_ok=True)

    return damage


def edit_pt(name: str, edit: Callable[[dict[str, Tensor]], Any], key: str | None = "model") -> Callable[[Path], None]:
    """Rewrite a torch.save file with its tensors edited."""

    def damage(directory: Path) -> None:
        state = torch.load(directory / name, weights_only=True)
        edit(state[key] if key else state)
        torch.save(state, directory / name)

    return damage


def set_item(name: str, value: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: value})


def drop(name: str) -> Callable[[dict[str, Tensor]], Tensor]:
    return lambda tensors: tensors.pop(name)


def truncate(name: str, keep: float) -> Callable[[Path], None]:
    return lambda directory: os.truncate(directory / name, int((directory / name).stat().st_size * keep))


def deflate(name: str) -> Callable[[Path], None]:
    """Repack a zip archive with compression: records no longer lie in the file as they are."""

    def damage(directory: Path) -> None:
        (directory / name).rename(directory / "stored")
        with zipfile.ZipFile(directory / "stored") as old, zipfile.ZipFile(directory / name, "w") as new:
            for record in old.infolist():
                new.writestr(record.filename, old.read(record), zipfile.ZIP_DEFLATED)

    return damage


def swap(first: str, second: str) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        (directory / first).rename(directory / "aside")
        (directory / second).rename(directory / first)
        (directory / "aside").rename(directory / second)

    return damage


def remove(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).unlink()


def without_manifest(damage: Callable[[Path], None]) -> Callable[[Path], None]:
    def both(directory: Path) -> None:
        (directory / "manifest.json").unlink()
        damage(directory)

    return both


def edit_json(name: str, edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        raw = json.loads((directory / name).read_text())
        edit(raw)
        (directory / name).write_text(json.dumps(raw))

    return damage


def oversized_header(directory: Path) -> None:
    (directory / HF).write_bytes(struct.pack("<Q", 200 << 20) + b"{" * 64)


def repeated_header_key(directory: Path) -> None:
    """Two entries of one name, the second over other bytes: parsers disagree on which counts."""
    entry = '"model.norm.weight":{"dtype":"BF16","shape":[32],"data_offsets":[%d,%d]}'
    header = ("{" + entry % (0, 64) + "," + entry % (64, 128) + "}").encode()
    header += b" " * (-len(header) % 8)
    (directory / HF).write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 128)


S0, S1 = "model-rank0-of-2.safetensors", "model-rank1-of-2.safetensors"
P0, P1 = f"{NAME}_states_0.pt", f"{NAME}_states_1.pt"
INDEX = "model.safetensors.index.json"
HF_NORM = "model.norm.weight"
LAST = "model-00002-of-"

REFUSALS: list[tuple[str, str, Callable[[Path], Any], str]] = [
    ("missing", "hf", edit_safetensors(HF, drop(HF_NORM)), f"{HF_NORM}' is missing from .*model.safet"),
    ("missing", "sharded-2", edit_safetensors(S1, drop(W1)), f"{W1}' is missing from .*{S1}"),
    ("missing", "pt", edit_pt(PT, drop(W1)), f"{W1}' is missing from .*{NAME}.pt"),
    ("missing", "pt-2", edit_pt(P1, drop(W1)), f"{W1}' is missing from .*{P1}"),
    ("missing", "hf-bin", edit_pt("pytorch_model.bin", drop(HF_NORM), None), f"{HF_NORM}' is missing"),
    ("extra", "hf", edit_safetensors(HF, set_item("lora.a", torch.ones(2))), "lora.a.*not part of this"),
    ("extra", "sharded-2", edit_safetensors(S0, set_item("lora.a", torch.ones(2))), f"lora.a' in .*{S0} is not part"),
    ("extra", "pt-2", edit_pt(P1, set_item("lora.a", torch.ones(2))), f"lora.a' in .*{P1} is not part"),
    ("shape", "hf", edit_safetensors(HF, set_item(HF_NORM, torch.ones(31))), r"\[31\], expected \[32\]"),
    ("shape", "sharded-2", edit_safetensors(S1, set_item(W1, torch.ones(27, 32))), r"\[27, 32\], expected \[28"),
    ("shape", "pt-2", edit_pt(P1, set_item(W1, torch.ones(27, 32))), rf"{P1} has shape \[27, 32\], expected \[28"),
    ("dtype", "hf", edit_safetensors(HF, set_item(HF_NORM, torch.ones(32).double())), "dtype float64"),
    ("dtype", "sharded-2", edit_safetensors(S1, set_item(W1, torch.ones(28, 32).char())), f"{W1}.*int8.*quantized"),
    ("dtype", "sharded-2", edit_safetensors(S1, set_item(W1, torch.ones(28, 32))), f"{W1}' has another dtype in"),
    ("dtype", "pt", edit_pt(PT, set_item("norm.weight", torch.ones(32).int())), "norm.weight.*dtype int32"),
    ("truncated", "hf", truncate(HF, 0.9), "model.safetensors cannot be read.*download it again"),
    ("truncated", "sharded-2", truncate(S1, 0.9), f"{S1} has .* bytes, manifest.json says"),
    ("truncated", "sharded-2", without_manifest(truncate(S1, 0.9)), f"{S1} cannot be read"),
    ("truncated", "pt", truncate(PT, 0.9), f"{NAME}.pt cannot be read"),
    ("truncated", "pt-2", truncate(P1, 0.5), f"{P1} cannot be read"),
    ("emptied", "hf", truncate(HF, 0), "model.safetensors cannot be read"),
    ("header", "hf", oversized_header, "model.safetensors cannot be read: .*header too large"),
    ("header", "hf", repeated_header_key, "model.safetensors cannot be read: .*offset"),
    ("swapped", "sharded-2", swap(S0, S1), f"{S0} says in its header that it is shard 1 of 2"),
    ("swapped", "sharded-2", without_manifest(swap(S0, S1)), f"{S0} says in its header that it is shard 1 of 2"),
    ("swapped", "pt-2", swap(P0, P1), f"{P0} says in its header that it is shard 1 of 2"),
    ("copied", "sharded-2", lambda d: shutil.copy(d / S0, d / S1), f"{S1} says in its header that it is shard 0"),
    ("lost", "sharded-2", remove(S1), f"{S1} is missing"),
    ("lost", "sharded-2", remove("config.json"), "config.json does not exist"),
    ("lost", "pt-2", remove(P1), f"{P0} says.* shard 0 of 2"),
    ("extra shard", "sharded-2", lambda d: shutil.copy(d / S0, d / "model-rank0-of-4.safetensors"), "several conv"),
    ("extra shard", "sharded-2", lambda d: shutil.copy(d / S0, d / "model-rank2-of-2.safetensors"), "is not one of 2"),
    ("manifest", "sharded-2", truncate("manifest.json", 0.5), "manifest.json is not valid JSON"),
    ("manifest", "sharded-2", edit_json("manifest.json", lambda m: m.update(format_version=2)), "version 2; this"),
    ("manifest", "sharded-2", edit_json("manifest.json", lambda m: m.pop("files")), "manifest.json is damaged"),
    ("manifest", "sharded-2", edit_json("manifest.json", lambda m: m["tensors"][W1].update(dtype="float32")), W1),
    ("manifest", "sharded-2", edit_json("manifest.json", lambda m: m["files"].pop(S1)), "lists other shards"),
    ("index", "hf-indexed", lambda d: next(d.glob(LAST + "*")).unlink(), "which does not exist; download model-00002"),
    ("index", "hf-indexed", truncate(INDEX, 0.5), f"{INDEX} is not valid JSON"),
    ("index", "hf-indexed", remove(INDEX), "without an index.*Download the .index.json"),
    ("index", "hf-indexed", edit_json(INDEX, lambda i: i.pop("weight_map")), "has no weight_map"),
    ("index", "hf-indexed", edit_json(INDEX, lambda i: i["weight_map"].pop(HF_NORM)), f"{HF_NORM}.*says nothing of it"),
    ("index", "hf-indexed", edit_json(INDEX, lambda i: i["weight_map"].update(x="../x.safetensors")), "outside its"),
    ("config", "hf", edit_json("config.json", lambda c: c.update(num_hidden_layers=1)), "layers.1.* not part"),
    ("config", "hf", edit_json("config.json", lambda c: c.update(num_hidden_layers=3)), "layers.2.* is missing"),
    ("not tensors", "pt", lambda d: torch.save([torch.ones(2)], d / PT), "holds a list"),
    ("not tensors", "pt", lambda d: torch.save({"model": {"a": 1}}, d / PT), "holds no tensors"),
    ("legacy", "pt", lambda d: torch.save({}, d / PT, _use_new_zipfile_serialization=False), "not a zip archive"),
    ("compressed", "pt", deflate(PT), "repacked with compression"),
    ("torchscript", "pt", lambda d: torch.jit.script(torch.nn.Linear(2, 2)).save(d / PT), "other than tensors"),
    ("lfs", "hf", lambda d: (d / HF).write_text("version https://git-lfs.github.com/spec/v1\n"), "lfs pull"),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*TorchScript")
@pytest.mark.parametrize(
    ("writer", "damage", "message"), [case[1:] for case in REFUSALS], ids=[f"{case[0]}-{case[1]}" for case in REFUSALS]
)
def test_damaged_checkpoint_is_refused_by_name(
    tmp_path: Path, writer: str, damage: Callable[[Path], Any], message: str
) -> None:
    directory = save(tmp_path, writer)
    open_checkpoint(directory, NAME).close()
    damage(directory)
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        open_checkpoint(directory, NAME)


def test_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    directory = save(tmp_path, "hf-indexed")
    first, second = sorted(directory.glob("model-*.safetensors"))[:2]
    tensors = load_file(first)
    name = sorted(tensors)[0]
    save_file({**load_file(second), name: tensors[name].clone()}, second)
    with pytest.raises(ValueError, match=rf"{name}' is both in .*{first.name} and in .*{second.name}"):
        open_checkpoint(directory)


def upstream_shards(directory: Path, num_shards: int) -> list[Path]:
    """Make shards look as upstream's own tools would write them: tensors only."""
    paths = [directory / f"{NAME}_states_{rank}.pt" for rank in range(num_shards)]
    for path in paths:
        torch.save({"model": torch.load(path, weights_only=True)["model"]}, path)
    return paths


def test_shards_that_say_nothing_of_themselves_are_still_counted_and_compared(tmp_path: Path) -> None:
    paths = upstream_shards(save(tmp_path, "pt-4"), 4)
    with open_checkpoint(paths[0].parent, NAME) as checkpoint:
        assert_same(checkpoint, MODEL)
    originals = [path.read_bytes() for path in paths]
    paths[3].unlink()
    with pytest.raises(ValueError, match=r"_0\.pt is a shard of 4 .*but 3 such file"):
        open_checkpoint(paths[0].parent, NAME)
    paths[3].write_bytes(originals[0])
    with pytest.raises(ValueError, match=r"_states_3\.pt is a copy of .*_states_0\.pt"):
        open_checkpoint(paths[0].parent, NAME)
    paths[3].write_bytes(originals[3])
    edit_pt(paths[3].name, set_item("norm.weight", torch.ones(32).bfloat16()))(paths[3].parent)
    with pytest.raises(ValueError, match=r"'norm\.weight' differs between .*_states_0\.pt and .*_states_3\.pt"):
        open_checkpoint(paths[0].parent, NAME)


def test_shards_of_two_conversions_do_not_mix(tmp_path: Path) -> None:
    directory = save(tmp_path, "sharded-2")
    export.save_sharded(MODEL.read, MODEL.config, tmp_path / "other", 2)
    shutil.copy(tmp_path / "other" / S1, directory / S1)
    with pytest.raises(ValueError, match=f"{S1} belongs to another checkpoint"):
        open_checkpoint(directory)
    (directory / "manifest.json").unlink()
    with pytest.raises(ValueError, match=f"{S1} belongs to another checkpoint"):
        open_checkpoint(directory)


def test_sharded_directory_loads_without_manifest_and_without_our_metadata(tmp_path: Path) -> None:
    directory = save(tmp_path, "sharded-2")
    for name in (S0, S1):
        save_file({key: tensor.clone() for key, tensor in load_file(directory / name).items()}, directory / name)
    with pytest.raises(ValueError, match=r"bytes, manifest\.json says|names no rank"):
        open_checkpoint(directory)
    (directory / "manifest.json").unlink()
    with open_checkpoint(directory) as checkpoint:
        assert_same(checkpoint, MODEL)
    with pytest.raises(ValueError, match=r"has no manifest\.json"):
        verify_manifest(directory)


def test_verify_finds_a_flipped_bit_that_headers_cannot_show(tmp_path: Path) -> None:
    directory = save(tmp_path, "sharded-2")
    verify_manifest(directory)
    data = bytearray((directory / S1).read_bytes())
    data[-1] ^= 1
    (directory / S1).write_bytes(data)
    open_checkpoint(directory).close()
    with pytest.raises(ValueError, match=f"{S1} does not match the SHA-256"):
        open_checkpoint(directory, verify=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not a directory; give a local checkpoint directory"),
        ({}, "found: nothing"),
        ({"model.onnx": b"x"}, r"accepted are .*\.pt.*\.gguf file; found: model\.onnx"),
        ({"other.pt": b""}, r"For other\.pt pass its name without \.pt .* as model_name"),
    ],
)
def test_directory_without_checkpoint_lists_what_is_accepted_and_found(
    tmp_path: Path, content: dict[str, bytes] | None, message: str
) -> None:
    directory = tmp_path / "dir"
    if content is not None:
        directory.mkdir()
        for name, data in content.items():
            (directory / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(directory)


class Payload:
    """Creates a file when unpickled."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.sentinel}",)


@pytest.mark.parametrize(("writer", "name"), [("pt", PT), ("pt-2", P1), ("hf-bin", "pytorch_model.bin")])
def test_pickle_payload_is_refused_and_never_run(tmp_path: Path, writer: str, name: str) -> None:
    directory, sentinel = save(tmp_path, writer), tmp_path / "sentinel"
    state = torch.load(directory / name, weights_only=True)
    torch.save({**state, "hook": Payload(sentinel)}, directory / name)
    with pytest.raises(ValueError, match=rf"{name} cannot be read: .*\((posix|nt)\.system\), which is never executed"):
        open_checkpoint(directory, NAME)
    assert not sentinel.exists()
    torch.load(directory / name, weights_only=False)
    assert sentinel.exists(), "the payload works, so that its absence above means something"


def test_remote_code_in_config_is_ignored(tmp_path: Path) -> None:
    directory = save(tmp_path, "hf")
    (directory / "modeling_evil.py").write_text(f"open({str(tmp_path / 'sentinel')!r}, 'w')\n")
    edit_json("config.json", lambda c: c.update(auto_map={"AutoModelForCausalLM": "modeling_evil.Model"}))(directory)
    with open_checkpoint(directory) as checkpoint:
        assert_same(checkpoint, MODEL)
    assert not (tmp_path / "sentinel").exists()


def test_file_replaced_while_open_is_noticed(tmp_path: Path) -> None:
    directory = save(tmp_path, "hf")
    checkpoint = open_checkpoint(directory)
    os.utime(directory / HF, (1, 1))
    with pytest.raises(ValueError, match=r"model\.safetensors changed while"):
        checkpoint.read("norm.weight")
