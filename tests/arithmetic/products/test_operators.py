"""The products as a user calls them, on the CPU: shapes, numbers, gradients, torch.compile, errors."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from k2quant.errors import UsageError
from k2quant.kernels.codecs.reference import pack_int4
from k2quant.kernels.ops import (
    Fp8Weight,
    Int4Weight,
    fp8_linear,
    fp8_linear_w8a8,
    int4_linear,
    linear,
    moe,
    moe_fp8,
    moe_int4,
    prepare_fp8,
    prepare_int4,
)
from k2quant.kernels.products import prepare
from k2quant.kernels.products import reference as matmul_reference
from k2quant.kernels.products.cpu import dot as dot_cpu
from k2quant.kernels.products.cpu import linear as linear_cpu
from k2quant.kernels.products.cpu import moe as moe_cpu
from k2quant.kernels.products.linear import operands
from k2quant.kernels.products.packed.fp8 import spread
from k2quant.kernels.products.packed.weight import Layout

LAYOUTS: tuple[Layout, ...] = ("rows", "groups", "torch")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
OPS = torch.ops.k2quant


def int4_weight(*shape: int, layout: Layout | None = None, integers: bool = False, seed: int = 0) -> Int4Weight:
    """Return random INT4 weights `[.., N, K]`; with `integers`, scales are powers of two: products are exact."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, shape, generator=generator)
    scale = torch.rand(*shape[:-1], shape[-1] // 32, generator=generator) * 0.01 + 0.001
    if integers:
        scale = 2.0 ** torch.randint(-1, 2, scale.shape, generator=generator)
    return prepare_int4(pack_int4(codes), scale.bfloat16(), layout=layout)


def fp8_weight(*shape: int, block: tuple[int, int] = (128, 128), integers: bool = False) -> Fp8Weight:
    """Return random FP8 weights `[.., N, K]`."""
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(*shape, generator=generator) * 50
    if integers:
        values = torch.randint(-8, 9, shape, generator=generator).float()
    scale = (
        torch.rand(*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]), generator=generator) * 1e-3 + 1e-4
    )
    if integers:
        scale = 2.0 ** torch.randint(-1, 2, scale.shape, generator=generator).float()
    return prepare_fp8(values.clamp(-448, 448).to(torch.float8_e4m3fn), scale, block=block)


def truth(weight: Int4Weight | Fp8Weight) -> Tensor:
    """Return float64 weights with unrounded code * scale."""
    if isinstance(weight, Fp8Weight):
        return weight.codes.double() * spread(weight.scale.double(), weight.block, weight.shape)
    packed, scale = weight.checkpoint()
    shifts = torch.arange(0, 32, 4)
    codes = (((packed[..., None] >> shifts) & 15) - 8).flatten(-2)
    return codes.double() * scale.double().repeat_interleave(32, -1)


def relative_error(out: Tensor, exact: Tensor) -> float:
    """Return ||out - exact|| / ||exact||."""
    return float((out.double() - exact).norm() / exact.norm())


def assert_as_good_as_dequantized(out: Tensor, x: Tensor, weight: Int4Weight | Fp8Weight) -> None:
    """Hold a product to 1.05 times the error of dequantising and multiplying in the same dtype.

    In float32 nothing but the order of the sum makes that error, so one rounding of the result is allowed on top.
    """
    exact = x.double() @ truth(weight).T
    plain = relative_error(torch.nn.functional.linear(x, weight.dequantize(x.dtype)), exact)
    assert relative_error(out, exact) <= 1.05 * plain + 2**-24


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [1, 5, 17, 200])
def test_int4_linear_is_as_good_as_dequantizing(layout: Layout, dtype: torch.dtype, rows: int) -> None:
    """In every layout, dtype and height, the error against float64 is at most 1.05 times that of plain weights."""
    weight = int4_weight(576, 1024, layout=layout)
    x = torch.randn(rows, 1024, generator=torch.Generator().manual_seed(rows)).to(dtype)
    out = int4_linear(x, weight)
    assert out.dtype == dtype
    assert out.shape == (rows, 576)
    assert_as_good_as_dequantized(out, x, weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 5, 200])
