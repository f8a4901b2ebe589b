"""Where a model's end tokens may be stated, and that each of them ends an answer, as with transformers."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from megatron_infer import LLM, SamplingParams
from megatron_infer.model_config import ModelConfig
from tests.support.parity import SMALL, stored, write_hf
from tests.support.tiny_models import random_tensors, write_tokenizer

RAW: dict[str, Any] = {**SMALL, "vocab_size": 512, "eos_token_id": 2, "bos_token_id": 900}
PROMPT = list(range(40, 60))
NUM_NEW_TOKENS = 12


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    tensors = random_tensors(ModelConfig.from_hf(RAW), seed=6)
    write_hf(tmp_path / "model", RAW, stored(tensors))
    write_tokenizer(tmp_path / "model")
    return tmp_path / "model"


def state(model_dir: Path, ends: object, *, bom: bool = False) -> None:
    text = json.dumps({"eos_token_id": ends})
    (model_dir / "generation_config.json").write_text(text, encoding="utf-8-sig" if bom else "utf-8")


def answer(model_dir: Path) -> tuple[list[int], str]:
    sampling = SamplingParams(max_new_tokens=NUM_NEW_TOKENS)
    with LLM(model_dir, tensor_parallel_size=1, kv_cache_memory_bytes=1 << 22, kv_cache_dtype="float32") as llm:
        done = llm.complete(PROMPT, sampling)
    return list(done.token_ids), done.finish_reason


def transformers_answer(model_dir: Path) -> list[int]:
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    ids = model.generate(torch.tensor([PROMPT]), max_new_tokens=NUM_NEW_TOKENS, do_sample=False, pad_token_id=0)
    return ids[0, len(PROMPT) :].tolist()


def test_end_tokens_of_generation_config_end_an_answer_as_in_transformers(
    model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    free, _ = answer(model_dir)
    assert len(free) > 5
    end = free[4]
    state(model_dir, [2, end])
    with caplog.at_level(logging.INFO, "megatron_infer"):
        ids, reason = answer(model_dir)
    assert ids == transformers_answer(model_dir) == free[: free.index(end) + 1]
    assert reason == "stop"
    assert f"end tokens: [2, {end}] of the checkpoint's settings" in caplog.text


def test_end_tokens_of_both_files_count(model_dir: Path) -> None:
    for ends, expected in (([7, 2], (2, 7)), (7, (2, 7)), (None, (2,)), ([], (2,))):
        for bom in (False, True):
            state(model_dir, ends, bom=bom)
            assert ModelConfig.from_dir(model_dir).eos_token_ids == expected


@pytest.mark.parametrize("ends", [-1, 512, [7, None], "7", True, 2.0, {"id": 7}], ids=str)
def test_a_bad_end_token_is_refused_by_file_and_field(model_dir: Path, ends: object) -> None:
    state(model_dir, ends)
    with pytest.raises(ValueError, match=r"generation_config\.json: .*eos_token_id"):
        LLM(model_dir)


@pytest.mark.parametrize("content", ["{", "[1]", '{"eos_token_id": ' + "[" * 200_000, "\ufffe"])
def test_a_damaged_generation_config_is_refused_by_name(model_dir: Path, content: str) -> None:
    (model_dir / "generation_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"generation_config\.json"):
        LLM(model_dir)
