"""What stands before a module's own `forward`, and steps aside again without a trace."""

from __future__ import annotations

from typing import Any

from torch import nn


class InFront:
    """Stands before a module's `forward`: what calls the module calls this, and this runs the module.

    Not in hooks: hooks after a forward pass do not run when that is interrupted, and what wraps a module (sharding
    gathers its parameters in a hook) has then done its work.
    """

    def __init__(self, module: nn.Module) -> None:
        """Stand before a module, and before what stands there already."""
        self._module = module
        self._inner = module.__dict__.get("forward")
        module.__dict__["forward"] = self

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Run the module."""
        return self.run(*args, **options)

    def run(self, *args: Any, **options: Any) -> Any:
        """Run what this stands before."""
        if self._inner is not None:
            return self._inner(*args, **options)
        return type(self._module).forward(self._module, *args, **options)

    def remove(self) -> None:
        """Step aside."""
        if self._module.__dict__.get("forward") is self:
            del self._module.__dict__["forward"]
            if self._inner is not None:
                self._module.__dict__["forward"] = self._inner
