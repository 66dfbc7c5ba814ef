"""Which powers of two an expert moves from `up_proj` into `down_proj`: by the train part, judged on held-out data.

A group of 32 columns of down shares a scale. A column that is doubled loses a quarter of what it lost, as long as the
group's largest weight stays what it was; so it is columns with large inputs that are worth it, and only the error tells
how many. Each group tries to double the m columns whose inputs have the largest mean squares, for some m, searches
scales anew, and keeps what loses least by the train part; then it tries to double some of these again. All is compared
as `weighted_error` has it, whose bits are those of any device, and nothing is a logarithm or a power: two machines
choose alike.

That is what the grid of exponents of AWQ comes to where only powers of two are allowed. One exponent a matrix, over 7
of them, took a third as much (nano-K2, 35 matrices: 0.3 % of the mean held-out error, this way 0.8 %, every column by
itself 1.1 % in six times the time); four fifths of the matrices gain nothing by any.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
from k2quant.conversion.stream import checksums_of, whole
from k2quant.formats.format import Format
from k2quant.kernels.codecs.grids import GROUP

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from k2quant.calib.stats.reading import Stats
    from k2quant.checkpoint.reader import Checkpoint
    from k2quant.checkpoint.weights import StoredWeight
    from k2quant.kernels.codecs.seam import Codecs
    from k2quant.kernels.codecs.values import F32, U16

    I8 = NDArray[np.int8]

ROWS = 512
"""Of down, about, by which it is chosen; all of them judge."""

_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16)
"""Columns of a group that are doubled together, as they are tried. To double more than half of them halves the rest."""

_NO_TOKENS = "no token of the calibration reached it"
_NO_GAIN = "no fold has less error on the calibration's own inputs"
_WORSE = "no better than without a fold on held-out data"


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


def choose(source: Checkpoint, pair: Pair, stats: Stats, codecs: Codecs) -> Fold:
    """Choose the fold of a pair. It depends on its weights and on the statistics alone.

    Args:
        source: that holds both matrices.
        pair: both are measured.
        stats: of the source.
        codecs: who searches.

    Raises:
        CheckpointError: the weights are not those that were calibrated, or cannot be read.
    """
    base = base_of(pair.down.weight)
    own = None if base is None else stats.moments(base)
    rows, able = _looked_at(source, pair, stats, codecs)
    if own is None or not own.tokens:
        return _none(able, _NO_TOKENS)
    known = Known.of(stats, base, WEIGHTED, weighted=True)
    k = _gaining(rows, able, known, pair.target, codecs)
    if not k.any():
        return _none(able, _NO_GAIN)
    return _judged(source, pair, stats, codecs, known, k)


def _none(able: NDArray[np.bool_], reason: str, relative: float = 1.0) -> Fold:
    import numpy as np

    return Fold(np.zeros(len(able), np.int8), relative, reason)


def _looked_at(source: Checkpoint, pair: Pair, stats: Stats, codecs: Codecs) -> tuple[U16, NDArray[np.bool_]]:
    """Return some rows of down, and which columns of it can be folded, with the rows of up that belong to them."""
    import numpy as np

    some: list[U16] = []
    step = max(pair.down.weight.shape[0] // ROWS, 1)
    able = np.ones(pair.down.weight.shape[1], np.bool_)
    held = np.zeros_like(able)  # a column may be zero in one panel
    for start, values in _panels(source, pair.down.weight, stats, codecs):
        some.append(values[-start % step :: step].copy())
        near, used = foldable(values)
        able &= near.all(0)
        held |= used.any(0)
    for start, values in _panels(source, pair.up.weight, stats, codecs):
        near, used = foldable(values)
        able[start : start + len(values)] &= near.all(1) & used.any(1)
    return np.concatenate(some), able & held


def _panels(source: Checkpoint, weight: StoredWeight, stats: Stats, codecs: Codecs) -> Iterator[tuple[int, U16]]:
    """Yield first row and BF16 bits of each panel of a weight; at its end refuse one that is not the calibrated one."""
    from k2quant.formats.transcode import Scratch

    scratch, read = Scratch(), dict[str, dict[int, tuple[int, int]]]()
    for start, stop in panel_rows(weight.shape):
        parts, values = read_values(source, weight, start, stop, codecs=codecs, scratch=scratch)
        for suffix, piece in checksums_of(format_of(weight), parts, start).items():
            read.setdefault(suffix, {})[start] = piece
        yield start, values
    check_bytes(stats, weight, {suffix: whole(pieces) for suffix, pieces in read.items()})


def _gaining(rows: U16, able: NDArray[np.bool_], known: Known, target: Format, codecs: Codecs) -> I8:
    """Return the powers with which each group loses least on the train part; zeros where nothing is gained."""
    import numpy as np

    k = np.zeros(len(able), np.int8)
    if known.importance is None or known.mean is None:
        return k
    for first in range(0, len(able), GROUP):
        here = slice(first, first + GROUP)
        group = _Group(np.ascontiguousarray(rows[:, here]), known.importance[here], known.mean[here], target, codecs)
        k[here] = group.chosen(able[here])
    return k


class _Group(NamedTuple):
    """Some rows of 32 columns, and the moments of their inputs."""

    values: U16
    importance: F32
    mean: F32
    target: Format
    codecs: Codecs

    def chosen(self, able: NDArray[np.bool_]) -> I8:
        """Return the powers of its columns, by trying."""
        import numpy as np

        order = np.argsort(-self.importance, kind="stable")
        order, k = order[able[order]], np.zeros(GROUP, np.int8)
        least = self.lost(k)
        while k.max() < MOST:
            tries = [(self.lost(doubled), count, doubled) for count, doubled in _doublings(k, order)]
            lost, count, doubled = min(tries, key=lambda each: each[0], default=(least, 0, k))
            if lost >= least:
                break
            least, k, order = lost, doubled, order[:count]
        return k

    def lost(self, k: I8) -> float:
        """Return what is lost at searched scales where column j is multiplied by 2^k_j."""
        values, (importance, mean) = shifted(self.values, k), folded_moments(self.importance, self.mean, k)
        scales = self.target.search(values, importance, self.codecs, mean)
        return self.target.weighted_error(values, scales, importance, self.codecs, mean)


def _doublings(k: I8, order: NDArray[np.intp]) -> Iterator[tuple[int, I8]]:
    """Yield how many columns are doubled once more, the first of an order, and the powers that come of it."""
    for count in _COUNTS:
        if count <= len(order):
            doubled = k.copy()
            doubled[order[:count]] += 1
            yield count, doubled


def _judged(source: Checkpoint, pair: Pair, stats: Stats, codecs: Codecs, known: Known, k: I8) -> Fold:
    """Take a fold if down loses less with it on held-out data than it does without, searched or rounded."""
    from k2quant.formats.transcode import Scratch

    scratch, folded, target = Scratch(), known.folded(k), pair.target
    found: dict[int, tuple[float, ...]] = {}
    bare = 0.0
    for start, values in _panels(source, pair.down.weight, stats, codecs):
        scales, moved = target.search(values, known.importance, codecs, known.mean), shifted(values, k)
        better = target.search(moved, folded.importance, codecs, folded.mean)
        searched, plain = errors(values, (scales, target.choose(values, codecs)), known, target, codecs, scratch)
        found[start] = (*errors(moved, (better,), folded, target, codecs, scratch), plain)
        bare += searched
    with_fold, plain = (sum(panel[side] for panel in found.values()) for side in (0, 1))
    without = min(bare, plain)
    relative = with_fold / without if without else 1.0
    if with_fold >= without:
        return _none(k.astype(bool), _WORSE, relative)
    return Fold(k, relative, None, found)
