"""What users ask of sampling, through whole sessions: penalties, bans, lengths, and the command line."""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from checkpoints_convert.export import save_sharded
from megatron_infer import LLM, FimPrompt, SamplingParams
from megatron_infer.checks import unescaped
from megatron_infer.completion import Completion
from megatron_infer.text.tokenizer import Tokenizer
from sess_megatron import TestInference
from tests.support.tiny_models import random_tensors, tiny_config, write_tokenizer

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = {"device": "cpu", "kv_cache_memory_bytes": 4 << 20}
PROMPT = FimPrompt("def area(width, height):\n    return ", "\n\nprint(area(2, 3))\n", "shapes/area.py")
FREE = SamplingParams(max_new_tokens=20, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tiny_checkpoint: Path) -> Iterator[LLM]:
    with LLM(tiny_checkpoint, **OPTIONS) as running:
        yield running


@pytest.fixture(scope="module")
def free(llm: LLM) -> Completion:
    return llm.complete(PROMPT, FREE)


def ask(llm: LLM, **changes: object) -> Completion:
    return llm.complete(PROMPT, SamplingParams(**{"max_new_tokens": 20, "ignore_eos": True, **changes}))  # type: ignore[arg-type]


# ---- bans and penalties ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_banned_token_never_appears_and_log_probabilities_stay_the_models(llm, free, temperature) -> None:
    banned = dict.fromkeys(free.token_ids[:3], -math.inf)
    done = ask(llm, logit_bias=banned, temperature=temperature, seed=3, logprobs=2)
    assert not set(banned) & set(done.token_ids)
    assert done.logprobs is not None
    assert done.logprobs[0].top[0][0] == free.token_ids[0], "the model itself would have chosen it"


def test_a_strong_bias_forces_a_token(llm: LLM) -> None:
    assert set(ask(llm, logit_bias={77: 100.0}).token_ids) == {77}


@pytest.mark.parametrize("num_tokens", [1, 2, 3])
def test_bad_words_do_not_appear(llm: LLM, free: Completion, num_tokens: int) -> None:
    """Any word that the tokenizer divides as the model wrote it."""
    tokenizer = llm.tokenizer
    runs = [free.token_ids[i : i + num_tokens] for i in range(20 - num_tokens)]
    words = [tokenizer.decode(run) for run in runs]
    word, run = next(
        (w, r) for w, r in zip(words, runs, strict=True) if tuple(tokenizer.encode(w, dummy_prefix=False)) == r
    )
    done = ask(llm, bad_words=(word,))
    assert done.token_ids != free.token_ids
    assert run not in [done.token_ids[i : i + num_tokens] for i in range(20)]


def test_bad_words_are_meant_with_and_without_a_space_before_them(llm: LLM) -> None:
    words = llm.session._bad_words(SamplingParams(bad_words=("self", "\n")))
    texts = {llm.tokenizer.decode(word) for word in words}
    assert texts == {"self", " self", "\n"}


def test_repetition_is_penalized(llm: LLM) -> None:
    done = ask(llm, frequency_penalty=2.0, presence_penalty=2.0, repetition_penalty=5.0)
    assert len(set(done.token_ids)) == 20


def test_no_end_before_the_shortest_length(llm: LLM, free: Completion) -> None:
    end = free.token_ids[4]
    first = free.token_ids.index(end)
    stopped = ask(llm, stop_token_ids=(end,))
    assert (stopped.finish_reason, len(stopped.token_ids)) == ("stop", first + 1)
    held = ask(llm, stop_token_ids=(end,), min_new_tokens=first + 3)
    assert len(held.token_ids) >= first + 3 and end not in held.token_ids[: first + 3]
    assert held.token_ids[:first] == free.token_ids[:first]


def test_what_leaves_no_token_is_refused(llm: LLM, free: Completion) -> None:
    with pytest.raises(ValueError, match="forbid every token"):
        ask(llm, logit_bias=dict.fromkeys(range(504), -math.inf))
    with pytest.raises(ValueError, match=r"logit_bias \[512\]"):
        ask(llm, logit_bias={512: 1.0})
    assert ask(llm).token_ids == free.token_ids


@pytest.mark.parametrize("size", [1, 2])
def test_rows_without_a_piece_are_never_sampled(tmp_path: Path, monkeypatch, size: int) -> None:
    """Padding of the embedding: here the most likely by far, on the last rank."""
    config, tokenizer = tiny_config(), tmp_path / "tokenizer"
    write_tokenizer(tokenizer)
    tensors = random_tensors(config, seed=9, dtype=torch.bfloat16)
    tensors["output.weight"][504:] = 8 * tensors["output.weight"][496:504]
    save_sharded(tensors.read, config, tmp_path / "model", 1, extra_files=[tokenizer / "tokenizer.model"])
    with LLM(tmp_path / "model", tensor_parallel_size=size, **OPTIONS) as llm:
        for temperature in (0.0, 5.0, 1e300):
            done = llm.complete(PROMPT, SamplingParams(max_new_tokens=200, ignore_eos=True, temperature=temperature))
            assert max(done.token_ids) < 504
            scored = ask(llm, temperature=temperature, logprobs=20)
            assert scored.logprobs is not None
            assert all(i < 504 for p in scored.logprobs for i, _ in p.top)
    monkeypatch.setattr(Tokenizer, "gaps", lambda tokenizer, num_rows: [])
    with LLM(tmp_path / "model", tensor_parallel_size=size, **OPTIONS) as llm:
        assert max(ask(llm).token_ids) >= 504, "the rows were not likely: this showed nothing"


