"""What each matrix loses in each format, by what a calibration kept apart: one pass over the weights, by threads.

An error e of one row (the weights less what is stored for them) costs E[(e x)^2] at the output. By the mean mu and the
mean square of each column that is sum_j var_j e_j^2 + (sum_j mu_j e_j)^2, see `k2quant.calib.stats.blending`; the
weights themselves in place of e give the energy of the output. Nothing that chose a scale is used to judge it: moments
here are those of the validation part.

Rows are independent, and so are blocks of rows in FP8. Of routed experts, nearly all of a model's weights, one block of
rows in eight is read: a unit has all the experts of a layer, and its sum over thousands of rows is as good.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from k2quant.calib.budget.units import LEAST, Formats
from k2quant.calib.stats.digests import base_of
from k2quant.checkpoint.panels import ROW_STEP, format_of, naming, panel_shape, read_panel
from k2quant.checkpoint.reader import Checkpoint
from k2quant.checkpoint.weights import StoredWeight
from k2quant.conversion.searching.fitting import PLAIN, WEIGHTED
from k2quant.conversion.searching.measuring import come_back
from k2quant.errors import BadValue
from k2quant.formats.format import Format, Method, Parts
from k2quant.formats.known import FormatName
from k2quant.ground import names, pool
from k2quant.ground.saying.showing import brief

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from k2quant.calib.stats.blending import HeldOut
    from k2quant.calib.stats.reading import Stats
    from k2quant.formats.transcode import Scratch
    from k2quant.kernels.codecs.values import F32, U16

SAMPLED = 8
"""Blocks of rows of a routed expert of which one is read."""

_PANEL = 2**20  # weights of a panel: a dozen copies of it, in float32 most, are what a thread holds

_EMBEDDING_BLOCKS = 32  # of rows, that say how large the embedding of a token is

Progress = Callable[[int, int], None]


class Lost(NamedTuple):
    """What one matrix gives and loses, mean over held-out tokens that reached it."""

    energy: float
    """E[|W x|^2]."""
    errors: dict[FormatName, float]
    """E[|(W - Q) x|^2] by format; empty of a matrix of which the energy alone was asked."""

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)


class Measuring:
    """One pass over some matrices of a checkpoint."""

    def __init__(self, source: Checkpoint, stats: Stats, formats: Formats, method: Method) -> None:
        """Take what is measured by what.

        Args:
            source: the checkpoint.
            stats: of it.
            formats: in which matrices may be stored.
            method: how INT4's scales are chosen.
        """
        from k2quant.kernels.codecs.choice import codecs

        self._source, self._stats, self._formats, self._method = source, stats, formats, method
        self._codecs = codecs("cpu")
        self._local = threading.local()

    def run(
        self,
        candidates: Mapping[str, Sequence[FormatName]],
        weights: Sequence[StoredWeight],
        *,
        workers: int,
        progress: Progress | None = None,
    ) -> dict[str, Lost]:
        """Measure; the same numbers for any number of threads.

        Args:
            candidates: formats whose errors are wanted, by base as the source has it; of others the energy alone is.
            weights: what is read; those that are not measured by the statistics are passed over.
            workers: threads.
            progress: called with bytes read, and all that will be.

        Returns:
            by base as the source has it.

        Raises:
            CheckpointError: a shard cannot be read, or holds what no weight can.
        """
        found: dict[str, Lost] = {}
        known = [weight for weight in weights if (base := base_of(weight)) and self._stats.width(base) is not None]
        known.sort(key=lambda weight: names.layer(weight.base) or 0)  # moments of a few layers are in memory
        total, done = sum(map(_bytes_read, known)), 0
        lock = threading.Lock()

        def work(weight: StoredWeight) -> None:
            nonlocal done
            lost = self._measured(weight, candidates.get(weight.base, ()))
            with lock:
                found[weight.base] = lost
                done += _bytes_read(weight)

        pool.run(iter(known), work, workers=workers, tick=progress and (lambda: progress(done, total)))
        return {base: found[base] for base in sorted(found)}

    def embedding(self, weights: Sequence[StoredWeight]) -> float:
        """Return the mean of |x|^2 over some tokens' embeddings, 0 for a model without."""
        import numpy as np

        weight = next((weight for weight in weights if base_of(weight) == "model.embed_tokens"), None)
        if weight is None or weight.format is None or len(weight.shape) != 2:
            return 0.0
        rows, sums, count = weight.shape[0], 0.0, 0
        every = max(rows // ROW_STEP // _EMBEDDING_BLOCKS, 1)
        for start in range(0, rows, every * ROW_STEP):
            stop = min(start + ROW_STEP, rows)
            values = _wide(self._values(weight, start, stop)[1])
            sums += float(np.einsum("rk,rk->r", values, values).sum(dtype=np.float64))
            count += stop - start
        return sums / max(count, 1)

    @property
    def _scratch(self) -> Scratch:
        from k2quant.formats.transcode import Scratch

        if not hasattr(self._local, "scratch"):
            self._local.scratch = Scratch()
        scratch: Scratch = self._local.scratch
        return scratch

    def _values(self, weight: StoredWeight, start: int, stop: int) -> tuple[Parts, U16]:
        from k2quant.formats.transcode import to_bf16

        parts = read_panel(self._source, weight, start, stop, self._scratch)
        with naming(weight, start):
            return parts, to_bf16(format_of(weight), parts, codecs=self._codecs, scratch=self._scratch)

    def _measured(self, weight: StoredWeight, wanted: Sequence[FormatName]) -> Lost:
        base = base_of(weight) or ""
        held = self._stats.held_out(base)
        if held is None:
            msg = f"{base} is not measured"  # left out before
            raise AssertionError(msg)
        judge = _Judge(held)
        known = self._known(base) if LEAST in wanted else (None, None)
        energy, seen = 0.0, 0
        sums: dict[FormatName, dict[int, float]] = {name: {} for name in wanted}
        for start, stop in _ranges(weight):
            _, values = self._values(weight, start, stop)
            exact = _wide(values)
            energy += judge.of(exact)
            seen += stop - start
            for name in wanted:
                stored, target = format_of(weight), self._formats[name]
                if not target.quantised or stored.relabels(target) or stored.same(target):
                    continue  # what BF16 holds it holds exactly, and codes that are copied stay what they are
                with naming(weight, start):
                    for side, after in enumerate(self._rounded(values, target, *known)):
                        sums[name][side] = sums[name].get(side, 0.0) + judge.of(exact - _wide(after))
        if not math.isfinite(energy):
            raise BadValue(tensor=weight.main.name, file=weight.main.file, expected="finite outputs", found=energy)
        share = panel_shape(weight.shape)[0] / max(seen, 1)
        return Lost(share * energy, {name: share * min(sides.values(), default=0.0) for name, sides in sums.items()})

    def _known(self, base: str) -> tuple[F32 | None, F32 | None]:
        """Return what a search of scales is told of the input of a matrix: mean squares and means, if anything."""
        if self._method != WEIGHTED:
            return None, None
        return self._stats.importance(base), self._stats.mean(base)

    def _rounded(self, values: U16, target: Format, importance: F32 | None, mean: F32 | None) -> Iterator[U16]:
        """Yield what a panel comes back as from a format: by its own rule, then at searched scales, where any are.

        Of a whole matrix the better one is written.
        """
        yield come_back(values, None, target, self._codecs, self._scratch)
        if target.searches and self._method != PLAIN:
            scales = target.search(values, importance, self._codecs, mean)
            yield come_back(values, scales, target, self._codecs, self._scratch)


class _Judge:
    """Sums E[|D x|^2] over rows D by means and mean squares of columns."""

    def __init__(self, held: HeldOut) -> None:
        import numpy as np

        self._mean = held.mean.astype(np.float32)
        self._variance = np.maximum(held.values - self._mean**2, 0).astype(np.float32)

    def of(self, rows: NDArray[np.float32]) -> float:
        """Return the sum over rows `[R, K]`, in an order of its own, whatever BLAS there is."""
        import numpy as np

        with np.errstate(over="ignore", invalid="ignore"):  # who asks sees what is not finite
            along = np.einsum("rk,k->r", rows, self._mean).astype(np.float64)
            across = np.einsum("rk,k->r", rows * rows, self._variance)
        return float((along * along).sum() + across.sum(dtype=np.float64))


def _wide(values: U16) -> F32:
    from k2quant.kernels.codecs.values import bf16_to_float

    return bf16_to_float(values)


def _ranges(weight: StoredWeight) -> Iterator[tuple[int, int]]:
    """Yield the rows that are read: all of them, or of a routed expert one block in `SAMPLED`.

    Which one is told by the expert's number, so that the experts of a layer together cover all.
    """
    rows, width = panel_shape(weight.shape)
    expert = names.expert(weight.base)
    if expert is None:
        step = max(_PANEL // max(width, 1) // ROW_STEP, 1) * ROW_STEP
        return ((start, min(start + step, rows)) for start in range(0, rows, step))
    every = min(SAMPLED, -(-rows // ROW_STEP))
    starts = range(expert % every * ROW_STEP, rows, every * ROW_STEP)
    return ((start, min(start + ROW_STEP, rows)) for start in starts)


def _bytes_read(weight: StoredWeight) -> int:
    rows, _ = panel_shape(weight.shape)
    return weight.nbytes * sum(stop - start for start, stop in _ranges(weight)) // max(rows, 1)
