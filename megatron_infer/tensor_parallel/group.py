"""TPGroup: the ranks that hold one model together, and the collectives between them.

Owns the choice of backend (shared memory, gloo, NCCL) and what a failed group does. Knows nothing of layers or steps,
and leaves torch.distributed's default process group to the user.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch._C._distributed_c10d import Store
from torch.distributed import is_gloo_available, is_nccl_available

from megatron_infer.kernels.cpu.collectives import LIBRARY_PATH
from megatron_infer.tensor_parallel.backend import Backend, Ints
from megatron_infer.tensor_parallel.process_groups import GlooBackend, NcclBackend
from megatron_infer.tensor_parallel.rendezvous import Patience, RankFailure, Rendezvous, first
from megatron_infer.tensor_parallel.shared_memory import SharedMemoryBackend
from megatron_infer.tensor_parallel.symmetric_memory import SymmetricMemory, gpu_uuid
from megatron_infer.world import World, launcher_store

__all__ = ["RankFailure", "TPGroup"]

BackendName = Literal["auto", "shared memory", "gloo"]
DEFAULT_TIMEOUT_SECONDS = 600.0


class TPGroup:
    """One rank's membership in a group of tensor-parallel ranks.

    All ranks must make the same calls in the same order, from one thread each. Once a rank has failed, died or called
    abort(), every call on every rank raises the same RankFailure; make a new group to go on.

    Attributes:
        rank, size: position in the group. device: where the tensors live.
        backend: "single", "shared memory", "gloo" or "nccl". why: why it was chosen, and of "nccl" whether the launch
            behind add_all_reduce is there.
    """

    def __init__(self, rank: int, size: int, device: torch.device, backend: Backend | None, why: str) -> None:
        """For the constructors below."""
        self.rank, self.size, self.device = rank, size, device
        self.backend, self.why = backend.name if backend else "single", why
        self._backend = backend
        # Kept alive: where no launcher does, rank 0 hosts it, also for the next group and for the user's own use.
        self._store: Store | None = None
        self._patience = Patience(DEFAULT_TIMEOUT_SECONDS)
        self._failure: RankFailure | None = None
        self._is_closed = False
        self._pid = os.getpid()

    @classmethod
    def single(cls, device: torch.device) -> TPGroup:
        """A group of one rank: every collective returns its argument."""
        return cls(0, 1, device, None, "one rank")

    @classmethod
    def in_world(
        cls, world: World, device: torch.device, size: int | None = None, *, name: str = "default",
        deterministic: bool = False, backend: BackendName = "auto", timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
    ) -> TPGroup:  # fmt: skip
        """The group of this process among those that a launcher started; a single rank where none did.

        Args:
            device: of this rank.
            size: ranks per group; None for all. With fewer than all, consecutive ranks form groups (data parallelism).
            name, deterministic, backend, timeout_seconds: see connect().

        Raises:
            ValueError: the number of processes does not fit `size`.
            RankFailure: a rank did not come.
        """
        size = world.size if size is None else size
        if not world.is_launched and size != 1:
            raise ValueError(f"{size} ranks asked for, but torchrun has not started this process: use torchrun")
        if size < 1 or world.size % size:
            raise ValueError(
                f"{world.size} processes cannot form groups of {size} ranks: start a multiple of {size} with "
                f"`torchrun --nproc_per_node`, or choose a size that divides {world.size}"
            )
        if size == 1:
            return cls.single(device)
        index, rank = divmod(world.rank, size)
        return cls.connect(
            launcher_store(world, timeout_seconds), rank, size, device, f"{name}/replica-{index}",
            deterministic=deterministic, backend=backend, timeout_seconds=timeout_seconds,
        )  # fmt: skip

    @classmethod
    def connect(
        cls, store: Store, rank: int, size: int, device: torch.device, name: str = "default", *,
        deterministic: bool = False, backend: BackendName = "auto", timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
        is_alive: Callable[[int], bool] = lambda rank: True, library_path: Path = LIBRARY_PATH,
    ) -> TPGroup:  # fmt: skip
        """Meet the other ranks at any c10d store; returns when all are there.

        Args:
            name: keeps groups apart that share a store; ranks that belong together pass the same one.
            deterministic: NCCL sums in tree order as well (slower). The CPU backends always do.
            backend: a CPU backend to insist on. Ranks that cannot use NCCL, because they share a GPU or it is missing,
                take gloo in any case.
            timeout_seconds: how long to wait for a rank that is alive, in joining and in every collective except for
                followers in broadcast_ints (they may idle for ever); set_patience() changes the latter.
            is_alive: whether a rank's process still runs, where the caller knows; asked while waiting for it to join.
            library_path: the native library with the shared memory collectives.

        Raises:
            ValueError: no backend for this device, or `backend` cannot be used.
            RankFailure: a rank did not come.
        """
        if not 0 <= rank < size:
            raise ValueError(f"rank {rank} is not in 0..{size - 1}")
        if size == 1:
            return cls.single(device)
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"tensor parallelism works on cpu and cuda devices, not on {device.type!r}")
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError("torch finds no usable GPU: install a CUDA build of it, or use device='cpu'")
        meeting = Rendezvous(store, rank, size, name, timeout_seconds, is_alive)
        refusal = _nccl_refusal(meeting, device) if device.type == "cuda" else ""
        chosen: Backend
        chosen, why = _connect_cpu(meeting, "gloo" if refusal else backend, library_path)
        if refusal:
            why = f"{refusal}; tensors are staged through the host"
        elif device.type == "cuda":
            chosen, why = _connect_cuda(meeting, device, chosen, why, deterministic)
        meeting.finish()
        group = cls(rank, size, device, chosen, why)
        group._store, group._patience = store, meeting.patience
        return group

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of every rank's `x` (same shape), added in fp32 in one binary tree: ((r0+r1)+(r2+r3))+...

        In place or new: use the return value. NCCL without `deterministic` adds in an order of its own, except where
        symmetric memory takes the sum.
        """
        if self._backend is None:
            return x
        summed: Tensor = self._call("all_reduce", x)
        return summed

    def add_all_reduce(self, x_TN: Tensor, residual_TN: Tensor) -> bool:
        """Add the sum of every rank's `x_TN` to `residual_TN` (same shape; the same on every rank), in one launch.

        Summed as by all_reduce, but not rounded to the dtype of `x_TN` in between. False, the same on every rank: this
        group has no such launch for this size, and nothing has happened.
        """
        if self._backend is None or not self._backend.adds_all_reduce:
            return False
        return bool(self._call("add_all_reduce", x_TN, residual_TN))

    def all_gather(self, x_SN: Tensor) -> Tensor:
        """Every rank's `x_SN` (same shape) concatenated along the last dimension, in rank order."""
        if self._backend is None:
            return x_SN
        gathered: Tensor = self._call("all_gather", x_SN)
        return gathered

    def gather_number(self, own: int) -> list[int]:
        """Every rank's number (64 bits), in rank order. Waits for all ranks."""
        numbers_1R = self.all_gather(torch.tensor([[own]], dtype=torch.int64, device=self.device))
        return [int(number) for number in numbers_1R[0].tolist()]

    def gather_text(self, own: str) -> list[str]:
        """Every rank's text, in rank order. Waits for all ranks."""
        data = own.encode()
        longest = max(self.gather_number(len(data)))
        padded_1C = torch.tensor([list(data.ljust(longest, b"\0"))], dtype=torch.uint8, device=self.device)
        rows = self.all_gather(padded_1C)[0].reshape(self.size, longest).tolist()
        return [bytes(row).rstrip(b"\0").decode() for row in rows]

    def broadcast_ints(self, ints: Ints | None) -> Ints:
        """Rank 0 passes a 1-D int64 array of any length, the others None; every rank returns rank 0's array.

        Rank 0 need not wait for the others. An idle follower waits here without using the CPU.
        """
        if (ints is None) != (self.rank != 0):
            raise ValueError("broadcast_ints: rank 0 passes the array, every other rank passes None")
        if ints is not None:
            if ints.ndim != 1 or ints.dtype != np.int64:
                raise ValueError(f"broadcast_ints takes a 1-D int64 array, not {ints.ndim}-D {ints.dtype}")
            ints = np.ascontiguousarray(ints)
        if self._backend is None:
            assert ints is not None
            return ints
        received: Ints = self._call("broadcast_ints", ints)
        return received

    @property
    def is_recordable(self) -> bool:
        """Whether the collectives on tensors may be part of a CUDA graph."""
        return self._backend is None or self._backend.is_recordable

    def set_patience(self, limit_seconds: float) -> None:
        """From now on, how late a rank that is alive may be in a collective. A warning comes after 5 s."""
        self._patience.limit_seconds, self._patience.warn_seconds = limit_seconds, min(5.0, limit_seconds / 2)

    def waiting(self) -> AbstractContextManager[None]:
        """Around a wait for the device, which would be endless where it waits for a rank that hangs (RankFailure)."""
        return nullcontext() if self._backend is None else self._backend.waiting()

    def check(self) -> None:
        """Raise RankFailure if the group has failed: what kernels that waited for other ranks left is void then."""
        if self._backend is not None:
            self._call("check")

    def wrap(self, wrapper: Callable[[Backend], Backend]) -> None:
        """Have the collectives go through `wrapper`, which may watch them; with one rank there are none."""
        if self._backend is not None:
            self._backend = wrapper(self._backend)

    @contextmanager
    def reporting_failure(self) -> Iterator[None]:
        """What is raised within is told to the peers before it is raised on."""
        try:
            yield
        except RankFailure:
            raise
        except BaseException as error:
            self.abort(f"{type(error).__name__}: {error}")
            raise

    def abort(self, message: str) -> None:
        """Tell the peers that this rank fails, and why; they raise RankFailure. The first failure of a group stands."""
        is_member = self._pid == os.getpid()  # a forked child is not
        if self._backend is not None and self._failure is None and not self._is_closed and is_member:
            self._failure = self._backend.abort(message)

    def close(self) -> None:
        """Leave the group. Idempotent, and waits for nobody; a peer that still expects this rank raises RankFailure."""
        # A forked child holds a copy of this object, but the membership is its parent's.
        if self._is_closed or os.getpid() != self._pid:
            return
        self._is_closed = True
        if self._backend is not None:
            self._backend.close()

    def _ready(self) -> Backend:
        if self._failure is not None:
            raise self._failure.with_traceback(None)
        if self._is_closed:
            raise ValueError("the tensor-parallel group is closed; make a new one")
        if self._pid != os.getpid():
            raise ValueError("this process was forked from the one that made the group; make a new one here")
        assert self._backend is not None
        return self._backend

    def _call(self, name: str, *arguments: Any) -> Any:
        try:
            return getattr(self._ready(), name)(*arguments)
        except RankFailure as failure:
            self._failure = failure
            raise
        except Exception:
            raise
        except BaseException as error:
            # Ctrl-C or an exit in the middle of a collective: this rank no longer knows where its peers are.
            self.abort(f"{type(error).__name__} in {name}")
            raise


