"""The operators on a GPU, all the way: prepare, dispatch, kernels, graphs, torch.compile."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from k2quant.kernels import ops
from k2quant.kernels.ops import Fp8Weight, Int4Weight, PackedWeight, prepare_fp8, prepare_int4
from k2quant.kernels.products import reference as matmul_reference
from k2quant.kernels.tuning.choosing import random_weight

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = "cuda"


def int4(*shape: int) -> Int4Weight:
    """Return random INT4 weights on the GPU."""
    words = torch.randint(-(2**31), 2**31, (*shape[:-1], shape[-1] // 8), dtype=torch.int64, device=DEVICE).int()
    scale = torch.rand(*shape[:-1], shape[-1] // 32, device=DEVICE) * 0.01 + 0.001
    return prepare_int4(words, scale.bfloat16())


def fp8(*shape: int) -> Fp8Weight:
    """Return random FP8 weights on the GPU."""
    codes = (torch.randn(shape, device=DEVICE) * 60).clamp(-448, 448).to(torch.float8_e4m3fn)
    blocks = (*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))
    return prepare_fp8(codes, torch.rand(blocks, device=DEVICE) * 1e-3 + 1e-4)


def fp4(kind: str, *shape: int) -> PackedWeight:
    """Return random weights of NVFP4 or MXFP4 on the GPU."""
    return random_weight(kind, *shape, device=torch.device(DEVICE))


def error(out: Tensor, exact: Tensor) -> float:
    """Return ||out - exact|| / ||exact||."""
    return float((out.double() - exact).norm() / exact.norm())


def test_prepared_weights_give_the_checkpoint_back() -> None:
    """On a GPU too, the layout has the checkpoint's bytes and is undone bit for bit."""
    words = torch.randint(-(2**31), 2**31, (3, 200, 12), dtype=torch.int64, device=DEVICE).int()
    scale = torch.rand(3, 200, 3, device=DEVICE).bfloat16()
    weight = prepare_int4(words, scale)
    assert weight.layout == "groups"
    assert weight.nbytes == words.nbytes + scale.nbytes
    assert all(torch.equal(*pair) for pair in zip(weight.checkpoint(), (words, scale), strict=True))


@pytest.mark.parametrize("rows", [1, 3, 16, 33, 64, 200, 1000, 3000])
@pytest.mark.parametrize(("height", "columns"), [(576, 7168), (2048, 7168), (200, 96), (7168, 2048)])
@pytest.mark.parametrize("kind", ["int4", "fp8"])
def test_linear(kind: str, height: int, columns: int, rows: int) -> None:
    """Against float64 with unrounded weights, the error is at most 1.05 times that of dequantising and cuBLAS."""
    weight: Int4Weight | Fp8Weight = int4(height, columns) if kind == "int4" else fp8(height, columns)
    op: Callable[..., Tensor] = ops.int4_linear if kind == "int4" else ops.fp8_linear
    x = torch.randn(rows, columns, device=DEVICE, dtype=torch.bfloat16)
    exact = x.double() @ weight.dequantize(torch.float32).double().T
    out = op(x, weight)
    assert error(out, exact) <= 1.05 * error(matmul_reference.linear(x, weight), exact)
    assert all(torch.equal(out, op(x, weight)) for _ in range(50))


