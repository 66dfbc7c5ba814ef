"""Tune the kernels for K2's shapes, the most important first, and have the stages that follow use what came of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from k2quant.ground.release import HIDDEN, INNER, dense_shapes
from k2quant.kernels.products import dispatch
from k2quant.kernels.products.gpu import linear as linear_triton
from k2quant.kernels.products.tables.configs import Config, Product, Table, file_name, write_table
from k2quant.kernels.tuning import choosing, on_gpu
from k2quant.kernels.tuning.candidates import Cell, candidates
from k2quant.kernels.tuning.choosing import Trial, TryCell
from k2quant.kernels.tuning.timing import time_eager
from suites.common import machine
from suites.gpu.running import record
from suites.gpu.running.record import Entry, Record
from suites.gpu.running.stages import Setting
from suites.products.cases import BIG, SHAPES
from suites.products.run import gpu_lost

ROWS = (1, 16, 64, 256, 4096, 8)
"""M, in the order of their importance."""
MOST = 12
"""Configurations that are tried in a cell: the one there is, its neighbours, some others. `k2quant tune` tries more."""
DRY_CELLS = (Cell("linear", "int4", (64, 128), 1), Cell("linear", "int4", (64, 128), 16))
DRY_MOST = 2


def run(kept: Record, setting: Setting) -> None:
    """Tune until the time is over; the table is on the disk after every cell."""
    gpu = torch.device("cpu") if setting.dry_run else torch.device("cuda", torch.cuda.current_device())
    base, name = dispatch.table_of(gpu), "dry-run" if setting.dry_run else on_gpu.name_of(gpu)
    measured = {"device": name} if setting.dry_run else on_gpu.measured(gpu)
    places = setting.out / file_name(name), setting.caches / "k2quant" / "tables" / file_name(name)
    lost: dict[Cell, str] = {}
    with _rehearsed() if setting.dry_run else on_gpu.trying(gpu, lambda: kept.over, most=MOST) as attempt:
        wanted = [cell for cell in (DRY_CELLS if setting.dry_run else cells()) if str(cell) not in kept.done]
        found = choosing.tune_cells(wanted, name, base, measured, partial(_guarded, attempt, lost), lambda: kept.over)
        for cell in wanted:

            def work(cell: Cell = cell) -> Entry:
                tuned = next(found, None)
                if cell in lost or (why := gpu_lost()):
                    raise RuntimeError(lost.get(cell) or why)
                if not tuned and not kept.over:
                    raise RuntimeError("tuning ended with the cell before")
                if not tuned or not tuned[1]:
                    return {"outcome": record.LEFT_OUT, "said": "the time was over"}
                return _kept(cell, *tuned[1:], base, places)

            kept.attempt(str(cell), work, fatal=gpu_lost)


def cells() -> Iterator[Cell]:
    """Yield what to tune: INT4's experts and large weights at every M, its small ones, then FP8 in the same order."""
    big = tuple(SHAPES[name] for name in BIG)
    small = tuple(shape for shape in dense_shapes() if shape not in big)
    kinds: tuple[tuple[str, tuple[Product, ...]], ...] = (("int4", ("linear",)), ("fp8", ("w8a8", "linear")))
    for weight_format, dense in kinds:
        for rows in ROWS:
            yield Cell("gate_up", weight_format, (INNER, HIDDEN), rows)
            yield Cell("down", weight_format, (HIDDEN, INNER), rows)
            yield from (Cell(product, weight_format, shape, rows) for product in dense for shape in big)
        for rows in ROWS:
            yield from (Cell(product, weight_format, shape, rows) for product in dense for shape in small)


def _guarded(attempt: TryCell, lost: dict[Cell, str], cell: Cell, table: Table) -> list[Trial]:
    """Try a cell; an error costs this cell alone."""
    try:
        return attempt(cell, table)
    except Exception as error:  # noqa: BLE001 - no memory for it, say: a result too
        lost[cell] = machine.reason(error)
        return []


def _kept(cell: Cell, trials: list[Trial], table: Table, base: Table, places: tuple[Any, ...]) -> Entry:
    """Write the table and return what came of a cell."""
    refused = [f"{trial.config}: {trial.refusal}" for trial in trials if trial.refusal]
    wrong = [trial for trial in trials if trial.refusal and not trial.refusal.startswith(choosing.BROKE)]
    timed = [trial for trial in trials if trial.seconds is not None]
    if not timed:
        return {"outcome": record.MISSED, "said": f"all {len(trials)} configurations were refused", "refused": refused}
    for place in places:
        write_table(table, place)
    first = base.choose(cell.product, cell.weight_format, cell.shape, cell.rows)
    before = next((trial.seconds for trial in timed if _alike(trial.config, first, cell)), None)
    best = timed[0]
    assert best.seconds is not None  # noqa: S101 - it is one of those that were timed
    gain = f", {before / best.seconds:.2f}x as fast as what was shipped" if before else ""
    tail = f"; {len(wrong)} gave wrong numbers" if wrong else ""
    return {
        "outcome": record.MISSED if wrong else record.PASSED,
        "said": f"{1e6 * best.seconds:.1f} us{gain}, best of {len(timed)}{tail}",
        "cell": asdict(cell),
        "config": asdict(best.config),
        "us": 1e6 * best.seconds,
        "shipped_us": 1e6 * before if before else None,
        "refused": refused,
    }


def _alike(config: Config, first: Config, cell: Cell) -> bool:
    """Return whether this is the configuration that was shipped; `down` takes its rows from `gate_up`."""
    names = ("form", "columns", "depth", "splits", "group", "warps", "stages")
    same = all(getattr(config, name) == getattr(first, name) for name in names)
    return same and (cell.product == "down" or config.rows == first.rows)


@contextmanager
def _rehearsed() -> Iterator[TryCell]:
    """Offer what tries a cell in the interpreter: two configurations, timed for the form."""

    def attempt(cell: Cell, table: Table) -> list[Trial]:
        torch.manual_seed(0)
        weight = choosing.random_weight(cell.weight_format, *cell.shape, device=torch.device("cpu"))
        x = torch.randn(cell.rows, cell.shape[1]).bfloat16()

        def product(config: Config) -> Tensor:
            return linear_triton.linear(x, weight, config)

        def timer(_: Cell, config: Config) -> float:
            return time_eager(partial(product, config), samples=1, calls=1).median

        exact = x.double() @ weight.dequantize(torch.float64).T
        configs = candidates(cell, base=table, shared_limit=1 << 17, processors=2)[:DRY_MOST]
        return choosing.choose(cell, configs, product, timer, exact, choosing.allowed_error(x, weight, exact))

    yield attempt
