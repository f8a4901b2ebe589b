"""Any checkpoint becomes any other without a changed bit, in little memory, and never half."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import sess_huggingface
from checkpoints_convert import Options, hf2megatron, inspect, megatron2hf, merge_lora, reshard, tensor_writers
from checkpoints_convert.__main__ import main
from checkpoints_convert.export import save_hf
from megatron_infer.model.checkpoint import open_checkpoint
from megatron_infer.model.weights import expected_tensors, hf_name
from megatron_infer.model_config import ModelConfig
from megatron_infer.text.fim import FimPrompt
from sess_megatron import TestInference
from tests.support.checkpoint_cases import HF, MODEL, NAME, PLAIN, PT, WRITERS, Model, assert_same, save

ROOT = Path(__file__).resolve().parents[2]
ONE_SHARD = "model-rank0-of-1.safetensors"
S0 = "model-rank0-of-2.safetensors"

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "aixcoder": ("Llama", {"rope_theta": 256000.0, "rms_norm_eps": 1e-5}),
    "codellama, every head its own keys": ("Llama", {"num_key_value_heads": 8, "rope_theta": 1e6}),
    "deepseek-coder, linear scaling": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e5}, "rms_norm_eps": 1e-6},
    ),
    "granite, all biases, tied": ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "qwen2.5-coder, qkv bias": ("Qwen2", {"rope_theta": 1e6, "rms_norm_eps": 1e-6}),
    "qwen2.5-coder, tied": ("Qwen2", {"tie_word_embeddings": True}),
    "codestral": ("Mistral", {"rope_theta": 1e6, "sliding_window": None, "head_dim": 16}),
    "yi-coder": ("Llama", {"rope_theta": 1e7, "rms_norm_eps": 1e-5, "num_key_value_heads": 4}),
}


def hf_directory(family: str, out: Path) -> Path:
    """A random checkpoint as transformers itself writes it, biases and norms not at their neutral start."""
    kind, changes = FAMILIES[family]
    config = getattr(transformers, f"{kind}Config")(**{**SHAPE, **changes})
    torch.manual_seed(len(family))
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.to(torch.bfloat16).save_pretrained(out)
    return out


def hf_logits(directory: Path) -> torch.Tensor:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    with torch.no_grad():
        return model.eval()(torch.arange(40).unsqueeze(0)).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_changes_no_bit_and_no_logit(tmp_path: Path, family: str) -> None:
    first = hf_directory(family, tmp_path / "hf")
    options = Options(model_name=NAME)
    hf2megatron(first, tmp_path / "tp1", tp=1)
    reshard(tmp_path / "tp1", tmp_path / "tp2", tp=2)
    reshard(tmp_path / "tp2", tmp_path / "tp4", tp=4)
    reshard(tmp_path / "tp4", tmp_path / "again", tp=1)
    hf2megatron(tmp_path / "again", tmp_path / "pt", fmt="pt", options=options)
    reshard(tmp_path / "pt", tmp_path / "pt4", tp=4, options=options)
    megatron2hf(tmp_path / "pt4", tmp_path / "last", options=options)
    before, after = load_file(first / HF), load_file(tmp_path / "last" / HF)
    before.pop("lm_head.weight", None) if "tied" in family else None
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
    assert torch.equal(hf_logits(first), hf_logits(tmp_path / "last"))
    kinds = {name: open_checkpoint(tmp_path / name, NAME).kind for name in ("tp4", "pt", "pt4", "last")}
    assert list(kinds.values()) == ["sharded-safetensors", "megatron-pt", "megatron-pt-shards", "hf-safetensors"]
    one, two = load_file(tmp_path / "tp1" / ONE_SHARD), load_file(tmp_path / "again" / ONE_SHARD)
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    with open_checkpoint(first) as a, open_checkpoint(tmp_path / "last") as b:
        assert replace(a.config, fim=None) == replace(b.config, fim=None)


@pytest.mark.parametrize("fmt", ["sharded", "pt", "hf"])
def test_dtype_changes_on_the_way(tmp_path: Path, fmt: str) -> None:
    options = Options(model_name=NAME, dtype="float32")
    source = save(tmp_path, "sharded-4")
    if fmt == "hf":
        summary = megatron2hf(source, tmp_path / "out", options=options)
    else:
        summary = hf2megatron(source, tmp_path / "out", tp=2, fmt=fmt, options=options)
    with open_checkpoint(tmp_path / "out", NAME) as checkpoint:
        assert checkpoint.config.torch_dtype == "float32"
        assert_same(checkpoint, Model(PLAIN, {name: tensor.float() for name, tensor in MODEL.tensors.items()}))
        assert checkpoint.num_bytes <= summary.num_bytes < 1.02 * checkpoint.num_bytes


def test_values_that_a_dtype_cannot_hold_are_refused_by_name(tmp_path: Path) -> None:
    big = {**MODEL.tensors, "norm.weight": torch.full((32,), 1e30).bfloat16()}
    save_hf(Model(PLAIN, big).read, PLAIN, tmp_path / "hf")
    with pytest.raises(ValueError, match=r"'norm\.weight' has values that float16 cannot hold"):
        reshard(tmp_path / "hf", tmp_path / "out", tp=1, options=Options(dtype="float16"))
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_tensors_of_several_dtypes_stay_as_they_are(tmp_path: Path) -> None:
    mixed = {name: tensor.float() if "norm" in name else tensor for name, tensor in MODEL.tensors.items()}
    save_hf(Model(PLAIN, mixed).read, PLAIN, tmp_path / "hf")
    hf2megatron(tmp_path / "hf", tmp_path / "tp2", tp=2)
    with open_checkpoint(tmp_path / "tp2") as checkpoint:
        assert_same(checkpoint, Model(PLAIN, mixed))
    mixed["layers.0.attention.wk.weight"] = mixed["layers.0.attention.wk.weight"].float()
    save_hf(Model(PLAIN, mixed).read, PLAIN, tmp_path / "odd")
    with pytest.raises(ValueError, match=r"attention\.wk\.weight.*are of different dtypes.*name a dtype"):
        hf2megatron(tmp_path / "odd", tmp_path / "out")


# ---- what the official libraries make of our files ------------------------------------------------------------------


def test_pt_file_is_what_torch_save_would_have_written(tmp_path: Path) -> None:
    path = save(tmp_path, "pt") / PT
    mapped = torch.load(path, weights_only=True, mmap=True)
    loaded = torch.load(path, weights_only=True)
    torch.save(loaded, tmp_path / "again.pt")
    again = torch.load(tmp_path / "again.pt", weights_only=True)
    assert list(mapped) == list(again) and mapped["megatron_infer"] == again["megatron_infer"]
    for name, tensor in mapped["model"].items():
        assert torch.equal(tensor, again["model"][name])
        assert tensor.stride() == again["model"][name].stride()
        assert tensor.data_ptr() % 64 == 0
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None, "checksums are right"


def test_safetensors_header_is_aligned_and_in_order(tmp_path: Path) -> None:
    data = (save(tmp_path, "sharded-2") / S0).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0 and data[8:9] == b"{"
    assert header.pop("__metadata__")["format"] == "pt"
    offsets = [entry["data_offsets"] for entry in header.values()]
    assert offsets[0][0] == 0 and offsets[-1][1] == len(data) - 8 - length
    assert all(a[1] == b[0] for a, b in zip(offsets, offsets[1:], strict=False))


# ---- never half ---------------------------------------------------------------------------------------------------

KILL = """
import os, signal, sys
import torch
from pathlib import Path
from checkpoints_convert import Options, reshard
from checkpoints_convert import tensor_writers

