"""What happens to a text between the layers of two models: hooks for a streamed pass of each.

The baseline's pass keeps the output of every layer, in memory or in files; the candidate's compares its own with it as
it goes. Neither ever holds more than one layer's weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from operator import add
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from k2quant.errors import HarnessFault
from k2quant.eval.drift.batches import Layout, Measured
from k2quant.eval.drift.findings import LayerFidelity
from k2quant.model import LayerHooks
from k2quant.model.passes.activations import Activations
from k2quant.model.passes.divergence import kl
from k2quant.model.passes.routes import Routing, compare_routes, watch_router


class Watch(LayerHooks):
    """Notes of each batch the experts that were chosen and the outputs at some places; refuses what is no number."""

    def __init__(self, folder: Path, places: list[Tensor], tick: Callable[[], None]) -> None:
        """Watch a pass.

        Args:
            folder: of the model, for messages.
            places: for each batch, int64: which of its tokens, counted through, are read out early.
            tick: called when a layer is done.
        """
        self._folder, self._places, self._tick = folder, places, tick
        self._handles: list[RemovableHandle] = []
        self._chosen: list[Tensor] = []
        self.outputs: list[list[Tensor]] = [[] for _ in places]
        """Of each batch and layer, the hidden states `[m, H]` at its places."""
        self.routes: list[list[Tensor]] = [[] for _ in places]
        """Of each batch and layer with a router, the experts of every token, int32 `[T, k]`."""
        self._norm: nn.Module = nn.Identity()
        self._head: nn.Module = nn.Identity()

    def before(self, layer: int, module: nn.Module) -> None:  # noqa: ARG002  the layers come in order
        """Listen to the router."""
        self._handles = watch_router(module, self._chosen.append)

    def batch(self, layer: int, number: int, inputs: Tensor, outputs: Tensor) -> None:  # noqa: ARG002  the hook's signature
        """Note some outputs.

        Raises:
            HarnessFault: one of them is NaN or infinite.
        """
        check_finite(outputs, self._folder, f"the output of layer {layer}")
        self.outputs[number].append(outputs.flatten(0, 1)[self._places[number].to(outputs.device)])
        self.routes[number] += self._chosen
        self._chosen.clear()

    def after(self, layer: int, module: nn.Module) -> bool:  # noqa: ARG002  the hook's signature
        """Stop listening."""
        for handle in self._handles:
            handle.remove()
        self._tick()
        return False

    def ending(self, norm: nn.Module, head: nn.Module) -> None:
        """Take what turns hidden states into predictions, as long as the logits are taken."""
        self._norm, self._head = norm, head

    def predict(self, hidden: Tensor) -> Tensor:
        """Return the logits `[m, V]` that the model's own norm and head make of hidden states `[m, H]`."""
        logits: Tensor = self._head(self._norm(hidden))
        return logits


class KeepingWatch(Watch):
    """The baseline's: keeps every output."""

    def __init__(self, folder: Path, places: list[Tensor], tick: Callable[[], None], kept: Activations) -> None:
        super().__init__(folder, places, tick)
        self._kept = kept

    def batch(self, layer: int, number: int, inputs: Tensor, outputs: Tensor) -> None:
        """Keep it."""
        super().batch(layer, number, inputs, outputs)
        self._kept.put(layer, number, outputs)


class ComparingWatch(Watch):
    """The candidate's: compares every output with the baseline's, which is not needed any more then."""

    def __init__(self, folder: Path, places: list[Tensor], tick: Callable[[], None], kept: Activations) -> None:
        super().__init__(folder, places, tick)
        self._kept = kept
        self.sums: list[list[Tensor]] = [[] for _ in places]
        """Of each batch and layer, what `compared` returns."""

    def batch(self, layer: int, number: int, inputs: Tensor, outputs: Tensor) -> None:
        """Compare it."""
        super().batch(layer, number, inputs, outputs)
        self.sums[number].append(compared(self._kept.get(layer, number).to(outputs.device), outputs))

    def after(self, layer: int, module: nn.Module) -> bool:
        """Let the baseline's outputs go."""
        self._kept.finish(layer + 1)
        return super().after(layer, module)


