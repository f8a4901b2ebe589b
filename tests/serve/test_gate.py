"""Who may come in, and what a request may be: every refusal in its dialect's form, and never a server error."""

from __future__ import annotations

import base64
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings, strategies

from megatron_infer import LLM
from megatron_infer.serve import app
from megatron_infer.serve.metrics import JsonLines
from megatron_infer.serve.settings import Settings
from tests.serve.running import PREFIX, Running
from tests.support.processes import wait_until

KEY = "secret-key"
POSTS = (
    "/v1/completions",
    "/v1/fim/completions",
    "/infill",
    "/completion",
    "/tokenize",
    "/detokenize",
    "/api/generate",
)
GETS = ("/v1/models", "/metrics", "/props", "/slots", "/api/tags", "/v1/health", "/openapi.json", "/")


@pytest.fixture(scope="module")
def locked(tiny_llm: LLM) -> Iterator[Running]:
    with Running(tiny_llm, api_key=(KEY, "another")) as server:
        yield server


def test_without_a_key_there_is_health_and_nothing_else(locked: Running) -> None:
    client = locked.client
    assert client.get("/health").status_code == 200
    for path in GETS:
        assert client.get(path).status_code == 401, path
    for path in POSTS:
        for header in ({}, {"Authorization": "Bearer"}, {"Authorization": "Bearer wrong"}, {"x-api-key": KEY + "x"}):
            assert client.post(path, json={"prompt": "x"}, headers=header).status_code == 401, path
    assert client.post("/v1/completions", json={"prompt": "x"}).json()["error"]["type"] == "authentication_error"


@pytest.mark.parametrize(
    "header",
    [
        {"Authorization": f"Bearer {KEY}"}, {"authorization": "bearer another"}, {"x-api-key": KEY}, {"api-key": KEY},
        {"Authorization": "Basic " + base64.b64encode(f"me:{KEY}".encode()).decode()},
    ],
)  # fmt: skip
def test_a_key_opens_however_it_comes(locked: Running, header: dict[str, str]) -> None:
    answer = locked.client.post("/v1/completions", json={"prompt": "x = ", "max_tokens": 2}, headers=header)
    assert answer.status_code == 200


