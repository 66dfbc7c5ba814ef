"""Make a table for a GPU: every configuration is checked for its numbers before it is timed.

A cell is a product, a format, a shape and a bucket of M. Its candidates are cut down by shared memory and by how many
programs they give the GPU; then each must give the same bits twice and an error, against float64, no larger than 1.05
times that of dequantised weights. What is wrong is reported and left out, never timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product as combinations
from typing import Literal

import torch
from torch import Tensor

from k2quant.kernels import matmul_reference as reference
from k2quant.kernels.configs import BUCKETS, Config, Product, Table
from k2quant.kernels.weights import GROUP, Fp8Weight, Int4Weight, prepare_fp8, prepare_int4

WeightFormat = Literal["int4", "fp8"]

DENSE = ((1536, 7168), (12288, 1536), (576, 7168), (16384, 512), (7168, 8192), (18432, 7168), (7168, 18432))
"""N and K of Kimi K2's dense weights: q_a, q_b, kv_a, kv_b, o, dense gate and up, dense down."""

EXPERTS, HIDDEN, INNER, TOP = 384, 7168, 2048, 8
"""Kimi K2's routed experts."""

TUNED_BUCKETS = (1, 4, 16, 64, 256, 1024, 4096)
"""The buckets that are tuned; those between take the next larger one's configuration."""

ROUNDING = 2.0**-24
"""Half a unit in the last place of float32: what the order of a float32 sum may add to an error."""


@dataclass(frozen=True, slots=True)
class Cell:
    """What one configuration is chosen for."""

    product: Product
    weight_format: WeightFormat
    shape: tuple[int, int]
    """N and K."""
    rows: int
    """M, or tokens."""

    def __str__(self) -> str:
        return f"{self.product}/{self.weight_format} {self.shape[0]}x{self.shape[1]} M={self.rows}"


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


def cells(products: tuple[Product, ...] = ("linear", "w8a8", "gate_up", "down")) -> list[Cell]:
    """Return the cells of Kimi K2, those that matter most first: decoding, then prefill; experts, then the rest."""
    found = [
        Cell(product, weight_format, shape, rows)
        for rows in TUNED_BUCKETS
        for product in products
        for weight_format in (("int4", "fp8") if product != "w8a8" else ("fp8",))
        for shape in _shapes(product)
    ]
    return sorted(found, key=lambda cell: cell.product not in {"gate_up", "down"})


def candidates(cell: Cell, *, shared_limit: int, processors: int) -> list[Config]:
    """Return configurations worth a try, a few dozen, the likeliest first."""
    found = [config for config in _grid(cell) if shared_bytes(config, cell.weight_format) <= shared_limit]
    found.sort(key=lambda config: _unlikely(config, cell, processors))
    plain = [Config(form="dequantize")] if cell.rows >= 256 and cell.product == "linear" else []
    return plain + found[:32]


def shared_bytes(config: Config, weight_format: WeightFormat) -> int:
    """Return about how much shared memory a configuration takes: stages of x and packed weights, one tile unpacked."""
    packed = config.columns * config.depth * (0.5625 if weight_format == "int4" else 1)
    stage = config.rows * config.depth * 2 + packed
    return int(config.stages * stage + config.columns * config.depth * 2)


def choose(cell: Cell, configs: list[Config], run: Run, time: Time, exact: Tensor, allowed: float) -> list[Trial]:
    """Check every configuration, time what passed, and return all trials, the fastest first and the refused last.

    Args:
        cell: what is being tuned.
        configs: what to try.
        run: makes the product.
        time: times it.
        exact: the product in float64.
        allowed: the largest relative error that is accepted.
    """
    trials = []
    for config in configs:
        refusal = _refusal(config, run, exact, allowed)
        trials.append(Trial(config, None if refusal else time(cell, config), refusal))
    return sorted(trials, key=lambda trial: (trial.seconds is None, trial.seconds or 0.0))


def allowed_error(x: Tensor, weight: Int4Weight | Fp8Weight, exact: Tensor) -> float:
    """Return 1.05 times the error of dequantised weights, plus the rounding of a sum in another order."""
    return 1.05 * relative_error(reference.linear(x, weight), exact) + ROUNDING


def relative_error(out: Tensor, exact: Tensor) -> float:
    """Return ||out - exact|| / ||exact||; NaN anywhere makes it NaN."""
    return float((out.double() - exact).norm() / exact.norm())


