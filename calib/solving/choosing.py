"""One input, the matrices that it goes into, and what each ships with: the best of three ways on held-out tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from k2quant.calib.solving.deciding import ways
from k2quant.calib.solving.deciding.drawing import believed
from k2quant.calib.solving.deciding.judging import judge_of
from k2quant.ground.saying.showing import brief
from k2quant.kernels.codecs.grids import GROUP, largest_code
from k2quant.kernels.solvers.factors import factorise

if TYPE_CHECKING:
    from torch import Tensor

    from k2quant.calib.solving.deciding.drawing import Belief
    from k2quant.calib.solving.deciding.judging import Judge
    from k2quant.calib.solving.deciding.ways import Way
    from k2quant.calib.solving.evidence import Evidence
    from k2quant.calib.solving.settings import Settings
    from k2quant.kernels.solvers.factors import Factor

_MOST = 1e9
"""The largest relative error that a report says, of a matrix on which rounding loses next to nothing."""


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
    judge: Judge | None
    tokens: int
    """Training tokens."""
    held: int
    """Held-out tokens."""


def settle(weights: Mapping[str, Tensor], evidence: Evidence, settings: Settings) -> dict[str, Settled]:
    """Round matrices that share an input, each in the way that loses least on held-out tokens.

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
    belief = believed(evidence) if lossy else None
    factor = None if belief is None else factorise(belief.hessian, damping=settings.damping)
    case = _Case(settings, belief, factor, judge_of(evidence), evidence.tokens, len(evidence.held))
    return {
        name: _best(each, rounded[name], case)
        if name in lossy
        else _shipped(rounded[name], case, relative=1.0, reason="rounding loses nothing")
        for name, each in weights.items()
    }


def _best(weights: Tensor, rounded: Way, case: _Case) -> Settled:
    """Return the way of least held-out error."""
    bits, how = case.settings.bits, case.settings.scales
    found = [rounded] if how == "rtn" else [rounded, ways.searched(weights, case.belief, how, bits)]
    if case.factor is not None:
        found.append(ways.solved(weights, found[-1].scales, case.factor, bits))
    if case.judge is None:
        return _shipped(found[1 if how != "rtn" else 0], case, relative=1.0, reason=_missing(case))
    errors = [case.judge.error(weights, way.values) for way in found]
    # The last among equals: it is the one that was asked for.
    best = min(range(len(found)), key=lambda at: (errors[at], -at))
    relative = min(errors[best] / errors[0], _MOST) if errors[0] else float(_MOST if errors[best] else 1)
    reason = None if found[best].method == "gptq" else _missing(case) or "worse on held-out tokens"
    return _shipped(found[best], case, relative=relative, reason=reason)


def _missing(case: _Case) -> str | None:
    """Say why nothing was solved; None if something was."""
    if case.belief is None:
        return "no token came" if not case.tokens else "the Hessian is zero or not finite"
    return "the Hessian is not positive definite" if case.factor is None else None


def _shipped(way: Way, case: _Case, *, relative: float, reason: str | None) -> Settled:
    largest = largest_code("moonshot", case.settings.bits)
    tops = way.values.unflatten(1, (-1, GROUP)).abs().amax(2).float() / way.scales.float()
    facts: dict[str, Any] = {
        "method": way.method,
        "relative": relative,
        "measure": case.judge.measure if case.judge else "weights",
        "tokens": case.held,
        "seen": case.tokens,
        "saturated": way.saturated / way.values.numel(),
        "short": float((tops.round() < largest).float().mean()),
    }
    if reason:
        facts["reason"] = reason
    return Settled(way.values, way.scales, facts)
