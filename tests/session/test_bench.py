"""The command `bench`: promised fields, a profile that adds up, answers it does not change, clear errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_infer import LLM, SamplingParams
from megatron_infer.commands.bench import main
from megatron_infer.commands.options import percentile
from megatron_infer.profile import COLLECTIVES, Profile

QUICK = ["--device", "cpu", "--kv_cache_memory_bytes", str(4 << 20), "--num_threads", "1"]
WORK = ["--batch", "2", "--prompt_tokens", "40", "--new-tokens", "6", "--repetitions", "2"]
LINEARS = {"attention.qkv": 3, "attention.out": 3, "feed_forward.gate_up": 3, "feed_forward.down": 3, "head": 1}
"""Calls per step of the tiny model, which has three layers."""
FIELDS = {
    "model_dir", "engine", "batch", "prompt_tokens", "new_tokens", "repetitions", "load_seconds",
    "time_to_first_token_ms", "prefill_tokens_per_second", "prefill_gflop_per_second", "inter_token_latency_ms",
    "decode_tokens_per_second_per_sequence", "decode_tokens_per_second", "decode_weights_gb_per_second",
    "engine_ms_per_decode_step", "draft_sources", "peak_memory_bytes",
}  # fmt: skip


@pytest.mark.parametrize("size", [1, 2])
def test_json_has_every_figure_and_the_profile_adds_up(tiny_checkpoint: Path, capfd, size: int) -> None:
    arguments = ["--model_dir", str(tiny_checkpoint), *QUICK, *WORK, "--tensor_parallel_size", str(size)]
    assert main([*arguments, "--json", "--profile"]) == 0
    out, err = capfd.readouterr()
    figures = json.loads(out)
    assert figures.keys() == FIELDS | {"profile"}
    assert figures["engine"]["tensor_parallel_size"] == size
    assert "inter-token latency" in err
    assert all(figures[name] > 0 for name in FIELDS if isinstance(figures[name], (int, float)))
    for phase, steps in (("prefill", 2), ("decode", 2 * 5)):
        profile = figures["profile"][phase]
        assert profile["steps"] == steps
        rows = {row["op"]: row for row in profile["ops"]}
        assert sum(row["ms_per_step"] for row in rows.values()) == pytest.approx(profile["ms_per_step"])
        assert {name: rows[name]["calls_per_step"] for name in LINEARS} == LINEARS
        assert all(rows[name]["gb_per_second"] > 0 < rows[name]["gflop_per_second"] for name in [*LINEARS, "attention"])
        assert (rows.keys() >= set(COLLECTIVES)) == (size == 2)


def test_the_report_goes_to_stdout(tiny_checkpoint: Path, capfd) -> None:
    assert main(["--model_dir", str(tiny_checkpoint), *QUICK, *WORK]) == 0
    out, err = capfd.readouterr()
    assert "time to first token" in out
    assert "calls/step" not in out, "the table is for --profile"
    assert err == ""


def test_a_profile_changes_no_answer_and_counts_what_was_done(tiny_checkpoint: Path) -> None:
    prompts = [list(range(20, 60)), list(range(100, 103))]
    sampling = SamplingParams(max_new_tokens=12, ignore_eos=True)
    options = {"device": "cpu", "kv_cache_memory_bytes": 4 << 20, "num_threads": 1, "num_draft_tokens": 0}
    with LLM(tiny_checkpoint, **options) as llm:
        plain = [c.token_ids for c in llm.complete_batch(prompts, sampling)]
    profile, by_layer = Profile(op_by_op=True), Profile(op_by_op=False)
    with LLM(tiny_checkpoint, profile=profile, **options) as llm:
        with profile.recording():
            profiled = list(llm.complete_batch(prompts, sampling))
        idle = [c.token_ids for c in llm.complete_batch(prompts, sampling)]
        config = llm.model_config
    with LLM(tiny_checkpoint, profile=by_layer, **options) as llm, by_layer.recording():
        assert [c.token_ids for c in llm.complete_batch(prompts, sampling)] == plain
    for phase, totals in profile.phases.items():
        whole = by_layer.phases[phase]
        assert whole.num_steps == totals.num_steps
        assert sum(op.flops for op in whole.ops.values()) == sum(op.flops for op in totals.ops.values())
    assert [c.token_ids for c in profiled] == plain == idle
    prefill, decode = profile.phases["prefill"], profile.phases["decode"]
    assert (prefill.num_steps, decode.num_steps) == (1, 11), "nothing is recorded when it is over"
    assert len(decode.engine_seconds) == 11
    # 40 and 3 query rows that see 1, 2, ... positions, in each of three layers.
    seen = 40 * 41 // 2 + 3 * 4 // 2
    width = config.num_attention_heads * config.head_dim
    assert prefill.ops["attention"].flops == config.num_hidden_layers * 4 * width * seen
    assert prefill.ops["attention.out"].flops == config.num_hidden_layers * 2 * 43 * width * config.hidden_size
    # bfloat16 keys and values of both contexts, which grow by one position per step.
    positions = sum(40 + step + 3 + step for step in range(1, 12))
    bytes_each = 2 * config.num_key_value_heads * config.head_dim * 2
    assert decode.ops["attention"].num_bytes == config.num_hidden_layers * positions * bytes_each
    for done in profiled:
        times = done.timings.token_seconds
        assert len(times) == 12
        assert list(times) == sorted(times)
        assert times[0] == done.timings.first_token_seconds


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "0"], "--batch must be at least 1"),
        (["--new_tokens", "1"], "needs two"),
        (["--batch", "65"], "exceeds --max_num_seqs 64"),
        (["--prompt_tokens", "600"], "raise --max_model_len"),
        (["--batch", "64"], "raise --kv_cache_memory_bytes"),
        (["--model_dir", "/nowhere/at/all"], "is not a directory"),
        (["--dtype", "int3"], "dtype must be one of"),
    ],
)
def test_mistakes_get_one_clear_line(tiny_checkpoint: Path, capsys, arguments: list[str], message: str) -> None:
    assert main(["--model_dir", str(tiny_checkpoint), *QUICK, *arguments]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert "Traceback" not in err
    assert out == ""


def test_percentiles_are_values_that_occurred() -> None:
    assert [percentile([4.0, 1.0, 3.0, 2.0], p) for p in (50, 75, 99)] == [2.0, 3.0, 4.0]
