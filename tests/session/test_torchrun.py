"""The command line under torchrun: one answer at 1 and 2 ranks, collective calls, clear errors, ranks that die."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from torch.distributed.run import get_args_parser

from megatron_infer import LLM, FimPrompt, SamplingParams
from megatron_infer.commands import bench
from megatron_infer.commands import complete as cli_module
from megatron_infer.commands.complete import main
from megatron_infer.eval.build import command as build_command
from megatron_infer.eval.report import command as report_command
from megatron_infer.eval.run import command as run_command
from megatron_infer.eval.score import command as score_command
from megatron_infer.serve import command as serve_command
from megatron_infer.world import World

ROOT = Path(__file__).resolve().parents[2]
QUICK = ["--device", "cpu", "--kv_cache_memory_bytes", str(4 << 20)]


def torchrun(ranks: int, script: Path | str, *arguments: str) -> list[str]:
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks),
        str(script), *arguments,
    ]  # fmt: skip


def run(command: list[str], cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, env=env)


def cli(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return run([sys.executable, str(ROOT / "sess_megatron.py"), *arguments], cwd)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("src") / "shapes.py"
    path.write_text("def area(w, h):\n    return \n\nprint(area(2, 3))\n")
    return path


def test_one_and_two_ranks_print_the_same_completion(tiny_checkpoint: Path, source: Path) -> None:
    arguments = ["--model_dir", str(tiny_checkpoint), "--file", str(source), "--cursor", "2:12", *QUICK]
    arguments += ["--max-new-tokens", "12", "--json", "--logprobs", "1"]
    outputs = []
    for ranks in (1, 2):
        done = run(torchrun(ranks, ROOT / "sess_megatron.py", *arguments))
        assert done.returncode == 0, done.stderr
        assert "tokens/s" in done.stderr
        assert f"tp {ranks}" in done.stderr
        outputs.append(json.loads(done.stdout))
    for raw in outputs:
        del raw["timings"]
    assert outputs[0] == outputs[1]


def test_stream_and_stdout_carry_the_completion_alone(tiny_checkpoint: Path, source: Path) -> None:
    arguments = ["--model-dir", str(tiny_checkpoint), "--file", str(source), "--cursor", "2:12", *QUICK]
    whole = cli(*arguments, "--max_new_tokens", "12")
    assert whole.returncode == 0, whole.stderr
    streamed = cli(*arguments, "--max_new_tokens", "12", "--stream")
    assert streamed.stdout == whole.stdout
    assert "config:" in whole.stderr
    assert "config:" not in cli(*arguments, "--max_new_tokens", "1", "--quiet").stderr


def test_an_example_is_shown_with_its_completion(tiny_checkpoint: Path, tmp_path: Path) -> None:
    example = tmp_path / "example.json"
    command = ["--model_dir", str(tiny_checkpoint), "--max_new_tokens", "4", "--example", str(example), *QUICK]
    assert f"cannot read {example}" in cli(*command).stderr
    example.write_text(json.dumps({"prefix": "def f(x):"}))
    assert f"{example} has not the texts prefix, suffix and path" in cli(*command).stderr
    example.write_text(json.dumps({"prefix": "def f(x):", "suffix": "# end", "path": "a.py"}))
    done = cli(*command)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("def f(x):⟦") and done.stdout.endswith("⟧# end\n")


def test_prefix_and_suffix_files(tiny_checkpoint: Path, source: Path, tmp_path: Path) -> None:
    text = source.read_text()
    (tmp_path / "before").write_text(text[:27])
    (tmp_path / "after").write_text(text[27:])
    common = ["--model_dir", str(tiny_checkpoint), "--max_new_tokens", "8", *QUICK]
    path = ["--path", str(source)]
    inside = cli(*common, "--file", str(source), "--cursor", "2:12", *path)
    halves = cli(*common, "--prefix-file", str(tmp_path / "before"), "--suffix_file", str(tmp_path / "after"), *path)
    assert inside.returncode == 0, inside.stderr
    assert halves.stdout == inside.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model_dir", "/nowhere/at/all"], "is not a directory"),
        (["--file", "{src}"], "--cursor"),
        (["--file", "{src}", "--cursor", "99:1"], "outside the file's 5 lines"),
        (["--file", "{src}", "--cursor", "2:13"], "columns 1 to 12"),
        (["--file", "{src}", "--cursor", "two"], "LINE:COL"),
        (["--file", "{dir}", "--cursor", "1:1"], "is a directory"),
        (["--file", "{big}", "--cursor", "1:1"], "bytes"),
        (["--file", "{binary}", "--cursor", "1:1"], "UTF-8"),
        (["--file", "missing.py", "--cursor", "1:1"], "cannot read"),
        (["--max_new_tokens", "-1"], "max_new_tokens"),
        (["--temperature", "nan"], "temperature"),
        (["--tensor_parallel_size", "3"], "tensor_parallel_size"),
        (["--model_dir", ""], "--model_dir is empty"),
        (["--stream", "--n", "2", "--temperature", "1"], "--stream shows one"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_get_one_clear_line(
    tiny_checkpoint, source, tmp_path, monkeypatch, capsys, arguments, message
) -> None:
    big = tmp_path / "big.py"
    with big.open("wb") as file:
        file.truncate(15 << 30)
    (tmp_path / "binary.py").write_bytes(b"\xff\xfe\x00")
    monkeypatch.chdir(tmp_path)
    names = {"src": source, "dir": tmp_path, "big": big, "binary": tmp_path / "binary.py"}
    given = [argument.format(**names) for argument in arguments]
    if "--model_dir" not in given:
        given += ["--model_dir", str(tiny_checkpoint)]
    assert main([*given, "--device", "cpu"]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert "Traceback" not in err
    assert out == ""


def every_option(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [action for action in parser._actions if action.option_strings and action.dest != "help"]


@pytest.mark.parametrize(
    "module", [cli_module, bench, serve_command, run_command, score_command, build_command, report_command]
)
def test_every_option_has_a_spelling_that_torchrun_leaves_alone(module, capsys) -> None:
    """Before 3.12, argparse calls --n ambiguous wherever it stands: it could begin --nnodes or --nproc-per-node."""
    refused = []
    for action in every_option(module._parser(World())):
        passed = []
        for spelling in action.option_strings:
            given = ["script.py", spelling] + ([] if action.nargs == 0 else ["1"])
            try:
                passed.append(get_args_parser().parse_args(given).training_script_args == given[1:])
            except SystemExit:
                passed.append(False)
        refused += [action.option_strings] if not any(passed) else []
    capsys.readouterr()
    assert not refused


def test_a_mistake_under_torchrun_is_the_last_thing_it_says(tiny_checkpoint: Path) -> None:
    arguments = ["--model_dir", str(tiny_checkpoint), "--num_samples", "2", "--stream"]
    done = run(torchrun(2, ROOT / "sess_megatron.py", *arguments))
    assert done.returncode != 0
    line = "error: --stream shows one completion; leave out --num_samples, or --stream"
    assert done.stderr.splitlines().count(line) == 1
    last = [text for text in done.stderr.splitlines() if "traceback" in text][-1]
    assert last.strip() == f"traceback : {line}"


COLLECTIVE_SCRIPT = """
import json, os, random, sys
import numpy, torch
from megatron_infer import FimPrompt, SamplingParams
from sess_megatron import TestInference

