"""Two models over the batches of a text, and what is made of all batches when they are there.

Both are streamed layer by layer. The baseline goes first and leaves its hidden states behind, in files where they are
many; then the candidate follows, and the predictions of both are compared batch by batch.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from k2quant.checkpoint.reader import open_checkpoint
from k2quant.eval.drift.batches import Layout, Measured
from k2quant.eval.drift.findings import Fidelity
from k2quant.eval.drift.layerwise import ComparingWatch, KeepingWatch, Readout, check_finite, layer_figures, taken
from k2quant.eval.drift.predictions import fidelity, scores
from k2quant.eval.gating.verdict import Side
from k2quant.model import stream_forward
from k2quant.model.loading import DTYPES, assemble
from k2quant.model.passes.activations import Activations
from k2quant.model.passes.layers import Layers
from k2quant.model.passes.texts import Text
from k2quant.model.placement import execution_device

Progress = Callable[[int, int], None]
"""Called with the layers that are done and all layers, of both passes together."""

_EARLY = 128
"""Places of the text at which every layer's output is read out: each costs a product with the whole head."""

_BUDGET = 1_000_000_000
"""Bytes of the baseline's hidden states to keep in memory; K2's for 4096 tokens are 3.6 GB in BF16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What is compared on what, and how."""

    folders: tuple[Path, Path]
    """The baseline's and the candidate's."""
    sides: tuple[Side, Side]
    config: Any
    """Of transformers: what both models share."""
    text: Text
    options: dict[str, Any]
    """Of every pass: device, dtype, backend, follow_links."""

    def layouts(self) -> list[Layout]:
        """Return what is measured of each batch."""
        config = self.config
        return [
            Layout(
                scored=int(scored.sum()),
                tokens=batch.numel(),
                places=len(places),
                layers=config.num_hidden_layers,
                routers=max(config.num_hidden_layers - config.first_k_dense_replace, 0),
                experts=config.n_routed_experts,
                chosen=config.num_experts_per_tok,
                hidden=config.hidden_size,
                dtype=DTYPES[self.options["dtype"]],
            )
            for batch, scored, places in zip(self.text.batches, self.text.scored, _places(self.text), strict=True)
        ]

    def whole(self, progress: Progress | None) -> Fidelity:
        """Measure everything."""
        with self._run(range(len(self.text.batches)), progress) as run:
            found = [measured for _, measured in run.measured()]
            return self._completed(found, run.readouts)

    def measured(self, numbers: Sequence[int], progress: Progress | None) -> Iterator[tuple[int, Measured]]:
        """Measure some batches, and yield each with its number; the first takes nearly all the time."""
        if numbers:
            with self._run(numbers, progress) as run:
                yield from run.measured()

    def completed(self, found: Sequence[Measured]) -> Fidelity:
        """Return the figures of the whole text from all of its batches; the heads of both models are read once more."""
        with ExitStack() as stack:
            base, candidate = (stack.enter_context(self._readout(folder)) for folder in self.folders)
            return self._completed(found, (base, candidate))

    def _completed(self, found: Sequence[Measured], readouts: tuple[Readout, Readout]) -> Fidelity:
        device = execution_device(self.options["device"])
        layers = layer_figures(found, readouts, self.config.n_routed_experts, device)
        return fidelity(found, self.text, self.sides, layers, self.options["backend"])

    @contextmanager
    def _readout(self, folder: Path) -> Iterator[Readout]:
        checkpoint = open_checkpoint(folder, follow_links=self.options["follow_links"])
        device = execution_device(self.options["device"])
        layers = Layers(
            assemble(checkpoint, device=device, dtype=self.options["dtype"], backend=self.options["backend"])
        )
        with layers.ending():
            yield lambda hidden: layers.head(layers.norm(hidden))

    @contextmanager
    def _run(self, numbers: Sequence[int], progress: Progress | None) -> Iterator[_Run]:
        """Prepare both passes over some batches."""
        tick = _ticking(progress, 2 * self.config.num_hidden_layers)
        layouts, places = self.layouts(), _places(self.text)
        batches = [self.text.batches[number] for number in numbers]
        with tempfile.TemporaryDirectory(prefix="k2quant-") as place:
            shapes = [(*batch.shape, self.config.hidden_size) for batch in batches]
            kept = Activations(
                Path(place), shapes, DTYPES[self.options["dtype"]], budget=_BUDGET, identity={}, lasting=False
            )
            chosen = [places[number] for number in numbers]
            first = KeepingWatch(self.folders[0], chosen, tick, kept)
            second = ComparingWatch(self.folders[1], chosen, tick, kept)
            passes = [
                cast("Generator[Tensor]", stream_forward(folder, batches, watch, **self.options))
                for folder, watch in zip(self.folders, (first, second), strict=True)
            ]
            with closing(passes[0]), closing(passes[1]):
                yield _Run(self, numbers, layouts, first, second, passes)


class _Run:
    """Both passes, under way."""

    def __init__(
        self,
        comparison: Comparison,
        numbers: Sequence[int],
        layouts: Sequence[Layout],
        first: KeepingWatch,
        second: ComparingWatch,
        passes: list[Generator[Tensor]],
    ) -> None:
        self._comparison, self._numbers, self._layouts = comparison, numbers, layouts
        self._first, self._second, self._passes = first, second, passes
        self.readouts: tuple[Readout, Readout] = (first.predict, second.predict)
        """They work as soon as a batch was measured."""

    def measured(self) -> Iterator[tuple[int, Measured]]:
        """Yield each batch with its number."""
        text, folders = self._comparison.text, self._comparison.folders
        for place, number in enumerate(self._numbers):
            logits = [next(run) for run in self._passes]  # the first round runs all the layers
            for folder, some in zip(folders, logits, strict=True):
                check_finite(some, folder, "the logits")
            found = scores(text.batches[number], text.scored[number], *logits)
            del logits, some  # before the next ones are made: K2's are large
            yield number, taken(self._first, self._second, place, found, self._layouts[number])


def _ticking(progress: Progress | None, total: int) -> Callable[[], None]:
    """Return what counts layers."""
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, total)

    if progress:
        progress(0, total)
    return tick


def _places(text: Text) -> list[Tensor]:
    """Return where layers are read out, for each batch: some of the tokens that predict another, evenly spread."""
    numbers = [
        torch.arange(batch.numel()).reshape(batch.shape)[:, :-1][scored]
        for batch, scored in zip(text.batches, text.scored, strict=True)
    ]
    count = min(_EARLY, text.predictions)
    wanted = torch.arange(count) * text.predictions // count
    starts = torch.tensor([0, *(len(some) for some in numbers)]).cumsum(0)
    return [
        some[wanted[(wanted >= start) & (wanted < end)] - start]
        for some, start, end in zip(numbers, starts, starts[1:], strict=False)
    ]
