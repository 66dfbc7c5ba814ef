"""Make a table for a GPU: every configuration is checked for its numbers before it is timed.

A cell is a product, a format, a shape and a bucket of M. What its table has so far is tried first, then its neighbours,
then others, cut down by shared memory and by how many programs they give the GPU. Each must give the same bits twice
and an error, against float64, no larger than 1.05 times that of dequantised weights. What is wrong or fails is reported
and left out.

The two products of a layer of experts share their blocks of rows: `gate_up` chooses them, `down` is tuned with them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product as combinations
from itertools import zip_longest
from typing import Literal

import torch
from torch import Tensor

from k2quant.kernels.products import reference
from k2quant.kernels.products.dispatch import EXPERTS, TOP
from k2quant.kernels.products.tables.configs import BUCKETS, Config, Product, Table
from k2quant.kernels.products.weights import GROUP, Fp8Weight, Int4Weight, prepare_fp8, prepare_int4

WeightFormat = Literal["int4", "fp8"]

DENSE = (
    (1536, 7168),  # q_a: hidden to the low rank of queries
    (12288, 1536),  # q_b: to 64 heads of 128 + 64
    (576, 7168),  # kv_a: hidden to the low rank of keys and values, 512, and 64 for positions
    (16384, 512),  # kv_b: to 64 heads of 128 + 128
    (7168, 8192),  # o: 64 heads of 128 to hidden
    (18432, 7168),  # gate and up of the dense first layer
    (7168, 18432),  # its down
)
"""N and K of Kimi K2's dense weights: those of attention and of its only layer without experts."""

HIDDEN = 7168
"""Columns of a token in Kimi K2: K of an expert's gate and up, N of its down."""

INNER = 2048
"""Width of one of Kimi K2's routed experts: N of gate and up, K of down."""

TUNED_BUCKETS = (1, 4, 16, 64, 256, 1024, 4096)
"""The buckets that are tuned; those between take the next larger one's configuration."""

CANDIDATES, VECTORS = 40, 6
"""Configurations that are tried in a cell at most, and how many of them are for `vector`, where that can win."""

VECTOR_ROWS = 2
"""M up to which a kernel without matrix units is tried."""

PLAIN_ROWS = 256
"""M from which on writing the weights out is tried."""

SMALL_TILE = 32
"""Rows of a tile up to which time is that of reading weights: what counts is how many of them a warp has under way."""

LONGEST_REPLAY, FEWEST_CALLS = 0.02, 4
"""Seconds that the timed calls of a configuration may take together, and how many of them there are at least."""

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

TryCell = Callable[[Cell, Table], list[Trial]]
"""Tries a cell's configurations, given the table so far; the fastest first, the refused last."""

Over = Callable[[], bool]
"""Says whether the time is over."""


def cells(products: Iterable[Product] = ("linear", "w8a8", "gate_up", "down")) -> list[Cell]:
    """Return the cells of Kimi K2, those that matter most first: decoding, then prefill; experts before the rest."""
    order: tuple[Product, ...] = ("gate_up", "down", "linear", "w8a8")
    return [
        Cell(product, weight_format, shape, rows)
        for rows in TUNED_BUCKETS
        for product in sorted(set(products), key=order.index)
        for weight_format in (("int4", "fp8") if product != "w8a8" else ("fp8",))
        for shape in _shapes(product)
    ]


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


def candidates(cell: Cell, *, base: Table, shared_limit: int, processors: int) -> list[Config]:
    """Return configurations worth a try, `CANDIDATES` at most: that of `base`, its neighbours, then a choice of others.

    Those of `down` have the rows that `base` has for `gate_up`.

    Args:
        cell: what is tuned.
        base: the table so far.
        shared_limit: bytes of shared memory that a program may use.
        processors: of the GPU.
    """
    rows = _rows_tried(cell, base)
    first = base.choose(cell.product, cell.weight_format, cell.shape, cell.rows)
    if cell.product == "down":
        first = replace(first, rows=rows[0])
    plain = [Config(form="dequantize")] if cell.product == "linear" and cell.rows >= PLAIN_ROWS else []
    others = [
        config
        for config in (*_neighbours(first, cell), *_vectors(cell, processors), *_tiles(cell, rows, processors))
        if shared_bytes(config, cell) <= shared_limit
    ]
    return list(dict.fromkeys([first, *plain, *others]))[:CANDIDATES]


