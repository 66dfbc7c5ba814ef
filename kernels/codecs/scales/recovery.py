"""The table that tells at a glance whether a group of BF16 weights already lies on Moonshot's INT4 grid.

The rule (docs/formats.md, rule 4): for k = 7, 6, ... 1 try the scales bf16(amax/k), one ulp above, one ulp
below; the first scale whose products bf16(code * scale), codes in +-7, give every weight of the group is the scale.
These are 21 candidates, one bit each. As long as everything is a normal number, whether |w| is a product depends only
on the mantissa of amax and on how many BF16 steps |w| lies below amax. So a group's candidates are the AND of one table
word for each weight that is not zero, and an ordinary group runs out of candidates after a weight or two.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from k2quant.kernels.codecs.values import bf16_to_float, float_to_bf16

CANDIDATES = tuple((k, ulp) for k in range(7, 0, -1) for ulp in (0, 1, -1))
"""The scales bf16(amax/k) + ulp steps in the order of the rule; candidate i is bit i of a table word."""

DISTANCES = 512
"""Distances below amax, in BF16 steps, that the table holds: a product is at least amax/7.1, that is 363 steps."""

SMALLEST_AMAX = 5 << 7
"""BF16 bits of 2^-122: from here on every candidate, and whatever lies within `DISTANCES`, is a normal number."""


@lru_cache(maxsize=1)
def int4_table() -> NDArray[np.uint32]:
    """Return the candidate bits as `[128 * DISTANCES]`, indexed by mantissa of amax * DISTANCES + distance."""
    amax = np.arange(127 << 7, 128 << 7, dtype=np.uint16)  # one binade, 1.0 to 1.99
    table = np.zeros((amax.size, DISTANCES), np.uint32)
    for bit, (k, ulp) in enumerate(CANDIDATES):
        scale = (float_to_bf16(bf16_to_float(amax) / np.float32(k)).astype(np.int32) + ulp).astype(np.uint16)
        for code in range(1, 8):
            product = float_to_bf16(bf16_to_float(scale) * np.float32(code))
            distance = amax.astype(np.int32) - product
            row = np.flatnonzero((distance >= 0) & (distance < DISTANCES))
            table[row, distance[row]] |= np.uint32(1 << bit)
    flat = table.reshape(-1)
    flat.flags.writeable = False
    return flat
