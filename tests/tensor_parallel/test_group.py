"""TPGroup between real processes: exact sums, any sizes, and what survivors see when a rank dies, aborts or leaves."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed import TCPStore

from megatron_infer.kernels.cpu.collectives import LIBRARY_PATH
from megatron_infer.tensor_parallel.group import RankFailure, TPGroup
from megatron_infer.world import World

CPU = torch.device("cpu")
WINDOW_ELEMENTS = 131072
BACKENDS = [
    pytest.param(
        "shared memory",
        marks=pytest.mark.skipif(
            sys.platform != "linux" or not LIBRARY_PATH.exists(), reason="needs Linux and the native library"
        ),
    ),
    "gloo",
]
# A fork server that has imported torch once starts a rank in milliseconds; a fresh interpreter takes seconds.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "numpy", "pytest", "megatron_infer.tensor_parallel.group"])

backends = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(scope="module")
def store() -> TCPStore:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """No test may leave a file where shared memory or sockets have names."""
    before = {name for folder in ("/dev/shm", "/tmp") if os.path.isdir(folder) for name in os.listdir(folder)}
    yield
    after = {name for folder in ("/dev/shm", "/tmp") if os.path.isdir(folder) for name in os.listdir(folder)}
    assert not {name for name in after - before if "megatron" in name or name.startswith("torch_")}


class Ranks:
    """Processes that each run one function as one rank and send back its result or its RankFailure."""

    def __init__(self, store: TCPStore, function: Callable[..., Any], size: int, *args: Any) -> None:
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(size):
            mine, theirs = FORKS.Pipe()
            process = FORKS.Process(target=_rank_main, args=(theirs, store.port, function, rank, size, *args))
            process.start()
            theirs.close()
            self.pipes.append(mine)
            self.processes.append(process)

    def wait_for(self, rank: int, message: str, seconds: float = 40) -> None:
        assert self.pipes[rank].poll(seconds), f"rank {rank} did not say {message!r}"
        assert self.pipes[rank].recv() == ("note", message)

    def kill(self, rank: int) -> None:
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)

    def results(self, ranks: list[int] | None = None, seconds: float = 40) -> list[Any]:
        ranks = list(range(len(self.pipes))) if ranks is None else ranks
        deadline = time.monotonic() + seconds
        found = []
        for rank in ranks:
            assert self.pipes[rank].poll(max(0.0, deadline - time.monotonic())), f"rank {rank} hangs"
            kind, value = self.pipes[rank].recv()
            assert kind == "result", f"rank {rank}: {value}"
            found.append(value)
        self.end()
        return found

    def end(self) -> None:
        for process in self.processes:
            process.join(0.5)
            if process.is_alive():
                process.kill()
                process.join()


def _rank_main(pipe: Connection, port: int, function: Callable[..., Any], rank: int, size: int, *args: Any) -> None:
    torch.set_num_threads(1)
    store = TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=60))
    try:
        result = function(Rank(store, pipe, rank, size), *args)
    except RankFailure as failure:
        result = ("failure", failure.rank, str(failure))
    except BaseException as error:
        pipe.send(("error", f"{type(error).__name__}: {error}"))
        raise
    pipe.send(("result", result))


class Rank:
    """What a rank function is given."""

    def __init__(self, store: TCPStore, pipe: Connection, rank: int, size: int) -> None:
        self.store, self.pipe, self.rank, self.size = store, pipe, rank, size

    def join(self, name: str, backend: Any, timeout_seconds: float = 40) -> TPGroup:
        group = TPGroup.connect(
            self.store, self.rank, self.size, CPU, name, backend=backend, timeout_seconds=timeout_seconds
        )
        assert group.backend == backend
        return group

    def note(self, message: str) -> None:
        self.pipe.send(("note", message))


def parts_of(case: int, size: int, *shape: int) -> list[torch.Tensor]:
    """What each rank contributes: numbers of mixed magnitude, so that the order of a sum shows in its bits."""
    generator = torch.Generator().manual_seed(case)
    return [torch.randn(*shape, generator=generator) * 10.0 ** (rank % 3) for rank in range(size)]


def tree(parts: list[torch.Tensor]) -> torch.Tensor:
    """The contract, spelled out."""
    if len(parts) == 8:
        r0, r1, r2, r3, r4, r5, r6, r7 = parts
        return ((r0 + r1) + (r2 + r3)) + ((r4 + r5) + (r6 + r7))
    if len(parts) == 4:
        r0, r1, r2, r3 = parts
        return (r0 + r1) + (r2 + r3)
    if len(parts) == 3:
        return (parts[0] + parts[1]) + parts[2]
    return parts[0] + parts[1]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bool((a.view(torch.int32) == b.view(torch.int32)).all())


def check_collectives(me: Rank, backend: str) -> str:
    group = me.join("collectives", backend)
    sizes = [1, 3, 31, 4096, 16385, WINDOW_ELEMENTS - 1, WINDOW_ELEMENTS, 2 * WINDOW_ELEMENTS + 37]
    for case, n in enumerate(sizes):
        parts = parts_of(case, me.size, n)
        assert same_bits(group.all_reduce(parts[me.rank].clone()), tree(parts)), f"all_reduce of {n}"
    with torch.inference_mode():
        parts = parts_of(50, me.size, 5, 7)
        assert same_bits(group.all_reduce(parts[me.rank] * 1.0), tree([p * 1.0 for p in parts])), "inference mode"
        assert torch.equal(group.all_gather(parts[me.rank] * 1.0), torch.cat(parts, dim=1)), "inference mode"
    strided = parts_of(51, me.size, 6, 8)
    assert same_bits(group.all_reduce(strided[me.rank].t()), tree([p.t().contiguous() for p in strided])), "strided"
    for case, (rows, columns) in enumerate([(1, 1), (3, 5), (7, 49152), (2, WINDOW_ELEMENTS + 3)]):
        parts = parts_of(100 + case, me.size, rows, columns)
        assert torch.equal(group.all_gather(parts[me.rank]), torch.cat(parts, dim=1)), f"all_gather {rows}x{columns}"
    ids = torch.arange(6).view(2, 3) + 2**40 * me.rank
    assert torch.equal(group.all_gather(ids)[:, -3:], torch.arange(6).view(2, 3) + 2**40 * (me.size - 1))
    residual = torch.ones(4, 5)
    assert not group.add_all_reduce(torch.ones(4, 5), residual) and bool((residual == 1).all())
    for n in (0, 1, 510, 511, 512, 4096, 4097, 1_000_000, 2):
        sent = np.arange(n, dtype=np.int64) * 2**33 - 5
        assert np.array_equal(group.broadcast_ints(sent if me.rank == 0 else None), sent), f"broadcast of {n}"
    group.close()
    group.close()
    return "ok"


@backends
@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_collectives_are_exact_for_any_size(store: TCPStore, backend: str, size: int) -> None:
    assert Ranks(store, check_collectives, size, backend).results() == ["ok"] * size


def test_the_order_of_the_sum_shows_in_its_bits() -> None:
    """Negative control: summed in rank order, the very inputs of the test above have other bits."""
    r0, r1, r2, r3 = parts = parts_of(3, 4, 4096)
    assert not same_bits(((r0 + r1) + r2) + r3, tree(parts))
    assert torch.allclose(((r0 + r1) + r2) + r3, tree(parts), rtol=1e-3, atol=1e-2)


def check_interleaved(me: Rank, backend: str, count: int) -> str:
    groups = [me.join("one", backend), me.join("two", backend)]
    choose = np.random.default_rng(7)
    naps = np.random.default_rng(me.rank)
    for case in range(count):
        group = groups[int(choose.integers(2))]
        kind, n = int(choose.integers(3)), int(choose.integers(1, 3000))
        if naps.random() < 0.05:
            time.sleep(0.003)
        parts = parts_of(case, me.size, n)
        if kind == 0:
            assert same_bits(group.all_reduce(parts[me.rank].clone()), tree(parts))
        elif kind == 1:
            assert torch.equal(group.all_gather(parts[me.rank][None]), torch.cat(parts)[None])
        else:
            sent = np.arange(n, dtype=np.int64) * case
            assert np.array_equal(group.broadcast_ints(sent if me.rank == 0 else None), sent)
    return "ok"


@backends
@pytest.mark.parametrize("size", [2, 4])
def test_two_groups_take_200_random_collectives(store: TCPStore, backend: str, size: int) -> None:
    assert Ranks(store, check_interleaved, size, backend, 200).results() == ["ok"] * size


def check_back_to_back(me: Rank, backend: str) -> str:
    group = me.join("back to back", backend)
    naps = np.random.default_rng(me.rank)
    for i in range(3000):
        # Rank 0 runs ahead of the others here; lengths change, so a stale one would show.
        sent = np.full(i % 7, i, dtype=np.int64)
        if me.rank and naps.random() < 0.01:
            time.sleep(0.0005)
        assert np.array_equal(group.broadcast_ints(sent if me.rank == 0 else None), sent)
    return "ok"


@pytest.mark.parametrize("backend", BACKENDS[:1])
def test_a_sender_that_runs_ahead_overwrites_nothing(store: TCPStore, backend: str) -> None:
    assert Ranks(store, check_back_to_back, 3, backend).results() == ["ok"] * 3


def loop_until_killed(me: Rank, backend: str, victim: int) -> Any:
    group = me.join("killed", backend)
    x = torch.ones(300_000)
    for i in range(1_000_000):
        if i == 3 and me.rank == victim:
            me.note("running")
        try:
            x = group.all_reduce(x).fill_(1.0)
        except RankFailure as failure:
            first, start = str(failure), time.monotonic()
            for call in (group.all_reduce, group.all_gather):
                with pytest.raises(RankFailure) as again:
                    call(torch.ones(1, 3))
                assert str(again.value) == first
            assert time.monotonic() - start < 0.2
            group.close()
            return failure.rank, first
    return None


@backends
@pytest.mark.parametrize(("size", "victim"), [(2, 0), (4, 2)])
def test_survivors_name_a_killed_rank(store: TCPStore, backend: str, size: int, victim: int) -> None:
    ranks = Ranks(store, loop_until_killed, size, backend, victim)
    ranks.wait_for(victim, "running")
    start = time.monotonic()
    ranks.kill(victim)
    for rank, text in ranks.results([r for r in range(size) if r != victim]):
        assert rank == victim
        assert f"rank {victim}" in text
        assert "died" in text
    assert time.monotonic() - start < 10


def die_while_peer_idles(me: Rank, backend: str) -> Any:
    group = me.join("idle death", backend)
    if me.rank == 1:
        me.note("idle")
        return group.broadcast_ints(None)
    time.sleep(60)
    return None


@backends
def test_an_idle_follower_notices_the_death_of_rank_0(store: TCPStore, backend: str) -> None:
    ranks = Ranks(store, die_while_peer_idles, 2, backend)
    ranks.wait_for(1, "idle")
    time.sleep(0.3)
    ranks.kill(0)
    start = time.monotonic()
    [(kind, rank, text)] = ranks.results([1])
    assert (kind, rank) == ("failure", 0)
    assert "died" in text
    assert time.monotonic() - start < 5


def abort_on_one_rank(me: Rank, backend: str) -> Any:
    group = me.join("abort", backend)
    group.all_reduce(torch.ones(4))
    if me.rank == 1:
        time.sleep(0.2)
        group.abort("RuntimeError: out of memory in layer 3")
    group.all_reduce(torch.ones(4))
    return None


@backends
def test_an_abort_reaches_every_rank_with_its_cause(store: TCPStore, backend: str) -> None:
    for kind, rank, text in Ranks(store, abort_on_one_rank, 4, backend).results():
        assert (kind, rank) == ("failure", 1)
        assert "rank 1" in text
        assert "out of memory in layer 3" in text


def close_on_one_rank(me: Rank, backend: str) -> Any:
    group = me.join("close", backend)
    group.all_reduce(torch.ones(4))
    if me.rank == 0:
        group.close()
        with pytest.raises(ValueError, match="closed"):
            group.all_reduce(torch.ones(4))
        me.note("closed")
        time.sleep(1)
        return None
    return group.broadcast_ints(None)


@backends
def test_a_rank_that_leaves_is_not_waited_for(store: TCPStore, backend: str) -> None:
    ranks = Ranks(store, close_on_one_rank, 2, backend)
    ranks.wait_for(0, "closed")
    kind, rank, text = ranks.results()[1]
    assert (kind, rank) == ("failure", 0)
    assert "closed the group" in text


def idle_for_a_while(me: Rank, backend: str) -> float:
    group = me.join("idle", backend)
    group.all_reduce(torch.ones(4))
    if me.rank == 0:
        time.sleep(1.5)
        group.broadcast_ints(np.zeros(1, dtype=np.int64))
        return 0.0
    start = time.process_time()
    group.broadcast_ints(None)
    return time.process_time() - start


@backends
def test_an_idle_follower_burns_no_cpu(store: TCPStore, backend: str) -> None:
    assert max(Ranks(store, idle_for_a_while, 2, backend).results()) < 0.3


def wait_for_a_late_rank(me: Rank, backend: str) -> Any:
    group = me.join("interrupt", backend)
    if me.rank == 0:
        time.sleep(1.5)
        return group.all_reduce(torch.ones(4))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    me.note("waiting")
    try:
        group.all_reduce(torch.ones(4))
    except KeyboardInterrupt:
        return "interrupted"
    return "not interrupted"


def test_ctrl_c_ends_a_wait_and_the_peers_learn_of_it(store: TCPStore) -> None:
    for backend in ("shared memory", "gloo") if LIBRARY_PATH.exists() else ("gloo",):
        ranks = Ranks(store, wait_for_a_late_rank, 2, backend)
        ranks.wait_for(1, "waiting")
        time.sleep(0.4)
        pid = ranks.processes[1].pid
        assert pid is not None
        os.kill(pid, signal.SIGINT)
        late, interrupted = ranks.results()
        assert interrupted == "interrupted"
        assert late[:2] == ("failure", 1)
        assert "KeyboardInterrupt" in late[2]


def stop_answering(me: Rank, backend: str) -> Any:
    group = me.join("hang", backend, timeout_seconds=1.0)
    if me.rank == 1:
        time.sleep(60)
    return group.all_reduce(torch.ones(4))


@backends
def test_a_rank_that_hangs_is_given_up_after_the_timeout(store: TCPStore, backend: str) -> None:
    [(kind, rank, text)] = Ranks(store, stop_answering, 2, backend).results([0])
    assert kind == "failure"
    assert "within 1 s" in text
    assert rank == 1


def disagree(me: Rank) -> Any:
    group = me.join("disagree", "shared memory")
    return group.all_reduce(torch.ones(4)) if me.rank == 0 else group.all_gather(torch.ones(1, 5))


@pytest.mark.parametrize("backend", BACKENDS[:1])
def test_ranks_that_make_different_calls_are_told(store: TCPStore, backend: str) -> None:
    for kind, _, text in Ranks(store, disagree, 2).results():
        assert kind == "failure"
        assert "all_reduce of 16 bytes" in text
        assert "all_gather of 20 bytes" in text


def fall_back(me: Rank) -> tuple[str, str]:
    missing = Path("/nonexistent/libmegatron_infer_cpu.so")
    options = {"library_path": missing} if me.rank == 1 else {}
    group = TPGroup.connect(me.store, me.rank, me.size, CPU, "fall back", timeout_seconds=40, **options)  # type: ignore[arg-type]
    assert same_bits(group.all_reduce(torch.ones(3)), torch.full((3,), 2.0))
    return group.backend, group.why


def test_one_rank_without_the_library_means_gloo_for_all(store: TCPStore) -> None:
    for backend, why in Ranks(store, fall_back, 2).results():
        assert backend == "gloo"
        assert "not built" in why


def join_from_env(me: Rank, size: int, names: list[str]) -> list[Any]:
    os.environ.update(
        RANK=str(me.rank),
        WORLD_SIZE=str(me.size),
        LOCAL_WORLD_SIZE=str(me.size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(me.store.port),
        TORCHELASTIC_USE_AGENT_STORE="True",
    )
    found: list[Any] = []
    for name in names:
        group = TPGroup.in_world(World.from_env(), CPU, size, name=name, timeout_seconds=40)
        found.append((group.rank, group.size, group.all_gather(torch.tensor([[float(me.rank)]])).tolist()))
        group.close()
    return found


def test_under_torchrun_consecutive_ranks_form_replicas(store: TCPStore) -> None:
    # The same name twice: a second group of that name must not meet the keys of the first.
    results = Ranks(store, join_from_env, 4, 2, ["a", "a"]).results()
    for rank, found in enumerate(results):
        members = [[0.0, 1.0]] if rank < 2 else [[2.0, 3.0]]
        assert found == [(rank % 2, 2, members)] * 2


@pytest.mark.parametrize(
    ("environment", "size", "match"),
    [
        ({}, 2, "use torchrun"),
        ({"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, 2, "choose a size"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, 4, "choose a size"),
        ({"RANK": "5", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, None, "not below"),
        ({"RANK": "one", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, None, "not an integer"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, None, "lacks MASTER_ADDR"),
    ],
)
def test_a_wrong_environment_is_refused_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], size: int | None, match: str
) -> None:
    for key in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(key, raising=False)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(ValueError, match=match):
        TPGroup.in_world(World.from_env(), CPU, size)


def test_a_single_rank_needs_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(key, raising=False)
    group = TPGroup.in_world(World.from_env(), CPU)
    x = torch.ones(2, 3)
    assert (group.rank, group.size, group.backend) == (0, 1, "single")
    assert group.all_reduce(x) is x
    assert group.all_gather(x) is x
    assert not group.add_all_reduce(x, x)
    assert group.broadcast_ints(np.arange(3)).tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="rank 0 passes the array"):
        group.broadcast_ints(None)
    with pytest.raises(ValueError, match="1-D int64"):
        group.broadcast_ints(np.zeros(3, dtype=np.int32))
    group.close()
