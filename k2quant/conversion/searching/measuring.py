"""What is known of a weight's inputs, and what its rounding loses by that."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from k2quant.checkpoint.panels import panel_state
from k2quant.conversion.searching.fitting import UNWEIGHTED
from k2quant.formats.format import Format, Method, Parts

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from k2quant.calib.stats.blending import HeldOut
    from k2quant.calib.stats.reading import Stats
    from k2quant.formats.transcode import Scratch
    from k2quant.kernels.codecs.seam import Codecs
    from k2quant.kernels.codecs.values import F32, U16

    I8 = NDArray[np.int8]

COLUMNS = 512
"""Of a Hessian that are widened to float64 at a time."""

_MOST = 1e9
"""The largest error that a report says, in units of rounding's."""

_SAMPLED = 8  # rows of which one is measured where nothing is decided


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of a weight's columns: what decides on scales, and what judges them."""

    method: Method
    """How scales are searched: without importance for the least squared error."""
    importance: F32 | None = None
    """Mean squares of the columns' inputs on the train part."""
    mean: F32 | None = None
    """Their means, likewise."""
    held: HeldOut | None = None
    """Moments of columns on the held-out part; None: they all count alike."""
    hessian: F32 | None = None
    """In its place, for the whole error of the outputs."""
    measure: str = "weights"
    reason: str | None = None
    k: I8 | None = None
    """Where columns are folded: all above but the Hessian is of an input whose column j is multiplied by 2^-k_j."""

    @classmethod
    def of(cls, stats: Stats | None, base: str | None, method: Method, *, weighted: bool) -> Known:
        """Look a weight up.

        Args:
            stats: where, if anything is known.
            base: its name in the language model; None: it is not of that model.
            method: how scales are searched where it is measured.
            weighted: whether the train part decides.
        """
        if stats is None or base is None or (held := stats.held_out(base)) is None:
            return cls(UNWEIGHTED, reason="not measured by the calibration" if weighted else None)
        found = cls(method, held=held, measure="validation")
        if weighted:
            found = replace(found, importance=stats.importance(base), mean=stats.mean(base))
        if held.blended:
            return replace(found, measure="validation, blended")
        if (hessian := stats.hessian(base, "validation")) is not None:
            return replace(found, hessian=hessian, measure="validation, hessian")
        return found

    def folded(self, k: I8) -> Known:
        """Return the same of a weight whose column j is multiplied by 2^k_j, and its input by 2^-k_j.

        Args:
            k: int8 `[K]`, of a weight that is measured.
        """
        importance, mean, held = self.importance, self.mean, self.held
        if importance is not None and mean is not None:
            importance, mean = folded_moments(importance, mean, k)
        if held is not None:
            values, means = folded_moments(held.values, held.mean, k)
            held = held._replace(values=values, mean=means)
        return replace(self, importance=importance, mean=mean, held=held, k=k)


def folded_moments(importance: F32, mean: F32, k: I8) -> tuple[F32, F32]:
    """Return mean squares and means `[K]` of inputs that are multiplied by 2^-k `[K]`."""
    import numpy as np

    exponent = k.astype(np.int32)
    return np.ldexp(importance, -2 * exponent), np.ldexp(mean, -exponent)


def errors(
    values: U16, ways: Sequence[NDArray[Any]], known: Known, target: Format, codecs: Codecs, scratch: Scratch
) -> tuple[float, ...]:
    """Return what a panel loses at each of some scales: by a Hessian where there is one, else by moments.

    Without data nothing is decided by it, and every eighth row is enough to say how much is won; a tenth of the time
    went there. Panels begin at multiples of eight.

    Args:
        values: BF16 bits `[R, K]`.
        ways: scales, as they are stored.
        known: of the weight.
        target: the format.
        codecs: who rounds and decodes.
        scratch: this thread's buffers.
    """
    import numpy as np

    if known.hessian is not None:
        return _of_outputs(values, [come_back(values, each, target, codecs, scratch) for each in ways], known)
    weights, mean = (None, None) if known.held is None else (known.held.values, known.held.mean)
    if known.held is None:
        values, ways = (
            np.ascontiguousarray(values[::_SAMPLED]),
            [np.ascontiguousarray(each[::_SAMPLED]) for each in ways],
        )
    return tuple(target.weighted_error(values, each, weights, codecs, mean) for each in ways)


def over_rounding(error: float, plain: float) -> float:
    """Return an error in units of plain rounding's, which may be nothing, as a report says it."""
    found = error / plain if plain else float(_MOST if error else 1)
    return min(found, _MOST) if math.isfinite(found) else _MOST


def come_back(values: U16, scales: NDArray[Any] | None, target: Format, codecs: Codecs, scratch: Scratch) -> U16:
    """Return the BF16 bits `[R, K]` that a panel is in a format.

    Args:
        values: BF16 bits `[R, K]`.
        scales: as they are stored; None: by the format's own rule.
        target: the format.
        codecs: who rounds and decodes.
        scratch: this thread's buffers.
    """
    import numpy as np

    state = panel_state(target, values.shape, 0, len(values))
    parts: Parts = {suffix: scratch.take(f"way {suffix}", spec) for suffix, spec in state.items()}
    if scales is None:
        target.encode(values, parts, codecs)
    else:
        target.store(values, scales, parts, codecs)
    after = np.empty_like(values)
    target.decode(parts, after, codecs)
    return after


def _of_outputs(values: U16, ways: Sequence[U16], known: Known) -> tuple[float, ...]:
    """Return tr(D H D^T) for each way in which a panel was rounded, D being what it lost; in float64.

    Args:
        values: BF16 bits `[R, K]`.
        ways: the same, rounded.
        known: with a Hessian, float32 `[K, K]`.
    """
    import numpy as np

    from k2quant.kernels.codecs.values import bf16_to_float

    exact, hessian = bf16_to_float(values), known.hessian
    if hessian is None:
        return (0.0,) * len(ways)
    lost = [(exact - bf16_to_float(each)).astype(np.float64) for each in ways]
    if known.k is not None:
        lost = [np.ldexp(each, -known.k.astype(np.int32)) for each in lost]
    sums = [0.0] * len(lost)
    for first in range(0, len(hessian), COLUMNS):
        columns = slice(first, first + COLUMNS)
        wide = hessian[: columns.stop, columns].astype(np.float64)
        for side, each in enumerate(lost):
            mine = each[:, columns]
            sums[side] += float(np.vdot(mine @ wide[first:], mine))
            sums[side] += 2 * float(np.vdot(each[:, :first] @ wide[:first], mine))  # a Hessian is symmetric
    return tuple(sums)
