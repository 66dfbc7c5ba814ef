"""The forward pass of a module, with rounded values in the place of its parameters while it runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from k2quant.errors import UsageError
from k2quant.qat.rounding.forward import InFront
from k2quant.qat.rounding.targets import Target

Shadow = Callable[[Target], Tensor | None]
"""Gives what stands in for a parameter, or None where it stands for itself."""


class Shadowed(InFront):
    """Gives a module rounded values for its parameters while it runs."""

    def __init__(self, shadow: Shadow, group: tuple[Target, ...]) -> None:
        """Stand before the forward pass of the targets' module."""
        super().__init__(group[0].module)
        self._shadow, self._group = shadow, group
        self._running: dict[str, int] = {}  # the thread within; a dict, for `setdefault` is atomic

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Run the module.

        Raises:
            UsageError: another thread runs it.
        """
        here = threading.get_ident()
        if self._running.get("thread") == here:
            return self.run(*args, **options)
        try:
            if self._running.setdefault("thread", here) != here:
                raise UsageError("two threads run one prepared model at once; give each its own")
            for target in self._group:
                shadow = self._shadow(target)
                if shadow is not None:
                    self._module.__dict__[target.parameter] = shadow
            return self.run(*args, **options)
        finally:
            if self._running.get("thread") == here:
                for target in self._group:
                    self._module.__dict__.pop(target.parameter, None)
                self._running.clear()

    def remove(self) -> None:
        """Step aside, also where something else was put before this since."""
        self._group = ()
        super().remove()


def by_module(targets: Iterable[Target]) -> list[tuple[Target, ...]]:
    """Return targets in groups of one module each."""
    groups: dict[int, list[Target]] = {}
    for target in targets:
        groups.setdefault(id(target.module), []).append(target)
    return [tuple(group) for group in groups.values()]
