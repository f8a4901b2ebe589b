"""Steps that run ahead of the host, operation by operation or recorded: the answers stay those of one step at a time.

The CPU stands in for a GPU: "asynchronous" results are kept back until they are asked for, and "recorded" functions run
anew on the same static tensors. What a real graph does with launches and memory only a GPU can show (test_gpu.py).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_infer.dispatch.select import select_ops
from megatron_infer.engine.engine import Engine
from megatron_infer.engine.graphs import Key, Outputs, graph_keys
from megatron_infer.engine.request import Request
from megatron_infer.engine.runner import ModelRunner
from megatron_infer.engine.worker import serve
from megatron_infer.model_config import ModelConfig
from megatron_infer.profile import Profile
from megatron_infer.sampling_params import SamplingParams
from megatron_infer.tensor_parallel.group import TPGroup
from tests.support.drafters import UntimedLookup, drafter_of
from tests.support.invariants import check_scheduler
from tests.support.tiny_models import (
    CPU,
    Output,
    Tensors,
    drain,
    generate,
    make_engine,
    make_runner,
    on_ranks,
    random_tensors,
)
from tests.support.tiny_models import tiny_config as make_config

GREEDY = SamplingParams(max_new_tokens=24, ignore_eos=True)
SEEDED = SamplingParams(max_new_tokens=24, ignore_eos=True, temperature=0.9, top_k=40, top_p=0.95, min_p=0.01, seed=11)
EDITED = SamplingParams(
    max_new_tokens=24, ignore_eos=True, repetition_penalty=1.2, frequency_penalty=0.4, temperature=0.5, seed=3
)
BIASED = SamplingParams(max_new_tokens=24, ignore_eos=True, logit_bias={5: 3.0, 9: -100.0}, min_new_tokens=3)
LOGPROBS = SamplingParams(max_new_tokens=12, ignore_eos=True, logprobs=3)
MAX_NUM_SEQS = 12


class Again:
    """A "recording" that runs the function again, into the same outputs."""

    def __init__(self, work: Callable[[], Outputs]) -> None:
        self._work, self.num_replays = work, 0
        self.outputs = tuple(output.clone() for output in work())

    def replay(self) -> None:
        self.num_replays += 1
        for output, new in zip(self.outputs, self._work(), strict=True):
            output.copy_(new)


class FakeRecorder:
    """Takes 10 bytes per recording."""

    def __init__(self) -> None:
        self.recordings: list[Again] = []

    def record(self, work: Callable[[], Outputs]) -> Again:
        with NoHostSync():
            self.recordings.append(Again(work))
        return self.recordings[-1]

    def used_bytes(self) -> int:
        return 10 * len(self.recordings)

    @property
    def num_replays(self) -> int:
        return sum(recording.num_replays for recording in self.recordings)


class NoHostSync(TorchDispatchMode):
    """Refuses what makes the host wait for a device, or a shape depend on values."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not any(name in str(func) for name in self.FORBIDDEN), f"{func} inside a recorded step"
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return make_config()


@pytest.fixture(scope="module")
def tensors(config: ModelConfig) -> Tensors:
    return random_tensors(config, seed=3)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    draw = random.Random(5)
    made = [[draw.randrange(3, 512) for _ in range(length)] for length in (1, 15, 16, 17, 33, 70, 128)]
    return [*made, made[5][:50] + [7] * 9]


def ahead_of(config: ModelConfig, tensors: Tensors, group: TPGroup, recorder: FakeRecorder | None) -> ModelRunner:
    runner = make_runner(config, tensors, group, is_asynchronous=True)
    if recorder is not None:
        runner.record_graphs(
            recorder, graph_keys(MAX_NUM_SEQS, has_drafts=True),
            max_model_len=512, max_num_seqs=MAX_NUM_SEQS, memory_bytes=10_000,
        )  # fmt: skip
    return runner


def engine_of(config: ModelConfig, tensors: Tensors, recorder: FakeRecorder | None = None, **options: Any) -> Engine:
    runner = ahead_of(config, tensors, TPGroup.single(CPU), recorder)
    return make_engine(runner, **{"max_num_seqs": MAX_NUM_SEQS, **options})


def one_at_a_time(config: ModelConfig, tensors: Tensors) -> Engine:
    return make_engine(make_runner(config, tensors, TPGroup.single(CPU)), max_num_seqs=MAX_NUM_SEQS)


