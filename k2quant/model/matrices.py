"""One matrix of a checkpoint as it lies in a module's memory: alone, in a stack of experts, or fused with another.

A matrix gives and takes the tensors that a checkpoint holds for it, by suffix. Where memory has the checkpoint's own
layout these are views, so that reading a file into them is all that loading takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from k2quant.errors import UsageError
from k2quant.formats.layouts import Fp8, Int4
from k2quant.kernels.ops import prepare_fp8, prepare_int4
from k2quant.kernels.weights import Fp8Weight, Weight, empty_fp8, empty_int4

Parts = dict[str, Tensor]
"""The tensors of one weight by suffix, as a checkpoint holds them."""

SHAPE_DTYPES = {"I32": torch.int32, "I64": torch.int64}


class Matrix(Protocol):
    """One weight in a module's memory."""

    @property
    def shape(self) -> tuple[int, ...]:
        """`[N, K]`, or the shape of what is no matrix."""

    @property
    def views(self) -> bool:
        """Whether `parts` are views of memory, but for `weight_shape`."""

    def parts(self) -> Parts:
        """Return the weight's tensors."""

    def put(self, parts: Mapping[str, Tensor]) -> None:
        """Take a weight's tensors over; those of a quantised weight are checked.

        Raises:
            UsageError: they do not fit, or hold what no weight can hold.
        """


class Dense(NamedTuple):
    """A tensor that is not quantised, or a part of one."""

    tensor: Tensor
    suffix: str = "weight"

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return tuple(self.tensor.shape)

    @property
    def views(self) -> bool:
        """Always."""
        return True

    def parts(self) -> Parts:
        """Return the tensor itself."""
        return {self.suffix: self.tensor}

    def put(self, parts: Mapping[str, Tensor]) -> None:
        """Copy a tensor into it, rounded to its dtype."""
        value = parts[self.suffix]
        if value.shape != self.tensor.shape:
            raise UsageError(f"{self.suffix}: expected {list(self.tensor.shape)}, found {list(value.shape)}")
        with torch.no_grad():
            self.tensor.copy_(value)


class Packed(NamedTuple):
    """A quantised matrix."""

    weight: Weight
    layout: Fp8 | Int4
    """How a checkpoint holds it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """`(N, K)`."""
        return self.weight.shape

    @property
    def views(self) -> bool:
        """Whether memory has the checkpoint's own layout."""
        return isinstance(self.weight, Fp8Weight) or self.weight.layout == "rows"

    def parts(self) -> Parts:
        """Return codes and scales as the checkpoint holds them, bit for bit."""
        codes, scale = self.weight.checkpoint()
        if isinstance(self.layout, Fp8):
            return {"weight": codes, "weight_scale_inv": scale}
        size = torch.tensor(self.shape, dtype=SHAPE_DTYPES[self.layout.shape_dtype])
        return {"weight_packed": codes, "weight_scale": scale, "weight_shape": size}

    def put(self, parts: Mapping[str, Tensor]) -> None:
        """Take codes and scales over; where they are the matrix's own views, only check them."""
        found = self._prepared(parts)
        if found.shape != self.shape:
            raise UsageError(f"weight: expected {list(self.shape)}, found {list(found.shape)}")
        for own, new in ((self.weight.codes, found.codes), (self.weight.scale, found.scale)):
            if own.data_ptr() != new.data_ptr():
                own.copy_(new)

    def _prepared(self, parts: Mapping[str, Tensor]) -> Weight:
        device = self.weight.codes.device
        if isinstance(self.weight, Fp8Weight):
            codes, scale = parts["weight"], parts["weight_scale_inv"]
            return prepare_fp8(codes.to(device), scale.to(device), block=self.weight.block)
        packed, scale = parts["weight_packed"], parts["weight_scale"]
        return prepare_int4(packed.to(device), scale.to(device), layout=self.weight.layout)


def empty_like(weight: Weight, device: torch.device | str) -> Weight:
    """Return a weight of the same shape and layout on a device, with whatever content."""
    if isinstance(weight, Fp8Weight):
        return empty_fp8(weight.shape, block=weight.block, device=device)
    return empty_int4(weight.shape, layout=weight.layout, device=device)


def joined(*names: str) -> str:
    """Return a dotted name, empty parts left out."""
    return ".".join(name for name in names if name)
