"""Whole sessions on a tiny checkpoint: the library, streaming, batches, bad input, several sessions, followers."""

from __future__ import annotations

import io
import itertools
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import torch

from megatron_infer import LLM, Completion, FimPrompt, SamplingParams
from megatron_infer.engine.drafter import LookupDrafter
from megatron_infer.engine.request import Draft
from megatron_infer.llm import EngineDeadError
from sess_megatron import TestInference
from tests.support.drafters import Untimed, UntimedLookup
from tests.support.invariants import check_scheduler

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = {"device": "cpu", "kv_cache_memory_bytes": 4 << 20, "num_draft_tokens": 0}
"""Without drafts, so that a step is a token."""
PREFIX, SUFFIX, PATH = "def area(width, height):\n    return ", "\n\nprint(area(2, 3))\n", "shapes/area.py"


@pytest.fixture(scope="module")
def session(tiny_checkpoint: Path) -> Iterator[TestInference]:
    with TestInference(tiny_checkpoint, **OPTIONS) as running:
        yield running


@pytest.fixture(scope="module")
def expected(session: TestInference) -> str:
    return session.run_infer(PREFIX, 20, SUFFIX, PATH)


def test_upstreams_readme_example_runs(session: TestInference) -> None:
    text = session.run_infer(code_string="# 快速排序算法", later_code="\n", file_path="test.py", max_new_tokens=16)
    assert isinstance(text, str)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_weights_can_be_rounded_while_loading(tiny_checkpoint: Path, quantization: str) -> None:
    """Two ranks that each round their own slices answer like one that rounds everything."""
    sampling = SamplingParams(max_new_tokens=12, logprobs=2)
    prompt = FimPrompt(PREFIX, SUFFIX, PATH)
    with LLM(tiny_checkpoint, quantization=quantization, **OPTIONS) as llm:
        alone = llm.complete(prompt, sampling)
    with LLM(tiny_checkpoint, quantization=quantization, tensor_parallel_size=2, **OPTIONS) as llm:
        both = llm.complete(prompt, sampling)
    assert alone.token_ids == both.token_ids and alone.logprobs == both.logprobs


def test_instructions_the_cpu_lacks_are_refused_before_loading(tiny_checkpoint: Path) -> None:
    foreign = "neon" if platform.machine() == "x86_64" else "avx2"
    with pytest.raises(ValueError, match=f"cpu_isa '{foreign}' cannot be used: .*auto"):
        LLM(tiny_checkpoint, cpu_isa=foreign, **OPTIONS)


def test_answers_repeat(session: TestInference, expected: str) -> None:
    assert expected
    assert session.run_infer(PREFIX, 20, SUFFIX, PATH) == expected


def test_streamed_pieces_make_the_same_text_and_logprobs(session: TestInference) -> None:
    sampling = SamplingParams(max_new_tokens=20, logprobs=2)
    whole = session.llm.complete(FimPrompt(PREFIX, SUFFIX, PATH), sampling)
    stream = session.llm.stream(FimPrompt(PREFIX, SUFFIX, PATH), sampling)
    pieces = list(stream)
    assert len(pieces) > 1
    assert "".join(pieces) == whole.text
    assert stream.completion is not None
    assert stream.completion.token_ids == whole.token_ids
    assert stream.completion.logprobs == whole.logprobs
    assert whole.logprobs is not None
    assert len(whole.logprobs) == len(whole.token_ids)
    assert all(p.logprob == p.top[0][1] for p in whole.logprobs), "greedy takes the most likely token"


def test_a_stream_closed_early_leaves_nothing_behind(session: TestInference, expected: str) -> None:
    stream = session.llm.stream(FimPrompt(PREFIX, SUFFIX, PATH), SamplingParams(max_new_tokens=200))
    next(stream)
    stream.close()
    assert not session.llm.session.has_work
    assert session.run_infer(PREFIX, 20, SUFFIX, PATH) == expected


def test_open_streams_are_advanced_by_other_calls_and_lose_nothing(session: TestInference) -> None:
    sampling = SamplingParams(max_new_tokens=30, ignore_eos=True)
    prompts = [FimPrompt(PREFIX, SUFFIX, PATH), FimPrompt("y = ")]
    expected = [session.llm.complete(prompt, sampling).text for prompt in prompts]
    first, second = (session.llm.stream(prompt, sampling) for prompt in prompts)
    texts = [next(first), next(second)]
    session.llm.complete("z = ", SamplingParams(max_new_tokens=40, ignore_eos=True))
    texts[1] += "".join(second)
    texts[0] += "".join(first)
    assert texts == expected


