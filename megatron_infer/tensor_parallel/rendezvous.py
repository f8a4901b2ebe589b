"""How ranks find each other: through a c10d Store and nothing else (no port, file or shared-memory name of our own).

Owns RankFailure, how long a rank waits for another, the exchange of small values between ranks, and what tells two
processes and hosts apart.
"""

from __future__ import annotations

import faulthandler
import ipaddress
import logging
import os
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from socket import AF_INET, AF_INET6, SOCK_DGRAM
from threading import Thread
from typing import Any

import psutil
from torch._C._distributed_c10d import PrefixStore, Store

log = logging.getLogger("megatron_infer")

UNKNOWN_RANK = -1
_STDERR_FD = 2


class RankFailure(RuntimeError):
    """A rank of the group failed; the group is of no use any more and every later call raises this again.

    `rank` is the rank that failed first, UNKNOWN_RANK (-1) where it could not be found out; `cause` says why.
    """

    def __init__(self, rank: int, cause: str) -> None:
        who = f"rank {rank}" if rank != UNKNOWN_RANK else "a rank"
        super().__init__(f"{who} of the tensor-parallel group failed: {cause}")
        self.rank = rank
        self.cause = cause


@dataclass
class Patience:
    """How long a rank that is alive is waited for. warn_seconds: so long nothing is said about it."""

    limit_seconds: float
    warn_seconds: float = 20.0


class Wait:
    """A wait for another rank; where it fails after its warning, the stacks of this process go to stderr.

    Time counts as it passes here: none goes by while this process is itself stopped.
    """

    def __init__(self, rank: int, what: str, patience: Patience) -> None:
        self._rank, self._what, self._patience = rank, what, patience
        self._waited_seconds, self._seen, self._is_late = 0.0, time.monotonic(), False

    def over(self, late_rank: int) -> str:
        """Why the rank is given up, or nothing: to be asked several times a second. Warns once that it is late."""
        now = time.monotonic()
        self._waited_seconds += min(now - self._seen, 1.0)
        self._seen = now
        if self._waited_seconds > self._patience.warn_seconds and not self._is_late:
            self._is_late = True
            who = f"rank {late_rank}" if late_rank != UNKNOWN_RANK else "another rank"
            log.warning(
                "rank %d has waited %.1f s for %s to %s; it gives up after %g s",
                self._rank, self._waited_seconds, who, self._what, self._patience.limit_seconds,
            )  # fmt: skip
        limit = self._patience.limit_seconds
        return f"it did not {self._what} within {limit:g} s" if self._waited_seconds > limit else ""

    def __enter__(self) -> Wait:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._is_late and kind is not None and issubclass(kind, RuntimeError):
            with suppress(OSError):  # a daemon may have closed it
                os.write(_STDERR_FD, f"rank {self._rank}, which waited for another to {self._what}:\n".encode())
                faulthandler.dump_traceback(_STDERR_FD)


@dataclass(frozen=True)
class ProcessIdentity:
    """What the other ranks know about a process."""

    host: str
    """boot id, PID and network namespace: equal where processes see each other's /proc entries and sockets"""
    pid: int
    started: int
    """start time in clock ticks, so that a reused pid is not taken for the old process"""

    @classmethod
    def own(cls) -> ProcessIdentity:
        try:
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            host = ":".join([boot, *(str(os.stat(f"/proc/self/ns/{kind}").st_ino) for kind in ("pid", "net"))])
        except OSError:
            host = f"{os.uname().nodename}:no-proc:{os.getpid()}"
        state = _process_state(os.getpid())
        return cls(host, os.getpid(), state[1] if state else 0)

    @classmethod
    def parse(cls, text: str) -> ProcessIdentity:
        host, pid, started = text.split(" ")
        return cls(host, int(pid), int(started))

    def __str__(self) -> str:
        return f"{self.host} {self.pid} {self.started}"

    @property
    def number(self) -> int:
        """A positive integer that no other live process of the host has."""
        # A pid has at most 22 bits; not zero, which stands for a rank that has not attached.
        return (self.started << 22 | self.pid) & (2**62 - 1)

    def is_dead(self) -> bool:
        """Only meaningful for a process of the same host. A zombie is dead."""
        state = _process_state(self.pid)
        return state is None or state[0] in "ZX" or state[1] != self.started


def _process_state(pid: int) -> tuple[str, int] | None:
    try:
        # The command name may contain blanks and parentheses; the fields start after the last one.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], int(fields[19])


class BoundedStore:
    """A c10d Store that is given up when it is silent: c10d itself waits a quarter of an hour for a host that is gone.

    Every method raises RuntimeError where the store failed, or did not answer within the patience.
    """

    def __init__(self, store: Store, rank: int, patience: Patience) -> None:
        self.store, self._rank, self._patience = store, rank, patience
        self._is_silent = False

    def set(self, key: str, value: str) -> None:
        self._ask(self.store.set, key, value)

    def get(self, key: str) -> bytes:
        value: bytes = self._ask(self.store.get, key)
        return value

    def check(self, key: str) -> bool:
        """Whether the key is there."""
        return bool(self._ask(self.store.check, [key]))

    def compare_set(self, key: str, expected: str, value: str) -> bytes:
        stored: bytes = self._ask(self.store.compare_set, key, expected, value)
        return stored

    def _ask(self, method: Callable[..., Any], *arguments: Any) -> Any:
        answers: SimpleQueue[tuple[Any, Exception | None]] = SimpleQueue()

        def ask() -> None:
            try:
                answers.put((method(*arguments), None))
            except Exception as error:
                answers.put((None, error))

        with Wait(self._rank, "let the store answer", self._patience) as wait:
            if not self._is_silent:
                Thread(target=ask, name="megatron_infer-store", daemon=True).start()
            while not (self._is_silent or wait.over(UNKNOWN_RANK)):
                with suppress(Empty):
                    value, error = answers.get(timeout=0.25)
                    if error is not None:
                        raise error
                    return value
            self._is_silent = True
            raise RuntimeError("it does not answer")


