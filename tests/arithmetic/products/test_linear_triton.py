"""x @ weight.T by the Triton kernels: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from k2quant.kernels.codecs import reference
from k2quant.kernels.ops import Fp8Weight, Int4Weight, prepare_fp8, prepare_int4
from k2quant.kernels.products import reference as matmul_reference
from k2quant.kernels.products.gpu.linear import linear
from k2quant.kernels.products.packed.fp8 import spread
from k2quant.kernels.products.tables.configs import Config

Weight = Int4Weight | Fp8Weight
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
TILE = Config(rows=16, columns=64, depth=128, splits=1, warps=4, stages=2)
VECTOR = Config(form="vector", columns=64, depth=128, splits=1, warps=4, stages=1)
FORMS = [pytest.param(TILE, id="tile"), pytest.param(VECTOR, id="vector")]
FORMATS = ["int4", "fp8"]
SHAPES = [(1, 1, 32), (3, 48, 96), (17, 576, 256), (64, 200, 640), (2, 65, 1024)]


@pytest.fixture
def device() -> str:
    """Return the device on which this machine runs Triton kernels."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    """Give every test the same random numbers."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        yield


def poisoned(part: Tensor, device: str, gap: int = 16) -> Tensor:
    """Return a copy of `part`, contiguous, inside a larger buffer whose other bytes are NaN, or 0xFF in integers.

    `gap` numbers lie in front, so that 16 bytes stay aligned.
    """
    around = torch.full((part.numel() + 2 * gap * 16,), 0xFF, dtype=torch.uint8).repeat_interleave(part.element_size())
    buffer = around.view(part.dtype).to(device)
    inside = buffer[gap : gap + part.numel()].view(part.shape)
    inside.copy_(part)
    return inside


def poisoned_rows(x: Tensor, device: str, gap: int = 8) -> Tensor:
    """Return a copy of `x` whose rows lie apart, with NaN between them."""
    buffer = torch.full((x.shape[0] + 2, x.shape[1] + gap), float("nan"), dtype=x.dtype, device=device)
    inside = buffer[1:-1, : x.shape[1]]
    inside.copy_(x)
    return inside


def int4_weight(packed: Tensor, scale: Tensor, device: str) -> Int4Weight:
    """Lay an INT4 weight out for a GPU, with poison around it."""
    weight = prepare_int4(packed, scale, layout="groups")
    return Int4Weight(poisoned(weight.codes, device), poisoned(weight.scale, device), "groups")


def fp8_weight(codes: Tensor, scale: Tensor, device: str, block: tuple[int, int] = (128, 128)) -> Fp8Weight:
    """Prepare an FP8 weight with poison around it."""
    weight = prepare_fp8(codes, scale, block=block)
    return Fp8Weight(poisoned(weight.codes, device), poisoned(weight.scale, device), block)


