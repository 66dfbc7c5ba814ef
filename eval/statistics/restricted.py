"""Exact p-values that look only at the shares of flips that the data allow (Berger and Boos, JASA 89:1012, 1994).

Under a share of flips the number of flips lies in a span, but for a chance of gamma. An outcome whose flips lie outside
speaks against the share itself, and need not be unlikely there by its Z as well. In its place such a share sees the
nearest outcome in its span that is better for the candidate (for FAIL, worse): so one more loss never helps, and one
more gain never hurts. The p-value is the largest chance that a share gives to a Z as extreme as the one it sees, plus
gamma. Each set of outcomes with p at most alpha has at most that chance: gamma outside the span, the rest within.

Shares are taken in cells that have one span, the union of those of its shares: in a cell the chance is then smooth.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np

from k2quant.errors import UsageError
from k2quant.eval.statistics.binomial import Counts, Floats, probability, window
from k2quant.eval.statistics.exact import climb, inside, score_curve, shares
from k2quant.eval.statistics.tango import check_share, score

GAMMA = 1e-6
"""Chance that the number of flips lies outside the span; chosen beforehand, see benchmarks/results/gate-sharper.md."""

LEAST_ALPHA = 10 * GAMMA
"""Smallest alpha: p-values end at gamma."""

_TIE = 1e-10  # two Z so close, relative to 1 or Z, are equal but for rounding
_NEGLIGIBLE = 1e-3  # of the largest chance: where a cell further out has less, none beyond is looked at
_MISS = 0.03  # of the largest chance in a cell, at most, that its ends miss
_AROUND = 40  # numbers of flips more than those that are not too unlikely: at a share of 1 there is but one of these
_END = 20  # flips from either end of the shares, where chances change abruptly and every cell is looked at


@dataclass(frozen=True, slots=True)
class Cell:
    """Neighbouring shares of flips, and the numbers of flips that one of them has."""

    low: float
    high: float
    first: int
    last: int


class Cells:
    """All shares of flips, and how likely outcomes are under each."""

    def __init__(self, n: int, margin: float, *, upper: bool, gamma: float) -> None:
        """Look at n items whose drop is the margin.

        Args:
            n: items, at least 1.
            margin: above 0, below 1.
            upper: whether an outcome is extreme if it is bad; else if it is good.
            gamma: chance of flips beyond the span; 0 for a span of all: the test that restricts nothing.
        """
        self.n, self.margin, self.upper, self.gamma = n, margin, upper, gamma
        self.shares = shares(n, margin)
        self._cells: dict[int, Cell] = {}
        self._flips: dict[float, tuple[int, Floats]] = {}

    def __len__(self) -> int:
        return len(self.shares) - 1

    def __getitem__(self, place: int) -> Cell:
        if place not in self._cells:
            low, high = self.shares[place], self.shares[place + 1]
            self._cells[place] = Cell(low, high, self._span(low)[0], self._span(high)[1])
        return self._cells[place]

    def _span(self, share: float) -> tuple[int, int]:
        """Return the fewest and the most flips under a share: beyond each lies a chance of at most gamma / 2."""
        if not self.gamma:
            return 0, self.n
        low, likely = self._likely(share)
        below, above = np.cumsum(likely) > self.gamma / 2, np.cumsum(likely[::-1]) > self.gamma / 2
        return low + int(below.argmax()), low + len(likely) - 1 - int(above.argmax())

    def _likely(self, share: float) -> tuple[int, Floats]:
        """Return a number of flips, and how likely that and those after it are; the spans beside a share lie within."""
        if share not in self._flips:
            low, high = window(self.n, share) if self.gamma else (0, self.n)
            low, high = max(0, low - _AROUND), min(self.n, high + _AROUND)
            self._flips[share] = low, probability(np.arange(low, high + 1), self.n, share)
        return self._flips[share]

    def seen(self, lost: int, gained: int, cell: Cell) -> float | None:
        """Return the Z that a cell sees for an outcome; None where nothing so extreme lies in its span."""
        fewer, more = max(0, lost + gained - cell.last), max(0, cell.first - lost - gained)
        lost, gained = (lost + more, gained - fewer) if self.upper else (lost - fewer, gained + more)
        return float(score(lost, gained, self.n, self.margin)) if min(lost, gained) >= 0 else None

    def curve(self, bound: float, cell: Cell, near: Counts | None = None) -> Counts:
        """Return the curve at a bound on Z over a cell's span."""
        return score_curve(self.n, self.margin, bound, flips=np.arange(cell.first, cell.last + 1), near=near)

    def of(self, z: float, cell: Cell, near: Counts | None = None) -> Counts:
        """Return the curve of outcomes whose Z is as extreme as one that was seen, or is but for rounding."""
        tie = _TIE * max(1, abs(z))
        return self.curve(z + tie if self.upper else z - tie, cell, near)

    def chance(self, curve: Counts, cell: Cell, share: float) -> float:
        """Return the chance, under a share of a cell, of outcomes in its span under a curve, or above it."""
        low, likely = self._likely(share)
        likely = likely[cell.first - low : cell.last + 1 - low]
        return float(inside(curve, cell.first, (share + self.margin) / (2 * share), upper=self.upper) @ likely)


