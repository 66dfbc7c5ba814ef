"""AdamW, and torch's Muon for matrices, over parameters that have names: so that their state can be kept by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from k2quant.errors import MalformedFile
from k2quant.ground import names
from k2quant.qat.job import Optimizer as Settings
from k2quant.qat.preparing import Prepared
from k2quant.qat.rounding import adapters, scales
from k2quant.qat.rounding.shards import like
from k2quant.qat.rounding.targets import Part, canonical

_REMEMBERED: dict[type[Optimizer], set[str]] = {AdamW: {"step", "exp_avg", "exp_avg_sq"}, Muon: {"momentum_buffer"}}
"""What each remembers of a parameter that has moved."""


class Named(NamedTuple):
    """A tensor that an optimizer moves."""

    name: str
    tensor: nn.Parameter


class _View(NamedTuple):
    """A matrix of a stack of experts as a parameter of its own, in the stack's memory: Muon takes matrices alone."""

    named: Named
    stack: nn.Parameter
    part: Part


class Optimizers:
    """All that moves a model's trained parameters, as one."""

    def __init__(self, model: nn.Module, found: Prepared, settings: Settings, *, sharded: bool = False) -> None:
        """Share the parameters out.

        Args:
            model: prepared; those of its parameters that have a gradient are trained.
            found: what fake-quantises it.
            settings: method and rates.
            sharded: whether parameters lie in shards.
        """
        self._settings = settings
        trained = [Named(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        self._views = list(_views(trained, found)) if settings.method == "muon" else []
        stacks = {id(view.stack) for view in self._views}
        rest = [named for named in trained if id(named.tensor) not in stacks]
        self._named = rest + [view.named for view in self._views]
        self._fused = not sharded
        self.optimizers: list[Optimizer] = [
            AdamW(_groups(rest, settings), betas=(settings.beta1, settings.beta2), fused=self._fused or None)
        ]
        if self._views:
            matrices = [{"params": [view.named.tensor for view in self._views], "rate": settings.rate}]
            self.optimizers.append(
                Muon(matrices, lr=settings.rate, weight_decay=settings.weight_decay, adjust_lr_fn="match_rms_adamw")
            )

    def step(self, share: float) -> None:
        """Move all parameters.

        Args:
            share: of the highest learning rate.
        """
        for view in self._views:
            view.named.tensor.grad = None if view.stack.grad is None else view.part.of(view.stack.grad)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * share
            optimizer.step()

    def zero_grad(self) -> None:
        """Forget gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        for view in self._views:
            view.stack.grad = None

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what the optimizers remember, with names of parameter and quantity."""
        for named, remembered in self._states():
            for quantity, value in sorted(remembered.items()):
                if isinstance(value, Tensor):
                    yield f"{named.name}|{quantity}", value

    def restore(self, state: Mapping[str, Tensor], *, file: object) -> None:
        """Take over what `state` gave, sharded as the parameters are.

        Raises:
            MalformedFile: it does not fit these parameters.
        """
        known = {named.name: named for named in self._named}
        for full, value in state.items():
            name, _, quantity = full.rpartition("|")
            if name not in known:
                raise MalformedFile("state of a parameter that is not trained", tensor=full, file=file)
            parameter, optimizer = known[name].tensor, self._optimizer_of(known[name])
            if quantity not in _REMEMBERED[type(optimizer)] or (quantity == "step") != (value.ndim == 0):
                raise MalformedFile("nothing that the optimizer remembers", tensor=full, file=file)
            if (
                quantity == "step"
            ):  # beside the parameter for a fused optimizer, else on the CPU, where none has to wait
                optimizer.state[parameter][quantity] = value.to(parameter.device if self._fused else "cpu").clone()
            else:
                optimizer.state[parameter][quantity] = like(value, parameter, file=file, name=full)
        for named, remembered in self._states():
            if remembered and remembered.keys() != _REMEMBERED[type(self._optimizer_of(named))]:
                raise MalformedFile("a part of the optimizer's state is missing", tensor=named.name, file=file)

    def _states(self) -> Iterator[tuple[Named, dict[str, Any]]]:
        for named in self._named:
            yield named, self._optimizer_of(named).state.get(named.tensor, {})

    def _optimizer_of(self, named: Named) -> Optimizer:
        of_views = {id(view.named.tensor) for view in self._views}
        return self.optimizers[-1 if id(named.tensor) in of_views else 0]


def _groups(trained: list[Named], settings: Settings) -> list[dict[str, Any]]:
    """Return AdamW's groups: matrices, which decay, learned scales, which have a rate of their own, and the rest."""
    learned = [one.tensor for one in trained if scales.CHILD in one.name.split(".")]
    beside = {id(tensor) for tensor in learned}
    matrices = [one.tensor for one in trained if one.tensor.ndim > 1 and id(one.tensor) not in beside]
    rest = [one.tensor for one in trained if one.tensor.ndim < 2 and id(one.tensor) not in beside]
    groups = [
        {"params": matrices, "rate": settings.rate, "weight_decay": settings.weight_decay},
        {"params": learned, "rate": settings.scale_rate or settings.rate, "weight_decay": 0.0},
        {"params": rest, "rate": settings.rate, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]] or [{"params": [nn.Parameter(torch.zeros(1))], "rate": 0.0}]


def _views(trained: list[Named], found: Prepared) -> Iterator[_View]:
    """Yield the matrices that Muon moves: every projection of the layers, of a stack each for itself."""
    targets = {id(target.master): target.parts for target in found.targets + found.plain}
    for name, parameter in trained:
        inner = {adapters.CHILD, scales.CHILD} & set(name.split("."))
        alone = (Part(canonical(name).removesuffix(".weight"), None, slice(None)),)  # a BF16 one is no target
        parts = targets.get(id(parameter), alone)
        if inner or not all(names.is_projection(part.base) for part in parts):
            continue
        for part in parts:
            view = nn.Parameter(part.of(parameter.detach()))
            yield _View(Named(f"{name}@{canonical(part.base)}", view), parameter, part)
