"""One gated MLP: a routed expert, a shared one, or that of a dense layer.

Gate and up first, then h with what they ship with, then down, which that h decides, then what it all gives. Tokens pass
in blocks that are cut by the data alone; products are torch's with BF16 values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import silu

from k2quant.calib.collecting.experts import Routed
from k2quant.calib.solving.evidence import Evidence, Prior
from k2quant.calib.solving.memory import KEPT
from k2quant.calib.solving.passing.groups import Groups
from k2quant.calib.solving.passing.seen import Seen
from k2quant.calib.stats.layout import Part
from k2quant.model.modules import PROJECTIONS, decoded_linear

_GATE_UP, _DOWN = PROJECTIONS[:2], PROJECTIONS[2:]

Weights = Mapping[str, Tensor]
"""The three projections, BF16 `[R, K]`, by name."""


class Tokens(NamedTuple):
    """What a layer keeps of all tokens, and who is sent where."""

    x: Tensor
    """BF16 `[T, H]`: what MLPs are given."""
    out: Tensor
    """float32 `[T, H]`: what they return is added here, weighted; it goes on to the next layer."""
    aside: Tensor
    """float32 `[V, H]`: for held-out tokens, the last ones, what goes on had the layer's other weights been used."""
    routed: Sequence[Routed]
    """Who sees which tokens, by part."""
    propagate: bool
    """Whether the weights that count for `out` are those that ship; else the source's, and `aside` has what ships."""


class Output(NamedTuple):
    """What an MLP makes of a block of tokens."""

    tokens: Tensor
    """int64 `[M]`."""
    counts: Tensor
    """float32 `[M]`: by what its output is multiplied."""
    goes_on: Tensor
    """BF16 `[M, H]`."""
    aside: Tensor | None
    """BF16 `[M, H]`, of held-out tokens."""


class _Block(NamedTuple):
    number: int
    part: Part
    tokens: Tensor
    counts: Tensor
    real: Tensor | None


class Mlp:
    """One MLP of a layer."""

    def __init__(
        self,
        name: str,
        weights: Weights,
        tokens: Tokens,
        number: int = 0,
        *,
        prior: Prior | None = None,
        given: Evidence | None = None,
    ) -> None:
        """Take its weights.

        Args:
            name: in the language model, such as `model.layers.3.mlp.experts.17`.
            weights: as the source has them.
            tokens: of the layer.
            number: whose tokens of these it sees.
            prior: what all tokens say of what gate and up are given.
            given: what is known of that, where it need not be summed.
        """
        self._name, self._weights, self._tokens, self._number = name, weights, tokens, number
        self._prior, self._given = prior, given
        self._device = weights["down_proj"].device
        self._solved: Weights = weights
        self._inner: dict[int, Tensor] = {}
        self.count = sum(len(block.tokens) for block in self._blocks())
        """Tokens that it sees, padding too."""

    def solve(self, groups: Groups) -> None:
        """Settle its matrices, those of them that are asked for."""
        first = {name: self._weights[name] for name in _GATE_UP}
        self._solved = groups.values(self._name, first, lambda: self._given or self._outer()) | {
            name: self._weights[name] for name in _DOWN
        }
        last = {name: self._weights[name] for name in _DOWN}
        self._solved = {**self._solved, **groups.values(self._name, last, self._middle)}

    def outputs(self) -> Iterator[Output]:
        """Yield what it makes of its tokens; what was kept of them is gone afterwards."""
        same = all(self._solved[name] is each for name, each in self._weights.items())
        for block in self._blocks():
            held = block.part == "validation"
            ships = decoded_linear(self._h(block), self._solved["down_proj"])
            self._inner.pop(block.number, None)
            source = None
            if not same and (held or not self._tokens.propagate):
                source = decoded_linear(self._gated(block, self._weights), self._weights["down_proj"])
            goes_on = ships if self._tokens.propagate or source is None else source
            other = source if self._tokens.propagate and source is not None else ships
            yield Output(block.tokens, block.counts, goes_on, other if held else None)

    def _blocks(self) -> Iterator[_Block]:
        """Yield its tokens of both parts in order."""
        number = 0
        for routed in self._tokens.routed:
            for tokens, counts, real in routed.of(self._number):
                yield _Block(number, routed.part, tokens, counts, real)
                number += 1

    def _outer(self) -> Evidence:
        """Return what is known of what gate and up are given."""
        seen = self._seen("gate_proj")
        for block in self._blocks():
            self._see(seen, block, self._x(block))
        return seen.evidence(self._prior)

    def _middle(self) -> Evidence:
        """Return what is known of what down is given."""
        seen = self._seen("down_proj")
        for block in self._blocks():
            self._see(seen, block, self._h(block))
        return seen.evidence()

    def _seen(self, name: str) -> Seen:
        held = sum(
            len(block.tokens) if block.real is None else int(block.real.sum())
            for block in self._blocks()
            if block.part == "validation"
        )
        return Seen(f"{self._name}.{name}", self._weights[name].shape[1], held, self._device)

    def _see(self, seen: Seen, block: _Block, values: Tensor) -> None:
        squared = block.counts.to(self._device).square()
        if block.real is not None:
            real = block.real.to(self._device)
            values, squared = values[real], squared[real]
        seen.see(block.part, values, squared)

    def _x(self, block: _Block) -> Tensor:
        return self._tokens.x[block.tokens].to(self._device)

    def _h(self, block: _Block) -> Tensor:
        """Return what down is given of a block with the gate and up that ship; of the first blocks it is kept."""
        found = self._inner.get(block.number)
        if found is None:
            found = self._gated(block, self._solved)
            if sum(map(len, self._inner.values())) + len(found) <= KEPT:
                self._inner[block.number] = found
        return found

    def _gated(self, block: _Block, weights: Weights) -> Tensor:
        x = self._x(block)
        gate, up = (decoded_linear(x, weights[name]) for name in _GATE_UP)
        return silu(gate.float()).mul_(up).to(x.dtype)


def add(tokens: Tokens, outputs: Iterator[Output] | Sequence[Output]) -> None:
    """Add what an MLP gave to what its layer keeps."""
    first = len(tokens.out) - len(tokens.aside)
    for each in outputs:
        counts = each.counts[:, None]
        tokens.out.index_add_(0, each.tokens, each.goes_on.float().cpu().mul_(counts))
        if each.aside is not None:
            tokens.aside.index_add_(0, each.tokens - first, each.aside.float().cpu().mul_(counts))


def every(part: Part, first: int, real: Tensor) -> Routed:
    """Return tokens all of which one MLP sees, each counting 1.

    Args:
        part: theirs.
        first: number of the first.
        real: bool `[S]`, False for padding.
    """
    count = len(real)
    return Routed(
        part,
        torch.arange(first, first + count),
        torch.ones(count),
        (count,),
        None if bool(real.all()) else real,
    )
