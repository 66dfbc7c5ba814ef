"""A search after a fold: powers of two go from the rows of `up_proj` into the columns of `down_proj`, expert by expert.

Both halves of a fold come from one choice, which follows from the two matrices and the statistics. Whichever half comes
first begins it, and all threads that need it take part. It is the same in a run that goes on after a kill, for the
choice reads both matrices and refuses bytes that were not calibrated. What the records of both say of it is compared
before anything looks finished.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from k2quant.calib.stats.digests import base_of
from k2quant.conversion.metadata import relatives
from k2quant.conversion.placing import Job, target_of
from k2quant.conversion.plan import Plan
from k2quant.conversion.searching.choosing import Choice, Fold, Pair
from k2quant.conversion.searching.fitting import WEIGHTED
from k2quant.conversion.searching.powers import shifted, shifted_scales
from k2quant.conversion.searching.searched import Searched
from k2quant.errors import OutputError
from k2quant.formats.format import Parts
from k2quant.ground import names
from k2quant.ground.units import counted

if TYPE_CHECKING:
    from k2quant.calib.stats.reading import Stats
    from k2quant.conversion.stream import Record
    from k2quant.formats.transcode import Scratch
    from k2quant.kernels.codecs.figures import Figures
    from k2quant.kernels.codecs.seam import Codecs
    from k2quant.kernels.codecs.values import U16

_UP, _DOWN = "up_proj", "down_proj"

_EFFORT = 4.0
"""Searches that a `down_proj` takes, measured: about one for the choice, two to judge it, one to write it."""


class Folding(Searched):
    """A `stream.Rounder` that folds, then searches as `imatrix` does."""

    def __init__(self, plan: Plan, stats: Stats, calibrated: Iterable[Stats] = ()) -> None:
        """Take what `searched` has checked."""
        super().__init__(plan, WEIGHTED, stats, calibrated)
        self._source, self._known_by = plan.source, stats
        self._halves: list[Job] = []
        self._pairs: dict[str, Pair] = {}
        self._pair_up(plan.jobs())
        self._folds: dict[str, Fold] = {}
        self._choices: dict[str, Choice] = {}
        self._choosing = threading.Lock()

    def _pair_up(self, jobs: Iterable[Job]) -> None:
        found = {job.name: job for job in jobs}
        for down in found.values():
            up = found.get(_partner(down.name, _DOWN, _UP) or "")
            if up is None or not self._measured(down) or up.weight.shape[:1] != down.weight.shape[1:]:
                continue
            if self.takes(up) and self.takes(down):
                self._pairs[up.name] = self._pairs[down.name] = Pair(up, down, target_of(down))
            elif self.takes(up) or self.takes(down):
                self._halves.append(down)

    def _measured(self, job: Job) -> bool:
        base = base_of(job.weight)
        return base is not None and self._known_by.width(base) is not None

    def remarks(self) -> Iterator[str]:
        """Say where only one of the two matrices is rounded anew."""
        if self._halves:
            such = relatives.shown(self._halves[0].name)
            yield (
                f"not folded, for only one of `{_UP}` and `{_DOWN}` gets new codes: "
                f"{counted(len(self._halves), 'pair')}, such as that of {such}"
            )

    def memory(self, workers: int) -> int:
        """Return the bytes that a conversion needs for this: what each choice holds, and the powers of all pairs."""
        pairs = {pair.down.name: pair.down.weight.shape for pair in self._pairs.values()}
        kept = sum(width + _A_FOLD for _, width in pairs.values())
        return super().memory(workers) + kept + workers * _CHOICE

    def effort(self, job: Job) -> float:
        """Return how many searches a weight takes."""
        return _EFFORT if job.name in self._pairs and job.name.endswith(_DOWN) else super().effort(job)

    def facts(self, job: Job) -> Mapping[str, Any]:
        """Return which scales a weight has, how good they are, and what was folded."""
        if job.name not in self._pairs:
            return super().facts(job)
        return {**super().facts(job), "fold": self._folds[self._pairs[job.name].down.name].facts}

    def _rounded(self, job: Job, start: int, values: U16, outputs: Parts, codecs: Codecs, scratch: Scratch) -> Figures:
        pair = self._pairs.get(job.name)
        fold = None if pair is None else self._chosen(pair, codecs)
        if pair is None or fold is None or not fold.k.any():
            return super()._rounded(job, start, values, outputs, codecs, scratch)
        if job.name == pair.down.name:
            return self._columns(job, start, values, outputs, codecs, fold)
        super()._rounded(job, start, values, outputs, codecs, scratch)  # and judged as it is
        rows = -fold.k[start : start + len(values)]
        suffix = pair.target.streamed[-1]
        scales = shifted_scales(outputs[suffix], values, rows)
        return pair.target.store(shifted(values, rows[:, None]), scales, outputs, codecs)

    def _columns(self, job: Job, start: int, values: U16, outputs: Parts, codecs: Codecs, fold: Fold) -> Figures:
        """Store a panel of a down whose columns are folded; what it loses was measured when the fold was chosen."""
        target, known = target_of(job), self._known(job).known.folded(fold.k)
        moved = shifted(values, fold.k)
        self._note(job, start, fold.errors[start])
        return target.store(moved, target.search(moved, known.importance, codecs, known.mean), outputs, codecs)

    def _chosen(self, pair: Pair, codecs: Codecs) -> Fold:
        """Return the fold of a pair; every thread that asks before it is chosen takes part in that."""
        name = pair.down.name
        with self._choosing:
            if name in self._folds:
                return self._folds[name]
            choice = self._choices.setdefault(name, Choice(self._source, pair, self._known_by, codecs))
        fold = choice.fold()
        with self._choosing:
            self._folds[name] = fold
            self._choices.pop(name, None)
        return fold


_A_FOLD = 1_000
"""Bytes of what is kept of a fold beside its powers."""

_CHOICE = 100_000_000
"""Bytes that a thread takes to choose: a panel, read, decoded and shifted."""


def _partner(name: str, last: str, other: str) -> str | None:
    """Return the name of an MLP's other matrix."""
    above, _, own = name.rpartition(".")
    return f"{above}.{other}" if own == last and names.is_projection(name) else None


def check_halves(records: Iterable[Record], folder: object) -> None:
    """Refuse an output in which only one half of a fold stands, or two halves of two.

    Nobody writes one; but a run may go on on another machine, and a Hessian's products are not rounded alike on all.

    Args:
        records: of all shards.
        folder: or address that holds them, for the message.

    Raises:
        OutputError: there is such a pair.
    """
    folds: dict[str, dict[str, Any]] = {}
    for record in records:
        for name, facts in record["tensors"].items():
            if "fold" in facts:
                above, _, own = names.split(name)[0].rpartition(".")
                folds.setdefault(above, {})[own] = facts["fold"].get("crc32")
    for above, halves in folds.items():
        if halves.keys() != {_UP, _DOWN} or len(set(halves.values())) != 1:
            raise OutputError(
                "holds halves of two folds, for the machine that began it chose otherwise",
                file=folder,
                found=above,
                remedy="write it anew with `restart=True`",
            )