def test_ctrl_c_ends_one_call_and_costs_the_others_nothing(session: TestInference, monkeypatch) -> None:
    sampling = SamplingParams(max_new_tokens=30, ignore_eos=True)
    whole = session.llm.complete(FimPrompt(PREFIX, SUFFIX, PATH), sampling).text
    plain = session.llm._runner.start
    for pressed_at in (3, 31):  # in mid-stream, and in the step that ends the stream's request
        stream = session.llm.stream(FimPrompt(PREFIX, SUFFIX, PATH), sampling)
        text, calls = next(stream), itertools.count(2)

        def start(step, draws=(), calls=calls, pressed_at=pressed_at):
            if next(calls) == pressed_at:
                signal.raise_signal(signal.SIGINT)
            return plain(step, draws)

        with monkeypatch.context() as patch:
            patch.setattr(session.llm._runner, "start", start)
            with pytest.raises(KeyboardInterrupt):
                session.llm.complete("z = ", SamplingParams(max_new_tokens=60, ignore_eos=True))
        assert text + "".join(stream) == whole
    assert not session.llm.session.has_work


def test_stop_strings_cut_the_text_exactly(session: TestInference) -> None:
    free = session.llm.complete(FimPrompt(PREFIX, SUFFIX, PATH), SamplingParams(max_new_tokens=24)).text
    stop = free[len(free) // 2 : len(free) // 2 + 3]
    cut = session.llm.complete(FimPrompt(PREFIX, SUFFIX, PATH), SamplingParams(max_new_tokens=24, stop=(stop,)))
    assert cut.text == free[: free.index(stop)]
    assert cut.finish_reason == "stop"


def test_a_stop_string_within_a_draft_ends_the_completion_there(session: TestInference, monkeypatch) -> None:
    prompt = FimPrompt(PREFIX, SUFFIX, PATH)
    free = session.llm.complete(prompt, SamplingParams(max_new_tokens=24))
    stop = free.text[len(free.text) // 2 : len(free.text) // 2 + 3]
    sampling = SamplingParams(max_new_tokens=24, stop=(stop,))
    undrafted = session.llm.complete(prompt, sampling)

    class Right(Untimed):
        def propose(self, request):
            return Draft(free.token_ids[len(request.ids) - request.num_prompt :])

    monkeypatch.setattr(session.llm.session._engine.scheduler, "_drafter", Right())
    drafted = session.llm.complete(prompt, sampling)
    assert (drafted.text, drafted.token_ids) == (undrafted.text, undrafted.token_ids)
    assert len(drafted.token_ids) < len(free.token_ids) and drafted.finish_reason == "stop"
    check_scheduler(session.llm.session._engine.scheduler)


def test_a_completion_says_how_much_of_it_was_drafted(tiny_checkpoint: Path, session, monkeypatch) -> None:
    prompt, sampling = FimPrompt(PREFIX, SUFFIX, PATH), SamplingParams(max_new_tokens=24, ignore_eos=True)
    undrafted = session.llm.complete(prompt, sampling)
    assert (undrafted.num_draft_tokens, undrafted.num_draft_accepted, undrafted.draft_sources) == (0, 0, {})
    with LLM(tiny_checkpoint, **{**OPTIONS, "num_draft_tokens": None}) as llm:
        assert llm.config.num_draft_tokens == 15
        scheduler = llm.session._engine.scheduler
        assert isinstance(scheduler._drafter, LookupDrafter)
        monkeypatch.setattr(scheduler, "_drafter", UntimedLookup(llm.config.num_draft_tokens))
        first, second = (llm.complete(prompt, sampling) for _ in range(2))
        assert first.token_ids == second.token_ids == undrafted.token_ids and second.text == undrafted.text
        assert second.draft_sources == {"typed": (22, 22)}, "two steps, each with a token of its own"
        assert (second.num_draft_tokens, second.num_draft_accepted) == (22, 22)
        assert len(set(second.timings.token_seconds)) == 2 and len(set(undrafted.timings.token_seconds)) == 24
        assert Completion.from_json(json.loads(json.dumps(second.to_json()))) == second


def test_stop_token_ids_and_length(session: TestInference) -> None:
    free = session.llm.complete(FimPrompt(PREFIX, SUFFIX, PATH), SamplingParams(max_new_tokens=12, ignore_eos=True))
    assert free.finish_reason == "length"
    assert len(free.token_ids) == 12
    last = free.token_ids[5]
    cut = session.llm.complete(
        FimPrompt(PREFIX, SUFFIX, PATH), SamplingParams(max_new_tokens=12, ignore_eos=True, stop_token_ids=(last,))
    )
    assert cut.finish_reason == "stop"
    assert cut.token_ids == free.token_ids[: free.token_ids.index(last) + 1]


def test_n_samples_are_seeded_and_share_the_prompt(session: TestInference) -> None:
    sampling = SamplingParams(max_new_tokens=12, temperature=1.0, seed=5, n=4)
    first = session.llm.complete_n(FimPrompt(PREFIX, SUFFIX, PATH), sampling)
    assert [c.sample_index for c in first] == [0, 1, 2, 3]
    assert len({c.token_ids for c in first}) > 1, "samples must differ"
    again = session.llm.complete_n(FimPrompt(PREFIX, SUFFIX, PATH), sampling)
    assert [c.token_ids for c in again] == [c.token_ids for c in first]
    assert again[0].num_cached_tokens > 0


def test_batches_come_in_order_or_as_completed(session: TestInference) -> None:
    prompts = [FimPrompt(f"x{i} = {i} +", "\n", "a.py") for i in range(9)]
    sampling = SamplingParams(max_new_tokens=6)
    ordered = list(session.llm.complete_batch(prompts, sampling))
    assert [c.prompt_index for c in ordered] == list(range(9))
    mixed = [(p, SamplingParams(max_new_tokens=1 + 5 * (i % 2))) for i, p in enumerate(prompts)]
    done = list(session.llm.complete_batch(mixed, ordered=False))
    assert sorted(c.prompt_index for c in done) == list(range(9))
    for completion in ordered:
        assert session.llm.complete(prompts[completion.prompt_index], sampling).text == completion.text


def test_a_batch_draws_prompts_only_as_room_appears(session: TestInference) -> None:
    drawn = 0

    def endless() -> Iterator[FimPrompt]:
        nonlocal drawn
        for i in itertools.count():
            drawn += 1
            yield FimPrompt(f"v{i} =", "\n", "a.py")

    batch = session.llm.complete_batch(endless(), SamplingParams(max_new_tokens=2))
    assert len(list(itertools.islice(batch, 10))) == 10
    batch.close()  # type: ignore[attr-defined]
    assert drawn <= 10 + 3 * session.llm.config.max_num_seqs
    assert not session.llm.session.has_work


def test_threads_may_share_a_session(session: TestInference) -> None:
    prompts = [FimPrompt(f"t{i} = [{i},", "\n", "a.py") for i in range(12)]
    sampling = SamplingParams(max_new_tokens=10)
    alone = [session.llm.complete(prompt, sampling).text for prompt in prompts]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(lambda prompt: session.llm.complete(prompt, sampling).text, prompts)) == alone


def test_a_bad_prompt_in_a_batch_fails_alone(session: TestInference) -> None:
    prompts = [FimPrompt("a ="), FimPrompt("b \ud800"), FimPrompt("c =")]
    results = list(session.llm.complete_batch(prompts, SamplingParams(max_new_tokens=2)))
    assert [r.finish_reason == "error" for r in results] == [False, True, False]
    assert "surrogate" in (results[1].error or "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("", 8), "empty"),
        (("a\udc80b", 8), "surrogate"),
        (("x" * 10_000_000, 8), "bytes"),
        (("a", -3), "max_new_tokens"),
        (("a", 2.5), "max_new_tokens"),
        ((None, 8), "prefix"),
        ((b"def f(", 8), "prefix"),
    ],
)
def test_bad_input_is_refused_and_the_session_lives_on(session, expected, arguments, message, monkeypatch) -> None:
    started = []
    with monkeypatch.context() as patch:
        patch.setattr(session.llm._runner, "start", lambda *step: started.append(step))
        with pytest.raises(ValueError, match=message):
            session.run_infer(*arguments)
    assert not started, "something ran"
    assert session.run_infer(PREFIX, 20, SUFFIX, PATH) == expected


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"min_p": float("nan")},
        {"top_k": -1},
        {"n": 0},
        {"n": 10**9},
        {"seed": -1},
        {"seed": 2**64},
        {"logprobs": 10**6},
        {"stop": ("",)},
        {"stop_token_ids": (-1,)},
        {"repetition_penalty": 0.0},
        {"presence_penalty": 2.5},
        {"frequency_penalty": float("nan")},
        {"logit_bias": {1: float("nan")}},
        {"logit_bias": {1: float("inf")}},
        {"logit_bias": {-1: 1.0}},
        {"logit_bias": {"a": 1.0}},
        {"logit_bias": ((1, 1.0), (1, 2.0))},
        {"logit_bias": (1, 2)},
        {"bad_words": ("",)},
        {"bad_words": (3,)},
        {"min_new_tokens": -1},
        {"min_new_tokens": 300},
    ],
    ids=str,
)
def test_bad_sampling_parameters_are_refused_by_name(bad) -> None:
    with pytest.raises(ValueError, match=next(iter(bad)).split("_token")[0]):
        SamplingParams(**bad)


