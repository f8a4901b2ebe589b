"""Nothing hangs: a rank that is stopped ends the engine, and no rank outlives the process that started it."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from torch.distributed import TCPStore

from megatron_infer import LLM, EngineConfig, FimPrompt, SamplingParams
from megatron_infer.llm import EngineDeadError
from megatron_infer.tensor_parallel import rendezvous
from megatron_infer.tensor_parallel.group import TPGroup
from megatron_infer.tensor_parallel.rendezvous import Patience, RankFailure, Wait
from tests.eval.killed_runs import command_of, shapes, write_cases
from tests.session.test_torchrun import torchrun
from tests.support.processes import ROOT, ranks_of, running, wait_for_progress

QUICK = {"tensor_parallel_size": 2, "device": "cpu", "kv_cache_memory_bytes": 4 << 20}
LONG = SamplingParams(max_new_tokens=300, ignore_eos=True)
HALF = r"(0\.[5-9]|1\.\d)"
"""Of a patience of 1 s, as it is measured: a busy machine looks at its clock later."""


def gone(processes: list[psutil.Process], within_seconds: float = 10.0) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=within_seconds)
    return not [one for one in alive if one.status() != psutil.STATUS_ZOMBIE]


def test_a_stopped_follower_ends_the_engine_with_its_name(tiny_checkpoint: Path, caplog, capfd) -> None:
    with LLM(tiny_checkpoint, rank_timeout_seconds=1.0, **QUICK) as llm:
        follower = psutil.Process(llm._followers.processes[0].pid)
        stream = llm.stream(FimPrompt("x = "), LONG)
        next(stream)
        with caplog.at_level(logging.WARNING, logger="megatron_infer"):
            follower.suspend()
            with pytest.raises(EngineDeadError, match=r"rank 1 .* did not reach .* within 1 s"):
                list(stream)
        assert re.search(rf"rank 0 has waited {HALF} s for rank 1", caplog.text)
        assert "Current thread" in capfd.readouterr().err, "the stack of rank 0"
        with pytest.raises(EngineDeadError):
            llm.complete("x = ")
    assert gone([follower])


def test_the_time_in_which_a_rank_itself_was_stopped_does_not_count(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    now = 0.0
    # Its own clock alone: servers of other tests may live in this process.
    monkeypatch.setattr(rendezvous, "time", SimpleNamespace(monotonic=lambda: now))
    wait = Wait(0, "reach all_reduce", Patience(5.0, 2.5))
    now = 3600.0
    assert wait.over(1) == ""
    for _ in range(4):
        now += 1.0
        assert wait.over(1) == ""
    now += 1.0
    assert wait.over(1) == "it did not reach all_reduce within 5 s"
    assert caplog.messages == ["rank 0 has waited 3.0 s for rank 1 to reach all_reduce; it gives up after 5 s"]


def test_a_rank_that_does_not_start_is_given_up_ten_times_later(tiny_checkpoint: Path) -> None:
    assert EngineConfig().start_timeout_seconds == 600
    with pytest.raises(EngineDeadError, match=r"rank 1 .* did not join the group of 2 within 0.1 s"):
        LLM(tiny_checkpoint, rank_timeout_seconds=0.01, **QUICK)
    for wrong in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="rank_timeout_seconds"):
            EngineConfig(rank_timeout_seconds=wrong)


LEADER_SCRIPT = """
import os, signal, sys
from megatron_infer import LLM, FimPrompt, SamplingParams
from megatron_infer.engine.runner import ModelRunner

plain, calls = ModelRunner.start, 0

def start(self, step, draws=()):
    global calls
    calls += 1
    if calls == 5 and os.environ["RANK"] == "0":
        os.kill(os.getpid(), signal.SIGSTOP)  # the others have the step
    return plain(self, step, draws)