rank = int(os.environ["RANK"])
for seed in (random.seed, numpy.random.seed, torch.manual_seed):
    seed(rank)  # no answer may depend on it
results = []
for _ in range(2):  # several sessions, one after the other
    with TestInference(sys.argv[1], kv_cache_memory_bytes=4 << 20, device="cpu") as session:
        # Other ranks' arguments do not count, not even bad ones.
        results.append(session.run_infer("x = " if rank == 0 else None, 8 if rank == 0 else -1, "\\n", "a.py"))
        for bad in (("", 8), (None, 8), ("x", -1)):
            try:
                session.run_infer(*(bad if rank == 0 else ("fine", 8)))
            except ValueError as error:
                results.append(str(error))
        stream = session.llm.stream(FimPrompt("y = "), SamplingParams(max_new_tokens=50, ignore_eos=True))
        results.append(next(stream))
        stream.close()
        prompts = [FimPrompt(f"v{i} =") for i in range(5)]
        hot = SamplingParams(max_new_tokens=8, temperature=1.0, seed=5, n=2)
        for sampling in (SamplingParams(max_new_tokens=4), hot):
            results += [[c.text, c.token_ids] for c in session.llm.complete_batch(prompts, sampling)]
with open(f"{sys.argv[2]}/{rank}.json", "w") as file:
    json.dump(results, file)
"""


def test_calls_are_collective_and_every_rank_gets_the_same(tiny_checkpoint: Path, tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(COLLECTIVE_SCRIPT)
    jobs = [
        subprocess.Popen(
            torchrun(2, script, str(tiny_checkpoint), str(out)),
            env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for out in (tmp_path / "one", tmp_path / "two")
        if out.mkdir() is None
    ]  # fmt: skip
    for job in jobs:
        output, _ = job.communicate(timeout=180)
        assert job.returncode == 0, output
    results = [json.loads((tmp_path / job / f"{rank}.json").read_text()) for job in ("one", "two") for rank in (0, 1)]
    assert all(result == results[0] for result in results), "two jobs at once, two ranks each: one answer"
    assert results[0][:20] == results[0][20:], "both sessions"


FOLLOW_SCRIPT = """
import json, os, sys
from concurrent.futures import ThreadPoolExecutor
from megatron_infer import LLM, FimPrompt, SamplingParams

