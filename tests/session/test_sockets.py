"""Nobody gets in: what listens while a session lives, and what a rank does with what it is handed."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
from torch.distributed import HashStore

from megatron_infer import LLM, SamplingParams
from megatron_infer.kernels.cpu.collectives import LIBRARY_PATH, check_file, create_file, load_library
from megatron_infer.tensor_parallel import shared_memory
from megatron_infer.tensor_parallel.rendezvous import Rendezvous
from megatron_infer.tensor_parallel.shared_memory import SharedMemoryBackend
from tests.eval.killed_runs import command_of, shapes, write_cases
from tests.session.test_torchrun import torchrun
from tests.support.processes import ranks_of, running, wait_for_progress

needs_library = pytest.mark.skipif(
    sys.platform != "linux" or not LIBRARY_PATH.exists(), reason="needs Linux and the native library"
)
LOOPBACK = ("127.0.0.1", "::1")

SESSION_SCRIPT = """
import sys
from megatron_infer import LLM, SamplingParams

size = int(sys.argv[2]) if sys.argv[2:] else None
llm = LLM(sys.argv[1], tensor_parallel_size=size, device="cpu", kv_cache_memory_bytes=4 << 20)
llm.complete("x = ", SamplingParams(max_new_tokens=2))
if llm.is_leader:
    print("ready", flush=True)
sys.stdin.read()
"""


def listening(process: psutil.Process) -> list[str]:
    """Addresses that a process accepts connections at from other hosts or users."""
    return [c.laddr.ip for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]


def test_a_session_with_followers_listens_nowhere(tiny_checkpoint: Path) -> None:
    others = listening(psutil.Process())  # of tests before this one
    with LLM(tiny_checkpoint, tensor_parallel_size=2, device="cpu", kv_cache_memory_bytes=4 << 20) as llm:
        llm.complete("x = ", SamplingParams(max_new_tokens=2))
        (follower,) = llm._followers.processes
        assert listening(psutil.Process()) == others
        assert listening(psutil.Process(follower.pid)) == []


def test_ranks_under_torchrun_listen_on_loopback_alone(tiny_checkpoint: Path, tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(SESSION_SCRIPT)
    with running(torchrun(2, script, str(tiny_checkpoint))) as process:
        assert process.stdout.readline() == "ready\n"
        ranks = ranks_of(process)
        assert len(ranks) == 2
        assert not {address for rank in ranks for address in listening(rank)} - set(LOOPBACK)


def test_a_store_that_rank_0_hosts_itself_listens_on_loopback(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """As under srun or mpirun on one host, which bring no store of their own."""
    script = tmp_path / "job.py"
    script.write_text(SESSION_SCRIPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    command = [sys.executable, str(script), str(tiny_checkpoint)]
    with (
        running(command, RANK="0", LOCAL_RANK="0", **common) as first,
        running(command, RANK="1", LOCAL_RANK="1", **common) as second,
    ):
        assert first.stdout.readline() == "ready\n"
        assert listening(first) == ["127.0.0.1"]
        assert listening(second) == []


def test_replicas_of_an_evaluation_listen_on_loopback_alone(tiny_checkpoint: Path, tmp_path: Path) -> None:
    data, out = write_cases(tmp_path / "cases.jsonl", 4000), tmp_path / "out"
    arguments = ["--task", "fim", "--data", str(data), "--model_dir", str(tiny_checkpoint), "--max_new_tokens", "6"]
    command = command_of(shapes("-m", "megatron_infer")[3], *arguments, "--out", str(out))
    with running(command) as process:
        wait_for_progress(process, out)
        ranks = ranks_of(process)
        assert len(ranks) == 4
        assert not {address for rank in ranks for address in listening(rank)} - set(LOOPBACK)


@needs_library
def test_only_the_groups_own_memory_is_mapped(tmp_path: Path) -> None:
    library = load_library()
    fd = create_file(library, 2)
    check_file(library, fd, 2)
    with pytest.raises(OSError, match="not the group's"):
        check_file(library, fd, 4)
    os.close(fd)
    size = library.mi_coll_mapping_bytes(2, 512 * 1024)
    with (tmp_path / "file").open("w+b") as of_the_disk, tempfile.TemporaryFile() as unsealed:
        of_the_disk.truncate(size)
        unsealed.truncate(size)
        for file in (of_the_disk, unsealed):
            with pytest.raises(OSError, match="not the group's"):
                check_file(library, file.fileno(), 2)
        assert of_the_disk.read() == bytes(size), "nothing was written"


@needs_library
def test_what_stands_in_the_store_opens_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The attack that worked: whoever reaches the store names a file, and a starting rank writes into it."""
    victim = tmp_path / "victim"
    victim.write_bytes(bytes(1 << 20))
    monkeypatch.setattr(shared_memory, "_SENT_SECONDS", 0.2)
    with victim.open("r+b") as file:
        for text in (f"{os.getpid()} {file.fileno()}", f"1 ../../..{victim}", "sent"):
            store = HashStore()
            meeting = Rendezvous(store, 1, 2, "attacked", 5.0)
            host = shared_memory.ProcessIdentity.own().host
            for key, value in {"shm-able/0": f"{host}\n\n0", "shm-file": text, "shm-attached/0": ""}.items():
                meeting.store.set(key, value)
            why = SharedMemoryBackend.connect(meeting)
            assert isinstance(why, str) and "cannot share memory" in why
    assert victim.read_bytes() == bytes(1 << 20)


@needs_library
def test_a_descriptor_from_another_user_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    with ours, theirs:
        shared_memory._check_user(ours)
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        with pytest.raises(OSError, match="belongs to user"):
            shared_memory._check_user(ours)
