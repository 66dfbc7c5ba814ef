"""A block of columns rounded with torch alone, all rows of W at once: GPTQ's way on a GPU, with the reference's bits.

On the CPU tests hold it to the same bits; on a GPU products are cuBLAS's, whose last bits are its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from k2quant.kernels.solvers.reference import rounded


def round_block(
    start: int,
    weights: Tensor,
    scales: Tensor,
    upper: Tensor,
    sums: Tensor,
    largest: int,
    differences: Tensor,
    codes: Tensor,
) -> Tensor:
    """Round the columns `start` to `start + B`, which lie as rows.

    Args:
        start: the first of them, in their order.
        weights: float32 `[B, P]`, theirs.
        scales: float32 `[B, P]`, theirs.
        upper: M, float32 `[K, K]`.
        sums: float32 `[B, P]`, what the columns before add; used up.
        largest: L, the largest code.
        differences: float32 `[B, P]`, W - Q is written here.
        codes: int8 `[B, P]`, written.

    Returns:
        How many codes were clamped that plain rounding would not clamp, int64 `[]`.
    """
    width = len(sums)
    block = upper[start : start + width, start : start + width]
    roots = block.diagonal()
    saturated = torch.zeros((), dtype=torch.int64, device=weights.device)
    for j in range(width):
        found, values, beyond = rounded(weights[j], sums[j] / roots[j], scales[j], largest)
        codes[j] = found
        differences[j] = weights[j] - values
        saturated += beyond.sum()
        sums[j + 1 :] += differences[j] * block[j, j + 1 :, None]
    return saturated
