"""GPTQ of a matrix at scales that are given: on the CPU by compiled loops, elsewhere with torch alone."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from k2quant.errors import UsageError
from k2quant.kernels.codecs.grids import GROUP, PACKED_BITS, largest_code
from k2quant.kernels.codecs.reference import moonshot_values, require_finite
from k2quant.kernels.devices.precision import require_whole_products
from k2quant.kernels.devices.single import single_threaded
from k2quant.kernels.devices.threads import over_rows
from k2quant.kernels.solvers import device
from k2quant.kernels.solvers.cpu import loops
from k2quant.kernels.solvers.factors import Factor
from k2quant.kernels.solvers.reference import BLOCK, Solved, earlier

CHUNK = 512
"""Rows of W that go through all columns together on a CPU, where each thread takes 7 K bytes a row for them. With 128
it takes 1.06 (K = 2048) to 1.09 times as long (7168)."""


def solve(weights: Tensor, scales: Tensor, factor: Factor, *, bits: int = 4) -> Solved:
    """Round a matrix column by column, later columns making up for earlier ones.

    Rows do not know each other. They are cut in the same places whatever threads there are, up to
    `torch.get_num_threads()`, so that their number changes no bit. The GIL is free in all long parts.

    Args:
        weights: bfloat16 `[R, K]`, K a multiple of 32.
        scales: bfloat16 `[R, K/32]`, weight units a code; 0 gives codes 0.
        factor: of the Hessian of the inputs, on the same device.
        bits: width of the codes, 4, 3 or 2: -L..L with L = 2^(bits-1) - 1.

    Raises:
        UsageError: shapes or dtypes do not belong together, or torch multiplies float32 with fewer bits.
        ValueAt: a weight or a value is not finite.
    """
    _check(weights, scales, factor)
    largest = largest_code("moonshot", bits, PACKED_BITS)
    solved = _on_cpu if weights.device.type == "cpu" else _with_torch
    return solved(weights.contiguous(), scales.contiguous(), factor, largest)


def _check(weights: Tensor, scales: Tensor, factor: Factor) -> None:
    rows, columns = weights.shape
    if columns % GROUP or scales.shape != (rows, columns // GROUP) or factor.upper.shape != (columns, columns):
        raise UsageError(
            f"GPTQ of `[{rows}, {columns}]`: expected scales `[{rows}, {columns / GROUP:g}]` and a factor of "
            f"{columns} columns, found {list(scales.shape)} and {len(factor.order)}"
        )
    if weights.dtype != torch.bfloat16 or scales.dtype != torch.bfloat16:
        raise UsageError(f"GPTQ takes bfloat16 weights and scales, found {weights.dtype} and {scales.dtype}")
    require_whole_products()


def _on_cpu(weights: Tensor, scales: Tensor, factor: Factor, largest: int) -> Solved:
    values, codes = torch.empty_like(weights), torch.empty(weights.shape, dtype=torch.int8)
    way, saturated = _Way(factor, largest), list[int]()

    def work(first: int, last: int) -> None:
        room = None
        for start in range(first, last, CHUNK):
            rows = slice(start, min(start + CHUNK, last))
            room = _Room.for_rows(room, weights[rows])
            saturated.append(way.solve(weights[rows], scales[rows], room))
            loops.spread(room.codes, way.order, _bits(scales[rows]), codes[rows].numpy(), _bits(values[rows]))

    with single_threaded() as threads:
        over_rows(len(weights), CHUNK, work, threads=threads)
    return Solved(values, codes, sum(saturated))


class _Room:
    """What a thread works in: columns of W lie as rows, and its rows, up to a multiple of lanes, as columns."""

    def __init__(self, columns: int, lanes: int) -> None:
        self.lanes = lanes
        self.weights = np.empty((columns, lanes), np.uint16)
        self.scales = torch.empty(columns // GROUP, lanes)
        self.differences = torch.empty(columns, lanes)
        self.codes = np.empty((columns, lanes), np.int8)

    @classmethod
    def for_rows(cls, old: _Room | None, weights: Tensor) -> _Room:
        """Return one that is as large as these rows need, the old one if it is."""
        rows, columns = weights.shape
        lanes = rows + -rows % loops.LANES
        return old if old is not None and old.lanes == lanes else cls(columns, lanes)


class _Way:
    """A factor as the loops take it."""

    def __init__(self, factor: Factor, largest: int) -> None:
        self._upper, self._largest = factor.upper, np.float32(largest)
        self.order = factor.order.numpy()
        self._groups = self.order // GROUP
        starts = range(0, len(self.order), BLOCK)
        self._blocks = [(at, min(at + BLOCK, len(self.order))) for at in starts]
        self._corners = [self._upper[start:stop, start:stop].contiguous().numpy() for start, stop in self._blocks]

    def solve(self, weights: Tensor, scales: Tensor, room: _Room) -> int:
        """Solve some rows of W on this thread; leave their codes in the room, return how many saturated."""
        if not loops.gather(_bits(weights), self.order, room.weights):
            require_finite(weights)
        room.scales.zero_()
        room.scales[:, : len(scales)] = scales.T
        saturated = 0
        for (start, stop), corner in zip(self._blocks, self._corners, strict=True):
            sums = earlier(self._upper, room.differences, start, stop).numpy()
            steps, differences = room.scales.numpy(), room.differences.numpy()
            saturated += loops.round_block(
                start, room.weights, steps, self._groups, corner, sums, self._largest, differences, room.codes
            )
        return saturated


def _bits(values: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.uint16]]:
    return values.view(torch.uint16).numpy()


def _with_torch(weights: Tensor, scales: Tensor, factor: Factor, largest: int) -> Solved:
    require_finite(weights)
    rows, columns = weights.shape
    order, upper, padding = factor.order, factor.upper, (0, -len(weights) % loops.LANES)
    gathered = torch.nn.functional.pad(weights.T[order], padding)
    steps = torch.nn.functional.pad(scales.float().T, padding)
    differences = torch.empty(gathered.shape, device=weights.device)
    codes = torch.empty(gathered.shape, dtype=torch.int8, device=weights.device)
    saturated = torch.zeros((), dtype=torch.int64, device=weights.device)
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        sums = earlier(upper, differences, start, stop)
        own, groups = gathered[start:stop].float(), order[start:stop] // GROUP
        saturated += device.round_block(
            start, own, steps[groups], upper, sums, largest, differences[start:stop], codes[start:stop]
        )
    found = torch.empty_like(codes)
    found[order] = codes
    found = found[:, :rows].T.contiguous()
    return Solved(moonshot_values(found, scales.repeat_interleave(GROUP, 1)), found, int(saturated))