def counted(engine: Engine) -> list[bool]:
    """Of every step from now on: whether it was started before the one before it was committed."""
    started: list[bool] = []
    plain = engine.runner.start

    def start(step: Any, draws: Any = ()) -> Any:
        started.append(bool((step.token_ids_T < 0).any()))
        return plain(step, draws)

    engine.runner.start = start  # type: ignore[method-assign]
    return started


@pytest.mark.parametrize("recorded", [False, True], ids=["launched", "recorded"])
@pytest.mark.parametrize("sampling", [GREEDY, SEEDED, BIASED], ids=["greedy", "seeded", "biased"])
def test_answers_are_those_of_one_step_at_a_time(config, tensors, prompts, sampling, recorded) -> None:
    expected = generate(one_at_a_time(config, tensors), prompts, sampling)
    recorder = FakeRecorder() if recorded else None
    engine = engine_of(config, tensors, recorder)
    started = counted(engine)
    assert generate(engine, prompts, sampling) == expected
    assert sum(started) >= 20, "most steps are planned ahead"
    assert generate(engine_of(config, tensors, FakeRecorder(), max_num_seqs=3), prompts, sampling) == expected
    for prompt, output in zip(prompts, expected, strict=True):
        assert generate(engine, [prompt], sampling)[0] == output
    if recorder is not None:
        assert recorder.num_replays > 100


def test_edits_that_depend_on_history_wait_for_it(config, tensors, prompts) -> None:
    expected = generate(one_at_a_time(config, tensors), prompts, EDITED)
    engine = engine_of(config, tensors, FakeRecorder())
    started = counted(engine)
    assert generate(engine, prompts, EDITED) == expected
    assert not any(started)
    drafter = drafter_of(zip(prompts, expected, strict=True), config.vocab_size, 0.7)
    assert generate(engine_of(config, tensors, FakeRecorder(), drafter=drafter), prompts, EDITED) == expected
    assert drafter.num_accepted > 50


def test_negative_control_edits_of_steps_ahead_lack_a_token(config, tensors, prompts, monkeypatch) -> None:
    expected = generate(one_at_a_time(config, tensors), prompts, EDITED)
    monkeypatch.setattr(Request, "needs_history", False)
    assert generate(engine_of(config, tensors, FakeRecorder()), prompts, EDITED) != expected


def test_log_probabilities_are_those_of_the_host(config, tensors, prompts) -> None:
    def flat(outputs: list[Output]) -> tuple[list[int], list[float]]:
        pairs = [pair for output in outputs for pair in output]
        return [token for token, _ in pairs], [logprob or 0.0 for _, logprob in pairs]

    ids, logprobs = flat(generate(one_at_a_time(config, tensors), prompts, LOGPROBS))
    ahead_ids, ahead_logprobs = flat(generate(engine_of(config, tensors, FakeRecorder()), prompts, LOGPROBS))
    assert ahead_ids == ids
    assert ahead_logprobs == pytest.approx(logprobs, abs=1e-6)


@pytest.mark.parametrize("recorded", [False, True], ids=["launched", "recorded"])
def test_requests_that_end_while_their_next_token_is_computed(config, tensors, prompts, recorded) -> None:
    """On a stop token, which the host learns of a step late; others go on, and more are waiting."""
    plain = generate(one_at_a_time(config, tensors), prompts, GREEDY)
    stop = tuple({output[3 * i % 20][0] for i, output in enumerate(plain)})
    sampling = SamplingParams(max_new_tokens=24, ignore_eos=True, stop_token_ids=stop)
    expected = generate(one_at_a_time(config, tensors), prompts * 2, sampling)
    assert len({len(output) for output in expected}) > 3
    engine = engine_of(config, tensors, FakeRecorder() if recorded else None, max_num_seqs=5)
    assert generate(engine, prompts * 2, sampling) == expected
    assert generate(engine, prompts * 2, sampling) == expected, (
        "from the prefix cache, of which they left the right part"
    )


