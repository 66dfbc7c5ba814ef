"""Routers stay out of autocast: what is served computes their logits in float32, and so does training."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from k2quant.qat.survey import is_router


class OutOfAutocast:
    """Stands before a module's own `forward`, which then computes in the dtypes that it says itself."""

    def __init__(self, module: nn.Module) -> None:
        """Stand before it."""
        self._module = module
        self._inner = module.__dict__.get("forward")
        module.__dict__["forward"] = self

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Run the module."""
        kind = next(self._module.parameters()).device.type
        with torch.autocast(kind, enabled=False):
            if self._inner is not None:
                return self._inner(*args, **options)
            return type(self._module).forward(self._module, *args, **options)

    def remove(self) -> None:
        """Step aside."""
        if self._module.__dict__.get("forward") is self:
            del self._module.__dict__["forward"]
            if self._inner is not None:
                self._module.__dict__["forward"] = self._inner


def keep_out_of_autocast(model: nn.Module) -> list[OutOfAutocast]:
    """Have every router of a model compute without autocast; `remove` of each undoes it.

    transformers widens both sides of a router's product to float32 (models/deepseek_v3); autocast to BF16 would narrow
    them again, and near ties other experts would be chosen than those that the served model chooses.
    """
    return [OutOfAutocast(module) for module in model.modules() if is_router(module)]
