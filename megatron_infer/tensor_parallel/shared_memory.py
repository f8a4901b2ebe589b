"""The CPU backend for ranks of one host: collectives over a shared memory mapping (kernels/cpu/collectives.cpp).

Owns the check that it can be used by all ranks, and how they come to share one anonymous file. Knows no other backend.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from megatron_infer.kernels.cpu.collectives import (
    LIBRARY_PATH,
    MAX_RANKS,
    PeerFailure,
    SharedMemory,
    check_file,
    create_file,
    load_library,
)
from megatron_infer.tensor_parallel.backend import Backend, Ints
from megatron_infer.tensor_parallel.rendezvous import ProcessIdentity, RankFailure, Rendezvous, Wait, first

R = TypeVar("R")
_SENT_SECONDS = 10.0
"""More than enough for what has been sent already."""


class SharedMemoryBackend(Backend):
    """Collectives of one rank over the mapping; the methods of TPGroup without its checks."""

    name = "shared memory"

    def __init__(self, memory: SharedMemory, rank: int, size: int) -> None:
        """For connect()."""
        self._memory, self._rank, self._size = memory, rank, size

    @classmethod
    def connect(cls, meeting: Rendezvous, library_path: Path = LIBRARY_PATH) -> SharedMemoryBackend | str:
        """The backend, or why it cannot be used: the same outcome on every rank."""
        host = ProcessIdentity.own().host
        library, reason = _usable_library(meeting.size, library_path)
        with socket.socket(socket.AF_UNIX) as mailbox:
            if not reason:
                mailbox.bind("")  # the kernel finds a free name, and it goes with the socket
                mailbox.listen(1)
            address = mailbox.getsockname()[1:].decode() if not reason else ""
            told = [text.split("\n") for text in meeting.exchange("shm-able", f"{host}\n{reason}\n{address}")]
            if reason := first(f"rank {q}: {why}" for q, (_, why, _) in enumerate(told) if why):
                return reason
            if len({host for host, _, _ in told}) > 1:
                return "the ranks run on several hosts (or in several PID or network namespaces)"
            assert library is not None
            memory, error = _share_file(meeting, library, mailbox, [address for _, _, address in told])
        if reason := first(meeting.exchange("shm-attached", error)):
            if memory is not None:
                memory.close()
            return reason
        assert memory is not None
        return cls(memory, meeting.rank, meeting.size)

    def all_reduce(self, x: Tensor) -> Tensor:
        if x.dtype is torch.float32 and x.is_contiguous():
            sums = x
        else:
            sums = x.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        self._call(self._memory.all_reduce, sums.data_ptr(), sums.numel())
        return sums if x.dtype is torch.float32 else sums.to(x.dtype)

    def all_gather(self, x_SN: Tensor) -> Tensor:
        local = x_SN.contiguous()
        columns = local.shape[-1]
        out = local.new_empty((*local.shape[:-1], self._size * columns))
        if local.numel():
            rows, row_bytes = local.numel() // columns, columns * local.element_size()
            self._call(self._memory.all_gather, local.data_ptr(), out.data_ptr(), rows, row_bytes)
        return out

    def broadcast_ints(self, ints: Ints | None) -> Ints:
        if ints is None:
            return self._call(self._memory.receive)
        self._call(self._memory.send, ints)
        return ints

    def poll(self) -> None:
        self._call(self._memory.poll)

    def abort(self, message: str) -> RankFailure:
        self._memory.fail(self._rank, message)
        failure = self._memory.failure()
        return RankFailure(failure.rank, failure.cause)

    def close(self) -> None:
        self._memory.close()

    @staticmethod
    def _call(operation: Callable[..., R], *arguments: Any) -> R:
        """Do it; the mapping's PeerFailure becomes the RankFailure of the group."""
        try:
            return operation(*arguments)
        except PeerFailure as failure:
            raise RankFailure(failure.rank, failure.cause) from None


def _usable_library(size: int, path: Path) -> tuple[ctypes.CDLL | None, str]:
    if sys.platform != "linux":
        return None, f"shared memory collectives need Linux, this is {sys.platform}"
    if size > MAX_RANKS:
        return None, f"shared memory collectives serve at most {MAX_RANKS} ranks"
    try:
        return load_library(path), ""
    except OSError as error:
        return None, str(error)


def _share_file(
    meeting: Rendezvous, library: ctypes.CDLL, mailbox: socket.socket, addresses: Sequence[str]
) -> tuple[SharedMemory | None, str]:
    """Rank 0 makes an anonymous file and hands its descriptor to the others: nobody opens what the store names."""
    fd = -1
    try:
        if meeting.rank == 0:
            fd = create_file(library, meeting.size)
            for address in addresses[1:]:
                _send(fd, address)
            meeting.tell("shm-file", "sent")
        elif meeting.ask("shm-file"):
            fd = _received(mailbox)
            check_file(library, fd, meeting.size)
        else:
            return None, ""  # rank 0 reports why
        number = ProcessIdentity.own().number
        return SharedMemory(library, fd, meeting.rank, meeting.size, number, partial(_waiting, meeting)), ""
    except BaseException as error:
        if fd >= 0:
            os.close(fd)
        if meeting.rank == 0:
            meeting.tell("shm-file", "")
        if not isinstance(error, OSError):
            raise
        return None, f"rank {meeting.rank} cannot share memory: {error}"


@contextmanager
def _waiting(meeting: Rendezvous, name: str) -> Iterator[Callable[[int], str]]:
    with Wait(meeting.rank, f"reach {name}", meeting.patience) as wait:
        yield wait.over


def _send(fd: int, address: str) -> None:
    """Hand a descriptor to the process of this user that listens there (OSError)."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(b"\0" + address.encode())
        _check_user(connection)
        socket.send_fds(connection, [b"."], [fd])


def _received(mailbox: socket.socket) -> int:
    """The descriptor that rank 0 has sent. Raises OSError: another user's process has sent it, or nobody."""
    mailbox.settimeout(_SENT_SECONDS)
    with mailbox.accept()[0] as connection:
        _check_user(connection)
        connection.settimeout(_SENT_SECONDS)
        _, descriptors, _, _ = socket.recv_fds(connection, 1, 1)
        if not descriptors:
            raise OSError("no descriptor came")
        os.set_inheritable(descriptors[0], False)
        return descriptors[0]


def _check_user(connection: socket.socket) -> None:
    _, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    if uid != os.geteuid():
        raise OSError(f"the other end belongs to user {uid}, not to {os.geteuid()}")
