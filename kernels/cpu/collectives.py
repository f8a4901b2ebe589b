"""Launcher of collectives.cpp: the processes of one host meet in a shared memory mapping.

Owns the ctypes signatures, the anonymous file, and the retry loop that keeps Ctrl-C working. Knows addresses and byte
counts, neither tensors nor how the ranks found each other. The contract is in collectives.cpp.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import numpy.typing as npt

LIBRARY_PATH = Path(__file__).with_name("libmegatron_infer_cpu.so")
WINDOW_BYTES = 512 * 1024
MAX_RANKS = 64
_OK, _AGAIN, _GROW = 0, 1, 3
_SMALL_INTS = 4096
# Linux's fcntl.h; named in Python's fcntl from 3.12 on only where the C library has them.
_F_ADD_SEALS, _F_GET_SEALS = 1033, 1034
_SEALS = 0x1 | 0x2 | 0x4
"""F_SEAL_SEAL, F_SEAL_SHRINK and F_SEAL_GROW: nobody changes the size, or these."""

_POINTER, _INT, _INT64 = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_SIGNATURES: dict[str, tuple[type | None, list[type]]] = {
    "mi_coll_mapping_bytes": (_INT64, [_INT, _INT64]),
    "mi_coll_attach": (_POINTER, [_INT, _INT, _INT, _INT64, _INT64]),
    "mi_coll_all_reduce": (_INT, [_POINTER, _POINTER, _INT64]),
    "mi_coll_all_gather": (_INT, [_POINTER, _POINTER, _POINTER, _INT64, _INT64]),
    "mi_coll_broadcast": (_INT, [_POINTER, _POINTER, _INT64, _POINTER]),
    "mi_coll_fail": (None, [_POINTER, _INT, ctypes.c_char_p]),
    "mi_coll_failure": (_INT, [_POINTER, ctypes.c_char_p, _INT64]),
    "mi_coll_poll": (_INT, [_POINTER]),
    "mi_coll_late_rank": (_INT, [_POINTER]),
    "mi_coll_close": (None, [_POINTER]),
}


class PeerFailure(RuntimeError):
    """A rank died, left, was late or reported a failure: (rank, cause)."""

    def __init__(self, rank: int, cause: str) -> None:
        super().__init__(rank, cause)
        self.rank = rank
        self.cause = cause


def load_library(path: Path = LIBRARY_PATH) -> ctypes.CDLL:
    """The native library with the signatures above.

    Raises:
        OSError: there is none, or it was built without these functions; the text says which.
    """
    if not path.exists():
        raise OSError(f"the native library {path.name} is not built")
    library = ctypes.CDLL(str(path), use_errno=True)
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name, None)
        if function is None:
            raise OSError(f"the native library {path.name} has no {name}: it needs Linux, or a rebuild")
        function.restype, function.argtypes = result, arguments
    return library


def create_file(library: ctypes.CDLL, size: int) -> int:
    """File descriptor of a zero-filled anonymous file for `size` ranks. Having no name, it cannot be left behind."""
    fd = os.memfd_create("megatron_infer", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        # Reserves the pages now: a host without memory fails here, not with a bus error in the middle of a step.
        os.posix_fallocate(fd, 0, library.mi_coll_mapping_bytes(size, WINDOW_BYTES))
        fcntl.fcntl(fd, _F_ADD_SEALS, _SEALS)
    except OSError:
        os.close(fd)
        raise
    return fd


def check_file(library: ctypes.CDLL, fd: int, size: int) -> None:
    """Refuse a descriptor that create_file() cannot have made for `size` ranks (OSError). Writes nothing."""
    try:
        # A file of the disk has no seals, and one that is sealed cannot shrink below a mapping.
        is_ours = fcntl.fcntl(fd, _F_GET_SEALS) == _SEALS
    except OSError:
        is_ours = False
    if not is_ours or os.fstat(fd).st_size != library.mi_coll_mapping_bytes(size, WINDOW_BYTES):
        raise OSError("what was handed over is not the group's shared memory")


class SharedMemory:
    """One rank's end of the mapping. Not thread-safe, except poll() and fail().

    Owns `fd` once it stands. `identity` tells processes apart (the same for threads of one process). `waiting` is
    entered with the name of an operation that waits; what it yields says why a late rank is given up, or nothing.
    Methods raise PeerFailure when the group has failed; rank and cause are the same on every rank.
    """

    def __init__(
        self, library: ctypes.CDLL, fd: int, rank: int, size: int, identity: int,
        waiting: Callable[[str], AbstractContextManager[Callable[[int], str]]],
    ) -> None:  # fmt: skip
        self._library = library
        self._waiting = waiting
        self._is_root = rank == 0
        self._context = library.mi_coll_attach(fd, rank, size, WINDOW_BYTES, identity)
        if not self._context:
            raise OSError(ctypes.get_errno(), f"cannot map shared memory: {os.strerror(ctypes.get_errno())}")
        self._small = np.empty(_SMALL_INTS, dtype=np.int64)
        self._length = ctypes.c_int64()
        self._length_address = ctypes.addressof(self._length)

    def all_reduce(self, address: int, count: int) -> None:
        """Sum `count` fp32 at `address` over the ranks in tree order, in place."""
        if self._library.mi_coll_all_reduce(self._context, address, count) != _OK:
            self._retry("all_reduce", self._library.mi_coll_all_reduce, address, count)

    def all_gather(self, address: int, out_address: int, rows: int, row_bytes: int) -> None:
        """out[row, q] = row `row` of rank q."""
        if self._library.mi_coll_all_gather(self._context, address, out_address, rows, row_bytes) != _OK:
            self._retry("all_gather", self._library.mi_coll_all_gather, address, out_address, rows, row_bytes)

    def send(self, ints: npt.NDArray[np.int64]) -> None:
        """Rank 0: hand a contiguous array to the others; returns before they have read it."""
        arguments = (ints.ctypes.data, ints.size, self._length_address)
        if self._library.mi_coll_broadcast(self._context, *arguments) != _OK:
            self._retry("broadcast_ints", self._library.mi_coll_broadcast, *arguments)

    def receive(self) -> npt.NDArray[np.int64]:
        """Other ranks: the array of rank 0. Waits without limit: a follower may idle for hours."""
        room = self._small
        while True:
            arguments = (room.ctypes.data, room.size, self._length_address)
            rc = self._library.mi_coll_broadcast(self._context, *arguments)
            if rc not in (_OK, _GROW):
                rc = self._retry("broadcast_ints", self._library.mi_coll_broadcast, *arguments, limited=False)
            length = self._length.value
            if rc == _OK:
                return room if room is not self._small else room[:length].copy()
            room = np.empty(length, dtype=np.int64)

    def poll(self) -> None:
        """Raise PeerFailure if a peer failed, died or left. Never waits."""
        if self._library.mi_coll_poll(self._context) != _OK:
            raise self.failure()

    def fail(self, rank: int, cause: str) -> None:
        """Tell every rank that `rank` failed; the first report stands."""
        self._library.mi_coll_fail(self._context, rank, cause.encode())

    def failure(self) -> PeerFailure:
        """The failure that the group stopped at."""
        text = ctypes.create_string_buffer(1024)
        rank = self._library.mi_coll_failure(self._context, text, len(text))
        return PeerFailure(rank, text.value.decode(errors="replace"))

    def close(self) -> None:
        """Unmap; peers that still expect something of this rank are told that it left."""
        if self._context:
            self._library.mi_coll_close(self._context)
            self._context = None

    def _retry(self, name: str, function: Callable[..., int], *arguments: int, limited: bool = True) -> int:
        """Continue a call that did not complete at once; between the calls Python runs its signal handlers."""
        with self._waiting(name) as over:
            while (rc := function(self._context, *arguments)) == _AGAIN:
                if limited and (cause := over(late := self._library.mi_coll_late_rank(self._context))):
                    self.fail(late, cause)
            if rc not in (_OK, _GROW):
                raise self.failure()
        return rc
