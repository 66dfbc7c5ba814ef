"""One input, the matrices that it goes into, and what each ships with: the best of three ways on held-out tokens.

The ways are plain rounding, rounding at scales that are searched, and GPTQ at these scales. Tiers by the number of
tokens need no limits: what is believed of an input is drawn to a prior (`deciding.drawing`), so that with few tokens
GPTQ goes over into searched scales by itself, and an input that no token reached is never given to it. What held-out
tokens find worse than plain rounding does not ship.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from k2quant.calib.solving.deciding import ways
from k2quant.calib.solving.deciding.drawing import believed
from k2quant.calib.solving.deciding.judging import judge_of
from k2quant.conversion.searching.measuring import over_rounding
from k2quant.ground.saying.showing import brief
from k2quant.kernels.codecs.grids import GROUP, largest_code
from k2quant.kernels.devices.single import single_threaded
from k2quant.kernels.solvers.factors import factorise

if TYPE_CHECKING:
    from torch import Tensor

    from k2quant.calib.solving.deciding.drawing import Belief
    from k2quant.calib.solving.deciding.judging import Judge
    from k2quant.calib.solving.deciding.ways import Way
    from k2quant.calib.solving.evidence import Evidence
    from k2quant.calib.solving.settings import Settings
    from k2quant.kernels.solvers.factors import Factor


class Settled(NamedTuple):
    """What a matrix ships with."""

    values: Tensor
    """BF16 `[R, K]`: bf16(code * scale)."""
    scales: Tensor
    """BF16 `[R, K/32]`."""
    facts: dict[str, Any]
    """As a report's `scales` has them."""

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)


class _Case(NamedTuple):
    """What matrices of one input have in common."""

    settings: Settings
    belief: Belief | None
    factor: Factor | None
    judge: Judge
    tokens: int
    """Training tokens."""
    reason: str | None
    """Why nothing is solved; None if something is."""


def settle(weights: Mapping[str, Tensor], evidence: Evidence, settings: Settings) -> dict[str, Settled]:
    """Round matrices that share an input, each in the way that loses least on held-out tokens.

    A matrix that plain rounding gives back exactly, as it does native INT4, stays what it is. A Hessian that cannot be
    factorised ends in searched scales, never in an error. The facts of each are `method` (gptq, imatrix, mse or rtn),
    `relative` (its error over plain rounding's), `measure` (who judged), `tokens` (held out, that did), `seen` (in
    training), `saturated` (share of weights whose code was clamped because others had moved them), `short` (share of
    groups without the largest code) and, where it is not GPTQ, `reason`.

    Args:
        weights: BF16 `[R, K]` by projection; K is a multiple of 32.
        evidence: what is known of their input.
        settings: how they are solved.

    Returns:
        What each ships with; the same bits for any number of threads.

    Raises:
        ValueAt: on a CPU, a weight is not finite.
    """
    rounded = {name: ways.plain(each, settings.bits) for name, each in weights.items()}
    lossy = [name for name, each in weights.items() if not torch.equal(each, rounded[name].values)]
    case = _case(evidence, settings) if lossy else None
    return {
        name: _best(each, rounded[name], case)
        if case is not None and name in lossy
        else _shipped(rounded[name], settings, _exact(evidence))
        for name, each in weights.items()
    }


def _case(evidence: Evidence, settings: Settings) -> _Case:
    factor, reason = None, None
    with single_threaded():
        belief = believed(evidence)
    if not evidence.tokens:
        reason = "no token came"
    elif belief is None:
        reason = "the Hessian is zero or not finite"
    elif (factor := factorise(belief.hessian, damping=settings.damping)) is None:
        reason = "the Hessian is not positive definite"
        belief = belief._replace(hessian=belief.square.diag())
    judge = judge_of(evidence, belief)
    return _Case(settings, belief, factor, judge, evidence.tokens, reason)


def _best(weights: Tensor, rounded: Way, case: _Case) -> Settled:
    """Return the way of least held-out error; among equals the one that was asked for."""
    bits, how = case.settings.bits, case.settings.scales
    found = [rounded] if how == "rtn" else [rounded, ways.searched(weights, case.belief, how, bits)]
    if case.factor is not None:
        found.append(ways.solved(weights, found[-1].scales, case.factor, bits))
    errors = [case.judge.error(weights, way.values) for way in found]
    comparable = all(map(math.isfinite, errors))
    best = min(range(len(found)), key=lambda at: (errors[at], -at)) if comparable else 0
    facts: dict[str, Any] = {
        "relative": over_rounding(errors[best], errors[0]) if comparable else 1.0,
        "measure": case.judge.measure,
        "tokens": case.judge.tokens,
        "seen": case.tokens,
    }
    if found[best].method != "gptq":
        less = f"{found[best].method} loses less on held-out data"
        facts["reason"] = case.reason or (less if comparable else "errors on held-out data are not finite")
    return _shipped(found[best], case.settings, facts)


def _exact(evidence: Evidence) -> dict[str, Any]:
    return {
        "relative": 1.0,
        "measure": "weights",
        "tokens": 0,
        "seen": evidence.tokens,
        "reason": "rounding loses nothing",
    }


def _shipped(way: Way, settings: Settings, facts: Mapping[str, Any]) -> Settled:
    saturated = way.saturated / max(way.values.numel(), 1)
    told = {"method": way.method, **facts, "saturated": saturated, "short": _short(way, settings.bits)}
    return Settled(way.values, way.scales, told)


def _short(way: Way, bits: int) -> float:
    """Return the share of groups whose largest code is not the largest there is: amax would give another scale."""
    tops = way.values.unflatten(1, (-1, GROUP)).abs().amax(2).float()
    return float((tops < way.scales.float() * (largest_code("moonshot", bits) - 0.5)).float().mean())