def test_an_abort_while_two_steps_are_in_flight(config, tensors, prompts) -> None:
    engine = engine_of(config, tensors, FakeRecorder())
    expected = generate(one_at_a_time(config, tensors), prompts, GREEDY)
    for i, prompt in enumerate(prompts):
        engine.add(Request(i, list(prompt), GREEDY, 512, frozenset()))
    outputs: dict[int, Output] = {}
    for _ in range(4):
        for event in engine.step():
            if event.sampled is not None:
                outputs.setdefault(event.request.request_id, []).append((event.sampled.token_id, None))
    engine.abort(2)
    drain(engine, outputs)
    for i, output in enumerate(expected):
        got = outputs[i]
        assert got == (output[: len(got)] if i == 2 else output)
    assert len(outputs[2]) < 24
    engine.step()
    check_scheduler(engine.scheduler)
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_blocks


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_ranks_agree_on_samples_that_rank_0_has_not_seen_yet(config, tensors, prompts, sampling) -> None:
    expected = generate(one_at_a_time(config, tensors), prompts, sampling)

    def work(group: TPGroup) -> list[Output] | None:
        runner = ahead_of(config, tensors, group, FakeRecorder())
        if group.rank:
            serve(runner)
            return None
        engine = make_engine(runner, max_num_seqs=MAX_NUM_SEQS)
        outputs = generate(engine, prompts, sampling)
        engine.close()
        return outputs

    assert on_ranks(2, work)[0] == expected


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED, LOGPROBS], ids=["greedy", "seeded", "logprobs"])
def test_a_non_finite_row_fails_alone(config, prompts, sampling) -> None:
    """Token 3's embedding is not finite; the others' answers are those of sound weights."""
    sound, non_finite = random_tensors(config, seed=3), random_tensors(config, seed=3)
    non_finite["tok_embeddings.weight"][3] = float("nan")
    clean = [[p for p in prompt if p != 3] or [5] for prompt in prompts]
    expected = generate(one_at_a_time(config, sound), clean, sampling)
    assert not any(token == 3 for output in expected for token, _ in output[:-1])
    engine = engine_of(config, non_finite, FakeRecorder())
    for i, prompt in enumerate([*clean, [4, 3, 5]]):
        engine.add(Request(i, prompt, sampling, 512, frozenset(), seed=7))
    tokens: dict[int, list[int]] = {}
    errors = {}
    while engine.has_work:
        for event in engine.step():
            if event.error:
                errors[event.request.request_id] = event.error
            elif event.sampled is not None:
                tokens.setdefault(event.request.request_id, []).append(event.sampled.token_id)
    assert list(errors) == [len(clean)] and "NaN or Inf" in errors[len(clean)]
    assert [tokens[i] for i in range(len(clean))] == [[token for token, _ in output] for output in expected]


def test_shapes_worth_recording() -> None:
    assert graph_keys(1) == [(1, q_len, 1) for q_len in range(1, 17)]
    assert graph_keys(1, has_drafts=True)[16:] == [(1, q_len, q_len) for q_len in range(2, 17)]
    decoding = [num_seqs for num_seqs, q_len, _ in graph_keys(30) if q_len == 1]
    assert decoding == [1, 2, 4, 8, 16, 24, 30]
    assert len(set(graph_keys(128))) == len(graph_keys(128))


def test_what_exceeds_the_budget_is_left_out_and_still_answered(config, tensors, prompts) -> None:
    runner = make_runner(config, tensors, TPGroup.single(CPU), is_asynchronous=True)
    keys: list[Key] = [(1, 1, 1), (4, 1, 1), (8, 1, 1), (1, 3, 1)]
    recorder = FakeRecorder()
    runner.record_graphs(recorder, keys, max_model_len=512, max_num_seqs=MAX_NUM_SEQS, memory_bytes=20)
    assert runner.graphs is not None
    assert runner.graphs.keys == ((1, 1, 1), (4, 1, 1)) and runner.graphs.memory_bytes == 20
    expected = generate(one_at_a_time(config, tensors), prompts, GREEDY)
    assert generate(make_engine(runner, max_num_seqs=MAX_NUM_SEQS), prompts, GREEDY) == expected


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED, LOGPROBS], ids=["greedy", "seeded", "logprobs"])
def test_drafts_are_recorded_too_and_change_nothing(config, tensors, prompts, sampling) -> None:
    """One sequence with a draft replays a recording; several, or a draft behind a prompt, are launched."""
    expected = generate(engine_of(config, tensors, FakeRecorder()), prompts, sampling)
    drafter = drafter_of(zip(prompts, expected, strict=True), config.vocab_size, 0.8)
    recorder = FakeRecorder()
    engine = engine_of(config, tensors, recorder, drafter=drafter)
    graphs = engine.runner.graphs
    assert graphs is not None and {(1, q_len, q_len) for q_len in range(1, 17)} <= set(graphs.keys)
    started, last_ids = counted(engine), engine.runner._last_ids
    assert generate(engine, prompts, sampling) == expected
    for prompt, output in zip(prompts, expected, strict=True):
        assert generate(engine, [prompt], sampling)[0] == output
    assert engine.runner._last_ids is last_ids, "the recordings write into this one"
    assert drafter.num_accepted > 50 and not any(started), "no step is planned ahead of what is drafted"
    replayed = [key for key, recording in zip(graphs.keys, recorder.recordings, strict=True) if recording.num_replays]
    assert len([key for key in replayed if key[2] > 1]) >= 5


