"""The playground in a browser: suggestions, what is said about them, failures."""

from __future__ import annotations

import json
import re
import subprocess
import threading
from typing import Any

import pytest

from tests.serve.playground.conftest import Playground
from tests.serve.playground.fake_server import SUM, Exchange, FakeServer, answer

expect = pytest.importorskip("playwright.sync_api", reason="Playwright drives the browser").expect

NOTE_TIMES = """
window.times = []
const fetchNow = window.fetch
window.fetch = (path, options) => {
  if (path === "infill") times.push(Date.now())
  return fetchNow(path, options)
}
"""


def test_a_suggestion_appears_as_one_types_and_tab_accepts_it(playground: Playground, server: FakeServer) -> None:
    playground.suggest("first\nx = \nlast5")
    expect(playground.ghost).to_have_text("alpha + beta")
    assert playground.code == "first\nx = \nlast5"
    playground.keyboard.press("Tab")
    expect(playground.ghost).to_have_count(0)
    assert playground.code == "first\nx = \nlast5alpha + beta"
    body = server.bodies[0]
    session = body.pop("session_id")
    assert len(session) > 16
    assert body == {
        "input_prefix": "first\nx = \nlast5", "input_suffix": "", "path": "example.py", "language": "python",
        "ending": "auto", "n_predict": 64, "n_probs": 5, "stream": True,
    }  # fmt: skip


def test_typing_along_keeps_the_suggestion_and_asks_nothing(server: FakeServer, page: Any) -> None:
    page.clock.install()
    playground = Playground(page, server.url)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    playground.suggest()
    expect(playground.ghost).to_have_text("alpha + beta")
    playground.keyboard.type("alph")
    expect(playground.ghost).to_have_text("a + beta")
    playground.keyboard.press("Control+ArrowRight")
    expect(playground.ghost).to_have_text(" + beta")
    playground.keyboard.press("Control+ArrowRight")
    expect(playground.ghost).to_have_text(" beta")
    assert playground.code == "x = 5alpha +"
    playground.keyboard.press("Escape")
    expect(playground.ghost).to_have_count(0)
    expect(playground.status).to_contain_text("Dismissed")
    page.clock.run_for(10_000)  # Whatever was put off would now be done.
    with page.expect_request("**/infill"):
        page.keyboard.press("Alt+\\")
    assert asked.count(server.url + "infill") == 2


def test_a_suggestion_of_several_lines_stands_between_what_is_there(playground: Playground, server: FakeServer) -> None:
    server.answering = lambda exchange: exchange.stream(answer(["one", "\n    two", "\n    ", "three"]))
    line = playground.page.locator(".cm-line").first
    height = line.bounding_box()["height"]
    playground.suggest("before()5")
    expect(playground.ghost).to_have_text("one\n    two\n    three")
    assert line.bounding_box()["height"] == pytest.approx(3 * height, abs=2)
    playground.keyboard.press("Tab")
    assert playground.code == "before()5one\n    two\n    three"


def test_the_newest_keystroke_aborts_the_older_request(playground: Playground, server: FakeServer) -> None:
    server.answering = server.hold
    playground.suggest("x = 1")
    assert server.next_prefix() == "x = 1"
    playground.keyboard.type("2")
    assert server.next_gone() == "x = 1"
    assert server.next_prefix() == "x = 12"
    server.answering = lambda exchange: exchange.stream(SUM)
    playground.keyboard.type("3")
    assert server.next_gone() == "x = 12"
    expect(playground.ghost).to_have_text("alpha + beta")
    assert server.next_prefix() == "x = 123"
    assert len(server.bodies) == 3
    assert server.gone.empty()


@pytest.mark.parametrize("action", ["Escape", "ArrowLeft"])
def test_an_answer_in_progress_is_given_up(playground: Playground, server: FakeServer, action: str) -> None:
    def begin(exchange: Exchange) -> None:
        exchange.begin()
        exchange.send({"index": 0, "content": "begun", "stop": False})
        server.hold(exchange)

    server.answering = begin
    playground.suggest()
    expect(playground.ghost).to_have_text("begun")
    playground.keyboard.press(action)
    assert server.next_gone() == "x = 5"
    expect(playground.ghost).to_have_count(0)


def test_alternatives(playground: Playground, server: FakeServer) -> None:
    playground.suggest()
    expect(playground.ghost).to_have_text("alpha + beta")
    playground.keyboard.type("a")
    others = [SUM, answer(["a", "bc"], kept=1, trimmed_by="closer"), answer(["other"]), answer(["and"])]
    server.answering = lambda exchange: exchange.reply(*others)
    playground.keyboard.press("Alt+]")
    expect(playground.status).to_contain_text("Suggestion 2 of 2")
    # "a" adds nothing to what was typed, and "other" does not begin with it.
    expect(playground.ghost).to_have_text("nd")
    assert server.bodies[1] == {**server.bodies[0], "stream": False, "n_cmpl": 4}
    playground.keyboard.press("Alt+]")
    expect(playground.ghost).to_have_text("lpha + beta")
    playground.keyboard.press("Alt+[")
    expect(playground.ghost).to_have_text("nd")
    playground.keyboard.press("Tab")
    assert playground.code == "x = 5and"