@pytest.mark.parametrize("tokens", [1, 9, 64, 500])
def test_experts_and_gradients(tokens: int) -> None:
    """A layer of experts and its gradients are those of the reference."""
    gate, up, down = int4(16, 256, 512), int4(16, 256, 512), int4(16, 512, 256)
    x = torch.randn(tokens, 512, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    ids = torch.randint(-1, 16, (tokens, 4), device=DEVICE)
    weights = torch.rand(tokens, 4, device=DEVICE, requires_grad=True)
    out = ops.moe_int4(x, gate, up, down, ids, weights)
    assert error(out, matmul_reference.moe(x.detach(), gate, up, down, ids, weights.detach()).double()) < 0.01
    found = torch.autograd.grad(out.sum(), (x, weights))
    parts = (x.detach(), gate, up, down, ids, weights.detach())
    truth = matmul_reference.moe_backward(torch.ones_like(out), *parts)
    assert all(error(one, two.double()) < 0.02 for one, two in zip(found, truth, strict=True))


def test_a_captured_graph_follows_its_inputs() -> None:
    """Linear, W8A8, experts and codecs are captured without a sync, and a replay sees new inputs and ids."""
    four, eight = int4(512, 512), fp8(512, 512)
    gate, up, down = int4(16, 256, 512), int4(16, 256, 512), int4(16, 512, 256)
    x = torch.randn(24, 512, device=DEVICE, dtype=torch.bfloat16)
    ids, weights = torch.randint(0, 16, (24, 4), device=DEVICE), torch.rand(24, 4, device=DEVICE)

    def work() -> tuple[Tensor, ...]:
        return (
            ops.int4_linear(x, four),
            ops.fp8_linear(x, eight),
            ops.fp8_linear_w8a8(x, eight),
            ops.moe_int4(x, gate, up, down, ids, weights),
            ops.fake_quantize_int4(x),
            *ops.bf16_to_fp8(x),
        )

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work()
    x.copy_(torch.randn_like(x))
    ids.copy_(torch.randint(-1, 16, ids.shape, device=DEVICE))
    graph.replay()
    assert all(torch.equal(*(t.view(torch.uint8) for t in pair)) for pair in zip(captured, work(), strict=True))


def test_opcheck_and_compile() -> None:
    """The checks that torch has for operators pass, and compiled code gives the bits of eager code."""
    four = int4(256, 512)
    x = torch.randn(5, 512, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    opcheck(torch.ops.k2quant.linear.default, (x, four.codes, four.scale, None, f"int4/{four.layout}"))
    compiled = torch.compile(lambda rows: ops.int4_linear(rows, four), fullgraph=True, dynamic=True)
    for rows in (1, 7, 100):
        part = torch.randn(rows, 512, device=DEVICE, dtype=torch.bfloat16)
        assert torch.equal(compiled(part), ops.int4_linear(part, four))


@pytest.mark.parametrize("rows", [1, 16, 33, 200, 3000])
@pytest.mark.parametrize(("height", "columns"), [(2048, 7168), (200, 96)])
@pytest.mark.parametrize("kind", ["nvfp4", "mxfp4"])
def test_fp4_linear(kind: str, height: int, columns: int, rows: int) -> None:
    """Against float64 with unrounded weights, the error is at most 1.05 times that of dequantising and cuBLAS."""
    weight = fp4(kind, height, columns)
    x = torch.randn(rows, columns, device=DEVICE, dtype=torch.bfloat16)
    exact = x.double() @ weight.dequantize(torch.float32).double().T
    out = ops.linear(x, weight)
    assert error(out, exact) <= 1.05 * error(matmul_reference.linear(x, weight), exact)
    assert all(torch.equal(out, ops.linear(x, weight)) for _ in range(50))


@pytest.mark.parametrize("tokens", [1, 64])
@pytest.mark.parametrize("kind", ["nvfp4", "mxfp4"])
def test_fp4_experts_and_gradients(kind: str, tokens: int) -> None:
    """A layer of experts of FP4 and its gradients are those of the reference."""
    gate, up, down = fp4(kind, 16, 256, 512), fp4(kind, 16, 256, 512), fp4(kind, 16, 512, 256)
    x = torch.randn(tokens, 512, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    ids = torch.randint(-1, 16, (tokens, 4), device=DEVICE)
    weights = torch.rand(tokens, 4, device=DEVICE, requires_grad=True)
    out = ops.moe(x, gate, up, down, ids, weights)
    parts = (x.detach(), gate, up, down, ids, weights.detach())
    assert error(out, matmul_reference.moe(*parts).double()) < 0.01
    found = torch.autograd.grad(out.sum(), (x, weights))
    truth = matmul_reference.moe_backward(torch.ones_like(out), *parts)
    assert all(error(one, two.double()) < 0.02 for one, two in zip(found, truth, strict=True))
