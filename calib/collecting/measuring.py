"""What goes into the matrices of one layer, seen by hooks, and as statistics are written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from k2quant.calib.collecting.experts import Pairs, Sums
from k2quant.calib.collecting.memory import BLOCK
from k2quant.calib.collecting.moments import Hessian, Moments
from k2quant.calib.collecting.pieces import Piece
from k2quant.calib.stats.layout import PARTS, Input, Part, inputs
from k2quant.calib.stats.model import Model
from k2quant.calib.stats.writing import HessianWriter, LayerStats
from k2quant.errors import BadValue


class Watch:
    """Sums of the inputs that every token passes, of one layer, and the Hessians of all."""

    def __init__(self, model: Model, number: int, layer: nn.Module, device: torch.device, *, hessians: bool) -> None:
        """Set hooks on a layer's matrices.

        Args:
            model: its sizes.
            number: of the layer.
            layer: the layer.
            device: where it computes.
            hessians: whether Hessians are summed too.
        """
        self._device = device
        self._inputs = inputs(model, number)
        plain = [one for one in self._inputs if one.experts is None]
        routed = {one.name: one for one in self._inputs if one.experts is not None}
        self._moments = {(one.name, part): Moments(one.width, None, device) for one in plain for part in PARTS}
        self._hessians = {key: Hessian(len(sums.square), device) for key, sums in self._moments.items() if hessians}
        self.experts = f"model.layers.{number}.mlp.experts"
        """The name of the routed experts; what all of them are given has it too."""
        self.sums = Sums(model.hidden, model.inner, model.experts, device) if routed else None
        """Of the routed experts."""
        self._pairs: dict[int, dict[Part, tuple[Hessian, Hessian]]] = {}
        self._model, self._collects = model, hessians
        self.piece: Piece | None = None
        """What goes through the layer now."""
        self._hooks = [
            _matrix(layer, one, f"model.layers.{number}.").register_forward_pre_hook(self._hook(one.name))
            for one in plain
            if one.name != self.experts
        ]

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def see(_module: nn.Module, given: tuple[Any, ...]) -> None:
            self.see(name, given[0])

        return see

    def see(self, name: str, x: Tensor) -> None:
        """Add what an input is for the tokens of `piece`, `[.., K]`."""
        if self.piece is None:
            return
        rows = x.reshape(-1, x.shape[-1])
        real = self.piece.real.flatten()
        if not bool(real.all()):
            rows = rows[real.to(self._device)]
        for block in rows.split(BLOCK):
            self._moments[name, self.piece.part].add(block)
            if self._collects:
                self._hessians[name, self.piece.part].add(block)

    def pairs(self, expert: int) -> Pairs | None:
        """Return where an expert's Hessians are summed; None where none are asked for."""
        if not self._collects:
            return None
        if expert not in self._pairs:
            widths = self._model.hidden, self._model.inner
            self._pairs[expert] = {
                part: (Hessian(widths[0], self._device), Hessian(widths[1], self._device)) for part in PARTS
            }
        return self._pairs[expert]

    def write_expert(self, expert: int, writer: HessianWriter | None) -> None:
        """Write an expert's Hessians, which are gone afterwards."""
        if writer is None or self.sums is None:
            return
        for part, pair in self._pairs.pop(expert, {}).items():
            found = {"gate_proj": (pair[0], self.sums.gate[part]), "down_proj": (pair[1], self.sums.down[part])}
            for name, (hessian, moments) in found.items():
                weight = float(moments.weight[expert])
                if weight:
                    writer.write(f"{self.experts}.{name}", part, hessian.mean(weight), expert=expert)

    def write_plain(self, writer: HessianWriter | None) -> None:
        """Write all other Hessians."""
        if writer is not None:
            for (name, part), hessian in self._hessians.items():
                writer.write(name, part, hessian.mean(float(self._moments[name, part].weight)))

    def end(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()

    def stats(self) -> LayerStats:
        """Return what was measured.

        Raises:
            BadValue: an input is not finite; all that comes after would be as little.
        """
        found = {key: moments.measured() for key, moments in self._all()}
        for (name, part), measured in found.items():
            if not np.isfinite(measured.mean_square).all():
                raise BadValue(
                    f"what it is given on the part {part} cannot be measured",
                    tensor=name,
                    expected="finite values whose squares float32 holds",
                    found="NaN or infinity",
                    remedy="weights of this layer or of one before it are damaged or far too large",
                )
        return found

    def _all(self) -> Iterator[tuple[tuple[str, Part], Moments]]:
        yield from self._moments.items()
        if self.sums is not None:
            for name, by_part in (("gate_proj", self.sums.gate), ("down_proj", self.sums.down)):
                yield from (((f"{self.experts}.{name}", part), moments) for part, moments in by_part.items())


def _matrix(layer: nn.Module, one: Input, prefix: str) -> nn.Module:
    """Return the module that multiplies an input first; where queries are not compressed, q_proj for q_a_proj."""
    name = one.name.removeprefix(prefix)
    above, _, last = name.rpartition(".")
    parent = layer.get_submodule(above)
    found = getattr(parent, last, None)
    module = parent.q_proj if found is None and last == "q_a_proj" else found
    if not isinstance(module, nn.Module):
        msg = f"{one.name} is no module of the layer"
        raise TypeError(msg)
    return module
