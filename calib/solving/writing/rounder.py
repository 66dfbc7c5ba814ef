"""`Solving`: the `stream.Rounder` that solves. The pass goes on until the next shards can be written, then they are.

So a shard stands as soon as the layers whose matrices it holds are solved, whatever the order of shards, and what a
layer left in the spool is deleted when the last shard that needs it stands.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from k2quant.calib.collecting.running import check_room
from k2quant.calib.solving.writing.spool import Solved, Spool, Wanted, not_solved_for
from k2quant.checkpoint.panels import format_of
from k2quant.formats.dtypes import TensorSpec
from k2quant.ground import names
from k2quant.ground.units import counted

if TYPE_CHECKING:
    from k2quant.calib.solving.passing import Pass
    from k2quant.conversion.placing import Job, ShardPlan
    from k2quant.conversion.searching.searched import Searched
    from k2quant.formats.format import Parts
    from k2quant.formats.transcode import Scratch
    from k2quant.kernels.codecs.figures import Figures
    from k2quant.kernels.codecs.seam import Codecs

_SOLVED = "solved"
"""Below the folder that a run works in: what is solved and not written yet."""

BEYOND = "the pass does not reach it"
"""Why a weight is merely searched."""

_OUTSIDE = -1  # the layer of a shard that holds nothing that is solved


class Solving:
    """Solves what it was asked to, and searches what the pass does not reach."""

    def __init__(
        self,
        jobs: Mapping[str, Job],
        work: Path,
        begin_pass: Callable[[Spool, Path], Pass],
        beyond: Searched,
        abroad: Sequence[str],
        say: Callable[[str], None],
    ) -> None:
        """Take what a plan says; nothing is read or written yet.

        Args:
            jobs: of the matrices that are solved, by their names in the language model without suffix.
            work: folder for what is between layers and between a layer and its shards.
            begin_pass: begins the pass that fills a spool, or takes it up, and works in a folder.
            beyond: who searches the rest.
            abroad: the names of these jobs.
            say: is told what stands already.
        """
        self._jobs, self._work, self._begin_pass, self._beyond = jobs, work, begin_pass, beyond
        self._bases = {job.name: base for base, job in jobs.items()}
        self._abroad, self._say = frozenset(abroad), say
        self._lock = threading.Lock()
        self._open: dict[str, Solved] = {}
        self._facts: dict[str, dict[str, Any]] = {}

    def begin(self, abreast: int) -> None:
        """Take up what an earlier run of the same left, and look at the model."""
        self._beyond.begin(abreast)
        wanted = {base: Wanted(job.target, job.weight.shape) for base, job in self._jobs.items() if job.target}
        self._spool = Spool(self._work / _SOLVED, wanted)
        self._pass = self._begin_pass(self._spool, self._work)
        self._spool.read = self._pass.digests
        if self._pass.next or len(self._spool):
            through = f"{self._pass.next} of {counted(self._pass.layers, 'layer')} are through"
            waiting = f"{counted(len(self._spool), 'solved matrix', 'solved matrices')} of them and of the next"
            self._say(f"note: an earlier run is taken up: {through}; {waiting} wait for their shards")

    def batches(self, shards: Sequence[ShardPlan]) -> Iterator[Sequence[ShardPlan]]:
        """Yield shards whose layers are solved, those first that need the fewest layers.

        Raises:
            OutputError: the disk is full or fails, or is too small.
            CheckpointError: the checkpoint cannot be read, or gives a matrix an input that is not finite.
        """
        waiting = sorted(shards, key=self._last_layer)
        self._check_room(waiting)
        while waiting:
            self._forget(waiting)
            while self._pass.next <= self._last_layer(waiting[0]):
                self._pass.advance()
            ready = [shard for shard in waiting if self._last_layer(shard) < self._pass.next]
            yield ready
            waiting = waiting[len(ready) :]

    def takes(self, job: Job) -> bool:
        """Tell whether a weight is solved or searched."""
        return job.name in self._bases or job.name in self._abroad

    def panel(self, job: Job, start: int, parts: Parts, outputs: Parts, codecs: Codecs, scratch: Scratch) -> Figures:
        """Give rows of a matrix as it was solved."""
        from k2quant.formats.transcode import to_bf16

        base, target = self._bases.get(job.name), job.target
        if base is None or target is None:
            return self._beyond.panel(job, start, parts, outputs, codecs, scratch)
        solved, stored = self._solved(base), format_of(job.weight)
        values = to_bf16(stored, parts, codecs=codecs, scratch=scratch)
        for suffix, array in outputs.items():
            first, last = target.rows(suffix, start, start + len(values))
            array[...] = solved.parts[suffix][first:last]
        after = scratch.take("solved", TensorSpec("BF16", values.shape))
        target.decode(outputs, after, codecs)
        return codecs.floats.compare(values, after)

    def again(self, job: Job, read: Mapping[str, str]) -> bool:
        """Refuse a weight that is not the one that was solved.

        Raises:
            CheckpointError: its bytes are others.
        """
        base = self._bases.get(job.name)
        if base is None:
            return self._beyond.again(job, read)
        solved = self._solved(base)
        with self._lock:
            del self._open[base]
        if any(read.get(suffix) != crc for suffix, crc in solved.source.items()):
            raise not_solved_for(job.weight.main.name, job.weight.main.file)
        self._facts[base] = solved.facts
        return False

    def facts(self, job: Job) -> Mapping[str, Any]:
        """Return what a weight ships with, and why."""
        base = self._bases.get(job.name)
        if base is not None:
            return {"scales": self._facts[base]}
        return {"scales": {**self._beyond.facts(job)["scales"], "reason": BEYOND}}

    def summary(self) -> Mapping[str, Any]:
        """Return what solving did to each layer that was run."""
        return {"layers": [facts.as_json() for facts in self._pass.facts]}

    def _solved(self, base: str) -> Solved:
        """Return a matrix while its panels are written; the first of them reads it."""
        with self._lock:
            if base not in self._open:
                self._open[base] = self._spool.solved(base)
            return self._open[base]

    def _last_layer(self, shard: ShardPlan) -> int:
        return max(map(self._layer, shard.jobs), default=_OUTSIDE)

    def _layer(self, job: Job) -> int:
        base = self._bases.get(job.name)
        found = None if base is None else names.layer(base)
        return _OUTSIDE if found is None else found

    def _forget(self, waiting: Sequence[ShardPlan]) -> None:
        """Delete what no shard needs any more, of layers that are through."""
        needed = {self._layer(job) for shard in waiting for job in shard.jobs}
        for layer in range(self._pass.next):
            if layer not in needed:
                self._spool.forget(layer)

    def _check_room(self, waiting: Sequence[ShardPlan]) -> None:
        """Refuse to begin what the disk cannot hold.

        Raises:
            OutputError: so it is.
        """
        if self._pass.next or len(self._spool) or not waiting:
            return  # an earlier run has asked
        needed = self._pass.needs.disk + most_waiting(waiting, self._layer) + sum(shard.size for shard in waiting)
        what = "the output, hidden states and what is solved before it is written"
        check_room(self._work.parent, needed, what)


def most_waiting(shards: Sequence[ShardPlan], layer: Callable[[Job], int]) -> int:
    """Return the most bytes of solved matrices that lie on the disk before their shards stand.

    Args:
        shards: in the order in which they are written.
        layer: tells in which layer a job is solved; -1: in none.
    """
    held: dict[int, int] = {}
    last: dict[int, int] = {}
    for number, shard in enumerate(shards):
        for job in shard.jobs:
            if (its := layer(job)) != _OUTSIDE:
                held[its] = held.get(its, 0) + sum(entry.nbytes for entry in job.outputs.values())
                last[its] = number
    most = 0
    for number, shard in enumerate(shards):
        solved = max(map(layer, shard.jobs), default=_OUTSIDE)
        most = max(most, sum(nbytes for its, nbytes in held.items() if its <= solved and last[its] >= number))
    return most
