"""Compare two checkpoints by what their tensors mean, whatever formats they are in."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from k2quant.checking.folded import Fold, consumer, is_producer
from k2quant.checkpoint.header import TensorEntry
from k2quant.checkpoint.panels import PIECE_BYTES, format_of, panel_rows, panel_shape, read_values
from k2quant.checkpoint.reader import Checkpoint, open_checkpoint
from k2quant.checkpoint.reading import check_constants, read_into
from k2quant.checkpoint.remote.address import Address
from k2quant.checkpoint.weights import StoredWeight, group_tensors
from k2quant.formats.dtypes import TensorSpec
from k2quant.ground import pool
from k2quant.ground.units import counted

if TYPE_CHECKING:
    from k2quant.checking.made import Made
    from k2quant.formats.transcode import Scratch
    from k2quant.kernels.codecs.figures import Figures

_log = logging.getLogger(__name__)

Relation = Literal["bit-equal", "codes equal", "values equal", "differs", "missing", "extra"]
"""`bit-equal`: the same bytes, or the same BF16 bits once both are BF16, to which F16 and F32 are rounded. `codes
equal`: quantised, and all its tensors have the same bytes. `values equal`: as BF16 they differ in nothing but the sign
of zeros."""

Progress = Callable[[int, int], None]
"""Called with the bytes compared so far and in all."""


class Finding(NamedTuple):
    """How one weight of the second checkpoint relates to the same weight of the first."""

    name: str
    """The tensor that carries the values, as the first checkpoint names it."""
    relation: Relation
    formats: tuple[str | None, str | None]
    """Its format in the first and in the second checkpoint; None for a tensor that is no weight."""
    figures: Figures | None = None
    """What changed, for a weight whose values were compared."""
    outside: int = 0
    """Weights that are further off than the rounding of the second checkpoint's format can explain."""
    bytes_changed: int = 0
    """Bytes that differ, for tensors that were compared as bytes."""
    rounded: bool = False
    """Whether a side has F16 or F32, which were rounded to BF16 before values were compared."""
    dtypes: tuple[str | None, str | None] = (None, None)
    """Dtype of the tensor that carries the values, as safetensors has it, in the first and in the second checkpoint."""
    solved: bool = False
    """Whether it was compared as one that was solved, `outside` by `Format.unsolved`."""
    relabelled: bool = False
    """Whether both have the same codes and scales in two layouts; `outside` is then beyond the next BF16 number."""

    def how(self) -> str:
        """Say in words how the weight differs."""
        if self.relation in {"missing", "extra"}:
            return "only in the first" if self.relation == "missing" else "only in the second"
        facts = []
        if self.formats[0] != self.formats[1]:
            facts.append(f"{self.formats[0]} in the first, {self.formats[1]} in the second")
        if self.bytes_changed:
            facts.append(f"{self.bytes_changed:,} bytes differ")
        if self.figures is not None:
            figures = self.figures
            facts.append(
                f"{figures.changed:,} of {figures.count:,} values differ, SQNR {figures.sqnr_db:.2f} dB, "
                f"worst {figures.worst:.3g}"
                if figures.changed
                else "same values"
            )
            facts += ["once rounded to BF16"] if self.rounded else []
        return ", ".join(facts) or "another shape or kind"


def rounding_note(findings: Iterable[Finding]) -> str | None:
    """Say of how many weights only what is left of them in BF16 was compared; None of none."""
    count = sum(finding.rounded for finding in findings)
    return (
        f"F16 and F32 were compared as BF16, to which they were rounded: {counted(count, 'tensor')}" if count else None
    )


def unlike(finding: Finding) -> bool:
    """Tell whether two checkpoints differ in a weight: in its format, its bytes or its being there."""
    return finding.relation in {"differs", "missing", "extra"} or finding.formats[0] != finding.formats[1]


def _made_of(weight: StoredWeight) -> list[tuple[str, tuple[int, ...], str | None]]:
    """Return dtypes and shapes, and of a whole scale the name, too: by that it multiplies or divides."""
    whole = () if weight.format is None else weight.format.whole
    return [(entry.dtype, entry.shape, suffix if suffix in whole else None) for suffix, entry in weight.parts.items()]


