"""Which powers of two an expert moves from `up_proj` into `down_proj`: by the train part, judged on held-out data.

A group of 32 columns of down shares a scale. A column that is doubled loses a quarter of what it lost, as long as the
group's largest weight stays what it was; so it is columns with large inputs that are worth it, and only the error tells
how many. Each group tries to double the m columns whose inputs have the largest mean squares, for some m, searches
scales anew, and keeps what loses least by the train part; then it tries to double some of these again. All is compared
as `weighted_error` has it, whose bits are those of any device, and nothing is a logarithm or a power: two machines
choose alike.

That is what AWQ's grid of exponents comes to where only powers of two are allowed. Measured beyond `imatrix` on the 35
down_proj of one nano-K2, mean held-out error: one exponent of seven for a matrix takes away 0.3 %, this 0.8 %, every
column by itself 1.1 % in six times the time. Five models: 29 of 175 matrices are folded, and lose 4 %
less in the median, at most 44 %.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from k2quant.calib.stats.digests import base_of
from k2quant.calib.stats.matching import check_bytes
from k2quant.checkpoint.files import checksum
from k2quant.checkpoint.panels import format_of, panel_rows, read_values
from k2quant.conversion.placing import Job
from k2quant.conversion.searching.fitting import WEIGHTED
from k2quant.conversion.searching.measuring import Known, errors, folded_moments
from k2quant.conversion.searching.powers import MOST, foldable, shifted
from k2quant.conversion.searching.together import Together
from k2quant.conversion.stream import checksums_of, whole
from k2quant.formats.format import Format
from k2quant.kernels.codecs.grids import GROUP

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from k2quant.calib.stats.reading import Stats
    from k2quant.checkpoint.reader import Checkpoint
    from k2quant.checkpoint.weights import StoredWeight
    from k2quant.formats.transcode import Scratch
    from k2quant.kernels.codecs.seam import Codecs
    from k2quant.kernels.codecs.values import F32, U16

    I8 = NDArray[np.int8]

ROWS = 512
"""Of down, about, by which it is chosen; all of them judge."""

_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16)
"""Columns of a group that are doubled together, as they are tried. To double more than half of them halves the rest."""


class Pair(NamedTuple):
    """The two matrices of an expert, or of a dense or shared MLP, between which powers of two can be moved."""

    up: Job
    down: Job
    target: Format


@dataclass(frozen=True, slots=True)
class Fold:
    """What was chosen for a pair."""

    k: I8
    """int8 `[I]`: row j of up is multiplied by 2^-k_j, column j of down by 2^k_j."""
    relative: float = 1.0
    """What down loses on held-out data with the fold, accepted or not, over the least that it loses without."""
    reason: str | None = None
    """Why there is none."""
    errors: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    """By first row of a panel of down, what it loses: folded and searched, then rounded as it was."""

    @property
    def facts(self) -> dict[str, Any]:
        """What records of both matrices say of it; `crc32`, of k, tells two folds apart."""
        k = self.k
        said = {"columns": int((k != 0).sum()), "least": int(k.min(initial=0)), "most": int(k.max(initial=0))}
        reason = {} if self.reason is None else {"reason": self.reason}
        return {**said, "relative": self.relative, "crc32": f"{checksum.crc32(k.tobytes()):08x}", **reason}


class Choice:
    """A fold in the making. It depends on the weights of a pair and on the statistics alone."""

    def __init__(self, source: Checkpoint, pair: Pair, stats: Stats, codecs: Codecs) -> None:
        """Begin with nothing.

        Args:
            source: that holds both matrices.
            pair: both are measured.
            stats: of the source.
            codecs: who searches.
        """
        self._source, self._pair, self._stats, self._codecs = source, pair, stats, codecs
        panels = [_Panel(job.weight, *span) for job in (pair.down, pair.up) for span in panel_rows(job.weight.shape)]
        self._first = Together(panels, self._look, self._looked)

    def fold(self) -> Fold:
        """Return it; every thread that asks takes part in choosing it.

        Raises:
            CheckpointError: the weights are not those that were calibrated, or cannot be read.
        """
        step: Fold | _Step = self._first
        while not isinstance(step, Fold):
            step = step.result()
        return step

    def _read(self, panel: _Panel, scratch: Scratch) -> tuple[U16, _Read]:
        """Return the BF16 bits of a panel, and what its bytes sum up to."""
        weight, start, stop = panel
        parts, values = read_values(self._source, weight, start, stop, codecs=self._codecs, scratch=scratch)
        return values, checksums_of(format_of(weight), parts, start)

    def _check(self, weight: StoredWeight, read: Sequence[_Read]) -> None:
        """Refuse a weight that is not the calibrated one."""
        pieces = {suffix: dict(enumerate(each[suffix] for each in read if suffix in each)) for suffix in read[0]}
        check_bytes(self._stats, weight, {suffix: whole(found) for suffix, found in pieces.items()})

    def _look(self, panel: _Panel) -> _Look:
        """Read a panel of either matrix: some rows of down, and which columns, or rows of up, can be folded."""
        import numpy as np

        from k2quant.formats.transcode import Scratch

        values, read = self._read(panel, Scratch())
        near, used = foldable(values)
        if panel.weight is self._pair.up.weight:
            return _Look(values[:0].copy(), np.asarray(near.all(1)), np.asarray(used.any(1)), read)
        step = max(panel.weight.shape[0] // ROWS, 1)
        return _Look(values[-panel.start % step :: step].copy(), np.asarray(near.all(0)), np.asarray(used.any(0)), read)

    def _looked(self, found: Sequence[_Look]) -> Fold | _Step:
        """Let each group of columns try."""
        import numpy as np

        count = len(list(panel_rows(self._pair.down.weight.shape)))
        down, up = found[:count], found[count:]
        self._check(self._pair.down.weight, [each.read for each in down])
        self._check(self._pair.up.weight, [each.read for each in up])
        able = np.logical_and.reduce([each.near for each in down]) & np.logical_or.reduce([each.used for each in down])
        able &= np.concatenate([each.near & each.used for each in up])
        base = base_of(self._pair.down.weight)
        own = None if base is None else self._stats.moments(base)
        if own is None or not own.tokens:
            return _none(len(able), "no token of the calibration reached it")
        known = Known.of(self._stats, base, WEIGHTED, weighted=True)
        rows = np.concatenate([each.rows for each in down])
        groups = [
            _Group(np.ascontiguousarray(rows[:, here]), able[here], *_columns(known, here), self._pair.target)
            for here in (slice(first, first + GROUP) for first in range(0, len(able), GROUP))
        ]
        return Together(groups, lambda group: group.chosen(self._codecs), lambda k: self._tried(known, k))

    def _tried(self, known: Known, found: Sequence[I8]) -> Fold | _Step:
        """Let held-out data judge what the groups have chosen, if they chose anything."""
        import numpy as np

        k = np.concatenate(found)
        if not k.any():
            return _none(len(k), "no fold has less error on the calibration's own inputs")
        down, folded = self._pair.down.weight, known.folded(k)
        panels = [_Panel(down, *span) for span in panel_rows(down.shape)]
        return Together(panels, lambda panel: self._judge(panel, known, folded, k), lambda lost: self._judged(k, lost))

    def _judge(self, panel: _Panel, known: Known, folded: Known, k: I8) -> tuple[tuple[float, ...], _Read]:
        """Return what a panel of down loses: folded and searched, searched, and rounded."""
        from k2quant.formats.transcode import Scratch

        scratch, target, codecs = Scratch(), self._pair.target, self._codecs
        values, read = self._read(panel, scratch)
        ways = target.search(values, known.importance, codecs, known.mean), target.choose(values, codecs)
        without = errors(values, ways, known, target, codecs, scratch)
        moved = shifted(values, k)
        better = target.search(moved, folded.importance, codecs, folded.mean)
        return (*errors(moved, (better,), folded, target, codecs, scratch), *without), read

    def _judged(self, k: I8, found: Sequence[tuple[tuple[float, ...], _Read]]) -> Fold:
        """Take the fold if down loses less with it than it does without, searched or rounded."""
        self._check(self._pair.down.weight, [read for _, read in found])
        folded, searched, plain = (sum(each) for each in zip(*(lost for lost, _ in found), strict=True))
        without = min(searched, plain)
        relative = folded / without if without else 1.0
        if folded >= without:
            return _none(len(k), "no better than without a fold on held-out data", relative)
        starts = (start for start, _ in panel_rows(self._pair.down.weight.shape))
        return Fold(k, relative, None, {start: lost[::2] for start, (lost, _) in zip(starts, found, strict=True)})


_Step = Together[Any, Any, Any]
_Read = Mapping[str, tuple[int, int]]
"""crc32 and length of what a panel has read of each tensor, by suffix."""


class _Panel(NamedTuple):
    """Rows of a weight."""

    weight: StoredWeight
    start: int
    stop: int


class _Look(NamedTuple):
    """What a panel of either matrix says."""

    rows: U16
    """Some rows of down."""
    near: NDArray[np.bool_]
    """Whether a column of down, or a row of up, has no extreme exponents here."""
    used: NDArray[np.bool_]
    """Whether it has anything but zeros here."""
    read: _Read


def _none(columns: int, reason: str, relative: float = 1.0) -> Fold:
    import numpy as np

    return Fold(np.zeros(columns, np.int8), relative, reason)


def _columns(known: Known, here: slice) -> tuple[F32, F32]:
    """Return mean squares and means of some columns by the train part."""
    if known.importance is None or known.mean is None:
        msg = "what is not measured is not folded"
        raise AssertionError(msg)
    return known.importance[here], known.mean[here]


class _Group(NamedTuple):
    """Some rows of 32 columns, and the moments of their inputs."""

    values: U16
    able: NDArray[np.bool_]
    importance: F32
    mean: F32
    target: Format

    def chosen(self, codecs: Codecs) -> I8:
        """Return the powers of its columns, by trying."""
        import numpy as np

        order = np.argsort(-self.importance, kind="stable")
        order, k = order[self.able[order]], np.zeros(GROUP, np.int8)
        least = self.lost(k, codecs)
        while k.max() < MOST:
            tries = [(self.lost(doubled, codecs), count, doubled) for count, doubled in _doublings(k, order)]
            lost, count, doubled = min(tries, key=lambda each: each[0], default=(least, 0, k))
            if lost >= least:
                break
            least, k, order = lost, doubled, order[:count]
        return k

    def lost(self, k: I8, codecs: Codecs) -> float:
        """Return what is lost at searched scales where column j is multiplied by 2^k_j."""
        values, (importance, mean) = shifted(self.values, k), folded_moments(self.importance, self.mean, k)
        scales = self.target.search(values, importance, codecs, mean)
        return self.target.weighted_error(values, scales, importance, codecs, mean)


def _doublings(k: I8, order: NDArray[np.intp]) -> Iterator[tuple[int, I8]]:
    """Yield how many columns are doubled once more, the first of an order, and the powers that come of it."""
    for count in _COUNTS:
        if count <= len(order):
            doubled = k.copy()
            doubled[order[:count]] += 1
            yield count, doubled
