"""`k2quant tune`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from k2quant.cli.parts.options import device as device_option
from k2quant.cli.parts.options import words

if TYPE_CHECKING:
    from k2quant.kernels.tuning.candidates import Cell
    from k2quant.kernels.tuning.choosing import Trial

_PRODUCTS = ("linear", "w8a8", "gate_up", "down")


@click.command(name="tune")
@device_option("cuda", "The GPU: cuda or cuda:N.", others=())
@click.option(
    "--minutes", type=click.FloatRange(min=0, min_open=True), default=30.0, show_default=True, help="Stop then."
)
@click.option("--product", "products", type=words(_PRODUCTS), multiple=True, help="Only this one; may be repeated.")
@click.option(
    "-o", "--out", type=click.Path(path_type=Path, dir_okay=False), help="Table to write; default: the user's own."
)
@click.option("--json", "as_json", is_flag=True, help="Print every trial as a line of JSON.")
def command(device: str, minutes: float, products: tuple[str, ...], *, out: Path | None, as_json: bool) -> None:
    """Measure which kernel configurations are fastest on this GPU, for Kimi K2's shapes.

    Each is checked against float64 before it is timed; wrong ones are reported and never used. The table goes where the
    kernels look first, unless -o says otherwise. It is written after each cell: stop whenever you like.

    \b
    Example:
        k2quant tune --minutes 10
    """
    from k2quant.cli.parts.screen import remark
    from k2quant.ground.extras import need

    need("run", "`k2quant tune`")
    from k2quant.kernels.devices.gpus import require_gpu
    from k2quant.kernels.products.tables.configs import Product, file_name, user_tables, write_table

    gpu = require_gpu(device)
    from k2quant.kernels.tuning.on_gpu import tune  # only now: it loads Triton

    chosen: tuple[Product, ...] = products or _PRODUCTS  # type: ignore[assignment]
    path = None
    try:
        for cell, trials, table in tune(gpu, minutes=minutes, products=chosen):
            _show(cell, trials, as_json=as_json)
            if trials and trials[0].seconds is not None:
                path = out or user_tables() / file_name(table.name)
                write_table(table, path)
    finally:
        remark(f"wrote {path}" if path else "nothing was measured, nothing written")


def _show(cell: Cell, trials: list[Trial], *, as_json: bool) -> None:
    from k2quant.cli.parts.screen import warn

    for trial in trials:
        if trial.refusal:
            warn(f"refused {cell}: {trial.config}: {trial.refusal}")
    if as_json:
        for trial in trials:
            click.echo(json.dumps(_plain(cell, trial)))
    elif trials and trials[0].seconds is not None:
        click.echo(f"{cell}: {1e6 * trials[0].seconds:.1f} us, {trials[0].config}")


def _plain(cell: Cell, trial: Trial) -> dict[str, object]:
    from dataclasses import asdict

    return {"cell": asdict(cell), "config": asdict(trial.config), "seconds": trial.seconds, "refusal": trial.refusal}
