"""Which rank this process is: one answer, whatever a launcher left behind in the environment."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed import DistError

from megatron_infer import world
from megatron_infer.world import World

ROOT = Path(__file__).resolve().parents[2]
VARIABLES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT",
)  # fmt: skip


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for key in VARIABLES:
        monkeypatch.delenv(key, raising=False)
    return monkeypatch


def test_a_plain_process_is_alone(environment: pytest.MonkeyPatch) -> None:
    assert World.from_env() == World(0, 1, 0, 1)
    environment.setenv("MASTER_ADDR", "left.behind")
    environment.setenv("LOCAL_RANK", "3")
    assert World.from_env() == World(0, 1, 0, 1)


def test_torchruns_variables_are_read(environment: pytest.MonkeyPatch) -> None:
    for key, value in zip(VARIABLES, ("5", "8", "1", "4", "host", "29500", "2"), strict=True):
        environment.setenv(key, value)
    assert World.from_env() == World(5, 8, 1, 4, "host:29500", 2)
    assert World.from_env().is_launched and not World.from_env().is_first


STALE = [
    ({"RANK": "1", "WORLD_SIZE": "2"}, "lacks MASTER_ADDR, MASTER_PORT"),
    ({"RANK": "1"}, "lacks WORLD_SIZE"),
    ({"WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"}, "lacks RANK"),
    ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"}, "not below"),
    ({"RANK": "0", "WORLD_SIZE": "two", "MASTER_ADDR": "h", "MASTER_PORT": "1"}, "not an integer"),
    ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1", "LOCAL_WORLD_SIZE": "3"}, "do not fit"),
]


@pytest.mark.parametrize(("variables", "message"), STALE, ids=str)
def test_what_contradicts_itself_is_refused_with_the_remedy(environment, variables, message) -> None:
    for key, value in variables.items():
        environment.setenv(key, value)
    with pytest.raises(ValueError, match=f"{message}.*unset RANK and WORLD_SIZE"):
        World.from_env()


def test_a_command_in_a_stale_environment_says_so_on_any_rank(tiny_checkpoint: Path) -> None:
    env = {key: value for key, value in os.environ.items() if key not in VARIABLES}
    command = [sys.executable, str(ROOT / "sess_megatron.py"), "--model_dir", str(tiny_checkpoint), "--quiet"]
    done = subprocess.run(
        command, cwd=ROOT, env={**env, "RANK": "1", "WORLD_SIZE": "2"}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert "unset RANK and WORLD_SIZE to run as a single process" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("rank", "awaited"), [(0, "ranks 1 to 2"), (1, "rank 0")])
def test_a_rank_that_waits_for_nobody_says_for_whom_and_where(environment, caplog, rank: int, awaited: str) -> None:
    port = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False).port
    variables = {"RANK": str(rank), "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for key, value in variables.items():
        environment.setenv(key, value)
    environment.setattr(world, "_PATIENCE_SECONDS", 0.01)
    with caplog.at_level(logging.WARNING, logger="megatron_infer"), pytest.raises(DistError):
        world.launcher_store(World.from_env(), timeout_seconds=1)
    (said,) = caplog.messages
    assert f"rank {rank} of 3 waits at 127.0.0.1:{port} for {awaited}" in said
    assert "unset RANK and WORLD_SIZE to run alone" in said
