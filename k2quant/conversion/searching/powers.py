"""Powers of two moved from the rows of `up_proj` to the columns of `down_proj`, which changes no output.

h = silu(gate) * up is linear in up, so row j of up may be multiplied by 2^-k_j and column j of down by 2^k_j. Short of
underflow and overflow a power of two changes the exponent of a float and no bit more: up's codes stay as they are, its
scales are exact, and down's columns are exact before they are rounded. What it changes is how down is rounded: a group
of 32 columns shares a scale, and a column that is larger in it loses less.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from k2quant.kernels.codecs.grids import GROUP

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from k2quant.kernels.codecs.values import U16

    I8 = NDArray[np.int8]

MOST = 8
"""The largest |k|. The root of a mean square seldom varies by more than 2^4 to either side of a matrix's median."""

_LEAST, _LARGEST = (127 - 100) << 7, (127 + 100) << 7
"""BF16 bits of 2^-100 and 2^100. Between them a fold leaves normal numbers, the scales of a group too."""

_MAGNITUDE = 0x7FFF
_KEPT, _GROWN = 0.52, 1.02
"""What of a group's largest weight rounding leaves of it, at scales as `scales.search` finds them: 0.53 to 1.01."""


def foldable(weights: U16) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Tell which of some BF16 weights can be folded, and which of them ask for it.

    A row of up, or a column of down, is folded if all its weights can be and some are not zero.

    Returns:
        of each weight, whether it is 0 or far from the exponent's ends, and whether it is not 0.
    """
    import numpy as np

    magnitude = weights & _MAGNITUDE
    used = np.asarray(magnitude != 0)
    return ~used | ((magnitude >= _LEAST) & (magnitude <= _LARGEST)), used


def foldable_rows(weights: U16) -> NDArray[np.bool_]:
    """Tell which rows of BF16 weights `[R, K]` can be folded."""
    import numpy as np

    near, used = foldable(weights)
    found: NDArray[np.bool_] = np.logical_and(near.all(1), used.any(1))
    return found


def shifted(bits: U16, k: NDArray[np.integer]) -> U16:
    """Return BF16 numbers times 2^k: exactly, for zeros and for what is `foldable`.

    Args:
        bits: BF16 bits.
        k: whole numbers from -MOST to MOST that broadcast to them.
    """
    import numpy as np

    moved = (k.astype(np.int16) << 7).view(np.uint16)  # of the exponent; what wraps comes out right
    found: U16 = bits + moved * ((bits & _MAGNITUDE) != 0)
    return found


def shifted_scales(scales: U16, weights: U16, k: I8) -> U16:
    """Return the scales of INT4 for rows that are multiplied by 2^k: a group of zeros keeps its own.

    Args:
        scales: BF16 bits `[R, K/32]`, of the rows as they are.
        weights: BF16 bits `[R, K]`.
        k: int8 `[R]`; zero for rows that are not foldable.
    """
    import numpy as np

    return shifted(scales, np.where(_largest(weights), k[:, None], 0))


def fold_of(source: U16, output: U16) -> I8:
    """Return which powers of two were taken out of rows of `up_proj`, by what these are before and after.

    The largest weight of a group keeps 0.53 to 1.01 of its size where a group is rounded at scales that the moonshot
    rule or a search finds, so it alone tells k. Only `foldable_rows` are folded; for others it is 0.

    Args:
        source: BF16 bits `[R, K]` of the rows before.
        output: BF16 bits `[R, K]` of the same rows, decoded from INT4.

    Returns:
        int8 `[R]`: output is about source * 2^-k.

    Raises:
        ValueAt: a group of a row is no power of two of what it was, or another than other groups of the row.
    """
    import numpy as np

    from k2quant.kernels.codecs.values import ValueAt, bf16_to_float

    found = np.zeros(len(source), np.int8)
    rows = np.flatnonzero(foldable_rows(source))
    before, after = (bf16_to_float(_largest(values[rows])) for values in (source, output))
    share = np.divide(after, before, out=np.full_like(before, np.nan), where=before > 0)
    with np.errstate(divide="ignore"):
        _, above = np.frexp(np.float32(_GROWN) / share)  # share * 2^(above - 1) lies in (0.51, 1.02]
    kept = np.ldexp(share, above - 1)
    good = (before == 0) | ((kept >= _KEPT) & (np.abs(above - 1) <= MOST))
    first = np.take_along_axis(above, (before > 0).argmax(1)[:, None], 1)
    good &= (before == 0) | (above == first)
    if not good.all():
        row, group = np.argwhere(~good)[0]
        raise ValueAt(row=int(rows[row]), column=int(group) * GROUP, what="no power of two of its row in the source")
    found[rows] = first[:, 0] - 1
    return found


def _largest(weights: U16) -> U16:
    """Return the BF16 bits of each group's largest magnitude, `[R, K/32]`."""
    found: U16 = (weights & _MAGNITUDE).reshape(len(weights), -1, GROUP).max(2)
    return found
