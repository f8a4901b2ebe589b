"""A byte that changed on the disk is found, whoever loads the checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from checkpoints_convert.__main__ import main as convert
from megatron_infer import LLM
from megatron_infer.eval.run import command
from tests.eval.killed_runs import write_cases


@pytest.fixture
def changed(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint in which one byte of the last shard's weights is another; its size and header are right."""
    directory = tmp_path / "changed"
    shutil.copytree(tiny_checkpoint, directory)
    shard = directory / "model-rank1-of-2.safetensors"
    data = bytearray(shard.read_bytes())
    data[-7] ^= 0x10
    shard.write_bytes(data)
    return directory


def test_verify_on_load_finds_it(changed: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    quick = {"device": "cpu", "kv_cache_memory_bytes": 4 << 20}
    with pytest.raises(ValueError, match=r"model-rank1-of-2\.safetensors does not match the SHA-256"):
        LLM(changed, verify_on_load=True, **quick)
    LLM(changed, **quick).close()  # what it costs not to look
    LLM(tiny_checkpoint, verify_on_load=True, **quick).close()
    (changed / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"no manifest\.json; only converted"):
        LLM(changed, verify_on_load=True, **quick)


def test_inspect_finds_it(changed: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(["inspect", str(tiny_checkpoint)]) == 0
    assert "files are as they were written (SHA-256)" in capsys.readouterr().out
    assert convert(["inspect", str(changed)]) == 2
    assert "model-rank1-of-2.safetensors does not match the SHA-256" in capsys.readouterr().err
    (changed / "manifest.json").unlink()
    assert convert(["inspect", str(changed)]) == 0
    assert "integrity      unknown" in capsys.readouterr().out


def test_an_evaluation_finds_it_before_it_computes(changed: Path, tmp_path: Path, capsys) -> None:
    arguments = ["--task", "fim", "--data", str(write_cases(tmp_path / "cases.jsonl", 2)), "--max_new_tokens", "2"]
    where = ["--model_dir", str(changed), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert command.main([*arguments, *where]) == 2
    assert "model-rank1-of-2.safetensors does not match the SHA-256" in capsys.readouterr().err