class Rendezvous:
    """The keys of one group in the store."""

    def __init__(
        self, store: Store, rank: int, size: int, name: str, timeout_seconds: float,
        is_alive: Callable[[int], bool] = lambda rank: True,
    ) -> None:  # fmt: skip
        self.rank, self.size = rank, size
        self.patience, self.is_alive = Patience(timeout_seconds), is_alive
        base = f"megatron_infer/{name}/{size}-ranks"
        # A program may make groups of one name one after the other: each rank counts its own, in the same order.
        number = store.add(f"{base}/rank-{rank}", 1)
        self.store = BoundedStore(PrefixStore(f"{base}/{number}", store), rank, self.patience)

    def exchange(self, topic: str, value: str) -> list[str]:
        """What every rank passed under `topic`, in rank order.

        Raises:
            RankFailure: a rank did not come within the timeout.
        """
        self.store.set(f"{topic}/{self.rank}", value)
        return [self._await(f"{topic}/{q}", q) for q in range(self.size)]

    def tell(self, topic: str, value: str) -> None:
        """Rank 0: for ask() of the others."""
        self.store.set(topic, value)

    def ask(self, topic: str) -> str:
        """What rank 0 told."""
        return self._await(topic, 0)

    def finish(self) -> None:
        """Everything has been read. Rank 0 leaves last: where no launcher does, its process hosts the store."""
        self.store.set(f"done/{self.rank}", "")
        if self.rank == 0:
            for q in range(self.size):
                self._await(f"done/{q}", q)

    def _await(self, key: str, rank: int) -> str:
        # Polling instead of Store.get, which waits for the key and not for the rank.
        pause = 0.001
        with Wait(self.rank, f"join the group of {self.size}", self.patience) as wait:
            while not self.store.check(key):
                if not self.is_alive(rank):
                    raise RankFailure(rank, "its process ended before it joined the group; see its output above")
                if cause := wait.over(rank):
                    raise RankFailure(rank, cause)
                time.sleep(pause)
                pause = min(2 * pause, 0.05)
        return str(self.store.get(key).decode())


def listening_addresses(meeting: Rendezvous, hosts: set[str]) -> list[str]:
    """Where every rank of these hosts listens for the others, the same on every rank; one may have several, with blanks
    between. Ranks of one host have no business on the network. Raises ValueError, on every rank alike."""
    if len(hosts) == 1:
        return ["127.0.0.1"] * meeting.size
    try:
        own, refusal = " ".join(_addresses_for_other_hosts(meeting.store.store)), ""
    except ValueError as error:
        own, refusal = "", str(error)
    told = [text.split("\n") for text in meeting.exchange("addresses", f"{own}\n{refusal}")]
    if why := first(f"rank {q}: {refusal}" for q, (_, refusal) in enumerate(told) if refusal):
        meeting.finish()  # all have read it
        raise ValueError(why)
    return [addresses for addresses, _ in told]


def _addresses_for_other_hosts(store: Store) -> list[str]:
    """Where other hosts reach this one: at the interfaces that GLOO_SOCKET_IFNAME names; else at the address from which
    this host reaches the store; else where its own name leads.

    Raises:
        ValueError: no such interface, or there is only loopback.
    """
    interfaces = psutil.net_if_addrs()
    others = ", ".join(sorted(name for name in interfaces if name != "lo"))
    if names := os.environ.get("GLOO_SOCKET_IFNAME"):
        found = [
            next((a.address for a in interfaces.get(name, ()) if a.family in (AF_INET, AF_INET6)), "")
            for name in names.split(",")
        ]
        if not all(found):
            raise ValueError(f"GLOO_SOCKET_IFNAME={names}: no such interface, or it has no address; there are {others}")
        return found
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    for host in (getattr(store, "host", ""), socket.gethostname()):
        with suppress(OSError):
            family, kind, _, _, target = socket.getaddrinfo(host, 1, type=SOCK_DGRAM)[0]
            with socket.socket(family, kind) as probe:
                probe.connect(target)  # nothing is sent
                address = str(probe.getsockname()[0])
            if not ipaddress.ip_address(address).is_loopback:
                return [address]
    raise ValueError(
        f"other hosts cannot reach {socket.gethostname()}: MASTER_ADDR and its name lead to loopback there; set "
        f"GLOO_SOCKET_IFNAME to the interface that leads to the other hosts ({others}), or MASTER_ADDR to an address"
    )


def first(values: Iterable[str]) -> str:
    """The first non-empty one, else the empty string."""
    return next((value for value in values if value), "")


def first_line(error: BaseException) -> str:
    """Of the error's text, or the name of its type where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]
