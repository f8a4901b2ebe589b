"""Which rank this process is, of how many, and on which host: the only reader of the launcher's environment.

A World is read once and passed down. How its ranks form groups is tensor_parallel's business.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import os
import re
import signal
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from queue import Empty, Queue
from threading import Thread

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed.rendezvous import rendezvous

log = logging.getLogger("megatron_infer")

_PATIENCE_SECONDS = 4.0
"""So long nothing is said about ranks that have not come."""
_LOOK_SECONDS, _FAREWELL_SECONDS = 0.5, 5.0
_LAUNCHER_WATCH = "megatron_infer-launcher"
_REMEDY = "start with `torchrun --nproc_per_node N ...`, or unset RANK and WORLD_SIZE to run as a single process"


@dataclass(frozen=True)
class World:
    """The processes that were started together, and which of them this one is; by default one that is alone.

    Attributes:
        rank, size: among all processes. local_rank, local_size: among those of this host; where the launcher does not
            tell, this process counts as the only one here.
        address: "host:port" where a launcher has the ranks meet; empty where none started this process.
        attempt: how often the launcher has restarted its workers.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    address: str = ""
    attempt: int = 0

    @property
    def is_launched(self) -> bool:
        """Whether torchrun, or a compatible launcher, started this process."""
        return bool(self.address)

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for all."""
        return self.rank == 0

    @classmethod
    def from_env(cls) -> World:
        """The world of this process.

        Raises:
            ValueError: the launcher's variables are incomplete or contradict each other.
        """
        alone = os.environ.get("RANK", "0") == "0" and os.environ.get("WORLD_SIZE", "1") == "1"
        if ("RANK" not in os.environ and "WORLD_SIZE" not in os.environ) or (alone and "MASTER_ADDR" not in os.environ):
            return cls()
        missing = [key for key in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(key)]
        if missing:
            raise ValueError(f"the environment of a distributed run lacks {', '.join(missing)}: {_REMEDY}")
        rank, size = _integer("RANK"), _integer("WORLD_SIZE")
        if not 0 <= rank < size:
            raise ValueError(f"RANK={rank} is not below WORLD_SIZE={size}: {_REMEDY}")
        local_rank, local_size = _integer("LOCAL_RANK", 0), _integer("LOCAL_WORLD_SIZE", 1)
        if "LOCAL_RANK" not in os.environ and os.environ.get("SLURM_PROCID") == str(rank):
            local_rank, local_size = _integer("SLURM_LOCALID"), _slurm_tasks_here()
        if not 1 <= local_size <= size or ("LOCAL_WORLD_SIZE" in os.environ and not 0 <= local_rank < local_size):
            raise ValueError(
                f"LOCAL_RANK={local_rank} and LOCAL_WORLD_SIZE={local_size} do not fit WORLD_SIZE={size}: {_REMEDY}"
            )
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        return cls(rank, size, local_rank, local_size, address, _integer("TORCHELASTIC_RESTART_COUNT", 0))


def _integer(key: str, default: int | None = None) -> int:
    text = os.environ.get(key, default)
    try:
        return int(text)  # type: ignore[arg-type]  # without a default the key is there
    except ValueError:
        raise ValueError(f"{key}={text!r} is not an integer: {_REMEDY}") from None


def _slurm_tasks_here() -> int:
    """Of "2(x3),1": three hosts with two tasks each, then one with one (srun(1), SLURM_STEP_TASKS_PER_NODE)."""
    counts: list[int] = []
    for tasks, repeats in re.findall(r"(\d+)(?:\(x(\d+)\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")):
        counts += [int(tasks)] * int(repeats or 1)
    node = _integer("SLURM_NODEID", 0)
    return counts[node] if node < len(counts) else _integer("SLURM_LOCALID") + 1


def _host_on_loopback(world: World, timeout: timedelta) -> Store | None:
    """Where rank 0 hosts the store itself and all ranks meet at this host's loopback address: a store that listens
    there alone. torch's own listens on every interface, and asks nobody who he is."""
    host, _, port = world.address.rpartition(":")
    if not world.is_first or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None
    with suppress(OSError):  # no such host, which torch explains; or the program has a store there, which torch finds
        if ipaddress.ip_address(address := socket.gethostbyname(host)).is_loopback:
            fd = socket.create_server((address, int(port))).detach()
            return TCPStore(host, int(port), world.size, True, timeout, multi_tenant=True, master_listen_fd=fd)
    return None


def end_with_launcher(world: World) -> None:
    """Have this process end when torchrun does: a torchrun that was killed cannot stop its ranks. Idempotent.

    First as SIGTERM ends it, and for certain a few seconds later. Other launchers end their processes themselves.
    """
    if not world.is_launched or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent and not _is_orphan(parent):
            time.sleep(_LOOK_SECONDS)
        os.write(2, f"rank {world.rank} ends: its launcher is gone\n".encode())
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_FAREWELL_SECONDS)
        os._exit(1)

    if not any(thread.name == _LAUNCHER_WATCH for thread in threading.enumerate()):
        Thread(target=watch, daemon=True, name=_LAUNCHER_WATCH).start()


def tell_launcher(error: str) -> None:
    """What the report of torchrun shall end with, in the format of torch.distributed.elastic.multiprocessing.errors."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        message = {"message": error, "extraInfo": {"py_callstack": error, "timestamp": str(int(time.time()))}}
        with suppress(OSError):
            Path(path).write_text(json.dumps({"message": message}), encoding="utf-8")


def _is_orphan(parent: int) -> bool:
    """Whether torchrun, a Python program, was gone before anyone looked. In a container it may be process 1 itself."""
    try:
        return parent == 1 and "python" not in os.readlink("/proc/1/exe")
    except OSError:
        return True  # of another user


def launcher_store(world: World, timeout_seconds: float) -> Store:
    """The launcher's store (rank 0 hosts it where the launcher has none), apart for each restart of the workers.

    After a few seconds of waiting a warning says for whom. Ctrl-C ends the wait.

    Raises:
        DistError: nobody came within the timeout.
    """
    found: Queue[Store | Exception] = Queue()

    def connect() -> None:
        try:
            timeout = timedelta(seconds=timeout_seconds)
            found.put(_host_on_loopback(world, timeout) or next(iter(rendezvous("env://", timeout=timeout)))[0])
        except Exception as error:
            found.put(error)

    # In a thread of its own: the call waits inside torch, where neither Ctrl-C nor the warning would reach it.
    Thread(target=connect, daemon=True, name="megatron_infer-rendezvous").start()
    try:
        store = found.get(timeout=_PATIENCE_SECONDS)
    except Empty:
        awaited = "rank 0" if world.rank else f"ranks 1 to {world.size - 1}"
        log.warning(
            "rank %d of %d waits at %s for %s. Where no launcher started this process, unset RANK and WORLD_SIZE to "
            "run alone.", world.rank, world.size, world.address, awaited,
        )  # fmt: skip
        store = found.get()
    if isinstance(store, Exception):
        raise store
    return PrefixStore(f"attempt-{world.attempt}", store)
