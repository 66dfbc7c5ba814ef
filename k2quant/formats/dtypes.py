"""The dtypes of safetensors files and their sizes, as the safetensors format defines them."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

ITEM_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E5M2": 1,
    "F8_E4M3": 1,
    "F8_E8M0": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
    "C64": 8,
}
"""Bytes of one element. The sub-byte dtypes (F4, F6_*) belong to formats that k2quant does not read."""

FLOATS = ("BF16", "F16", "F32")
"""The dtypes in which a weight that is not quantised may be stored."""


class TensorSpec(NamedTuple):
    """What a header says of one tensor."""

    dtype: str
    """A key of `ITEM_BYTES`."""
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return ITEM_BYTES[self.dtype] * prod(self.shape)
