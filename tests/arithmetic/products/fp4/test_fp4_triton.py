"""FP4 weights in the Triton kernels: dequantised, multiplied, as experts. Interpreted where there is no GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl

from k2quant.kernels.devices.launch import launch, recorded
from k2quant.kernels.ops import Mxfp4Weight, Nvfp4Weight, prepare_mxfp4, prepare_nvfp4
from k2quant.kernels.products import reference
from k2quant.kernels.products.gpu import moe as moe_triton
from k2quant.kernels.products.gpu import moe_backward as moe_backward_triton
from k2quant.kernels.products.gpu.dequantize import dequantize
from k2quant.kernels.products.gpu.linear import linear
from k2quant.kernels.products.tables.configs import Config

Weight = Nvfp4Weight | Mxfp4Weight

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
KINDS = ["multiplies", "divides", "mxfp4"]
TILE = Config(rows=16, columns=64, depth=128, splits=1, warps=4, stages=2)
VECTOR = Config(form="vector", columns=64, depth=128, splits=1, warps=4, stages=1)
FORMS = [pytest.param(TILE, id="tile"), pytest.param(VECTOR, id="vector")]
RUNS = pytest.mark.parametrize(
    ("config", "dtype"),
    [(TILE, torch.bfloat16), (TILE, torch.float16), (VECTOR, torch.bfloat16)],
    ids=["tile-bf16", "tile-fp16", "vector-bf16"],
)
SHAPES = [(1, 1, 32), (3, 48, 96), (2, 65, 640)]


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    """Give every test the same random numbers."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        yield


def poisoned(part: Tensor) -> Tensor:
    """Return a copy inside a larger buffer whose other bytes are 0xFF; 16 bytes stay aligned."""
    gap = 256
    buffer = torch.full((part.nbytes + 2 * gap,), 0xFF, dtype=torch.uint8, device=DEVICE)
    inside = buffer[gap : gap + part.nbytes].view(part.dtype).view(part.shape)
    inside.copy_(part)
    return inside


