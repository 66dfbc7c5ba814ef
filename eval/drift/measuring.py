"""How much of a candidate's damage is left: forward passes over a text, held against the baseline's predictions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from k2quant.checkpoint.reader import Checkpoint
from k2quant.errors import BadValue
from k2quant.eval.drift.keeping import Measurements
from k2quant.ground.intervals import Estimate
from k2quant.model import LayerHooks, stream_forward
from k2quant.model.passes.activations import Activations
from k2quant.model.passes.divergence import clustered, kl
from k2quant.model.passes.mixture import Mixer
from k2quant.model.passes.texts import Text

_BUDGET = 4_000_000_000
"""Bytes of the baseline's logits that are kept in memory; the rest goes to files."""

Progress = Callable[[int, int], None]
"""Called with the passes done and the most there may be."""


class Bench:
    """Runs models over a text and holds their predictions against the baseline's."""

    options: dict[str, Any]
    """Of every pass: device, dtype, backend."""

    def __init__(
        self, mixer: Mixer, text: Text, folder: Path, known: Measurements, *, limit: int, progress: Progress | None
    ) -> None:
        self.text, self._mixer, self._folder, self._known = text, mixer, folder, known
        self._limit, self._progress = limit, progress
        self._kept: Activations | None = None
        self.passes = 0
        """Those of an earlier process, whose measurements were kept, are among them."""

    @property
    def left(self) -> int:
        """Passes that may still be run."""
        return self._limit - self.passes

    def begin(self) -> None:
        """Run the baseline; where measurements are known, only once one is missing."""
        if not len(self._known):
            self._run_baseline()
        self._done()

    def _run_baseline(self) -> None:
        """Keep the baseline's logits, in the dtype in which it gives them: nothing is lost, BF16 takes 2 bytes each."""
        source = self._mixer.mixed([part.name for part in self._mixer.parts])
        for number, logits in enumerate(stream_forward(source, self.text.batches, **self.options)):
            if self._kept is None:
                shapes = [(*batch.shape, logits.shape[-1]) for batch in self.text.batches]
                self._kept = Activations(self._folder, shapes, logits.dtype, budget=_BUDGET, identity={}, lasting=False)
            self._kept.put(0, number, logits)

    def damage(self, restored: Collection[str]) -> Tensor:
        """Return the KL divergence that is left when weights are put back to the baseline.

        Args:
            restored: their names.

        Returns:
            float64 `[C]`: the sum over what is scored of each chunk.
        """
        return self._measured(["damage", *sorted(restored)], lambda: self._damage(self._mixer.mixed(restored)))

    def noise(self) -> Tensor:
        """Return the same of the baseline from itself, in other batches and rounded otherwise."""
        return self._measured(["noise"], self._noise)

    def _measured(self, what: Sequence[str], measure: Callable[[], Tensor]) -> Tensor:
        """Return what is known, or measure it and keep it."""
        found = self._known.get(what, self.text.chunks)
        if found is None:
            if self._kept is None:
                self._run_baseline()
            found = measure()
            self._known.add(what, found)
        self._done()
        return found

    def _damage(self, source: Checkpoint) -> Tensor:
        logits = stream_forward(source, self.text.batches, **self.options)
        found = torch.cat([self._chunks(number, slice(None), one) for number, one in enumerate(logits)])
        return _checked(found, source)

    def _noise(self) -> Tensor:
        source = self._mixer.mixed([part.name for part in self._mixer.parts])
        places = [place for number, batch in enumerate(self.text.batches) for place in _halves(number, len(batch))]
        batches = [self.text.batches[number][rows] for number, rows in places]
        logits = stream_forward(source, batches, _RoundedOtherwise(), **self.options)
        found = torch.cat([self._chunks(*place, one) for place, one in zip(places, logits, strict=True)])
        return _checked(found, source)

    def _chunks(self, number: int, rows: slice, logits: Tensor) -> Tensor:
        assert self._kept is not None  # noqa: S101  the baseline runs first
        ours = self._kept.get(0, number)[rows, :-1].to(logits.device)
        passed = ~self.text.scored[number][rows].to(logits.device)
        return kl(ours, logits[:, :-1]).masked_fill(passed, 0).sum(1).cpu()

    def mean(self, sums: Tensor) -> Estimate:
        """Return the mean over tokens of sums over chunks."""
        sizes = torch.cat([scored.sum(1) for scored in self.text.scored])
        values = (sums / sizes).repeat_interleave(sizes)
        return clustered(values, torch.arange(len(sizes)).repeat_interleave(sizes))

    def _done(self) -> None:
        self.passes += 1
        if self._progress:
            self._progress(self.passes, self._limit)


def _halves(number: int, rows: int) -> list[tuple[int, slice]]:
    middle = (rows + 1) // 2
    return [(number, part) for part in (slice(0, middle), slice(middle, rows)) if part.start < part.stop]


def _checked(sums: Tensor, source: Checkpoint) -> Tensor:
    if not bool(sums.isfinite().all()):
        raise BadValue("predicts what is no number", file=source.folder, remedy="check it with k2quant verify")
    return sums


class _RoundedOtherwise(LayerHooks):
    """Moves what comes out of each layer by up to a last bit, at random: what another order of sums may do."""

    def __init__(self) -> None:
        self._random = torch.Generator().manual_seed(0)
        self._handle: Any = None

    def before(self, layer: int, module: nn.Module) -> None:  # noqa: ARG002  the hook's signature
        """See `LayerHooks`."""
        self._handle = module.register_forward_hook(self._move)

    def _move(self, module: nn.Module, inputs: Any, outputs: Tensor) -> Tensor:  # noqa: ARG002  torch's signature
        relative = (torch.rand(outputs.shape, generator=self._random) * 2 - 1) * torch.finfo(outputs.dtype).eps
        return (outputs.float() * (1 + relative.to(outputs.device))).to(outputs.dtype)

    def after(self, layer: int, module: nn.Module) -> bool:  # noqa: ARG002  the hook's signature
        """See `LayerHooks`."""
        self._handle.remove()
        return False
