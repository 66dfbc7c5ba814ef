"""What is known of the input of one matrix, or of some that share it: sums over tokens, and tokens that judge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from k2quant.ground.saying.showing import brief

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prior:
    """What all tokens of a layer say of an input that each routed expert has a share of: that of gate and up."""

    hessian: Tensor
    """float32 `[K, K]`: mean of x x^T over the layer's training tokens, symmetric."""
    mean: Tensor
    """float32 `[K]`: mean of x over them."""
    tokens: int
    """How many they are; with none the two above are zeros."""
    held: Tensor
    """BF16 `[m, K]`: held-out tokens of the layer, or an even sample of them."""

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Evidence:
    """What one input was seen to be."""

    hessian: Tensor
    """float32 `[K, K]`: sum of w x x^T over sum of w, over the training tokens; symmetric; zeros without any."""
    mean: Tensor
    """float32 `[K]`: mean of x over them, weighted alike."""
    weight: float
    """Sum of w: for a routed expert of the square of the weight that the router gave it, else the number of tokens."""
    tokens: int
    """Training tokens that came."""
    prior: Prior | None
    """For gate and up of a routed expert; None: nobody else has this input, or every token came."""
    held: Tensor
    """BF16 `[n, K]`: the held-out tokens that came, or an even sample of them."""
    held_weights: Tensor
    """float32 `[n]`: w of each."""

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)


def even_sample(count: int, most: int) -> Tensor:
    """Return which of `count` things are taken, int64 on the CPU: all of them, or `most` at even distances."""
    kept = min(count, most)
    return torch.arange(kept) * count // max(kept, 1)
