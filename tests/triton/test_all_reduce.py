"""The one-launch all-reduce between real processes: interpreted on the CPU, over memory that each maps of the others.

Every rank gets the bits of the tree sum at any size and any pace, and a lost signal, memory that is not the other's, or
a rank that cannot take part ends in an answer.
"""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import multiprocessing
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import TCPStore

from tests.triton import interpreter as interpreter  # first: what follows imports triton

from megatron_infer.kernels.triton.all_reduce import BUFFER_BYTES, MAX_BYTES, MAX_PROGRAMS, Peers, all_reduce  # isort: skip
from megatron_infer.tensor_parallel import symmetric_memory  # isort: skip
from megatron_infer.tensor_parallel.process_groups import tree_sum  # isort: skip
from megatron_infer.tensor_parallel.rendezvous import Rendezvous  # isort: skip
from megatron_infer.tensor_parallel.symmetric_memory import SymmetricMemory  # isort: skip

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs memfd and /proc")

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
MAX_RANKS = 4
HANG_SECONDS = 60


class ProcessMemory:
    """What CudaMemory does, with an anonymous file that other processes open through /proc."""

    def __init__(self, device: torch.device) -> None:
        self.files: dict[int, int] = {}
        self.mappings: list[mmap.mmap] = []

    def allocate(self, num_bytes: int) -> int:
        file = os.memfd_create("test")
        os.ftruncate(file, num_bytes)
        address = self._address_of(file)
        self.files[address] = file
        return address

    def export(self, address: int) -> str:
        return f"/proc/{os.getpid()}/fd/{self.files[address]}"

    def map(self, exported: str) -> int:
        return self._address_of(os.open(exported, os.O_RDWR))

    def unmap(self, address: int) -> None:
        pass

    def _address_of(self, file: int) -> int:
        self.mappings.append(mmap.mmap(file, 0))
        return ctypes.addressof(ctypes.c_char.from_buffer(self.mappings[-1]))


class PrivateMemory(ProcessMemory):
    """Maps pages of its own instead of the other rank's."""

    def map(self, exported: str) -> int:
        return self.allocate(os.stat(exported).st_size)


class NoMemory(ProcessMemory):
    def allocate(self, num_bytes: int) -> int:
        raise OSError("cuMemAlloc_v2: CUDA_ERROR_OUT_OF_MEMORY (2)\nand a second line")


@pytest.fixture(scope="module")
def store() -> TCPStore:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))


@pytest.fixture(scope="module")
def processes() -> Iterator[ProcessPoolExecutor]:
    """As many as ranks: those of a test wait for one another, so no process can take two of them."""
    with ProcessPoolExecutor(MAX_RANKS, multiprocessing.get_context("spawn")) as pool:
        yield pool


def on_every_rank(
    processes: ProcessPoolExecutor, store: TCPStore, size: int, function: Callable[..., Any], *args: Any
) -> list[Any]:
    ranks = [processes.submit(_rank_main, function, store.port, rank, size, *args) for rank in range(size)]
    done, _ = wait(ranks, return_when=FIRST_EXCEPTION)
    for rank in done:
        rank.result()  # of a failure, before the ranks that wait for the one that failed
    return [rank.result() for rank in ranks]


def _rank_main(function: Callable[..., Any], *args: Any) -> Any:
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
    try:
        return function(*args)
    finally:
        faulthandler.cancel_dump_traceback_later()


def meet(port: int, rank: int, size: int) -> Rendezvous:
    store = TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=60))
    return Rendezvous(store, rank, size, "all-reduce", HANG_SECONDS)


def parts_of(case: int, size: int, *shape: int) -> list[torch.Tensor]:
    """What each rank contributes: numbers of mixed magnitude, so that the order of a sum shows in its bits."""
    generator = torch.Generator().manual_seed(case)
    return [torch.randn(*shape, generator=generator) * 10.0 ** (rank % 3) for rank in range(size)]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


SHAPES = [
    (1, 64, BF16, BF16),
    (3, 77, FP32, BF16),
    (16, 8192, FP32, FP32),
    (1, 1024, FP16, FP32),
    (5, 1000, BF16, FP32),
    (1, 3, FP32, FP32),
    (2, 4096, BF16, BF16),
]


