"""A request's life: cancelled in any state, superseded, refused, ended by the engine's death; counted exactly."""

from __future__ import annotations

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from megatron_infer import LLM, FimPrompt, SamplingParams
from megatron_infer.llm import EngineDeadError
from megatron_infer.serve.admission import Admission
from megatron_infer.serve.errors import Refusal
from tests.serve.running import FOREVER, PREFIX, Running, Steps
from tests.support.processes import wait_until

LONG = "x = [1, 2, 3]\n" * 30


def send(running: Running, path: str = "/v1/completions", **body: Any) -> socket.socket:
    """A request whose answer nobody has read yet."""
    raw = json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", running.port), timeout=60)
    connection.sendall(b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (path.encode(), len(raw)) + raw)
    return connection


def counts(running: Running) -> tuple[int, int, int]:
    """Requests that run, that wait, and that the server counts."""
    num_running, num_waiting, _ = running.llm.session.load
    return num_running, num_waiting, running.service.admission.num_in_hand


def num_steps_at_rest(running: Running) -> int:
    """As /health counts them."""
    wait_until(lambda: counts(running) == (0, 0, 0))
    wait_until(lambda: running.client.get("/health").status_code == 200)
    return int(running.client.get("/health").json()["num_steps"])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("num_steps", [1, 8], ids=["prefill", "decode"])
def test_a_client_that_goes_takes_its_request_along(held: Running, steps: Steps, stream: bool, num_steps: int) -> None:
    gone = send(held, prompt=LONG, stream=stream, **FOREVER)
    wait_until(lambda: counts(held) == (0, 1, 1))
    steps.make(num_steps)
    assert counts(held) == (1, 0, 1)
    gone.close()
    wait_until(lambda: counts(held) == (0, 0, 0))
    assert not held.llm.session.has_work
    assert held.llm.session.load == (0, 0, 0.0)


def test_a_queued_client_that_goes_disturbs_nobody(held: Running, steps: Steps) -> None:
    expected = SamplingParams(max_new_tokens=200, ignore_eos=True)
    with ThreadPoolExecutor() as pool:
        others = [
            pool.submit(held.post, "/v1/completions", prompt=PREFIX, max_tokens=200, ignore_eos=True) for _ in range(2)
        ]
        wait_until(lambda: counts(held) == (0, 2, 2))
        steps.make(3)
        gone = send(held, prompt=LONG, **FOREVER)
        wait_until(lambda: counts(held) == (2, 1, 3))
        gone.close()
        wait_until(lambda: counts(held) == (2, 0, 2))
        steps.free()
        texts = [other.result()["choices"][0]["text"] for other in others]
    assert texts == [held.llm.complete(FimPrompt(PREFIX), expected).text] * 2


def test_two_hundred_clients_that_vanish_leave_nothing_behind(tiny_llm: LLM) -> None:
    with Running(tiny_llm, max_queued=1000) as running:
        connections = [send(running, prompt=PREFIX, stream=True, **FOREVER) for _ in range(200)]
        wait_until(lambda: running.service.admission.num_in_hand > 100)
        for connection in connections:
            connection.close()
        wait_until(lambda: counts(running) == (0, 0, 0))
        assert running.llm.session.load == (0, 0, 0.0)
        assert running.post("/v1/completions", prompt=PREFIX, max_tokens=2)["usage"]["completion_tokens"] == 2


def test_overload_is_refused_at_once_and_exactly(held: Running, steps: Steps) -> None:
    """Two run, one waits, ten are sent away; nobody of the three is lost."""
    with ThreadPoolExecutor() as pool:
        taken = []
        for count in (1, 2, 3):
            taken.append(pool.submit(held.post, "/v1/completions", prompt=PREFIX, max_tokens=3))
            wait_until(lambda count=count: held.service.admission.num_in_hand == count)  # type: ignore[misc]
        for path in ("/v1/completions", "/v1/fim/completions", "/api/generate"):
            answer = held.client.post(path, json={"prompt": PREFIX})
            assert answer.status_code == 503
            assert int(answer.headers["retry-after"]) >= 1
        refused = [held.client.post("/v1/completions", json={"prompt": PREFIX}).status_code for _ in range(10)]
        assert refused == [503] * 10
        assert held.client.get("/health").status_code == 200
        steps.free()
        assert [answer.result()["usage"]["completion_tokens"] for answer in taken] == [3] * 3
    wait_until(lambda: counts(held) == (0, 0, 0))  # the answer is there before it is counted
    text = held.client.get("/metrics").text
    assert 'megatron_infer_requests_total{dialect="openai",outcome="refused"} 11.0' in text
    assert 'megatron_infer_requests_total{dialect="openai",outcome="ok"} 3.0' in text


def test_more_completions_than_ever_fit_is_the_requests_fault(held: Running) -> None:
    answer = held.client.post("/v1/completions", json={"prompt": PREFIX, "n": 4})
    assert answer.status_code == 400


def test_who_cannot_wait_that_long_is_sent_away() -> None:
    admission = Admission(max_running=2, max_queued=10, max_wait_seconds=60)
    admission.enter(2, None)
    admission.leave(2, 4.0)
    admission.enter(2, 0.5)
    assert admission.expected_wait_seconds(1) == 4.0
    with pytest.raises(Refusal, match="expected wait is") as refused:
        admission.enter(1, 0.5)
    assert refused.value.retry_after_seconds == 4.0
    admission.enter(1, None)
    assert admission.num_in_hand == 3