@dataclass(slots=True)
class _Pair:
    """A weight of both checkpoints, being compared."""

    first: StoredWeight
    second: StoredWeight
    figures: dict[int, Figures]
    outside: int = 0
    identical: bool = True
    """Whether the BF16 bits are the same."""
    bytes_changed: int = 0
    solved: bool = False
    """Whether the second was made by what moves weights by more than rounding."""
    fold: Fold | None = None
    """What may have moved powers of two into it, or out of it."""

    @property
    def relabels(self) -> bool:
        """Whether the first becomes the second by other names, or by a scale in another form."""
        first, second = self.first.format, self.second.format
        return first is not None and second is not None and first.relabels(second)

    @property
    def same_layout(self) -> bool:
        """Whether both are made of the same tensors, whatever those are called that mean the same by any name."""
        alike = self.first.format == self.second.format or self.relabels
        return alike and _made_of(self.first) == _made_of(self.second)

    def entries(self, suffix: str) -> tuple[TensorEntry, TensorEntry]:
        """Return a tensor of the first and what the second has in its place, where both are made of the same."""
        other = dict(zip(self.first.parts, self.second.parts.values(), strict=True))
        return self.first.parts[suffix], other[suffix]

    @property
    def comparable(self) -> bool:
        """Whether both are weights of one shape."""
        return None not in {self.first.format, self.second.format} and self.first.shape == self.second.shape

    def finding(self) -> Finding:
        first, second = self.first.format, self.second.format
        formats = (first.name if first else None, second.name if second else None)
        figures = sum((f for _, f in sorted(self.figures.items())), start=_no_figures()) if self.figures else None
        return Finding(
            self.first.main.name,
            self._relation(figures),
            formats,
            figures,
            self.outside,
            self.bytes_changed,
            rounded=figures is not None and any(map(_wide, (self.first, self.second))),
            dtypes=(self.first.main.dtype, self.second.main.dtype),
            solved=self.solved and bool(self.figures),
            relabelled=self.relabels and not self.same_layout,
        )

    def _relation(self, figures: Figures | None) -> Relation:
        if self.same_layout:
            if self.bytes_changed:
                return "differs"
            return "codes equal" if self.first.format is not None and self.first.format.quantised else "bit-equal"
        if figures is None:
            return "bit-equal" if self.comparable else "differs"  # comparable without figures: there is no weight in it
        if figures.changed:
            return "differs"
        return "bit-equal" if self.identical else "values equal"


def _wide(weight: StoredWeight) -> bool:
    """Tell whether a weight is of more bits than the BF16 as which it is compared."""
    return weight.format is not None and not weight.format.quantised and weight.main.dtype in {"F16", "F32"}


def _no_figures() -> Figures:
    from k2quant.kernels.codecs.figures import Figures

    return Figures()


class _Task(NamedTuple):
    pair: _Pair
    suffix: str | None
    """The tensor whose bytes are compared, or None to compare rows by value."""
    start: int
    stop: int
    nbytes: int


def _tasks_of(pair: _Pair) -> list[_Task]:
    if pair.same_layout:
        return [
            _Task(pair, suffix, start, min(start + PIECE_BYTES, entry.nbytes), min(PIECE_BYTES, entry.nbytes - start))
            for suffix, entry in pair.first.parts.items()
            for start in range(0, entry.nbytes, PIECE_BYTES)
        ]
    return _value_tasks(pair) if pair.comparable else []


