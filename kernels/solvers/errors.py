"""What a rounded matrix does to its outputs, on inputs that are given."""

from __future__ import annotations

import math

from torch import Tensor

from k2quant.kernels.devices.single import single_threaded
from k2quant.kernels.devices.threads import over_rows

TOKENS = 256
"""Tokens that one thread multiplies at once."""


def output_error(weights: Tensor, values: Tensor, inputs: Tensor, token_weights: Tensor) -> float:
    """Return the sum over tokens of w |(W - Q) x|^2: products in float32, sums in float64.

    Tokens are cut in the same places for any number of threads, up to `torch.get_num_threads()`, so that their number
    changes no bit.

    Args:
        weights: bfloat16 `[R, K]`, W.
        values: bfloat16 `[R, K]`, Q.
        inputs: bfloat16 `[n, K]`, a token a row; none give 0.
        token_weights: float32 `[n]`, w.
    """
    difference = (weights.float() - values.float()).T
    found = [0.0] * -(-len(inputs) // TOKENS)

    def work(first: int, last: int) -> None:
        for start in range(first, last, TOKENS):
            rows = slice(start, min(start + TOKENS, last))
            squares = (inputs[rows].float() @ difference).double().square_().sum(1)
            found[start // TOKENS] = float(squares @ token_weights[rows].double())

    with single_threaded() as threads:
        over_rows(len(inputs), TOKENS, work, threads=threads if inputs.device.type == "cpu" else 1)
    return math.fsum(found)
