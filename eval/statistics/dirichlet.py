r"""The chance that a mean with random weights is at most 0: to about 12 digits, without random numbers.

Exponential waiting times, divided by their sum, are uniform weights: Dirichlet(1, ..., 1). So the weighted mean of
numbers is at most 0 just where the sum S of the numbers times independent waiting times is, and equal numbers share one
gamma variable. With w the numbers and a how often each occurs, S has the generating function prod (1 - w s)^-a, and

    P(S <= 0) = 1 / (2 pi i) * integral of prod (1 - w s)^-a / -s ds

upwards across the axis, anywhere between the largest pole below 0 and 0. Here that is at the saddle, where nothing
cancels (Butler, Saddlepoint Approximations with Applications, 2007). From there the path bends as the steepest descent
does: s = saddle + i sigma sinh(u + i delta) + sigma sin(delta), sigma being the saddle's width. Every pole is at least
sigma away, so that the trapezoidal rule in u is right to rounding after a few dozen points (Trefethen and Weideman,
SIAM Review 56:385, 2014). Where a bend leads through heights instead, half of the points give another sum than all of
them, and a smaller bend is taken.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np

from k2quant.eval.statistics.binomial import Floats

_STEP = 0.05
_BLOCK = 64  # points between two looks at whether the rest counts
_TERMS = 1 << 18  # of the logarithm at once: 4 MB
_FAR = 60  # of u: the integrand falls at least as exp(-u)
_HIGHEST = 100.0  # of the integrand's logarithm: on a path that bends too far it may grow beyond all numbers
_ROUGH = 1e-9
_TRIES = 10  # with half the bend and half the step each; hardly ever a second one
_NEGLIGIBLE = 1e-17  # of the integrand at the saddle
_TILT = 0.4  # sine of the largest bend: with less it oscillates more, with more it may grow on its way
_NEAR = 0.01  # of the saddle's width: any other point nearby does as well
_HALVINGS = 200  # at most, until it is so near; usually ten


def chance_of_none(weights: Floats, shapes: Floats) -> Floats:
    """Return the chance that a sum of gamma variables times weights is at most 0.

    Args:
        weights: float64 `[k]`.
        shapes: float64 `[..., k]`, whole and not negative: how many waiting times have each weight. Of those below 0
            there is at least one.

    Returns:
        float64 `[...]`, 0 to 1.
    """
    weights = np.asarray(weights, dtype=np.float64)
    rows = np.asarray(shapes, dtype=np.float64).reshape(-1, len(weights))
    found = np.ones(len(rows))
    mixed = rows[:, weights > 0].any(axis=1)
    less = rows @ weights > 0  # then the chance is the smaller one of the two that make 1
    for sign, those in ((1, mixed & less), (-1, mixed & ~less)):
        if those.any():
            tail = _integral(sign * weights, rows[those])
            found[those] = tail if sign == 1 else 1 - tail
    return np.clip(found, 0, 1).reshape(np.shape(shapes)[:-1])


def _integral(weights: Floats, shapes: Floats) -> Floats:
    """Return the chances; each row of `shapes` `[rows, k]` has weights on both sides of 0."""
    weights = np.where(shapes > 0, weights, 0.0)  # what does not occur bounds nothing
    away = _saddle(weights, shapes)
    height = -np.einsum("rk,rk->r", shapes, np.log1p(weights * away[:, None])) - np.log(away)
    # The pole at nothing is one more waiting time, of the weight that makes its factor 1 - z / away.
    slopes = np.concatenate((weights / (1 + weights * away[:, None]), 1 / away[:, None]), axis=1)
    shapes = np.concatenate((shapes, np.ones((len(shapes), 1))), axis=1)
    width = 1 / np.sqrt(np.einsum("rk,rk->r", shapes, slopes**2))
    skew = 2 * np.einsum("rk,rk->r", shapes, slopes**3) * width**3
    bend, step = np.arcsin(np.clip(-skew / 3, -_TILT, _TILT)), _STEP
    total, left = np.empty(len(shapes)), np.arange(len(shapes))
    for _ in range(_TRIES):
        total[left], rough = _along(shapes[left], slopes[left], width[left], bend[left], step)
        left, bend, step = left[rough], bend / 2, step / 2
        if not len(left):
            found: Floats = np.exp(height) * width / (2 * math.pi) * total
            return found
    raise AssertionError(weights, shapes[left])


def _along(shapes: Floats, slopes: Floats, width: Floats, bend: Floats, step: float) -> tuple[Floats, Any]:
    """Integrate what is 1 at the saddle along its path; say in which rows half of the points give something else."""
    even, odd = np.zeros(len(shapes)), np.zeros(len(shapes))
    for start in itertools.count(0, _BLOCK):
        u = step * np.arange(start, start + _BLOCK)
        path = u + 1j * bend[:, None]
        z = width[:, None] * (1j * np.sinh(path) + np.sin(bend)[:, None])
        log = _logarithm(shapes, slopes, z)
        part = np.exp(np.minimum(log.real, _HIGHEST) + 1j * log.imag) * np.cosh(path)
        even += 2 * part[:, ::2].real.sum(axis=1) - (part[:, 0].real if start == 0 else 0)
        odd += 2 * part[:, 1::2].real.sum(axis=1)
        if u[-1] > _FAR or (np.abs(part[:, -1]) < _NEGLIGIBLE).all():
            # The error of the rule is about the square of that with every second point.
            return step * (even + odd), ~(np.abs(even - odd) < _ROUGH * np.abs(even + odd))
    raise AssertionError  # the count has no end


def _logarithm(shapes: Floats, slopes: Floats, z: Any) -> Any:
    """Return the integrand's logarithm, complex `[rows, points]`, at points `z` away from the saddle."""
    found = np.zeros_like(z)
    wide = max(1, _TERMS // z.size)
    for first in range(0, shapes.shape[1], wide):
        some = slice(first, first + wide)
        found -= np.einsum("rk,rkp->rp", shapes[:, some], np.log1p(-slopes[:, some, None] * z[:, None, :]))
    return found


def _saddle(weights: Floats, shapes: Floats) -> Floats:
    """Return how far below 0 the integrand is smallest along the axis: by Newton's steps, or by halving."""
    low, high = np.zeros(len(shapes)), -1 / weights.min(axis=1)
    away: Floats = high / 2
    for _ in range(_HALVINGS):
        slopes = weights / (1 + weights * away[:, None])
        rise = -np.einsum("rk,rk->r", shapes, slopes) - 1 / away
        bend = np.einsum("rk,rk->r", shapes, slopes**2) + 1 / away**2
        if (np.abs(rise) < _NEAR * np.sqrt(bend)).all():
            break
        low, high = np.where(rise < 0, away, low), np.where(rise < 0, high, away)
        step = away - rise / bend
        away = np.where((low < step) & (step < high), step, (low + high) / 2)
    return away
