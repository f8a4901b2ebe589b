"""The backends over torch's process groups: gloo (CPU, several hosts) and NCCL (CUDA).

Owns process group objects of its own on the group's store: torch.distributed stays free for the user's program.
Sums are in tree order from an all_gather: the order inside these libraries depends on message size and topology.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch._C._distributed_c10d as c10d
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore

from megatron_infer.tensor_parallel.backend import Backend, Ints
from megatron_infer.tensor_parallel.rendezvous import (
    UNKNOWN_RANK,
    ProcessIdentity,
    RankFailure,
    Rendezvous,
    Wait,
    first_line,
    listening_addresses,
)
from megatron_infer.tensor_parallel.symmetric_memory import SymmetricMemory

Result = TypeVar("Result")
_TICK = timedelta(seconds=0.25)
_DIAGNOSIS_SECONDS = 3.0
_ABORT_SECONDS = 5.0
_CONNECT_SECONDS = 5.0
"""For one attempt of gloo's, which makes four."""
_UNLIMITED = timedelta(days=365)
# Bounds the staging memory of an all_reduce to (ranks + 1) x 4 MiB.
_CHUNK_ELEMENTS = 1 << 20
_HEADER_INTS = 512


def tree_sum(parts: list[Tensor]) -> Tensor:
    """((r0+r1)+(r2+r3))+...: neighbours are paired, an odd last one is carried up."""
    while len(parts) > 1:
        paired = [a + b for a, b in zip(parts[::2], parts[1::2], strict=False)]
        parts = paired + parts[2 * len(paired) :]
    return parts[0]