def random_weight(kind: str, rows: int, columns: int, device: str, *, powers: bool = False) -> Weight:
    """Return a weight of random codes; scales are powers of two where sums are to be exact."""
    if kind == "int4":
        packed = reference.pack_int4(torch.randint(-8, 8, (rows, columns), dtype=torch.int8))
        return int4_weight(packed, random_scale((rows, columns // 32), powers=powers).bfloat16(), device)
    codes = torch.randint(-15, 16, (rows, columns)).float() if powers else torch.randn(rows, columns) * 50
    scale = random_scale((-(-rows // 128), -(-columns // 128)), powers=powers)
    return fp8_weight(codes.to(torch.float8_e4m3fn), scale, device)


def random_scale(shape: tuple[int, int], *, powers: bool) -> Tensor:
    """Return float32 scales, or powers of two between 1/4 and 4."""
    return 2.0 ** torch.randint(-2, 3, shape) if powers else torch.rand(shape) * 0.01 + 0.001


def exact(x: Tensor, weight: Weight) -> Tensor:
    """Return x @ weight.T in float64, over the unrounded products code * scale."""
    if isinstance(weight, Fp8Weight):
        numbers = weight.codes.cpu().double() * spread(weight.scale.cpu(), weight.block, weight.shape).double()
    else:
        packed, scale = Int4Weight(weight.codes.cpu(), weight.scale.cpu(), weight.layout).checkpoint()
        numbers = reference.unpack_int4(packed).double() * scale.double().repeat_interleave(32, -1)
    return x.cpu().double() @ numbers.T


def error(found: Tensor, truth: Tensor) -> float:
    """Return the root of the mean square difference."""
    return (found.cpu().double() - truth).square().mean().sqrt().item()


def with_splits(config: Config, splits: int) -> Config:
    """Return a configuration that differs in its splits."""
    return Config(
        form=config.form,
        rows=config.rows,
        columns=config.columns,
        depth=32,
        splits=splits,
        warps=config.warps,
        stages=config.stages,
    )


class TestExact:
    """Integers, whose sums no order and no rounding can change, give exactly the true bits."""

    @pytest.mark.parametrize("kind", FORMATS)
    @pytest.mark.parametrize("config", FORMS)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_every_shape(self, kind: str, config: Config, shape: tuple[int, int, int], device: str) -> None:
        """Odd M, N and K, with NaN around every tensor and between the rows of x, give the true bits."""
        count, rows, columns = shape
        if config.form == "vector":
            count = min(count, 3)
        weight = random_weight(kind, rows, columns, device, powers=True)
        x = poisoned_rows(torch.randint(-8, 9, (count, columns)).float(), device)
        found = linear(x, weight, config)
        assert found.shape == (count, rows)
        assert torch.equal(found.cpu(), exact(x, weight).float())

    @pytest.mark.parametrize("kind", FORMATS)
    @pytest.mark.parametrize("config", FORMS)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_every_dtype(self, kind: str, config: Config, dtype: torch.dtype, device: str) -> None:
        """The result is the exact sum rounded once to the dtype of x."""
        weight = random_weight(kind, 48, 96, device, powers=True)
        x = poisoned_rows(torch.randint(-8, 9, (3, 96)).to(dtype), device)
        assert torch.equal(linear(x, weight, config).cpu(), exact(x, weight).to(dtype))

    @pytest.mark.parametrize("kind", FORMATS)
    @pytest.mark.parametrize("config", FORMS)
    @pytest.mark.parametrize("splits", [1, 2, 3, 4])
    def test_splits(self, kind: str, config: Config, splits: int, device: str) -> None:
        """Parts of K that are summed apart give the same bits as one sum; parts that do not fit K become fewer."""
        weight = random_weight(kind, 80, 384, device, powers=True)
        x = poisoned_rows(torch.randint(-8, 9, (3, 384)).bfloat16(), device)
        for columns in (384, 256):  # 12 steps, and 8, which 3 does not divide
            part = weight if columns == 384 else random_weight(kind, 80, columns, device, powers=True)
            found = linear(x[:, :columns], part, with_splits(config, splits))
            assert torch.equal(found.cpu(), exact(x[:, :columns], part).bfloat16())

    @pytest.mark.parametrize("kind", FORMATS)
    @pytest.mark.parametrize("config", FORMS)
    def test_no_rows(self, kind: str, config: Config, device: str) -> None:
        """No rows of x give no rows."""
        weight = random_weight(kind, 48, 96, device)
        for splits in (1, 2):
            found = linear(torch.empty(0, 96, device=device), weight, with_splits(config, splits))
            assert found.shape == (0, 48)

    @pytest.mark.parametrize("kind", FORMATS)
    @pytest.mark.parametrize("group", [1, 2, 8])
    def test_many_tiles_of_rows(self, kind: str, group: int, device: str) -> None:
        """Every tile is computed once, in whatever order the tiles of x are grouped."""
        weight = random_weight(kind, 100, 32, device, powers=True)
        x = torch.randint(-8, 9, (75, 32), device=device).float()
        found = linear(x, weight, Config(rows=16, columns=32, depth=32, group=group, stages=2))
        assert torch.equal(found.cpu(), exact(x, weight).float())


class TestCodes:
    """Every code at every place is read as what it means."""

    @pytest.mark.parametrize("config", FORMS)
    def test_every_nibble_at_every_place(self, config: Config, device: str) -> None:
        """Each one-hot row of x, group boundaries included, brings back its column: 16 nibbles at all places."""
        codes = (torch.arange(16)[:, None] + torch.arange(64)[None, :]) % 16 - 8
        scale = torch.tensor([[1.0, 2.0]]).expand(16, 2).bfloat16().contiguous()
        weight = int4_weight(reference.pack_int4(codes.to(torch.int8)), scale, device)
        found = linear(torch.eye(64, device=device, dtype=torch.bfloat16), weight, config)
        assert torch.equal(found.cpu().float().T, codes.float() * scale.float().repeat_interleave(32, -1))

    @pytest.mark.parametrize("config", FORMS)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_every_fp8_code(self, config: Config, dtype: torch.dtype, device: str) -> None:
        """Each one-hot row of x brings back its column: all 254 FP8 numbers, subnormals and both zeros included."""
        codes = torch.arange(256, dtype=torch.uint8)
        codes[[0x7F, 0xFF]] = 0
        rows = torch.cat([codes.roll(shift).view(8, 32) for shift in range(3)]).view(torch.float8_e4m3fn)
        weight = fp8_weight(rows, torch.tensor([[2.0]]), device)
        found = linear(torch.eye(32, device=device, dtype=dtype), weight, config)
        assert torch.equal(found.cpu().float().T, 2 * rows.float())

    @pytest.mark.parametrize("config", FORMS)
    @pytest.mark.parametrize("block", [(1, 32), (1, 128), (48, 64), (128, 128), (256, 96)], ids=str)
    def test_every_block(self, config: Config, block: tuple[int, int], device: str) -> None:
        """FP8 blocks of any rows and of columns that neither divide K nor are a power of two keep their own scales."""
        codes = torch.randint(-15, 16, (200, 320)).float().to(torch.float8_e4m3fn)
        shape = (-(-200 // block[0]), -(-320 // block[1]))
        weight = fp8_weight(codes, random_scale(shape, powers=True), device, block)
        x = torch.randint(-8, 9, (2, 320), device=device).float()
        assert torch.equal(linear(x, weight, config).cpu(), exact(x, weight).float())


class TestFloats:
    """Ordinary numbers."""

    @pytest.mark.parametrize("kind", FORMATS)
    @pytest.mark.parametrize("config", FORMS)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_no_worse_than_dequantizing_first(self, kind: str, config: Config, dtype: torch.dtype, device: str) -> None:
        """The error against float64 is at most 1.05 times that of rounding the weights and multiplying in the dtype."""
        count = 17 if config.form == "tile" else 3
        weight = random_weight(kind, 200, 640, device)
        x = poisoned_rows(torch.randn(count, 640).to(dtype), device)
        truth = exact(x, weight)
        bar = error(matmul_reference.linear(x, weight), truth)
        assert error(linear(x, weight, config), truth) <= 1.05 * bar

    @pytest.mark.parametrize("kind", FORMATS)
    @pytest.mark.parametrize("config", FORMS)
    def test_same_bits_every_time(self, kind: str, config: Config, device: str) -> None:
        """A run in parts gives the same bits whenever it is repeated."""
        weight = random_weight(kind, 48, 256, device)
        x = torch.randn(3, 256, device=device).bfloat16()
        first = linear(x, weight, with_splits(config, 4))
        for _ in range(50 if device == "cuda" else 2):
            assert torch.equal(linear(x, weight, with_splits(config, 4)), first)
