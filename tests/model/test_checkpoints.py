"""Any slice of any tensor reads the same from every kind of checkpoint, touching only its share of the files."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints_convert import export
from megatron_infer.model.checkpoint import KINDS, open_checkpoint
from megatron_infer.model.weights import expected_tensors, megatron_tensors, memory_estimate
from megatron_infer.model_config import ModelConfig
from tests.support.checkpoint_cases import (
    CONFIGS,
    HF,
    MODEL,
    NAME,
    PLAIN,
    PT,
    W1,
    WRITERS,
    Model,
    assert_same,
    make_model,
    save,
)


@pytest.mark.parametrize("shape", CONFIGS)
@pytest.mark.parametrize("writer", WRITERS)
def test_every_slice_of_every_kind_is_the_truth(tmp_path: Path, writer: str, shape: str) -> None:
    model = make_model(CONFIGS[shape])
    kind, write = WRITERS[writer]
    write(model, tmp_path / "out")
    with open_checkpoint(tmp_path / "out", NAME) as checkpoint:
        assert (checkpoint.kind, checkpoint.config) == (kind, model.config)
        assert kind in KINDS
        assert kind in checkpoint.notes[0]
        assert checkpoint.num_bytes == sum(tensor.nbytes for tensor in model.tensors.values())
        assert_same(checkpoint, model)


def test_upstream_interleaves_query_key_value_by_group(tmp_path: Path) -> None:
    state = torch.load(save(tmp_path, "pt") / PT, weights_only=True)["model"]
    fused = state["layers.1.attention.query_key_value.weight"].view(4, 4 + 2, 4, 32)
    assert torch.equal(fused[:, :4].reshape(64, 32), MODEL.tensors["layers.1.attention.wq.weight"])
    assert torch.equal(fused[:, 4].reshape(16, 32), MODEL.tensors["layers.1.attention.wk.weight"])
    assert torch.equal(fused[:, 5].reshape(16, 32), MODEL.tensors["layers.1.attention.wv.weight"])
    directory = save(tmp_path, "pt-2")
    halves = [torch.load(directory / f"{NAME}_states_{r}.pt", weights_only=True)["model"] for r in (0, 1)]
    for name, axis in {
        "layers.0.attention.query_key_value.weight": 0, "layers.0.attention.wo.weight": 1,
        "layers.0.feed_forward.w1.weight": 0, "layers.0.feed_forward.w3.weight": 0,
        "layers.0.feed_forward.w2.weight": 1, "tok_embeddings.weight": 0, "output.weight": 0,
    }.items():  # fmt: skip
        assert torch.equal(torch.cat([half[name] for half in halves], axis), state[name]), name
    assert torch.equal(halves[1]["norm.weight"], state["norm.weight"])


def test_aixcoder_has_upstreams_227_tensors() -> None:
    tensors = megatron_tensors(ModelConfig.aixcoder_7b())
    assert len(tensors) == 227
    assert tensors["layers.31.attention.query_key_value.weight"].shape == (6144, 4096)
    assert tensors["layers.0.feed_forward.w2.weight"].shard_shape(7, 8) == (4096, 1808)
    assert sum(torch.Size(t.shape).numel() for t in tensors.values()) == 7_432_572_928


def test_memory_estimate_counts_what_ranks_hold() -> None:
    config = ModelConfig.aixcoder_7b()
    norms = 65 * 4096
    whole = memory_estimate(config, 1, torch.bfloat16)
    assert whole == (7_432_572_928 - norms) * 2 + norms * 4
    assert memory_estimate(config, 8, torch.bfloat16) == (7_432_572_928 - norms) // 8 * 2 + norms * 4
    assert memory_estimate(config, 1, torch.float32) == 7_432_572_928 * 4
    linears, table = 7_432_572_928 - norms - 2 * 49152 * 4096, 49152 * 4096
    int8, int4 = (memory_estimate(config, 1, torch.bfloat16, quantization) for quantization in ("int8", "int4"))
    assert int8 == (linears + table) * 17 // 16 + table * 2 + norms * 4
    assert int4 == linears * 9 // 16 + table * 17 // 16 + table * 2 + norms * 4
    tied = replace(PLAIN, tie_word_embeddings=True)
    assert memory_estimate(tied, 1, torch.float32) == memory_estimate(PLAIN, 1, torch.float32)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"iteration": 7, "model": {"module": {"llama_model": state}}},
        lambda state: {"model": {"language_model": state}},
        lambda state: {"module": {f"llama_model.{name}": tensor for name, tensor in state.items()}},
        lambda state: {f"module.language_model.{name}": tensor for name, tensor in state.items()},
    ],
)
def test_pt_files_are_unwrapped_and_get_upstreams_epsilon(
    tmp_path: Path, wrap: Callable[[dict[str, Tensor]], Any]
) -> None:
    path = save(tmp_path, "pt") / PT
    torch.save(wrap(torch.load(path, weights_only=True)["model"]), path)
    with open_checkpoint(path.parent, NAME) as checkpoint:
        assert_same(checkpoint, MODEL)
        assert checkpoint.config == replace(MODEL.config, rms_norm_eps=1e-5)
        assert any("1e-05" in note for note in checkpoint.notes)


def test_pt_without_config_is_taken_for_aixcoder_and_its_shapes_are_checked(tmp_path: Path) -> None:
    directory = save(tmp_path, "pt")
    (directory / "config.json").unlink()
    with pytest.raises(ValueError, match=r"tok_embeddings\.weight.*\[72, 32\], expected \[49152, 4096\].*aiXcoder-7B"):
        open_checkpoint(directory, NAME)


def test_safetensors_are_preferred_and_the_choice_is_told(tmp_path: Path) -> None:
    directory = save(tmp_path, "hf")
    shutil.copy(save(tmp_path, "pt") / PT, directory)
    (directory / "pytorch_model.bin.index.json").write_text('{"weight_map": {"x": "absent.bin"}}')
    checkpoint = open_checkpoint(directory, NAME)
    assert checkpoint.kind == "hf-safetensors"
    assert "not used: megatron-pt, hf-bin" in checkpoint.notes[0]


def test_tied_head_and_rotary_buffers_are_ignored_and_named(tmp_path: Path) -> None:
    model = make_model(replace(PLAIN, tie_word_embeddings=True))
    export.save_hf(model.read, model.config, tmp_path / "hf")
    path = tmp_path / "hf" / HF
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2, dtype=torch.float64)}
    extra["lm_head.weight"] = model.tensors["tok_embeddings.weight"].clone()
    save_file({**load_file(path), **extra}, path)
    with open_checkpoint(tmp_path / "hf") as checkpoint:
        assert any("lm_head.weight" in note and "inv_freq" in note for note in checkpoint.notes)
        assert_same(checkpoint, model)


def test_conversion_chain_changes_no_bit_and_dtype_can_change(tmp_path: Path) -> None:
    export.save_hf(MODEL.read, MODEL.config, tmp_path / "a")
    (tmp_path / "a" / "tokenizer.model").write_bytes(b"pieces")
    with open_checkpoint(tmp_path / "a") as a:
        extra = export.tokenizer_files(a.model_dir)
        export.save_sharded(a.read, a.config, tmp_path / "b", 4, extra_files=extra)
    with open_checkpoint(tmp_path / "b", verify=True) as b:
        export.save_upstream_pt(b.read, b.config, tmp_path / "c", NAME, 2, extra_files=extra)
    with open_checkpoint(tmp_path / "c", NAME) as c:
        assert_same(c, MODEL)
        assert c.config == MODEL.config
        export.save_sharded(c.read, c.config, tmp_path / "d", 1, dtype=torch.float32)
    with open_checkpoint(tmp_path / "d") as d:
        assert d.config.torch_dtype == "float32"
        assert_same(d, Model(MODEL.config, {name: tensor.float() for name, tensor in MODEL.tensors.items()}))
    assert [(tmp_path / x / "tokenizer.model").read_bytes() for x in "bc"] == [b"pieces"] * 2


@pytest.mark.parametrize(
    ("name", "rows", "cols"),
    [
        ("nonsense", None, None),
        ("norm.weight", None, (0, 1)),
        (W1, (0, 57), None),
        (W1, None, (-1, 3)),
        (W1, (3, 2), None),
    ],
)
def test_reading_outside_a_tensor_is_an_error(
    tmp_path: Path, name: str, rows: tuple[int, int] | None, cols: tuple[int, int] | None
) -> None:
    with open_checkpoint(save(tmp_path, "hf")) as checkpoint, pytest.raises(ValueError, match=re.escape(name)):
        checkpoint.read(name, rows, cols)


def test_writers_leave_nothing_behind_on_failure_and_never_overwrite(tmp_path: Path) -> None:
    def failing(name: str, rows: tuple[int, int] | None = None, cols: tuple[int, int] | None = None) -> Tensor:
        if name.startswith("layers.1."):
            raise RuntimeError("disk gone")
        return MODEL.read(name, rows, cols)

    with pytest.raises(RuntimeError, match="disk gone"):
        export.save_sharded(failing, MODEL.config, tmp_path / "out", 2)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="cannot be divided into 3 shards; numbers that work: 1, 2, 4"):
        export.save_sharded(MODEL.read, MODEL.config, tmp_path / "out", 3)
    with pytest.raises(ValueError, match="would replace config"):
        export.save_hf(MODEL.read, MODEL.config, tmp_path / "out", extra_files=[tmp_path / "config.json"])
    (tmp_path / "out").mkdir()
    export.save_hf(MODEL.read, MODEL.config, tmp_path / "out")
    with pytest.raises(ValueError, match="not an empty directory"):
        export.save_sharded(MODEL.read, MODEL.config, tmp_path / "out", 2)


READ_SLICES = """
import sys
from megatron_infer.model.checkpoint import open_checkpoint

