"""Better scales than rounding's: searched, judged on data that decided nothing, dropped where that finds them worse.

A panel is written at searched scales as soon as it is read, and what both ways of rounding lose is noted. With the last
panel of a weight it is known which is better; the few for which that is plain rounding are written once more.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from k2quant.calib.stats.digests import base_of
from k2quant.calib.stats.matching import check_bytes, check_source
from k2quant.checkpoint.panels import PANEL_WEIGHTS, format_of, panel_state
from k2quant.conversion.placing import Job, ShardPlan
from k2quant.conversion.plan import Plan
from k2quant.conversion.searching.fitting import FOLDED, PLAIN, UNWEIGHTED, WEIGHTED, check_method, unmeasured
from k2quant.conversion.stream import SHARDS_ABREAST
from k2quant.errors import UsageError
from k2quant.formats.format import Format, Method, Parts

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from k2quant.calib.stats.blending import HeldOut
    from k2quant.calib.stats.reading import Stats
    from k2quant.formats.transcode import Scratch
    from k2quant.kernels.codecs.figures import Figures
    from k2quant.kernels.codecs.seam import Codecs
    from k2quant.kernels.codecs.values import F32, U16

_MOST = 1e9
"""The largest error that a report says, in units of rounding's, which may be nothing."""

_SAMPLED = 8  # rows of which one is measured where nothing is decided
_COLUMNS = 512  # of a Hessian that are widened to float64 at a time


def searched(plan: Plan, stats: Stats | None) -> tuple[Plan, Searched | None]:
    """Return a plan that says how scales are searched, and who does it; None where nobody asked for it.

    Args:
        plan: of a conversion.
        stats: what is known of the source's inputs, if anything.

    Raises:
        UsageError: the method needs statistics, or has no use for them.
        CheckpointError: they are another model's.
    """
    method = plan.options.in_force.method
    check_method(method, stats=stats is not None)
    if method == PLAIN:
        return plan, None
    if method == FOLDED:
        raise UsageError(f"`method=` {method} is not there yet: take `method=` {WEIGHTED}")
    from k2quant.kernels.codecs.scales.search import CANDIDATES

    said: dict[str, Any] = {"asked": method, "candidates": CANDIDATES}
    remarks, rounder = plan.remarks, Searched(plan, method, stats)
    if stats is not None:
        jobs = list(plan.jobs())
        check_source(stats, plan.source, [job.weight for job in jobs])
        said["stats"] = stats.fingerprint
        remarks = (*remarks, *unmeasured(filter(rounder.takes, jobs), stats))
    return replace(plan, method=said, remarks=remarks), rounder


@dataclass(slots=True)
class _Weight:
    """What is known of a weight while its panels are searched."""

    method: Method
    """How: without importance for the least squared error."""
    importance: F32 | None = None
    mean: F32 | None = None
    held: HeldOut | None = None
    """Moments of columns on the held-out part; None: they all count alike."""
    hessian: F32 | None = None
    """In its place, for the whole error of the outputs."""
    measure: str = "weights"
    reason: str | None = None
    errors: dict[int, tuple[float, float]] = field(default_factory=dict)
    """By first row of a panel: what searched and plain scales lose."""


