"""Requests of real clients, recorded: each is answered, in bytes that its client can read."""

from __future__ import annotations

import json
import re
import socket
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import pytest

from tests.serve.running import Running

RECORDED = {
    record["name"]: record["raw"]
    for record in map(json.loads, Path(__file__).with_name("wire.jsonl").read_text(encoding="utf-8").splitlines())
}
CHAT = ("litellm.text_completion-deepseek.01", "litellm.text_completion-mistral.01")
"""litellm turns a suffix for these providers into a chat request; a wrong answer would be worse than none."""


def replay(running: Running, name: str) -> tuple[int, str, str]:
    """Status, content type and body."""
    with socket.create_connection(("127.0.0.1", running.port), timeout=60) as connection:
        connection.sendall(RECORDED[name].encode())
        answer = HTTPResponse(connection)
        answer.begin()
        return answer.status, answer.headers["content-type"], answer.read().decode()


@pytest.mark.parametrize("name", RECORDED)
def test_every_recorded_request_is_answered(running: Running, name: str) -> None:
    status, kind, body = replay(running, name)
    assert status == (400 if name in CHAT else 200), body
    if kind.startswith("text/event-stream"):
        check_events(body)
    elif kind == "application/x-ndjson":
        lines = [json.loads(line) for line in body.splitlines()]
        assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
    else:
        json.loads(body)


def check_events(body: str) -> None:
    """As Tabby's client reads them: the text is never null, and the last event says why the answer ended."""
    events = re.findall(r"data: (.*)\n\n", body)
    assert body == "".join(f"data: {event}\n\n" for event in events)
    assert events.pop() == "[DONE]"
    chunks = [json.loads(event) for event in events]
    with_choices = [chunk for chunk in chunks if chunk["choices"]]
    for chunk in with_choices:
        (choice,) = chunk["choices"]
        assert isinstance(choice["text"] if "text" in choice else choice["delta"]["content"], str)
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in with_choices]
    assert reasons[:-1] == [None] * (len(reasons) - 1)
    assert reasons[-1] in ("stop", "length")


@pytest.mark.parametrize("name", [name for name in RECORDED if name.startswith("llama.vim")])
def test_llama_vim_finds_the_content_in_the_bytes(running: Running, name: str) -> None:
    """It looks at the text before it decodes it, line by line."""
    _, _, body = replay(running, name)
    asked = json.loads(RECORDED[name].partition("\r\n\r\n")[2])["response_fields"]
    assert "\n" not in body
    if asked == [""]:
        assert body == "{}"
    else:
        assert re.match(r"^\s*{", body)
        assert re.search(r'"content"\s*:"', body)
        assert list(json.loads(body)) == asked


def test_llama_vscode_gets_as_many_as_it_asks_for(running: Running) -> None:
    _, _, body = replay(running, "llama.vscode-fim.01")
    answers: list[Any] = json.loads(body)
    assert [answer["index"] for answer in answers] == [0, 1, 2]
    assert all(isinstance(answer["content"], str) for answer in answers)


def test_a_warm_up_leaves_the_context_in_the_cache(running: Running) -> None:
    request = json.loads(RECORDED["llama.vim-nvim.04"].partition("\r\n\r\n")[2])
    request["input_extra"][0]["text"] = "total = 17\n" * 12
    warm_up = running.client.post("/infill", json=request)
    assert warm_up.content == b"{}"
    del request["response_fields"]
    again = running.post("/infill", **{**request, "n_predict": 4, "input_prefix": "x = "})
    timings = again["timings"]
    assert timings["cache_n"] > timings["prompt_n"]
    assert timings["cache_n"] + timings["prompt_n"] == again["tokens_evaluated"]
