"""One layer after another: hidden states go in, hidden states come out, and what matrices are given is summed.

Attention, norms, router and dense MLPs are transformers' own, run in pieces of a few rows. Routed experts see many rows
at once, so that they need not all be in memory. What comes out equals `stream_forward` to rounding: an expert's h and
the sum over experts are float32 and rounded once, where transformers rounds each step to BF16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

from k2quant.calib.collecting.experts import Experts, Routed, run_expert, sort_by_expert
from k2quant.calib.collecting.measuring import Watch
from k2quant.calib.collecting.memory import Needs
from k2quant.calib.collecting.pieces import Piece, Segment, waves
from k2quant.calib.stats.digests import Digests, digests_of
from k2quant.calib.stats.model import Model
from k2quant.calib.stats.writing import HessianWriter, write_layer
from k2quant.checkpoint.reader import Checkpoint
from k2quant.checkpoint.weights import StoredWeight
from k2quant.ground.pool import available_cores
from k2quant.model.assembly import EMBEDDING, HEAD, Assembly
from k2quant.model.filling import READERS
from k2quant.model.passes.activations import Activations
from k2quant.model.passes.layers import Layers

_EMBEDDED = 0
"""The first stage of hidden states; what comes out of layer n is stage n + 1."""

Tell = Callable[[int], None]
"""Called with tokens times layers that are done."""


class Rows:
    """A model, the rows that go through it, and where both lie."""

    def __init__(self, assembly: Assembly, model: Model, rows: list[Segment]) -> None:
        """Take the model apart.

        Args:
            assembly: of the checkpoint.
            model: its sizes.
            rows: what goes through it.
        """
        self.assembly, self.model, self.rows = assembly, model, rows
        self.layers = Layers(assembly)
        self.pieces = [piece for segment in rows for piece in segment]
        """All rows, in order."""
        self.shapes = [(*piece.tokens.shape, model.hidden) for piece in self.pieces]
        """Of the hidden states of each piece."""
        self.tokens = sum(piece.size for piece in self.pieces)
        """Tokens that go through a layer."""

    def embedded(self) -> Digests:
        """Return the digests of the embedding."""
        return self.digests([(EMBEDDING, self.layers.embedding)])

    def digests(self, modules: Iterable[tuple[str, nn.Module]]) -> Digests:
        """Return the digests of what the checkpoint holds for some modules, given with their names in the model."""
        placed = (self.assembly.placed(name, module) for name, module in modules)
        return digests(self.assembly.checkpoint, [each.source for some in placed for each in some])

    def embed(self, kept: Activations) -> None:
        """Make the hidden states that go into the first layer."""
        with self.layers.loaded(EMBEDDING, self.layers.embedding):
            for number, piece in enumerate(self.pieces):
                kept.put(_EMBEDDED, number, self.layers.embed(piece.tokens))
        kept.finish(_EMBEDDED)


class Walk(Rows):
    """The same, and what is measured on the way."""

    def __init__(self, assembly: Assembly, model: Model, rows: list[Segment], plan: Needs, *, hessians: bool) -> None:
        """Take the model apart.

        Args:
            assembly: of the checkpoint.
            model: its sizes.
            rows: what goes through it.
            plan: how to go about it.
            hessians: whether E[x x^T] is collected.
        """
        super().__init__(assembly, model, rows)
        self.plan, self.hessians = plan, hessians

    def outside(self) -> Digests:
        """Return the digests of the weights outside the layers: embedding, last norm, head."""
        layers = self.layers
        return self.digests([(EMBEDDING, layers.embedding), ("model.norm", layers.norm), (HEAD, layers.head)])

    def run_layer(self, number: int, kept: Activations, folder: Path, tell: Tell) -> None:
        """Run a layer, write what was measured, and note that its hidden states are whole.

        Args:
            number: of the layer.
            kept: the hidden states.
            folder: of the statistics.
            tell: called as the work goes on.

        Raises:
            BadValue: what goes into a matrix is no number, or too large to be squared.
            OSError: the disk is full or fails.
        """
        step = _Step(self, number, kept, tell)
        writer = HessianWriter(folder, number, self.model) if self.hessians else None
        try:
            found = step.run(writer)
            hessians = None
            stats = step.watch.stats()
            if writer is not None:
                step.watch.write_plain(writer)
                hessians = writer.finish()
        finally:
            if writer is not None:
                writer.close()
        write_layer(folder, number, stats, found, hessians=hessians)
        if not step.last:
            kept.finish(number + 1)


class _Step:
    """One layer of a walk."""

    def __init__(self, walk: Walk, number: int, kept: Activations, tell: Tell) -> None:
        self._walk, self._number, self._kept, self._tell = walk, number, kept, tell
        self._assembly: Assembly = walk.assembly
        self._layer: Any = walk.layers.all[number]
        self._name = f"model.layers.{number}"
        device = self._assembly.device
        self.watch = Watch(walk.model, number, self._layer, device, hessians=walk.hessians)
        self.last = number + 1 == len(walk.layers.all)
        """Whether nothing needs what comes out."""

    def run(self, writer: HessianWriter | None) -> Digests:
        """Have all rows pass; return the digests of the layer's weights."""
        routed = isinstance(self._layer.mlp, DeepseekV3MoE)
        without = [f"{self._name}.mlp.experts"] if routed else []
        with self._walk.layers.loaded(self._name, self._layer, without=without) as loaded:
            found = self._walk.digests(loaded.parts.items())
            try:
                if routed:
                    found |= self._routed(writer)
                else:
                    self._dense()
            finally:
                self.watch.end()
        return found

    def _dense(self) -> None:
        done = 0
        for number, piece in enumerate(self._walk.pieces):
            self._put(number, self._through(number, piece))
            done += piece.size
            self._tell(done)

    def _through(self, number: int, piece: Piece) -> Tensor:
        hidden = self._kept.get(self._number, number).to(self._assembly.device)
        self.watch.piece = piece
        return self._walk.layers.through(self._layer, hidden, positions=piece.positions)

    def _put(self, number: int, hidden: Tensor) -> None:
        if not self.last:
            self._kept.put(self._number + 1, number, hidden)

    def _routed(self, writer: HessianWriter | None) -> Digests:
        moe = self._layer.mlp
        experts = Experts(self._assembly, self.watch.experts, self._walk.plan.chunk)
        found: Digests = {}
        try:
            self._layer.mlp = Noted()
            done = 0
            for first, segments in waves(self._walk.rows, self._walk.plan.wave):
                last = segments[-1] is self._walk.rows[-1]
                done = self._wave(moe, experts, first, segments, found, writer if last else None, done)
        finally:
            self._layer.mlp = moe
        return found

    def _wave(
        self,
        moe: Any,
        experts: Experts,
        first: int,
        segments: Sequence[Segment],
        found: Digests,
        writer: HessianWriter | None,
        done: int,
    ) -> int:
        """Run a wave; what it keeps is gone afterwards. Return how many tokens are done."""
        wave = _Wave(sum(piece.size for segment in segments for piece in segment), self._assembly)
        routes = self._route(moe, wave, first, segments)
        for chunk in experts.chunks():
            if not done:
                found.update(self._walk.digests(experts.modules(chunk)))
            for number in chunk:
                pairs = self.watch.pairs(number)
                run_expert(number, chunk[number], routes, wave.x, wave.out, self._sums, pairs)
                self.watch.write_expert(number, writer)
                self._tell(done + wave.count * (number + 1) // (experts.count + 1))
        self._gather(wave, first, segments)
        self._tell(done + wave.count)
        return done + wave.count

    def _route(self, moe: Any, wave: _Wave, first: int, segments: Sequence[Segment]) -> list[Routed]:
        """Run all but the routed experts, and sort tokens by experts."""
        found, number, begun = [], first, 0
        for segment in segments:
            chosen = []
            start = begun
            for piece in segment:
                wave.residual[begun : begun + piece.size] = self._through(number, piece).flatten(0, 1)
                x = self._layer.mlp.seen
                self.watch.see(self.watch.experts, x)
                _, weights, ids = moe.gate(x)
                wave.x[begun : begun + piece.size] = x.flatten(0, 1)
                wave.out[begun : begun + piece.size] = moe.shared_experts(x).flatten(0, 1)
                chosen.append((ids, weights))
                number, begun = number + 1, begun + piece.size
            ids, weights = (torch.cat(each) for each in zip(*chosen, strict=True))
            real = torch.cat([piece.real.flatten() for piece in segment]).to(ids.device)
            found.append(sort_by_expert(segment[0].part, ids, weights, real, start, self._walk.model.experts))
        self.watch.piece = self._layer.mlp.seen = None
        return found

    def _gather(self, wave: _Wave, first: int, segments: Sequence[Segment]) -> None:
        begun = 0
        for number, piece in enumerate((piece for segment in segments for piece in segment), first):
            span = slice(begun, begun + piece.size)
            out = wave.residual[span] + wave.out[span].to(wave.residual.dtype)
            self._put(number, out.view(*piece.tokens.shape, -1))
            begun += piece.size

    @property
    def _sums(self) -> Any:
        return self.watch.sums


class _Wave:
    """What a layer keeps of the tokens of some rows while experts come and go."""

    def __init__(self, count: int, assembly: Assembly) -> None:
        shape, device = (count, assembly.config.hidden_size), assembly.device
        self.count = count
        self.x = torch.empty(shape, dtype=assembly.dtype, device=device)
        """What the experts are given."""
        self.residual = torch.empty_like(self.x)
        """What their sum is added to."""
        self.out = torch.empty(shape, device=device)
        """That sum, begun by the shared experts."""


class Noted(nn.Module):
    """Stands where a layer's experts are, and keeps what they would be given."""

    seen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return zeros, so that the layer gives the residual."""
        self.seen = x
        return torch.zeros_like(x)


def digests(checkpoint: Checkpoint, weights: Iterable[StoredWeight]) -> Digests:
    """Read weights and return their digests; as many are read at a time as where a model is filled."""
    return digests_of(checkpoint, weights, workers=min(available_cores(), READERS))
