"""What happens to a text between the layers of two models: hooks for a streamed pass of each.

The baseline's pass keeps the output of every layer, in memory or in files; the candidate's compares its own with it as
it goes. Neither ever holds more than one layer's weights.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from k2quant.errors import HarnessFault
from k2quant.model import LayerHooks
from k2quant.model.passes.activations import Activations
from k2quant.model.passes.divergence import kl
from k2quant.model.passes.routes import Routing, compare_routes, watch_router


class Watch(LayerHooks):
    """Notes of each layer the experts that were chosen and the outputs at some places; refuses what is no number."""

    def __init__(self, folder: Path, places: list[Tensor], tick: Callable[[], None]) -> None:
        """Watch a pass.

        Args:
            folder: of the model, for messages.
            places: for each batch, int64: which of its tokens, counted through, are read out early.
            tick: called when a layer is done.
        """
        self._folder, self._places, self._tick = folder, places, tick
        self._chosen: list[Tensor] = []
        self._handles: list[RemovableHandle] = []
        self.outputs: list[list[Tensor]] = []
        """Of each layer and batch, the hidden states `[n, H]` at its places."""
        self.routes: list[Tensor | None] = []
        """Of each layer, the experts of every token, int32 `[T, k]`; None for a dense one."""
        self._norm: nn.Module = nn.Identity()
        self._head: nn.Module = nn.Identity()

    def before(self, layer: int, module: nn.Module) -> None:  # noqa: ARG002  the layers come in order
        """Listen to the router."""
        self._chosen = []
        self._handles = watch_router(module, self._chosen.append)
        self.outputs.append([])

    def batch(self, layer: int, number: int, inputs: Tensor, outputs: Tensor) -> None:  # noqa: ARG002  the hook's signature
        """Note some outputs.

        Raises:
            HarnessFault: one of them is NaN or infinite.
        """
        check_finite(outputs, self._folder, f"the output of layer {layer}")
        self.outputs[layer].append(outputs.flatten(0, 1)[self._places[number].to(outputs.device)])

    def after(self, layer: int, module: nn.Module) -> bool:  # noqa: ARG002  the hook's signature
        """Stop listening."""
        for handle in self._handles:
            handle.remove()
        self.routes.append(torch.cat(self._chosen) if self._chosen else None)
        self._tick()
        return False

    def ending(self, norm: nn.Module, head: nn.Module) -> None:
        """Take what turns hidden states into predictions, as long as the logits are taken."""
        self._norm, self._head = norm, head

    def predict(self, layer: int) -> Tensor:
        """Return the logits `[n, V]` that the model's own norm and head make of a layer's output."""
        logits: Tensor = self._head(self._norm(torch.cat(self.outputs[layer])))
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


class Hidden(NamedTuple):
    """Candidate against baseline in one layer; the fields are those of `LayerFidelity`."""

    relative_mse: float
    cosine: float


class ComparingWatch(Watch):
    """The candidate's: compares every output with the baseline's, which is not needed any more then."""

    def __init__(self, folder: Path, places: list[Tensor], tick: Callable[[], None], kept: Activations) -> None:
        super().__init__(folder, places, tick)
        self._kept = kept
        self._sums = _Sums()
        self.hidden: list[Hidden] = []
        """Of each layer."""

    def batch(self, layer: int, number: int, inputs: Tensor, outputs: Tensor) -> None:
        """Compare it."""
        super().batch(layer, number, inputs, outputs)
        self._sums.add(self._kept.get(layer, number).to(outputs.device), outputs)

    def after(self, layer: int, module: nn.Module) -> bool:
        """Sum up."""
        self.hidden.append(self._sums.hidden())
        self._sums = _Sums()
        self._kept.finish(layer + 1)
        return super().after(layer, module)


class _Sums:
    """Sums over the tokens of one layer, in float64."""

    def __init__(self) -> None:
        self._error = self._energy = self._cosines = 0.0
        self._tokens = 0

    def add(self, base: Tensor, candidate: Tensor) -> None:
        """Take the hidden states `[B, T, H]` of a batch."""
        base, candidate = base.double(), candidate.double()
        energy, other = base.square().sum(-1), candidate.square().sum(-1)
        norms = (energy * other).sqrt()  # one root, so that equal vectors have a cosine of exactly 1
        cosines = torch.where(norms > 0, (base * candidate).sum(-1) / norms, (energy == other).double())
        self._error += float((candidate - base).square().sum())
        self._energy += float(energy.sum())
        self._cosines += float(cosines.sum())
        self._tokens += cosines.numel()

    def hidden(self) -> Hidden:
        """Return the layer's figures; an error against no energy at all counts as its whole."""
        return Hidden(self._error / (self._energy or self._error or 1.0), self._cosines / self._tokens)


def routing(base: Watch, candidate: Watch, layer: int, experts: int) -> Routing | None:
    """Return how the routing of a layer differs; None for a dense one."""
    before, after = base.routes[layer], candidate.routes[layer]
    return None if before is None or after is None else compare_routes(before, after, experts)


@torch.no_grad()
def early_kl(base: Watch, candidate: Watch, layer: int) -> float:
    """Return the mean KL divergence between what both models would predict from a layer's output."""
    return float(kl(base.predict(layer), candidate.predict(layer)).mean())


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
