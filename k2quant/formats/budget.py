"""How far rounding to a format may move a weight: the check that needs no knowledge of who rounded.

`w` is a weight before and `w'` after, both as BF16 values. `s` is the scale that is stored, but no more than 1.01 times
amax/7 (INT4) or amax/448 (FP8) of the weights before, so that a scale that is too large excuses nothing:

- INT4: codes are whole numbers, so |w - w'| <= s/2; rounding code * s to BF16 adds at most 7s * 2^-9, and the
  compressed-tensors grid clamps at 7.5 after a division in BF16: 0.55 s covers all of it.
- FP8: E4M3 has three mantissa bits, so |w - w'| <= |w| / 16, or s * 2^-10 among its subnormal codes; rounding to BF16
  adds |w| * 2^-8 at the most.
- Where the scale itself is subnormal it has few bits left, hence 2^-130 on top.
- BF16: nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from k2quant.formats.layouts import Format, Fp8, Int4
from k2quant.formats.transcode import Parts, widened
from k2quant.kernels.codecs.cpu.bf16 import outside

if TYPE_CHECKING:
    from numpy.typing import NDArray

_FLOOR = 2.0**-130
_INT4 = {"largest_code": 7.0, "steps": 0.55, "relative": 0.0, "floor": _FLOOR}
_FP8 = {"largest_code": 448.0, "steps": 2.0**-10 * 1.01, "relative": 1 / 16 + 2.0**-8, "floor": _FLOOR}


def outside_budget(layout: Format, before: NDArray[np.uint16], after: NDArray[np.uint16], parts: Parts) -> int:
    """Count the weights of a panel that are further off than the rounding of their format explains.

    Args:
        layout: the format that was rounded to.
        before: BF16 bits `[R, K]`.
        after: BF16 bits `[R, K]`, decoded from `parts`.
        parts: the panel's tensors in that format.
    """
    if isinstance(layout, Int4):
        scale = widened(parts["weight_scale"])
        return outside(before, after, scale, (1, layout.group), **_INT4)
    if isinstance(layout, Fp8):
        scale = parts["weight_scale_inv"]
        return outside(before, after, scale, layout.block, **_FP8)
    return int(np.count_nonzero((before != after) & ((before | after) & 0x7FFF != 0)))
