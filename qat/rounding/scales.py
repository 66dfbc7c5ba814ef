"""Learned scales (LSQ): what a group's scale has become, as a ratio to the one that training began with.

An optimizer such as AdamW moves every parameter by about the learning rate, whatever its gradient: a rate of 0.001
moves a ratio by a thousandth, but a scale of 0.001 by all of itself. Scales are therefore trained as ratios.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from k2quant.kernels.codecs import reference
from k2quant.qat.rounding.estimators import GROUP, as_matrix, pieces
from k2quant.qat.rounding.rules import as_bf16
from k2quant.qat.rounding.targets import Target

CHILD = "learned_scale"
"""Name of the child module that holds the scales of a module's parameters."""

_LEAST = 2.0**-8
"""Smallest ratio; a scale never turns negative or vanishes."""


class LearnedScale(nn.Module):
    """The scales `[.., N, K/32]` of one parameter `[.., N, K]`."""

    start: Tensor

    def __init__(self, master: Tensor, bits: int) -> None:
        """Begin with the scales of plain rounding."""
        super().__init__()
        shape = (*master.shape[:-1], master.shape[-1] // GROUP)
        self.ratio = nn.Parameter(torch.ones(shape, device=master.device))
        self.register_buffer("start", torch.empty(shape, dtype=torch.bfloat16, device=master.device))
        if not master.is_meta:  # a plan has no weights
            self.restart(master, bits)

    def restart(self, master: Tensor, bits: int) -> None:
        """Begin anew with the scales of plain rounding at this width."""
        source, out = as_matrix(master.detach()), as_matrix(self.start)
        for rows in pieces(source.shape):
            out[rows] = reference.plain_int4_scale(as_bf16(source[rows]), "moonshot", bits)
        with torch.no_grad():
            self.ratio.fill_(1.0)

    def scale(self) -> Tensor:
        """Return the scales, float32, with a gradient to the ratios; their BF16 values are what is shipped."""
        product = self.start.float() * self.ratio.clamp_min(_LEAST)
        return torch.where(as_bf16(product.detach()) == 0, 2.0**-7, product)


def learned_scale(target: Target) -> LearnedScale | None:
    """Return the learned scales of a target, if it has some."""
    children = target.module._modules.get(CHILD)  # noqa: SLF001  a child that may not be there
    found = children._modules.get(target.parameter) if children is not None else None  # noqa: SLF001
    return found if isinstance(found, LearnedScale) else None
