"""One layer: attention, then every MLP of it, then the hidden states that go on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

from k2quant.calib.collecting.experts import Experts, Routed, sort_by_expert
from k2quant.calib.collecting.memory import BLOCK
from k2quant.calib.collecting.walking import Noted, Rows
from k2quant.calib.solving.evidence import Evidence, Prior
from k2quant.calib.solving.memory import KEPT
from k2quant.calib.solving.passing.attention import Attention
from k2quant.calib.solving.passing.groups import Groups
from k2quant.calib.solving.passing.mlps import Mlp, Tokens, add, every
from k2quant.calib.solving.passing.seen import Seen, not_finite
from k2quant.calib.solving.passing.turns import Turns
from k2quant.calib.stats.layout import PARTS, Part
from k2quant.ground import pool
from k2quant.kernels.devices.single import single_threaded
from k2quant.model.modules import PROJECTIONS
from k2quant.model.passes.activations import Activations

Modules = Iterable[tuple[str, nn.Module]]
"""With their names in the language model."""

Tell = Callable[[float], None]
"""Called with the share of the layer that is done."""


class Kept(NamedTuple):
    """What is kept of all tokens while they are in a layer."""

    x: Tensor
    """BF16 `[T, H]`: what the MLPs are given."""
    residual: Tensor
    """BF16 `[T, H]`: what their sum is added to."""
    out: Tensor
    """float32 `[T, H]`: that sum."""
    aside: Tensor
    """float32 `[V, H]`: see `Tokens`."""


class Measured(NamedTuple):
    """What solving did to what a layer's MLP gives."""

    relative: float | None
    """See `LayerFacts`."""
    tokens: int
    """Held-out tokens."""


