"""The rule of arithmetic of one matrix: what the forward pass sees, and what is stored of it.

Every rule takes a master weight that was rounded to BF16 first, so that fake quantisation and export cannot differ. The
arithmetic itself is that of `k2quant.kernels`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from k2quant.errors import UsageError
from k2quant.formats.layouts import Bf16, Format, Fp8, Int4
from k2quant.kernels import ops
from k2quant.kernels.codecs.grids import PACKED_BITS, Grid
from k2quant.qat.config import QATConfig


class Rule(Protocol):
    """How BF16 matrices `[R, K]` are rounded."""

    def values(self, weights: Tensor) -> Tensor:
        """Return what they are rounded to, BF16 `[R, K]`."""

    def stored(self, weights: Tensor) -> dict[str, Tensor]:
        """Return the tensors that a checkpoint holds of the same values, by suffix, `weight_shape` left out."""

    @property
    def layout(self) -> Format:
        """The format of `stored`."""


@dataclass(frozen=True, slots=True)
class Rounded:
    """No quantisation: what a BF16 checkpoint keeps of a weight."""

    @property
    def layout(self) -> Format:
        """BF16."""
        return Bf16()

    def values(self, weights: Tensor) -> Tensor:
        """Return them."""
        return weights

    def stored(self, weights: Tensor) -> dict[str, Tensor]:
        """Return them."""
        return {"weight": weights}


@dataclass(frozen=True, slots=True)
class PlainInt4:
    """Scales from each group's amax, rounded to nearest, without recovery (docs/formats.md)."""

    grid: Grid
    bits: int

    @property
    def layout(self) -> Format:
        """INT4, whatever the bits: narrower codes sit in its nibbles."""
        return Int4(grid=self.grid)

    def values(self, weights: Tensor) -> Tensor:
        """Return codes times scales."""
        return ops.fake_quantize_int4(weights, self.grid, bits=self.bits)

    def stored(self, weights: Tensor) -> dict[str, Tensor]:
        """Return packed words and scales.

        Raises:
            UsageError: the codes have 8 bits.
        """
        check_packed(self.bits)
        packed, scale = ops.bf16_to_int4(weights, self.grid, recover=False, bits=self.bits)
        return {"weight_packed": packed, "weight_scale": scale}


@dataclass(frozen=True, slots=True)
class PlainFp8:
    """Block FP8 as the converter writes it."""

    block: tuple[int, int]

    @property
    def layout(self) -> Format:
        """Block FP8."""
        return Fp8(block=self.block)

    def values(self, weights: Tensor) -> Tensor:
        """Return codes times scales."""
        return ops.fake_quantize_fp8(weights, self.block)

    def stored(self, weights: Tensor) -> dict[str, Tensor]:
        """Return codes and scales."""
        codes, scale = ops.bf16_to_fp8(weights, self.block)
        return {"weight": codes, "weight_scale_inv": scale}


def plain_rule(config: QATConfig, bits: int) -> Rule:
    """Return the rule of a config whose scales come from the weights."""
    return PlainFp8(config.block) if config.to == "fp8" else PlainInt4(config.grid, bits)


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