@pytest.mark.parametrize(
    "target", ["//v1/models", "/v1%2fmodels", "/health/../v1/models", "/v1/models?x=/health", "/health%2f..%2fmetrics"]
)
def test_no_spelling_of_a_path_or_host_goes_round_the_key(locked: Running, target: str) -> None:
    for host in ("x", "/health", "x/health?", "127.0.0.1/health"):
        with socket.create_connection(("127.0.0.1", locked.port), timeout=30) as connection:
            connection.sendall(f"GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
            status = connection.recv(4096).split(b" ")[1]
        assert status in (b"401", b"400"), (target, host)


def test_pages_of_other_origins_may_not_call(running: Running, locked: Running) -> None:
    body = {"prompt": "x = ", "max_tokens": 1}
    for server, headers, status in (
        (running, {"Origin": "https://evil.example"}, 403),
        (running, {"Origin": "null"}, 403),
        (running, {"Origin": "http://["}, 403),
        (running, {"Origin": f"http://evil.example:{running.port}", "Host": f"evil.example:{running.port}"}, 403),
        (running, {"Origin": running.url}, 200),
        (locked, {"Origin": "https://code.example", "Host": "code.example", "x-api-key": KEY}, 200),
        (locked, {"Origin": "https://evil.example", "Host": "code.example", "x-api-key": KEY}, 403),
    ):
        assert server.client.post("/v1/completions", json=body, headers=headers).status_code == status, headers


def test_other_addresses_need_a_key() -> None:
    for host in ("0.0.0.0", "::", "192.168.1.7", "example.org"):
        with pytest.raises(ValueError, match="api_key_file"):
            Settings(host=host)
        Settings(host=host, api_key=("k",))
    for host in ("127.0.0.1", "localhost", "::1", "127.1.2.3"):
        Settings(host=host)


def raw_post(running: Running, path: str, content: bytes) -> httpx.Response:
    return running.client.post(path, content=content)


HUGE: list[Any] = []
for _ in range(20):
    HUGE = [HUGE]
HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "not-json": b"{prompt",
    "array": b"[1]",
    "string": b'"x"',
    "null": b"null",
    "deep": b'{"prompt":' + b"[" * 20000 + b"]" * 20000 + b"}",
    "nested": json.dumps({"prompt": HUGE, "input_prefix": HUGE, "segments": HUGE, "tokens": HUGE}).encode(),
    "nan": b'{"prompt":"x","input_prefix":"x","input_suffix":"","temperature":NaN,"options":{"temperature":NaN}}',
    "infinite": b'{"prompt":"x","input_prefix":"x","input_suffix":"","temperature":1e999,"options":{"top_p":1e999}}',
    "surrogate": rb'{"prompt":"\ud800","input_prefix":"\ud800","input_suffix":"","tokens":["\ud800"]}',
    "not-utf8": b'{"prompt":"\xff\xfe"}',
    "negative": json.dumps(
        {"prompt": "x", "input_prefix": "x", "input_suffix": "", "n": -1, "n_cmpl": -3, "max_tokens": -1,
         "options": {"num_predict": 3, "top_k": -(2**70)}, "tokens": [-1]}
    ).encode(),
    "numbers-without-end": json.dumps(
        {"prompt": "x", "input_prefix": "x", "input_suffix": "", "n": 10**400, "n_cmpl": 2**64, "max_tokens": 2**63,
         "options": {"num_predict": 2**63, "seed": 2**99, "top_k": 2**31}, "tokens": [2**40], "content": 7}
    ).encode(),
    "wrong-types": json.dumps(
        {"prompt": {"a": 1}, "input_prefix": 3, "input_suffix": [], "stop": [1], "stream": "yes", "tokens": "x",
         "content": [], "segments": {"prefix": 1}}
    ).encode(),
    "ids-outside-the-vocabulary": b'{"prompt":[[99999999]],"input_prefix":"","tokens":[99999999999]}',
    "booleans-as-ids": b'{"prompt":[true,false],"tokens":[true],"input_prefix":true,"input_suffix":true}',
    "many-stops": json.dumps(
        {"prompt": "x", "input_prefix": "x", "input_suffix": "", "stop": ["a"] * 1000,
         "options": {"stop": ["a"] * 1000}, "content": 1, "tokens": None}
    ).encode(),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("path", POSTS)
def test_hostile_bodies_are_refused(running: Running, path: str, name: str) -> None:
    answer = raw_post(running, path, HOSTILE[name])
    reads_nothing_of_it = path == "/tokenize" and answer.status_code == 200
    assert 400 <= answer.status_code < 500 or reads_nothing_of_it, answer.text
    running.post("/tokenize", content="and it lives")


NAMES = [
    "prompt", "suffix", "input_prefix", "input_suffix", "input_extra", "n", "n_cmpl", "temperature", "top_p", "top_k",
    "seed", "stop", "stream", "logprobs", "n_probs", "echo", "logit_bias", "stream_options", "response_fields",
    "segments", "path", "ending", "order", "session_id", "parse_special", "token_healing", "deadline_ms",
    "t_max_prompt_ms", "tokens", "content", "options", "min_tokens",
    "stop_token_ids", "repeat_penalty", "random_seed", "add_special", "mode",
]  # fmt: skip
SMALL = {
    "prompt": "x = ",
    "input_prefix": "x = ",
    "input_suffix": "\n",
    "max_tokens": 2,
    "n_predict": 2,
    "num_predict": 2,
}
VALUES = strategies.recursive(
    strategies.none() | strategies.booleans() | strategies.integers() | strategies.integers(-2, 8)
    | strategies.floats(allow_nan=False, allow_infinity=False) | strategies.text(max_size=8)
    | strategies.sampled_from(["raw", "auto", "psm", "spm", "python", "a\r\nb"]),
    lambda inner: strategies.lists(inner, max_size=3)
    | strategies.dictionaries(strategies.sampled_from(["prefix", "text", "5", "seed", "body"]), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


@settings(max_examples=300, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    path=strategies.sampled_from(POSTS),
    body=strategies.dictionaries(strategies.sampled_from(NAMES), VALUES, min_size=1, max_size=4),
    is_plausible=strategies.booleans(),
)
def test_no_body_is_a_server_error(running: Running, path: str, body: dict[str, Any], is_plausible: bool) -> None:
    answer = running.client.post(path, json={**SMALL, **body} if is_plausible else body)
    assert answer.status_code < 500, answer.text
    wait_until(lambda: running.service.admission.num_in_hand == 0)


@pytest.mark.parametrize(
    ("path", "shape"),
    [
        ("/v1/completions", {"error": {"message", "type", "param", "code"}}),
        ("/infill", {"error": {"code", "message", "type"}}),
    ],
)
def test_errors_have_the_dialects_form(running: Running, path: str, shape: dict[str, set[str]]) -> None:
    answer = running.client.post(path, json={"prompt": "x", "temperature": "hot", "input_prefix": 1})
    assert answer.status_code == 400
    assert {name: set(inner) for name, inner in answer.json().items()} == shape


def test_errors_of_mistral_ollama_and_tabby(running: Running) -> None:
    post = running.client.post
    wrong = post("/v1/fim/completions", json={"prompt": 7})
    assert wrong.status_code == 422
    assert wrong.json()["detail"][0]["loc"] == ["body", "prompt"]
    wrong = post("/v1/fim/completions", json={"prompt": "x", "temperature": -1.0})
    assert (wrong.status_code, wrong.json()["object"]) == (400, "error")
    assert isinstance(post("/api/generate", json={"prompt": 7}).json()["error"], str)
    wrong = post("/v1/completions", json={"segments": {}})
    assert wrong.status_code == 400
    assert wrong.headers["content-type"].startswith("text/plain")


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("/v1/completions", {"best_of": 3}),
        ("/v1/completions", {"response_format": {"type": "json_object"}}),
        ("/v1/fim/completions", {"n": 2}),
        ("/infill", {"grammar": "root ::= 'x'"}),
        ("/infill", {"lora": [{"id": 0, "scale": 1.0}]}),
        ("/api/generate", {"format": "json"}),
        ("/api/generate", {"options": {"mirostat": 2}}),
        ("/v1/completions", {"segments": {"prefix": "x"}, "mode": "next_edit_suggestion"}),
    ],
)
def test_what_would_change_the_answer_is_never_ignored(running: Running, path: str, field: dict[str, Any]) -> None:
    good = {"prompt": "x = ", "input_prefix": "x = ", "input_suffix": "\n"}
    answer = running.client.post(path, json={**good, **field})
    assert answer.status_code in (400, 422)
    assert "is not supported" in answer.text


def test_unknown_fields_are_ignored(running: Running) -> None:
    running.post("/v1/completions", prompt="x", max_tokens=1, user="me", made_up={"a": 1}, best_of=None)


def test_limits(tiny_llm: LLM) -> None:
    with Running(tiny_llm, max_body_bytes=1000, max_choices=4) as running:
        post = running.client.post
        assert post("/v1/completions", json={"prompt": "x" * 1000}).status_code == 413
        chunked = post("/v1/completions", content=(b"x" * 500 for _ in range(3)))
        assert chunked.status_code == 413
        assert post("/v1/completions", json={"prompt": ["a"] * 5, "max_tokens": 1}).status_code == 400
        assert post("/v1/completions", json={"prompt": "a", "logprobs": 21}).status_code == 400
        try:
            status = post("/v1/completions", json={"prompt": "a"}, headers={"x-long": "y" * 100_000}).status_code
        except httpx.RemoteProtocolError:
            status = 431
        assert 400 <= status < 500
        running.post("/v1/completions", prompt=["a"] * 4, max_tokens=1)


def test_the_log_has_no_code(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="megatron_infer.serve")
    running.post("/infill", input_prefix="SECRET_CODE = ", input_suffix="\n", n_predict=2)
    running.client.post("/v1/completions", json={"prompt": "SECRET_CODE", "stop": [""]})
    (record,) = [r for r in caplog.records if r.name == "megatron_infer.serve" and r.message == "request"][:1]
    fields = vars(record)["fields"]
    assert (fields["dialect"], fields["outcome"]) == ("llama.cpp", "ok")
    assert "SECRET" not in "".join(str(vars(r)) for r in caplog.records)


def test_metrics_count(tiny_llm: LLM) -> None:
    with Running(tiny_llm) as running:
        for _ in range(2):
            running.post("/v1/completions", prompt=PREFIX, max_tokens=4, ignore_eos=True)
        text = running.client.get("/metrics").text
    assert 'megatron_infer_requests_total{dialect="openai",outcome="ok"} 2.0' in text
    assert 'megatron_infer_generation_tokens_total{dialect="openai"} 8.0' in text
    assert 'megatron_infer_ttft_seconds_count{dialect="openai"} 2.0' in text
    assert "megatron_infer_kv_usage_ratio 0.0" in text


def test_the_page_asks_a_browser_for_the_key(tiny_llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "index.html").write_text("<p>try it</p>")
    (tmp_path / "page.js").write_text("1")
    monkeypatch.setattr(app, "PLAYGROUND", tmp_path)
    with Running(tiny_llm, api_key=(KEY,)) as running:
        refused = running.client.get("/")
        assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Basic")
        assert running.client.get("/", auth=("", KEY)).text == "<p>try it</p>"
        assert running.client.get("/page.js", auth=("", KEY)).text == "1"
        assert running.client.get("/../../settings.py", auth=("", KEY)).status_code == 404
        assert running.client.get("/v1/models", auth=("", KEY)).status_code == 200


def test_what_goes_wrong_inside_stays_inside(
    running: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("SECRET_CODE")

    monkeypatch.setattr(running.service, "_submit", fail)
    answer = running.client.post("/v1/completions", json={"prompt": "x"})
    assert answer.status_code == 500
    assert "SECRET" not in answer.text
    lines: list[str] = []

    def is_logged() -> bool:
        lines[:] = map(JsonLines().format, caplog.records)
        return any(json.loads(line).get("error") == "RuntimeError" for line in lines)

    wait_until(is_logged)
    assert not any("SECRET" in line for line in lines)


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nothing", 404), ("DELETE", "/v1/models", 405)])
def test_wrong_routes(running: Running, method: str, path: str, status: int) -> None:
    answer = running.client.request(method, path)
    assert answer.status_code == answer.json()["error"]["code"] == status


def test_a_whole_number_may_be_written_with_a_point(running: Running) -> None:
    """As clients in Lua or Java write it; a number that is not whole is refused."""
    given = {"prompt": PREFIX, "max_tokens": 3.0, "top_k": 5.0, "n": 1.0}
    assert running.post("/v1/completions", **given)["usage"]["completion_tokens"] == 3
    assert running.client.post("/v1/completions", json={**given, "max_tokens": 3.5}).status_code == 400


@pytest.mark.parametrize("bias", [{"the": 1.0}, [[1]], [[1, 2, 3]], {"-1": 1.0}])
def test_a_bias_that_is_none_is_refused_by_its_name(running: Running, bias: Any) -> None:
    answer = running.client.post("/v1/completions", json={"prompt": PREFIX, "logit_bias": bias})
    assert answer.status_code == 400
    assert "logit_bias" in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/metrics", "/"])
def test_head_is_get_without_the_body(running: Running, path: str) -> None:
    answer = running.client.head(path)
    assert (answer.status_code, answer.content) == (200, b"")


def test_a_wrong_path_is_not_found_and_a_wrong_method_not_allowed(running: Running) -> None:
    for path in ("/v1/completions/", "/v1/v1/completions", "/infil"):
        assert running.client.post(path, json={"prompt": PREFIX}).status_code == 404, path
    assert running.client.delete("/v1/completions").status_code == 405


def test_segments_that_are_null_are_none(running: Running) -> None:
    assert running.post("/v1/completions", segments=None, prompt=PREFIX, max_tokens=1)["usage"]
