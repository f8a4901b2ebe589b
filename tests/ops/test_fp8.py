"""fp8 weights and activations: the rounding, the product, a whole model, and where they are refused.

torch's CPU build multiplies fp8 with row-wise scales, so the arithmetic runs here; what CUDA demands of shapes and
strides is asked of torch's own checks, through tensors without storage.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_infer.config import EngineConfig
from megatron_infer.dispatch.select import select_ops
from megatron_infer.engine.resolve import check_fp8, resolve
from megatron_infer.engine.runner import ModelRunner
from megatron_infer.model.formats import bytes_per_weight, stored_dtypes
from megatron_infer.model.weights import memory_estimate
from megatron_infer.model_config import ModelConfig
from megatron_infer.ops import chunk_bounds
from megatron_infer.ops.fp8 import FP8, quantize_rows, scaled_matmul
from megatron_infer.quantization import Quantization
from megatron_infer.sampling_params import SamplingParams
from megatron_infer.tensor_parallel.group import TPGroup
from megatron_infer.world import World
from tests.support.ops_cases import CPU, normal, packed
from tests.support.tiny_models import generate, make_engine, make_runner, random_tensors, tiny_config

HOPPER = (9, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_rounded_to_half_a_step_of_their_own_scale(dtype: torch.dtype) -> None:
    x_TK = (normal(40, 96) * torch.logspace(-12, 12, 40)[:, None]).to(dtype)
    values_TK, scales_T = quantize_rows(x_TK)
    assert values_TK.dtype == FP8 and values_TK.shape == x_TK.shape
    assert scales_T.dtype == torch.float32 and scales_T.shape == (40,)
    assert (values_TK.float().abs().amax(dim=1) == 448).all()
    steps_TK = x_TK.float() / scales_T[:, None]
    # 3 bits of mantissa: half a step is 1/16 of the value, 2^-10 below the smallest normal number.
    error_TK = (values_TK.float() - steps_TK).abs()
    assert (error_TK <= (steps_TK.abs() / 16).clamp(min=2.0**-10) * 1.0001).all()


def test_zeros_stay_zeros_and_non_finite_rows_stay_so() -> None:
    x_TK, weight_NK = normal(6, 32), normal(16, 32, seed=1)
    x_TK[0] = 0.0
    x_TK[1] *= 1e-44
    x_TK[2, 5], x_TK[3, 6], x_TK[4, 7] = float("nan"), float("inf"), float("-inf")
    y_TN = scaled_matmul(x_TK, *quantize_rows(weight_NK))
    assert (y_TN[:2] == 0).all()
    assert y_TN[2:5].isnan().all()
    assert y_TN[5].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "out_dim", "in_dim"), [(1, 16, 16), (3, 48, 64), (40, 80, 208), (300, 48, 64)])
def test_the_product_is_that_of_the_rounded_rows(dtype: torch.dtype, tokens: int, out_dim: int, in_dim: int) -> None:
    x_TK, weight_NK = normal(tokens, in_dim).to(dtype), normal(out_dim, in_dim, seed=1)
    (x_values, x_scales), (w_values, w_scales) = quantize_rows(x_TK), quantize_rows(weight_NK)
    exact = (x_values.double() * x_scales[:, None]) @ (w_values.double() * w_scales[:, None]).T
    y_TN = scaled_matmul(x_TK, w_values, w_scales)
    assert y_TN.dtype == dtype and y_TN.shape == (tokens, out_dim)
    # A rounding to bf16, and of fp32 sums.
    assert ((y_TN.double() - exact).abs() <= 2.0**-8 * exact.abs() + 1e-5 * exact.abs().max()).all()


@pytest.mark.parametrize("tokens", [1, 2, 5, 16, 17, 300])
def test_shapes_and_strides_are_those_cuda_takes(tokens: int) -> None:
    """By torch's shape checks of the CUDA product, which must also refuse what they should."""
    with FakeTensorMode():
        x_TK = torch.empty(tokens, 96, dtype=torch.bfloat16, device="cuda")
        weight_NK = torch.empty(80, 96, dtype=FP8, device="cuda")
        scales_N = torch.empty(80, dtype=torch.float32, device="cuda")
        y_TN = scaled_matmul(x_TK, weight_NK, scales_N)
        assert y_TN.shape == (tokens, 80) and y_TN.dtype == torch.bfloat16
        with pytest.raises(RuntimeError, match="divisible by 16"):
            scaled_matmul(x_TK.narrow(1, 0, 88), weight_NK.narrow(1, 0, 88), scales_N)


