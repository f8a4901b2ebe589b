"""TPGroup on GPUs: who takes NCCL and who gloo, what symmetric memory takes, and what a failure ends.

Without a GPU the parts that need one are stood in for; with one, two ranks share it.
"""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed import HashStore, TCPStore

from megatron_infer.tensor_parallel import group as group_module
from megatron_infer.tensor_parallel import process_groups
from megatron_infer.tensor_parallel.group import RankFailure, TPGroup
from megatron_infer.tensor_parallel.process_groups import NcclBackend
from megatron_infer.tensor_parallel.rendezvous import BoundedStore, Patience, Rendezvous
from megatron_infer.tensor_parallel.symmetric_memory import SymmetricMemory
from tests.tensor_parallel.test_group import Rank, Ranks, parts_of, same_bits, tree

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="module")
def store() -> TCPStore:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))


def join_on_gpus(me: Rank, gpus: list[str], has_nccl: list[bool]) -> tuple[str, str, list[float]]:
    """With the GPUs that the ranks would have; the tensors stay on the CPU."""
    torch.cuda.is_available = lambda: True
    group_module.gpu_uuid = lambda device: gpus[me.rank]
    group_module.is_nccl_available = lambda: has_nccl[me.rank]
    group = TPGroup.connect(me.store, me.rank, me.size, torch.device("cuda", 0), "gpus", timeout_seconds=40)
    return group.backend, group.why, group.all_reduce(torch.full((2,), me.rank + 1.0)).tolist()


@pytest.mark.parametrize(
    ("gpus", "has_nccl", "why"),
    [
        (
            ["GPU-a", "GPU-a"],
            [True, True],
            "ranks share a GPU, which NCCL refuses; tensors are staged through the host",
        ),
        (["GPU-a", "GPU-b"], [True, False], "the PyTorch of rank 1 was built without NCCL; tensors are staged"),
    ],
)
def test_ranks_that_nccl_refuses_take_gloo(store: TCPStore, gpus: list[str], has_nccl: list[bool], why: str) -> None:
    for backend, reason, total in Ranks(store, join_on_gpus, 2, gpus, has_nccl).results():
        assert backend == "gloo"
        assert reason.startswith(why)
        assert total == [3.0, 3.0]


class Recorder:
    """Stands in for a part of NcclBackend that needs GPUs; remembers what was called."""

    def __init__(self, *_: Any) -> None:
        self.calls: list[str] = []
        self.failure: RankFailure | None = None

    def add_all_reduce(self, x_TN: torch.Tensor, residual_TN: torch.Tensor) -> bool:
        self.calls.append("add_all_reduce")
        return x_TN.numel() < 100

    def all_reduce(self, x: torch.Tensor) -> bool:
        self.calls.append("all_reduce")
        return x.numel() < 100

    def allreduce(self, tensors: list[torch.Tensor]) -> SimpleNamespace:
        self.calls.append("allreduce")
        return SimpleNamespace(wait=lambda: None)

    def abort(self) -> None:
        self.calls.append("abort")

    def poll(self) -> None:
        if self.failure is not None:
            raise self.failure


def nccl_of(monkeypatch: pytest.MonkeyPatch, nccl: Recorder, control: Recorder, symmetric: Any) -> NcclBackend:
    make = lambda *_: nccl  # noqa: E731
    make.Options = SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setattr(process_groups.c10d, "ProcessGroupNCCL", make, raising=False)
    patience = Patience(1.0, 0.5)
    store = BoundedStore(HashStore(), 0, patience)
    meeting: Any = SimpleNamespace(rank=0, size=2, patience=patience, store=store)
    return NcclBackend(meeting, torch.device("cuda", 0), control, False, symmetric)  # type: ignore[arg-type]


def test_symmetric_memory_takes_what_fits_and_nccl_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    nccl, symmetric = Recorder(), Recorder()
    backend = nccl_of(monkeypatch, nccl, Recorder(), symmetric)
    small, large = torch.ones(2, 3), torch.ones(200, 3)
    assert backend.add_all_reduce(small, small) and not backend.add_all_reduce(large, large)
    assert backend.all_reduce(small) is small and nccl.calls == []
    assert backend.all_reduce(large) is large and nccl.calls == ["allreduce"]
    assert symmetric.calls == ["add_all_reduce"] * 2 + ["all_reduce"] * 2
    without = nccl_of(monkeypatch, nccl, Recorder(), None)
    assert not without.add_all_reduce(small, small)
    assert without.all_reduce(small) is small and nccl.calls == ["allreduce"] * 2
    backend._stop.set(), without._stop.set()