@pytest.mark.parametrize("block", [(128, 128), (1, 128)])
def test_fp8_linear_is_as_good_as_dequantizing(dtype: torch.dtype, rows: int, block: tuple[int, int]) -> None:
    """The same for block-FP8, 1x128 blocks and a ragged last block of rows included."""
    weight = fp8_weight(320, 512, block=block)
    x = torch.randn(rows, 512, generator=torch.Generator().manual_seed(rows)).to(dtype)
    assert_as_good_as_dequantized(fp8_linear(x, weight), x, weight)


@pytest.mark.parametrize(("layout", "rows"), list(product(LAYOUTS, [1, 16, 40, 150])))
def test_integers_come_out_exactly(layout: Layout, rows: int) -> None:
    """With small integers and scales that are powers of two nothing rounds, so every backend gives equal bits."""
    weight = int4_weight(64, 96, layout=layout, integers=True)
    x = torch.randint(-2, 3, (rows, 96), generator=torch.Generator().manual_seed(3)).bfloat16()
    exact = (x.double() @ truth(weight).T).bfloat16()
    assert torch.equal(int4_linear(x, weight), exact)
    fp8 = fp8_weight(64, 96, integers=True)
    assert torch.equal(fp8_linear(x, fp8), (x.double() @ truth(fp8).T).bfloat16())


def test_w8a8_is_the_product_of_rounded_activations() -> None:
    """Activations are rounded in blocks of 1x128 by amax/448; what is left is a float32 product; zeros give zeros."""
    weight = fp8_weight(130, 160)
    x = torch.randn(3, 160).bfloat16()
    x[1] = 0
    codes, scale = matmul_reference.fp8_quantize_activations(x)
    rounded = codes.double() * spread(scale.double(), (1, 128), codes.shape)
    out = fp8_linear_w8a8(x, weight)
    assert relative_error(out, rounded @ truth(weight).T) < 2**-8
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    assert relative_error(rounded, x.double()) < 0.04


@pytest.mark.parametrize("shape", [(0, 96), (2, 0, 96), (2, 3, 96), (96,)])
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    """There may be any number of leading dimensions, none and empty ones included."""
    weight = int4_weight(48, 96)
    x = torch.randn(shape).bfloat16()
    out = int4_linear(x, weight)
    assert out.shape == (*shape[:-1], 48)
    assert torch.equal(out.reshape(-1, 48), int4_linear(x.reshape(-1, 96), weight))


def test_strided_input_is_the_same_as_contiguous() -> None:
    """Rows with gaps, a transposed x and a step along K give the bits of their contiguous copy."""
    weight = int4_weight(48, 96)
    base = torch.randn(96, 4, 2, generator=torch.Generator().manual_seed(5)).bfloat16()
    for x in (base[:, :, 0].T, base.transpose(0, 1)[..., 1], torch.randn(4, 192).bfloat16()[:, ::2]):
        assert not x.is_contiguous()
        assert torch.equal(int4_linear(x, weight), int4_linear(x.contiguous(), weight))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(64, 32), (576, 96), (3, 48, 64)])