# ---- lengths --------------------------------------------------------------------------------------------------------


def test_a_limit_beyond_the_room_is_an_upper_bound(llm: LLM, caplog) -> None:
    llm.session._has_said_clamped = False
    with caplog.at_level(logging.WARNING, "megatron_infer"):
        for _ in range(2):
            done = llm.complete(PROMPT, SamplingParams(max_new_tokens=10**9, ignore_eos=True))
            assert done.finish_reason == "length"
            assert len(done.prompt_token_ids) + len(done.token_ids) == llm.max_model_len
            assert done.num_dropped_tokens == 0
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1 and "max_new_tokens 1000000000 is clamped to" in said[0]


def test_a_long_prompt_keeps_half_of_the_context(llm: LLM) -> None:
    long = FimPrompt("x = 1\n" * 2000, "\ny = 2", "a.py")
    done = llm.complete(long, SamplingParams(max_new_tokens=10**6, ignore_eos=True))
    half = llm.max_model_len // 2
    assert half * 3 // 4 < len(done.prompt_token_ids) <= llm.max_model_len - half
    assert len(done.prompt_token_ids) + len(done.token_ids) == llm.max_model_len


def test_token_ids_may_fill_the_context_but_for_one(llm: LLM) -> None:
    ids = [5] * (llm.max_model_len - 1)
    assert len(llm.complete(ids, SamplingParams(max_new_tokens=50)).token_ids) == 1
    with pytest.raises(ValueError, match=f"prompt's {llm.max_model_len} tokens leave no room"):
        llm.complete([*ids, 5], SamplingParams(max_new_tokens=50))


def test_no_new_tokens_warm_the_cache(tiny_checkpoint: Path) -> None:
    """Of a prompt that fills the context, too."""
    with LLM(tiny_checkpoint, **OPTIONS) as llm:
        longest = [7] * llm.max_model_len
        for prompt in (PROMPT, "x", longest):
            warmed = llm.complete(prompt, SamplingParams(max_new_tokens=0, ending="auto", logprobs=2))
            assert (warmed.text, warmed.token_ids, warmed.logprobs) == ("", (), ())
            assert (warmed.finish_reason, warmed.trimmed_by, warmed.error) == ("length", None, None)
            assert list(llm.stream(prompt, SamplingParams(max_new_tokens=0))) == []
        fresh = list(range(300, 340))
        llm.complete(fresh, SamplingParams(max_new_tokens=0))
        longer = llm.complete([*fresh, 9], SamplingParams(max_new_tokens=1))
        assert longer.num_cached_tokens == 40, "the last token of the prompt too"
        assert not llm.session.has_work
    with TestInference(tiny_checkpoint, **OPTIONS) as session:
        assert session.run_infer("x = ", 0) == ""


# ---- command lines --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (r"\n", "\n"),
        (r"a\tb\r\n", "a\tb\r\n"),
        (r"\\n", r"\n"),
        (r"\x41\xe9", "Aé"),
        (r"\d\x4", r"\d\x4"),
        ("中\\", "中\\"),
    ],
)
def test_escapes(typed: str, meant: str) -> None:
    assert unescaped(typed) == meant


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[bytes]:
    quick = ["--kv_cache_memory_bytes", str(4 << 20), "--max_new_tokens", "12", "--quiet"]
    command = [sys.executable, "sess_megatron.py", *arguments, *quick]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}, capture_output=True)


def test_sampling_options_of_the_command_line(tiny_checkpoint: Path, llm: LLM) -> None:
    prefix = tiny_checkpoint.parent / "prefix.py"
    prefix.write_text("x = ")
    options = ["--logit_bias", "77=100", "--logit_bias", "5=-inf", "--stop", r"\n", "--ignore_eos"]
    done = run("--model_dir", str(tiny_checkpoint), "--prefix_file", str(prefix), *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode() == llm.tokenizer.decode([77] * 12) + "\n"
    refused = run("--model_dir", str(tiny_checkpoint), "--logit_bias", "77")
    assert refused.returncode == 2 and b"--logit_bias" in refused.stderr


def test_an_answer_survives_any_terminal(tiny_checkpoint: Path) -> None:
    """The example has Chinese, its answer whatever comes, and the brackets are ours."""
    example = ["--model_dir", str(tiny_checkpoint)]
    wanted = run(*example, PYTHONIOENCODING="utf-8").stdout.decode()
    assert "⟦" in wanted
    wanted = wanted.replace("⟦", "[").replace("⟧", "]")
    for encoding in ("gbk", "ascii"):
        done = run(*example, PYTHONIOENCODING=encoding)
        assert done.returncode == 0, done.stderr
        assert done.stdout == wanted.encode(encoding, "backslashreplace")
    as_json = run(*example, "--json", PYTHONIOENCODING="ascii")
    assert f"[{json.loads(as_json.stdout.decode('ascii'))['text']}]" in wanted
