"""The GPU suite, as far as a CPU can try it: sections, the budget, lost processes, peers, targets, report and plot."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_suite
from benchmarks.gpu import ceilings, engine, report, sections, single_kernels, worker
from benchmarks.gpu.engine import Variant
from benchmarks.gpu.sections import Section
from benchmarks.gpu.targets import targets
from benchmarks.gpu.two_ranks import first_difference
from benchmarks.gpu.weights import SharedWeights, kv_bytes_per_token, prefill_flops, streamed_bytes
from benchmarks.gpu.workload import FULL, SMALL

CPU = torch.device("cpu")
GPT_FAST = os.environ.get("GPT_FAST")
"""A checkout of meta-pytorch/gpt-fast, for the test that compares its logits."""


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """As the suite's process has it: more would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def weights() -> SharedWeights:
    return SharedWeights.random(SMALL.model, CPU)


@pytest.fixture(scope="module")
def figures(weights: SharedWeights) -> dict[str, Any]:
    """Sections of a real run, small."""
    plain = Variant("none", "native")
    return {
        "ceilings": ceilings.measure(SMALL, CPU),
        "bf16": engine.measure(weights, SMALL, CPU, plain),
        "int8": engine.measure(weights, SMALL, CPU, Variant("int8", "native")),
        "bf16 batches": engine.measure_batches(weights, SMALL, CPU, plain),
        "kernels bf16": single_kernels.measure(SMALL, CPU, "none"),
    }


def results_of(figures: dict[str, Any]) -> dict[str, Any]:
    return {
        "device": "CPU", "device_type": "cpu", "provenance": {"commit": "abc"}, "seconds": {"bf16": 1.0},
        "sections": figures, "skipped": {"fp8": "no time"}, "failed": {"tests": "Traceback\nValueError: bad"},
        "earlier": [{"commit": "before"}], "warnings": {"int8": ["argmax differs\nand more"]},
    }  # fmt: skip


def test_bytes_and_operations_of_the_full_model() -> None:
    """docs/gpu.md has the same figures, from the shapes by hand."""
    norms = (2 * 32 + 1) * 4096 * 4
    assert streamed_bytes(FULL.model, "none") == 2 * 7_230_980_096 + norms
    assert streamed_bytes(FULL.model, "int8") == 7_230_980_096 * 17 // 16 + norms
    assert kv_bytes_per_token(FULL.model) == 131_072
    layers = 32 * (25_165_824 + 16_777_216 + 118_489_088 + 59_244_544)
    assert prefill_flops(FULL.model, 2048) == 2 * layers * 2048 + 524_288 * 2048 * 2049 // 2


def test_engine_figures_are_of_what_ran(figures: dict[str, Any]) -> None:
    bf16 = figures["bf16"]
    assert [row["context"] for row in bf16["decode"]] == list(SMALL.contexts)
    assert len(bf16["greedy_ids"]) == SMALL.new_tokens
    assert any("native" in chosen for chosen in bf16["ops"])
    assert bf16["graphs"] is None and bf16["memory"] is None
    for row in [*bf16["decode"], *figures["bf16 batches"]["batches"]]:
        assert row["tokens_per_second"] == pytest.approx(1e3 * row["batch"] / row["ms_per_step"])


def test_peers_give_the_ids_of_the_engine(weights: SharedWeights, figures: dict[str, Any]) -> None:
    peers = pytest.importorskip("benchmarks.gpu.peers")
    theirs = peers.measure(weights, SMALL, CPU, SMALL.peer_contexts, is_compiled=False)
    assert [row["context"] for row in theirs["decode"]] == list(SMALL.peer_contexts)
    assert theirs["greedy_ids"] == figures["bf16"]["greedy_ids"]