class GlooBackend(Backend):
    """Collectives over TCP. A lost connection becomes a RankFailure that names the rank where that can be known.

    Tensors may live on a GPU: they are staged through the host, which no CUDA graph can hold.
    """

    name = "gloo"

    def __init__(self, meeting: Rendezvous) -> None:
        self._rank, self._size, self._store = meeting.rank, meeting.size, meeting.store
        self._patience = meeting.patience
        self._num_calls = 0
        self._own = ProcessIdentity.own()
        self._peers = [ProcessIdentity.parse(text) for text in meeting.exchange("identity", str(self._own))]
        options = c10d.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        # All ranks are here by now, and only have to connect.
        options._timeout = timedelta(seconds=min(_CONNECT_SECONDS, meeting.patience.limit_seconds))
        addresses = listening_addresses(meeting, {peer.host for peer in self._peers})
        make = c10d.ProcessGroupGloo
        try:
            options._devices = [make.create_device(hostname=address) for address in addresses[self._rank].split(" ")]
            self._group: Any = make(PrefixStore("gloo", meeting.store.store), meeting.rank, meeting.size, options)
        except RuntimeError as error:
            raise self._record(
                UNKNOWN_RANK,
                f"ranks 0 to {self._size - 1} cannot connect at {', '.join(addresses)}; open the firewall between "
                "them, or set GLOO_SOCKET_IFNAME on each host to the interface that leads to the others "
                f"({first_line(error)})",
            ) from None

    def all_reduce(self, x: Tensor) -> Tensor:
        # gloo refuses inference tensors (github.com/pytorch/pytorch/issues/86830), hence ordinary staging tensors.
        with torch.inference_mode(False), torch.no_grad():
            sums = torch.empty(x.shape, dtype=torch.float32, device="cpu")
            sums.copy_(x)
            for piece in torch.split(sums.view(-1), _CHUNK_ELEMENTS):
                piece.copy_(tree_sum(self._gather(piece, "all_reduce")))
            return sums.to(x.device, x.dtype)

    def all_gather(self, x_SN: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            local = torch.empty(x_SN.shape, dtype=x_SN.dtype, device="cpu")
            local.copy_(x_SN)
            parts = self._gather(local.view(-1), "all_gather") if local.numel() else [local] * self._size
            return torch.cat([part.view(x_SN.shape) for part in parts], dim=-1).to(x_SN.device)

    def broadcast_ints(self, ints: Ints | None) -> Ints:
        header = np.zeros(_HEADER_INTS, dtype=np.int64)
        if ints is not None:
            header[0] = len(ints)
            header[1 : 1 + len(ints)] = ints[: _HEADER_INTS - 1]
        self._broadcast(header)
        length, at_once = int(header[0]), _HEADER_INTS - 1
        if length <= at_once:
            return header[1 : 1 + length].copy() if ints is None else ints
        rest = np.empty(length - at_once, dtype=np.int64) if ints is None else ints[at_once:].copy()
        self._broadcast(rest)
        return np.concatenate([header[1:], rest]) if ints is None else ints

    def poll(self) -> None:
        try:
            failure = self._store.get("failure") if self._store.check("failure") else None
        except RuntimeError as error:
            self._raise_for_dead_peers()
            raise RankFailure(UNKNOWN_RANK, f"the store that the ranks met at is gone ({first_line(error)})") from None
        if failure is not None:
            raise RankFailure(*json.loads(failure))
        self._raise_for_dead_peers()

    def abort(self, message: str) -> RankFailure:
        return self._record(self._rank, message)

    def close(self) -> None:
        with contextlib.suppress(RuntimeError):  # where the store went first nobody is left to tell
            self._store.set(f"closed/{self._rank}", "1")
        self._group = None

    def _gather(self, flat: Tensor, name: str) -> list[Tensor]:
        parts = [torch.empty_like(flat) for _ in range(self._size)]
        options = c10d.AllgatherOptions()
        # _finish() gives up first, with the cause; gloo's own timeout looks like a broken connection.
        options.timeout = _UNLIMITED
        # As bytes: gloo has no kernels for some types.
        work = self._start("allgather", [[part.view(torch.uint8) for part in parts]], [flat.view(torch.uint8)], options)
        self._finish(work, name, limited=True)
        return parts

    def _broadcast(self, ints: Ints) -> None:
        options = c10d.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        # gloo tears its connections down at a timeout, and a follower may idle for hours.
        options.timeout = _UNLIMITED
        with torch.inference_mode(False):
            work = self._start("broadcast", [torch.from_numpy(ints)], options)
        self._finish(work, "broadcast_ints", limited=self._rank == 0)

    def _start(self, operation: str, *arguments: Any) -> Any:
        try:
            return getattr(self._group, operation)(*arguments)
        except RuntimeError as error:
            raise self._diagnose(error) from None

    def _finish(self, work: Any, name: str, *, limited: bool) -> None:
        try:
            self._wait(work, name, limited)
        except BaseException:
            if not work.is_completed():
                # Its destructor would wait for this collective, which may never end: not even at exit may it run.
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._group))
            raise

    def _wait(self, work: Any, name: str, limited: bool) -> None:
        self._num_calls += 1
        with Wait(self._rank, f"reach {name}", self._patience) as wait:
            while True:
                try:
                    work.wait(_TICK)
                    return
                except RuntimeError:
                    if work.is_completed():
                        break
                self.poll()
                if limited and (cause := wait.over(late := self._late_rank())):
                    raise self._record(late, cause)
        try:
            work.wait()
        except RuntimeError as error:
            raise self._diagnose(error) from None

    def _late_rank(self) -> int:
        """The first that has not said that it waits in this very call."""
        calls = f"waits/{self._num_calls}"
        with contextlib.suppress(RuntimeError):  # the store went; poll() says so
            self._store.set(f"{calls}/{self._rank}", "")
            return next((q for q in range(self._size) if not self._store.check(f"{calls}/{q}")), UNKNOWN_RANK)
        return UNKNOWN_RANK

    def _diagnose(self, error: RuntimeError) -> RankFailure:
        """Who is behind a broken connection. It also breaks where a healthy peer left because of another rank."""
        deadline = time.monotonic() + _DIAGNOSIS_SECONDS
        while time.monotonic() < deadline:
            try:
                self.poll()
                for q in range(self._size):
                    if q != self._rank and self._store.check(f"closed/{q}"):
                        return self._record(q, "it closed the group")
            except RankFailure as failure:
                return failure
            except RuntimeError:
                break
            time.sleep(0.05)
        return self._record(UNKNOWN_RANK, f"a connection between the ranks broke ({first_line(error)})")

    def _raise_for_dead_peers(self) -> None:
        for q, peer in enumerate(self._peers):
            is_local_peer = q != self._rank and peer.host == self._own.host
            if is_local_peer and peer.is_dead() and not self._closed_before_death(q):
                raise self._record(q, "its process died")

    def _closed_before_death(self, q: int) -> bool:
        try:
            return self._store.check(f"closed/{q}")
        except RuntimeError:
            return False

    def _record(self, rank: int, cause: str) -> RankFailure:
        """Make it the failure of the group unless there is one already; returns the one that stands."""
        try:
            standing = self._store.compare_set("failure", "", json.dumps([rank, cause]))
            return RankFailure(*json.loads(standing))
        except RuntimeError:
            return RankFailure(rank, cause)