def test_stop_ids_outside_the_vocabulary_are_refused(session, expected) -> None:
    with pytest.raises(ValueError, match="stop_token_ids"):
        session.llm.complete(FimPrompt("a"), SamplingParams(stop_token_ids=(10**6,)))
    with pytest.raises(ValueError, match="token ids"):
        session.llm.complete([5, 10**6])
    with pytest.raises(ValueError, match="NoneType"):
        session.llm.complete(None)  # type: ignore[arg-type]
    assert session.run_infer(PREFIX, 20, SUFFIX, PATH) == expected


def test_long_prompts_are_cut_and_say_so(session: TestInference) -> None:
    completion = session.llm.complete(FimPrompt("x = 1\n" * 2000, "\ny = 2", "a.py"), SamplingParams(max_new_tokens=4))
    assert completion.num_dropped_tokens > 0
    assert completion.timings.num_prompt_tokens <= session.llm.max_model_len - 4


def test_nan_in_one_request_fails_it_alone(session: TestInference, monkeypatch) -> None:
    model = session.llm._runner.model
    plain = model.logits

    def poisoned(hidden_SD):
        logits_SV = plain(hidden_SD)
        if len(logits_SV) == 3:
            logits_SV[1, 0] = float("nan")
        return logits_SV

    prompts = [FimPrompt(f"q{i} =", "\n", "a.py") for i in range(3)]
    sampling = SamplingParams(max_new_tokens=3, logprobs=2)
    healthy = [session.llm.complete(p, sampling) for p in prompts]
    monkeypatch.setattr(model, "logits", poisoned)
    results = list(session.llm.complete_batch(prompts, sampling))
    assert [r.finish_reason == "error" for r in results] == [False, True, False]
    assert "NaN" in (results[1].error or "")
    for neighbour in (0, 2):
        assert results[neighbour].token_ids == healthy[neighbour].token_ids
        assert results[neighbour].logprobs == healthy[neighbour].logprobs, "bit for bit"


