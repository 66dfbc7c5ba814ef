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
from k2quant.formats.dtypes import torch_dtype
from k2quant.formats.format import Format
from k2quant.kernels.products.packed.weight import PackedWeight

Parts = dict[str, Tensor]
"""The tensors of one weight by suffix, as a checkpoint holds them."""


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

    def check(self, parts: Mapping[str, Tensor]) -> None:
        """Refuse tensors that `put` would refuse.

        Raises:
            UsageError: they do not fit, or hold what no weight can hold.
        """

    def put(self, parts: Mapping[str, Tensor]) -> None:
        """Take a weight's tensors over, if they pass `check`."""


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

    def check(self, parts: Mapping[str, Tensor]) -> None:
        """Refuse a tensor of another shape, or one of whole numbers."""
        value = parts[self.suffix]
        _check_tensors(parts)
        if value.shape != self.tensor.shape or not value.is_floating_point():
            raise UsageError(
                f"{self.suffix}: expected floats {list(self.tensor.shape)}, found {value.dtype} {list(value.shape)}"
            )

    def put(self, parts: Mapping[str, Tensor]) -> None:
        """Copy a tensor into it, rounded to its dtype."""
        self.check(parts)
        with torch.no_grad():
            self.tensor.copy_(parts[self.suffix])


class Packed(NamedTuple):
    """A quantised matrix."""

    weight: PackedWeight
    format: Format
    """How a checkpoint holds it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """`(N, K)`."""
        return self.weight.shape

    @property
    def views(self) -> bool:
        """Whether memory has the checkpoint's own layout."""
        stored, held = (each.state(self.shape) for each in (self.format, self.format.in_memory))
        return self.weight.views and all(stored[suffix] == held[suffix] for suffix in self._streamed)

    @property
    def _streamed(self) -> tuple[str, ...]:
        """The suffixes of what memory holds; scales of a layer's inputs, which no product reads, are not there."""
        return self.format.in_memory.streamed

    def parts(self) -> Parts:
        """Return what the checkpoint holds, bit for bit."""
        held, state = zip(self._streamed, self.weight.checkpoint(), strict=True), self.format.state(self.shape)
        parts = {suffix: _recast(tensor, torch_dtype(state[suffix].dtype)) for suffix, tensor in held}
        for suffix in set(self.format.whole) & set(parts):
            parts[suffix] = parts[suffix].reshape(state[suffix].shape)  # one number may be [] or [1]
        return parts | self._constants()

    def _constants(self) -> Parts:
        state = self.format.state(self.shape)
        return {
            suffix: torch.frombuffer(bytearray(content), dtype=torch_dtype(state[suffix].dtype))
            for suffix, content in self.format.constant(self.shape).items()
        }

    def check(self, parts: Mapping[str, Tensor]) -> None:
        """Refuse codes and scales of another shape or dtype, or with values that no weight can have."""
        self._prepared(parts)

    def put(self, parts: Mapping[str, Tensor]) -> None:
        """Take codes and scales over; where they are the matrix's own views, only check them."""
        found = self._prepared(parts)
        pairs = (self.weight.codes, found.codes), (self.weight.scale, found.scale), (self.weight.whole, found.whole)
        for own, new in pairs:
            if own is not None and new is not None and own.data_ptr() != new.data_ptr():
                own.copy_(new)

    def _prepared(self, parts: Mapping[str, Tensor]) -> PackedWeight:
        _check_tensors(parts)
        device = self.weight.codes.device
        if any(tensor.is_meta for tensor in parts.values()):
            raise UsageError("a part of it waits on disk; give all of its tensors, or load it whole")
        device = torch.device("cpu") if device.type == "meta" else device
        found = self.weight.prepared(
            *(self._as_in_memory(suffix, parts[suffix].to(device)) for suffix in self._streamed)
        )
        for suffix, expected in self._constants().items():
            if parts[suffix].tolist() != expected.tolist():
                raise UsageError(f"{suffix}: expected {expected.tolist()}, found {parts[suffix].tolist()}")
        if found.shape != self.shape:
            raise UsageError(f"weight: expected {list(self.shape)}, found {list(found.shape)}")
        return found

    def _as_in_memory(self, suffix: str, tensor: Tensor) -> Tensor:
        """Widen what the checkpoint has in a narrower dtype than memory."""
        stored, held = (each.state(self.shape)[suffix].dtype for each in (self.format, self.format.in_memory))
        if stored != held and tensor.dtype != torch_dtype(stored):
            raise UsageError(
                f"{suffix}: expected {torch_dtype(stored)}, as the checkpoint has it, found {tensor.dtype}"
            )
        return tensor if stored == held else _recast(tensor, torch_dtype(held))


def _recast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the same numbers in another dtype; a byte is the exponent that F8_E8M0 has in it."""
    same = {tensor.dtype, dtype} == {torch.uint8, torch.float8_e8m0fnu}
    return tensor.view(dtype) if same else tensor.to(dtype)


def _check_tensors(parts: Mapping[str, object]) -> None:
    wrong = next((suffix for suffix, value in parts.items() if not isinstance(value, Tensor)), None)
    if wrong is not None:
        raise UsageError(f"{wrong}: expected a tensor, found {type(parts[wrong]).__name__}")


def joined(*names: str) -> str:
    """Return a dotted name, empty parts left out."""
    return ".".join(name for name in names if name)
