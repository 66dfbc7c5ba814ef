"""Which GPU a name means, and whether one can be here at all: told without torch, whose import takes seconds."""

from __future__ import annotations

import ctypes
import os
import re

from k2quant.errors import UsageError

_DRIVERS = ("libcuda.so.1",)  # what torch itself opens; a machine with a GPU of NVIDIA's has it
_NODES = ("/dev/kfd",)  # the driver of AMD's GPUs, which torch calls cuda too


def gpu_number(device: str, *, known: str = "cuda or cuda:N") -> int | None:
    """Return the number that a device's name gives; nothing if it gives none.

    Args:
        device: "cuda" or "cuda:N".
        known: the names that a caller takes, for the message.

    Raises:
        UsageError: it is another name.
    """
    name = re.fullmatch(r"cuda(?::(\d{1,9}))?", device, re.ASCII)
    if name is None:
        raise UsageError(f"unknown device `{device}`: expected {known}")
    return int(name[1]) if name[1] else None


def refuse_without_driver(device: str, *, remedy: str = "") -> None:
    """Refuse a GPU where no driver of one is installed.

    That a driver is there says nothing yet: whether a GPU can be used, torch is asked later.

    Args:
        device: as the user names it, for the message.
        remedy: what to do, for the end of the message.

    Raises:
        UsageError: there can be no GPU.
    """
    if not has_driver():
        raise UsageError(f"device `{device}` is not available: no driver of a GPU is installed here{remedy}")


def has_driver() -> bool:
    """Return whether the driver of a GPU is installed."""
    return any(map(_loads, _DRIVERS)) or any(map(os.path.exists, _NODES))


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True