def shared_bytes(config: Config, cell: Cell) -> int:
    """Return about how much shared memory a configuration takes: stages of x and packed weights, one tile unpacked."""
    if config.form != "tile":
        return 0
    tile = config.columns * config.depth * (2 if cell.product == "gate_up" else 1)
    if cell.product == "w8a8":
        return config.stages * (config.rows * config.depth + tile)
    packed = int(tile * 0.5625) if cell.weight_format == "int4" else tile
    return config.stages * (config.rows * config.depth * 2 + packed) + 2 * tile


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
            if found and kind == "down" and found.rows != _gate_up_rows(table, weight_format, shape, bucket):
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
    for weight_format in ("int4", "fp8"):
        inward, outward = (products.get(f"{product}/{weight_format}", {}) for product in ("gate_up", "down"))
        for name in {**outward, **{_flipped(name): None for name in inward}}:
            shape = _shape(name)
            if not {name, "*"} & set(outward) or not {_flipped(name), "*"} & set(inward):
                continue  # no such layer can be run
            rows = {bucket: _gate_up_rows(table, weight_format, shape, bucket) for bucket in BUCKETS}
            found = {bucket: table.choose("down", weight_format, shape, bucket) for bucket in BUCKETS}
            if any(found[bucket].rows != rows[bucket] for bucket in BUCKETS):
                outward[name] = {bucket: replace(found[bucket], rows=rows[bucket]) for bucket in BUCKETS}
    return Table(table.name, table.measured, products)


def _copied(table: Table) -> dict[str, dict[str, dict[int, Config]]]:
    return {
        product: {shape: dict(buckets) for shape, buckets in shapes.items()}
        for product, shapes in table.products.items()
    }


def _gate_up_rows(table: Table, weight_format: str, down: tuple[int, int], rows: int) -> int:
    """Return the rows of a block in a layer whose `down` has this shape."""
    return table.choose("gate_up", weight_format, down[::-1], rows).rows


def _name(shape: tuple[int, int]) -> str:
    return f"{shape[0]}x{shape[1]}"


def _shape(name: str) -> tuple[int, int]:
    """Return N and K of an entry's name; zeros for `*`, which no entry is named after."""
    rows, _, columns = name.partition("x")
    return (int(rows), int(columns)) if columns else (0, 0)


def _flipped(name: str) -> str:
    return name if name == "*" else _name(_shape(name)[::-1])


def _shapes(product: Product) -> tuple[tuple[int, int], ...]:
    return {"gate_up": ((INNER, HIDDEN),), "down": ((HIDDEN, INNER),)}.get(product, DENSE)


