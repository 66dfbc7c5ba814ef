"""One way to launch a Triton kernel: so that launches can also be recorded, and compiled where there is no GPU.

Integers given as arguments are marked by the kernel (`do_not_specialize`) when they change from call to call; the
others are dimensions of weights, and Triton compiles once for each divisibility of theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch of one kernel: what a compiler needs to know of it."""

    kernel: Any
    """The `triton.jit` function."""
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    """Tensors and numbers by parameter name, in order."""
    constants: dict[str, Any]
    """Compile-time constants by parameter name."""
    warps: int
    stages: int
    exact: bool


_recorder: Callable[[Launch], None] | None = None


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    warps: int = 4,
    stages: int = 1,
    exact: bool = False,
    **constants: Any,
) -> None:
    """Run `kernel` on `grid`, on the device of its first tensor; an empty grid does nothing.

    Args:
        kernel: a `triton.jit` function.
        grid: how many programs along each axis.
        arguments: tensors and numbers, in the order of the kernel's parameters.
        warps: warps of a program.
        stages: depth of the software pipeline.
        exact: forbid the compiler to contract a product and a sum into one rounding; codecs need it.
        constants: compile-time constants by name.
    """
    if 0 in grid:
        return
    if _recorder is not None:
        named = dict(zip(kernel.arg_names, arguments, strict=False))
        _recorder(Launch(kernel, grid, named, constants, warps, stages, exact))
        return
    device = next(argument for argument in arguments if isinstance(argument, torch.Tensor)).device
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": not exact}
    if device.type == "cuda":
        with torch.cuda.device(device):
            kernel[grid](*arguments, **constants, **options)
    else:  # the interpreter
        kernel[grid](*arguments, **constants, **options)


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Collect the launches made inside instead of running them; outputs stay as they were allocated."""
    global _recorder  # noqa: PLW0603 - one switch for the process: recording is a developer's tool
    launches: list[Launch] = []
    previous, _recorder = _recorder, launches.append
    try:
        yield launches
    finally:
        _recorder = previous
