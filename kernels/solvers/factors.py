"""The Hessian of a matrix's inputs, ordered, damped and factorised: what GPTQ needs of it.

With H = M M^T and M upper triangular, the error (w - q) H (w - q)^T is the squared length of (w - q) M, whose entry j
holds no later column than j. So columns are rounded first to last, each where its own entry is least (Babai's nearest
plane), and no inverse of H is taken. The textbook's U, the upper Cholesky factor of H^-1, is M^-1. With J the reversal
of order and L L^T = J H J, M is J L J.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from k2quant.errors import UsageError
from k2quant.ground.saying.showing import brief
from k2quant.kernels.devices.precision import require_whole_products
from k2quant.kernels.devices.single import single_threaded
from k2quant.kernels.devices.threads import over_rows
from k2quant.kernels.solvers.cpu import loops

PANEL = 256
"""Columns, and rows, of a matrix that are factorised together: at K = 7168 faster than 128 and 512, and than MKL's own
Cholesky, which takes 1.2 times as long on one thread."""

DAMPING = 0.1
"""Of the mean of the diagonal, added to all of it; QMoE's, and of MoE-Quant's published commands, for experts."""


@dataclass(frozen=True, slots=True, eq=False)
class Factor:
    """A Hessian as GPTQ goes through it."""

    order: Tensor
    """int64 `[K]`: the columns as they are rounded, by falling diagonal, the lower index first where two are equal."""
    upper: Tensor
    """float32 `[K, K]`, upper triangular M: M M^T is the damped Hessian with rows and columns in `order`.

    Its columns are contiguous, for they are what is multiplied by.
    """

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)


def factorise(hessian: Tensor, *, damping: float = DAMPING) -> Factor | None:
    """Order, damp and factorise a Hessian, in float32, on up to `torch.get_num_threads()` threads with equal bits.

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
    added = torch.tensor(damping * float(diagonal.double().mean()), dtype=torch.float32, device=hessian.device)
    with single_threaded() as cores:
        threads = cores if hessian.device.type == "cpu" else 1
        lower = _ordered(hessian, order, threads)
        lower.diagonal().add_(added)
        whole = _decompose(lower, threads)
    return Factor(order, lower.T) if whole else None


def _ordered(hessian: Tensor, order: Tensor, threads: int) -> Tensor:
    """Return the lower triangle of a Hessian with rows and columns in an order, zeros above."""
    if hessian.device.type != "cpu":
        return hessian[order][:, order].tril()
    lower, places = torch.empty(hessian.shape), order.numpy()
    source, target = hessian.contiguous().numpy(), lower.numpy()
    over_rows(
        len(lower), PANEL, lambda first, last: loops.order_rows(source, places, first, last, target), threads=threads
    )
    return lower


def _decompose(matrix: Tensor, threads: int) -> bool:
    """Put M^T in the place of a symmetric matrix of which the lower triangle stands, a panel of rows at a time.

    The last panel comes first: what it needs of later rows is whole by then. Columns are cut in the same places for any
    number of threads.

    Returns:
        Whether there is a factor; if not, `matrix` holds anything.
    """
    for start in range((len(matrix) - 1) // PANEL * PANEL, -1, -PANEL):
        stop = min(start + PANEL, len(matrix))
        panel, later = matrix[start:stop], matrix[stop:]
        if stop < len(matrix):
            over_rows(stop, PANEL, partial(_subtract, panel, later[:, start:stop].T, later), threads=threads)
        corner = panel[:, start:stop].tril()
        lower, failed = torch.linalg.cholesky_ex((corner + corner.tril(-1).T).flip(0, 1))
        roots = lower.diagonal()
        if failed or not bool((roots.isfinite() & (roots > 0)).all()):
            return False
        root = lower.flip(0, 1)
        panel[:, start:stop] = root.T
        over_rows(start, PANEL, partial(_divide, panel, root), threads=threads)
    return True


def _subtract(panel: Tensor, left: Tensor, right: Tensor, first: int, last: int) -> None:
    for columns in _stripes(first, last):
        panel[:, columns].addmm_(left, right[:, columns], alpha=-1)


def _divide(panel: Tensor, root: Tensor, first: int, last: int) -> None:
    for columns in _stripes(first, last):
        panel[:, columns] = torch.linalg.solve_triangular(root, panel[:, columns], upper=True)


def _stripes(first: int, last: int) -> Iterator[slice]:
    return (slice(start, min(start + PANEL, last)) for start in range(first, last, PANEL))