def test_alternatives_wait_for_the_first_answer(playground: Playground, server: FakeServer) -> None:
    may_end = threading.Event()

    def halting(exchange: Exchange) -> None:
        exchange.begin()
        exchange.send({"index": 0, "content": "al", "stop": False})
        may_end.wait(60)
        exchange.send({**SUM, "content": "pha + beta"})

    server.answering = halting
    playground.suggest()
    expect(playground.ghost).to_have_text("al")
    playground.keyboard.press("Alt+]")
    playground.keyboard.type("a")
    may_end.set()
    expect(playground.status).to_contain_text("Suggestion, ended by")
    expect(playground.ghost).to_have_text("lpha + beta")
    assert len(server.bodies) == 1


def test_what_is_known_of_an_answer(playground: Playground, server: FakeServer) -> None:
    whole = answer(["if", " é", "<b>", ")", "\n"], kept=3, trimmed_by="closer")
    whole["timings"] |= {"draft_n": 7, "draft_n_accepted": 4}
    server.answering = lambda exchange: exchange.stream(whole)
    playground.suggest()
    expect(playground.status).to_contain_text("ended by closer")
    expect(playground.ghost).to_have_text("if é<b>")
    assert playground.fact("Prompt") == "41 tokens, 32 of them cached"
    assert playground.fact("New") == "5 tokens; 4 of 7 drafted ones accepted"
    assert playground.fact("Ended by").startswith("closer: ")
    assert re.fullmatch(r"12 ms in the server, [\d.]+ ms here", playground.fact("First token"))
    assert re.fullmatch(r"4\.6 ms in the server, [\d.]+ ms here", playground.fact("Whole answer"))
    tokens = playground.page.get_by_role("toolbar").get_by_role("button")
    assert tokens.all_inner_texts() == ["if", "␣é", "<b>", ")", "↵"]
    assert tokens.evaluate_all("tokens => tokens.map(t => t.className)") == ["", "", "", "cut", "cut"]

    playground.page.locator(".ghost span", has_text="<b>").hover()
    expect(playground.card).to_have_text("<b> 75 %<other> 13 %")
    playground.keyboard.press("Escape")
    expect(playground.card).to_be_hidden()
    tokens.first.focus()
    expect(playground.card).to_contain_text("if 75 %")
    playground.keyboard.press("ArrowRight")
    expect(playground.card).to_contain_text("␣é 75 %")
    playground.keyboard.press("End")
    expect(tokens.last).to_be_focused()
    expect(tokens.last).to_have_accessible_name("↵, 75 %, not part of the suggestion")


def test_tokens_that_begin_within_the_prefix(playground: Playground, server: FakeServer) -> None:
    """Token healing: the first tokens write the end of the prefix anew, and are not shown twice."""
    server.answering = lambda exchange: exchange.stream({**answer([" al", "pha", " + b", "\n"]), "content": "pha + b"})
    playground.suggest("x = al")
    expect(playground.status).to_contain_text("ended by")
    shown = playground.page.locator(".ghost span")
    assert shown.all_text_contents() == ["pha", " + b"]
    shown.first.hover()
    expect(playground.card).to_contain_text("pha 75 %")
    tokens = playground.page.get_by_role("toolbar").get_by_role("button")
    assert tokens.evaluate_all("tokens => tokens.map(t => t.className)") == ["", "", "", "cut"]


def test_the_controls_reach_the_request(playground: Playground, server: FakeServer) -> None:
    page = playground.page
    page.get_by_label("Language").select_option("Go")
    assert page.get_by_label("File path").input_value() == "example.go"
    assert "func Average" in playground.code
    page.get_by_label("File path").fill("src/a.rs")
    assert page.get_by_label("Language").input_value() == "rust"
    page.get_by_label("Ending").select_option("line")
    page.get_by_label("Tokens at most").fill("7")
    page.get_by_label("Probabilities", exact=True).uncheck()
    playground.suggest()
    expect(playground.ghost).to_have_text("alpha + beta")
    sent = {name: server.bodies[-1][name] for name in ("path", "language", "ending", "n_predict", "n_probs")}
    assert sent == {"path": "src/a.rs", "language": "rust", "ending": "line", "n_predict": 7, "n_probs": 0}
    assert playground.code == "x = 5"


def test_nothing_to_suggest(playground: Playground, server: FakeServer) -> None:
    server.answering = lambda exchange: exchange.stream(answer(["again"], kept=0, trimmed_by="line-below"))
    playground.suggest()
    expect(playground.status).to_contain_text("Nothing to suggest here, ended by line-below")
    expect(playground.ghost).to_have_count(0)