@lru_cache(maxsize=4096)
def restricted_p(lost: int, gained: int, n: int, margin: float, *, upper: bool, gamma: float = GAMMA) -> float:
    """Return the p-value of an outcome: how likely one as good is at a drop of the margin; with `upper`, as bad.

    Args:
        lost: items only the baseline has right.
        gained: items only the candidate has right.
        n: items, at least 1 and at least the flips.
        margin: above 0, below 1.
        upper: whether what is worse counts as more extreme.
        gamma: see `GAMMA`; 0 looks at all shares, as if the flips said nothing about them.
    """
    cells = Cells(n, margin, upper=upper, gamma=gamma)
    return min(1.0, gamma + _Outcome(cells, lost, gained).largest())


class _Outcome:
    """One outcome, and how likely something as extreme is under each share of flips."""

    def __init__(self, cells: Cells, lost: int, gained: int) -> None:
        self.cells, self.lost, self.gained = cells, lost, gained
        self.top = 0.0

    def largest(self) -> float:
        """Return the largest chance: from the share that was seen outwards, and at both ends."""
        points, count = self.cells.shares, len(self.cells)
        start = min(max(bisect(points, (self.lost + self.gained) / self.cells.n), 1), count) - 1
        for way in (range(start, count), range(start - 1, -1, -1)):
            self._walk(way)
        reach = _END / self.cells.n
        for place in range(count):
            if points[place] < points[0] + reach or points[place + 1] > 1 - reach:
                self._look(self.cells[place])
        return self.top

    def _walk(self, way: Iterable[int]) -> None:
        """Look at cells outwards, until those that the flips allow are behind and what is left is small."""
        flips = self.lost + self.gained
        for place in way:
            cell = self.cells[place]
            small = _NEGLIGIBLE * max(self.cells.gamma, self.top)
            if self._look(cell) < small and not cell.first <= flips <= cell.last:
                break

    def _look(self, cell: Cell) -> float:
        """Return about how large the largest chance in a cell is, and note it."""
        z = self.cells.seen(self.lost, self.gained, cell)
        if z is None:
            return 0.0
        curve = self.cells.of(z, cell)
        _, height = highest(partial(self.cells.chance, curve, cell), cell, self.top)
        self.top = max(self.top, height)
        return height


def highest(at: Callable[[float], float], cell: Cell, limit: float, *, rough: bool = False) -> tuple[float, float]:
    """Return where in a cell the chance is largest, and how large; roughly, if that is clearly below the limit.

    Args:
        at: the chance under a share of the cell.
        cell: the cell.
        limit: what is asked about.
        rough: whether that it is above the limit is all there is to know.
    """
    ends = [(at(share), share) for share in (cell.low, cell.high)]
    if max(ends)[0] < limit * (1 - _MISS) or (rough and max(ends)[0] > limit):
        return max(ends)[::-1]
    middle = (cell.low + cell.high) / 2
    first, between, last = heights = ends[0][0], at(middle), ends[1][0]
    top = max(range(3), key=lambda place: heights[place])
    # The maximum of a parabola is above the highest of three points by an eighth of their second difference at most.
    miss = abs(first - 2 * between + last) / 4
    return climb(at, (cell.low, middle, cell.high), top, heights[top], limit=limit, miss=miss)


