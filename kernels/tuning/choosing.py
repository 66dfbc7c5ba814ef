"""Make a table for a GPU: every configuration is checked for its numbers before it is timed.

A cell is a product, a format, a shape and a bucket of M; `candidates` says what is tried in it. Each configuration must
give the same bits twice and an error, against float64, no larger than 1.05 times that of dequantised weights. What is
wrong or fails is reported and left out.

The two products of a layer of experts share their blocks of rows: `gate_up` chooses them, `down` is tuned with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from k2quant.kernels.products import reference
from k2quant.kernels.products.packed.fp8 import Fp8Weight
from k2quant.kernels.products.packed.int4 import Int4Weight
from k2quant.kernels.products.packed.mxfp4 import Mxfp4Weight
from k2quant.kernels.products.packed.nvfp4 import Nvfp4Weight
from k2quant.kernels.products.packed.weight import GROUP, PackedWeight
from k2quant.kernels.products.prepare import PACKED, prepare_fp8, prepare_int4, prepare_mxfp4, prepare_nvfp4
from k2quant.kernels.products.tables.configs import BUCKETS, Config, Table
from k2quant.kernels.tuning.candidates import TUNED_BUCKETS, Cell, gate_up_rows

LONGEST_REPLAY, FEWEST_CALLS = 0.02, 4
"""Seconds that the timed calls of a configuration may take together, and how many of them there are at least."""

SLACK = 1.05
"""Times the error of dequantising and multiplying: what a kernel's error may be."""

ROUNDING = 2.0**-24
"""Half a unit in the last place of float32: what the order of a float32 sum may add to an error."""


BROKE = "while it was"
"""How the refusal begins of a configuration that did not run to its end; any other gave wrong numbers."""


@dataclass(frozen=True, slots=True)
class Trial:
    """What came of one configuration."""

    config: Config
    seconds: float | None
    """None: refused."""
    refusal: str = ""


Run = Callable[[Config], Tensor]
"""Makes the cell's product with a configuration."""

Time = Callable[[Cell, Config], float]
"""Returns the seconds of one call of a cell's product."""

TryCell = Callable[[Cell, Table], list[Trial]]
"""Tries a cell's configurations, given the table so far; the fastest first, the refused last."""

Over = Callable[[], bool]
"""Says whether the time is over."""


def tune_cells(
    wanted: Iterable[Cell], name: str, base: Table, measured: dict[str, str], try_cell: TryCell, over: Over
) -> Iterator[tuple[Cell, list[Trial], Table]]:
    """Tune cells in turn until the time is over; yield each with its trials and the table of all so far.

    Args:
        wanted: what to tune; a layer's `gate_up` before its `down`.
        name: of the GPU.
        base: what holds where nothing was measured.
        measured: device, versions and date.
        try_cell: tries one cell.
        over: whether the time is over.
    """
    chosen: dict[Cell, Config] = {}
    table = paired(base)
    for cell in wanted:
        if over():
            return
        trials = try_cell(cell, table)
        if trials and trials[0].seconds is not None:
            chosen[cell] = trials[0].config
            table = table_of(name, chosen, base, measured)
        yield cell, trials, table


def choose(
    cell: Cell,
    configs: list[Config],
    run: Run,
    time: Time,
    exact: Tensor,
    allowed: float,
    *,
    over: Over = lambda: False,
) -> list[Trial]:
    """Check every configuration, time what passed, and return all trials, the fastest first and the refused last.

    Args:
        cell: what is being tuned.
        configs: what to try.
        run: makes the product.
        time: times it.
        exact: the product in float64.
        allowed: the largest relative error that is accepted.
        over: whether the time is over: what was tried until then counts.
    """
    trials = []
    for config in configs:
        if over():
            break
        trials.append(_try(cell, config, run, time, exact, allowed))
    return sorted(trials, key=lambda trial: (trial.seconds is None, trial.seconds or 0.0))


def calls_for(seconds: float, most: int) -> int:
    """Return how many calls of so many seconds to time together: `most`, or fewer if they are long."""
    return max(FEWEST_CALLS, min(most, int(LONGEST_REPLAY / max(seconds, 1e-9))))


def allowed_error(x: Tensor, weight: PackedWeight, exact: Tensor) -> float:
    """Return the error that a product may have."""
    return allowed(reference.linear(x, weight), exact)


def allowed(usual: Tensor, exact: Tensor) -> float:
    """Return the error that a result may have beside `usual`, the one that dequantised weights give."""
    return SLACK * relative_error(usual, exact) + ROUNDING


def relative_error(out: Tensor, exact: Tensor) -> float:
    """Return ||out - exact|| / ||exact||; NaN anywhere makes it NaN."""
    return float((out.double() - exact).norm() / exact.norm())


def random_weight(weight_format: str, *shape: int, device: torch.device) -> PackedWeight:
    """Return a random weight `[.., N, K]` as a checkpoint could hold it."""
    return RANDOM[weight_format](shape, device)


