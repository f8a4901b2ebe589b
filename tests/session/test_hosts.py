"""Ranks on several hosts, simulated (tests/support/hosts.py): how they find each other, and what ends them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.eval.killed_runs import PYTHON, command_of, write_cases
from tests.session.test_torchrun import ROOT, run
from tests.support.hosts import Host, simulated_hosts, why_not

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "hosts can be simulated")

PORT = "29533"
MEETING = """
import torch
from megatron_infer.tensor_parallel.group import RankFailure, TPGroup
from megatron_infer.world import World
try:
    group = TPGroup.in_world(World.from_env(), torch.device("cpu"), timeout_seconds=20)
    print(group.backend, group.gather_text(f"rank {group.rank}"))
    group.close()
except (RankFailure, ValueError) as error:
    print(type(error).__name__, error)
"""

PARTING = """
import sys, torch
from megatron_infer.tensor_parallel.group import RankFailure, TPGroup
from megatron_infer.world import World
group = TPGroup.in_world(World.from_env(), torch.device("cpu"), timeout_seconds=30)
group.set_patience(2.0)
print("met", flush=True)
sys.stdin.readline()
try:
    group.broadcast_ints(None) if group.rank else group.gather_number(1)
except RankFailure as error:
    print(error)
"""


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[Host]]:
    with simulated_hosts(3) as made:
        yield made


def environment(rank: int, size: int, **more: str) -> dict[str, str]:
    """As srun or mpirun, with a line of shell, would set it."""
    meeting = {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "10.77.0.1", "MASTER_PORT": PORT}
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **meeting, **more}


def torchrun_on(host: Host, index: int, count: int, *program: str) -> psutil.Popen:
    """One rank there, of so many hosts."""
    launcher = ["--nnodes", str(count), "--nproc_per_node", "1", "--node_rank", str(index)]
    launcher += ["--master_addr", "10.77.0.1", "--master_port", PORT]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", *launcher, *program]
    return host.start(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ranks_on(hosts: list[Host], program: str, **options: Any) -> list[psutil.Popen]:
    """A rank on each of the hosts, with pipes; `options` are Host.start's, and more of the environment."""
    own = {name: options.pop(name) for name in ("hosts_file", "shares_pids") if name in options}
    return [
        host.start(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True, env=environment(rank, len(hosts), **options), **own,
        )
        for rank, host in enumerate(hosts)
    ]  # fmt: skip


def meet(hosts: list[Host], **options: Any) -> list[str]:
    """What a rank on each of the hosts prints."""
    return [rank.communicate(timeout=180)[0].strip() for rank in ranks_on(hosts, MEETING, **options)]


def test_hosts_meet_though_their_names_lead_to_loopback(hosts: list[Host], tmp_path: Path) -> None:
    """As Debian's installer writes /etc/hosts."""
    names = tmp_path / "hosts"
    names.write_text("127.0.0.1 localhost\n127.0.1.1 host1 host2\n")
    assert meet(hosts[:2], hosts_file=names) == ["gloo ['rank 0', 'rank 1']"] * 2


def test_containers_that_share_process_ids_but_no_network_are_hosts(hosts: list[Host]) -> None:
    assert meet(hosts[:2], shares_pids=True, GLOO_SOCKET_IFNAME="eth0") == ["gloo ['rank 0', 'rank 1']"] * 2


@pytest.mark.parametrize(
    ("interface", "message"),
    [
        (
            "nosuch0",
            "ValueError rank 0: GLOO_SOCKET_IFNAME=nosuch0: no such interface, or it has no address; there are",
        ),
        pytest.param(
            "stray0",
            "cannot connect at 10.78.1.1, 10.78.2.1; open the firewall between them, or set GLOO_SOCKET_IFNAME",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_wrong_interface_is_named_on_every_host(hosts: list[Host], interface: str, message: str) -> None:
    printed = meet(hosts[:2], GLOO_SOCKET_IFNAME=interface)
    assert all(message in line for line in printed), printed


def test_a_host_that_loses_its_network_is_given_up_and_gives_up(hosts: list[Host]) -> None:
    """The store is on the first host: the other, idle, is answered by nobody."""
    ranks = ranks_on(hosts[:2], PARTING)
    assert [rank.stdout.readline() for rank in ranks] == ["met\n"] * 2
    with hosts[1].cut_off():
        first, second = (rank.communicate("go\n", timeout=180)[0] for rank in ranks)
    assert "rank 1 of the tensor-parallel group failed: it did not reach all_gather within 2 s" in first
    assert "the store that the ranks met at is gone (it does not answer)" in second
    assert [rank.returncode for rank in ranks] == [0, 0]


@pytest.mark.parametrize(
    ("count", "size"),
    [pytest.param(2, 2, id="one model on two hosts"), pytest.param(3, 1, id="three replicas", marks=pytest.mark.slow)],
)
def test_hosts_share_an_evaluation_and_change_nothing(
    hosts: list[Host], tiny_checkpoint: Path, tmp_path: Path, count: int, size: int
) -> None:
    data = write_cases(tmp_path / "cases.jsonl", 24)
    arguments = ["--task", "fim", "--data", str(data), "--model_dir", str(tiny_checkpoint), "--max_new_tokens", "6"]
    alone = run(command_of(PYTHON, *arguments, "--out", str(tmp_path / "alone")))
    assert alone.returncode == 0, alone.stderr
    shape = ["-m", "megatron_infer", f"--tensor_parallel_size={size}"]
    program = command_of(shape, *arguments, "--out", str(tmp_path / "out"))
    # The first host comes last: the others wait for it.
    started = [torchrun_on(hosts[i], i, count, *program) for i in reversed(range(count))]
    for process in started:
        printed, _ = process.communicate(timeout=300)
        assert process.returncode == 0, printed
    for name in ("completions.jsonl", "predictions.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["attempts"][0]["world_size"] == count