def test_layouts_give_the_checkpoint_back(layout: Layout, shape: tuple[int, ...]) -> None:
    """Every layout is invertible bit for bit; on a GPU it takes the same bytes, on a CPU at most 1.12 times."""
    generator = torch.Generator().manual_seed(7)
    packed = torch.randint(-(2**31), 2**31, (*shape[:-1], shape[-1] // 8), dtype=torch.int64, generator=generator)
    scale = torch.rand(*shape[:-1], shape[-1] // 32, generator=generator).bfloat16()
    weight = prepare_int4(packed.int(), scale, layout=layout)
    back, back_scale = weight.checkpoint()
    assert weight.shape == shape
    assert torch.equal(back, packed.int())
    assert torch.equal(back_scale, scale)
    allowed = 1.12 if layout == "torch" else 1.0
    assert weight.nbytes <= allowed * (back.nbytes + back_scale.nbytes)


def test_the_layout_of_a_gpu_is_as_documented() -> None:
    """Column 16q + 4s + 2p + h of a row's group g stands in nibble s + 4h of word (g, row, 2p + q)."""
    codes = torch.randint(-8, 8, (3, 64), generator=torch.Generator().manual_seed(2))
    weight = prepare_int4(pack_int4(codes), torch.ones(3, 2).bfloat16(), layout="groups")
    for row, group, p, q, s, h in product(range(3), range(2), range(2), range(2), range(4), range(2)):
        word = int(weight.codes[group, row, 2 * p + q])
        column = 32 * group + 16 * q + 4 * s + 2 * p + h
        assert ((word >> (4 * (s + 4 * h))) & 15) - 8 == codes[row, column]


def test_gradient_is_that_of_the_plain_weight() -> None:
    """The gradient of x is grad @ W, for each format; the weight has none."""
    int4, fp8 = int4_weight(96, 64), fp8_weight(96, 64)
    cases: list[tuple[Callable[[Tensor], Tensor], Int4Weight | Fp8Weight]] = [
        (lambda x: int4_linear(x, int4), int4),
        (lambda x: fp8_linear(x, fp8), fp8),
        (lambda x: fp8_linear_w8a8(x, fp8), fp8),
    ]
    for op, weight in cases:
        x, grad = torch.randn(2, 5, 64, requires_grad=True), torch.randn(2, 5, 96)
        (found,) = torch.autograd.grad(op(x), x, grad)
        assert relative_error(found, grad.double() @ truth(weight)) < 1e-6


@pytest.fixture
def experts() -> dict[str, tuple[Int4Weight | Fp8Weight, ...]]:
    """Six experts of 64 features and 96 inner ones, in both formats: gate, up, down."""
    shapes = ((6, 96, 64), (6, 96, 64), (6, 64, 96))
    return {
        "int4": tuple(int4_weight(*shape, seed=seed) for seed, shape in enumerate(shapes)),
        "fp8": tuple(fp8_weight(*shape) for shape in shapes),
    }


def plain_moe(x: Tensor, parts: tuple[Int4Weight | Fp8Weight, ...], ids: Tensor, weights: Tensor) -> Tensor:
    """Return the layer of experts in float64, one pair at a time."""
    gate, up, down = (truth(part) for part in parts)
    out = torch.zeros_like(x, dtype=torch.float64)
    for token, slot in product(range(ids.shape[0]), range(ids.shape[1])):
        expert = int(ids[token, slot])
        if 0 <= expert < gate.shape[0]:
            row = x[token].double()
            hidden = torch.nn.functional.silu(gate[expert] @ row) * (up[expert] @ row)
            out[token] = out[token] + weights[token, slot].double() * (down[expert] @ hidden)
    return out


@pytest.mark.parametrize("kind", ["int4", "fp8"])
@pytest.mark.parametrize("ids", ["random", "one", "none", "mixed"])
def test_moe_sums_its_experts(kind: str, ids: str, experts: dict[str, tuple[Int4Weight | Fp8Weight, ...]]) -> None:
    """Random routing, all tokens on one expert, no expert at all, and ids that are no expert: all as one by one."""
    chosen = {
        "random": torch.randint(0, 6, (7, 3), generator=torch.Generator().manual_seed(0)),
        "one": torch.full((7, 3), 4),
        "none": torch.full((7, 3), -1),
        "mixed": torch.tensor([[-1, 0, 5], [5, 5, 6], [1000, -7, 2]] * 2 + [[3, -1, 0]]),
    }[ids].int()
    x, weights = torch.randn(7, 64), torch.rand(7, 3)
    op: Callable[..., Tensor] = moe_int4 if kind == "int4" else moe_fp8
    out = op(x, *experts[kind], chosen, weights)
    assert torch.allclose(out.double(), plain_moe(x, experts[kind], chosen, weights), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["int4", "fp8"])
def test_moe_gradients(kind: str, experts: dict[str, tuple[Int4Weight | Fp8Weight, ...]]) -> None:
    """The gradients for x and for the router's weights are those of the layer written out in float64."""
    op: Callable[..., Tensor] = moe_int4 if kind == "int4" else moe_fp8
    ids = torch.tensor([[0, 3], [3, 5], [-1, 2], [2, 2]])
    x, weights, grad = torch.randn(4, 64), torch.rand(4, 2), torch.randn(4, 64)
    found = torch.autograd.grad(
        op(x.requires_grad_(), *experts[kind], ids, weights.requires_grad_()), (x, weights), grad
    )
    wide = x.detach().double().requires_grad_(), weights.detach().double().requires_grad_()
    expected = torch.autograd.grad(plain_moe(wide[0], experts[kind], ids, wide[1]), wide, grad.double())
    for got, right in zip(found, expected, strict=True):
        assert relative_error(got, right) < 1e-4


def test_moe_of_no_tokens(experts: dict[str, tuple[Int4Weight | Fp8Weight, ...]]) -> None:
    """No tokens give no rows."""
    op: Callable[..., Tensor] = moe_int4
    out = op(torch.empty(0, 64), *experts["int4"], torch.empty(0, 2).int(), torch.empty(0, 2))
    assert out.shape == (0, 64)


@pytest.mark.parametrize("kind", ["int4", "fp8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 7, 700])
def test_sorting_tokens_changes_no_bit(
    kind: str, dtype: torch.dtype, tokens: int, experts: dict[str, tuple[Int4Weight | Fp8Weight, ...]]
) -> None:
    """On a CPU tokens are sorted by expert; each product and the sum's order are those of the experts one by one."""
    generator = torch.Generator().manual_seed(tokens)
    x, weights = torch.randn(tokens, 64, generator=generator).to(dtype), torch.rand(tokens, 3, generator=generator)
    ids = torch.randint(-1, 8, (tokens, 3), generator=generator)
    gate, up, down = experts[kind]
    wanted = matmul_reference.moe(x, gate, up, down, ids, weights, product=linear_cpu.linear)
    assert torch.equal(moe_cpu.moe(x, gate, up, down, ids, weights), wanted)


@pytest.mark.parametrize("code", range(256))
def test_the_two_nan_codes_are_refused_and_no_other(code: int) -> None:
    """Wherever it stands among codes of both signs, 0x7F or 0xFF is found; the largest numbers beside them are not."""
    codes = torch.tensor([0x00, 0x7E, 0xFE, 0x80], dtype=torch.uint8).repeat(2, 3, 8)
    codes[1, 2, 17] = code
    scale = torch.ones(2, 1, 1)
    if code in {0x7F, 0xFF}:
        with pytest.raises(UsageError, match="NaN"):
            prepare_fp8(codes.view(torch.float8_e4m3fn), scale)
    else:
        prepare_fp8(codes.view(torch.float8_e4m3fn), scale)


def test_opcheck(experts: dict[str, tuple[Int4Weight | Fp8Weight, ...]]) -> None:
    """The checks that torch has for operators pass: schema, fake kernels, gradients, tracing with dynamic shapes."""
    int4, fp8 = int4_weight(64, 96), fp8_weight(64, 96)
    for x in (torch.randn(3, 96, requires_grad=True), torch.randn(2, 1, 96, dtype=torch.bfloat16)):
        opcheck(OPS.linear.default, (x, int4.codes, int4.scale, None, f"int4/{int4.layout}"))
        opcheck(OPS.linear.default, (x, fp8.codes.view(torch.uint8), fp8.scale, None, "fp8/rows/128/128"))
        opcheck(OPS.fp8_linear_w8a8.default, (x, fp8.codes.view(torch.uint8), fp8.scale, None, "fp8/rows/128/128"))
    x, ids = torch.randn(5, 64, requires_grad=True), torch.randint(0, 6, (5, 2))
    weights = torch.rand(5, 2, requires_grad=True)
    for stacks in experts.values():
        parts = [tensor for part in stacks for tensor in operands(part)[:3]]
        opcheck(OPS.moe.default, (x, *parts, ids, weights, *operands(stacks[0])[3:]))


@pytest.mark.parametrize("kind", ["int4", "fp8"])
def test_compiled_code_gives_the_same_bits(kind: str, experts: dict[str, tuple[Int4Weight | Fp8Weight, ...]]) -> None:
    """Under torch.compile, in one graph and with changing numbers of rows, values and gradients are those of eager."""
    weight, (gate, up, down) = int4_weight(64, 64) if kind == "int4" else fp8_weight(64, 64), experts[kind]

    def layer(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        routed = moe(linear(x, weight), gate, up, down, ids, weights)
        return torch.nn.functional.silu(routed) + x

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (1, 3, 8):
        x = torch.randn(rows, 64, requires_grad=True)
        ids, weights = torch.randint(0, 6, (rows, 2)), torch.rand(rows, 2)
        eager, fast = layer(x, ids, weights), compiled(x, ids, weights)
        assert torch.equal(eager, fast)
        gradients = [torch.autograd.grad(out.sum(), x)[0] for out in (eager, fast)]
        assert torch.equal(*gradients)


def test_same_bits_from_run_to_run() -> None:
    """Fifty calls give the same bits, whatever the threads do."""
    weight, x = int4_weight(576, 512), torch.randn(7, 512).bfloat16()
    first = int4_linear(x, weight)
    assert all(torch.equal(first, int4_linear(x, weight)) for _ in range(50))


PACKED, SCALE = torch.zeros(64, 12, dtype=torch.int32), torch.ones(64, 3).bfloat16()
CODES, SCALE_INV = torch.zeros(130, 160).to(torch.float8_e4m3fn), torch.ones(2, 2)
NANS = (CODES.view(torch.uint8) + 127).view(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: prepare_int4(PACKED.long(), SCALE), "expected int32 weight_packed and bfloat16 weight_scale, found"),
        (lambda: prepare_int4(PACKED, SCALE.float()), "found torch.int32 and torch.float32"),
        (lambda: prepare_int4(PACKED[:, :11], SCALE), "K a multiple of 32, found [64, 11]"),
        (lambda: prepare_int4(PACKED, SCALE[:, :2]), "expected [64, 3] for weight_packed [64, 12], found [64, 2]"),
        (lambda: prepare_int4(PACKED, SCALE * torch.nan), "negative, NaN or infinite scale"),
        (lambda: prepare_int4(PACKED, -SCALE), "negative, NaN or infinite scale"),
        (lambda: prepare_fp8(CODES.float(), SCALE_INV), "expected float8_e4m3fn weight"),
        (lambda: prepare_fp8(CODES, SCALE_INV[:1]), "expected [2, 2] for weight [130, 160] in blocks of 128x128"),
        (lambda: prepare_fp8(CODES, SCALE_INV, block=(128, 100)), "blocks of 128x100"),
        (lambda: prepare_fp8(CODES[:, :150], SCALE_INV), "multiple of 32 columns, found 150"),
        (lambda: prepare_fp8(NANS, SCALE_INV), "found NaN"),
        (lambda: int4_linear(torch.ones(2, 64), int4_weight(48, 96)), "expected [.., 96] for a weight of [48, 96]"),
        (lambda: int4_linear(torch.ones(2, 96).long(), int4_weight(48, 96)), "float16 or float32, found torch.int64"),
        (lambda: int4_linear(torch.ones(2, 96), int4_weight(2, 48, 96)), "expected [N, K], found [2, 48, 96]"),
        (lambda: int4_linear(torch.ones(2, 96, device="meta"), int4_weight(48, 96)), "x lies on meta but the weight"),
    ],
)
def test_misfits_are_named(call: Callable[[], object], message: str) -> None:
    """What does not fit is refused with both sides named."""
    with pytest.raises(UsageError) as caught:
        call()
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", lambda: torch.ones(2, 3, 64), "x: expected [T, H], found [2, 3, 64]"),
        ("x", lambda: torch.ones(2, 32), "expected [.., 64]"),
        ("up", lambda: int4_weight(6, 64, 64), "up: expected [6, 96, 64] like gate, found [6, 64, 64]"),
        ("down", lambda: int4_weight(6, 64, 64), "expected [6, 64, 96] for gate [6, 96, 64], found [6, 64, 64]"),
        ("up", lambda: int4_weight(6, 96, 64, layout="groups"), "expected one layout, found groups, "),
        ("ids", lambda: torch.zeros(3, 2).int(), "ids: expected int32 or int64 [2, k]"),
        ("ids", lambda: torch.zeros(2, 2), "found torch.float32 [2, 2]"),
        ("weights", lambda: torch.ones(2, 3), "weights: expected floats [2, 2] like ids"),
    ],
)
def test_misfits_of_experts_are_named(name: str, value: Callable[[], object], message: str) -> None:
    """The same for a layer of experts."""
    arguments: dict[str, object] = {
        "x": torch.ones(2, 64),
        "gate": int4_weight(6, 96, 64),
        "up": int4_weight(6, 96, 64),
        "down": int4_weight(6, 64, 96),
        "ids": torch.zeros(2, 2).int(),
        "weights": torch.ones(2, 2),
    }
    with pytest.raises(UsageError) as caught:
        moe_int4(**(arguments | {name: value()}))  # type: ignore[arg-type]
    assert message in str(caught.value)


COLUMNS: Any = "columns"
"""No layout."""


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (lambda w, _: Int4Weight(w.codes, w.scale[:8].clone(), "rows"), "expected scales [64, 3] for codes [64, 12]"),
        (lambda w, _: Int4Weight(w.codes, w.scale.to("meta"), "rows"), "codes lie on cpu but their scale on meta"),
        (lambda w, _: Int4Weight(w.codes, w.scale.float(), "rows"), "torch.bfloat16 scales, found torch.int32 and"),
        (lambda w, _: Int4Weight(w.codes.T.contiguous().T, w.scale, "rows"), "expected contiguous codes and scales"),
        (lambda w, _: Int4Weight(w.codes, w.scale, COLUMNS), "layout: expected rows, groups, torch, found columns"),
        (lambda _, f: f, "expected an Int4Weight from prepare_int4, found Fp8Weight"),
        (lambda w, _: w.codes, "expected an Int4Weight from prepare_int4, found Tensor"),
    ],
)
def test_damaged_weights_never_reach_a_kernel(weight: Callable[..., Int4Weight], message: str) -> None:
    """A weight put together by hand, cut or moved in part, is refused: kernels would read beyond it."""
    with pytest.raises(UsageError) as caught:
        int4_linear(torch.ones(2, 96), weight(int4_weight(64, 96, layout="rows"), fp8_weight(64, 96)))
    assert message in str(caught.value)