torch.set_num_threads(1)
source, out, force = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "force"
count, limit, watching = 0, None, False

def event(*_):
    global count
    if watching:
        count += 1
        if count == limit:
            os.kill(os.getpid(), signal.SIGKILL)

def hook(name, _):
    if name in ("open", "os.mkdir", "os.chmod", "os.rename", "shutil.rmtree", "os.rmdir"):
        event()

def convert(kill_at):
    "Number of events, or -1 when it was killed."
    global watching, limit
    read_end, write_end = os.pipe()
    child = os.fork()
    if not child:
        sys.addaudithook(hook)
        original = tensor_writers.write_all
        tensor_writers.write_all = lambda write, data: (event(), original(write, data))
        limit, watching = kill_at, True
        reshard(source, out, tp=2, options=Options(force=force))
        watching = False
        os.write(write_end, str(count).encode())
        os._exit(0)
    _, status = os.waitpid(child, 0)
    os.close(write_end)
    text = os.read(read_end, 20)
    os.close(read_end)
    return int(text) if text else -os.WTERMSIG(status)

for line in sys.stdin:
    print(convert(int(line) if line.strip() else None), flush=True)
"""


@pytest.mark.parametrize("force", [False, True])
def test_output_is_absent_or_complete_whenever_the_run_is_killed(tmp_path: Path, force: bool) -> None:
    """Deterministic moments over the whole run: every file opened, tensor written, directory made, renamed, removed."""
    source, out = save(tmp_path, "hf"), tmp_path / "work" / "out"
    WRITERS["sharded-4"][1](MODEL, tmp_path / "old")
    command = [sys.executable, "-c", KILL, str(source), str(out), "force" if force else "fresh"]
    outcomes = set()
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as driver:

        def convert(kill_at: int | None) -> int:
            assert driver.stdin and driver.stdout
            shutil.rmtree(out.parent, ignore_errors=True)
            if force:
                shutil.copytree(tmp_path / "old", out)
            driver.stdin.write(f"{kill_at or ''}\n")
            driver.stdin.flush()
            return int(driver.stdout.readline())

        num_events = convert(None)
        moments = {1 + i * (num_events - 1) // 11 for i in range(12)}
        moments |= set(range(num_events - 9, num_events + 1))
        assert len(moments) >= 20
        for moment in sorted(moments):
            assert convert(moment) == -9
            outcomes.add(out.exists())
            if out.exists():
                with open_checkpoint(out, verify=True) as checkpoint:
                    assert_same_tensors(checkpoint)
            elif force:
                with open_checkpoint(out.with_name(".out.old"), verify=True) as checkpoint:
                    assert_same_tensors(checkpoint)
        assert outcomes == {True, False}
        assert convert(num_events // 2) == -9
        driver.communicate()
    assert len(list(out.parent.iterdir())) == 1 + force
    reshard(source, out, tp=2, options=Options(force=force))
    assert [path.name for path in out.parent.iterdir()] == ["out"], "what killed runs left behind is gone"


def assert_same_tensors(checkpoint: Any) -> None:
    assert all(torch.equal(checkpoint.read(name), MODEL.tensors[name]) for name in checkpoint.names())


def test_a_checkpoint_moved_aside_by_a_killed_run_comes_back(tmp_path: Path) -> None:
    out = save(tmp_path, "sharded-4")
    out.rename(tmp_path / ".sharded-4.old")
    with pytest.raises(ValueError, match="is not an empty directory"):
        reshard(save(tmp_path, "hf"), out, tp=2)
    with open_checkpoint(out, verify=True) as checkpoint:
        assert_same(checkpoint, MODEL)


def test_a_running_conversion_is_not_disturbed(tmp_path: Path) -> None:
    source = save(tmp_path, "hf")
    seen = []

    def reading(name: str, *slices: Any) -> torch.Tensor:
        if not seen and any(path.name.startswith(".out.part-") for path in tmp_path.iterdir()):
            with pytest.raises(ValueError, match="another process is writing"):
                reshard(source, tmp_path / "out", tp=1)
            seen.append(name)
        return MODEL.read(name, *slices)

    save_hf(reading, PLAIN, tmp_path / "out")
    assert seen
    with open_checkpoint(tmp_path / "out") as checkpoint:
        assert_same(checkpoint, MODEL)


@pytest.mark.parametrize("command", ["reshard", "pt", "hf"])
def test_full_disk_is_a_clear_error_and_nothing_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    source, out = str(save(tmp_path, "sharded-1")), str(tmp_path / "out")
    argv = {
        "reshard": ["reshard", source, out, "--tp", "2"],
        "pt": ["hf2megatron", source, out, "--format", "pt"],
        "hf": ["megatron2hf", source, out],
    }[command]
    usage = SimpleNamespace(free=50_000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        assert main(argv) == 2
    assert re.search(r"\d+ bytes are needed for .*out, and its disk has 50000 free", capsys.readouterr().err)
    original, calls = tensor_writers.write_all, []

    def failing(write: Any, data: memoryview) -> None:
        calls.append(len(data))
        if len(calls) > 8:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(write, data)

    with monkeypatch.context() as patch:
        patch.setattr(tensor_writers, "write_all", failing)
        assert main(argv) == 2
    assert "became full (No space left on device)" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sharded-1"]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:  # the kernel itself stops taking bytes in the middle of a block
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        status = main(argv)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 2 and "became full (File too large)" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sharded-1"]


@pytest.mark.parametrize(
    ("foreign", "message"),
    [(None, None), ("notes.txt", "there is 'notes.txt'"), ("sub/", "there is 'sub'"), ("link", "there is 'model-link")],
)
def test_force_replaces_checkpoints_and_nothing_else(tmp_path: Path, foreign: str | None, message: str | None) -> None:
    source, out = save(tmp_path, "hf"), save(tmp_path, "sharded-4")
    with pytest.raises(ValueError, match=r"not an empty directory; .*--force"):
        reshard(source, out, tp=2)
    if foreign == "sub/":
        (out / "sub").mkdir()
    elif foreign == "link":
        (out / "model-link.safetensors").symlink_to(source / HF)
    elif foreign:
        (out / foreign).write_text("mine")
    before = sorted(path.name for path in out.iterdir())
    if message is None:
        reshard(source, out, tp=2, options=Options(force=True))
        assert sorted(path.name for path in out.glob("*.safetensors")) == [S0, "model-rank1-of-2.safetensors"]
    else:
        with pytest.raises(ValueError, match=f"{message}.*never replaced"):
            reshard(source, out, tp=2, options=Options(force=True))
        assert sorted(path.name for path in out.iterdir()) == before
    with pytest.raises(ValueError, match="is the source itself"):
        reshard(source, source, tp=2, options=Options(force=True))


# ---- memory -------------------------------------------------------------------------------------------------------

MEASURE = """
import sys, threading
from pathlib import Path
import torch
from checkpoints_convert import Options, hf2megatron, megatron2hf
from megatron_infer.model.checkpoint import open_checkpoint
from checkpoints_convert.export import converted