def test_a_failure_ends_the_waits_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    nccl, control, symmetric = Recorder(), Recorder(), Recorder()
    backend = nccl_of(monkeypatch, nccl, control, symmetric)
    group, x = TPGroup(0, 2, torch.device("cuda", 0), backend, ""), torch.ones(1, 2)
    assert group.add_all_reduce(x, x)
    group.check()
    control.failure = RankFailure(1, "its process died")
    backend._watcher.join(10)
    assert nccl.calls == ["abort"]
    assert symmetric.calls == ["add_all_reduce", "abort"]
    for call in (group.add_all_reduce, lambda x, _: group.all_reduce(x), lambda *_: group.check()):
        with pytest.raises(RankFailure, match="rank 1"):
            call(x, x)
    assert symmetric.calls == ["add_all_reduce", "abort"]


def test_an_abort_that_waits_for_graphs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL's does so until every CUDA graph with a collective in it is gone, and its owner may be who aborts."""
    monkeypatch.setattr(process_groups, "_ABORT_SECONDS", 0.05)
    nccl, graphs_are_gone = Recorder(), threading.Event()
    monkeypatch.setattr(nccl, "abort", graphs_are_gone.wait)
    control = Recorder()
    backend = nccl_of(monkeypatch, nccl, control, None)
    control.failure = RankFailure(1, "its process died")
    backend._watcher.join(10)
    assert not backend._watcher.is_alive()
    with pytest.raises(RankFailure, match="rank 1"):
        backend.check()
    graphs_are_gone.set()


def share_one_gpu(me: Rank) -> str:
    device = torch.device("cuda", 0)
    group = TPGroup.connect(me.store, me.rank, me.size, device, "one GPU", timeout_seconds=60)
    assert group.backend == "gloo", group.why
    parts = parts_of(7, me.size, 3, 4096)
    total = group.all_reduce(parts[me.rank].to(device))
    assert total.device == device and same_bits(total.cpu(), tree(parts))
    gathered = group.all_gather(parts[me.rank].to(device, torch.bfloat16))
    assert gathered.device == device and torch.equal(gathered.cpu(), torch.cat(parts, dim=1).bfloat16())
    group.close()
    return "ok"


@needs_gpu
def test_two_ranks_share_one_gpu(store: TCPStore) -> None:
    assert Ranks(store, share_one_gpu, 2).results(seconds=120) == ["ok"] * 2


def add_over_one_gpu(me: Rank) -> str:
    device = torch.device("cuda", 0)
    meeting = Rendezvous(me.store, me.rank, me.size, "over one GPU", 60)
    symmetric = SymmetricMemory.connect(meeting, device)
    assert isinstance(symmetric, SymmetricMemory), symmetric
    parts = [part.bfloat16() for part in parts_of(8, me.size, 2, 4096)]
    x_TD, residual_TD = parts[me.rank].to(device), torch.ones(2, 4096, device=device)
    expected = 1.0 + tree([part.float() for part in parts])
    assert symmetric.add_all_reduce(x_TD, residual_TD)
    assert same_bits(residual_TD.cpu(), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            symmetric.add_all_reduce(x_TD, residual_TD)
    for _ in range(3):
        graph.replay()
    for _ in range(9):
        expected += tree([part.float() for part in parts])
    assert same_bits(residual_TD.cpu(), expected)
    meeting.exchange("added", "")
    symmetric.close()
    return "ok"


@needs_gpu
def test_the_kernel_adds_over_one_gpu_also_from_a_graph(store: TCPStore) -> None:
    assert Ranks(store, add_over_one_gpu, 2).results(seconds=120) == ["ok"] * 2


def lose_a_signal_on_the_gpu(me: Rank) -> float:
    device = torch.device("cuda", 0)
    meeting = Rendezvous(me.store, me.rank, me.size, "lost signal", 60)
    symmetric = SymmetricMemory.connect(meeting, device)
    assert isinstance(symmetric, SymmetricMemory), symmetric
    y_TD = torch.ones(1, 4096, device=device)
    start = time.monotonic()
    if me.rank == 0:
        symmetric.add_all_reduce(torch.ones_like(y_TD), y_TD)
        threading.Timer(0.5, symmetric.abort).start()
        assert bool((y_TD == 1).all())  # waits for the kernel
    meeting.exchange("waited", "")
    return time.monotonic() - start


@needs_gpu
def test_an_abort_ends_a_wait_on_the_gpu(store: TCPStore) -> None:
    assert all(0.4 < seconds < 10 for seconds in Ranks(store, lose_a_signal_on_the_gpu, 2).results(seconds=120))
