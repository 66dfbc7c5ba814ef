"""Have Triton compile on many cores before a stage walks through its calls one by one."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import torch

from k2quant.kernels.products.tables.configs import Config, Product

MOST_THREADS = 8
"""Compiling holds Python's lock for a part of its time: more threads would wait for each other."""


def run(calls: Sequence[Callable[[], object]]) -> None:
    """Make calls on several threads; what fails here fails again, and is noted, where it counts.

    Raises:
        SystemExit: one of them has left the GPU unusable for this process. Which one, another process finds out.
    """

    def make(call: Callable[[], object]) -> None:
        with suppress(Exception):
            call()

    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as pool:
        list(pool.map(make, calls))
    if lost := gpu_lost():
        raise SystemExit(lost)


@dataclass(frozen=True, slots=True)
class Job:
    """A product of a weight that will be made."""

    product: Product
    weight_format: str
    shape: tuple[int, int]
    config: Config
    tokens: int | None = None
    """Of a layer of experts."""
    backward: bool = False
    """Whether it is differentiated, too."""


def compile_products(jobs: Sequence[Job], capability: tuple[int, int]) -> None:
    """Fill Triton's cache from several processes; what fails here fails again, and is noted, where it counts."""
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(max(1, (os.cpu_count() or 2) - 1), mp_context=context) as pool,
        suppress(BrokenProcessPool),
    ):
        list(pool.map(partial(_compile, arch=10 * capability[0] + capability[1]), jobs))


def _compile(job: Job, *, arch: int) -> None:
    if job.config.form == "dequantize":
        return
    from k2quant.kernels.tuning.compiling import compile_launch, rehearse  # only here: it loads Triton

    tokens = (job.tokens,) if job.tokens else None
    with suppress(Exception):
        what = job.product, job.weight_format, job.shape, job.config
        for launch in rehearse(*what, tokens=tokens, backward=job.backward):
            compile_launch(launch, arch)


def gpu_lost() -> str:
    """Return why this process can use the GPU no more, if so: an error in a kernel ends its context."""
    if not torch.cuda.is_available():
        return ""
    try:
        torch.zeros(1, device="cuda").add_(1)
        torch.cuda.synchronize()
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the answer
        return f"the GPU takes no more work from this process: {error}"
    return ""
