"""Names on the hub, against a server of our own that speaks what huggingface_hub asks for; no network is used."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from megatron_infer.commands.options import DEMO_DIR
from megatron_infer.hub import local_path

ROOT = Path(__file__).resolve().parents[2]
COMMITS = {"main": "a" * 40, "v1": "b" * 40}
GET_PATH = "import sys; from megatron_infer.hub import local_path; print(local_path(sys.argv[1]))"
SMALL = {
    "model.safetensors": b"weights" * 1000,
    "config.json": b"{}",
    "tokenizer.json": b"[]",
    "merges.txt": b"a b",
    "tokenizer.model": b"pieces",
    "modeling_x.py": b"raise SystemExit",
    "pytorch_model.bin": b"pickle",
    "x.pt": b"pickle",
    "consolidated.safetensors": b"again",
    "original/model.safetensors": b"again",
    "m-Q4_0.gguf": b"GGUF",
    "README.md": b"",
}


@dataclass
class Hub:
    """What the server has, and was asked for."""

    endpoint: str
    home: Path
    repos: dict[str, dict[str, bytes]]
    requests: list[str] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)

    def run(self, *command: str, **env: str) -> subprocess.Popen[str]:
        """A Python program that knows this hub, and none of the caches and settings of this user."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "XDG_"))}
        hub = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(self.home), "HF_HUB_DISABLE_XET": "1"}
        return subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env={**kept, **hub, **env}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def path_of(self, name: str, **env: str) -> Path:
        process = self.run("-c", GET_PATH, name, **env)
        out, err = process.communicate()
        assert process.returncode == 0, err
        return Path(out.strip())

    def error_of(self, name: str, **env: str) -> str:
        process = self.run("-c", GET_PATH, name, **env)
        _, err = process.communicate()
        assert process.returncode == 1 and "ValueError: " in err
        return err.rpartition("ValueError: ")[2]

    def downloads(self) -> list[str]:
        return sorted(r.rpartition("/")[2] for r in self.requests if r.startswith("GET") and "/resolve/" in r)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            served.requests.append(f"{self.command} {path}")
            served.tokens.add(self.headers.get("Authorization"))
            parts = path.strip("/").split("/")
            is_api = parts[:2] == ["api", "models"]
            repo = "/".join(parts[2:4] if is_api else parts[:2])
            rest = parts[4:] if is_api else parts[2:]
            files = served.repos.get(repo)
            if files is None:
                return self.send(404, b"", {"X-Error-Code": "RepoNotFound"})
            commit = COMMITS.get(rest[1], rest[1])
            if commit not in COMMITS.values():
                return self.send(404, b"", {"X-Error-Code": "RevisionNotFound"})
            if rest[0] == "revision":
                return self.send(200, json.dumps({"id": repo, "sha": commit, "siblings": []}).encode(), {})
            if rest[0] == "tree":
                oids = {name: hashlib.sha1(data).hexdigest() for name, data in files.items()}
                tree = [{"type": "file", "path": n, "size": len(d), "oid": oids[n]} for n, d in files.items()]
                return self.send(200, json.dumps(tree).encode(), {"Content-Type": "application/json"})
            data = files["/".join(rest[2:])]
            return self.send(200, data, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'})

        def send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served = Hub(f"http://127.0.0.1:{server.server_port}", tmp_path / "home", {"org/small": SMALL})
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield served
    server.shutdown()
    thread.join()
    server.server_close()


def test_weights_settings_and_tokenizer_are_fetched_and_nothing_else(hub: Hub) -> None:
    folder = hub.path_of("org/small")
    wanted = ["config.json", "merges.txt", "model.safetensors", "tokenizer.json", "tokenizer.model"]
    assert sorted(path.name for path in folder.iterdir()) == hub.downloads() == wanted
    assert folder.name == COMMITS["main"] and (folder / "model.safetensors").read_bytes() == SMALL["model.safetensors"]
    assert hub.tokens == {None}
    # Cached, it is used without a request; but another revision is another download.
    hub.requests.clear()
    assert hub.path_of("org/small") == folder
    assert hub.path_of("org/small", HF_HUB_OFFLINE="1") == folder
    assert hub.requests == []
    assert hub.path_of("org/small@v1", HF_TOKEN="hf_secret").name == COMMITS["v1"]
    assert hub.tokens == {None, "Bearer hf_secret"}


def test_a_file_after_a_colon_is_a_gguf_file_alone_or_pickles_too(hub: Hub) -> None:
    path = hub.path_of("org/small:m-Q4_0.gguf")
    assert path.read_bytes() == b"GGUF" and hub.downloads() == ["m-Q4_0.gguf"]
    folder = hub.path_of("org/small@main:*.bin")
    assert (folder / "pytorch_model.bin").is_file() and not (folder / "x.pt").exists()
    assert "has no file other.gguf" in hub.error_of("org/small:other.gguf")
    hub.repos["org/pickled"] = {"config.json": b"{}", "pytorch_model.bin": b""}
    assert "has no safetensors files; name a GGUF file" in hub.error_of("org/pickled")


def test_an_interrupted_download_is_finished_and_never_used_as_it_is(hub: Hub) -> None:
    weights = hub.path_of("org/small") / "model.safetensors"
    weights.resolve().unlink()
    weights.unlink()
    assert "the hub does not give it" in hub.error_of("org/small", HF_HUB_OFFLINE="1")
    assert hub.path_of("org/small") == weights.parent and weights.is_file()


def test_ranks_that_start_together_fetch_a_file_once(hub: Hub) -> None:
    launched = {"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    ranks = [
        hub.run("-c", GET_PATH, "org/small", RANK=str(rank), LOCAL_RANK=str(rank), **launched) for rank in range(3)
    ]
    results = [rank.communicate() for rank in ranks]
    assert len({out for out, _ in results}) == 1 and not any(rank.returncode for rank in ranks), results
    assert hub.downloads().count("model.safetensors") == 1


def test_what_cannot_be_fetched_says_what_to_do(hub: Hub) -> None:
    error = hub.error_of("org/missing")
    assert "org/missing is not a local path, and the hub does not give it (RepositoryNotFoundError" in error
    assert "hf download org/missing --local-dir DIR" in error
    assert "RevisionNotFoundError" in hub.error_of("org/small@v9")
    assert "LocalEntryNotFoundError" in hub.error_of("org/small", HF_ENDPOINT="http://127.0.0.1:9")


def test_without_the_package_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"org/x is not a local path; .* pip install huggingface_hub"):
        local_path("org/x")


def test_what_is_local_or_looks_so_stays_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "x").mkdir(parents=True)
    assert local_path("org/x") == Path("org/x")
    for name in ("./org/y", "/org/y", "y", "a/b/c", "org/y.gguf", "../org/y", "org/", "~/y", ""):
        assert local_path(name) == Path(name)


def test_the_command_line_completes_with_a_model_of_the_hub(hub: Hub) -> None:
    hub.repos["org/demo"] = {path.name: path.read_bytes() for path in DEMO_DIR.iterdir() if path.is_file()}
    command = ("sess_megatron.py", "--model_dir", "org/demo", "--device", "cpu", "--max_new_tokens", "2", "--quiet")
    process = hub.run(*command)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert out.strip()