def test_an_api_key_is_asked_for_and_kept_in_this_tab_alone(server: FakeServer, page: Any) -> None:
    def guarded(exchange: Exchange) -> None:
        if exchange.headers["Authorization"] != "Bearer it's secret":
            exchange.refuse(401, "send the API key")
        elif exchange.body:
            exchange.stream(SUM)
        else:
            exchange.reply({"data": [{"id": "guarded"}]})

    server.answering = server.naming = guarded
    page.expected_complaints = ["status of 401"]
    playground = Playground(page, server.url)
    expect(playground.status).to_contain_text("wants an API key")
    key = page.get_by_label("API key")
    key.fill("wrong")
    key.press("Enter")
    expect(playground.status).to_contain_text("does not accept this API key")
    key.fill("it's secret")
    key.press("Enter")
    expect(page.locator("#model")).to_have_text("guarded")
    expect(playground.editor).to_be_focused()
    expect(key).to_be_hidden()
    playground.keyboard.press("Alt+\\")
    expect(playground.ghost).to_have_text("alpha + beta")
    assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 1, ""]
    command = page.get_by_label("curl command").input_value()
    assert "secret" not in command
    assert '"Authorization: Bearer $API_KEY"' in command


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_again_when_it_says(server: FakeServer, page: Any, status: int) -> None:
    page.clock.install()
    page.clock.pause_at("2100-01-01")
    page.add_init_script(NOTE_TIMES)
    playground = Playground(page, server.url)
    page.expected_complaints = [f"status of {status}"]
    server.answering = lambda exchange: exchange.refuse(status, "the queue is full", Retry_After="20")
    playground.suggest()
    page.clock.run_for(1_000)
    expect(playground.status).to_have_text("The server is busy: the queue is full. Trying again in 20 s.")
    server.answering = lambda exchange: exchange.stream(SUM)
    playground.keyboard.type("6")
    page.clock.run_for(30_000)
    expect(playground.ghost).to_have_text("alpha + beta")
    first, second = page.evaluate("times")
    assert second - first >= 20_000, "typing does not make it impatient"
    assert [body["input_prefix"] for body in server.bodies] == ["x = 5", "x = 56"]


@pytest.mark.parametrize(
    ("status", "message"),
    [(503, "The server refuses (503): no room"), (400, "The server refuses (400): no room")],
)
def test_a_refusal_is_said(playground: Playground, server: FakeServer, status: int, message: str) -> None:
    server.answering = lambda exchange: exchange.refuse(status, "no room")
    playground.page.expected_complaints = [f"status of {status}"]
    playground.suggest()
    expect(playground.status).to_have_text(message)
    assert len(server.bodies) == 1


@pytest.mark.parametrize("when", ["before", "within"])
def test_a_server_that_is_gone_is_said(playground: Playground, server: FakeServer, when: str) -> None:
    def break_off(exchange: Exchange) -> None:
        exchange.begin()
        exchange.send({"index": 0, "content": "be", "stop": False})

    def engine_died(exchange: Exchange) -> None:
        break_off(exchange)
        exchange.send({"error": {"code": 503, "message": "the engine has stopped"}})

    if when == "before":
        playground.page.expected_complaints = ["ERR_"]
        playground.page.route("**/infill", lambda route: route.abort("connectionrefused"))
        playground.suggest()
        expect(playground.status).to_have_text("The server does not answer. Is it still running?")
        return
    server.answering = break_off
    playground.suggest()
    expect(playground.status).to_have_text("The connection ended before the answer did.")
    server.answering = engine_died
    playground.keyboard.type("6")
    expect(playground.status).to_have_text("The server refuses (503): the engine has stopped")


@pytest.mark.parametrize("dialect", ["OpenAI", "Mistral", "llama.cpp", "Ollama", "Tabby"])
def test_the_curl_command_carries_the_same_code(playground: Playground, server: FakeServer, dialect: str) -> None:
    code = "print('it''s', \"$HOME\", `x`, \\'\n\tü!"
    playground.suggest(code + "5")
    expect(playground.ghost).to_have_text("alpha + beta")
    page = playground.page
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_label("Dialect").select_option(
        index=["OpenAI", "Mistral", "llama.cpp", "Ollama", "Tabby"].index(dialect)
    )
    page.get_by_role("button", name="Copy as curl").click()
    expect(playground.status).to_have_text("Copied.")
    command = page.evaluate("navigator.clipboard.readText()")
    while not server.posts.empty():
        server.posts.get()
    subprocess.run(["bash", "-c", command], check=True, capture_output=True, timeout=60)
    path, body = server.posts.get(timeout=60)
    assert {"OpenAI": "/v1/completions", "Mistral": "/v1/fim/completions", "llama.cpp": "/infill",
            "Ollama": "/api/generate", "Tabby": "/v1/completions"}[dialect] == path  # fmt: skip
    text = json.dumps(body)
    assert json.dumps(code + "5") in text
    assert '"example.py"' in text and '"python"' in text


def test_a_long_wait_is_said_and_so_is_its_end(playground: Playground, server: FakeServer) -> None:
    server.answering = server.hold
    playground.suggest("x = 1")
    expect(playground.status).to_have_text("The model is still reading the text.")
    playground.keyboard.press("Escape")
    assert server.next_gone() == "x = 1"
    expect(playground.status).to_have_text("Given up.")