class LayerRun:
    """One layer of a pass."""

    def __init__(
        self,
        rows: Rows,
        number: int,
        hidden: Activations,
        kept: Kept,
        groups: Groups,
        *,
        propagate: bool,
        workers: int,
        digest: Callable[[Modules], None],
        tell: Tell,
    ) -> None:
        """Look at a layer.

        Args:
            rows: the model, and what goes through it.
            number: of the layer.
            hidden: what goes into it, and what comes out.
            kept: room for its tokens.
            groups: what is solved.
            propagate: whether what comes out is what the weights that ship give.
            workers: experts that are solved at a time.
            digest: reads what the source holds for modules that are solved, before they are, and notes its digests.
            tell: called as the work goes on.
        """
        self._rows, self._number, self._hidden, self._kept, self._groups = rows, number, hidden, kept, groups
        self._propagate, self._workers, self._digest, self._tell = propagate, workers, digest, tell
        self._name, self._layer = f"model.layers.{number}", rows.layers.all[number]
        self._real = torch.cat([piece.real.flatten() for piece in rows.pieces])
        self._sizes = {part: sum(piece.size for piece in rows.pieces if piece.part == part) for part in PARTS}
        self._routed = isinstance(self._layer.mlp, DeepseekV3MoE)
        self._before_mlps = 1 / (1 + rows.model.experts) if self._routed else 0.5
        self._wide: Prior | None = None

    def go(self) -> Measured:
        """Have all rows pass, and every matrix that is asked for settled."""
        without = [f"{self._name}.mlp.experts"] if self._routed else []
        with self._rows.layers.loaded(self._name, self._layer, without=without) as loaded:
            self._digest(loaded.parts.items())
            layer: Any = self._layer
            mlp = layer.mlp
            layer.mlp = Noted()
            try:
                attention = Attention(f"{self._name}.self_attn", layer.self_attn, self._groups, self._rows.pieces)
                attention.solve(self._through, propagate=self._propagate)
                chosen = self._route(mlp)
            finally:
                layer.mlp = mlp
            self._mlps(mlp, chosen)
        self._go_on()
        return self._measured()

    def _through(self, number: int) -> Tensor:
        piece = self._rows.pieces[number]
        hidden = self._hidden.get(self._number, number).to(self._rows.assembly.device)
        return self._rows.layers.through(self._layer, hidden, positions=piece.positions)

    def _route(self, mlp: Any) -> tuple[Tensor, Tensor] | None:
        """Run attention; keep what MLPs are given. Return what the router chose, ids and weights `[T, k]`."""
        chosen, begun = [], 0
        layer: Any = self._layer
        for number, piece in enumerate(self._rows.pieces):
            span = slice(begun, begun + piece.size)
            self._kept.residual[span] = self._through(number).flatten(0, 1)
            x = layer.mlp.seen
            self._kept.x[span] = x.flatten(0, 1)
            if self._routed:
                _, weights, ids = mlp.gate(x)
                chosen.append((ids.cpu(), weights.float().cpu()))
            begun += piece.size
            self._tell(begun / len(self._real) * self._before_mlps)
        layer.mlp.seen = None
        self._kept.out.zero_()
        self._kept.aside.zero_()
        if not chosen:
            return None
        ids, weights = (torch.cat(each) for each in zip(*chosen, strict=True))
        return ids, weights

    def _mlps(self, mlp: Any, chosen: tuple[Tensor, Tensor] | None) -> None:
        everyone = self._tokens([every(part, first, self._real[span]) for part, first, span in self._spans()])
        if chosen is None:
            self._plain(f"{self._name}.mlp", mlp, everyone, None)
            return
        given = self._look(everyone)
        self._plain(f"{self._name}.mlp.shared_experts", mlp.shared_experts, everyone, given)
        ids, weights = chosen
        experts = Experts(self._rows.assembly, f"{self._name}.mlp.experts", 1)
        routed = [
            sort_by_expert(part, ids[span], weights[span], self._real[span], first, experts.count)
            for part, first, span in self._spans()
        ]
        self._experts(experts, self._tokens(routed))

    def _tokens(self, routed: list[Routed]) -> Tokens:
        kept = self._kept
        return Tokens(kept.x, kept.out, kept.aside, routed, self._propagate)

    def _spans(self) -> Iterator[tuple[Part, int, slice]]:
        first = 0
        for part in PARTS:
            yield part, first, slice(first, first + self._sizes[part])
            first += self._sizes[part]

    def _plain(self, name: str, module: Any, tokens: Tokens, given: Evidence | None) -> None:
        """Settle and run an MLP that every token passes."""
        weights = {each: getattr(module, each).weight.detach() for each in PROJECTIONS}
        one = Mlp(name, weights, tokens, given=given)
        one.solve(self._groups)
        add(tokens, one.outputs())

    def _look(self, everyone: Tokens) -> Evidence | None:
        """Sum what all MLPs of the layer are given, if one of them is still to be settled by it."""
        pair = PROJECTIONS[:2]
        above = [f"{self._name}.mlp.experts.{number}" for number in reversed(range(self._rows.model.experts))]
        asked = [*above, f"{self._name}.mlp.shared_experts"]  # the last expert first: where a run stopped, it is open
        if all(self._groups.stand(name, pair) for name in asked):
            return None
        device = self._rows.assembly.device
        name = f"{self._name}.mlp.experts"
        held = int(self._real[self._sizes["train"] :].sum())
        seen = Seen(name, self._rows.model.hidden, held, device)
        for routed in everyone.routed:
            for tokens, counts, real in routed.of(0):
                at = tokens if real is None else tokens[real]
                seen.see(routed.part, everyone.x[at].to(device), counts[: len(at)].to(device))
        evidence = seen.evidence()
        self._wide = Prior(hessian=evidence.hessian, mean=evidence.mean, tokens=evidence.tokens, held=evidence.held)
        return evidence

    def _experts(self, experts: Experts, tokens: Tokens) -> None:
        turns, done = Turns(self._workers), [0]

        @torch.no_grad()
        def work(number: int) -> None:
            try:
                one = self._settled(experts, number, tokens)
                waits = one.count > KEPT
                outputs = one.outputs() if waits else list(one.outputs())
                turns.hand(number, lambda: add(tokens, outputs), wait=waits)
            except BaseException:
                turns.stop()
                raise
            done[0] += 1  # only a display: a lost update does no harm

        with single_threaded():
            tick = lambda: self._tell((1 + done[0]) * self._before_mlps)  # noqa: E731
            pool.run(iter(range(experts.count)), work, workers=self._workers, tick=tick)

    def _settled(self, experts: Experts, number: int, tokens: Tokens) -> Mlp:
        read = experts.read(number, number + 1)
        self._digest(experts.modules(read))
        weights = {name: module.weight.detach() for name, module in read[number].items()}
        one = Mlp(f"{self._name}.mlp.experts.{number}", weights, tokens, number, prior=self._wide)
        one.solve(self._groups)
        return one

    def _go_on(self) -> None:
        begun = 0
        for number, piece in enumerate(self._rows.pieces):
            span = slice(begun, begun + piece.size)
            out = self._kept.residual[span] + self._kept.out[span].to(self._kept.residual.dtype)
            self._hidden.put(self._number + 1, number, out.view(*piece.tokens.shape, -1))
            begun += piece.size

    def _measured(self) -> Measured:
        """Compare what the MLP gives with the weights that ship and with the source's, on held-out tokens.

        Raises:
            BadValue: one of them is not finite.
        """
        begun = self._sizes["train"]
        real = self._real[begun:]
        error = energy = 0.0
        for first in range(0, len(real), BLOCK):
            mask = real[first : first + BLOCK]
            there = self._kept.out[begun + first : begun + first + BLOCK][mask].double()
            aside = self._kept.aside[first : first + BLOCK][mask].double()
            error += float((there - aside).square().sum())
            energy += float((aside if self._propagate else there).square().sum())
        if not math.isfinite(error + energy):
            raise not_finite(f"{self._name}.mlp", "what it gives")
        return Measured(error / energy if energy else None, int(real.sum()))
