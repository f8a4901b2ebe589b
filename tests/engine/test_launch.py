"""Which device a rank gets, and how much of its memory, on machines that are only described."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed import TCPStore

from megatron_infer.config import EngineConfig
from megatron_infer.engine import bring_up, memory
from megatron_infer.engine.resolve import resolve
from megatron_infer.engine.topology import rank_device
from megatron_infer.kernels.cpu import abi, native
from megatron_infer.model_config import ModelConfig
from megatron_infer.ops.reference import ReferenceOps
from megatron_infer.tensor_parallel.group import TPGroup
from megatron_infer.world import World
from tests.session.test_torchrun import run, torchrun
from tests.tensor_parallel.test_group import BACKENDS, Rank, Ranks

MODEL = ModelConfig.aixcoder_7b()
GIB = 1 << 30
ALONE = World()


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 80 GiB, of which 60 are free."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_for_each_rank_or_one_for_all() -> None:
    own = resolve(EngineConfig(tensor_parallel_size=2), MODEL, ALONE)
    assert [str(rank_device(own, World(rank, 2, rank, 2))) for rank in range(2)] == ["cuda:0", "cuda:1"]
    shared = resolve(EngineConfig(tensor_parallel_size=4, device="cuda:1"), MODEL, ALONE)
    assert {str(rank_device(shared, World(rank, 4, rank, 4))) for rank in range(4)} == {"cuda:1"}
    assert resolve(EngineConfig(quantization="fp8"), MODEL, ALONE).quantization == "fp8"


@pytest.mark.usefixtures("two_gpus")
def test_a_launcher_may_show_each_rank_its_own_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    world = World(5, 8, 5, 8, "host:1")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(ValueError, match="8 ranks on this host but only 1 GPUs"):
        resolve(EngineConfig(), MODEL, world)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    assert str(rank_device(resolve(EngineConfig(), MODEL, world), world)) == "cuda:0"


def compile_in_turn(me: Rank, backend: str) -> list[float]:
    """When a rank began to choose its ops, and when it had them."""
    group = me.join("turns", backend)
    config = resolve(EngineConfig(device="cpu", tensor_parallel_size=me.size), MODEL, ALONE)
    times = []

    def select(*_: object, **__: object) -> ReferenceOps:
        times.append(time.monotonic())
        time.sleep(0.2)
        times.append(time.monotonic())
        return ReferenceOps()

    bring_up.select_ops = select  # type: ignore[assignment]
    bring_up._agreed_ops(config, MODEL, group, is_first_here=me.rank == 0)
    return times


def test_the_first_rank_of_a_host_compiles_for_the_others() -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    first, *others = Ranks(store, compile_in_turn, 2, "gloo").results()
    assert all(began >= first[1] for began, _ in others)


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"tensor_parallel_size": 4}, r"4 ranks on this host but only 2 GPUs; .* device='cuda:0'"),
        ({"device": "cuda:2"}, "the last GPU is cuda:1"),
    ],
    ids=str,
)
def test_gpus_that_are_not_there(asked, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(EngineConfig(**asked), MODEL, ALONE)


def test_devices_that_are_no_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ("gpu", "cuda:", "cuda:x", "cuda:-1", "0"):
        with pytest.raises(ValueError, match="device"):
            EngineConfig(device=wrong)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="torch sees no GPU; use device='cpu'"):
        resolve(EngineConfig(device="cuda:0"), MODEL, ALONE)


@pytest.mark.usefixtures("two_gpus")
def test_the_kv_cache_takes_what_weights_and_graphs_leave() -> None:
    """72 GiB may be used and 20 are: 52 remain, less half a GiB for graphs; a block of 16 positions takes 2 MiB."""
    config = replace(resolve(EngineConfig(max_num_seqs=512), MODEL, ALONE), tensor_parallel_size=1)
    group = TPGroup.single(torch.device("cpu"))
    group.device = torch.device("cuda", 0)
    gathered = []
    group.all_gather = lambda x: gathered.append(x) or x  # type: ignore[method-assign, func-returns-value]
    real_tensor = torch.tensor
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "tensor", lambda data, dtype, device: real_tensor(data, dtype=dtype))
        assert memory.num_kv_blocks(config, MODEL, ALONE, group) == (52 * GIB - GIB // 2) // (2 << 20)
        assert len(gathered) == 1
        without = replace(config, cuda_graph_memory_bytes=0)
        assert memory.num_kv_blocks(without, MODEL, ALONE, group) == 52 * GIB // (2 << 20)
        shared = replace(config, device="cuda:0", tensor_parallel_size=2)
        # Half of the memory for half of the heads: as many blocks, but for the graphs of each.
        assert memory.num_kv_blocks(shared, MODEL, World(0, 2, 0, 2), group) == (26 * GIB - GIB // 2) // (1 << 20)
        assert len(gathered) == 4, "all ranks are waited for before the memory is measured"


@pytest.mark.usefixtures("two_gpus")
def test_weights_that_do_not_fit_are_refused() -> None:
    memory.check_memory(resolve(EngineConfig(), MODEL, ALONE), MODEL, ALONE)
    crowded = replace(resolve(EngineConfig(), MODEL, ALONE), device="cuda:0", tensor_parallel_size=8)
    deep = replace(MODEL, num_hidden_layers=8 * MODEL.num_hidden_layers)
    with pytest.raises(ValueError, match=r"on each of 8 rank\(s\) here, but 54.00 GiB are free"):
        memory.check_memory(crowded, deep, World(0, 8, 0, 8))


def test_the_cpu_takes_no_ops_whose_answers_depend_on_the_batch() -> None:
    for ops in ("triton", "vendor"):
        with pytest.raises(ValueError, match="on the CPU no answer depends on the batch"):
            resolve(EngineConfig(device="cpu", ops=ops), MODEL, ALONE)
    assert resolve(EngineConfig(device="cpu", ops="reference"), MODEL, ALONE).ops == "reference"


# ---- ranks that disagree --------------------------------------------------------------------------------------------


def choose_ops(me: Rank, backend: str) -> tuple[str, str]:
    """Rank 1 cannot load the native kernels."""
    if me.rank == 1:

        def unavailable(*_: object) -> None:
            raise abi.Unavailable("a full disk")

        native.CpuKernels = unavailable  # type: ignore[assignment, misc]
    group = me.join("ops", backend)
    config = resolve(EngineConfig(device="cpu", tensor_parallel_size=me.size), MODEL, ALONE)
    ops = bring_up._agreed_ops(config, MODEL, group, is_first_here=True)
    return ops.chosen, type(ops).__name__


@pytest.mark.parametrize("backend", BACKENDS)
def test_where_one_rank_cannot_use_the_kernels_none_does(backend: str) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    assert Ranks(store, choose_ops, 2, backend).results() == [("reference", "ReferenceOps")] * 2


DISAGREEING_SCRIPT = """
import os, sys
from megatron_infer import LLM
from megatron_infer.commands.options import run_command

own = eval(sys.argv[2]) if os.environ["RANK"] == "1" else {}
sys.exit(run_command(lambda world: LLM(sys.argv[1], device="cpu", kv_cache_memory_bytes=4 << 20, **own) and 0))
"""


@pytest.mark.parametrize("own", [{"block_size": 32}, {"dtype": "float32"}])
def test_ranks_with_other_options_are_refused_by_name(tiny_checkpoint: Path, tmp_path: Path, own: dict) -> None:
    script = tmp_path / "job.py"
    script.write_text(DISAGREEING_SCRIPT)
    done = run(torchrun(2, script, str(tiny_checkpoint), repr(own)))
    assert done.returncode != 0
    name = next(iter(own))
    (line,) = {line for line in done.stderr.splitlines() if line.startswith("error: ")}
    assert f"error: the ranks disagree: {name} is" in line and repr(own[name]) in line and "on rank 1" in line
