"""The playground on the real server with the demo checkpoint: what it shows, and what its curl commands answer."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.serve.playground.conftest import Playground

pytest.importorskip("fastapi", reason="the server needs FastAPI")
pytest.importorskip("megatron_infer.serve.app", reason="the server")
expect = pytest.importorskip("playwright.sync_api", reason="Playwright drives the browser").expect

ROOT = Path(__file__).resolve().parents[3]
TEXT_OF = {
    "OpenAI": lambda body: body["choices"][0]["text"],
    "Mistral": lambda body: body["choices"][0]["message"]["content"],
    "llama.cpp": lambda body: body["content"],
    "Ollama": lambda body: body["response"],
    "Tabby": lambda body: body["choices"][0]["text"],
}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    command = [sys.executable, "-m", "megatron_infer", "serve", "--port", "0", "--device", "cpu"]
    with subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as server:
        assert server.stdout is not None
        lines = iter(server.stdout.readline, "")
        found = next((match[0] for line in lines if (match := re.search(r"http://127\.0\.0\.1:\d+", line))), None)
        assert found, "the server ended before it listened"
        for _ in range(600):
            with suppress(OSError), urllib.request.urlopen(f"{found}/health"):
                break
            time.sleep(0.1)
        yield found + "/"
        server.terminate()
        server.communicate(timeout=60)
        assert server.returncode == 0


@pytest.fixture
def playground(page: Any, url: str) -> Playground:
    return Playground(page, url)


def at_the_hole(playground: Playground) -> None:
    """The cursor at the hole of the example, and a suggestion for it."""
    playground.editor.focus()
    playground.keyboard.press("Alt+\\")
    expect(playground.ghost).to_be_visible()
    expect(playground.status).to_contain_text("ended by")


def test_the_demo_completes_the_example(playground: Playground) -> None:
    expect(playground.page.locator("#model")).to_have_text("demo")
    at_the_hole(playground)
    suggested = playground.ghost.text_content()
    assert re.match(r"\d+ tokens, \d+ of them cached", playground.fact("Prompt"))
    tokens = playground.page.get_by_role("toolbar").get_by_role("button")
    kept = tokens.evaluate_all("tokens => tokens.filter(t => !t.matches('.cut')).map(t => t.textContent)")
    written = "".join(kept).replace("␣", " ").replace("↵", "\n")
    assert written.endswith(suggested)
    assert "            return ".endswith(written.removesuffix(suggested)), "healing writes the end of the prefix anew"
    playground.keyboard.press("Alt+]")
    expect(playground.status).to_contain_text("Suggestion 2 of")
    assert playground.ghost.text_content() != suggested
    playground.keyboard.press("Alt+[")
    expect(playground.ghost).to_have_text(suggested)
    playground.keyboard.press("Tab")
    assert f"return {suggested}\n" in playground.code


def test_every_dialect_answers_the_copied_command_alike(playground: Playground) -> None:
    at_the_hole(playground)
    suggested = playground.ghost.text_content()
    texts = {}
    for index, (dialect, text_of) in enumerate(TEXT_OF.items()):
        playground.page.get_by_label("Dialect").select_option(index=index)
        command = playground.page.get_by_label("curl command").input_value()
        answer = subprocess.run(["bash", "-c", command], capture_output=True, check=True, timeout=60).stdout
        texts[dialect] = text_of(json.loads(answer))
    assert texts == dict.fromkeys(TEXT_OF, suggested)