def test_several_sessions_in_one_process(tiny_checkpoint: Path, expected: str) -> None:
    with TestInference(tiny_checkpoint, **OPTIONS) as one, TestInference(tiny_checkpoint, **OPTIONS) as two:
        assert one.run_infer(PREFIX, 20, SUFFIX, PATH) == two.run_infer(PREFIX, 20, SUFFIX, PATH) == expected
    with pytest.raises(EngineDeadError, match="closed"):
        one.run_infer("a")


def test_the_running_programs_model_dir_is_used_and_foreign_flags_do_no_harm(tiny_checkpoint, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["job.py", "--lr", "3", "-x", "--model-dir", str(tiny_checkpoint), "input.txt"])
    with TestInference(**OPTIONS) as found:
        assert found.llm.model_dir == tiny_checkpoint
    monkeypatch.setattr(sys, "argv", ["job.py", "--model_dir"])
    with TestInference(**OPTIONS) as demo:
        assert demo.llm.model_dir.name == "demo"


def test_the_programs_own_torch_defaults_do_not_matter(session: TestInference, expected: str) -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        with TestInference(session.llm.model_dir, **OPTIONS) as fresh:
            assert fresh.run_infer(PREFIX, 20, SUFFIX, PATH) == expected
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


def test_followers_give_the_same_answers_and_die_with_the_session(
    tiny_checkpoint: Path, expected: str, tmp_path: Path, monkeypatch
) -> None:
    before = shared_memory_files()
    (tmp_path / "random.py").write_text("raise ImportError('the current directory must not be imported from')")
    monkeypatch.chdir(tmp_path)
    with TestInference(tiny_checkpoint, tensor_parallel_size=2, **OPTIONS) as pair:
        assert pair.run_infer(PREFIX, 20, SUFFIX, PATH) == expected
        with pytest.raises(ValueError, match="empty"):
            pair.run_infer("")
        assert "".join(pair.llm.stream(FimPrompt(PREFIX, SUFFIX, PATH), SamplingParams(max_new_tokens=20))) == expected
        follower = psutil.Process(pair.llm._followers.processes[0].pid)
        assert answer_of_a_forked_child(pair) == "refused"
        assert pair.run_infer(PREFIX, 20, SUFFIX, PATH) == expected
        assert shared_memory_files() == before, "names must be gone as soon as all ranks are attached"
    assert not follower.is_running()