def test_a_completion_ends_where_it_is_told_in_a_cache_with_more_room(weights: SharedWeights) -> None:
    peers = pytest.importorskip("benchmarks.gpu.peers")
    model = peers.load(weights, CPU)
    both = [peers.complete(model, SMALL.prompt, n, 12, CPU, cache_implementation="static") for n in (4, 9)]
    assert [len(ids) for ids in both] == [4, 9]
    assert both[0] == both[1][:4]


@pytest.mark.skipif(GPT_FAST is None, reason="GPT_FAST names no checkout of gpt-fast")
def test_gpt_fast_has_the_logits_of_transformers(weights: SharedWeights) -> None:
    peers, gpt_fast = pytest.importorskip("benchmarks.gpu.peers"), pytest.importorskip("benchmarks.gpu.gpt_fast")
    exact = replace(weights, tensors={name: tensor.float() for name, tensor in weights.tensors.items()})
    ids = torch.tensor([SMALL.prompt])
    length = ids.shape[1]
    assert GPT_FAST is not None
    with gpt_fast.imported(Path(GPT_FAST)) as generate, torch.compiler.set_stance("force_eager"), torch.no_grad():
        model = gpt_fast.load(generate, exact, length)
        model.setup_caches(1, length)
        mask = generate.create_block_mask(generate.causal_mask, 1, 1, length, model.max_seq_length, device="cpu")
        theirs = model(mask, ids, torch.arange(length))
        expected = peers.load(exact, CPU).float()(ids).logits
    assert (theirs - expected).abs().max() < 1e-4 * expected.abs().max()


def test_heads_rows_for_gpt_fast_pair_the_halves() -> None:
    gpt_fast = pytest.importorskip("benchmarks.gpu.gpt_fast")
    rows = torch.arange(8)[:, None]
    assert gpt_fast._interleaved(rows, 4).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_the_reading_kernel_reads_every_number() -> None:
    pytest.importorskip("triton")
    script = (
        "import torch; from benchmarks.gpu import read_kernel\n"
        "x = torch.arange(3 * 8 * 2048).float() % 7\n"
        "for block, warps in read_kernel.TILES[:1]:\n"
        "    sums = read_kernel.read(x, block, warps)\n"
        "    assert torch.equal(sums, x.view(3, -1).sum(1)), sums\n"
    )
    # A process of its own: here triton may have been imported without its interpreter.
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", script], env=environment, cwd=sections._ROOT, check=True)


def test_targets_tell_reached_missed_and_not_measured(figures: dict[str, Any]) -> None:
    by_text = {target.text: target for target in targets(figures, SMALL)}
    assert len(by_text) == 12
    assert next(t for text, t in by_text.items() if "transformers eager" in text).verdict == "not measured"
    faster = {
        **figures["bf16"],
        "decode": [{**row, "ms_per_step": 0.4 * row["ms_per_step"]} for row in figures["bf16"]["decode"]],
    }
    told = [target for target in targets({**figures, "int8": faster}, SMALL) if "int8 decode" in target.text]
    assert [(target.value, target.verdict) for target in told] == [(pytest.approx(2.5), "reached")]
    told = [target for target in targets({**figures, "int8": figures["bf16"]}, SMALL) if "int8 decode" in target.text]
    assert [(target.value, target.verdict) for target in told] == [(1.0, "missed")]
    assert all(target.verdict == "not measured" for target in targets({}, SMALL))