def _rows_tried(cell: Cell, base: Table) -> list[int]:
    """Return the rows of tiles to try: about as many as there are, of x or of an expert's share of it."""
    if cell.product == "down":
        return [_gate_up_rows(base, cell.weight_format, cell.shape, cell.rows)]
    experts = cell.product == "gate_up"
    most = -(-cell.rows * TOP // EXPERTS) if experts else cell.rows
    tall = min(128, 1 << (most - 1).bit_length())
    smallest = 8 if cell.product != "w8a8" else 16
    tried = (8, 16, 32) if tall <= 16 else (tall // 2, tall, 2 * tall if experts else tall)
    return sorted({rows for rows in tried if smallest <= rows <= 128})


def _neighbours(config: Config, cell: Cell) -> Iterator[Config]:
    """Yield what differs from a tile in its stages, its warps, its columns or its splits alone."""
    if config.form != "tile":
        return
    for stages in (config.stages + 1, config.stages - 1):
        if stages > 1:
            yield replace(config, stages=stages)
    for factor in (0.5, 2):
        if 1 <= config.warps * factor <= 8:
            yield replace(config, warps=int(config.warps * factor))
        if 32 <= config.columns * factor <= 256:
            yield replace(config, columns=int(config.columns * factor))
    splits = _splits_tried(cell)
    fewer = max((each for each in splits if each < config.splits), default=0)
    more = min((each for each in splits if each > config.splits), default=0)
    for each in (fewer, more):
        if each and _divides(config.depth, each, cell.shape[1]):
            yield replace(config, splits=each)


def _vectors(cell: Cell, processors: int) -> list[Config]:
    if cell.product != "linear" or cell.rows > VECTOR_ROWS:
        return []
    found = [
        Config(form="vector", rows=1, columns=columns, depth=depth, warps=warps, splits=splits)
        for columns, depth, warps, splits in combinations((8, 16, 32), (128, 256), (2, 4), (1, 2, 4, 8))
        if _divides(depth, splits, cell.shape[1])
    ]
    found.sort(key=lambda config: _unlikely(config, cell, processors))
    return _in_turn(found, lambda config: config.columns, lambda config: (config.depth, config.warps))[:VECTORS]


def _tiles(cell: Cell, rows_tried: list[int], processors: int) -> list[Config]:
    """Return tiles of every kind in turn, of each kind the likeliest first."""
    found = sorted(_grid(cell, rows_tried), key=lambda config: _unlikely(config, cell, processors))
    return _in_turn(found, lambda config: (config.rows, config.depth), lambda config: (config.columns, config.warps))


def _grid(cell: Cell, rows_tried: list[int]) -> Iterator[Config]:
    depths: tuple[int, ...] = (
        (64, 128, 256) if cell.weight_format == "int4" else (64, 128)
    )  # a tile of FP8 lies in one block
    depths = depths if cell.product != "w8a8" else (128,)
    for rows, columns, depth, warps, stages, splits in combinations(
        rows_tried, (32, 64, 128, 256), depths, (1, 2, 4, 8), (2, 3, 4, 5), _splits_tried(cell)
    ):
        config = Config(rows=rows, columns=columns, depth=depth, warps=warps, stages=stages, splits=splits)
        if _divides(depth, splits, cell.shape[1]) and _balanced(config, cell):
            yield config


def _splits_tried(cell: Cell) -> tuple[int, ...]:
    """Return the parts of K to try: one where there are programs enough, and for experts, which know no others."""
    if cell.product in {"gate_up", "down"} or cell.rows > PLAIN_ROWS:
        return (1,)
    return (1, 2, 4, 7, 8, 14, 16) if cell.rows <= 64 else (1, 2, 4)


def _divides(depth: int, splits: int, columns: int) -> bool:
    """Return whether a launcher would take depth and splits as they are: what it lowers is tried under its own name."""
    return columns % (depth * splits) == 0


def _balanced(config: Config, cell: Cell) -> bool:
    """Return whether a tile leaves no warp next to nothing to do, and none more sums than it has registers for."""
    sums = config.rows * config.columns * (2 if cell.product == "gate_up" else 1) // (32 * config.warps)
    if config.rows > SMALL_TILE:
        return 16 <= sums <= 128 and config.warps >= 4
    return sums <= 128 and 1024 <= config.columns * config.depth // config.warps <= 8192


def _in_turn(configs: list[Config], *kinds: Callable[[Config], Hashable]) -> list[Config]:
    """Return the first of each kind, then the second of each, and so on; within a kind the same by the next `kinds`."""
    if not kinds:
        return configs
    groups: dict[Hashable, list[Config]] = {}
    for config in configs:
        groups.setdefault(kinds[0](config), []).append(config)
    layers = zip_longest(*(_in_turn(group, *kinds[1:]) for group in groups.values()))
    return [config for layer in layers for config in layer if config is not None]


def _unlikely(config: Config, cell: Cell, processors: int) -> tuple[float, float, float]:
    """Rank by programs, best one or two to a processor; then large tiles by their size; then by stages, best 3 or 4."""
    experts, share = 1, cell.rows
    if cell.product in {"gate_up", "down"}:
        experts = min(EXPERTS, cell.rows * TOP)
        share = -(-cell.rows * TOP // experts)
    tiles = experts * -(-share // config.rows) * -(-cell.shape[0] // config.columns) * config.splits
    waves = tiles / (2 * processors)
    area = config.rows * config.columns if config.rows > SMALL_TILE else 0
    return max(1 / waves, min(waves, 2.0)), -area, abs(config.stages - 3.4)


def _try(cell: Cell, config: Config, run: Run, time: Time, exact: Tensor, allowed: float) -> Trial:
    refusal = _refusal(config, run, exact, allowed)
    if refusal:
        return Trial(config, None, refusal)
    try:
        return Trial(config, time(cell, config))
    except Exception as error:  # noqa: BLE001 - whatever goes wrong, the next configuration may do
        return Trial(config, None, f"while it was timed: {_said(error)}")


def _refusal(config: Config, run: Run, exact: Tensor, allowed: float) -> str:
    """Return why a configuration must not be used; empty if it may."""
    try:
        first, second = run(config), run(config)
        if not torch.equal(first, second):
            return "two runs gave different bits"
        found = relative_error(first, exact)
    except Exception as error:  # noqa: BLE001 - Triton's own errors share no class but this
        return f"while it was run: {_said(error)}"
    if not found <= allowed:
        return f"error {found:.2e}, allowed {allowed:.2e}"
    return ""


def _said(error: Exception) -> str:
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first[:100]}" if first else type(error).__name__
