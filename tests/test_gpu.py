"""On a GPU: every op gives what its definition says, and the engine answers as it does on the CPU."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from megatron_infer.cache.kv_cache import KVCache
from megatron_infer.config import SamplingParams
from megatron_infer.engine.runner import ModelRunner
from megatron_infer.model.formats import quantize, weight_formats
from megatron_infer.model.transformer import Transformer
from megatron_infer.ops import GROUP, INT4, QUANTIZED, Ops
from megatron_infer.ops.dispatch import select_ops
from megatron_infer.tensor_parallel.group import TPGroup

from .ops_cases import Paged, attention_float64, bounds_of, normal, paged_case
from .tiny_models import generate, make_engine, make_runner, random_tensors, tiny_config

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CUDA = torch.device("cuda", 0)
BOUNDS = {torch.float32: 2e-5, torch.bfloat16: 1.5e-2}
"""Largest error relative to the largest value: bf16 results carry 8 bits."""


@pytest.fixture(scope="module", params=["triton", "vendor"])
def ops(request: pytest.FixtureRequest) -> Ops:
    return select_ops(CUDA, num_threads=1, force=request.param)


def close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> bool:
    assert actual.shape == expected.shape
    error = (actual.double().cpu() - expected.double()).abs().max() / expected.double().abs().max()
    return bool(error <= BOUNDS[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", ["plain", torch.int8, INT4], ids=str)
@pytest.mark.parametrize(("tokens", "out_dim", "in_dim"), [(1, 64, 128), (3, 37, 96), (16, 300, 416), (300, 130, 256)])
def test_linear(ops: Ops, dtype: torch.dtype, weights, tokens: int, out_dim: int, in_dim: int) -> None:
    x_TK, weight_NK = normal(tokens, in_dim).to(dtype), normal(out_dim, in_dim, seed=1)
    stored = dtype if weights == "plain" else weights
    packed = ops.allocate_linear(out_dim, in_dim, bounds_of(in_dim, stored), stored, CUDA)
    packed.bias = normal(out_dim, seed=2).to(CUDA)
    if stored in QUANTIZED:
        values_NK, scales_NG = quantize(weight_NK, stored)
        ops.pack_quantized(packed, 0, values_NK, scales_NG)
        exact_NK = values_NK.double() * scales_NG.double().repeat_interleave(GROUP, dim=1)[:, :in_dim]
    else:
        ops.pack_rows(packed, 0, weight_NK)
        exact_NK = weight_NK.to(dtype).double()
    expected = x_TK.double() @ exact_NK.T + packed.bias.double().cpu()
    assert close(ops.linear(x_TK.to(CUDA), packed), expected, torch.bfloat16 if stored in QUANTIZED else dtype)


def on_gpu(case: Paged, dtype: torch.dtype) -> Paged:
    moved = {spec.name: getattr(case, spec.name) for spec in fields(Paged)}
    moved = {name: value.to(CUDA) if isinstance(value, torch.Tensor) else value for name, value in moved.items()}
    return Paged(**{**moved, "q_TNH": moved["q_TNH"].to(dtype)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "lengths",
    [[(1, 1)], [(1, 300), (1, 17), (1, 4096)], [(5, 900), (1, 33), (16, 16)], [(128, 128), (1, 77), (40, 700)]],
    ids=str,
)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 32), (8, 1, 64), (32, 8, 128)])
def test_paged_attention(ops: Ops, dtype: torch.dtype, lengths, heads: int, kv_heads: int, dim: int) -> None:
    case = paged_case(lengths, num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, dtype=dtype)
    case.q_TNH = case.q_TNH.to(dtype).float()
    moved = on_gpu(case, dtype)
    assert close(ops.paged_attention(*moved.arguments()), attention_float64(case), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows(ops: Ops, dtype: torch.dtype) -> None:
    """Norms, SwiGLU and arg-max."""
    x_TD, residual_TD, weight_D = normal(7, 4096).to(dtype), normal(7, 4096, seed=1).to(dtype), normal(4096, seed=2)
    total = (x_TD.float() + residual_TD.float()).to(dtype).double()
    expected = total * torch.rsqrt(total.square().mean(dim=1, keepdim=True) + 1e-5) * weight_D.double()
    residual = residual_TD.to(CUDA)
    assert close(ops.add_rms_norm(x_TD.to(CUDA), residual, weight_D.to(CUDA), 1e-5), expected, dtype)
    assert close(residual, total, dtype)
    gate_up = normal(5, 2 * 416).to(dtype)
    gate, up = gate_up.double().chunk(2, dim=1)
    assert close(ops.silu_mul(gate_up.to(CUDA)), torch.nn.functional.silu(gate) * up, dtype)
    logits = normal(4, 49152).to(dtype)
    logits[1, 30000], logits[2, 5] = float("nan"), float("inf")
    logits[3, 100] = logits[3, 40000] = logits[3].max() + 1
    values, indices = ops.argmax(logits.to(CUDA))
    assert indices[0] == logits[0].argmax() and indices[3] == 100
    assert values[1].isnan() and values[2].isnan()


def gpu_runner(ops: Ops, config, tensors, dtype: torch.dtype, quantization: str) -> ModelRunner:
    fmt, head_fmt = weight_formats(ops, config, dtype, quantization, CUDA)
    model = Transformer(
        config, tp=TPGroup.single(CUDA), ops=ops, fmt=fmt, head_fmt=head_fmt, dtype=dtype,
        num_positions=config.max_position_embeddings,
    )  # fmt: skip
    for _ in model.load(tensors):
        continue
    kv = KVCache(
        config.num_hidden_layers, 256, config.num_key_value_heads, 16, config.head_dim, dtype=dtype, device=CUDA
    )
    return ModelRunner(model, kv)


def test_greedy_ids_are_those_of_the_cpu(ops: Ops) -> None:
    config = tiny_config()
    tensors = random_tensors(config)
    prompts = [[(7 * i + j) % config.vocab_size for j in range(5 + 40 * i)] for i in range(4)]
    sampling = SamplingParams(max_new_tokens=24, ignore_eos=True)
    cpu = make_engine(make_runner(config, tensors, TPGroup.single(torch.device("cpu"))))
    gpu = make_engine(gpu_runner(ops, config, tensors, torch.float32, "none"))
    expected = [[token for token, _ in output] for output in generate(cpu, prompts, sampling)]
    assert [[token for token, _ in output] for output in generate(gpu, prompts, sampling)] == expected
    alone = [generate(gpu, [prompt], sampling)[0] for prompt in prompts]
    assert [[token for token, _ in output] for output in alone] == expected


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
def test_bf16_and_rounded_weights_run(ops: Ops, quantization: str) -> None:
    config = tiny_config()
    engine = make_engine(gpu_runner(ops, config, random_tensors(config), torch.bfloat16, quantization))
    sampling = SamplingParams(max_new_tokens=8, ignore_eos=True)
    (output,) = generate(engine, [[1, 2, 3, 4]], sampling)
    assert len(output) == 8