def test_report_and_plot(figures: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    results = results_of(figures)
    report.draw(tmp_path, results, SMALL)
    report.write(tmp_path, results, SMALL)
    text = (tmp_path / "gpu_cpu.md").read_text()
    for expected in (
        "Skipped: fp8: no time",
        "FAILED: tests: ValueError: bad",
        "## int8",
        "Warning: int8: argmax differs",
        "- commit: before",
        "## kernels bf16",
        "not measured",
        "gpu_cpu.png",
    ):
        assert expected in text
    assert (tmp_path / "gpu_cpu.png").stat().st_size > 10_000
    saved = json.loads((tmp_path / "gpu_cpu.json").read_text())
    assert saved["sections"] == json.loads(json.dumps(figures)) and len(saved["targets"]) == 12


class FakeWorker:
    """Sections are answered at once, or not at all."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, float]] = []

    def run(self, name: str, timeout_seconds: float) -> worker.Answer:
        self.asked.append((name, timeout_seconds))
        if name == "bad":
            raise worker.SectionError("it broke", ["an op was wrong"])
        return worker.Answer(f"figures of {name}", [])


def test_a_section_beyond_the_budget_is_skipped_and_results_are_written_after_each() -> None:
    planned = [Section(name, seconds, print) for name, seconds in (("a", 10), ("long", 95), ("bad", 10), ("b", 60))]
    results: dict[str, Any] = {"seconds": {}, "sections": {}, "skipped": {}, "failed": {}, "warnings": {}}
    written: list[int] = []
    fake = FakeWorker()
    clock = itertools.count(0, 5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "perf_counter", lambda: next(clock))
        gpu_suite.run_sections(planned, fake, 95, results, lambda: written.append(len(results["sections"])))  # type: ignore[arg-type]
    assert list(results["sections"]) == ["a", "b"] and list(results["failed"]) == ["bad"]
    assert "95 s" in results["skipped"]["long"] and results["warnings"] == {"bad": ["an op was wrong"]}
    assert written == [1, 1, 1, 2]
    assert fake.asked[0] == ("a", 60) and fake.asked[-1] == ("b", 65), "patience ends with the budget"


def test_a_lost_or_hanging_process_costs_one_section(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = worker.Worker("cpu", None)
    script = (
        "import json, os, sys, time\n"
        "for line in sys.stdin:\n"
        "    name = line.strip()\n"
        "    if name == 'dies': os._exit(3)\n"
        "    if name == 'hangs': time.sleep(100)\n"
        "    error = {'error': 'boom'} if name == 'faults' else {'figures': os.getpid()}\n"
        "    print(json.dumps({**error, 'warnings': [], 'is_usable': name != 'faults'}), flush=True)\n"
    )
    monkeypatch.setattr(handle, "_command", [sys.executable, "-c", script])
    pids = [handle.run("fine", 20).figures]
    for name, message, patience in (
        ("dies", "ended", 20),
        ("hangs", "not done after 0 s", 0.3),
        ("faults", "boom", 20),
    ):
        with pytest.raises(worker.SectionError, match=message):
            handle.run(name, patience)
        pids.append(handle.run("fine", 20).figures)
    assert handle.run("fine", 20).figures == pids[-1]
    assert len(set(pids)) == 4, "each was replaced"
    handle.close()


def test_a_section_tells_what_was_logged_and_why_it_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = worker.Worker("cpu", None)
    script = (
        "import logging, torch\n"
        "from benchmarks.gpu import worker\n"
        "from benchmarks.gpu.sections import Section\n"
        "def warn(bench): logging.getLogger('megatron_infer').warning('silu_mul fails\\nTraceback'); return 7\n"
        "def fail(bench): warn(bench); raise ValueError('no triton')\n"
        "worker.plan = lambda *_: [Section('warns', 1, warn), Section('fails', 1, fail)]\n"
        "worker.serve(torch.device('cpu'), None, is_checked=True)\n"
    )
    monkeypatch.setattr(handle, "_command", [sys.executable, "-c", script])
    assert handle.run("warns", 60) == worker.Answer(7, ["silu_mul fails\nTraceback"])
    with pytest.raises(worker.SectionError, match=r"(?s)Traceback.*in fail.*ValueError: no triton") as failed:
        handle.run("fails", 60)
    assert failed.value.warnings == ["silu_mul fails\nTraceback"]
    handle.close()


def run_suite(out: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any], str]:
    """Exit status, the results as saved, and what was printed."""
    status = gpu_suite.main(["--device", "cpu", "--out", str(out), *arguments])
    return status, json.loads((out / "gpu_cpu.json").read_text()), capsys.readouterr().out


def test_the_command_runs_a_section_in_its_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, saved, printed = run_suite(tmp_path, capsys, "--sections", "ceilings")
    assert status == 0 and saved["sections"]["ceilings"]["read_gb_per_second"] > 0
    assert printed.splitlines()[-1].startswith("| int4, device memory"), "the table of targets comes last"
    with pytest.raises(SystemExit):
        run_suite(tmp_path, capsys, "--sections", "nonsense")
    assert "there are 'ceilings'" in capsys.readouterr().err


class Recorded:
    """Stands in for the worker: answers what a real run gave, but one section fails."""

    def __init__(self, figures: dict[str, Any], broken: str) -> None:
        self.figures, self.broken, self.asked = figures, broken, []

    def __call__(self, *_: object, **__: object) -> Recorded:
        return self

    def run(self, name: str, timeout_seconds: float) -> worker.Answer:
        self.asked.append(name)
        if name == self.broken:
            raise worker.SectionError("Traceback\nRuntimeError: forced", [])
        return worker.Answer(self.figures[name], [])

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def every_section(figures: dict[str, Any], weights: SharedWeights) -> dict[str, Any]:
    """Figures of all sections of a run on the CPU; those that take other processes as they come."""
    other = {"transformers eager": {"decode": figures["bf16"]["decode"], "greedy_ids": figures["bf16"]["greedy_ids"]}}
    agreement = {"ids_agreeing": [3], "of": [3], "logprobs_equal": True}
    other |= {"two ranks": {"default": agreement}, "tests": {"tests/gpu/test_gpu.py": "9 skipped"}}
    other["bf16 vendor"] = engine.measure(weights, SMALL, CPU, Variant("none", "vendor"))
    for quantization in ("int4", "int8"):
        other[f"kernels {quantization}"] = single_kernels.measure(SMALL, CPU, quantization)
    other["int4"] = engine.measure(weights, SMALL, CPU, Variant("int4", "native"))
    return json.loads(json.dumps({**figures, **other}))


@pytest.mark.parametrize("broken", [section.name for section in sections.plan("cpu", SMALL, None)])
def test_a_failure_of_any_section_leaves_the_others_and_the_files_whole(
    broken: str, every_section: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(gpu_suite, "Worker", Recorded(every_section, broken))
    status, saved, printed = run_suite(tmp_path, capsys)
    assert status == 1 and saved["failed"] == {broken: "Traceback\nRuntimeError: forced"}
    assert saved["sections"] == {name: told for name, told in every_section.items() if name != broken}
    assert f"FAILED: {broken}: RuntimeError: forced" in (tmp_path / "gpu_cpu.md").read_text()
    assert len(printed.splitlines()) == 2 + len(targets({}, SMALL))


def test_a_second_call_adds_to_the_first(
    every_section: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_suite, "Worker", asked := Recorded(every_section, "int8"))
    _, first, _ = run_suite(tmp_path / "a", capsys, "--sections", "int8", "bf16", "ceilings")
    assert asked.asked == ["int8", "bf16", "ceilings"], "in the order that was asked for"
    result = str(tmp_path / "a" / "gpu_cpu.json")
    monkeypatch.setattr(gpu_suite, "Worker", asked := Recorded(every_section, ""))
    status, merged, _ = run_suite(tmp_path / "b", capsys, "--resume", result)
    assert status == 0 and merged["sections"] == every_section and not merged["failed"]
    assert "bf16" not in asked.asked and "int8" in asked.asked, "what there is is not measured again, what failed is"
    assert merged["earlier"] == [first["provenance"]] and merged["seconds"].keys() == every_section.keys()
    assert "int8 decode against bf16" in str([t for t in merged["targets"] if t["verdict"] != "not measured"])
    # A failure takes nothing away that an earlier call measured.
    monkeypatch.setattr(gpu_suite, "Worker", Recorded(every_section, "bf16"))
    _, again, _ = run_suite(tmp_path / "c", capsys, "--resume", result, "--sections", "bf16")
    assert again["failed"].keys() == {"bf16", "int8"} and again["sections"] == first["sections"]


@pytest.mark.parametrize("content", ["", "[]", "{}", None])
def test_what_is_no_result_cannot_be_resumed(
    content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "earlier.json"
    path.write_text(content or "") if content is not None else None
    with pytest.raises(SystemExit):
        run_suite(tmp_path, capsys, "--resume", str(path))
    assert f"--resume {path}" in capsys.readouterr().err


def test_sections_come_in_order_of_worth() -> None:
    names = [section.name for section in sections.plan("cuda", FULL, Path("somewhere"))]
    assert names[:4] == ["ceilings", "bf16", "kernels bf16", "int4"]
    assert len(names) == len(set(names)) == 19 and "gpt-fast" in names
    assert "gpt-fast" not in [section.name for section in sections.plan("cuda", FULL, None)]
    for section in sections.plan("cuda", FULL, Path("somewhere")):
        is_peer = section.name.startswith(("transformers", "gpt-fast"))
        assert section.patience == (1 if is_peer else 3), "peers must not take the time of what comes after them"
    for name in sections.TESTS:
        assert (sections._ROOT / name).is_file()


def test_a_dry_run_counts_what_the_arithmetic_says() -> None:
    """docs/gpu.md: launches, bytes and messages of a token, on one rank and on eight."""
    pytest.importorskip("triton")
    script = (
        "import json; from benchmarks.gpu.plan import *; from dataclasses import asdict\n"
        "model = ModelConfig.aixcoder_7b()\n"
        "asked = (('none', 0, 1), ('int4', 0, 1), ('none', 7, 8))\n"
        "print(json.dumps([asdict(plan_rank(model, *each)) for each in asked]))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=sections._ROOT, check=True, capture_output=True, text=True
    )
    one, int4, eight = json.loads(done.stdout)
    assert one["weight_bytes"] == streamed_bytes(FULL.model, "none")
    assert one["cache_bytes_per_position"] == 131_072 == 8 * eight["cache_bytes_per_position"]
    assert sum(one["launches"].values()) == 5 * 32 + 14 and one["sent"] == []
    assert int4["weight_bytes"] == pytest.approx(streamed_bytes(FULL.model, "int4"), rel=1e-3)
    assert eight["weight_bytes"] == pytest.approx(one["weight_bytes"] / 8, rel=1e-3)
    ours = sum(count for name, count in eight["launches"].items() if name.endswith(("_kernel", "all_reduce")))
    # An all-reduce of the embedding, a second argmax over the ranks' best, the last norm and the head.
    assert ours == 7 * 32 + 1 + 4 + 2
    assert eight["sent"] == [["all_reduce", 8192]] * (2 * 32 + 1) + [["all_gather", 8]]


def test_the_switch_turns_dependent_launch_off_in_every_kernel() -> None:
    pytest.importorskip("triton")
    script = (
        "from benchmarks.gpu.engine import without_dependent_launch\n"
        "from benchmarks.gpu.absent import compiling\n"
        "from tests.triton.launches_attention import LAUNCHES as attention\n"
        "from tests.triton.launches_linear import LAUNCHES as linear\n"
        "from contextlib import nullcontext\n"
        "for switch in (nullcontext, without_dependent_launch):\n"
        "    found = []\n"
        "    with switch(), compiling(90, lambda kernel: found.append(kernel.metadata.launch_pdl)):\n"
        "        linear['decode fp16'](), attention['decode aixcoder']()\n"
        "    assert found == [switch is nullcontext] * 2, found\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", script], env=environment, cwd=sections._ROOT, check=True)


def test_first_difference() -> None:
    assert [first_difference(a, b) for a, b in (([1, 2], [1, 3]), ([1, 2], [1, 2, 3]), ([], [1]))] == [1, 2, 0]