def taken(base: Watch, candidate: ComparingWatch, number: int, scores: Tensor, layout: Layout) -> Measured:
    """Take what both noted of a batch, with the scores of its predictions; they keep nothing of it."""
    early = torch.stack([torch.stack(watch.outputs[number]) for watch in (base, candidate)]).cpu()
    chosen = base.routes[number] + candidate.routes[number]
    shape = (2, layout.routers, layout.tokens, layout.chosen)
    routes = torch.stack(chosen).reshape(shape) if chosen else torch.empty(shape, dtype=torch.int32)
    measured = Measured(scores, torch.stack(candidate.sums[number]), routes, early)
    for notes in (base.outputs, base.routes, candidate.outputs, candidate.routes, candidate.sums):
        notes[number] = []
    return measured


def compared(base: Tensor, candidate: Tensor) -> Tensor:
    """Return sums over the tokens of hidden states `[B, T, H]`, float64 `[3]`: squared error, energy, cosines."""
    base, candidate = base.double(), candidate.double()
    energy, other = base.square().sum(-1), candidate.square().sum(-1)
    norms = (energy * other).sqrt()  # one root, so that equal vectors have a cosine of exactly 1
    cosines = torch.where(norms > 0, (base * candidate).sum(-1) / norms, (energy == other).double())
    return torch.stack([(candidate - base).square().sum(), energy.sum(), cosines.sum()]).cpu()


class Hidden(NamedTuple):
    """Candidate against baseline in one layer; the fields are those of `LayerFidelity`."""

    relative_mse: float
    cosine: float


def hidden(sums: Iterable[Tensor], tokens: int) -> Hidden:
    """Return a layer's figures from the sums of its batches; an error against no energy at all counts as its whole."""
    error, energy, cosines = reduce(add, sums).tolist()  # one by one: Python's own `sum` rounds by its release
    return Hidden(error / (energy or error or 1.0), cosines / tokens)


Readout = Callable[[Tensor], Tensor]
"""Returns the logits `[m, V]` that a model's own norm and head make of hidden states `[m, H]`."""


@torch.no_grad()
def layer_figures(
    found: Sequence[Measured], readouts: tuple[Readout, Readout], experts: int, device: torch.device
) -> tuple[LayerFidelity, ...]:
    """Return the figures of every layer over the whole text.

    Args:
        found: all of its batches, in order.
        readouts: the baseline's and the candidate's.
        experts: how many there are.
        device: where they read out.
    """
    layers, routers = len(found[0].sums), found[0].routes.shape[1]
    dense = layers - routers  # they come first
    tokens = sum(one.routes.shape[2] for one in found)
    figures = []
    for layer in range(layers):
        error = hidden((one.sums[layer] for one in found), tokens)
        routed = _routing(found, layer - dense, experts) if layer >= dense else None
        states = (torch.cat([one.early[side, layer] for one in found]).to(device) for side in (0, 1))
        logits = [readout(some) for readout, some in zip(readouts, states, strict=True)]
        figures.append(
            LayerFidelity(
                layer=layer,
                relative_mse=error.relative_mse,
                cosine=error.cosine,
                kl=float(kl(*logits).mean()),
                same_experts=routed and routed.same_experts,
                overlap=routed and routed.overlap,
                load_shift=routed and routed.load_shift,
                never=routed.never if routed else (),
                starved=routed.starved if routed else (),
            )
        )
    return tuple(figures)


def _routing(found: Sequence[Measured], router: int, experts: int) -> Routing:
    base, candidate = (torch.cat([one.routes[side, router] for one in found]) for side in (0, 1))
    return compare_routes(base, candidate, experts)


def check_finite(values: Tensor, folder: Path, where: str) -> None:
    """Refuse NaN and infinity.

    Raises:
        HarnessFault: there are some; it names the model.
    """
    wrong = int((~values.isfinite()).sum())
    if wrong:
        raise HarnessFault(
            f"the model does not give numbers: {wrong} of {values.numel()} in {where} are NaN or infinite",
            file=folder,
            remedy="is it damaged? `k2quant verify` tells; float16 may overflow where bfloat16 does not",
        )
