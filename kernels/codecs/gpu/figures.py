"""Figures on a GPU, and what the launchers of the codecs share.

A kernel writes energy, error, number of changed weights and worst error of each tile as four float64; torch adds them
up. Both orders are fixed by the shape, so equal inputs give equal figures, bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from k2quant.kernels.codecs.figures import Figures
from k2quant.kernels.codecs.gpu.bf16 import INFINITY, magnitude_of, tally
from k2quant.kernels.devices.launch import launch

_BLOCK = 4096
"""Weights that a program compares: 32 a thread."""


@triton.jit
def _compare(before_ptr, after_ptr, sums_ptr, bad_ptr, count, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    before = tl.load(before_ptr + place, mask=place < count, other=0)
    after = tl.load(after_ptr + place, mask=place < count, other=0)
    tally(before, after, sums_ptr, tl.program_id(0))
    if tl.max(tl.maximum(magnitude_of(before), magnitude_of(after))) >= INFINITY:
        tl.store(bad_ptr, 1)


def compare(before: Tensor, after: Tensor, *, bad: Tensor | None = None) -> Tensor:
    """Return the figures of BF16 `after` against the truth `before`, float64 `[4]`, as `figures_of` reads them.

    `bad`, int32 `[1]`, is set to 1 if a weight of either is not finite.
    """
    programs = triton.cdiv(before.numel(), _BLOCK)
    sums = sums_for(programs, before.device, wanted=True)
    arguments = bits_of(before), bits_of(after), sums, flag_for(bad, before), before.numel()
    launch(_compare, (programs,), *arguments, BLOCK=_BLOCK, exact=True)
    return total(sums)


def figures_of(count: int, totals: Tensor) -> Figures:
    """Read the figures of `count` weights from the device."""
    energy, error, changed, worst = totals.tolist()
    return Figures(count, int(changed), energy, error, worst)


def total(sums: Tensor) -> Tensor:
    """Add the figures of all tiles `[T, 4]` up, to `[4]`."""
    if not sums.shape[0]:
        return sums.new_zeros(4)
    return torch.cat([sums[:, :3].sum(0), sums[:, 3:].amax(0)])


def sums_for(tiles: int, device: torch.device, *, wanted: bool) -> Tensor:
    """Return room for the figures of all tiles `[T, 4]`; a placeholder where they are not wanted."""
    return torch.empty((tiles if wanted else 1, 4), dtype=torch.float64, device=device)


def flag_for(bad: Tensor | None, like: Tensor) -> Tensor:
    """Return the flag for bad values, or a placeholder on the device of `like` that nobody reads."""
    return torch.empty(1, dtype=torch.int32, device=like.device) if bad is None else bad


def bits_of(tensor: Tensor) -> Tensor:
    """Return a contiguous tensor as the kernels take it: BF16 as int16 bits, FP8 as uint8, others as they are."""
    as_bits = {torch.bfloat16: torch.int16, torch.float8_e4m3fn: torch.uint8}
    return tensor.contiguous().view(as_bits.get(tensor.dtype, tensor.dtype))
