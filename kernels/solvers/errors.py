"""What a rounded matrix does to its outputs, on inputs that are given."""

from __future__ import annotations

from torch import Tensor

ROWS = 1024
"""Tokens that are multiplied at once."""


def output_error(weights: Tensor, values: Tensor, inputs: Tensor, token_weights: Tensor) -> float:
    """Return the sum over tokens of w |(W - Q) x|^2: products in float32, sums in float64, in a fixed order.

    Args:
        weights: bfloat16 `[R, K]`, W.
        values: bfloat16 `[R, K]`, Q.
        inputs: bfloat16 `[n, K]`, a token a row.
        token_weights: float32 `[n]`, w.
    """
    difference = (weights.float() - values.float()).T
    found = 0.0
    for start in range(0, len(inputs), ROWS):
        moved = inputs[start : start + ROWS].float() @ difference
        squares = moved.square_().sum(1, dtype=moved.dtype).double()
        found += float(squares @ token_weights[start : start + ROWS].double())
    return found
