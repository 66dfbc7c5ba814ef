"""Products of NVFP4 and MXFP4 straight from the checkpoint's bytes, on CPUs that multiply BF16 themselves."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from k2quant.kernels.codecs import fp4
from k2quant.kernels.products.cpu import dot as dot_cpu

pytestmark = pytest.mark.skipif(not dot_cpu.supported(), reason="this CPU does not multiply BF16 (avx512_bf16)")

Cuts = tuple[int, ...]
TENSORS = (fp4.TensorScale(2.0**-3, divides=False), fp4.TensorScale(2.0**3, divides=True))
LEAST = np.arange(16, dtype=np.uint8)
SIZES = [(1, 1, 32), (3, 16, 96), (5, 576, 160), (17, 65, 64), (64, 130, 224), (300, 70, 128), (0, 48, 64)]


def bits(tensor: Tensor) -> np.ndarray:
    """Return BF16 bits as numpy."""
    return tensor.contiguous().view(torch.uint16).numpy()


def generator(seed: int) -> torch.Generator:
    """Return a seeded generator."""
    return torch.Generator().manual_seed(seed)


def random_bytes(*shape: int, seed: int, first: int = 0, last: int = 255) -> Tensor:
    """Return random bytes from `first` to `last`."""
    return torch.randint(first, last + 1, shape, generator=generator(seed), dtype=torch.uint8)


def nvfp4(x: Tensor, codes: Tensor, scale: Tensor, tensor: fp4.TensorScale, cuts: Cuts | None = None) -> Tensor:
    """Return x @ W.T by `nvfp4_dot`, in the ranges of rows between `cuts`; what is not written is NaN."""
    out = torch.full((x.shape[0], codes.shape[0]), float("nan"), dtype=torch.bfloat16)
    least = fp4.block_scales(LEAST, tensor)
    for first, last in pairwise(cuts or (0, codes.shape[0])):
        dot_cpu.nvfp4_dot(bits(x), codes.numpy(), scale.numpy(), least, bits(out), first, last)
    return out


def mxfp4(x: Tensor, codes: Tensor, scale: Tensor, cuts: Cuts | None = None) -> Tensor:
    """Return x @ W.T by `mxfp4_dot`, likewise."""
    out = torch.full((x.shape[0], codes.shape[0]), float("nan"), dtype=torch.bfloat16)
    for first, last in pairwise(cuts or (0, codes.shape[0])):
        dot_cpu.mxfp4_dot(bits(x), codes.numpy(), scale.numpy(), bits(out), first, last)
    return out


def wide(codes: Tensor, scale: Tensor, tensor: fp4.TensorScale | None = None) -> Tensor:
    """Return float64 weights: codes times S, or times powers of two where there is no tensor scale."""
    numbers = torch.tensor([*fp4.E2M1, *(-number for number in fp4.E2M1)], dtype=torch.float64)
    nibbles = torch.from_numpy(fp4.nibbles(codes.numpy())).int()
    if tensor is None:
        spread = torch.exp2(scale.double() - 127)
    else:
        spread = torch.from_numpy(fp4.block_scales(scale.numpy(), tensor)).double()
    return numbers[nibbles] * spread.repeat_interleave(nibbles.shape[1] // scale.shape[1], 1)


def packed(nibbles: Tensor) -> Tensor:
    """Return two codes a byte, the even column in the low nibble."""
    return (nibbles[:, ::2] | nibbles[:, 1::2] << 4).to(torch.uint8)


def test_every_code_at_every_place() -> None:
    """All 16 codes at all places of a group meet their own column of x."""
    codes = packed((torch.arange(16)[:, None] + torch.arange(64)[None, :]) % 16)
    x, exact = torch.eye(64).bfloat16(), wide(codes, torch.full((16, 2), 127)).T.bfloat16()
    assert torch.equal(mxfp4(x, codes, torch.full((16, 2), 127, dtype=torch.uint8)), exact)
    ones = torch.full((16, 4), 0x38, dtype=torch.uint8)
    assert torch.equal(nvfp4(x, codes, ones, fp4.TensorScale(1.0, divides=False)), exact)


@pytest.mark.parametrize(
    "tensor", [*TENSORS, fp4.TensorScale(1.2345e-4, divides=False), fp4.TensorScale(8101.7, divides=True)], ids=str
)
def test_every_scale_of_nvfp4(tensor: fp4.TensorScale) -> None:
    """All 127 block scales, subnormals and zero included, at any place of a row, count what S says, to the last bit."""
    scale = torch.stack([torch.arange(127).roll(shift) for shift in range(127)])[:, :126].to(torch.uint8).contiguous()
    codes = torch.full((127, 126 * 8), 0x12, dtype=torch.uint8)  # 1.0 in even columns, 0.5 in odd ones
    x = torch.zeros(126, 126 * 16)
    x[range(126), [16 * block for block in range(126)]] = 1
    exact = torch.from_numpy(fp4.block_scales(scale.numpy(), tensor)).T
    assert torch.equal(nvfp4(x.bfloat16(), codes, scale, tensor), exact.bfloat16())
    for row in (0, 77):  # few rows of x go another way
        assert torch.equal(nvfp4(x[row : row + 1].bfloat16(), codes, scale, tensor), exact[row : row + 1].bfloat16())


def test_every_scale_of_mxfp4() -> None:
    """All 255 powers of two, the subnormal 2^-127 included, count as they are."""
    scale = torch.arange(255, dtype=torch.uint8)[:, None].repeat(1, 2)
    codes = torch.full((255, 32), 0x22, dtype=torch.uint8)
    x = torch.eye(64)[::33].bfloat16()
    exact = torch.exp2(scale[:, 0].double() - 127).float().bfloat16()
    assert torch.equal(mxfp4(x, codes, scale), exact.repeat(2, 1))


@pytest.mark.parametrize(("rows", "height", "columns"), SIZES)
def test_whole_numbers_are_exact(rows: int, height: int, columns: int) -> None:
    """Where nothing rounds, any size gives the exact bits: one row and many, odd heights, few and many groups."""
    codes = random_bytes(height, columns // 2, seed=1)
    x = torch.randint(-3, 4, (rows, columns), generator=generator(2)).bfloat16()
    scale = random_bytes(height, columns // 32, seed=3, first=125, last=129)
    assert torch.equal(mxfp4(x, codes, scale), (x.double() @ wide(codes, scale).T).bfloat16())
    scale = random_bytes(height, columns // 16, seed=4, first=0x30, last=0x48) & 0x78  # powers of two
    for tensor in TENSORS:
        exact = x.double() @ wide(codes, scale, tensor).T
        assert torch.equal(nvfp4(x, codes, scale, tensor), exact.bfloat16())


@pytest.mark.parametrize("rows", [1, 5, 64])
def test_error_is_at_most_that_of_plain_weights(rows: int) -> None:
    """Against float64 the error is at most 1.05 times that of dequantising to BF16 and multiplying."""
    x, tensor = torch.randn(rows, 1024, generator=generator(7)).bfloat16(), fp4.TensorScale(3.1e-4, divides=False)
    codes, scale = random_bytes(256, 512, seed=8), random_bytes(256, 64, seed=9, first=0x40, last=0x7E)
    powers = random_bytes(256, 32, seed=10, first=115, last=124)
    for found, weights in (
        (nvfp4(x, codes, scale, tensor), wide(codes, scale, tensor)),
        (mxfp4(x, codes, powers), wide(codes, powers)),
    ):
        exact = x.double() @ weights.T
        plain = x @ weights.bfloat16().T
        assert (found.double() - exact).norm() <= 1.05 * (plain.double() - exact).norm()


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp4"])
def test_a_row_has_the_same_bits_in_any_company(kind: str) -> None:
    """A row of x alone, in a batch of any size, and in ranges of rows of the weight: always the same bits."""
    x, tensor = torch.randn(300, 192, generator=generator(12)).bfloat16(), fp4.TensorScale(7001.0, divides=True)
    codes, scale = random_bytes(200, 96, seed=13), random_bytes(200, 12, seed=14, last=0x7E)
    powers = random_bytes(200, 6, seed=15, first=115, last=124)

    def product(part: Tensor, cuts: Cuts | None = None) -> Tensor:
        return nvfp4(part, codes, scale, tensor, cuts) if kind == "nvfp4" else mxfp4(part, codes, powers, cuts)

    whole = product(x)
    assert not whole.isnan().any()
    for rows in (1, 2, 5, 6, 7, 64, 257):
        assert torch.equal(product(x[:rows]), whole[:rows])
    assert torch.equal(product(x[299:]), whole[299:])
    assert torch.equal(product(x, (0, 16, 64, 65, 129, 200)), whole)


@pytest.mark.parametrize("rows", [2, 9])
@pytest.mark.parametrize("columns", [32, 96, 160])
def test_a_row_of_weights_does_not_notice_the_next(rows: int, columns: int) -> None:
    """Where a row fills no register the next one is read along, but nothing there changes anything."""
    codes, tensor = random_bytes(48, columns // 2, seed=17), TENSORS[0]
    x = torch.randn(rows, columns, generator=generator(18)).bfloat16()
    scale, powers = torch.full((48, columns // 16), 0x38, dtype=torch.uint8), torch.full((48, columns // 32), 127)
    powers = powers.to(torch.uint8)
    before = nvfp4(x, codes, scale, tensor), mxfp4(x, codes, powers)
    scale[1::2], powers[1::2] = 0xFF, 0xFF
    after = nvfp4(x, codes, scale, tensor), mxfp4(x, codes, powers)
    for whole, found in zip(before, after, strict=True):
        assert torch.equal(found[:, ::2], whole[:, ::2])


def test_what_does_not_fit_is_refused() -> None:
    """Shapes that do not belong together never reach the compiled code."""
    x, out, codes = np.zeros((2, 64), np.uint16), np.zeros((2, 16), np.uint16), np.zeros((16, 32), np.uint8)
    least, scale, powers = np.zeros(16, np.float32), np.zeros((16, 4), np.uint8), np.zeros((16, 2), np.uint8)
    dot_cpu.nvfp4_dot(x, codes, scale, least, out, 0, 16)
    wrongs: tuple[Callable[[], None], ...] = (
        lambda: dot_cpu.nvfp4_dot(x, codes, powers, least, out, 0, 16),
        lambda: dot_cpu.nvfp4_dot(x, codes[:, :31], scale, least, out, 0, 16),
        lambda: dot_cpu.nvfp4_dot(x, codes, scale, least[:15], out, 0, 16),
        lambda: dot_cpu.nvfp4_dot(x[:, :48], codes[:, :24], scale[:, :3], least, out, 0, 16),
        lambda: dot_cpu.nvfp4_dot(x, codes, scale, least, out, 0, 17),
        lambda: dot_cpu.mxfp4_dot(x, codes, scale, out, 0, 16),
        lambda: dot_cpu.mxfp4_dot(x, codes, powers, out[:1], 0, 16),
        lambda: dot_cpu.mxfp4_dot(x, codes, powers, out, -1, 16),
    )
    for wrong in wrongs:
        with pytest.raises(ValueError, match="expected"):
            wrong()
