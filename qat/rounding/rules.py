"""The rule of arithmetic of one matrix: what the forward pass sees, and what is stored of it.

Every rule takes a master weight that was rounded to BF16 first, so that fake quantisation and export cannot differ. The
arithmetic itself is the format's, that of `k2quant.kernels`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from k2quant.errors import UsageError
from k2quant.formats.bf16 import Bf16
from k2quant.formats.format import Format
from k2quant.kernels.codecs.grids import PACKED_BITS
from k2quant.qat.config import QATConfig


@dataclass(frozen=True, slots=True)
class Rule:
    """How BF16 matrices `[R, K]` are rounded: plainly, with scales that come from the weights."""

    format: Format
    """That of `stored`."""
    bits: int
    """Width of the codes; narrower ones than the format's sit in its own."""
    largest: Tensor | None = None
    """Float32 `[]`, where the format is `surveyed`: the largest magnitude of the matrices, whole, to which the weights
    belong. None: that of the weights themselves is in `format`, which was settled."""

    @property
    def height(self) -> int:
        """Rows that share a scale, and so are rounded together."""
        return self.format.row_step

    @property
    def surveyed(self) -> bool:
        """Whether a matrix must be seen whole before some of its rows are rounded."""
        return self.format.surveyed

    def knowing(self, largest: Tensor) -> Rule:
        """Return the rule for rows of matrices with this largest magnitude."""
        return replace(self, largest=largest)

    def values(self, weights: Tensor) -> Tensor:
        """Return what they are rounded to, BF16 `[R, K]`."""
        return self.format.fake_quantized(weights, self.bits, self.largest)

    def inside(self, weights: Tensor) -> Tensor:
        """Tell which codes are not clamped, bool `[R, K]`."""
        return self.format.inside(weights, self.bits, self.largest)

    def stored(self, weights: Tensor) -> dict[str, Tensor]:
        """Return the tensors that a checkpoint holds of the same values, by suffix, those that are streamed.

        The format is settled.

        Raises:
            UsageError: the codes have no place in it.
        """
        if self.format.bit_widths:
            check_packed(self.bits)
        return self.format.exported(weights, self.bits)


ROUNDED = Rule(Bf16(), 16)
"""No quantisation: what a BF16 checkpoint keeps of a weight."""


def plain_rule(config: QATConfig, bits: int) -> Rule:
    """Return the rule of a config whose scales come from the weights."""
    return Rule(config.format, bits)


def check_packed(bits: int) -> None:
    """Refuse codes that no nibble holds.

    Raises:
        UsageError: so it is.
    """
    if bits not in PACKED_BITS:
        raise UsageError(f"{bits}-bit codes have no place in a checkpoint; end the training with 4 bits or fewer")


def as_bf16(master: Tensor) -> Tensor:
    """Round a master weight to BF16, half to even; a BF16 one is returned as it is."""
    return master.to(torch.bfloat16)
