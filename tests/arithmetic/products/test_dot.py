"""Products straight from the checkpoint's bytes, on CPUs that multiply BF16 themselves."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from k2quant.kernels.codecs import reference
from k2quant.kernels.devices import threads as threads_cpu
from k2quant.kernels.products.cpu import dot as dot_cpu
from k2quant.kernels.products.packed.fp8 import spread

pytestmark = pytest.mark.skipif(not dot_cpu.supported(), reason="this CPU does not multiply BF16 (avx512_bf16)")

Cuts = tuple[int, ...]


def bits(tensor: Tensor) -> np.ndarray:
    """Return BF16 or FP8 bits as numpy."""
    kind = torch.uint16 if tensor.dtype == torch.bfloat16 else torch.uint8
    return tensor.contiguous().view(kind).numpy()


def int4(x: Tensor, codes: Tensor, scale: Tensor, cuts: Cuts | None = None) -> Tensor:
    """Return x @ (codes * scale).T by `int4_dot`, in the ranges of rows between `cuts`; what is not written is NaN."""
    out = torch.full((x.shape[0], codes.shape[0]), float("nan"), dtype=torch.bfloat16)
    packed = reference.pack_int4(codes).numpy()
    for first, last in pairwise(cuts or (0, codes.shape[0])):
        dot_cpu.int4_dot(bits(x), packed, bits(scale), bits(out), first, last)
    return out


def fp8(
    x: Tensor, codes: Tensor, scale: Tensor, block: tuple[int, int] = (128, 128), cuts: Cuts | None = None
) -> Tensor:
    """Return x @ (codes * scale).T by `fp8_dot`, likewise."""
    out = torch.full((x.shape[0], codes.shape[0]), float("nan"), dtype=torch.bfloat16)
    for first, last in pairwise(cuts or (0, codes.shape[0])):
        dot_cpu.fp8_dot(bits(x), bits(codes), scale.numpy(), *block, bits(out), first, last)
    return out


def generator(seed: int) -> torch.Generator:
    """Return a seeded generator."""
    return torch.Generator().manual_seed(seed)


def whole_numbers(*shape: int, seed: int, most: int = 3) -> Tensor:
    """Return small integers as BF16."""
    return torch.randint(-most, most + 1, shape, generator=generator(seed)).bfloat16()


def powers(*shape: int, seed: int) -> Tensor:
    """Return powers of two, so that products with whole numbers are exact."""
    return 2.0 ** torch.randint(-2, 3, shape, generator=generator(seed)).float()


def wide(codes: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """Return float64 weights, unrounded."""
    return codes.double() * spread(scale.double(), block, tuple(codes.shape))


def test_every_code_at_every_place() -> None:
    """All 16 codes at all 32 places of a group meet their own column of x."""
    codes = (torch.arange(16)[:, None] + torch.arange(64)[None, :]) % 16 - 8
    found = int4(torch.eye(64).bfloat16(), codes, torch.ones(16, 2).bfloat16())
    assert torch.equal(found, codes.T.bfloat16())


def test_groups_keep_to_themselves() -> None:
    """A single column of x, at the edges of groups too, is multiplied by its own group's scale."""
    scale = (2.0 ** torch.arange(5)).repeat(3, 1).bfloat16()
    found = int4(torch.eye(160).bfloat16(), torch.full((3, 160), 7), scale)
    assert torch.equal(found, (7 * scale.repeat_interleave(32, 1)).T)


def test_every_fp8_code() -> None:
    """All 254 numbers of e4m3, subnormals and both zeros included, come out exactly, at any place of 64 columns."""
    numbers = torch.arange(256, dtype=torch.uint8)
    numbers[[0x7F, 0xFF]] = 0
    codes = torch.stack([numbers.roll(shift) for shift in range(64)]).view(torch.float8_e4m3fn)
    found = fp8(torch.eye(256).bfloat16(), codes, torch.ones(1, 2))
    assert torch.equal(found, codes.float().T.bfloat16())


SIZES = [(1, 1, 32), (3, 16, 96), (5, 576, 160), (17, 65, 64), (64, 130, 224), (300, 70, 128), (0, 48, 64)]