@lru_cache(maxsize=256)
def critical_curve(n: int, margin: float, alpha: float, *, upper: bool, gamma: float = GAMMA) -> Counts:
    """Return the curve of all outcomes whose p-value is at most alpha.

    Args:
        n: items, at least 1.
        margin: above 0, below 1.
        alpha: at least `LEAST_ALPHA`, below 0.5.
        upper: whether the set is what lies above the curve; else it is what lies on and below.
        gamma: as for `restricted_p`.

    Returns:
        int64 `[n + 1]`: for each number of flips, the most losses on or below the curve; -1 where none is. Read-only.

    Raises:
        UsageError: an argument makes no sense.
    """
    if n < 1:
        raise UsageError(f"n: expected at least 1 item, found {n!r}")
    check_share("margin", margin, 1)
    check_share("alpha", alpha, 0.5, least=LEAST_ALPHA)
    critical = _Critical(Cells(n, margin, upper=upper, gamma=gamma), alpha - gamma)
    # In this order few cells ask for more than those before them; from one end to the other each might.
    order = np.random.default_rng(0).permutation(len(critical.cells)).tolist()
    while order:
        order = [place for place in order if critical.tighten(critical.cells[place])]
    critical.curve.setflags(write=False)
    return critical.curve


class _Critical:
    """The curve of outcomes that are unlikely enough under the shares of all cells that it was tightened for."""

    def __init__(self, cells: Cells, most: float) -> None:
        self.cells, self.most = cells, most
        self.curve = np.full(cells.n + 1, -1) if cells.upper else np.arange(cells.n + 1)

    def tighten(self, cell: Cell) -> bool:
        """Take from the set just so much that it is unlikely enough under a share of the cell; return if it was not."""
        least = self._least(cell)
        if least is None:
            return False
        here = self.cells.of(least, cell, self.curve[cell.first : cell.last + 1])
        share, height = highest(partial(self.cells.chance, here, cell), cell, self.most, rough=True)
        if height <= self.most:
            return False
        self._take(cell, self._critical(least, here, cell, share))
        return True

    def _least(self, cell: Cell) -> float | None:
        """Return the least extreme Z of the set in a cell's span; None where the set has nothing there."""
        k, upper = np.arange(cell.first, cell.last + 1), self.cells.upper
        lost = self.curve[cell.first : cell.last + 1] + upper
        there = (lost >= 0) & (lost <= k)
        if not there.any():
            return None
        z = score(lost[there], (k - lost)[there], self.cells.n, self.cells.margin)
        return float(z.max() if upper else z.min())

    def _critical(self, least: float, outer: Counts, cell: Cell, share: float) -> Counts:
        """Return the curve over the span of the largest set by Z, within one too large, that is unlikely enough."""
        sign = -1 if self.cells.upper else 1
        n, margin = self.cells.n, self.cells.margin
        end = 1 + max(abs(float(score(lost, n - lost, n, margin))) for lost in (0, n))
        loose, tight, step = sign * least - _TIE * max(1, abs(least)), end, 1e-3
        inner = self.cells.curve(sign * tight, cell)
        while tight - loose > _TIE and np.abs(outer - inner).sum() > 1:
            bound = min(loose + step, (loose + tight) / 2)
            curve = self.cells.curve(sign * bound, cell, outer)
            if self.cells.chance(curve, cell, share) > self.most:
                loose, outer, step = bound, curve, 4 * step
            else:
                tight, inner = bound, curve
        return inner

    def _take(self, cell: Cell, curve: Counts) -> None:
        """Leave in the set what lies in it by a curve over a cell's span; beyond it, what a cell sees so."""
        before, after = np.arange(cell.first), np.arange(cell.last + 1, self.cells.n + 1)
        here = self.curve[: cell.first], self.curve[cell.first : cell.last + 1], self.curve[cell.last + 1 :]
        if self.cells.upper:
            limits = curve[0] - (cell.first - before), curve, np.full(len(after), curve[-1])
        else:
            limits = np.full(len(before), curve[0]), curve, curve[-1] + (after - cell.last)
        for part, limit in zip(here, limits, strict=True):
            (np.maximum if self.cells.upper else np.minimum)(part, limit, out=part)