def test_the_newest_keystroke_supersedes(held: Running, steps: Steps) -> None:
    with ThreadPoolExecutor() as pool:
        older = pool.submit(held.client.post, "/infill", json=keystroke(PREFIX, "me"))
        wait_until(lambda: counts(held) == (0, 1, 1))
        steps.make(2)
        newer = pool.submit(held.client.post, "/infill", json=keystroke(PREFIX + "w", "me"))
        assert older.result().status_code == 410
        wait_until(lambda: held.service.admission.num_in_hand == 1)
        stranger = pool.submit(held.client.post, "/infill", json=keystroke(PREFIX, "you"))
        steps.free()
        assert [newer.result().status_code, stranger.result().status_code] == [200, 200]
    wait_until(lambda: counts(held) == (0, 0, 0))  # the answer is there before it is counted


def keystroke(prefix: str, session_id: str) -> dict[str, Any]:
    endless = {"n_predict": 200, "ignore_eos": True, "ending": "raw"}
    return {"input_prefix": prefix, "input_suffix": "\n", "session_id": session_id, **endless}


def test_llama_vims_slot_is_no_session(held: Running, steps: Steps) -> None:
    """Every one of them sends 0: two users would end each other's requests."""
    body = {"input_prefix": PREFIX, "input_suffix": "\n", "id_slot": 0, "n_predict": 4}
    with ThreadPoolExecutor() as pool:
        both = [pool.submit(held.client.post, "/infill", json=body) for _ in range(2)]
        wait_until(lambda: held.service.admission.num_in_hand == 2)
        steps.free()
        assert [answer.result().status_code for answer in both] == [200, 200]


def test_a_stream_says_that_it_waits(small_llm: LLM, steps: Steps) -> None:
    with Running(small_llm, ping_seconds=0.01, drain_seconds=0) as running:
        connection = send(running, prompt=PREFIX, stream=True, max_tokens=2)
        received = b""
        while received.count(b": ping\n\n") < 2:
            received += connection.recv(4096)
        assert b"data: {" not in received
        steps.free()
        while b"[DONE]" not in received:
            received += connection.recv(4096)
        connection.close()


@pytest.mark.parametrize("bias", [100, -100])
def test_time_to_predict_ends_after_a_line(held: Running, steps: Steps, bias: int) -> None:
    """As in llama.cpp the time counts from the first token, and ends nothing before there is a line."""
    newline = held.llm.tokenizer.encode("\n", dummy_prefix=False)[-1]
    body = {"prompt": PREFIX, "n_predict": 40, "ignore_eos": True, "t_max_predict_ms": 1e-9}
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(held.post, "/completion", logit_bias={str(newline): bias}, **body)
        wait_until(lambda: counts(held) == (0, 1, 1))
        steps.make(1)
        if bias > 0:
            wait_until(lambda: counts(held) == (0, 0, 0))
        steps.free()
        assert answer.result()["stop_type"] == "limit"
    predicted = answer.result()["tokens_predicted"]
    assert predicted < 40 if bias > 0 else predicted == 40


def test_a_deadline_ends_an_answer_and_is_no_longer_waited_for(held: Running, steps: Steps) -> None:
    with ThreadPoolExecutor() as pool:
        late = pool.submit(held.post, "/v1/completions", prompt=PREFIX, deadline_ms=1, **FOREVER)
        wait_until(lambda: counts(held) == (0, 1, 1))
        steps.free()
        answer = late.result()
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["completion_tokens"] < 400
    held.service.admission.enter(2, None)
    held.service.admission.mean_seconds = 1.0
    refused = held.client.post("/v1/completions", json={"prompt": PREFIX, "deadline_ms": 500})
    held.service.admission.leave(2, None)
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")


@pytest.mark.parametrize("stream", [False, True])
def test_the_engines_death_is_told_to_everyone(small_llm: LLM, monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    steps = Steps(small_llm)
    with Running(small_llm, drain_seconds=0) as running, ThreadPoolExecutor() as pool:
        answer = pool.submit(
            running.client.post, "/v1/completions", json={"prompt": PREFIX, "stream": stream, **FOREVER}
        )
        wait_until(lambda: counts(running)[2] == 1 and small_llm.session.has_work)
        steps.make(3)

        def die() -> None:
            raise EngineDeadError("the engine stopped: rank 1 is gone, while it read /secret/path")

        monkeypatch.setattr(steps, "_step", die)
        steps.free()
        told = answer.result()
        wait_until(lambda: running.service.engine.failure is not None)
        assert running.server.should_exit
        if stream:
            last = told.text.split("\n\n")[-3]
            assert "the engine has stopped" in json.loads(last.removeprefix("data: "))["error"]["message"]
        else:
            assert told.status_code == 503
        assert "secret" not in told.text
    del small_llm.session.step


def test_health_says_when_a_step_is_late(small_llm: LLM, steps: Steps) -> None:
    with Running(small_llm, late_seconds=0.001, drain_seconds=0) as running:
        assert running.client.get("/health").status_code == 200, "there is nothing to do"
        gone = send(running, prompt=PREFIX, **FOREVER)
        wait_until(lambda: running.client.get("/health").status_code == 503)
        gone.close()
        steps.free()
        before = num_steps_at_rest(running)
        running.post("/v1/completions", prompt=PREFIX, max_tokens=3)
        assert num_steps_at_rest(running) > before
