"""The routed experts of a layer, some of them in memory at a time, and what goes into each.

One expert after another sees its tokens of a segment, block by block. So neither how many experts are in memory nor how
many segments make a wave changes a bit of what comes out. Products are torch's with the BF16 values that weights mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from k2quant.calib.collecting.memory import BLOCK
from k2quant.calib.collecting.moments import Hessian, Moments
from k2quant.calib.stats.layout import PARTS, Part
from k2quant.model.assembly import Assembly
from k2quant.model.filling import fill
from k2quant.model.modules import PROJECTIONS, decoded_linear

Expert = Mapping[str, nn.Linear]
"""The three projections of an expert, by name."""


class Routed(NamedTuple):
    """The tokens of a segment, by the expert that they are sent to."""

    part: Part
    tokens: Tensor
    """int64 `[S k]`: numbers of tokens in the wave, those of expert 0 first; of one expert in order."""
    weights: Tensor
    """float32 `[S k]`: how much the router has the expert count for that token."""
    ends: tuple[int, ...]
    """Where each expert's tokens end."""
    real: Tensor | None
    """bool `[S k]`: False for padding; None where there is none."""

    def of(self, expert: int) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Yield an expert's tokens in blocks: numbers in the wave, weights, and which are real."""
        start, stop = self.ends[expert - 1] if expert else 0, self.ends[expert]
        for first in range(start, stop, BLOCK):
            block = slice(first, min(first + BLOCK, stop))
            yield self.tokens[block], self.weights[block], None if self.real is None else self.real[block]


def sort_by_expert(part: Part, ids: Tensor, weights: Tensor, real: Tensor, first: int, experts: int) -> Routed:
    """Sort what a router chose for a segment.

    Args:
        part: of the data.
        ids: int64 `[S, k]`.
        weights: `[S, k]`.
        real: bool `[S]`.
        first: the number of the segment's first token in its wave.
        experts: how many there are.
    """
    chosen = ids.flatten()
    order = chosen.argsort(stable=True)
    tokens = order // ids.shape[1]
    ends = chosen.bincount(minlength=experts).cumsum(0).tolist()
    padded = None if bool(real.all()) else real[tokens]
    return Routed(part, tokens + first, weights.flatten()[order].float(), tuple(ends), padded)


class Experts:
    """The routed experts of one layer."""

    def __init__(self, assembly: Assembly, name: str, chunk: int) -> None:
        """Look at a layer whose experts have no weights.

        Args:
            assembly: the model.
            name: of its experts' module, such as `model.layers.3.mlp.experts`.
            chunk: how many may be in memory.
        """
        self._assembly, self._name, self._chunk = assembly, name, chunk
        self.count = int(assembly.config.n_routed_experts)
        self._kept: dict[int, Expert] = {}

    def chunks(self) -> Iterator[dict[int, Expert]]:
        """Yield all experts, with their weights, chunk by chunk; if all fit they are read but once."""
        if self._chunk >= self.count:
            self._kept = self._kept or self.read(0, self.count)
            yield self._kept
            return
        for first in range(0, self.count, self._chunk):
            found = self.read(first, min(first + self._chunk, self.count))
            yield found
            found.clear()  # before the next ones are read

    def modules(self, experts: Mapping[int, Expert]) -> Iterator[tuple[str, nn.Module]]:
        """Yield the projections of some experts by name within the model."""
        for number, expert in experts.items():
            yield from ((f"{self._name}.{number}.{part}", module) for part, module in expert.items())

    def read(self, first: int, last: int) -> dict[int, Expert]:
        """Read experts from `first` to `last`, the latter left out; whoever holds them decides how long they stay."""
        found = {number: self._empty() for number in range(first, last)}
        fill(self._assembly, [(name, module, self._assembly.device) for name, module in self.modules(found)])
        return found

    def _empty(self) -> Expert:
        hidden, inner = self._assembly.config.hidden_size, self._assembly.config.moe_intermediate_size
        sides = {part: (inner, hidden) if part == "down_proj" else (hidden, inner) for part in PROJECTIONS}
        return {part: nn.Linear(*each, bias=False, device="meta") for part, each in sides.items()}


class Sums:
    """What is summed of the inputs of a layer's routed experts."""

    def __init__(self, hidden: int, inner: int, experts: int, device: torch.device) -> None:
        """Begin with nothing."""
        self.gate: dict[Part, Moments] = {part: Moments(hidden, experts, device) for part in PARTS}
        """Of what gate and up multiply."""
        self.down: dict[Part, Moments] = {part: Moments(inner, experts, device) for part in PARTS}
        """Of what down multiplies."""


Pairs = Mapping[Part, tuple[Hessian, Hessian]]
"""The Hessians of one expert's two inputs, by part."""


def run_expert(
    number: int, expert: Expert, segments: list[Routed], x: Tensor, out: Tensor, sums: Sums, hessians: Pairs | None
) -> None:
    """Have an expert see its tokens of a wave.

    Args:
        number: which expert it is.
        expert: its projections.
        segments: of the wave.
        x: `[T, H]`: what the layer's experts are given.
        out: float32 `[T, H]`: what they return is added here, weighted.
        sums: what is measured.
        hessians: that too, where it is asked for.
    """
    gate, up, down = (expert[name].weight for name in PROJECTIONS)
    for segment in segments:
        for tokens, weights, real in segment.of(number):
            given = x[tokens]
            inner = silu(decoded_linear(given, gate).float()).mul_(decoded_linear(given, up)).to(x.dtype)
            _add(number, segment.part, (given, inner), weights, real, sums, hessians)
            out.index_add_(0, tokens, decoded_linear(inner, down).float().mul_(weights[:, None]))


def _add(
    number: int,
    part: Part,
    seen: tuple[Tensor, Tensor],
    weights: Tensor,
    real: Tensor | None,
    sums: Sums,
    hessians: Pairs | None,
) -> None:
    given, inner = seen if real is None else (seen[0][real], seen[1][real])
    squared = (weights if real is None else weights[real]).square()
    sums.gate[part].add(given, squared, expert=number)
    sums.down[part].add(inner, squared, expert=number)
    if hessians is not None:
        for hessian, values in zip(hessians[part], (given, inner), strict=True):
            hessian.add(values, squared)
