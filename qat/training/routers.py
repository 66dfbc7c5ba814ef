"""Where the routers of a model send its tokens, counted while it trains, and how far two models' choices agree."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from k2quant.errors import MissingTensor, ShapeMismatch, UnsupportedFormat


class RouterWatch:
    """Counts the tokens of each expert of each router of a model, on its device and without waiting for it.

    A router is known by its structure, not by its class: a buffer `e_score_correction_bias` `[E]`, a `weight` `[E, H]`,
    and the chosen experts, an integer tensor `[T, k]`, among what it returns. Nothing is counted until `counting` is
    set. What gradient checkpointing computes a second time never is.
    """

    def __init__(self, model: nn.Module) -> None:
        """Watch every router of a model until `close`.

        Args:
            model: with its own names of modules; a model without routers has nothing to count.
        """
        self.counting = False
        """Whether forward passes are counted; to be off while the model is evaluated."""
        self.mask: Tensor | None = None
        """bool `[T]`: which tokens of the passes to come are real; None for all."""
        routers = dict(_routers(model))
        # On the CPU until a pass tells the device: an offloaded router's weight is on none.
        self._loads = {name: torch.zeros(len(router.weight), dtype=torch.int64) for name, router in routers.items()}
        self._noted: dict[str, list[Tensor]] | None = None
        # First of all hooks: expert parallelism has one that renumbers the experts for each process.
        self._hooks = [
            router.register_forward_hook(self._counter(name), prepend=True) for name, router in routers.items()
        ]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the routers' modules, in the model's order."""
        return tuple(self._loads)

    def load(self) -> dict[str, Tensor]:
        """Return the tokens counted of each expert, int64 `[E]` on the CPU, by the router's name."""
        return {name: load.to("cpu", copy=True) for name, load in self._loads.items()}

    def state(self) -> dict[str, Tensor]:
        """Return what `restore` needs to go on counting: plain tensors, the same as `load`."""
        return self.load()

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` returned.

        Raises:
            MissingTensor: it lacks a router, or has another.
            ShapeMismatch: a router has another number of experts.
        """
        if state.keys() != self._loads.keys():
            raise MissingTensor(
                "the counts are those of another model's routers",
                expected=f"{len(self._loads)} routers",
                found=", ".join(sorted(state.keys() ^ self._loads.keys())[:5]),
            )
        for name, load in self._loads.items():
            if state[name].shape != load.shape or state[name].dtype != load.dtype:
                expected, found = (f"{tensor.dtype} {tuple(tensor.shape)}" for tensor in (load, state[name]))
                raise ShapeMismatch(tensor=name, expected=expected, found=found)
        for name, load in self._loads.items():
            load.copy_(state[name])

    def choices(self, run: Callable[[], object]) -> dict[str, Tensor]:
        """Return the experts that each router chooses for the tokens of some forward passes.

        Args:
            run: makes the passes; it may set `mask` before each. They are not counted.

        Returns:
            int32 `[T, k]` on the CPU by the router's name, real tokens alone, one pass after another.
        """
        counting, self.counting = self.counting, False
        self._noted = {name: [] for name in self._loads}
        try:
            run()
            return {name: torch.cat(found) for name, found in self._noted.items() if found}
        finally:
            self._noted, self.counting = None, counting

    def close(self) -> None:
        """Leave the model alone again; what was counted stays."""
        for hook in self._hooks:
            hook.remove()

    def _counter(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def count(_router: nn.Module, _inputs: Any, outputs: Any) -> None:
            if _recomputing() or not (self.counting or self._noted is not None):
                return
            chosen = _chosen(outputs, name)
            self._check_mask(chosen, name)
            if self._noted is not None:
                real = chosen if self.mask is None else chosen[self.mask.to(chosen.device)]
                self._noted[name].append(real.to("cpu", torch.int32))
            else:
                self._add(name, chosen)

        return count

    def _add(self, name: str, chosen: Tensor) -> None:
        load = self._loads[name] = self._loads[name].to(chosen.device)  # moves once
        if self.mask is None:
            tokens = torch.ones_like(chosen, dtype=load.dtype)
        else:
            tokens = self.mask.to(chosen.device, load.dtype)[:, None].expand_as(chosen)
        # Unlike bincount, it does not ask the device how many experts there are. Whole numbers add in any order.
        load.scatter_add_(0, chosen.long().flatten(), tokens.flatten())

    def _check_mask(self, chosen: Tensor, name: str) -> None:
        if self.mask is not None and self.mask.shape != chosen.shape[:1]:
            raise ShapeMismatch(
                "the mask of real tokens", tensor=name, expected=tuple(chosen.shape[:1]), found=tuple(self.mask.shape)
            )


def agreement(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the share of choices that both made, 0 to 1, by the router's name; a token's choices have no order.

    Args:
        a: from `RouterWatch.choices`, int `[T, k]`, no expert twice for a token.
        b: the same of another model, for the same tokens.

    Raises:
        ShapeMismatch: a router of one had other tokens, or chooses another number of experts.
    """
    return {name: _shared(a[name], b[name], name) for name in a if name in b}


def _shared(a: Tensor, b: Tensor, name: str) -> float:
    if a.shape != b.shape or not a.numel():
        raise ShapeMismatch("choices for the same tokens", tensor=name, expected=tuple(a.shape), found=tuple(b.shape))
    return float((a[:, :, None] == b[:, None, :]).any(-1).double().mean())


def _routers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield name and module of every router."""
    for name, module in model.named_modules():
        bias, weight = (getattr(module, part, None) for part in ("e_score_correction_bias", "weight"))
        if isinstance(bias, Tensor) and isinstance(weight, Tensor) and weight.ndim == 2 and len(bias) == len(weight):
            yield name, module


def _chosen(outputs: Any, name: str) -> Tensor:
    """Return the chosen experts `[T, k]` among what a router returned."""
    for output in outputs if isinstance(outputs, tuple) else (outputs,):
        if isinstance(output, Tensor) and not output.is_floating_point() and output.ndim == 2:
            return output.detach()
    raise UnsupportedFormat("the router returns no chosen experts", tensor=name, expected="integers [tokens, k]")


def _recomputing() -> bool:
    """Tell whether a backward pass is under way: a forward pass inside it is checkpointing's, and was counted before.

    Whether gradients are on tells nothing, for without reentry they are on in both passes. torch's own checkpointing
    asks the same function of its engine.
    """
    return torch._C._current_graph_task_id() != -1  # noqa: SLF001  # there is no public name for it