@pytest.mark.parametrize(("rows", "height", "columns"), SIZES)
def test_int4_of_whole_numbers_is_exact(rows: int, height: int, columns: int) -> None:
    """Where nothing rounds, any size gives the exact bits: one row and many, odd heights, few and many groups."""
    codes = torch.randint(-8, 8, (height, columns), generator=generator(1))
    x, scale = whole_numbers(rows, columns, seed=2), powers(height, columns // 32, seed=3).bfloat16()
    exact = x.double() @ wide(codes, scale, (1, 32)).T
    assert torch.equal(int4(x, codes, scale), exact.bfloat16())


@pytest.mark.parametrize("block", [(128, 128), (1, 128), (64, 32)])
@pytest.mark.parametrize(("rows", "height", "columns"), [*SIZES, (2, 576, 176), (7, 33, 80)])
def test_fp8_of_whole_numbers_is_exact(rows: int, height: int, columns: int, block: tuple[int, int]) -> None:
    """The same for FP8, with blocks that are cut off at both edges and columns that fill no register."""
    codes = whole_numbers(height, columns, seed=4, most=8).float().to(torch.float8_e4m3fn)
    x, scale = whole_numbers(rows, columns, seed=5), powers(-(-height // block[0]), -(-columns // block[1]), seed=6)
    exact = x.double() @ wide(codes, scale, block).T
    assert torch.equal(fp8(x, codes, scale, block), exact.bfloat16())


@pytest.mark.parametrize("rows", [1, 5, 64])
def test_error_is_at_most_that_of_plain_weights(rows: int) -> None:
    """Against float64 the error is at most 1.05 times that of dequantising to BF16 and multiplying."""
    x = torch.randn(rows, 1024, generator=generator(7)).bfloat16()
    codes = torch.randint(-8, 8, (256, 1024), generator=generator(8))
    scale = (torch.rand(256, 32, generator=generator(9)) * 0.01 + 0.001).bfloat16()
    small = (torch.randn(256, 1024, generator=generator(10)) * 60).clamp(-448, 448).to(torch.float8_e4m3fn)
    factor = torch.rand(2, 8, generator=generator(11)) * 1e-3 + 1e-4
    for found, weights in (
        (int4(x, codes, scale), wide(codes, scale, (1, 32))),
        (fp8(x, small, factor), wide(small, factor, (128, 128))),
    ):
        exact = x.double() @ weights.T
        plain = x @ weights.bfloat16().T
        assert (found.double() - exact).norm() <= 1.05 * (plain.double() - exact).norm()


@pytest.mark.parametrize("kind", ["int4", "fp8"])
def test_a_row_has_the_same_bits_in_any_company(kind: str) -> None:
    """A row of x alone, in a batch of any size, and in ranges of rows of the weight: always the same bits."""
    x = torch.randn(300, 192, generator=generator(12)).bfloat16()
    codes = torch.randint(-8, 8, (200, 192), generator=generator(13))
    scale = torch.rand(200, 6, generator=generator(14)).bfloat16()
    small = (torch.randn(200, 192, generator=generator(15)) * 60).to(torch.float8_e4m3fn)
    factor = torch.rand(2, 2, generator=generator(16))

    def product(part: Tensor, cuts: Cuts | None = None) -> Tensor:
        return int4(part, codes, scale, cuts) if kind == "int4" else fp8(part, small, factor, cuts=cuts)

    whole = product(x)
    assert not whole.isnan().any()
    for rows in (1, 2, 5, 6, 7, 64, 257):
        assert torch.equal(product(x[:rows]), whole[:rows])
    assert torch.equal(product(x[299:]), whole[299:])
    assert torch.equal(product(x, (0, 16, 64, 65, 129, 200)), whole)
    assert all(torch.equal(product(x), whole) for _ in range(20))


def test_nan_and_infinity_stay_in_their_row() -> None:
    """A NaN in x makes its row NaN, an infinity makes it infinite or NaN, and other rows do not notice."""
    x = torch.ones(5, 64).bfloat16()
    x[1, 3], x[2, 40] = float("nan"), float("inf")
    codes, scale = torch.ones(20, 64).long(), torch.ones(20, 2).bfloat16()
    found = int4(x, codes, scale)
    assert found[1].isnan().all()
    assert found[2].isinf().all()
    assert torch.equal(found[[0, 3, 4]], torch.full((3, 20), 64.0).bfloat16())


@pytest.mark.parametrize("rows", [2, 9])
@pytest.mark.parametrize("columns", [32, 96, 160])
def test_a_row_of_weights_does_not_notice_the_next(rows: int, columns: int) -> None:
    """Where a row fills no register the next one is read along, but even NaN scales there change nothing."""
    codes = torch.randint(-8, 8, (48, columns), generator=generator(17))
    x, scale = torch.randn(rows, columns, generator=generator(18)).bfloat16(), torch.ones(48, columns // 32).bfloat16()
    whole = int4(x, codes, scale)
    scale[1::2] = float("nan")
    found = int4(x, codes, scale)
    assert torch.equal(found[:, ::2], whole[:, ::2])
    assert found[:, 1::2].isnan().all()


def test_weights_may_be_mapped_read_only(tmp_path: Path) -> None:
    """A file that is mapped for reading is as good as an array, and is not changed."""
    codes = torch.randint(-8, 8, (80, 224), generator=generator(19))
    x, scale = torch.randn(3, 224, generator=generator(20)).bfloat16(), torch.ones(80, 7).bfloat16()
    reference.pack_int4(codes).numpy().tofile(tmp_path / "packed")
    packed = np.memmap(tmp_path / "packed", np.int32, "r", shape=(80, 28))
    out = torch.empty(3, 80, dtype=torch.bfloat16)
    dot_cpu.int4_dot(bits(x), packed, bits(scale), bits(out), 0, 80)
    assert torch.equal(out, int4(x, codes, scale))


def test_what_does_not_fit_is_refused() -> None:
    """Shapes that do not belong together never reach the compiled code."""
    x, packed, scale = np.zeros((2, 64), np.uint16), np.zeros((8, 8), np.int32), np.zeros((8, 2), np.uint16)
    out = np.zeros((2, 8), np.uint16)
    for wrong in (
        (x[:, :40], packed, scale, out, 0, 8),
        (x, packed[:, :7], scale, out, 0, 8),
        (x, packed, scale[:7], out, 0, 8),
        (x, packed, scale, out[:1], 0, 8),
        (x, packed, scale, out, 0, 9),
        (x, packed, scale, out, -1, 8),
    ):
        with pytest.raises(ValueError, match="expected"):
            dot_cpu.int4_dot(*wrong)


@pytest.mark.parametrize(("rows", "multiple"), [(0, 16), (1, 16), (15, 16), (16, 1), (1000, 64), (37, 5)])
def test_every_row_is_worked_on_once(rows: int, multiple: int) -> None:
    """Ranges cover all rows once, and begin at multiples."""
    seen = np.zeros(rows, np.int64)

    def work(first: int, last: int) -> None:
        assert first % multiple == 0
        assert last > first
        seen[first:last] += 1

    threads_cpu.over_rows(rows, multiple, work)
    assert (seen == 1).all()


def test_an_error_of_a_thread_reaches_the_caller() -> None:
    """An error in any range is raised to the caller, and the next call works."""

    def work(first: int, last: int) -> None:
        if first <= 500 < last:
            raise ZeroDivisionError

    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            threads_cpu.over_rows(1000, 1, work)
    threads_cpu.over_rows(10, 1, range)


def test_without_openmp_threads_of_our_own_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch has no OpenMP library that we know, rows are still covered once, and errors come through."""
    monkeypatch.setattr(threads_cpu, "_openmp", lambda: None)
    test_every_row_is_worked_on_once(1000, 64)
    test_an_error_of_a_thread_reaches_the_caller()


def test_a_forked_child_gets_threads_of_its_own() -> None:
    """OpenMP's threads, and ours, do not survive a fork: the child works all the same, and does not hang."""
    code = """
import os, sys, torch
from k2quant.kernels.devices.threads import over_rows
torch.set_num_threads(2)
seen = bytearray(1000)
def work(first, last):
    for row in range(first, last):
        seen[row] += 1
over_rows(1000, 1, work)
child = os.fork()
over_rows(1000, 1, work)
if child == 0:
    os._exit(0 if set(seen) == {2} else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) or set(seen) != {2})
"""
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


@pytest.mark.parametrize("rows", [1, 4, 5, 70])
def test_a_task_has_the_bits_of_a_call(rows: int) -> None:
    """Threads without Python's lock, however many come, do every row once, with the bits of a plain call."""
    if threads_cpu._openmp() is None:  # noqa: SLF001 - asked where nothing is run yet
        pytest.skip("torch has another OpenMP library here")
    x = torch.randn(rows, 192, generator=generator(21)).bfloat16()
    codes = torch.randint(-8, 8, (330, 192), generator=generator(22))
    scale = torch.rand(330, 6, generator=generator(23)).bfloat16()
    small = (torch.randn(330, 192, generator=generator(24)) * 60).to(torch.float8_e4m3fn)
    factor = torch.rand(3, 2, generator=generator(25))
    for _ in range(10):
        out = torch.full((rows, 330), float("nan"), dtype=torch.bfloat16)
        task = dot_cpu.int4_task(bits(x), reference.pack_int4(codes).numpy(), bits(scale), bits(out))
        assert threads_cpu.without_lock(task.entry, task.parameters.ctypes.data)
        assert torch.equal(out, int4(x, codes, scale))
        out = torch.full((rows, 330), float("nan"), dtype=torch.bfloat16)
        task = dot_cpu.fp8_task(bits(x), bits(small), factor.numpy(), 128, 128, bits(out))
        assert threads_cpu.without_lock(task.entry, task.parameters.ctypes.data)
        assert torch.equal(out, fp8(x, small, factor))