def test_looked_up_drafts_replay_recordings(config, tensors, prompts) -> None:
    expected = generate(one_at_a_time(config, tensors), prompts, GREEDY)
    recorder, drafter = FakeRecorder(), UntimedLookup()
    engine = engine_of(config, tensors, recorder, drafter=drafter)
    graphs = engine.runner.graphs
    assert graphs is not None
    for _ in range(2):
        assert [generate(engine, [prompt], GREEDY)[0] for prompt in prompts] == expected
    assert drafter.counts("typed")[1] > 50
    replayed = [key for key, recording in zip(graphs.keys, recorder.recordings, strict=True) if recording.num_replays]
    assert any(key[2] > 1 for key in replayed)


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_two_ranks_draft_on_recorded_steps(config, tensors, prompts, sampling) -> None:
    expected = generate(one_at_a_time(config, tensors), prompts, sampling)

    def work(group: TPGroup) -> int | None:
        runner = ahead_of(config, tensors, group, FakeRecorder())
        if group.rank:
            serve(runner)
            return None
        drafter = drafter_of(zip(prompts, expected, strict=True), config.vocab_size, 0.8)
        engine = make_engine(runner, max_num_seqs=MAX_NUM_SEQS, drafter=drafter)
        assert generate(engine, prompts, sampling) == expected
        assert generate(engine, prompts[3:4], sampling) == expected[3:4]
        engine.close()
        return drafter.num_accepted

    assert (on_ranks(2, work)[0] or 0) > 50


def test_a_few_new_tokens_behind_a_cached_prompt_are_recorded(config, tensors) -> None:
    recorder = FakeRecorder()
    engine = engine_of(config, tensors, recorder)
    (warm,) = generate(engine, [[9] * 64], SamplingParams(max_new_tokens=1, ignore_eos=True))
    before = recorder.num_replays
    (typed,) = generate(engine, [[9] * 64 + [5, 6, 7]], SamplingParams(max_new_tokens=1, ignore_eos=True))
    assert recorder.num_replays == before + 1
    sound = generate(one_at_a_time(config, tensors), [[9] * 64 + [5, 6, 7]], SamplingParams(max_new_tokens=1))
    assert typed == sound[0] and len(warm) == 1


@pytest.mark.parametrize("q_len", [1, 5])
def test_torchs_own_ops_can_be_recorded_too(config, tensors, q_len: int) -> None:
    """Nothing in them waits for the host; FlashAttention in their midst makes that worth it."""
    ops = select_ops(CPU, num_threads=1, force="vendor")
    runner = make_runner(config, tensors, TPGroup.single(CPU), ops=ops, is_asynchronous=True)
    recorder, keys = FakeRecorder(), [(3, 1, 1), (1, q_len, 1)]
    runner.record_graphs(recorder, keys, max_model_len=512, max_num_seqs=3, memory_bytes=100)
    assert runner.graphs is not None and len(recorder.recordings) == 2


def test_while_a_profile_records_no_recording_is_replayed_on_any_rank(config, tensors, prompts) -> None:
    expected = generate(one_at_a_time(config, tensors), prompts, GREEDY)

    def work(group: TPGroup) -> int:
        recorder = FakeRecorder()
        runner = ahead_of(config, tensors, group, recorder)
        if group.rank:
            serve(runner)
            return recorder.num_replays
        profile = Profile(op_by_op=False)
        scheduler = make_engine(runner, max_num_seqs=MAX_NUM_SEQS).scheduler
        engine = Engine(runner, scheduler, profile)
        with profile.recording():
            assert generate(engine, prompts, GREEDY) == expected
        assert recorder.num_replays == 0
        generate(engine, prompts[:3], GREEDY)
        engine.close()
        assert runner.graphs is None
        return recorder.num_replays

    replays = on_ranks(2, work)
    assert replays[0] == replays[1] > 0
