"""The contestants: each makes of a matrix the values that its method gives, through the codec that `convert` uses.

What `convert` does beyond that, to ship rounded what held-out data finds worse, is left out: the methods are compared.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from k2quant.calib.stats.blending import HeldOut
from k2quant.calib.stats.reading import Stats
from k2quant.kernels.codecs import cpu
from k2quant.kernels.codecs.grids import GROUP
from k2quant.kernels.codecs.reference import int4 as reference
from k2quant.kernels.codecs.values import F32, U16
from suites.calib import truth

METHODS = ("rtn", "mse", "imatrix")


def bits_of(matrix: Tensor) -> U16:
    """Return the BF16 bits `[N, K]` of a matrix whose values are BF16."""
    found: U16 = matrix.bfloat16().contiguous().view(torch.uint16).numpy()
    return found


class Known(NamedTuple):
    """What a calibration says of the columns of a matrix."""

    importance: F32
    """E[x^2], `[K]`."""
    mean: F32 | None
    """E[x], `[K]`; None to leave it out."""

    @classmethod
    def made_up(cls, columns: int, generator: np.random.Generator) -> Known:
        """Return something random of the right kind."""
        mean = generator.standard_normal(columns, np.float32)
        return cls(mean**2 + generator.random(columns, np.float32), mean)

    @classmethod
    def of(cls, stats: Stats, base: str) -> Known | None:
        """Return it for a matrix, by the train part; None for one that is not measured."""
        importance = stats.importance(base)
        return None if importance is None else cls(importance, stats.mean(base))


def scales(weights: U16, method: str, bits: int, known: Known | None = None) -> U16:
    """Return the scales `[N, K/32]` of a method; where nothing is known, `imatrix` is `mse`."""
    found = np.empty((weights.shape[0], weights.shape[1] // GROUP), np.uint16)
    if method == "rtn":
        cpu.int4.choose(weights, "moonshot", found, bits=bits)
    else:
        importance, mean = known if known and method == "imatrix" else (None, None)
        cpu.int4.search(weights, importance, found, mean=mean, bits=bits)
    return found


def values(weights: U16, scale: U16, bits: int) -> Tensor:
    """Return what codes at these scales decode to, float32 `[N, K]`."""
    matrix, given = (torch.from_numpy(part).view(torch.bfloat16) for part in (weights, scale))
    return reference.int4_at_scale(matrix, given, bits)[1].float()


def rounded(matrix: Tensor, method: str, bits: int, known: Known | None = None) -> Tensor:
    """Return a matrix as a method rounds it, float32 `[N, K]`."""
    weights = bits_of(matrix)
    return values(weights, scales(weights, method, bits, known), bits)


@torch.no_grad()
def rounded_model(model: Any, stats: Stats | None, method: str, bits: int) -> Any:
    """Return a copy of a model with every projection rounded; `imatrix` needs statistics."""
    result = copy.deepcopy(model)
    for base, matrix in truth.matrices(result).items():
        matrix.copy_(rounded(matrix, method, bits, Known.of(stats, base) if stats else None))
    return result


def judged(weights: U16, found: Mapping[str, U16], seen: HeldOut, bits: int) -> dict[str, float]:
    """Return what rule 6 sees of each method's scales: the error expected by held-out mean squares and means."""
    judge: Callable[..., float] = cpu.int4.weighted_error
    return {method: judge(weights, scale, seen.values, mean=seen.mean, bits=bits) for method, scale in found.items()}