def anonymous_kib():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1])

def peak_of(work):
    peak, done = [0], threading.Event()
    def watch():
        while not done.wait(0.001):
            peak[0] = max(peak[0], anonymous_kib())
    thread = threading.Thread(target=watch)
    before = anonymous_kib()
    thread.start()
    try:
        kept = work()
        peak[0] = max(peak[0], anonymous_kib())
    finally:
        done.set()
        thread.join()
    return peak[0] - before

source, out = Path(sys.argv[1]), Path(sys.argv[2])
options = Options(model_name="tiny")
for _ in range(8):  # what torch's threads take for themselves, once
    converted(torch.zeros(512, 4096, dtype=torch.bfloat16), torch.float16, "warm-up")
print(peak_of(lambda: hf2megatron(source, out / "sharded", tp=2, options=options)))
print(peak_of(lambda: hf2megatron(out / "sharded", out / "pt", tp=2, fmt="pt", options=options)))
print(peak_of(lambda: megatron2hf(out / "pt", out / "back", options=options)))
print(peak_of(lambda: hf2megatron(source, out / "half", options=Options(dtype="float16"))))
def whole():
    with open_checkpoint(source) as checkpoint:
        return [checkpoint.read(name).clone() for name in checkpoint.names()]
print(peak_of(whole))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_stays_below_half_of_one_tensor(tmp_path: Path) -> None:
    # What converting takes is a few blocks of 4 MiB, how many at once depends on when the system takes freed ones back.
    config = replace(PLAIN, vocab_size=12288, hidden_size=4096, intermediate_size=1536, num_hidden_layers=1)
    zero = torch.zeros(1, dtype=torch.bfloat16)
    shapes = expected_tensors(config)

    def zeros(name: str, rows: tuple[int, int] | None = None, cols: tuple[int, int] | None = None) -> torch.Tensor:
        assert cols is None and rows is not None
        return zero.expand(rows[1] - rows[0], *shapes[name][1:])

    save_hf(zeros, config, tmp_path / "hf")
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "hf"), str(tmp_path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    *converting_kib, whole_kib = map(int, done.stdout.split())
    tensor_kib = 12288 * 4096 * 2 // 1024
    assert whole_kib > 2 * tensor_kib, "the measure sees a checkpoint that is read whole"
    assert max(converting_kib) < tensor_kib // 2, converting_kib
    with open_checkpoint(tmp_path / "hf") as a, open_checkpoint(tmp_path / "half") as b:
        assert b.num_bytes == a.num_bytes > 170_000_000
        assert b.config.torch_dtype == "float16"


# ---- LoRA ---------------------------------------------------------------------------------------------------------

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Edit = Callable[[dict[str, Any], dict[str, torch.Tensor]], Any]


def save_adapter(out: Path, edit: Edit | None = None, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """A PEFT adapter for MODEL's shape; returns its matrices under PEFT's names."""
    generator = torch.Generator().manual_seed(3)
    raw: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": TARGETS, "bias": "none"}
    tensors = {}
    for name, shape in expected_tensors(PLAIN).items():
        module = hf_name(name).removesuffix(".weight")
        if module.rpartition(".")[2] in TARGETS:
            for letter, size in (("A", (4, shape[1])), ("B", (shape[0], 4))):
                key = f"base_model.model.{module}.lora_{letter}.weight"
                tensors[key] = torch.randn(size, generator=generator).to(dtype)
    if edit:
        edit(raw, tensors)
    out.mkdir()
    (out / "adapter_config.json").write_text(json.dumps(raw))
    save_file(tensors, out / "adapter_model.safetensors")
    return tensors


def merged_model(adapter: dict[str, torch.Tensor], scale: Callable[[str], float]) -> Model:
    """MODEL with W + scale * B A, straight from the definition."""
    tensors = dict(MODEL.tensors)
    for name in tensors:
        key = f"base_model.model.{hf_name(name).removesuffix('.weight')}.lora_%s.weight"
        if key % "A" in adapter:
            delta = scale(name) * (adapter[key % "B"].double() @ adapter[key % "A"].double())
            tensors[name] = (tensors[name].float() + delta.float()).bfloat16()
    return Model(PLAIN, tensors)


@pytest.mark.parametrize(("base", "fmt"), [("hf", None), ("hf", "sharded"), ("pt-2", "hf"), ("sharded-2", "pt")])
def test_lora_is_added_as_defined_whatever_the_layout(tmp_path: Path, base: str, fmt: str | None) -> None:
    adapter = save_adapter(tmp_path / "adapter")
    tp = 1 if fmt in (None, "hf") else 2
    merge_lora(save(tmp_path, base), tmp_path / "adapter", tmp_path / "out", tp=tp, fmt=fmt, options=Options(NAME))
    with open_checkpoint(tmp_path / "out", NAME) as checkpoint:
        assert checkpoint.config == PLAIN
        assert_same(checkpoint, merged_model(adapter, lambda name: 6 / 4))


def test_lora_scale_follows_rslora_and_patterns(tmp_path: Path) -> None:
    def edit(raw: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        raw.update(use_rslora=True, alpha_pattern={"layers.1.self_attn.v_proj": 12}, rank_pattern={"down_proj": 2})
        for key in [key for key in tensors if "down_proj" in key]:
            tensors[key] = (tensors[key][:2] if "lora_A" in key else tensors[key][:, :2]).contiguous()

    adapter = save_adapter(tmp_path / "adapter", edit, torch.bfloat16)
    merge_lora(save(tmp_path, "hf"), tmp_path / "adapter", tmp_path / "out")

    def scale(name: str) -> float:
        alpha = 12 if name == "layers.1.attention.wv.weight" else 6
        return alpha / (2 if "w2" in name else 4) ** 0.5

    with open_checkpoint(tmp_path / "out") as checkpoint:
        assert_same(checkpoint, merged_model(adapter, scale))


Q = "base_model.model.model.layers.0.self_attn.q_proj"
LORA_REFUSALS: dict[str, tuple[Edit, str]] = {
    "dora": (lambda raw, t: raw.update(use_dora=True), "use_dora cannot be merged"),
    "whole modules": (lambda raw, t: raw.update(modules_to_save=["lm_head"]), "modules_to_save cannot be merged"),
    "another method": (lambda raw, t: raw.update(peft_type="IA3"), "peft_type 'IA3'"),
    "biases": (lambda raw, t: raw.update(bias="all"), "bias 'all'"),
    "changed base": (lambda raw, t: raw.update(init_lora_weights="pissa_niter_4"), "changes the base"),
    "no rank": (lambda raw, t: raw.pop("r"), "r must be a positive integer"),
    "head": (lambda raw, t: t.update({"base_model.model.lm_head.lora_A.weight": torch.ones(4, 32)}), "lm_head.*cannot"),
    "embedding": (
        lambda raw, t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 72)}),
        "embed_tokens.lora_embedding_A' cannot be merged",
    ),
    "magnitudes": (lambda raw, t: t.update({f"{Q}.lora_magnitude_vector": torch.ones(64)}), "lora_magnitude_vector"),
    "half a pair": (lambda raw, t: t.pop(f"{Q}.lora_B.weight"), r"lora_B of .*q_proj' is missing"),
    "another base": (
        lambda raw, t: t.update({f"{Q}.lora_B.weight": torch.ones(60, 4)}),
        r"\[60, 4\], expected \[64, 4",
    ),
    "more layers": (
        lambda raw, t: t.update({f"{Q.replace('0', '7')}.lora_A.weight": torch.ones(4, 32)}),
        "layers.7.*cannot be merged",
    ),
    "nothing": (lambda raw, t: t.clear(), "holds no LoRA matrices"),
    "not a number": (lambda raw, t: t[f"{Q}.lora_A.weight"].fill_(torch.nan), "layers.0.attention.wq.weight' infinite"),
}