def test_a_killed_follower_ends_the_session_with_its_rank_named(tiny_checkpoint: Path) -> None:
    before = shared_memory_files()
    broken = TestInference(tiny_checkpoint, tensor_parallel_size=2, **OPTIONS)
    stream = broken.llm.stream(FimPrompt(PREFIX, SUFFIX, PATH), SamplingParams(max_new_tokens=400, ignore_eos=True))
    next(stream)
    os.kill(broken.llm._followers.processes[0].pid, signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(EngineDeadError, match="rank 1"):
        list(stream)
    assert time.monotonic() - started < 10
    with pytest.raises(EngineDeadError, match="rank 1"):
        broken.run_infer("a")
    broken.close()
    assert shared_memory_files() == before


def test_a_follower_dies_with_its_parent(tiny_checkpoint: Path) -> None:
    code = (
        "import sys, time; from sess_megatron import TestInference\n"
        f"session = TestInference({str(tiny_checkpoint)!r}, tensor_parallel_size=2, kv_cache_memory_bytes=4 << 20)\n"
        "print(session.llm._followers.processes[0].pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    follower = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    follower.wait(timeout=10)
    parent.stdout.close()


def test_startup_errors_name_the_remedy(tmp_path: Path, tiny_checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="is not a directory"):
        TestInference(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="one of 1, 2, 4, 8"):
        LLM(tiny_checkpoint, tensor_parallel_size=3)
    with pytest.raises(ValueError, match="max_model_len"):
        LLM(tiny_checkpoint, max_model_len=10**6)
    with pytest.raises(ValueError, match="kv_cache_memory_bytes"):
        LLM(tiny_checkpoint, device="cpu", kv_cache_memory_bytes=1)


def test_a_model_that_cannot_fit_is_refused_before_it_is_read(tiny_checkpoint: Path, monkeypatch) -> None:
    monkeypatch.setattr("megatron_infer.engine.memory.free_memory_bytes", lambda: 1000)
    monkeypatch.setattr("megatron_infer.llm.bring_up", None)
    with pytest.raises(ValueError, match=r"need .* GiB"):
        LLM(tiny_checkpoint, **OPTIONS)


def shared_memory_files() -> set[str]:
    """Names in /dev/shm that this package could have made."""
    return {name for name in os.listdir("/dev/shm") if "megatron" in name} if os.path.isdir("/dev/shm") else set()


def answer_of_a_forked_child(session: TestInference) -> str:
    """What a fork of this process gets from a session of several ranks; it must not disturb its parent's."""
    child = os.fork()
    if child == 0:
        try:
            session.run_infer("a")
        except RuntimeError as error:
            os._exit(3 if "forked" in str(error) else 1)
        os._exit(1)
    return "refused" if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3 else "answered"


def test_completions_survive_json(session: TestInference) -> None:
    completion = session.llm.complete(FimPrompt("a ="), SamplingParams(max_new_tokens=3, logprobs=2))
    text = io.StringIO(json.dumps(completion.to_json()))
    assert type(completion).from_json(json.load(text)) == completion