class Searched:
    """A `stream.Rounder` that searches scales; what held-out data finds worse than rounding is rounded."""

    def __init__(self, plan: Plan, method: Method, stats: Stats | None) -> None:
        """Take what `searched` has checked."""
        self._method, self._stats = method, stats
        self._taken = frozenset(
            job.name for job in plan.jobs() if job.target is not None and plan.recipe.searches(job.weight)
        )
        widths = [job.weight.shape[-1] for job in plan.jobs() if job.name in self._taken]
        self._widest = max(widths, default=0)
        self._lock = threading.Lock()
        self._weights: dict[str, _Weight] = {}
        self._facts: dict[str, dict[str, Any]] = {}

    def __len__(self) -> int:
        """Return the number of weights that are searched."""
        return len(self._taken)

    @property
    def weighted(self) -> bool:
        """Whether errors are weighted by what a calibration saw."""
        return self._method == WEIGHTED

    @property
    def judged(self) -> bool:
        """Whether held-out data judges what was searched; else a sample of the rows says how much is won."""
        return self._stats is not None

    @property
    def by_outputs(self) -> bool:
        """Whether what is measured well enough is judged by whole Hessians."""
        return self._stats is not None and self._stats.manifest.hessians

    def memory(self, workers: int) -> int:
        """Return the bytes that a conversion needs for this, beside its own."""
        if self._stats is None:
            return 0
        abreast = min(workers, SHARDS_ABREAST)
        moments = self._stats.memory(_layers(abreast))
        if not self.by_outputs:
            return moments
        # A worker has a panel of one weight, and each shard may have one more that is begun and waits for its turn.
        hessians = (workers + abreast) * 4 * self._widest**2
        return moments + hessians + workers * 8 * (_COLUMNS * self._widest + 3 * PANEL_WEIGHTS)

    def begin(self, abreast: int) -> None:
        """Have statistics of as many layers in memory as shards are written at a time: most hold one."""
        if self._stats is not None:
            self._stats.keep(_layers(abreast))

    def batches(self, shards: Sequence[ShardPlan]) -> Iterable[Sequence[ShardPlan]]:
        """Have all shards written at once: nothing is done before."""
        return (shards,)

    def takes(self, job: Job) -> bool:
        """Tell whether a weight's scales are searched."""
        return job.name in self._taken

    def panel(self, job: Job, start: int, parts: Parts, outputs: Parts, codecs: Codecs, scratch: Scratch) -> Figures:
        """Store a panel at searched scales, or at plain ones where these were found better."""
        from k2quant.formats.transcode import to_bf16

        source, target = format_of(job.weight), job.target
        if target is None:
            msg = f"{job.name} is copied"  # never asked
            raise AssertionError(msg)
        values = to_bf16(source, parts, codecs=codecs, scratch=scratch)
        if job.name in self._facts:
            return target.encode(values, outputs, codecs)
        weight = self._known(job)
        scales = target.search(values, weight.importance, codecs, weight.mean)
        figures = target.store(values, scales, outputs, codecs)
        if weight.hessian is None:
            found = _errors(values, scales, target, weight.held, codecs)
        else:
            state = panel_state(target, values.shape, 0, len(values))
            plain = {suffix: scratch.take(f"plain {suffix}", spec) for suffix, spec in state.items()}
            target.store(values, target.choose(values, codecs), plain, codecs)
            found = _output_errors(values, (outputs, plain), target, weight.hessian, codecs)
        with self._lock:
            weight.errors[start] = found
        return figures

    def again(self, job: Job, read: Mapping[str, str]) -> bool:
        """Refuse a weight that is not the calibrated one; tell whether held-out data finds rounding better.

        Raises:
            CheckpointError: its bytes are others.
        """
        if self._stats is not None:
            check_bytes(self._stats, job.weight, read)
        if job.name not in self._taken:
            return False
        with self._lock:
            weight = self._weights.pop(job.name)
        better, plain = (sum(error[side] for _, error in sorted(weight.errors.items())) for side in (0, 1))
        worse = weight.measure != "weights" and better > plain
        relative = min(better / plain, _MOST) if plain else float(_MOST if better else 1)
        facts: dict[str, Any] = {"method": PLAIN if worse else weight.method, "relative": relative}
        facts["measure"] = weight.measure
        if weight.held is not None:
            facts["tokens"] = weight.held.tokens
        if reason := "worse than rounding on held-out data" if worse else weight.reason:
            facts["reason"] = reason
        self._facts[job.name] = facts
        return worse

    def facts(self, job: Job) -> Mapping[str, Any]:
        """Return which scales a weight has, and how good they are."""
        return {"scales": self._facts[job.name]}

    def summary(self) -> Mapping[str, Any]:
        """Return nothing: the plan says how scales were searched, and each record what came of it."""
        return {}

    def _known(self, job: Job) -> _Weight:
        """Return what is known of a weight; the first of its panels reads it."""
        with self._lock:
            if job.name not in self._weights:
                self._weights[job.name] = self._look_up(job)
            return self._weights[job.name]

    def _look_up(self, job: Job) -> _Weight:
        base = base_of(job.weight)
        if self._stats is None or base is None or (held := self._stats.held_out(base)) is None:
            reason = "not measured by the calibration" if self.weighted else None
            return _Weight(UNWEIGHTED, reason=reason)
        found = _Weight(self._method, held=held, measure="validation")
        if self.weighted:
            found.importance, found.mean = self._stats.importance(base), self._stats.mean(base)
        if held.blended:
            found.measure = "validation, blended"
        elif (hessian := self._stats.hessian(base, "validation")) is not None:
            found.hessian, found.measure = hessian, "validation, hessian"
        return found


def _layers(abreast: int) -> int:
    """Return the layers whose statistics are asked for in turn: one a shard, and the next where one is through."""
    return abreast + 1


def _errors(
    values: U16, scales: NDArray[Any], target: Format, held: HeldOut | None, codecs: Codecs
) -> tuple[float, float]:
    """Return what a panel loses at searched and at plain scales.

    Without data nothing is decided by it, and every eighth row is enough to say how much is won; a tenth of the time
    went there. Panels begin at multiples of eight.
    """
    import numpy as np

    if held is None:
        values, scales = np.ascontiguousarray(values[::_SAMPLED]), np.ascontiguousarray(scales[::_SAMPLED])
    weights, mean = (None, None) if held is None else (held.values, held.mean)
    plain = target.choose(values, codecs)
    searched, rounded = (target.weighted_error(values, each, weights, codecs, mean) for each in (scales, plain))
    return searched, rounded


def _output_errors(
    values: U16, ways: tuple[Parts, Parts], target: Format, hessian: F32, codecs: Codecs
) -> tuple[float, float]:
    """Return tr(D H D^T) for both ways in which a panel was rounded, D being what it lost; in float64.

    Args:
        values: BF16 bits `[R, K]`.
        ways: the panel's arrays, rounded.
        target: their format.
        hessian: float32 `[K, K]`.
        codecs: who decodes.
    """
    import numpy as np

    from k2quant.kernels.codecs.values import bf16_to_float

    exact, after = bf16_to_float(values), np.empty_like(values)
    lost: list[NDArray[np.float64]] = []
    for parts in ways:
        target.decode(parts, after, codecs)
        lost.append((exact - bf16_to_float(after)).astype(np.float64))
    sums = [0.0, 0.0]
    for first in range(0, len(hessian), _COLUMNS):
        columns = slice(first, first + _COLUMNS)
        wide = hessian[: columns.stop, columns].astype(np.float64)
        for side, each in enumerate(lost):
            mine = each[:, columns]
            sums[side] += float(np.vdot(mine @ wide[first:], mine))
            sums[side] += 2 * float(np.vdot(each[:, :first] @ wide[:first], mine))  # a Hessian is symmetric
    return sums[0], sums[1]