ModelRunner.start = start
llm = LLM(sys.argv[1], kv_cache_memory_bytes=4 << 20, device="cpu", rank_timeout_seconds=1.0)
llm.complete(FimPrompt("x = "), SamplingParams(max_new_tokens=300, ignore_eos=True))
"""


def test_a_stopped_leader_is_not_waited_for(tiny_checkpoint: Path, tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(LEADER_SCRIPT)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    common["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    command = [sys.executable, str(script), str(tiny_checkpoint)]
    with running(command, RANK="0", LOCAL_RANK="0", **common):
        env = {**os.environ, "PYTHONPATH": str(ROOT), **common, "RANK": "1", "LOCAL_RANK": "1"}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert "EngineDeadError: the engine stopped: rank 0" in done.stderr
    assert "did not reach all_reduce within 1 s" in done.stderr
    assert re.search(rf"rank 1 has waited {HALF} s for rank 0", done.stderr)


JOBS = {
    "computing": "\nwhile True:\n    llm.complete('x = ', SamplingParams(max_new_tokens=50, ignore_eos=True))\n",
    "idle, and deaf to SIGTERM": "\nimport signal, time\nsignal.signal(15, lambda *_: None)\ntime.sleep(300)\n",
}
START = """
import sys
from megatron_infer import LLM, SamplingParams

llm = LLM(sys.argv[1], device="cpu", kv_cache_memory_bytes=4 << 20)
if llm.is_leader:
    print("ready", flush=True)
"""


@pytest.mark.parametrize("job", list(JOBS))
def test_ranks_end_with_a_killed_torchrun(tiny_checkpoint: Path, tmp_path: Path, job: str) -> None:
    script = tmp_path / "job.py"
    script.write_text(START + JOBS[job])
    with running(torchrun(1 if job == "computing" else 2, script, str(tiny_checkpoint))) as process:
        assert process.stdout.readline() == "ready\n"
        ranks = ranks_of(process)
        process.kill()
        assert gone(ranks)


def test_a_command_ends_with_a_killed_torchrun(tiny_checkpoint: Path, tmp_path: Path) -> None:
    data, out = write_cases(tmp_path / "cases.jsonl", 20_000), tmp_path / "out"
    arguments = ["--task", "fim", "--data", str(data), "--model_dir", str(tiny_checkpoint), "--max_new_tokens", "6"]
    command = command_of(shapes("-m", "megatron_infer")[2], *arguments, "--out", str(out))
    with running(command) as process:
        wait_for_progress(process, out)
        ranks = ranks_of(process)
        assert len(ranks) == 2
        process.kill()
        assert gone(ranks)


@pytest.mark.parametrize("is_stopped", [False, True])
def test_followers_end_with_a_killed_parent_in_any_state(tiny_checkpoint: Path, tmp_path: Path, is_stopped) -> None:
    script = tmp_path / "job.py"
    script.write_text(
        START.replace('device="cpu"', 'device="cpu", tensor_parallel_size=2') + "\nimport time\ntime.sleep(300)\n"
    )
    with running([sys.executable, str(script), str(tiny_checkpoint)]) as process:
        assert process.stdout.readline() == "ready\n"
        followers = process.children()
        assert len(followers) == 1
        if is_stopped:
            followers[0].suspend()
        process.kill()
        assert gone(followers)


def test_followers_outlive_the_thread_that_made_the_session(tiny_checkpoint: Path) -> None:
    made: list[LLM] = []
    thread = threading.Thread(target=lambda: made.append(LLM(tiny_checkpoint, **QUICK)))
    thread.start()
    thread.join()
    with made[0] as llm:
        assert llm.complete("x = ", SamplingParams(max_new_tokens=4, ignore_eos=True)).token_ids
        assert llm._followers.processes[0].poll() is None


def test_a_hung_gpu_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the parts that need GPUs stood in for, as in test_group_cuda.py."""
    from tests.tensor_parallel.test_group_cuda import Recorder, nccl_of

    class Control(Recorder):
        def abort(self, message: str) -> RankFailure:  # type: ignore[override]
            self.failure = RankFailure(0, message)
            return self.failure

    nccl, symmetric = Recorder(), Recorder()
    backend = nccl_of(monkeypatch, nccl, Control(), symmetric)
    group = TPGroup(0, 2, torch.device("cuda", 0), backend, "")
    ended = threading.Event()
    monkeypatch.setattr(nccl, "abort", ended.set)
    with pytest.raises(RankFailure, match="did not finish a step on the GPU within 1 s"), group.waiting():
        assert ended.wait(30), "a kernel that spins for ever"
    assert symmetric.calls == ["abort"]