def _random_int4(shape: tuple[int, ...], device: torch.device) -> PackedWeight:
    words = torch.randint(-(2**31), 2**31, (*shape[:-1], shape[-1] // 8), device=device, dtype=torch.int64).int()
    scale = (torch.rand(*shape[:-1], shape[-1] // GROUP, device=device) * 0.01 + 0.001).bfloat16()
    return prepare_int4(words, scale)


def _random_fp8(shape: tuple[int, ...], device: torch.device) -> PackedWeight:
    codes = (torch.randn(shape, device=device) * 60).clamp(-448, 448).to(torch.float8_e4m3fn)
    blocks = (*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))
    return prepare_fp8(codes, torch.rand(blocks, device=device) * 1e-3 + 1e-4)


def _random_nvfp4(shape: tuple[int, ...], device: torch.device) -> PackedWeight:
    scale = torch.randint(LEAST_E4M3, MOST_E4M3, (*shape[:-1], shape[-1] // 16), device=device).to(torch.uint8)
    whole = torch.rand(shape[:-2], device=device) * 2e-5 + 4e-5  # alike: few experts must not outweigh the others
    return prepare_nvfp4(_random_fp4(shape, device), scale, whole, divides=False)


def _random_mxfp4(shape: tuple[int, ...], device: torch.device) -> PackedWeight:
    scale = torch.randint(117, 121, (*shape[:-1], shape[-1] // 32), device=device).to(torch.uint8)
    return prepare_mxfp4(_random_fp4(shape, device), scale)


def _random_fp4(shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.randint(0, 256, (*shape[:-1], shape[-1] // 2), device=device, dtype=torch.uint8)


LEAST_E4M3, MOST_E4M3 = 0x60, 0x7F
"""Bits of 32, and those beyond 448: between them lie the block scales of a random weight."""

RANDOM: dict[str, Callable[[tuple[int, ...], torch.device], PackedWeight]] = {
    Int4Weight.format: _random_int4,
    Fp8Weight.format: _random_fp8,
    Nvfp4Weight.format: _random_nvfp4,
    Mxfp4Weight.format: _random_mxfp4,
}
"""Makes a random weight of each format."""


def table_of(name: str, chosen: dict[Cell, Config], base: Table, measured: dict[str, str]) -> Table:
    """Return a table with the chosen configurations; where nothing was chosen, that of `base` stays.

    A bucket between two tuned ones takes the larger one's configuration. `gate_up` and `down` get equal rows.
    """
    products = _copied(base)
    table = Table(name, measured, products)
    # gate_up first: a configuration of down is of use only with the rows that it was measured with.
    kinds = {(cell.product, cell.weight_format, cell.shape): None for cell in chosen}
    for kind, weight_format, shape in sorted(kinds, key=lambda each: each[0] != "gate_up"):
        buckets = {}
        for bucket in BUCKETS:
            tuned = next(rows for rows in TUNED_BUCKETS if rows >= bucket)
            found = chosen.get(Cell(kind, weight_format, shape, tuned))
            if found and kind == "down" and found.rows != gate_up_rows(table, weight_format, shape, bucket):
                found = None
            buckets[bucket] = found or base.choose(kind, weight_format, shape, bucket)
        products.setdefault(f"{kind}/{weight_format}", {})[_name(shape)] = buckets
    return paired(table)


def paired(table: Table) -> Table:
    """Return the table with the rows of `gate_up` for `down` too, in every bucket of every layer's shapes.

    A layer cuts its tokens into blocks once. While gate_up is timed, down runs with its rows, so what this makes of a
    down that was never reached has been checked.
    """
    products = _copied(table)
    for weight_format in PACKED:
        inward, outward = (products.get(f"{product}/{weight_format}", {}) for product in ("gate_up", "down"))
        for name in {**outward, **{_flipped(name): None for name in inward}}:
            shape = _shape(name)
            if not {name, "*"} & set(outward) or not {_flipped(name), "*"} & set(inward):
                continue  # no such layer can be run
            rows = {bucket: gate_up_rows(table, weight_format, shape, bucket) for bucket in BUCKETS}
            found = {bucket: table.choose("down", weight_format, shape, bucket) for bucket in BUCKETS}
            if any(found[bucket].rows != rows[bucket] for bucket in BUCKETS):
                outward[name] = {bucket: replace(found[bucket], rows=rows[bucket]) for bucket in BUCKETS}
    return Table(table.name, table.measured, products)


def _copied(table: Table) -> dict[str, dict[str, dict[int, Config]]]:
    return {
        product: {shape: dict(buckets) for shape, buckets in shapes.items()}
        for product, shapes in table.products.items()
    }


def _name(shape: tuple[int, int]) -> str:
    return f"{shape[0]}x{shape[1]}"


def _shape(name: str) -> tuple[int, int]:
    """Return N and K of an entry's name; zeros for `*`, which no entry is named after."""
    rows, _, columns = name.partition("x")
    return (int(rows), int(columns)) if columns else (0, 0)


def _flipped(name: str) -> str:
    return name if name == "*" else _name(_shape(name)[::-1])


def _try(cell: Cell, config: Config, run: Run, time: Time, exact: Tensor, allowed: float) -> Trial:
    refusal = _refusal(config, run, exact, allowed)
    if refusal:
        return Trial(config, None, refusal)
    try:
        return Trial(config, time(cell, config))
    except Exception as error:  # noqa: BLE001 - whatever goes wrong, the next configuration may do
        return Trial(config, None, f"{BROKE} timed: {_said(error)}")


def _refusal(config: Config, run: Run, exact: Tensor, allowed: float) -> str:
    """Return why a configuration must not be used; empty if it may."""
    try:
        first, second = run(config), run(config)
        if not torch.equal(first, second):
            return "two runs gave different bits"
        found = relative_error(first, exact)
    except Exception as error:  # noqa: BLE001 - Triton's own errors share no class but this
        return f"{BROKE} run: {_said(error)}"
    if not found <= allowed:
        return f"error {found:.2e}, allowed {allowed:.2e}"
    return ""


def _said(error: Exception) -> str:
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first[:100]}" if first else type(error).__name__
