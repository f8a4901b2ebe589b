"""`eval run --metric likelihood`: the log probability of each reference, to the bit whatever shares the batch."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from megatron_infer import LLM, FimPrompt, SamplingParams
from megatron_infer.eval import command
from megatron_infer.eval.tasks.registry import task
from tests.eval.killed_runs import PYTHON, command_of, write_cases

NOTHING_NEW = SamplingParams(max_new_tokens=0, prompt_logprobs=0)


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def evaluate(*arguments: str) -> int:
    return command.main(command_of(PYTHON, *arguments, "--metric", "likelihood")[len(PYTHON) + 1 :])


@pytest.fixture(scope="module")
def llm(tiny_checkpoint: Path):
    with LLM(tiny_checkpoint, device="cpu", num_threads=1, kv_cache_memory_bytes=16 << 20) as llm:
        yield llm


def alone(llm: LLM, ids: list[int], num_scored: int) -> list[float]:
    """Of the last ids, each given all before it, from one request that has the engine to itself."""
    pairs = llm.complete(ids, NOTHING_NEW).prompt_logprobs
    assert pairs is not None
    return [pair.logprob for pair in pairs[-num_scored:] if pair is not None]


def test_it_is_that_of_the_references_tokens_whatever_shares_the_batch(
    tiny_checkpoint: Path, llm: LLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_cases(tmp_path / "cases.jsonl", 9)
    given = ["--task", "fim", "--data", str(data), "--model_dir", str(tiny_checkpoint)]
    assert evaluate(*given, "--out", str(tmp_path / "a")) == 0
    assert evaluate(*given, "--out", str(tmp_path / "b"), "--max_num_batched_tokens", "16", "--order", "spm") == 0
    first = (tmp_path / "a" / "completions.jsonl").read_bytes()
    assert first == (tmp_path / "b" / "completions.jsonl").read_bytes()
    each = task("fim")
    for row, case in zip(rows(tmp_path / "a" / "completions.jsonl"), map(each.read, rows(data)), strict=True):
        assert case.reference is not None
        own = llm.tokenizer.encode(case.reference, dummy_prefix=False)
        ids = llm.fim.encode(case.prompt, options=each.options).ids + own
        assert row["log_probabilities"] == alone(llm, ids, len(own)) and row["token_ids"] == own
        assert (row["text"], row["finish_reason"], row["num_prompt_tokens"]) == (case.reference, "scored", len(ids))
    capsys.readouterr()
    assert command.main(["score", str(tmp_path / "a")]) == 0
    printed = capsys.readouterr().out
    assert command.main(["report", str(tmp_path / "a")]) == 0
    scored = rows(tmp_path / "a" / "completions.jsonl")
    values = [value for row in scored for value in row["log_probabilities"]]
    metrics = json.loads((tmp_path / "a" / "scores.json").read_text())["tables"]["overall"][0]["metrics"]
    assert metrics["perplexity"]["mean"] == pytest.approx(math.exp(-sum(values) / len(values)), rel=1e-12)
    assert metrics["log_probability"]["mean"] == pytest.approx(sum(values) / len(scored), rel=1e-12)
    assert "perplexity" in printed and "pass@" not in printed


def test_plain_text_counts_from_its_second_token(tiny_checkpoint: Path, llm: LLM, tmp_path: Path) -> None:
    texts = ["def area(w, h):\n    return w * h\n", "x = 1\n"]
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    given = ["--task", "text", "--data", str(data), "--model_dir", str(tiny_checkpoint), "--out", str(tmp_path / "o")]
    assert evaluate(*given) == 0
    for row, text in zip(rows(tmp_path / "o" / "completions.jsonl"), texts, strict=True):
        encoding = llm.fim.encode(FimPrompt(text), options=task("text").options)
        num_scored = len(encoding.ids) - max(1, encoding.prefix.start)
        assert row["log_probabilities"] == alone(llm, encoding.ids, num_scored)
        assert row["token_ids"] == encoding.ids[-num_scored:]


def test_what_cannot_be_scored_is_an_error_and_stops_nothing(tiny_checkpoint: Path, tmp_path: Path) -> None:
    data = tmp_path / "cases.jsonl"
    cases = [{"reference": "x"}, {}, {"reference": ""}, {"reference": "x" * 9000}]
    named = [{"task_id": str(i), "prefix": "a = ", "suffix": "\n", **case} for i, case in enumerate(cases)]
    data.write_text("".join(json.dumps(row) + "\n" for row in named))
    given = ["--task", "fim", "--data", str(data), "--model_dir", str(tiny_checkpoint), "--out", str(tmp_path / "o")]
    assert evaluate(*given) == 0
    errors = [row["error"] for row in rows(tmp_path / "o" / "completions.jsonl")]
    assert errors[0] is None and "no reference" in errors[1]
    assert "the reference has 0 tokens" in errors[2] and "at least 1 and less than 512" in errors[3]
    assert command.main(["score", str(tmp_path / "o")]) == 0


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--task", "text"], "--task text has nothing to complete"),
        (["--task", "fim", "--metric", "likelihood", "--n", "2"], "--metric likelihood has one value per case"),
    ],
)
def test_what_makes_no_sense_is_refused(
    given: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["run", *given, "--data", "x.jsonl", "--out", str(tmp_path / "o")]) == 2
    assert words in capsys.readouterr().err
