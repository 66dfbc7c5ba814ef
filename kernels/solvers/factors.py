"""The Hessian of a matrix's inputs, ordered, damped and factorised: what GPTQ needs of it.

With H = M M^T and M upper triangular, the error (w - q) H (w - q)^T is the squared length of (w - q) M, whose entry j
holds no later column than j. So columns are rounded first to last, each where its own entry is least (Babai's nearest
plane), and no inverse of H is taken: the textbook's U, the upper Cholesky factor of H^-1, is M^-T with its columns in
reverse, and its U_jk / U_jj are what M's columns come to, read backwards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from k2quant.errors import UsageError
from k2quant.ground.saying.showing import brief

DAMPING = 0.1
"""Of the mean of the diagonal, added to all of it; QMoE's, and of MoE-Quant's published commands, for experts."""


@dataclass(frozen=True, slots=True, eq=False)
class Factor:
    """A Hessian as GPTQ goes through it."""

    order: Tensor
    """int64 `[K]`: the columns as they are rounded, by falling diagonal, the lower index first where two are equal."""
    upper: Tensor
    """float32 `[K, K]`, upper triangular M: M M^T is the damped Hessian with rows and columns in `order`."""

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)


def factorise(hessian: Tensor, *, damping: float = DAMPING) -> Factor | None:
    """Order, damp and factorise a Hessian, in float32.

    Args:
        hessian: float32 `[K, K]`, symmetric; its scale is of no matter.
        damping: times the mean of the diagonal, added to the diagonal.

    Returns:
        The factor; None where numbers are not finite, or the damped Hessian is not positive definite: all zeros too.

    Raises:
        UsageError: `damping` is no share, or torch is told to multiply float32 with fewer bits.
    """
    if not (math.isfinite(damping) and damping >= 0):
        raise UsageError(f"`damping`: expected a number of 0 or more, found {damping}")
    require_whole_products()
    diagonal = hessian.diagonal()
    order = diagonal.sort(descending=True, stable=True).indices
    added = torch.tensor(damping * float(diagonal.double().mean()), dtype=torch.float32)
    backwards = order.flip(0)
    damped = hessian[backwards][:, backwards]
    damped.diagonal().add_(added.to(hessian.device))
    lower, failed = torch.linalg.cholesky_ex(damped)
    roots = lower.diagonal()
    if failed or not bool((roots.isfinite() & (roots > 0)).all()):
        return None
    return Factor(order, lower.flip(0, 1).contiguous())


def require_whole_products() -> None:
    """Refuse to go on where torch rounds what it multiplies to TF32 or BF16.

    Raises:
        UsageError: it does.
    """
    if (found := torch.get_float32_matmul_precision()) != "highest":
        raise UsageError(
            f"float32 products have the precision {found!r}; GPTQ needs all their bits: "
            f"torch.set_float32_matmul_precision('highest')"
        )
