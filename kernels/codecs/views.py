"""Tensors seen as their bits: how the codecs and the operators take them."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def as_bytes(codes: Tensor) -> Tensor:
    """Return e4m3 codes as the operators take them: torch's own checks of operators do arithmetic that FP8 lacks."""
    return codes.view(torch.uint8)


def as_codes(codes: Tensor) -> Tensor:
    """Undo `as_bytes`."""
    return codes.view(torch.float8_e4m3fn)


def bits_of(tensor: Tensor) -> NDArray[Any]:
    """Return a CPU tensor's bits as a numpy view, of the types that the codecs take."""
    tensor = tensor.contiguous()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def widened(scale: Tensor) -> NDArray[np.float32]:
    """Return a CPU tensor of BF16 or float32 as a float32 array."""
    return cast("NDArray[np.float32]", scale.float().contiguous().numpy())