def check_sums(port: int, rank: int, size: int) -> str:
    symmetric = SymmetricMemory.connect(meet(port, rank, size), CPU, ProcessMemory)
    assert isinstance(symmetric, SymmetricMemory), symmetric
    for case in range(3 * len(SHAPES)):
        tokens, dim, x_dtype, y_dtype = SHAPES[case % len(SHAPES)]
        if case >= len(SHAPES) and tokens * dim > 10000:
            continue  # once is enough of what takes a second
        if (case + rank) % 5 == 0:
            time.sleep(0.02)  # so that the others run ahead
        parts = [part.to(x_dtype) for part in parts_of(case, size, tokens, dim)]
        expected = tree_sum([part.float() for part in parts])
        if case % 3 == 2:
            x_TD = parts[rank].clone()
            assert symmetric.all_reduce(x_TD)
            assert same_bits(x_TD, expected.to(x_dtype)), f"case {case}"
        else:
            residual_TD = parts_of(-1 - case, 1, tokens, dim)[0].to(y_dtype)
            expected = (residual_TD.float() + expected).to(y_dtype)
            assert symmetric.add_all_reduce(parts[rank], residual_TD)
            assert same_bits(residual_TD, expected), f"case {case}"
    large = torch.ones(MAX_BYTES // 4 + 1)
    assert not symmetric.add_all_reduce(large, large) and bool((large == 1).all())
    symmetric.close()
    return "ok"


@pytest.mark.parametrize("size", [2, 4])
def test_every_rank_gets_the_bits_of_the_tree_sum(processes: ProcessPoolExecutor, store: TCPStore, size: int) -> None:
    assert on_every_rank(processes, store, size, check_sums) == ["ok"] * size


def test_the_order_of_the_sum_shows_in_its_bits() -> None:
    """Negative control: summed in rank order, the very inputs of the test above have other bits."""
    for case, (tokens, dim, x_dtype, _) in enumerate(SHAPES):
        if tokens * dim > 1000:
            r0, r1, r2, r3 = parts = [part.to(x_dtype).float() for part in parts_of(case, 4, tokens, dim)]
            assert not same_bits(((r0 + r1) + r2) + r3, tree_sum(parts))


def wrap_around(port: int, rank: int, size: int) -> list[float]:
    symmetric = SymmetricMemory.connect(meet(port, rank, size), CPU, ProcessMemory)
    assert isinstance(symmetric, SymmetricMemory), symmetric
    counters_2P = symmetric._peers.counters_2P
    counters_2P[0].fill_(2**31 - 3)
    y = torch.zeros(1, 8)
    for launch in range(5):
        time.sleep(0.05 * rank)  # whoever does not wait for it reads the numbers of an earlier launch
        symmetric.add_all_reduce(torch.full((1, 8), 10.0**launch * (rank + 1)), y)
    assert int(counters_2P[0, 0]) == -(2**31) + 2
    return y[0].tolist()


def test_counters_may_wrap_around(processes: ProcessPoolExecutor, store: TCPStore) -> None:
    assert on_every_rank(processes, store, 2, wrap_around) == [[33333.0] * 8] * 2


@pytest.mark.parametrize(("signal", "expected"), [(0, 0.0), (1, 7.0), (2, 7.0)])
def test_a_rank_may_be_one_epoch_ahead_but_not_behind(signal: int, expected: float) -> None:
    own, other = torch.zeros(2, BUFFER_BYTES // 4, dtype=torch.int32)
    other[MAX_BYTES // 4 :][:8] = torch.full((8,), 4.0).view(torch.int32)  # the second buffer is that of epoch 1
    own[2 * MAX_BYTES // 4 + 1] = signal
    # Aborted beforehand: a wait that does not end by itself leaves y as it was.
    counters_2P, abort_1 = torch.zeros(2, MAX_PROGRAMS, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    peers = Peers(torch.tensor([own.data_ptr(), other.data_ptr()]), counters_2P, abort_1, rank=0)
    y = torch.zeros(8)
    all_reduce(torch.full((8,), 3.0), y, peers, add=True)
    assert y.tolist() == [expected] * 8


def lose_a_signal(port: int, rank: int, size: int) -> tuple[bool, float]:
    meeting = meet(port, rank, size)
    symmetric = SymmetricMemory.connect(meeting, CPU, ProcessMemory)
    assert isinstance(symmetric, SymmetricMemory), symmetric
    y = torch.full((1, 64), 5.0)
    start = time.monotonic()
    if rank == 0:
        threading.Timer(0.5, symmetric.abort).start()
        for _ in range(2):  # later launches, as of a graph that is under way, end too
            symmetric.add_all_reduce(torch.ones(1, 64), y)
    meeting.exchange("waited", "")
    return bool((y == 5.0).all()), time.monotonic() - start


def test_an_abort_ends_the_wait_for_a_lost_signal(processes: ProcessPoolExecutor, store: TCPStore) -> None:
    (is_untouched, seconds), _ = on_every_rank(processes, store, 2, lose_a_signal)
    assert is_untouched
    assert 0.5 <= seconds < 20


def refuse(port: int, rank: int, size: int, kinds: list[type[ProcessMemory]]) -> SymmetricMemory | str:
    trial_seconds = symmetric_memory._TRIAL_SECONDS
    symmetric_memory._TRIAL_SECONDS = 1.0
    try:
        return SymmetricMemory.connect(meet(port, rank, size), CPU, kinds[rank])
    finally:
        symmetric_memory._TRIAL_SECONDS = trial_seconds


@pytest.mark.parametrize(
    ("kinds", "reason"),
    [
        ([ProcessMemory, NoMemory], "rank 1: cuMemAlloc_v2: CUDA_ERROR_OUT_OF_MEMORY (2)"),
        ([ProcessMemory, PrivateMemory], "rank 0: a signal did not arrive within 1 s"),
        ([ProcessMemory] * 3, "rank 0: serves 2, 4 or 8 ranks, not 3"),
    ],
)
def test_one_rank_that_cannot_means_none(
    processes: ProcessPoolExecutor, store: TCPStore, kinds: list[type[ProcessMemory]], reason: str
) -> None:
    assert on_every_rank(processes, store, len(kinds), refuse, kinds) == [reason] * len(kinds)


def test_signals_order_what_other_gpus_read(tmp_path: Path) -> None:
    """In the compiled kernel: all threads have stored when one releases, and read only behind an acquire."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_KERNEL_DUMP": "1", "TRITON_DUMP_DIR": str(tmp_path), "TRITON_ALWAYS_COMPILE": "1"}
    command = [sys.executable, "-m", "tests.triton.compiling", "tests.triton.launches_all_reduce", "--arch", "90"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    kernels = [path.read_text() for path in tmp_path.rglob("*.ptx")]
    assert len(kernels) >= 6
    for kernel in kernels:
        steps = re.findall(r"bar\.sync|atom\.global\.sys\.\w+|st\.global|ld\.global\.v\d|ld\.global\.nc", kernel)
        stored, _, received = " ".join(steps).partition(" atom.global.sys.release ")
        assert stored.endswith("st.global bar.sync")
        assert re.fullmatch(
            r"bar\.sync atom\.global\.sys\.acquire( bar\.sync)+( ld\.global\.v\d)*( bar.sync| st.global)+", received
        )