def test_a_cut_fp8_weight_is_refused() -> None:
    """Columns cut out of an FP8 weight, or another block than it has, are refused."""
    whole = fp8_weight(64, 256)
    for wrong in (
        Fp8Weight(whole.codes[:, 128:], whole.scale[:, 1:], (128, 128)),
        Fp8Weight(whole.codes, whole.scale, (64, 64)),
    ):
        with pytest.raises(UsageError, match="expected"):
            fp8_linear(torch.ones(2, wrong.shape[1]).bfloat16(), wrong)


def test_autocast_changes_nothing() -> None:
    """Under autocast the operators compute in the dtypes that they are given, and return those."""
    weight = int4_weight(64, 96)
    x = torch.randn(3, 96, requires_grad=True)
    plain = int4_linear(x, weight)
    with torch.autocast("cpu", torch.bfloat16):
        cast = int4_linear(x, weight)
        (gradient,) = torch.autograd.grad(cast.sum(), x)
    assert torch.equal(cast, plain)
    assert torch.equal(gradient, torch.autograd.grad(plain.sum(), x)[0])


def test_forward_mode_is_refused() -> None:
    """A jvp would be silently zero."""
    weight, x = int4_weight(64, 96), torch.randn(3, 96)
    with pytest.raises(UsageError, match="forward-mode"):
        torch.func.jvp(lambda rows: int4_linear(rows, weight), (x,), (x,))


