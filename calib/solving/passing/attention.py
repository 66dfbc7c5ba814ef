"""The matrices of attention, in three stages; each sees those before it as they ship."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from k2quant.calib.collecting.pieces import Piece
from k2quant.calib.solving.evidence import Evidence
from k2quant.calib.solving.passing.groups import Groups
from k2quant.calib.solving.passing.seen import Seen

_STAGES: tuple[tuple[tuple[str, ...], ...], ...] = (
    (("q_a_proj", "q_proj", "kv_a_proj_with_mqa"),),
    (("q_b_proj",), ("kv_b_proj",)),
    (("o_proj",),),
)
"""Projections that share an input, by stage, in the order in which a forward pass comes to them."""


class Attention:
    """The attention of one layer whose weights are there."""

    def __init__(self, name: str, module: nn.Module, groups: Groups, pieces: Sequence[Piece]) -> None:
        """Look at it.

        Args:
            name: in the language model, such as `model.layers.3.self_attn`.
            module: the attention.
            groups: what is solved.
            pieces: all rows, in order.
        """
        self._name, self._module, self._groups, self._pieces = name, module, groups, pieces

    def solve(self, run: Callable[[int], object], *, propagate: bool) -> None:
        """Settle its matrices, those that are asked for, and have the module hold what they ship with.

        Args:
            run: sends a piece, by its number, through the layer.
            propagate: whether a stage sees those before it as they ship, and the module keeps that.
        """
        for stage in _STAGES:
            shared = [names for each in stage if (names := self._groups.wanted(self._name, each))]
            missing = [names for names in shared if not self._groups.stand(self._name, names)]
            seen = self._watch(missing, run) if missing else {}
            for names in shared:
                weights = {name: self._projection(name).weight.detach() for name in names}
                values = self._groups.values(self._name, weights, partial(_evidence, seen, names[0]))
                if propagate:
                    self._hold(values)

    def _hold(self, values: Mapping[str, Tensor]) -> None:
        for name, each in values.items():
            self._projection(name).weight.detach().copy_(each)

    def _projection(self, name: str) -> nn.Linear:
        found = getattr(self._module, name)
        if not isinstance(found, nn.Linear):
            msg = f"{self._name}.{name} is no matrix of the model"
            raise TypeError(msg)
        return found

    def _watch(self, shared: Sequence[Sequence[str]], run: Callable[[int], object]) -> dict[str, Seen]:
        """Have all rows go as far as the last of some inputs, and return what was seen by the first who has each."""
        held = sum(int(piece.real.sum()) for piece in self._pieces if piece.part == "validation")
        first = [self._projection(names[0]) for names in shared]
        seen = {
            names[0]: Seen(f"{self._name}.{names[0]}", module.in_features, held, module.weight.device)
            for names, module in zip(shared, first, strict=True)
        }
        current: list[Piece] = []

        def hook(key: str, *, last: bool) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def see(_module: nn.Module, given: tuple[Any, ...]) -> None:
                _see(seen[key], current[0], given[0])
                if last:
                    raise _Enough

            return see

        hooks = [
            module.register_forward_pre_hook(hook(names[0], last=module is first[-1]))
            for names, module in zip(shared, first, strict=True)
        ]
        try:
            for number, piece in enumerate(self._pieces):
                current[:] = [piece]
                try:
                    run(number)
                except _Enough:
                    continue
        finally:
            for each in hooks:
                each.remove()
        return seen


class _Enough(Exception):
    """All inputs of a stage were seen: what comes after it in the layer is not needed."""


def _evidence(seen: Mapping[str, Seen], name: str) -> Evidence:
    return seen[name].evidence()


def _see(seen: Seen, piece: Piece, x: Tensor) -> None:
    rows, real = x.reshape(-1, x.shape[-1]), piece.real.flatten().to(x.device)
    rows = rows if bool(real.all()) else rows[real]
    seen.see(piece.part, rows, torch.ones(len(rows), device=x.device))
