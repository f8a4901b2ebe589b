"""The Triton kernels as one op table: chosen where there is a GPU for them, and enough for a whole model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from . import triton_interpreter as triton_interpreter  # first: what follows imports triton

from megatron_infer.config import SamplingParams  # isort: skip
from megatron_infer.ops import Ops, triton_ops  # isort: skip
from megatron_infer.ops import dispatch  # isort: skip
from megatron_infer.ops.dispatch import select_ops  # isort: skip
from megatron_infer.tensor_parallel.group import TPGroup  # isort: skip

from .ops_cases import CPU, normal, packed  # isort: skip
from .tiny_models import generate, make_engine, make_runner, random_tensors, tiny_config  # isort: skip

CUDA = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[int, int]]:
    """A machine that seems to have a GPU, of whatever compute capability the test says."""
    found = {"capability": (9, 0)}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found["capability"])
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return found


def test_a_deterministic_gpu_gets_the_triton_kernels(gpu: dict[str, tuple[int, int]]) -> None:
    exact = select_ops(CUDA, num_threads=1, deterministic=True)
    assert len(exact.report) == len(dispatch.OP_NAMES)
    assert all(": triton (sm_90, 132 SMs, deterministic); native refused" in line for line in exact.report)
    forced = select_ops(CUDA, num_threads=1, force="triton")
    assert forced.report[0].endswith("triton (sm_90, 132 SMs)")
    assert forced.silu_mul is exact.silu_mul is triton_ops.silu_mul
    assert exact.linear is not forced.linear and exact.feed_forward_layer is None


def test_refusals_say_why(gpu: dict[str, tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    def report() -> str:
        return select_ops(CUDA, num_threads=1, deterministic=True).report[0]

    gpu["capability"] = (7, 5)
    assert "this GPU has 7.5" in report()
    gpu["capability"] = (8, 0)
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None)
    assert "triton is not installed" in report()
    with pytest.raises(ValueError, match="triton ops cannot be used on cpu: runs on CUDA, not on cpu"):
        select_ops(CPU, num_threads=1, force="triton")


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_gather_rows_keeps_the_tables_dtype(ids_dtype: torch.dtype) -> None:
    table_VD = normal(40, 33).bfloat16()
    ids_T = torch.tensor([39, 0, 7, 7], dtype=ids_dtype)
    assert torch.equal(triton_ops.gather_rows(table_VD, ids_T), table_VD[ids_T.long()])


@pytest.mark.parametrize("tokens", [1, 16, 17])
def test_half_a_layer_is_its_ops(tokens: int) -> None:
    """But for the rounding of gate and up, which fp32 has not."""
    x_TD, residual_TD, norm_D = normal(tokens, 64), normal(tokens, 64, seed=1), normal(64, seed=2)
    halves = []
    for ops in (Ops(**triton_ops.table(2, deterministic=False)), select_ops(CPU, num_threads=1, force="reference")):
        gate_up, down = packed(ops, normal(2 * 56, 64, seed=3)), packed(ops, normal(64, 56, seed=4))
        residual = residual_TD.clone()
        if ops.feed_forward_layer is not None:
            y_TD = ops.feed_forward_layer(x_TD, residual, norm_D, 1e-5, gate_up, down)
        else:
            hidden_TD = ops.add_rms_norm(x_TD, residual, norm_D, 1e-5)
            y_TD = ops.linear(ops.silu_mul(ops.linear(hidden_TD, gate_up)), down)
        halves.append((y_TD, residual))
    assert torch.equal(halves[0][1], halves[1][1])
    assert (halves[0][0] - halves[1][0]).abs().max() <= 2e-6 * halves[1][0].abs().max()


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_whole_model_generates_the_same_tokens(deterministic: bool) -> None:
    # Small: the interpreter takes ten milliseconds for a program, of which a GEMV has one per output or two.
    config = tiny_config(
        vocab_size=64, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    tensors = random_tensors(config)
    prompts = [[5, 9, 2, 7, 1, 3], [4] * 21]
    sampling = SamplingParams(max_new_tokens=2, logprobs=0)
    outputs = []
    table = triton_ops.table(2, deterministic=deterministic)
    for ops in (Ops(**table), select_ops(CPU, num_threads=1, force="reference")):
        engine = make_engine(make_runner(config, tensors, TPGroup.single(CPU), ops=ops))
        outputs.append(generate(engine, prompts, sampling))
        engine.close()
    for actual, expected in zip(*outputs, strict=True):
        assert [token for token, _ in actual] == [token for token, _ in expected]
        logprobs = torch.tensor([[p for _, p in side] for side in (actual, expected)])
        assert (logprobs[0] - logprobs[1]).abs().max() <= 1e-4
