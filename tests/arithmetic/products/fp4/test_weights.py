"""NVFP4 and MXFP4 weights: what they mean, their products on a CPU, and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from k2quant.errors import UsageError
from k2quant.kernels.codecs.fp4 import E2M1
from k2quant.kernels.ops import (
    Mxfp4Weight,
    Nvfp4Weight,
    PackedWeight,
    linear,
    moe,
    prepare_mxfp4,
    prepare_nvfp4,
    warmup,
)
from k2quant.kernels.products import dispatch, reference
from k2quant.kernels.products.cpu import linear as linear_cpu
from k2quant.kernels.products.cpu import moe as moe_cpu
from k2quant.kernels.products.linear import operands
from k2quant.kernels.products.prepare import moved

KINDS = ("multiplies", "divides", "mxfp4")


def random_bytes(shape: tuple[int, ...], seed: int, first: int = 0, last: int = 255) -> Tensor:
    """Return random bytes from `first` to `last`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(first, last + 1, shape, generator=generator, dtype=torch.uint8)


def fp4(kind: str, *shape: int, seed: int = 0) -> PackedWeight:
    """Return a random weight `[.., N, K]` of medium numbers."""
    *stack, columns = shape
    codes = random_bytes((*stack, columns // 2), seed)
    if kind == "mxfp4":
        return prepare_mxfp4(codes, random_bytes((*stack, columns // 32), seed + 1, 118, 124))
    scale = random_bytes((*stack, columns // 16), seed + 1, 0x20, 0x7E)
    whole = torch.rand(stack[:-1], generator=torch.Generator().manual_seed(seed + 2)) * 1e-3 + 1e-4
    divides = kind == "divides"
    return prepare_nvfp4(codes, scale, 1 / whole if divides else whole, divides=divides)


def meaning(weight: PackedWeight) -> np.ndarray:
    """Return the float32 numbers of a weight `[N, K]`, one operation after the other."""
    codes, scale = weight.codes.numpy(), weight.scale.numpy()
    table = np.array([*E2M1, *(-number for number in E2M1)], np.float32)
    nibbles = np.stack([codes & 15, codes >> 4], -1).reshape(len(codes), -1)
    if isinstance(weight, Nvfp4Weight):
        number, whole = weight.scale.view(torch.float8_e4m3fn).float().numpy(), np.float32(weight.whole.item())
        spread = number / whole if weight.divides else number * whole
    else:
        spread = np.ldexp(np.float32(1), scale.astype(np.int32) - 127)
    return table[nibbles] * spread.repeat(weight.block[1], 1)


def test_all_codes_at_all_scales_of_nvfp4() -> None:
    """16 codes times 127 scales times both forms of a tensor scale mean what is said of them, rounded once."""
    codes = torch.tensor([[2 * pair | 2 * pair + 1 << 4 for pair in range(8)] * 2]).to(torch.uint8).repeat(127, 1)
    scale = torch.arange(127, dtype=torch.uint8)[:, None].repeat(1, 2)
    for whole, divides in ((0.000123, False), (8191.7, True), (0.3, True), (1.0, False)):
        weight = prepare_nvfp4(codes, scale, torch.tensor(whole), divides=divides)
        exact = torch.from_numpy(meaning(weight))
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert torch.equal(weight.dequantize(dtype), exact.to(dtype))
            assert torch.equal(dispatch.dequantize(weight, dtype), exact.to(dtype))


def test_all_codes_at_all_scales_of_mxfp4() -> None:
    """16 codes times the powers of two that float32 has room for are exact in it and in BF16, down to 2^-128."""
    codes = torch.tensor([[2 * pair | 2 * pair + 1 << 4 for pair in range(8)] * 2]).to(torch.uint8).repeat(253, 1)
    weight = prepare_mxfp4(codes, torch.arange(253, dtype=torch.uint8)[:, None])
    exact = torch.from_numpy(meaning(weight))
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(weight.dequantize(dtype).float(), exact)
        assert torch.equal(dispatch.dequantize(weight, dtype).float(), exact)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_products(kind: str, dtype: torch.dtype) -> None:
    """Products of one row and of many, gradients and a layer of experts are those of the dequantised weights."""
    weight = fp4(kind, 600, 96)
    for rows in (1, 5, 33):
        x = torch.randn(rows, 96, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
        out = linear(x, weight)
        (grad,) = torch.autograd.grad(out.sum(), x)
        assert torch.allclose(out, reference.linear(x, weight), rtol=2**-6, atol=2**-6)
        assert torch.allclose(grad, reference.linear_backward(torch.ones_like(out), weight), rtol=2**-6, atol=2**-5)
    gate, up, down = fp4(kind, 4, 64, 96, seed=3), fp4(kind, 4, 64, 96, seed=6), fp4(kind, 4, 96, 64, seed=9)
    ids, weights = torch.tensor([[0, 3], [1, 0], [-1, 2]]), torch.rand(3, 2).requires_grad_()
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(4)).to(dtype).requires_grad_()
    routed = moe(x, gate, up, down, ids, weights)
    wanted = reference.moe(x, gate, up, down, ids, weights)
    assert (routed - wanted).norm() <= 2**-6 * wanted.norm()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(routed.sum(), (x, weights)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 7, 60])
def test_sorting_tokens_changes_no_bit(kind: str, tokens: int) -> None:
    """Each expert's own tensor scale counts, whichever tokens it gets beside others."""
    gate, up, down = fp4(kind, 4, 64, 96, seed=3), fp4(kind, 4, 64, 96, seed=6), fp4(kind, 4, 96, 64, seed=9)
    x = torch.randn(tokens, 96, generator=torch.Generator().manual_seed(tokens)).bfloat16()
    ids = torch.randint(-1, 5, (tokens, 3), generator=torch.Generator().manual_seed(1))
    weights = torch.rand(tokens, 3, generator=torch.Generator().manual_seed(2))
    wanted = reference.moe(x, gate, up, down, ids, weights, product=linear_cpu.linear)
    assert torch.equal(moe_cpu.moe(x, gate, up, down, ids, weights), wanted)


def test_opcheck() -> None:
    """The checks that torch has for operators pass with the third tensor, too."""
    kind, ops = "divides", torch.ops.k2quant
    weight = fp4(kind, 64, 96)
    opcheck(ops.linear.default, (torch.randn(3, 96, requires_grad=True), *operands(weight)))
    stacks = fp4(kind, 3, 96, 64), fp4(kind, 3, 96, 64), fp4(kind, 3, 64, 96)
    tensors = [tensor for part in stacks for tensor in operands(part)[:3]]
    x, ids = torch.randn(5, 64, requires_grad=True), torch.randint(0, 3, (5, 2))
    opcheck(ops.moe.default, (x, *tensors, ids, torch.rand(5, 2, requires_grad=True), operands(stacks[0])[3]))


def test_compiled_code_gives_the_same_bits() -> None:
    """Under torch.compile its products are one graph, with the bits of eager ones."""
    weight = fp4("divides", 64, 96)
    compiled = torch.compile(lambda x: linear(x, weight), backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (1, 3):
        x = torch.randn(rows, 96)
        assert torch.equal(compiled(x), linear(x, weight))


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_finds_its_way(kind: str) -> None:
    """What a weight was made of makes it again, an expert and some rows of it are its own, and warming up knows it."""
    weight = fp4(kind, 2, 64, 96)
    again = type(weight).of(weight.bits, weight.scale, weight.layout, weight.numbers, weight.whole)
    for other in (weight.prepared(*weight.checkpoint()), moved(weight, torch.device("cpu")), again):
        other.check()
        assert torch.equal(other.dequantize(), weight.dequantize())
    whole = weight.dequantize(torch.float32)
    assert torch.equal(weight.expert(1).dequantize(torch.float32), whole[1])
    assert torch.equal(weight.expert(1).rows(5, 40).dequantize(torch.float32), whole[1, 5:40])
    assert moved(weight, torch.device("meta")).codes.is_meta
    alike = weight.empty_like("meta")
    assert (alike.shape, alike.numbers) == (weight.shape, weight.numbers)
    assert warmup([weight.expert(0)], rows=1) == 1


CODES, SCALE = torch.zeros(4, 16, dtype=torch.uint8), torch.full((4, 2), 0x38, dtype=torch.uint8)
ONE = torch.tensor(1.0)


def nvfp4(*, codes: Tensor = CODES, scale: Tensor = SCALE, whole: Tensor = ONE, divides: bool = False) -> Nvfp4Weight:
    """Prepare a weight of which one part may be wrong."""
    return prepare_nvfp4(codes, scale, whole, divides=divides)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nvfp4(codes=CODES.int()), "expected uint8 codes and torch.float8_e4m3fn weight_scale, found torch.in"),
        (lambda: nvfp4(scale=SCALE.float()), "found torch.uint8 and torch.float32"),
        (lambda: nvfp4(codes=CODES[:, :8]), "K a multiple of 32, found [4, 8]"),
        (lambda: nvfp4(scale=SCALE[:, :1]), "expected [4, 2] for codes [4, 16], found [4, 1]"),
        (lambda: nvfp4(scale=SCALE + 0x47), "negative or NaN scale"),
        (lambda: nvfp4(scale=SCALE + 0x80), "negative or NaN scale"),
        (lambda: nvfp4(whole=ONE.double()), "tensor scale: expected float32, one number, found torch.float64 []"),
        (lambda: nvfp4(whole=ONE.repeat(4)), "one number, found torch.float32 [4]"),
        (lambda: nvfp4(whole=ONE * torch.nan), "negative, NaN, infinite or divides by zero"),
        (lambda: nvfp4(whole=-ONE), "negative, NaN, infinite or divides by zero"),
        (lambda: nvfp4(whole=ONE * 0, divides=True), "negative, NaN, infinite or divides by zero"),
        (lambda: nvfp4(whole=ONE.to("meta")), "codes lie on cpu but their scale on meta"),
        (lambda: prepare_mxfp4(CODES, SCALE[:, :1] + 199), "NaN scale, the byte 255"),
        (lambda: prepare_mxfp4(CODES, SCALE), "expected [4, 1] for codes [4, 16], found [4, 2]"),
        (lambda: prepare_mxfp4(CODES, SCALE[:, :1].float()), "expected uint8 codes and torch.uint8 weight_scale"),
    ],
)
def test_misfits_are_named(call: Callable[[], object], message: str) -> None:
    """What does not fit is refused with both sides named."""
    with pytest.raises(UsageError) as caught:
        call()
    assert message in str(caught.value)


def test_damaged_weights_never_reach_a_kernel() -> None:
    """A weight put together by hand, cut or moved in part, is refused: kernels would read beyond it."""
    x = torch.ones(2, 32)
    for weight in (
        Nvfp4Weight(CODES, SCALE[:3].clone(), ONE, divides=False),
        Nvfp4Weight(CODES, SCALE, ONE.repeat(2), divides=False),
        Nvfp4Weight(CODES, SCALE, ONE.to("meta"), divides=False),
        Mxfp4Weight(CODES, SCALE),
    ):
        with pytest.raises(UsageError, match=r"expected|lie on"):
            linear(x, weight)
    with pytest.raises(UsageError, match="tensor scale"):
        nvfp4().holding(CODES, SCALE)
    stacks = [fp4(kind, 2, 32, 32) for kind in ("multiplies", "divides")]
    with pytest.raises(UsageError, match="gate, up and down: expected weights of one kind, found nvfp4 0, 1"):
        moe(x, stacks[0], stacks[1], stacks[0], torch.zeros(2, 1).int(), torch.ones(2, 1))


def test_zeros_with_a_tensor_scale_of_zero() -> None:
    """A matrix of zeros may have a tensor scale of zero that multiplies: its weights are zeros."""
    weight = nvfp4(whole=ONE * 0)
    assert torch.equal(linear(torch.ones(2, 32).bfloat16(), weight), torch.zeros(2, 4).bfloat16())