@pytest.mark.parametrize("case", LORA_REFUSALS)
def test_adapters_that_cannot_be_merged_are_refused_by_name(tmp_path: Path, case: str) -> None:
    edit, message = LORA_REFUSALS[case]
    save_adapter(tmp_path / "adapter", edit)
    with pytest.raises(ValueError, match=message):
        merge_lora(save(tmp_path, "hf"), tmp_path / "adapter", tmp_path / "out", fmt="sharded")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "hf"]


# ---- the command line ----------------------------------------------------------------------------------------------


def test_commands_print_results_to_stdout_and_the_rest_to_stderr(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(save(tmp_path, "hf"))
    assert main(["hf2megatron", source, str(tmp_path / "tp2"), "--tp", "2"]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert re.search(r"reading hf-safetensors from .*hf-safetensors -> .*tp2: [\d,]+ bytes.*MB/s", err, re.DOTALL)
    assert main(["verify", str(tmp_path / "tp2")]) == 0
    assert "all 3 files are as they were written" in capsys.readouterr().out
    assert main(["verify", source, str(tmp_path / "tp2"), "--logits"]) == 0
    out = capsys.readouterr().out
    assert "all 21 tensors are equal, bit for bit" in out and "max abs diff 0, same greedy tokens" in out
    assert main(["verify", source]) == 2
    assert "has no manifest.json" in capsys.readouterr().err
    with pytest.raises(SystemExit) as usage:
        main(["reshard", source, str(tmp_path / "x")])
    assert usage.value.code == 2


def test_verify_names_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = save(tmp_path, "hf")
    changed = {name: tensor.clone() for name, tensor in MODEL.tensors.items()}
    changed["layers.1.feed_forward.w2.weight"][3, 5] += 0.5
    save_hf(Model(PLAIN, changed).read, PLAIN, tmp_path / "b")
    assert main(["verify", str(a), str(tmp_path / "b"), "--logits"]) == 1
    out = capsys.readouterr().out
    assert re.search(
        r"layers\.1\.feed_forward\.w2\.weight: max abs diff 0\.5\d* \(bfloat16\)\n1 of 21 tensors differ", out
    )
    assert not re.search(r"logits: max abs diff 0,", out)
    assert main(["verify", str(a), str(tmp_path / "b"), "--tolerance", "0.6"]) == 0
    save_hf(MODEL.read, replace(PLAIN, rope_theta=5e5), tmp_path / "c")
    assert main(["verify", str(a), str(tmp_path / "c")]) == 1
    assert "config rope_theta: 10000.0 and 500000.0" in capsys.readouterr().out
    reshard(a, tmp_path / "d", tp=1, options=Options(dtype="float32"))
    assert main(["verify", str(a), str(tmp_path / "d")]) == 1
    assert "max abs diff 0 (bfloat16 and float32)" in capsys.readouterr().out
    assert main(["verify", str(a), str(tmp_path / "d"), "--tolerance", "1e-9"]) == 0


def test_verify_sees_a_flipped_bit_by_its_hash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = save(tmp_path, "sharded-2")
    data = bytearray((directory / S0).read_bytes())
    data[-1] ^= 1
    (directory / S0).write_bytes(data)
    assert main(["verify", str(directory)]) == 2
    assert f"{S0} does not match the SHA-256" in capsys.readouterr().err
    assert main(["reshard", str(directory), str(tmp_path / "out"), "--tp", "1", "--verify"]) == 2
    assert not (tmp_path / "out").exists()


def test_damaged_sources_are_refused_by_name_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, out = save(tmp_path, "sharded-2"), tmp_path / "out"
    good = (directory / S0).read_bytes()
    for damage, message in (
        (lambda path: os.truncate(path, 100), f"{S0} has 100 bytes, manifest.json says"),
        (lambda path: path.unlink(), f"{S0} is missing"),
        (
            lambda path: shutil.copy(directory / S0.replace("rank0", "rank1"), path),
            "says in its header that it is shard 1",
        ),
    ):
        damage(directory / S0)
        assert main(["megatron2hf", str(directory), str(out)]) == 2
        assert re.search(message, capsys.readouterr().err)
        (directory / S0).write_bytes(good)
    assert main(["reshard", str(directory), str(out), "--tp", "3"]) == 2
    assert "numbers that work: 1, 2, 4" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sharded-2"]


def test_inspect_says_what_it_is_and_what_fits(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tiny_checkpoint), "--memory", "1MiB", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    with open_checkpoint(tiny_checkpoint) as checkpoint:
        assert (report["kind"], report["fim"], report["num_bytes"]) == (
            checkpoint.kind,
            "aixcoder",
            checkpoint.num_bytes,
        )
        assert ModelConfig.from_hf(report["config"]) == checkpoint.config
    assert report["num_parameters"] == checkpoint.num_bytes // 2
    assert [rank["tp"] for rank in report["ranks"]] == [1, 2, 4, 8]
    assert [rank["fits"] for rank in report["ranks"]] == [rank["weight_bytes"] < 1 << 20 for rank in report["ranks"]]
    # 3 layers x keys and values x heads of 32 x 2 bytes; two KV heads, one from tp 2 on.
    assert [rank["kv_bytes_per_token"] for rank in report["ranks"]] == [768, 384, 384, 384]
    text = str(inspect(tiny_checkpoint))
    assert "FIM family     aixcoder" in text and "fits" not in text


# ---- transformers as the reference -----------------------------------------------------------------------------------


def test_transformers_gives_the_engines_answer_from_the_same_ids(tiny_checkpoint: Path) -> None:
    prompt = FimPrompt("def quick_sort(values):\n    ", "\n    return values\n", "sort.py")
    reference = sess_huggingface.HuggingFaceInference(tiny_checkpoint, device="cpu")
    answer = reference.complete(prompt, max_new_tokens=12)
    with TestInference(tiny_checkpoint, device="cpu", max_model_len=256, kv_cache_dtype="float32") as session:
        completion = session.run_infer(prompt.prefix, 12, prompt.suffix, prompt.path)
        ids = session.llm.fim.encode(prompt).ids
    assert answer.prompt_ids == ids
    assert answer.text == completion and answer.new_ids


def test_transformers_session_says_what_is_missing(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert sess_huggingface.main(["--model_dir", str(tiny_checkpoint), "--device", "cpu"]) == 2
    assert "needs transformers; install it" in capsys.readouterr().err
    assert sess_huggingface.main(["--cursor", "1:1"]) == 2
    assert "--file and --cursor LINE:COL go together" in capsys.readouterr().err
