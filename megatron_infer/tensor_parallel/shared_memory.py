"""The CPU backend for ranks of one host: collectives over a shared memory mapping (kernels/cpu/collectives.cpp).

Owns the check that it can be used by all ranks, and how they come to share one anonymous file. Knows no other backend.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from megatron_infer.kernels.cpu.collectives import (
    LIBRARY_PATH,
    MAX_RANKS,
    PeerFailure,
    SharedMemory,
    create_file,
    load_library,
)
from megatron_infer.tensor_parallel.backend import Backend, Ints
from megatron_infer.tensor_parallel.rendezvous import ProcessIdentity, RankFailure, Rendezvous, first

R = TypeVar("R")


class SharedMemoryBackend(Backend):
    """Collectives of one rank over the mapping; the methods of TPGroup without its checks."""

    name = "shared memory"

    def __init__(self, memory: SharedMemory, rank: int, size: int) -> None:
        self._memory, self._rank, self._size = memory, rank, size

    @classmethod
    def connect(cls, meeting: Rendezvous, library_path: Path = LIBRARY_PATH) -> SharedMemoryBackend | str:
        """The backend, or why it cannot be used: the same outcome on every rank."""
        identity = ProcessIdentity.own()
        library, reason = _usable_library(meeting.size, library_path)
        told = [text.split("\n") for text in meeting.exchange("shm-able", f"{identity.host}\n{reason}")]
        if reason := first(f"rank {q}: {why}" for q, (_, why) in enumerate(told) if why):
            return reason
        if len({host for host, _ in told}) > 1:
            return "the ranks run on several hosts (or in several PID namespaces)"
        assert library is not None
        memory, error = _share_file(meeting, library, identity)
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
    meeting: Rendezvous, library: ctypes.CDLL, identity: ProcessIdentity
) -> tuple[SharedMemory | None, str]:
    """Rank 0 creates an anonymous file; the others open it through rank 0's /proc entry, so it never has a name."""
    try:
        if meeting.rank == 0:
            try:
                fd = create_file(library, meeting.size)
            except OSError as error:
                meeting.tell("shm-file", "")
                return None, f"rank 0 cannot reserve shared memory: {error}"
            meeting.tell("shm-file", f"{identity.pid} {fd}")
        else:
            where = meeting.ask("shm-file")
            if not where:
                return None, ""  # rank 0 reports why
            pid, rank0_fd = where.split()
            fd = os.open(f"/proc/{pid}/fd/{rank0_fd}", os.O_RDWR | os.O_CLOEXEC)
        memory = SharedMemory(library, fd, meeting.rank, meeting.size, identity.number, meeting.timeout_seconds)
    except OSError as error:
        return None, f"rank {meeting.rank} cannot open the shared memory of rank 0: {error}"
    return memory, ""
