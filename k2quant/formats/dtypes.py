"""The dtypes of safetensors files, as the safetensors format defines them, and how numpy and torch see them."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray


class Dtype(NamedTuple):
    """What a dtype of a file is elsewhere."""

    nbytes: int
    """Of one element."""
    numpy: str
    """The type in which numpy sees its bytes: BF16 and FP8 as bit patterns, for it has neither."""
    torch: str
    """torch's own name."""


DTYPES = {
    "BOOL": Dtype(1, "bool", "bool"),
    "U8": Dtype(1, "uint8", "uint8"),
    "I8": Dtype(1, "int8", "int8"),
    "F8_E5M2": Dtype(1, "uint8", "float8_e5m2"),
    "F8_E4M3": Dtype(1, "uint8", "float8_e4m3fn"),
    "F8_E8M0": Dtype(1, "uint8", "float8_e8m0fnu"),
    "I16": Dtype(2, "int16", "int16"),
    "U16": Dtype(2, "uint16", "uint16"),
    "F16": Dtype(2, "float16", "float16"),
    "BF16": Dtype(2, "uint16", "bfloat16"),
    "I32": Dtype(4, "int32", "int32"),
    "U32": Dtype(4, "uint32", "uint32"),
    "F32": Dtype(4, "float32", "float32"),
    "I64": Dtype(8, "int64", "int64"),
    "U64": Dtype(8, "uint64", "uint64"),
    "F64": Dtype(8, "float64", "float64"),
    "C64": Dtype(8, "complex64", "complex64"),
}
"""By safetensors' name. The sub-byte dtypes (F4, F6_*) belong to formats that k2quant does not read."""

FLOATS = ("BF16", "F16", "F32")
"""The dtypes in which a weight that is not quantised may be stored."""

SCALES = (*FLOATS, "F8_E8M0")
"""The dtypes that `widened` reads: all of them exact in float32."""


class TensorSpec(NamedTuple):
    """What a header says of one tensor."""

    dtype: str
    """A key of `DTYPES`."""
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return DTYPES[self.dtype].nbytes * prod(self.shape)


def row_bytes(spec: TensorSpec) -> int:
    """Return the bytes of one row (one step along the first dimension) of a tensor."""
    return TensorSpec(spec.dtype, spec.shape[1:]).nbytes


def as_array(data: NDArray[np.uint8], spec: TensorSpec) -> NDArray[Any]:
    """View bytes as the array that a spec describes."""
    return data.view(DTYPES[spec.dtype].numpy).reshape(spec.shape)


def widened(scale: NDArray[Any]) -> NDArray[np.float32]:
    """Return scales as float32, exactly, whichever of `SCALES` they are stored in; BF16 and F8_E8M0 are bits."""
    import numpy as np

    from k2quant.kernels.codecs.values import bf16_to_float, e8m0_to_float

    match scale.dtype:
        case np.uint16:
            return bf16_to_float(scale)
        case np.uint8:
            return e8m0_to_float(scale)
        case _:
            return scale.astype(np.float32, copy=False)


def torch_dtype(dtype: str) -> torch.dtype:
    """Return torch's type for a dtype of a file."""
    import torch

    found: torch.dtype = getattr(torch, DTYPES[dtype].torch)
    return found


def as_memory(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor, to be read or written.

    Raises:
        ValueError: the tensor has gaps, and so no memory of its own.
    """
    import torch

    if not tensor.is_contiguous():
        msg = "a tensor with gaps has no memory of its own"
        raise ValueError(msg)
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def as_bits(tensor: torch.Tensor) -> NDArray[Any]:
    """Return a tensor as numpy sees the bytes of a file, a view where it is contiguous and lies on the CPU."""
    import torch

    plain = tensor.detach().to("cpu").contiguous()
    bits = {2: torch.uint16, 1: torch.uint8}
    narrow = plain.is_floating_point() and plain.dtype not in {torch.float16, torch.float32, torch.float64}
    return (plain.view(bits[plain.element_size()]) if narrow else plain).numpy()
