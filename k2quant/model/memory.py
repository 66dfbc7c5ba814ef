"""Tensors as the bytes that files hold."""

from __future__ import annotations

import torch
from torch import Tensor

TORCH_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "BOOL": torch.bool,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
}
"""torch's name for a dtype of a safetensors file."""


def as_memory(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor, to be read or written.

    Raises:
        ValueError: the tensor has gaps, and so no memory of its own.
    """
    if not tensor.is_contiguous():
        msg = "a tensor with gaps has no memory of its own"
        raise ValueError(msg)
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data
