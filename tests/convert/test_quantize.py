"""Quantised checkpoints: stored numbers are those of rounding while loading, at every sharding, or refused by name."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sess_huggingface
from checkpoints_convert import (
    Options,
    compare_quality,
    hf2megatron,
    inspect,
    megatron2hf,
    merge_lora,
    quantize,
    reshard,
    tensor_writers,
)
from checkpoints_convert.__main__ import main
from checkpoints_convert.export import save_sharded
from checkpoints_convert.gptq import gptq, inverse_factor
from checkpoints_convert.quantization import RoundedReader
from megatron_infer import LLM, SamplingParams
from megatron_infer.config import EngineConfig
from megatron_infer.engine.resolve import resolve
from megatron_infer.model import formats
from megatron_infer.model.checkpoint import Checkpoint, open_checkpoint
from megatron_infer.model.weights import memory_estimate
from megatron_infer.model_config import ModelConfig
from megatron_infer.ops import INT4
from megatron_infer.quantization import Quantization
from megatron_infer.world import World
from tests.support.tiny_models import Tensors, generate_on_ranks, random_tensors, tiny_config

FORMATS = ("int8", "int4")
DTYPES = {"int8": torch.int8, "int4": INT4}
SHARDABLE = tiny_config(num_key_value_heads=4, hidden_size=256, intermediate_size=512, num_hidden_layers=2)
PROMPTS = [[1, 17, 40, 300, 8, 9], [1, 90, 91, 92]]
GREEDY = SamplingParams(max_new_tokens=6, logprobs=0, ignore_eos=True)
LINEARS = ("wq", "wk", "wv", "wo", "w1", "w2", "w3", "output")
ONE = "model-rank0-of-1.safetensors"
W2 = "layers.1.feed_forward.w2"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensors]:
    """A bf16 checkpoint that 4 ranks and groups of 64 can divide, and its tensors."""
    out = tmp_path_factory.mktemp("plain") / "checkpoint"
    tensors = random_tensors(SHARDABLE, seed=4, dtype=torch.bfloat16)
    save_sharded(tensors.read, SHARDABLE, out, 2)
    return out, tensors


def numbers_of(checkpoint: Checkpoint, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    values = checkpoint.read(f"{name}.weight")
    values = formats.unpack_int4(values) if values.dtype == torch.uint8 else values
    return values, checkpoint.read(f"{name}.scales")


@pytest.mark.parametrize("fmt", FORMATS)
def test_answers_are_those_of_rounding_while_loading(tmp_path: Path, tiny_checkpoint: Path, fmt: str) -> None:
    """To the bit, at every tensor-parallel size; the ffn dimension does not divide into whole groups."""
    quantize(tiny_checkpoint, tmp_path / "out", fmt=fmt)
    with open_checkpoint(tiny_checkpoint) as source, open_checkpoint(tmp_path / "out", verify=True) as stored:
        assert stored.config.quantization == Quantization(fmt)
        rounded = generate_on_ranks(1, source.config, source, PROMPTS, GREEDY, torch.bfloat16, fmt)
        for size in (1, 2, 4):
            assert generate_on_ranks(size, stored.config, stored, PROMPTS, GREEDY, torch.bfloat16, fmt) == rounded


@pytest.mark.parametrize("fmt", FORMATS)
def test_answers_do_not_depend_on_shards_or_ranks(tmp_path: Path, plain: tuple[Path, Tensors], fmt: str) -> None:
    source, tensors = plain
    quantize(source, tmp_path / "tp4", fmt=fmt, tp=4)
    rounded = generate_on_ranks(1, SHARDABLE, tensors, PROMPTS, GREEDY, torch.bfloat16, fmt)
    with open_checkpoint(tmp_path / "tp4") as stored:
        for size in (1, 8):
            assert generate_on_ranks(size, stored.config, stored, PROMPTS, GREEDY, torch.bfloat16, fmt) == rounded


@pytest.mark.parametrize(("fmt", "group", "tp"), [("int8", 32, 4), ("int4", 32, 2), ("int4", 64, 4), ("int8", 128, 2)])
def test_stored_numbers_are_the_definition_and_survive_resharding(
    tmp_path: Path, plain: tuple[Path, Tensors], fmt: str, group: int, tp: int
) -> None:
    source, tensors = plain
    quantize(source, tmp_path / "a", fmt=fmt, group=group, tp=tp)
    reshard(tmp_path / "a", tmp_path / "b", tp=1)
    quantize(source, tmp_path / "c", fmt=fmt, group=group)
    for out in ("a", "b"):
        with open_checkpoint(tmp_path / out, verify=True) as stored:
            assert stored.config == replace(SHARDABLE, quantization=Quantization(fmt, group))
            for weight, tensor in tensors.items():
                name, module = weight.removesuffix(".weight"), weight.split(".")[-2]
                if module not in LINEARS:
                    assert torch.equal(stored.read(weight), tensor)
                    continue
                dtype = torch.int8 if module == "output" else DTYPES[fmt]
                wanted = formats.quantize(tensor, dtype, group)
                assert all(map(torch.equal, numbers_of(stored, name), wanted)), weight
    with open_checkpoint(source) as read, open_checkpoint(tmp_path / "a") as stored:
        reader = RoundedReader(read, Quantization(fmt, group))
        assert all(torch.equal(reader.read(name), stored.read(name)) for name in reversed(list(stored.names())))
    one, direct = load_file(tmp_path / "b" / ONE), load_file(tmp_path / "c" / ONE)
    assert one.keys() == direct.keys() and all(torch.equal(one[key], direct[key]) for key in one)
    assert main(["verify", str(tmp_path / "a"), str(tmp_path / "c"), "--logits"]) == 0


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.int8, INT4])
def test_slices_expand_large_groups_to_those_of_the_kernels(group: int, dtype: torch.dtype) -> None:
    weight = torch.randn(6, 416, generator=torch.Generator().manual_seed(0))
    values, scales = formats.quantize(weight, dtype, group)
    stored = Tensors({"x.weight": formats.pack_int4(values) if dtype == INT4 else values, "x.scales": scales})
    expanded = scales.repeat_interleave(group // 32, dim=1)[:, :13]
    for cols in (None, (0, 416), (0, 32), (32, 160), (96, 96), (224, 416)):
        start, stop = cols or (0, 416)
        got, got_scales = formats.read_quantized(stored, formats.Slice("x", (1, 5), cols), dtype, group)
        got = formats.unpack_int4(got) if dtype == INT4 else got
        assert torch.equal(got, values[1:5, start:stop])
        assert torch.equal(got_scales, expanded[1:5, start // 32 : -(-stop // 32)])


def test_a_tied_head_is_rounded_while_loading(tmp_path: Path) -> None:
    config = replace(SHARDABLE, tie_word_embeddings=True, attention_bias=True, mlp_bias=True)
    tensors = random_tensors(config, dtype=torch.bfloat16)
    save_sharded(tensors.read, config, tmp_path / "plain", 1)
    quantize(tmp_path / "plain", tmp_path / "out", fmt="int4", tp=2)
    rounded = generate_on_ranks(1, config, tensors, PROMPTS, GREEDY, torch.bfloat16, "int4")
    with open_checkpoint(tmp_path / "out") as stored:
        assert generate_on_ranks(2, stored.config, stored, PROMPTS, GREEDY, torch.bfloat16, "int4") == rounded


# ---- what the engine and inspect make of it ------------------------------------------------------------------------


def test_a_quantised_checkpoint_simply_loads_and_contradictions_are_refused(
    tmp_path: Path, tiny_checkpoint: Path
) -> None:
    quantize(tiny_checkpoint, tmp_path / "out", fmt="int4")
    with LLM(tmp_path / "out", device="cpu", kv_cache_memory_bytes=4 << 20) as llm:
        assert llm.config.quantization == "int4"
        ids = llm.complete([1, 17, 40], GREEDY).token_ids
    with LLM(tiny_checkpoint, device="cpu", quantization="int4", kv_cache_memory_bytes=4 << 20) as llm:
        assert llm.complete([1, 17, 40], GREEDY).token_ids == ids
    for asked in ("int8", "none"):
        with pytest.raises(
            ValueError, match=f"'{asked}' was asked for, but the checkpoint is stored in int4; leave it"
        ):
            LLM(tmp_path / "out", device="cpu", quantization=asked)
    plain = tiny_config()
    resolved = [resolve(EngineConfig(quantization=asked), plain, World()).quantization for asked in ("auto", "int8")]
    assert resolved == ["none", "int8"]


def test_footprints_of_the_full_model_and_what_inspect_says(tmp_path: Path, plain: tuple[Path, Tensors]) -> None:
    for fmt, limit_mib in (("int8", 9009), ("int4", 5657)):
        full = replace(ModelConfig.aixcoder_7b(), quantization=Quantization(fmt))
        assert memory_estimate(full, 1, torch.bfloat16, fmt) < limit_mib << 20
    quantize(plain[0], tmp_path / "out", fmt="int4", group=64)
    before, after = inspect(plain[0]), inspect(tmp_path / "out")
    assert after.num_parameters == before.num_parameters
    assert after.num_bytes < before.num_bytes * 0.45
    assert after.ranks[0].weight_bytes == memory_estimate(SHARDABLE, 1, torch.bfloat16, "int4")
    assert "quantization   int4, groups of 64, rtn" in str(after)
    assert after.to_json()["config"]["quantization_config"]["bits"] == 4


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("convert", "message"),
    [
        (lambda src, out: quantize(src, out, fmt="int8"), "cannot be quantized again; take the checkpoint before"),
        (lambda src, out: megatron2hf(src, out), "cannot be written as a Hugging Face directory; take"),
        (lambda src, out: hf2megatron(src, out, fmt="pt"), "cannot be written as upstream's .pt; take"),
        (lambda src, out: reshard(src, out, tp=1, options=Options(dtype="float32")), "to another dtype; take"),
        (lambda src, out: merge_lora(src, src, out), "cannot be merged with an adapter; take"),
        (lambda src, out: reshard(src, out, tp=4), r"groups of 128 .*into 4 shards; numbers that work: 1, 2 \(any"),
    ],
)
def test_what_cannot_be_done_with_quantised_weights_is_refused(
    tmp_path: Path, plain: tuple[Path, Tensors], convert: Callable[[Path, Path], Any], message: str
) -> None:
    quantize(plain[0], tmp_path / "q", fmt="int4", group=128)
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "q", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["q"]


def test_quantising_refuses_what_it_cannot_do(
    tmp_path: Path, plain: tuple[Path, Tensors], tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    assert main(["quantize", str(tiny_checkpoint), out, "--format", "int8", "--tp", "2"]) == 2
    assert "groups of 32 of 256 and 208 columns cannot be divided into 2 shards; numbers that work: 1" in (
        capsys.readouterr().err
    )
    assert main(["quantize", str(plain[0]), out, "--format", "int4", "--method", "gptq"]) == 2
    assert "name files with --calibration" in capsys.readouterr().err
    broken = Tensors(plain[1])
    broken[f"{W2}.weight"] = broken[f"{W2}.weight"].clone()
    broken[f"{W2}.weight"][3, 7] = torch.nan
    save_sharded(broken.read, SHARDABLE, tmp_path / "nan", 1)
    assert main(["quantize", str(tmp_path / "nan"), out, "--format", "int8"]) == 2
    assert f"'{W2}.weight' holds NaN or infinity" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["nan"]


def test_a_full_disk_keeps_nothing(
    tmp_path: Path, plain: tuple[Path, Tensors], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original, calls = tensor_writers.write_all, []

    def failing(write: Any, data: memoryview) -> None:
        calls.append(len(data))
        if len(calls) > 8:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(write, data)

    monkeypatch.setattr(tensor_writers, "write_all", failing)
    assert main(["quantize", str(plain[0]), str(tmp_path / "out"), "--format", "int4", "--tp", "2"]) == 2
    assert "became full" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


DAMAGES: list[tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = [
    (lambda t: t.pop(f"{W2}.scales"), f"{W2}.scales' is missing from"),
    (lambda t: t.update({f"{W2}.scales": torch.ones(256, 15).bfloat16()}), r"\[256, 15\], expected \[256, 16\]"),
    (lambda t: t.update({f"{W2}.scales": torch.ones(256, 16)}), f"{W2}.scales' .*dtype float32, expected torch.bfloat"),
    (lambda t: t.update({f"{W2}.weight": torch.ones(256, 512)}), f"{W2}.weight' .*dtype float32, expected torch.int8"),
    (lambda t: t[f"{W2}.scales"].view(-1)[-1:].fill_(torch.inf), f"{W2}.scales' holds NaN or infinity"),
    (lambda t: t[f"{W2}.weight"].view(-1)[-1:].fill_(-128), rf"{W2}.weight' has values outside \[-127, 127\]"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_damaged_numbers_are_refused_by_name_before_serving(
    tmp_path: Path, plain: tuple[Path, Tensors], damage: Callable[[dict[str, torch.Tensor]], Any], message: str
) -> None:
    quantize(plain[0], tmp_path / "q", fmt="int8")
    path = tmp_path / "q" / ONE
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    damage(tensors)
    path.unlink()
    save_file(tensors, path, metadata=metadata)
    (tmp_path / "q" / "manifest.json").unlink()
    with pytest.raises(ValueError, match=message), open_checkpoint(tmp_path / "q") as checkpoint:
        generate_on_ranks(1, checkpoint.config, checkpoint, PROMPTS, GREEDY, torch.bfloat16, "int8")


def test_weights_of_other_tools_are_refused_with_the_remedy(tmp_path: Path, plain: tuple[Path, Tensors]) -> None:
    quantize(plain[0], tmp_path / "q", fmt="int8")
    path = tmp_path / "q" / "config.json"
    raw = json.loads(path.read_text())
    raw["quantization_config"] = {"quant_method": "awq", "bits": 4}
    path.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=r"by another tool \('awq'\) are not read; take the checkpoint before"):
        open_checkpoint(tmp_path / "q")
    with pytest.raises(ValueError, match="quantization group must be one of 32, 64, 128"):
        Quantization("int8", 48)


# ---- calibrated rounding, and what quantisation costs ---------------------------------------------------------------


@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("dtype", [torch.int8, INT4])
def test_calibrated_rounding_keeps_the_output_better_than_nearest(dtype: torch.dtype, group: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 288, generator=generator)
    mixing = torch.randn(288, 288, generator=generator) / 17 + torch.eye(288)
    inputs, others = (torch.randn(n, 288, generator=generator) @ mixing for n in (2048, 512))
    nearest, calibrated = (
        formats.dequantize(*numbers, group)
        for numbers in (
            formats.quantize(weight, dtype, group),
            gptq(weight, inverse_factor(inputs.T @ inputs), dtype, group),
        )
    )
    errors = [float((others @ (w - weight).T).norm() / (others @ weight.T).norm()) for w in (nearest, calibrated)]
    assert errors[1] < 0.8 * errors[0], errors
    alone = gptq(weight, inverse_factor(torch.eye(288)), dtype, group)
    assert all(map(torch.equal, alone, formats.quantize(weight, dtype, group))), "independent inputs: nearest is best"


def test_calibrated_checkpoints_lose_less_at_any_sharding(tmp_path: Path, tiny_checkpoint: Path) -> None:
    code = "\n".join(f"def area_{i}(width, height):\n    return width * height + {i}\n" for i in range(60))
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "area.py").write_text(code)
    (tmp_path / "held_out.py").write_text(code.replace("area", "size").replace("width", "w"))
    config = tiny_config(intermediate_size=128, num_attention_heads=4, num_hidden_layers=2)
    model = random_tensors(config, seed=2, dtype=torch.bfloat16)
    tokenizer = tiny_checkpoint / "tokenizer.model"
    save_sharded(model.read, config, tmp_path / "plain", 1, extra_files=[tokenizer])
    text = [tmp_path / "text"]
    quantize(tmp_path / "plain", tmp_path / "rtn", fmt="int4")
    for tp in (1, 2):
        quantize(tmp_path / "plain", tmp_path / f"gptq{tp}", fmt="int4", method="gptq", calibration=text, tp=tp)
    assert main(["verify", str(tmp_path / "gptq1"), str(tmp_path / "gptq2")]) == 0
    costs = {}
    with open_checkpoint(tmp_path / "plain") as before:
        for name in ("plain", "rtn", "gptq2"):
            with open_checkpoint(tmp_path / name) as after:
                costs[name] = compare_quality(before, after, [tmp_path / "held_out.py"], num_windows=4, num_holes=4)
    assert all(layer.weights == layer.output == 0 for layer in costs["plain"].layers)
    assert costs["plain"].agreement == 1 and costs["plain"].num_holes == 4
    for nearest, calibrated in zip(costs["rtn"].layers, costs["gptq2"].layers, strict=True):
        assert calibrated.output < nearest.output and calibrated.weights > nearest.weights
    assert "FIM exact match" in str(costs["rtn"])


def test_text_that_is_not_there_is_refused(
    tmp_path: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.py").write_text("\n")
    for text, message in ((tmp_path / "none", "none does not exist"), (tmp_path / "empty.py", "there is no text in")):
        assert main(["quality", str(tiny_checkpoint), str(tiny_checkpoint), "--text", str(text)]) == 2
        assert message in capsys.readouterr().err
        argv = ["quantize", str(tiny_checkpoint), str(tmp_path / "out"), "--format", "int8", "--method", "gptq"]
        assert main([*argv, "--calibration", str(text)]) == 2
        assert message in capsys.readouterr().err


def test_bitsandbytes_is_refused_where_it_cannot_run(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--model_dir", str(tiny_checkpoint), "--quantization", "int8"]
    assert sess_huggingface.main([*argv, "--device", "cpu"]) == 2
    assert "needs a CUDA GPU; leave it out, or use the engine's" in capsys.readouterr().err
    assert sess_huggingface.main([*argv, "--device", "cuda"]) == 2
    assert "needs bitsandbytes; install it" in capsys.readouterr().err
