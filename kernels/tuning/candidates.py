"""What to tune, and what to try there: cells of Kimi K2's shapes, and configurations that are worth a try in each.

What a cell's table has so far is tried first, then its neighbours, then others, cut down by shared memory and by how
many programs they give the GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product as combinations
from itertools import zip_longest

from k2quant.ground.release import EXPERTS, HIDDEN, INNER, TOP, dense_shapes
from k2quant.kernels.products.prepare import PACKED
from k2quant.kernels.products.tables.configs import Config, Product, Table

DENSE = dense_shapes()
"""N and K of Kimi K2's dense weights: those of attention and of its only layer without experts."""

TUNED_BUCKETS = (1, 8, 16, 64, 256, 1024, 4096)
"""The buckets that are tuned; those between take the next larger one's configuration."""

CANDIDATES, VECTORS = 40, 6
"""Configurations that are tried in a cell at most, and how many of them are for `vector`, where that can win."""

VECTOR_ROWS = 2
"""M up to which a kernel without matrix units is tried."""

PLAIN_ROWS = 256
"""M from which on writing the weights out is tried."""

SMALL_TILE = 32
"""Rows of a tile up to which time is that of reading weights: what counts is how many of them a warp has under way."""


@dataclass(frozen=True, slots=True)
class Cell:
    """What one configuration is chosen for."""

    product: Product
    weight_format: str
    shape: tuple[int, int]
    """N and K."""
    rows: int
    """M, or tokens."""

    def __str__(self) -> str:
        return f"{self.product}/{self.weight_format} {self.shape[0]}x{self.shape[1]} M={self.rows}"


def cells(products: Iterable[Product] = ("linear", "w8a8", "gate_up", "down")) -> list[Cell]:
    """Return the cells of Kimi K2, those that matter most first: decoding, then prefill; experts before the rest."""
    order: tuple[Product, ...] = ("gate_up", "down", "linear", "w8a8")
    return [
        Cell(product, weight_format, shape, rows)
        for rows in TUNED_BUCKETS
        for product in sorted(set(products), key=order.index)
        for weight_format in (name for name, kind in PACKED.items() if product in kind.products)
        for shape in _shapes(product)
    ]


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
    packed = int(tile * PACKED[cell.weight_format].tile_bytes)
    return config.stages * (config.rows * config.depth * 2 + packed) + 2 * tile


def gate_up_rows(table: Table, weight_format: str, down: tuple[int, int], rows: int) -> int:
    """Return the rows of a block in a layer whose `down` has this shape."""
    return table.choose("gate_up", weight_format, down[::-1], rows).rows


def _shapes(product: Product) -> tuple[tuple[int, int], ...]:
    return {"gate_up": ((INNER, HIDDEN),), "down": ((HIDDEN, INNER),)}.get(product, DENSE)


def _rows_tried(cell: Cell, base: Table) -> list[int]:
    """Return the rows of tiles to try: about as many as there are, of x or of an expert's share of it."""
    if cell.product == "down":
        return [gate_up_rows(base, cell.weight_format, cell.shape, cell.rows)]
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
    depths: tuple[int, ...] = (64, 128) if PACKED[cell.weight_format].tile_in_block else (64, 128, 256)
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
