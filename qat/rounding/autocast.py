"""Routers stay out of autocast: what is served computes their logits in float32, and so does training."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from k2quant.qat.rounding.forward import InFront
from k2quant.qat.rounding.survey import is_router


class OutOfAutocast(InFront):
    """Has a module compute in the dtypes that it says itself."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Run the module without autocast."""
        kind = next(self._module.parameters()).device.type
        with torch.autocast(kind, enabled=False):
            return self.run(*args, **options)


def keep_out_of_autocast(model: nn.Module) -> list[OutOfAutocast]:
    """Have every router of a model compute without autocast; `remove` of each undoes it.

    transformers widens both sides of a router's product to float32 (models/deepseek_v3); autocast to BF16 would narrow
    them again, and near ties other experts would be chosen than those that the served model chooses.
    """
    return [OutOfAutocast(module) for module in model.modules() if is_router(module)]
