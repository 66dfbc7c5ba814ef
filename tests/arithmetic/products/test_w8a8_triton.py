"""FP8 activations by FP8 weights in Triton: on a GPU that has FP8 units, else in Triton's interpreter."""

# ruff: noqa: ANN001, ANN202, N803  kernels, as in kernels/**/gpu/*.py
# ruff: noqa: E402  Triton's absence skips the file before anything imports it
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
import triton.language as tl

from k2quant.errors import UsageError
from k2quant.kernels.devices.launch import launch
from k2quant.kernels.devices.rounding import round_to, round_to_e4m3
from k2quant.kernels.products import reference as matmul_reference
from k2quant.kernels.products.gpu.w8a8 import linear_w8a8, quantize_activations
from k2quant.kernels.products.packed.fp8 import Fp8Weight, spread
from k2quant.kernels.products.prepare import prepare_fp8
from k2quant.kernels.products.tables.configs import Config

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP8_UNITS = DEVICE == "cpu" or torch.cuda.get_device_capability() >= (8, 9)
CONFIG = Config(rows=16, columns=64, depth=128, stages=2)
products = pytest.mark.skipif(not FP8_UNITS, reason="this GPU has no FP8 units")


@triton.jit
def _round(x_ptr, out_ptr, count, BLOCK: tl.constexpr, E4M3: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + place, mask=place < count, other=0.0)
    out = round_to_e4m3(x) if E4M3 else round_to(x, out_ptr.dtype.element_ty)
    tl.store(out_ptr + place, out, mask=place < count)


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 numbers in a kernel."""
    e4m3 = dtype == torch.float8_e4m3fn
    out = torch.empty(x.shape, dtype=torch.uint8 if e4m3 else dtype, device=DEVICE)
    block = 1 << 16 if DEVICE == "cpu" else 1024
    grid = (-(-x.numel() // block),)
    launch(_round, grid, x.to(DEVICE).contiguous(), out, x.numel(), BLOCK=block, E4M3=e4m3, exact=True)
    return out.cpu().view(dtype)


def random_weight(rows: int, columns: int, block_rows: int = 128, *, integers: bool = False) -> Fp8Weight:
    """Return a weight of random codes; small integers with powers of two for scales where sums are to be exact."""
    shape = (-(-rows // block_rows), -(-columns // 128))
    codes = torch.randint(-8, 9, (rows, columns)).float() if integers else torch.randn(rows, columns) * 50
    scale = 2.0 ** torch.randint(-2, 3, shape) if integers else torch.rand(shape) * 0.01 + 0.001
    return prepare_fp8(codes.to(torch.float8_e4m3fn).to(DEVICE), scale.to(DEVICE), block=(block_rows, 128))


def with_amax(x: Tensor) -> Tensor:
    """Set a column of each 128 to 448, so that the scale of x is 1 and its integers are codes."""
    x[:, ::128] = 448.0
    return x


class TestRounding:
    """The integer rounding that stands in for a cast."""

    def test_every_bf16_number(self) -> None:
        """All 65536 BF16 numbers, infinities and NaN included, get the code that torch gives them when clamped."""
        x = torch.arange(-32768, 32768, dtype=torch.int16).view(torch.bfloat16).float()
        expected = x.clamp(-448, 448).to(torch.float8_e4m3fn)
        assert torch.equal(rounded(x, torch.float8_e4m3fn).view(torch.uint8), expected.view(torch.uint8))

    def test_ties_and_their_neighbours(self) -> None:
        """Halfway between two codes, and one float32 to either side, each number goes to the right one."""
        codes = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        points = torch.cat([codes, (codes[1:] + codes[:-1]) / 2])
        x = torch.cat([points, points.nextafter(torch.tensor(1e9)), points.nextafter(torch.tensor(-1e9))])
        x = torch.cat([x, -x])
        expected = x.clamp(-448, 448).to(torch.float8_e4m3fn)
        assert torch.equal(rounded(x, torch.float8_e4m3fn).view(torch.uint8), expected.view(torch.uint8))

    @pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float16], ids=str)
    def test_random_bits(self, dtype: torch.dtype) -> None:
        """A million random float32 bit patterns are rounded as torch rounds them."""
        bits = torch.randint(-(2**31), 2**31 - 1, (1 << 20,), generator=torch.Generator().manual_seed(3))
        x = bits.to(torch.int32).view(torch.float32)
        x = x[x.isfinite()]
        expected = (x.clamp(-448, 448) if dtype == torch.float8_e4m3fn else x).to(dtype)
        assert torch.equal(rounded(x, dtype).float(), expected.float())


class TestActivations:
    """Activations as FP8 codes with a scale for each 128 columns."""

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    @pytest.mark.parametrize("shape", [(0, 128), (1, 32), (3, 160), (5, 1024), (2, 2208)], ids=str)
    def test_the_bits_of_the_reference(self, dtype: torch.dtype, shape: tuple[int, int]) -> None:
        """Codes and scales are those of the reference, for a last block that is not full too, and for rows apart."""
        wide = torch.randn(shape[0], shape[1] + 8, generator=torch.Generator().manual_seed(1)).to(dtype).to(DEVICE)
        wide[:, shape[1] :] = float("nan")
        codes, scale = quantize_activations(wide[:, : shape[1]])
        expected, expected_scale = matmul_reference.fp8_quantize_activations(wide[:, : shape[1]])
        assert torch.equal(scale, expected_scale)
        assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))

    def test_extreme_blocks(self) -> None:
        """Zeros, tiny, huge, infinite and NaN blocks come out as the reference makes them, NaN at the same places."""
        x = torch.zeros(6, 128)
        x[1:, 3] = torch.tensor([1e-30, 1e-12, 3e38, float("inf"), float("nan")])
        codes, scale = (part.cpu() for part in quantize_activations(x.to(DEVICE)))
        expected, expected_scale = matmul_reference.fp8_quantize_activations(x)
        assert torch.equal(scale.nan_to_num(-1.0), expected_scale.nan_to_num(-1.0))
        assert torch.equal(codes.float().nan_to_num(-1.0), expected.float().nan_to_num(-1.0))


@products
class TestProducts:
    """FP8 by FP8."""

    @pytest.mark.parametrize("shape", [(1, 1, 32), (3, 48, 160), (17, 576, 256), (33, 130, 384)], ids=str)
    @pytest.mark.parametrize("block_rows", [1, 48, 128])
    def test_integers_are_exact(self, shape: tuple[int, int, int], block_rows: int) -> None:
        """Integers whose scale is 1 give the bits of the reference, for ragged rows and columns."""
        count, rows, columns = shape
        weight = random_weight(rows, columns, block_rows, integers=True)
        x = with_amax(torch.randint(-8, 9, (count, columns)).float()).to(DEVICE)
        assert torch.equal(linear_w8a8(x, weight, CONFIG), matmul_reference.fp8_linear_w8a8(x, weight))

    @pytest.mark.parametrize("splits", [1, 2, 3, 5])
    def test_splits_are_exact(self, splits: int) -> None:
        """Parts of K that are summed apart give the same bits as one sum."""
        weight = random_weight(48, 640, integers=True)
        x = with_amax(torch.randint(-8, 9, (3, 640)).float()).to(DEVICE)
        config = Config(rows=16, columns=64, splits=splits, stages=2)
        assert torch.equal(linear_w8a8(x, weight, config), matmul_reference.fp8_linear_w8a8(x, weight))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    def test_no_worse_than_the_reference(self, dtype: torch.dtype) -> None:
        """The error against float64, over the rounded activations, is at most 1.05 times that of the reference."""
        weight = random_weight(200, 640)
        x = torch.randn(17, 640).to(dtype).to(DEVICE)
        codes, scale = matmul_reference.fp8_quantize_activations(x)
        activations = codes.double() * spread(scale, (1, 128), codes.shape).double()
        weights = weight.codes.double() * spread(weight.scale, weight.block, weight.shape).double()
        truth = activations @ weights.T

        def error(found: Tensor) -> float:
            return (found.double() - truth).square().mean().sqrt().item()

        bar = error(matmul_reference.fp8_linear_w8a8(x, weight))
        if DEVICE == "cuda":  # matrix units add 128 FP8 products with about 14 bits: a part in 2^13 of their sum
            bar += truth.square().mean().sqrt().item() * 2**-13
        assert error(linear_w8a8(x, weight, CONFIG)) <= 1.05 * bar

    def test_no_rows(self) -> None:
        """No rows of x give no rows."""
        for splits in (1, 2):
            config = Config(rows=16, columns=64, splits=splits, stages=2)
            assert linear_w8a8(torch.empty(0, 256, device=DEVICE), random_weight(48, 256), config).shape == (0, 48)

    def test_other_blocks_are_refused(self) -> None:
        """Blocks that are not 128 columns wide are refused, and the message says what to do."""
        codes = torch.zeros(48, 128, device=DEVICE).to(torch.float8_e4m3fn)
        weight = prepare_fp8(codes, torch.ones(1, 2, device=DEVICE), block=(128, 64))
        with pytest.raises(UsageError, match=r"expected 128 columns.*found 64"):
            linear_w8a8(torch.zeros(1, 128, device=DEVICE), weight, CONFIG)