with LLM(sys.argv[1], kv_cache_memory_bytes=4 << 20, device="cpu") as llm:
    if not llm.is_leader:
        llm.follow()
    else:
        prompts = [FimPrompt(f"v{i} =") for i in range(6)]
        sampling = SamplingParams(max_new_tokens=4)
        # As many calls as rank 0 likes, of any kind, from several threads: the followers need not know.
        with ThreadPoolExecutor(3) as pool:
            texts = list(pool.map(lambda prompt: llm.complete(prompt, sampling).text, prompts))
        try:
            llm.complete("")
        except ValueError:
            texts.append("refused")
        handle = llm.session.submit(prompts[0], sampling)
        while not handle.is_finished:
            llm.session.step()
        texts.append(handle.results()[0].text)
        with open(sys.argv[2], "w") as file:
            json.dump(texts, file)
"""


def test_ranks_that_follow_serve_whatever_calls_rank_0_makes(tiny_checkpoint: Path, tmp_path: Path) -> None:
    script, out = tmp_path / "job.py", tmp_path / "texts.json"
    script.write_text(FOLLOW_SCRIPT)
    done = run(torchrun(2, script, str(tiny_checkpoint), str(out)))
    assert done.returncode == 0, done.stderr
    texts = json.loads(out.read_text())
    with LLM(tiny_checkpoint, device="cpu", kv_cache_memory_bytes=4 << 20) as alone:
        with pytest.raises(ValueError, match="rank 0 leads"):
            alone.follow()
        expected = [alone.complete(FimPrompt(f"v{i} ="), SamplingParams(max_new_tokens=4)).text for i in range(6)]
    assert texts == [*expected, "refused", expected[0]]


FAILING_SCRIPT = """
import os, signal, sys
from megatron_infer.engine.runner import ModelRunner
from sess_megatron import TestInference

how, plain, calls = sys.argv[2], ModelRunner.start, 0

def start(self, step, draws=()):
    global calls
    calls += 1
    if calls == 5 and os.environ["RANK"] == sys.argv[3]:
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise FloatingPointError("injected fault")
    return plain(self, step, draws)

ModelRunner.start = start
session = TestInference(sys.argv[1], kv_cache_memory_bytes=4 << 20, device="cpu")
with open(f"{sys.argv[0]}.{os.environ['RANK']}.pid", "w") as file:  # not stdout: lines of two ranks may mingle
    file.write(str(os.getpid()))
session.run_infer("x = ", 300, "\\n", "a.py")
print("finished", flush=True)
"""


@pytest.mark.parametrize("how", ["kill", "raise"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_failing_rank_ends_the_job_with_the_cause_named(tiny_checkpoint, tmp_path, how, victim) -> None:
    script = tmp_path / "job.py"
    script.write_text(FAILING_SCRIPT)
    before = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    started = time.monotonic()
    done = run(torchrun(2, script, str(tiny_checkpoint), how, str(victim)), tmp_path)
    assert done.returncode != 0
    assert "finished" not in done.stdout
    assert time.monotonic() - started < 60
    if how == "raise":
        assert "injected fault" in done.stderr
    assert f"rank {victim}" in done.stderr or f"rank      : {victim}" in done.stderr, done.stderr
    pids = [int(path.read_text()) for path in tmp_path.glob("*.pid")]
    assert len(pids) == 2
    assert not any(map(psutil.pid_exists, pids))
    after = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    assert not {name for name in after - before if "megatron" in name}


def test_without_an_agent_the_surviving_rank_exits_by_itself(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """torchrun would stop the survivors anyway; here nobody does, and rank 0 must still end within 10 seconds."""
    script = tmp_path / "job.py"
    script.write_text(FAILING_SCRIPT)
    listener = (
        "import sys, torch.distributed as d\n"
        "store = d.TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)\n"
        "print(store.port, flush=True)\n"
        "sys.stdin.read()\n"
    )
    host = subprocess.Popen([sys.executable, "-c", listener], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert host.stdout is not None
    port = host.stdout.readline().strip()
    ranks = []
    for rank in range(2):
        env = {
            **os.environ, "PYTHONPATH": str(ROOT), "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }  # fmt: skip
        command = [sys.executable, str(script), str(tiny_checkpoint), "kill", "1"]
        ranks.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True))
    ranks[1].wait(timeout=120)
    died = time.monotonic()
    _, stderr = ranks[0].communicate(timeout=60)
    assert time.monotonic() - died < 10
    assert ranks[0].returncode not in (0, None)
    assert "rank 1" in stderr
    host.communicate(timeout=30)
    assert ranks[1].stderr is not None
    ranks[1].stderr.close()
