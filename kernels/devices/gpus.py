"""Which GPU a user's `cuda` or `cuda:N` means, and whether Triton's kernels run there."""

from __future__ import annotations

import importlib.util
from functools import lru_cache

import torch
from torch import Tensor

from k2quant.errors import UsageError
from k2quant.kernels.devices.driver import gpu_number


def check_cuda(device: str, *, known: str = "cuda or cuda:N", remedy: str = "") -> int | None:
    """Return the number that a device's name gives; nothing if it gives none.

    Args:
        device: "cuda" or "cuda:N".
        known: the names that a caller takes, for the message.
        remedy: what to do where there is no CUDA, likewise.

    Raises:
        UsageError: it is another name, or there is no such GPU.
    """
    number = gpu_number(device, known=known)
    if not torch.cuda.is_available():
        raise UsageError(f"device `{device}` is not available: torch {torch.__version__} finds no CUDA{remedy}")
    if number is not None and number >= torch.cuda.device_count():
        raise UsageError(f"device `{device}` is not available: there are {torch.cuda.device_count()} CUDA devices")
    return number


def require_gpu(device: str) -> torch.device:
    """Return a CUDA device with its number.

    Raises:
        UsageError: there is no such GPU, or Triton is missing.
    """
    index = check_cuda(device)
    if not has_triton():
        raise UsageError("Triton is missing: pip install triton")
    return torch.device("cuda", torch.cuda.current_device() if index is None else index)


def on_triton(tensor: Tensor) -> bool:
    """Return whether Triton kernels run where this tensor lies."""
    return tensor.device.type == "cuda" and has_triton()


@lru_cache(maxsize=1)
def has_triton() -> bool:
    """Return whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None