def random_weight(weight_format: WeightFormat, *shape: int, device: torch.device) -> Int4Weight | Fp8Weight:
    """Return a random weight `[.., N, K]` as a checkpoint could hold it."""
    if weight_format == "int4":
        words = torch.randint(-(2**31), 2**31, (*shape[:-1], shape[-1] // 8), device=device, dtype=torch.int64).int()
        scale = (torch.rand(*shape[:-1], shape[-1] // GROUP, device=device) * 0.01 + 0.001).bfloat16()
        return prepare_int4(words, scale)
    codes = (torch.randn(shape, device=device) * 60).clamp(-448, 448).to(torch.float8_e4m3fn)
    blocks = (*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))
    return prepare_fp8(codes, torch.rand(blocks, device=device) * 1e-3 + 1e-4)


def table_of(name: str, chosen: dict[Cell, Config], base: Table, measured: dict[str, str]) -> Table:
    """Return a table with the chosen configurations; where nothing was chosen, that of `base` stays.

    A bucket between two tuned ones takes the larger one's configuration.
    """
    products = {
        each: {shape: dict(buckets) for shape, buckets in shapes.items()} for each, shapes in base.products.items()
    }
    for kind, weight_format, shape in {(cell.product, cell.weight_format, cell.shape) for cell in chosen}:
        buckets = {}
        for bucket in BUCKETS:
            tuned = next(rows for rows in TUNED_BUCKETS if rows >= bucket)
            found = chosen.get(Cell(kind, weight_format, shape, tuned))
            buckets[bucket] = found or base.choose(kind, weight_format, shape, bucket)
        products.setdefault(f"{kind}/{weight_format}", {})[f"{shape[0]}x{shape[1]}"] = buckets
    return Table(name, measured, products)


def _shapes(product: Product) -> tuple[tuple[int, int], ...]:
    return {"gate_up": ((INNER, HIDDEN),), "down": ((HIDDEN, INNER),)}.get(product, DENSE)


def _grid(cell: Cell) -> Iterator[Config]:
    tall = min(128, max(8, 1 << (cell.rows - 1).bit_length()))
    if cell.product in {"gate_up", "down"}:  # rows of an expert, not of the batch
        tall = min(64, max(8, 1 << (cell.rows * TOP // EXPERTS).bit_length()))
    if cell.rows <= 2 and cell.product == "linear":
        for columns, depth, warps, splits in combinations((8, 16, 32), (128,), (2, 4), (1, 2, 4, 8)):
            yield Config(form="vector", rows=1, columns=columns, depth=depth, warps=warps, splits=splits)
    splits_tried = (1, 2, 4, 8) if cell.rows <= 64 and cell.product == "linear" else (1,)
    rows_tried = {tall, max(8, tall // 2)} if cell.product != "w8a8" else {max(16, tall)}
    for rows, columns, depth, warps, stages, splits in combinations(
        sorted(rows_tried), (32, 64, 128, 256), (64, 128), (4, 8), (2, 3, 4, 5), splits_tried
    ):
        if cell.product == "w8a8" and depth != 128:
            continue
        yield Config(rows=rows, columns=columns, depth=depth, warps=warps, stages=stages, splits=splits)


def _unlikely(config: Config, cell: Cell, processors: int) -> tuple[float, int]:
    """Rank by how far the number of programs is from two to a processor, then by how little each works."""
    tiles = -(-cell.rows // config.rows) * -(-cell.shape[0] // config.columns) * config.splits
    if cell.product in {"gate_up", "down"}:
        tiles *= min(EXPERTS, cell.rows * TOP)
    waves = tiles / (2 * processors)
    return (max(1 / waves, min(waves, 2.0)) + 0.02 * (config.warps == 8), -config.stages)


def _refusal(config: Config, run: Run, exact: Tensor, allowed: float) -> str:
    """Return why a configuration must not be used; empty if it may."""
    try:
        first, second = run(config), run(config)
    except (RuntimeError, ValueError, ArithmeticError) as error:  # Triton's out-of-resources errors among them
        return f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
    if not torch.equal(first, second):
        return "two runs gave different bits"
    found = relative_error(first, exact)
    if not found <= allowed:
        return f"error {found:.2e}, allowed {allowed:.2e}"
    return ""
