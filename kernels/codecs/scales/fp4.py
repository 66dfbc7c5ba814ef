"""The scales among which a search chooses for a block of FP4: rule 13 of docs/formats.md.

Candidate 0 is the plain rule's scale. The others lie so many steps of the scale's own format from what that rule
rounds to: for NVFP4 steps of E4M3's bits, kept within its numbers above zero; for MXFP4 powers of two, kept within
2^-127 to 2^127. The least error wins, the earlier candidate among equals. Errors, column weights and means are those of
`scales.search`, with lanes as wide as a block: d = (w - bf16(code * S)) * 2^-e, codes as `store` rounds them.

The error is of the BF16 value, not of the float32 product: BF16 is what every figure, `verify` and a conversion
onward judge by, and a block that is decoded NVFP4 then finds its own scale again with the error 0.
"""

from __future__ import annotations

import numpy as np

from k2quant.kernels.codecs.values import U8

NVFP4_STEPS = (0, -1, 1, 2, 3, 4, 5, 6)
"""Steps of E4M3 bits from the plain scale amax / 6. Four to six steps up lies amax / 4, where the codes reach 4."""

MXFP4_STEPS = (0, -1, 1)
"""Powers of two from the plain scale."""

MOST_E4M3, MOST_E8M0 = 126, 254
"""Bits of the largest scales: 448, and 2^127."""


def nvfp4_candidates(plain: U8, rounded: U8) -> U8:
    """Return the candidates `[..., len(NVFP4_STEPS)]`, E4M3 bits.

    Args:
        plain: bits of the plain rule's scale.
        rounded: bits that its quotient rounds to, at least 1: another where compressed-tensors makes 0.125 of zero.
    """
    moved = np.clip(rounded.astype(np.int16)[..., None] + np.array(NVFP4_STEPS, np.int16), 1, MOST_E4M3)
    moved[..., 0] = plain
    return moved.astype(np.uint8)


def mxfp4_candidates(plain: U8) -> U8:
    """Return the candidates `[..., len(MXFP4_STEPS)]`, bytes of E8M0, of the plain rule's scale."""
    moved = np.clip(plain.astype(np.int16)[..., None] + np.array(MXFP4_STEPS, np.int16), 0, MOST_E8M0)
    return moved.astype(np.uint8)
