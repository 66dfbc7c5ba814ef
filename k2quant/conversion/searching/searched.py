"""Better scales than rounding's: searched, judged on data that decided nothing, dropped where that finds them worse.

A panel is written at searched scales as soon as it is read, and what both ways of rounding lose is noted. With the last
panel of a weight it is known which is better; the few for which that is plain rounding are written once more.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from k2quant.calib.stats.digests import base_of
from k2quant.calib.stats.matching import check_bytes
from k2quant.checkpoint.panels import PANEL_WEIGHTS, format_of
from k2quant.checkpoint.writing.destination import SHARDS_ABREAST
from k2quant.conversion.placing import Job, ShardPlan, target_of
from k2quant.conversion.plan import Plan
from k2quant.conversion.searching.fitting import PLAIN, WEIGHTED
from k2quant.conversion.searching.measuring import COLUMNS, Known, errors, over_rounding
from k2quant.formats.format import Method, Parts

if TYPE_CHECKING:
    from k2quant.calib.stats.reading import Stats
    from k2quant.formats.transcode import Scratch
    from k2quant.kernels.codecs.figures import Figures
    from k2quant.kernels.codecs.seam import Codecs
    from k2quant.kernels.codecs.values import U16


@dataclass(slots=True)
class _Weight:
    """What is known of a weight, and found, while its panels are searched."""

    known: Known
    errors: dict[int, tuple[float, ...]] = field(default_factory=dict)
    """By first row of a panel: what searched and plain scales lose."""


class Searched:
    """A `stream.Rounder` that searches scales; what held-out data finds worse than rounding is rounded."""

    def __init__(
        self,
        plan: Plan,
        method: Method,
        stats: Stats | None,
        calibrated: Iterable[Stats] = (),
        but: Collection[str] = (),
    ) -> None:
        """Take what `searched` has checked.

        Args:
            plan: of the conversion.
            method: how scales are searched.
            stats: what errors are weighted and judged by, if by anything.
            calibrated: statistics that serve something else: with these, too, another weight than was calibrated is
                refused.
            but: names of main tensors of weights that somebody else writes.
        """
        self._method, self._stats = method, stats
        self._calibrated = (*(() if stats is None else (stats,)), *calibrated)
        self._taken = frozenset(
            job.name
            for job in plan.jobs()
            if job.target is not None and job.weight.main.name not in but and plan.recipe.searches(job.weight)
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
        return moments + hessians + workers * 8 * (COLUMNS * self._widest + 3 * PANEL_WEIGHTS)

    def begin(self, abreast: int) -> None:
        """Have statistics of as many layers in memory as shards are written at a time: most hold one."""
        if self._stats is not None:
            self._stats.keep(_layers(abreast))

    def batches(self, shards: Sequence[ShardPlan]) -> Iterable[Sequence[ShardPlan]]:
        """Have all shards written at once: nothing is done before."""
        return (shards,)

    def remarks(self) -> Iterable[str]:
        """Return what is worth saying of how weights are searched, beside what statistics do not know."""
        return ()

    def effort(self, job: Job) -> float:
        """Return how many searches a weight takes."""
        return float(self.takes(job))

    def takes(self, job: Job) -> bool:
        """Tell whether a weight's scales are searched; a bias of the same name is copied."""
        return job.target is not None and job.name in self._taken

    def panel(self, job: Job, start: int, parts: Parts, outputs: Parts, codecs: Codecs, scratch: Scratch) -> Figures:
        """Store a panel at searched scales, or at plain ones where these were found better."""
        from k2quant.formats.transcode import to_bf16

        values = to_bf16(format_of(job.weight), parts, codecs=codecs, scratch=scratch)
        return self._rounded(job, start, values, outputs, codecs, scratch)

    def _rounded(self, job: Job, start: int, values: U16, outputs: Parts, codecs: Codecs, scratch: Scratch) -> Figures:
        """Store BF16 bits `[R, K]`, as `panel` does."""
        target = target_of(job)
        if job.name in self._facts:
            return target.encode(values, outputs, codecs)
        weight = self._known(job)
        scales = target.search(values, weight.known.importance, codecs, weight.known.mean)
        figures = target.store(values, scales, outputs, codecs)
        ways = (scales, target.choose(values, codecs))
        self._note(job, start, errors(values, ways, weight.known, target, codecs, scratch))
        return figures

    def _note(self, job: Job, start: int, found: tuple[float, ...]) -> None:
        weight = self._known(job)
        with self._lock:
            weight.errors[start] = found

    def again(self, job: Job, read: Mapping[str, str]) -> bool:
        """Refuse a weight that is not the calibrated one; tell whether held-out data finds rounding better.

        Raises:
            CheckpointError: its bytes are others.
        """
        for stats in self._calibrated:
            check_bytes(stats, job.weight, read)
        if not self.takes(job):
            return False
        with self._lock:
            weight = self._weights.pop(job.name)
        better, plain = (sum(error[side] for _, error in sorted(weight.errors.items())) for side in (0, 1))
        known = weight.known
        worse = known.measure != "weights" and better > plain
        method = PLAIN if worse else known.method
        facts: dict[str, Any] = {"method": method, "relative": over_rounding(better, plain)}
        facts["measure"] = known.measure
        if known.held is not None:
            facts["tokens"] = known.held.tokens
        if reason := "worse than rounding on held-out data" if worse else known.reason:
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
                known = Known.of(self._stats, base_of(job.weight), self._method, weighted=self.weighted)
                self._weights[job.name] = _Weight(known)
            return self._weights[job.name]


def _layers(abreast: int) -> int:
    """Return the layers whose statistics are asked for in turn: one a shard, and the next where one is through."""
    return abreast + 1
