"""Time products, experts and codecs for the goals, with whoever else is there, as `kernels.py` does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch

from k2quant.ground.release import EXPERTS
from k2quant.kernels.products import dispatch
from k2quant.kernels.products.tables.configs import Product
from suites.gpu.running import ahead
from suites.gpu.running.record import Record
from suites.gpu.running.stages import Setting
from suites.products import cases
from suites.products import run as products_run
from suites.products.cases import Cell
from suites.products.results import Results

SAMPLES, WARM_UP_SECONDS, MOST_SECONDS = 50, 0.1, 0.5
"""Replays of a graph, seconds of replays before them, and seconds that the samples of one contestant take at most."""


PRODUCTS: dict[str, tuple[str, Product | Literal["moe"]]] = {
    "int4": ("int4", "linear"),
    "fp8": ("fp8", "linear"),
    "w8a8": ("fp8", "w8a8"),
    "nvfp4": ("nvfp4", "linear"),
    "mxfp4": ("mxfp4", "linear"),
    "moe-int4": ("int4", "moe"),
    "moe-fp8": ("fp8", "moe"),
}
"""The format of each section's weights, and what is made of them."""


@dataclass(slots=True)
class Kept(Results):
    """Results that stand in the stage's own file."""

    record: Record | None = None

    def save(self, **more: object) -> None:
        """Write everything."""
        self.data |= more
        assert self.record  # noqa: S101 - `run` gives it
        self.record.save(results=self.data)


def run(record: Record, setting: Setting) -> None:
    """Measure the cells of the goals until the time is over."""
    dry = setting.dry_run
    results = Kept(setting.work / "times.json", {"cells": [], "crashed": {}} | record.data.get("results", {}), record)
    if record.resumed:
        results.blame("ended its process")
    settings = products_run.Settings(
        device=setting.device,
        seconds=0.0 if dry else MOST_SECONDS,
        samples=1 if dry else SAMPLES,
        warm_up_seconds=0.0 if dry else WARM_UP_SECONDS,
        rotate_bytes=0 if dry else products_run.rotate_bytes("cuda"),
    )
    record.save(settings=asdict(settings))
    timer = (products_run.cpu_timer if dry else products_run.cuda_timer)(settings)
    chosen = list(tiny()) if dry else cases.cells("cuda", quick=True)
    if not dry:
        ahead.compile_products(jobs(chosen), torch.cuda.get_device_capability())
    with torch.inference_mode():
        products_run.run(chosen, results, settings, timer, until=record.until)


def jobs(chosen: Sequence[Cell]) -> list[ahead.Job]:
    """Return what the cells will have compiled."""
    table = dispatch.table_of(torch.device("cuda"))
    found = []
    for cell in (cell for cell in chosen if cell.section in PRODUCTS):
        weight_format, product = PRODUCTS[cell.section]
        if product != "moe":
            shape = cell.size[0], cell.size[1]
            found.append(ahead.Job(product, weight_format, shape, table.choose(product, weight_format, shape, cell.m)))
        elif cell.size[0] == EXPERTS:
            found += ahead.of_layer(table, weight_format, cell.size[1], cell.size[2], cell.m)
    return list(dict.fromkeys(found))


def tiny() -> Iterator[Cell]:
    """Yield a few of the cells, each on a tiny shape."""
    seen: set[str] = set()
    for cell in cases.cells("cuda", quick=True):
        if cell.section not in seen:
            seen.add(cell.section)
            size = (16, 32, 64) if cell.section.startswith("moe") else (128, 128)
            yield replace(cell, size=size, m=min(cell.m, 3))
