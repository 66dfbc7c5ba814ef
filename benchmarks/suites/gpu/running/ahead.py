"""Have Triton compile on many cores before a stage walks through its calls one by one."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

from k2quant.kernels.products.tables.configs import Config, Product, Table
from suites.products.run import gpu_lost

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


def of_layer(
    table: Table, weight_format: str, inner: int, hidden: int, tokens: int, *, backward: bool = False
) -> list[Job]:
    """Return both products of a layer of experts, with equal blocks of rows, as `dispatch` launches them."""
    inward = table.choose("gate_up", weight_format, (inner, hidden), tokens)
    outward = replace(table.choose("down", weight_format, (hidden, inner), tokens), rows=inward.rows)
    return [
        Job("gate_up", weight_format, (inner, hidden), inward, tokens, backward=backward),
        Job("down", weight_format, (hidden, inner), outward, tokens, backward=backward),
    ]


def compile_products(jobs: Sequence[Job], capability: tuple[int, int]) -> None:
    """Fill Triton's cache from several processes."""
    from k2quant.kernels.tuning.compiling import compilers  # only here: it loads Triton

    with compilers() as pool, suppress(BrokenProcessPool):  # then each is compiled where it is run
        list(pool.map(partial(_compile, arch=10 * capability[0] + capability[1]), jobs))


def _compile(job: Job, *, arch: int) -> None:
    from k2quant.kernels.tuning.compiling import precompile  # likewise

    tokens = (job.tokens,) if job.tokens else None
    what = job.product, job.weight_format, job.shape, job.config
    precompile(*what, arch=arch, tokens=tokens, backward=job.backward)