@pytest.mark.parametrize("shape", [(0, 96), (64, 0), (0, 0)])
def test_empty_weights(shape: tuple[int, int]) -> None:
    """Weights without rows or columns give empty results or zeros, and gradients."""
    four = prepare_int4(torch.zeros(shape[0], shape[1] // 8).int(), torch.zeros(shape[0], shape[1] // 32).bfloat16())
    eight = prepare_fp8(
        torch.zeros(shape).to(torch.float8_e4m3fn), torch.zeros(-(-shape[0] // 128), -(-shape[1] // 128))
    )
    for out in (int4_linear(torch.ones(2, shape[1]), four), fp8_linear(torch.ones(2, shape[1]), eight)):
        assert torch.equal(out, torch.zeros(2, shape[0]))
    x = torch.ones(2, shape[1], requires_grad=True)
    assert torch.autograd.grad(int4_linear(x, four).sum(), x)[0].shape == x.shape


def test_without_fast_paths_the_panels_take_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU that neither multiplies BF16 nor has torch's INT4 operator, panels give products as good."""
    monkeypatch.setattr(dot_cpu, "supported", lambda: False)
    weight = int4_weight(200, 256, layout="rows")
    for rows in (1, 40):
        x = torch.randn(rows, 256).bfloat16()
        assert_as_good_as_dequantized(int4_linear(x, weight), x, weight)
    monkeypatch.setattr(linear_cpu, "_torch_operator_wins", lambda: True)
    linear_cpu.best_layout.cache_clear()
    try:
        assert int4_weight(64, 64).layout == "torch"
        assert int4_weight(40, 64).layout == "rows"
    finally:
        linear_cpu.best_layout.cache_clear()


@pytest.mark.parametrize("weight", [int4_weight(64, 96), fp8_weight(64, 96)], ids=lambda weight: weight.format)
def test_one_name_serves_every_format(weight: Int4Weight | Fp8Weight) -> None:
    """`linear` and `moe` give what the functions of a weight's format give."""
    x = torch.randn(3, 96)
    products: dict[str, Callable[..., Tensor]] = {"int4": int4_linear, "fp8": fp8_linear}
    assert torch.equal(linear(x, weight), products[weight.format](x, weight))
    with pytest.raises(UsageError, match=r"an Int4Weight from prepare_int4 or .* from prepare_mxfp4, found Ten"):
        linear(x, x)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="up: expected an Fp8Weight from prepare_fp8, found Int4Weight"):
        moe(x, fp8_weight(2, 64, 96), int4_weight(2, 64, 96), fp8_weight(2, 96, 64), x[:, :1].int(), x[:, :1])


@pytest.mark.parametrize(
    "weight",
    [*(int4_weight(144, 96, layout=layout) for layout in LAYOUTS), fp8_weight(144, 96, block=(10, 32))],
    ids=lambda weight: f"{weight.format}-{weight.layout}",
)
def test_rows_are_those_of_the_whole_weight(weight: Int4Weight | Fp8Weight) -> None:
    """Any range of rows, whatever the layout keeps together, holds the numbers of the whole weight's rows."""
    whole = weight.dequantize(torch.float32)
    for first, last in ((0, 144), (0, 64), (64, 144), (20, 40), (17, 18), (5, 139)):
        assert torch.equal(weight.rows(first, last).dequantize(torch.float32), whole[first:last])


@pytest.mark.parametrize(
    "weight",
    [*(int4_weight(2, 64, 96, layout=layout) for layout in LAYOUTS), fp8_weight(2, 64, 96)],
    ids=lambda weight: f"{weight.format}-{weight.layout}",
)
def test_a_weight_finds_its_way(weight: Int4Weight | Fp8Weight) -> None:
    """What a weight was made of makes it again, here and, in the layout that is best there, elsewhere."""
    same = weight.prepared(*weight.checkpoint())
    moved = prepare.moved(weight, torch.device("cpu"))
    again = type(weight).of(weight.bits, weight.scale, weight.layout, weight.numbers)
    for other in (same, moved, again, weight.holding(weight.codes, weight.scale)):
        other.check()
        pairs = zip(other.checkpoint(), weight.checkpoint(), strict=True)
        assert all(torch.equal(found.view(torch.uint8), wanted.view(torch.uint8)) for found, wanted in pairs)
    assert moved.layout == prepare.best_layout(torch.device("cpu"), 64, type(weight))
    alike = weight.empty_like("meta")
    assert (alike.shape, alike.layout, alike.numbers) == (weight.shape, weight.layout, weight.numbers)
    assert prepare.moved(weight, torch.device("meta")).layout == weight.layout
    made = prepare.empty(weight.format, (2, 64, 96), device="meta", for_device=torch.device("cuda"))
    assert (made.shape, made.layout, made.numbers) == (weight.shape, weight.gpu_layout, weight.numbers)