def peak_kib():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])

checkpoints = [open_checkpoint(path, "tiny") for path in sys.argv[1:]]
for checkpoint in checkpoints:
    before = peak_kib()
    for part in range(8):
        checkpoint.read("tok_embeddings.weight", rows=(part * 1024, part * 1024 + 128)).sum()
    print(peak_kib() - before)
before = peak_kib()
checkpoint.read("tok_embeddings.weight").sum()
print(peak_kib() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_slices_of_a_big_file_touch_only_their_share_of_it(tmp_path: Path) -> None:
    config = replace(PLAIN, vocab_size=8192, hidden_size=4096, tie_word_embeddings=True, num_hidden_layers=1)
    model = Model(config, {n: torch.zeros(shape).bfloat16() for n, shape in expected_tensors(config).items()})
    kinds = ("sharded-2", "pt", "hf")
    for writer in kinds:
        WRITERS[writer][1](model, tmp_path / writer)
    command = [sys.executable, "-c", READ_SLICES, *(str(tmp_path / writer) for writer in kinds)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    *sliced_kib, whole_kib = map(int, done.stdout.split())
    table_kib = 8192 * 4096 * 2 // 1024
    assert whole_kib > table_kib // 2, "the measure sees a table that is read whole"
    # An eighth of the table is asked for.
    assert max(sliced_kib) < table_kib // 3, sliced_kib