class NcclBackend(Backend):
    """Collectives between GPUs. Integers and failures travel over `control`, so no plan ever waits for a GPU stream.

    A kernel waiting for a dead peer would spin for ever, so a thread watches `control` and then ends every wait: it
    aborts the communicator and `symmetric`, which takes what is small enough for it.
    """

    name = "nccl"
    is_recordable = True

    def __init__(
        self, meeting: Rendezvous, device: torch.device, control: Backend, deterministic: bool,
        symmetric: SymmetricMemory | None,
    ) -> None:  # fmt: skip
        self._size, self._device, self._control = meeting.size, device, control
        self._deterministic, self._symmetric = deterministic, symmetric
        self.adds_all_reduce = symmetric is not None
        self._failure: RankFailure | None = None
        self._rank, self._patience = meeting.rank, meeting.patience
        self._wait: Wait | None = None
        options = c10d.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=meeting.patience.limit_seconds)
        options.global_ranks_in_group = list(range(meeting.size))
        store = PrefixStore("nccl", meeting.store.store)
        self._group: Any = c10d.ProcessGroupNCCL(store, meeting.rank, meeting.size, options)
        self._stop = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="megatron_infer-nccl-watch", daemon=True)
        self._watcher.start()

    def all_reduce(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        symmetric = self._symmetric
        if symmetric is not None and self._guard(lambda: symmetric.all_reduce(x)):
            return x
        if self._deterministic:
            return tree_sum([part.float() for part in self._gather(x)]).to(x.dtype)
        self._guard(lambda: self._group.allreduce([x]).wait())
        return x

    def add_all_reduce(self, x_TN: Tensor, residual_TN: Tensor) -> bool:
        symmetric = self._symmetric
        return symmetric is not None and self._guard(lambda: symmetric.add_all_reduce(x_TN, residual_TN))

    def all_gather(self, x_SN: Tensor) -> Tensor:
        return torch.cat(list(self._gather(x_SN.contiguous())), dim=-1)

    def broadcast_ints(self, ints: Ints | None) -> Ints:
        return self._control.broadcast_ints(ints)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        with Wait(self._rank, "finish a step on the GPU", self._patience) as self._wait:
            try:
                yield
                self.check()
            finally:
                self._wait = None

    def check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def poll(self) -> None:
        self._control.poll()

    def abort(self, message: str) -> RankFailure:
        failure = self._control.abort(message)
        self._stop.set()
        self._end_waits()
        return failure

    def close(self) -> None:
        if self._failure is None:
            # Before the watcher stops: a kernel may wait for a peer that is gone.
            torch.cuda.synchronize(self._device)
            if self._symmetric is not None:
                self._symmetric.close()
        self._stop.set()
        self._watcher.join()
        self._abort_nccl()
        self._control.close()

    def _gather(self, x: Tensor) -> Tensor:
        gathered = x.new_empty((self._size, *x.shape))
        self._guard(lambda: self._group._allgather_base(gathered.view(-1), x.view(-1)).wait())
        return gathered

    def _guard(self, launch: Callable[[], Result]) -> Result:
        self.check()
        try:
            return launch()
        except RuntimeError as error:
            self._control.poll()
            raise RankFailure(UNKNOWN_RANK, f"a collective on the GPU: {first_line(error)}") from error

    def _watch(self) -> None:
        while not self._stop.wait(0.5):
            try:
                self._control.poll()
                if (wait := self._wait) is not None and (cause := wait.over(UNKNOWN_RANK)):
                    raise self._control.abort(f"{cause}; another rank may hang")
            except RankFailure as failure:
                self._failure = failure
                self._end_waits()
                return

    def _end_waits(self) -> None:
        if self._symmetric is not None:
            self._symmetric.abort()
        self._abort_nccl()

    def _abort_nccl(self) -> None:
        """Not shutdown(), which waits for peers that may be gone. abort() ends the kernels at once, but then waits for
        every CUDA graph that holds a collective (commDestroySync in NCCL's init.cc): not for long, here."""
        thread = threading.Thread(target=self._group.abort, name="megatron_infer-nccl-abort", daemon=True)
        thread.start()
        thread.join(_ABORT_SECONDS)