def test_a_linear_layer_rounds_row_by_row_however_it_is_packed() -> None:
    ops = select_ops(CPU, num_threads=1, force="vendor")
    weight_NK, x_TK, bias_N = normal(80, 96), normal(7, 96, seed=1), normal(80, seed=2)
    pieces = ops.allocate_linear(80, 96, chunk_bounds(96, 16), FP8, CPU)
    for begin, end in [(16, 41), (0, 16), (41, 80)]:
        ops.pack_rows(pieces, begin, weight_NK[begin:end].bfloat16())
    whole = packed(ops, weight_NK.bfloat16(), FP8)
    assert pieces.dtype == FP8 and pieces.data.element_size() == 1
    assert torch.equal(ops.linear(x_TK, pieces), ops.linear(x_TK, whole))
    pieces.bias = bias_N
    assert torch.equal(ops.linear(x_TK, pieces), ops.linear(x_TK, whole) + bias_N)
    exact = x_TK.double() @ weight_NK.double().T
    assert (ops.linear(x_TK, whole) - exact).abs().max() <= 0.05 * exact.abs().max()


def fp8_runner(config: ModelConfig, tensors) -> ModelRunner:
    return make_runner(
        config, tensors, TPGroup.single(CPU), ops=select_ops(CPU, num_threads=1, force="vendor"), quantization="fp8"
    )


def test_a_whole_model_runs_in_fp8() -> None:
    config = tiny_config(intermediate_size=96, head_dim=16)
    tensors = random_tensors(config)
    runner = fp8_runner(config, tensors)
    block = runner.model.blocks[0]
    for layer in (block.attention.qkv, block.attention.out, block.feed_forward.gate_up, block.feed_forward.down):
        assert layer.packed.dtype == FP8
    assert runner.model.head.packed.dtype == torch.float32
    sampling = SamplingParams(max_new_tokens=4, logprobs=0, ignore_eos=True)
    prompts = [[5, 9, 2, 7, 1, 3], [4] * 21]
    rounded = generate(make_engine(runner), prompts, sampling)
    plain = generate(make_engine(make_runner(config, tensors, TPGroup.single(CPU))), prompts, sampling)
    first = torch.tensor([[output[0][1] for output in outputs] for outputs in (rounded, plain)])
    assert first.isfinite().all() and (first[0] - first[1]).abs().max() <= 0.3
    assert not torch.equal(first[0], first[1])


def test_memory_and_dtypes() -> None:
    model = ModelConfig.aixcoder_7b()
    assert stored_dtypes(torch.bfloat16, "fp8") == (FP8, torch.bfloat16)
    assert bytes_per_weight(FP8) == 1.0
    halves = memory_estimate(model, 1, torch.bfloat16) - memory_estimate(model, 1, torch.bfloat16, "fp8")
    assert halves == 32 * (6144 * 4096 + 4096 * 4096 + 3 * 4096 * 14464)


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_the_main_model_is_accepted(tp: int) -> None:
    for capability in ((8, 9), HOPPER, (12, 0)):
        check_fp8(ModelConfig.aixcoder_7b(), EngineConfig(quantization="fp8"), tp, capability)


@pytest.mark.parametrize(
    ("change", "options", "tp", "capability", "message"),
    [
        ({}, {}, 1, None, "needs a GPU of compute capability 8.9 or more; on the CPU use quantization='int8'"),
        ({}, {}, 1, (8, 6), "this one has 8.6; use quantization='int8'"),
        ({}, {"deterministic": True}, 1, HOPPER, "leave deterministic off"),
        ({"hidden_size": 4104}, {}, 1, HOPPER, "this model has hidden_size 4104; use quantization='int8'"),
        ({"intermediate_size": 100}, {}, 1, HOPPER, "intermediate_size 100"),
        ({"head_dim": 12}, {}, 8, HOPPER, "query columns on each of 8 ranks 48 and key columns|key columns .* 24"),
    ],
)
def test_refusals_name_the_remedy(change, options, tp: int, capability, message: str) -> None:
    model = replace(ModelConfig.aixcoder_7b(), **change)
    with pytest.raises(ValueError, match=message):
        check_fp8(model, EngineConfig(quantization="fp8", **options), tp, capability)


def test_a_checkpoint_stored_quantised_is_not_rounded_again() -> None:
    model = replace(tiny_config(), quantization=Quantization("int8"))
    with pytest.raises(ValueError, match="the checkpoint is stored in int8; leave it at 'auto'"):
        resolve(EngineConfig(device="cpu", quantization="fp8"), model, World())