def weight(kind: str, *shape: int, powers: bool = False) -> Weight:
    """Return random weights `[.., N, K]` with NaN around them; all scales are powers of two where sums shall be exact.

    Each expert has a tensor scale of its own.
    """
    codes = torch.randint(0, 256, (*shape[:-1], shape[-1] // 2), dtype=torch.uint8)
    if kind == "mxfp4":
        return prepared(kind, codes, torch.randint(120, 124, (*shape[:-1], shape[-1] // 32), dtype=torch.uint8))
    scale = torch.randint(0x30, 0x48, (*shape[:-1], shape[-1] // 16), dtype=torch.uint8)
    whole = torch.rand(shape[:-2]) + 0.5
    if powers:
        scale, whole = scale & 0x78, (2.0 ** torch.randint(-3, 3, shape[:-2])).float()
    return prepared(kind, codes, scale, whole)


def prepared(kind: str, codes: Tensor, scale: Tensor, whole: Tensor | None = None) -> Weight:
    """Return the weight of these tensors, each with NaN around it."""
    if whole is None:
        return prepare_mxfp4(poisoned(codes), poisoned(scale))
    return prepare_nvfp4(poisoned(codes), poisoned(scale), poisoned(whole), divides=kind == "divides")


def exact(x: Tensor, weight: Weight) -> Tensor:
    """Return x @ weight.T in float64."""
    return x.double() @ weight.dequantize(torch.float32).double().T


def error(found: Tensor, truth: Tensor) -> float:
    """Return the norm of the error in units of that of the truth."""
    return float((found.double() - truth).norm() / truth.norm())


# --- one matrix -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_code_at_every_scale_is_dequantised_as_the_format_says(kind: str, dtype: torch.dtype) -> None:
    """All 16 codes times all block scales, for tensor scales of several sizes: the bits of the weight's own rule."""
    codes = torch.arange(0, 16, 2, dtype=torch.uint8) * 0x11 + 0x10  # 0x10, 0x32 ... 0xFE: all in two words
    if kind == "mxfp4":
        scale = torch.arange(255, dtype=torch.uint8)[:, None]
        part: Weight = prepared(kind, codes.repeat(255, 2), scale)
    else:
        scale = torch.arange(0x7F, dtype=torch.uint8)[:, None].repeat(3, 1, 2)
        part = prepared(kind, codes.repeat(3, 127, 2), scale, torch.tensor([0.37, 3e-5, 1234.5]))
    found, expected = dequantize(part, dtype), part.dequantize(dtype)
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(kind: str, config: Config, shape: tuple[int, int, int]) -> None:
    """Odd M, N and K, with NaN around every tensor, give the true bits where no sum needs rounding."""
    count, rows, columns = shape
    part = weight(kind, rows, columns, powers=True)
    x = torch.randint(-8, 9, (count, columns), device=DEVICE).float()
    assert torch.equal(linear(x, part, config), exact(x, part).float())


@pytest.mark.parametrize("kind", KINDS)
@RUNS
def test_every_code_at_every_place(kind: str, config: Config, dtype: torch.dtype) -> None:
    """Each one-hot row of x brings back its column, block by block with its own scale, and both zeros."""
    nibbles = (torch.arange(16)[:, None] + torch.arange(64)[None, :]) % 16
    codes = (nibbles[:, ::2] | nibbles[:, 1::2] << 4).to(torch.uint8)
    if kind == "mxfp4":
        part: Weight = prepared(kind, codes, torch.tensor([[126, 129]], dtype=torch.uint8).repeat(16, 1))
    else:
        scale = torch.tensor([[0x30, 0x38, 0x40, 0x58]], dtype=torch.uint8).repeat(16, 1)
        part = prepared(kind, codes, scale, torch.tensor(0.5))
    x = torch.eye(64, device=DEVICE, dtype=dtype)
    if config.form == "vector":  # one row of x to a program
        x = x[12:28]
        assert torch.equal(linear(x, part, config).T, part.dequantize(dtype)[:, 12:28])
        return
    found = linear(x, part, config)
    assert torch.equal(found.T, part.dequantize(dtype))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", FORMS)
def test_parts_of_k_are_summed_apart(kind: str, config: Config) -> None:
    """Four parts of K give the same bits as one sum, for each has the tensor scale."""
    part = weight(kind, 40, 256, powers=True)
    x = torch.randint(-8, 9, (3, 256), device=DEVICE).bfloat16()
    assert torch.equal(linear(x, part, replace(config, depth=32, splits=4)), exact(x, part).bfloat16())


@pytest.mark.parametrize("kind", KINDS)
@RUNS
def test_no_worse_than_dequantizing_first(kind: str, config: Config, dtype: torch.dtype) -> None:
    """The error against float64 is at most 1.05 times that of rounding the weights and multiplying in the dtype."""
    part, x = weight(kind, 96, 320), torch.randn(3, 320, device=DEVICE).to(dtype)
    truth = exact(x, part)
    assert error(linear(x, part, config), truth) <= 1.05 * error(reference.linear(x, part), truth)


def test_codes_that_are_not_aligned_are_copied() -> None:
    """A weight cut out of a file may begin at any byte; the kernels read words."""
    part = weight("multiplies", 8, 64, powers=True)
    buffer = torch.zeros(part.codes.numel() + 1, dtype=torch.uint8, device=DEVICE)
    buffer[1:] = part.codes.flatten()
    moved = part.holding(buffer[1:].view(part.codes.shape), part.scale, part.whole)
    x = torch.randint(-8, 9, (2, 64), device=DEVICE).float()
    assert torch.equal(linear(x, moved, TILE), exact(x, part).float())
    assert torch.equal(dequantize(moved, torch.bfloat16), part.dequantize(torch.bfloat16))


# --- experts --------------------------------------------------------------------------------------------------------

SMALL = Config(rows=16, columns=64, depth=32, group=2, stages=2)


def layer(kind: str, hidden: int, inner: int, experts: int = 3) -> tuple[Weight, Weight, Weight]:
    """Return gate, up and down of all experts."""
    gate, up = (weight(kind, experts, inner, hidden) for _ in range(2))
    return gate, up, weight(kind, experts, hidden, inner)


def tokens(count: int, hidden: int, experts: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Return small x in float32, ids of which some name no expert, and the router's weights."""
    ids = torch.randint(-1, experts + 1, (count, 3))
    ids[0, 0] = experts - 1
    x = torch.randn(count, hidden) * 0.02
    return x.to(DEVICE), ids.to(DEVICE), torch.rand(count, 3).to(DEVICE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("count", "rows"), [(1, 8), (4, 16)], ids=["direct", "routed"])
def test_experts_and_their_gradients_are_those_of_the_reference(kind: str, count: int, rows: int) -> None:
    """Partly empty tiles, pairs brought together or not, each expert with its own tensor scale; float32's error."""
    parts = layer(kind, 96, 32)
    x, ids, weights = tokens(count, 96)
    config = replace(SMALL, rows=rows)
    out = moe_triton.moe(x, *parts, ids, weights, config, config)
    assert error(out, reference.moe(x.double(), *parts, ids, weights)) < 1e-6
    grad = torch.randn(count, 96, device=DEVICE)
    found = moe_backward_triton.moe_backward(grad, x, *parts, ids, weights, config, config)
    expected = reference.moe_backward(grad.double(), x.double(), *parts, ids, weights.double())
    assert all(error(one, two) < 2e-6 for one, two in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp4"])
def test_what_is_launched_follows_from_shapes_alone(kind: str) -> None:
    """Tensors without data suffice to launch everything, K2's size, forward and backward: the host never waits."""
    make = Nvfp4Weight if kind == "nvfp4" else Mxfp4Weight
    gate, down = (make.empty((384, *shape), device="meta") for shape in ((2048, 7168), (7168, 2048)))
    x = torch.empty(16, 7168, dtype=torch.bfloat16, device="meta")
    ids = torch.empty(16, 8, dtype=torch.int64, device="meta")
    weights = torch.empty(16, 8, device="meta")
    with recorded() as launches:
        moe_triton.moe(x, gate, gate, down, ids, weights, Config(), Config())
    assert len(launches) == 5
    with recorded() as launches:
        moe_backward_triton.moe_backward(x, x, gate, gate, down, ids, weights, Config(), Config())
    assert len(launches) == 7


@triton.jit  # type: ignore[untyped-decorator]
def _places(out_ptr: Any, expert: Any, kind: tl.constexpr, block: tl.constexpr) -> None:
    """Store where an expert's words and scales begin, counted from 0."""
    zero = tl.program_id(0).to(tl.int64)
    codes, scale = moe_triton.of_expert(zero, zero, zero + expert, 2048, 7168, kind, 1, block)
    tl.store(out_ptr, codes)
    tl.store(out_ptr + 1, scale)


def test_places_of_the_last_expert_do_not_wrap_around() -> None:
    """Expert 3,839 begins at word 7.0e9 and, of NVFP4, at scale 3.5e9, both beyond 2^31."""
    out = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    for kind, block in (("nvfp4", 16), ("mxfp4", 32)):
        launch(_places, (1,), out, 3839, kind=kind, block=block)
        assert out.tolist() == [3839 * 2048 * 896, 3839 * 2048 * (7168 // block)]