def _value_tasks(pair: _Pair) -> list[_Task]:
    rows, _ = panel_shape(pair.first.shape)
    return [
        _Task(pair, None, start, stop, pair.first.nbytes * (stop - start) // max(rows, 1))
        for start, stop in panel_rows(pair.first.shape)
    ]


def compare(
    first: Path | Address,
    second: Path | Address,
    *,
    workers: int,
    follow_links: bool = False,
    progress: Progress | None = None,
) -> list[Finding]:
    """Compare every tensor of two checkpoints.

    Args:
        first: folder or address of the checkpoint that counts as the truth.
        second: of the other.
        workers: threads.
        follow_links: whether links of both folders may lead out of them.
        progress: called as the work goes on.

    Returns:
        a finding for each weight of the first, in its order, then one for each that only the second has.

    Raises:
        CheckpointError: one of the folders holds no sound checkpoint.
    """
    a, b = (open_checkpoint(folder, follow_links=follow_links) for folder in (first, second))
    return compare_opened(a, b, workers=workers, progress=progress)


def compare_opened(
    a: Checkpoint, b: Checkpoint, *, workers: int, progress: Progress | None = None, made: Made | None = None
) -> list[Finding]:
    """Compare every tensor of two checkpoints that are open; see `compare`.

    Args:
        a: that counts as the truth.
        b: the other.
        workers: threads.
        progress: called as the work goes on.
        made: how the weights of the second were made, where that is more than rounding.

    Raises:
        CheckpointError: one of them is not sound.
    """
    ours, theirs = _weights(a), _weights(b)
    _log.info("%s: %s", a.place, counted(len(ours), "weight"))
    _log.info("%s: %s", b.place, counted(len(theirs), "weight"))
    pairs = {key: _Pair(weight, theirs[key], {}) for key, weight in ours.items() if key in theirs}
    if made is not None:
        _tell(pairs, made, a, b)
    _Comparison(a, b, list(pairs.values()), progress).run(workers)
    findings = [
        pairs[key].finding()
        if key in pairs
        else Finding(weight.main.name, "missing", (_name(weight), None), dtypes=(weight.main.dtype, None))
        for key, weight in ours.items()
    ]
    extra = [
        Finding(weight.main.name, "extra", (None, _name(weight)), dtypes=(None, weight.main.dtype))
        for key, weight in theirs.items()
        if key not in ours
    ]
    return findings + extra


def _tell(pairs: dict[str, _Pair], made: Made, a: Checkpoint, b: Checkpoint) -> None:
    """Note of each weight how it was made. Those that have the bytes of the first were not made at all."""
    for base, pair in pairs.items():
        pair.solved = base in made.solved
    if made.folded:
        folds = {base: Fold(a, b, pair.first, pair.second) for base, pair in pairs.items() if _foldable(base, pair)}
        for base, fold in folds.items():
            pairs[base].fold = fold
            if (partner := pairs.get(consumer(base))) is not None:
                partner.fold = fold


def _foldable(base: str, pair: _Pair) -> bool:
    return is_producer(base) and pair.comparable and not pair.same_layout and format_of(pair.second).searches


def _name(weight: StoredWeight) -> str | None:
    return weight.format.name if weight.format else None


def _weights(checkpoint: Checkpoint) -> dict[str, StoredWeight]:
    """Return a checkpoint's weights by base; tensors that are no weights by their whole name."""
    weights, problems = group_tensors(checkpoint.tensors)
    if problems:
        raise problems[0]
    check_constants(checkpoint, weights)
    return {weight.base if weight.format else weight.main.name: weight for weight in weights}


class _Comparison:
    def __init__(self, a: Checkpoint, b: Checkpoint, pairs: list[_Pair], progress: Progress | None) -> None:
        self._a, self._b, self._pairs, self._progress = a, b, pairs, progress
        self._done = 0
        self._total = sum(task.nbytes for pair in pairs for task in _tasks_of(pair))
        self._lock = threading.Lock()
        self._local = threading.local()

    def run(self, workers: int) -> None:
        pool.run(self._tasks(), self._work, workers=workers, tick=self._tick)
        again = [pair for pair in self._pairs if pair.same_layout and pair.bytes_changed and pair.comparable]
        pool.run((task for pair in again for task in _value_tasks(pair)), self._work, workers=workers)
        self._tick()

    def _tasks(self) -> Iterator[_Task]:
        return (task for pair in self._pairs for task in _tasks_of(pair))

    def _tick(self) -> None:
        if self._progress:
            self._progress(min(self._done, self._total), self._total)

    @property
    def _scratch(self) -> tuple[Scratch, Scratch]:
        from k2quant.formats.transcode import Scratch

        if not hasattr(self._local, "scratch"):
            self._local.scratch = (Scratch(), Scratch())
        scratch: tuple[Scratch, Scratch] = self._local.scratch
        return scratch

    def _work(self, task: _Task) -> None:
        if task.suffix is None:
            self._compare_values(task)
        else:
            self._compare_bytes(task, task.suffix)
        with self._lock:
            self._done += task.nbytes

    def _compare_bytes(self, task: _Task, suffix: str) -> None:
        import numpy as np

        arrays = []
        for source, entry, scratch in zip((self._a, self._b), task.pair.entries(suffix), self._scratch, strict=True):
            array = scratch.take("bytes", TensorSpec("U8", (task.stop - task.start,)))
            read_into(source.shards[entry.file], entry.start + task.start, array.data)
            arrays.append(array)
        changed = int(np.count_nonzero(arrays[0] != arrays[1]))
        if changed:
            with self._lock:
                task.pair.bytes_changed += changed

    def _compare_values(self, task: _Task) -> None:
        import numpy as np

        from k2quant.kernels.codecs.choice import codecs

        cpu, stored = codecs("cpu"), format_of(task.pair.second)
        before, after = (
            read_values(source, weight, task.start, task.stop, codecs=cpu, scratch=scratch)
            for source, weight, scratch in zip(
                (self._a, self._b), (task.pair.first, task.pair.second), self._scratch, strict=True
            )
        )
        exact, fold = before.values, task.pair.fold
        if fold is not None:
            exact = fold.of_rows(exact, after.values) if task.pair.second is fold.after else fold.of_columns(exact)
        figures = cpu.floats.compare(exact, after.values)
        identical = bool(np.array_equal(exact, after.values))
        if not figures.changed:
            outside = 0
        elif task.pair.relabels and not task.pair.same_layout:
            outside = int(np.count_nonzero(np.abs(exact.astype(np.int32) - after.values) > 1))
        elif task.pair.solved:
            outside = stored.unsolved(exact, after.values, after.parts, cpu)
        else:
            outside = stored.outside(exact, after.values, after.parts)
        with self._lock:
            task.pair.figures[task.start] = figures
            task.pair.identical &= identical
            task.pair.outside += outside