def _nccl_refusal(meeting: Rendezvous, device: torch.device) -> str:
    """Why these ranks cannot use NCCL, or nothing: the same on every rank."""
    lacks = "" if is_nccl_available() else f"the PyTorch of rank {meeting.rank} was built without NCCL"
    told = [line.split("\n") for line in meeting.exchange("gpu", f"{gpu_uuid(device)}\n{lacks}")]
    if reason := first(reason for _, reason in told):
        return reason
    return "ranks share a GPU, which NCCL refuses" if len({gpu for gpu, _ in told}) < meeting.size else ""


def _connect_cuda(
    meeting: Rendezvous, device: torch.device, channel: SharedMemoryBackend | GlooBackend, why: str, deterministic: bool
) -> tuple[NcclBackend, str]:
    found = SymmetricMemory.connect(meeting, device)
    if isinstance(found, SymmetricMemory):
        symmetric, launch = found, "small all-reduces are one launch over symmetric memory"
    else:
        symmetric, launch = None, f"no symmetric memory: {found}"
    backend = NcclBackend(meeting, device, channel, deterministic, symmetric)
    return backend, f"CUDA devices; {launch}; integers travel over {channel.name} ({why})"


def _connect_cpu(
    meeting: Rendezvous, wanted: BackendName, library_path: Path
) -> tuple[SharedMemoryBackend | GlooBackend, str]:
    reason = "asked for"
    if wanted != "gloo":
        shared = SharedMemoryBackend.connect(meeting, library_path)
        if isinstance(shared, SharedMemoryBackend):
            return shared, "all ranks are processes of one host"
        reason = f"no shared memory: {shared}"
    if wanted == "shared memory":
        raise ValueError(f"the shared memory backend cannot be used: {reason}")
    if not is_gloo_available():
        raise ValueError(f"no CPU backend is left: this PyTorch was built without gloo, and {reason}")
    return GlooBackend(meeting), reason
