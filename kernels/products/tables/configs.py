"""Configurations of the GPU kernels: how a product is cut into tiles, and the tables that say which one to use.

A table is a JSON file: for each product (`linear`, `w8a8`, `gate_up`, `down`) and format, and for each shape `NxK` or
for all of them (`*`), one configuration per bucket of M. Those in `tables/` ship with the package: `sm_80`, `sm_90`,
`sm_100` were chosen by rule and by what the compiler reports, and hold for any GPU of that architecture; a table named
after a GPU was measured on one. `k2quant tune` writes such a table, and a user's own goes before the shipped ones.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from k2quant.errors import UsageError
from k2quant.ground.release import EXPERTS, TOP

Form = Literal["vector", "tile", "dequantize"]
Product = Literal["linear", "w8a8", "gate_up", "down"]
"""`gate_up` and `down` are the two grouped products of a layer of experts; their M is the number of tokens."""

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
"""M is rounded up to one of these, and what is larger counts as the last."""

TABLES = Path(__file__).parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """How one matrix product is run."""

    form: Form = "tile"
    """`vector`: a kernel without matrix units, for one or a few rows of x. `tile`: with them. `dequantize`: write the
    weights out, then cuBLAS."""
    rows: int = 16
    """BLOCK_M: rows of x in a tile."""
    columns: int = 64
    """BLOCK_N: rows of the weight, that is columns of the result, in a tile."""
    depth: int = 128
    """BLOCK_K: columns of the weight that are read at a time; lowered to a divisor of K by the launcher."""
    splits: int = 1
    """Parts of K that different programs sum, each into its own float32 workspace; added in a fixed order."""
    group: int = 8
    """Tiles of x that share a tile of weights while it lies in the L2 cache."""
    warps: int = 4
    stages: int = 3

    def depth_for(self, columns: int, block: int = 128) -> int:
        """Return the largest power of two, at most `depth`, that divides K and the columns of a block."""
        depth = self.depth
        while columns % depth or block % depth:
            depth //= 2
        return depth


@dataclass(frozen=True, slots=True)
class Table:
    """The configurations for one GPU."""

    name: str
    """The GPU's name, or `sm_90` for any of an architecture."""
    measured: dict[str, str] | None
    """Device, versions and date of the measurement; None where the table was made by rule."""
    products: dict[str, dict[str, dict[int, Config]]]
    """`product/format` -> `NxK` or `*` -> bucket -> configuration."""

    def choose(self, product: Product, weight_format: str, shape: tuple[int, ...], rows: int) -> Config:
        """Return the configuration for `rows` rows (or tokens) times a weight `[.., N, K]`.

        Raises:
            UsageError: the table has nothing for this product.
        """
        shapes = self.products.get(f"{product}/{weight_format}", {})
        buckets = shapes.get(f"{shape[-2]}x{shape[-1]}") or shapes.get("*")
        if not buckets:
            raise UsageError(
                f"table `{self.name}` has no configuration for {product}/{weight_format}; run k2quant tune"
            )
        wanted = bucket_of(rows)
        return buckets[min(buckets, key=lambda bucket: (bucket < wanted, abs(bucket - wanted)))]


def bucket_of(rows: int) -> int:
    """Return the bucket that M falls into."""
    return next((bucket for bucket in BUCKETS if rows <= bucket), BUCKETS[-1])


def tokens_of_k2(pairs: int, experts: int) -> int:
    """Return at how many of Kimi K2's tokens an expert gets as many rows as here: that is what counts."""
    return -(-pairs * EXPERTS // (TOP * max(1, experts)))


def read_table(path: Path) -> Table:
    """Read and check a table.

    Raises:
        UsageError: the file is not such a table.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        products = {
            product: {
                shape: {int(bucket): _config(config, product) for bucket, config in buckets.items()}
                for shape, buckets in shapes.items()
            }
            for product, shapes in raw["products"].items()
        }
        return Table(str(raw["name"]), raw["measured"], products)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{path}: not a table of kernel configurations ({error}); remove it or run k2quant tune"
        ) from None


def write_table(table: Table, path: Path) -> None:
    """Write a table; only what differs from a configuration's defaults is spelled out."""
    products = {
        product: {
            shape: {str(bucket): _plain(config) for bucket, config in buckets.items()}
            for shape, buckets in shapes.items()
        }
        for product, shapes in table.products.items()
    }
    text = json.dumps({"name": table.name, "measured": table.measured, "products": products}, indent=1)
    # One configuration to a line: a table is read and compared by people.
    text = re.sub(r"\{\s*(\"(?:form|rows|columns|depth|splits|group|warps|stages)\"[^{}]*?)\s*\}", _one_line, text)
    partial = path.with_suffix(".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(path)


def user_tables() -> Path:
    """Return the folder of the user's own tables."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "k2quant" / "tables"


def file_name(device: str) -> str:
    """Return the name of the table file of a GPU."""
    return re.sub(r"[^A-Za-z0-9_.]+", "-", device).strip("-") + ".json"


@lru_cache(maxsize=16)
def table_for(device: str, capability: tuple[int, int]) -> Table:
    """Return the table for a GPU: the user's, the one shipped for it, or that of the nearest older architecture.

    Raises:
        UsageError: the GPU is older than sm_80.
    """
    for path in (user_tables() / file_name(device), TABLES / file_name(device)):
        if path.exists():
            return read_table(path)
    known = sorted(int(path.stem.removeprefix("sm_")) for path in TABLES.glob("sm_*.json"))
    usable = [number for number in known if number <= 10 * capability[0] + capability[1]]
    if not usable:
        raise UsageError(f"{device} has compute capability {capability[0]}.{capability[1]}: 8.0 or later is needed")
    return read_table(TABLES / f"sm_{usable[-1]}.json")


def _config(raw: dict[str, Any], product: str) -> Config:
    known: dict[str, type] = {field.name: type(field.default) for field in fields(Config)}
    for key, value in raw.items():
        if key not in known or type(value) is not known[key]:
            raise ValueError(f"unexpected `{key}`: {value!r}")
        _check_number(key, value)
    if raw.get("form", "tile") not in {"vector", "tile", "dequantize"}:
        raise ValueError(f"unknown form `{raw['form']}`")
    if raw.get("form", "tile") != "tile" and not product.startswith("linear/"):
        raise ValueError(f"form `{raw['form']}` in {product}, which knows only `tile`")
    return Config(**raw)


def _check_number(key: str, value: Any) -> None:
    if isinstance(value, int) and (value < 1 or (key not in {"splits", "group", "stages"} and value & (value - 1))):
        raise ValueError(f"`{key}` is {value}, expected a positive power of two")


def _plain(config: Config) -> dict[str, Any]:
    values = {field.name: getattr(config, field.name) for field in fields(Config)}
    if config.form == "dequantize":
        return {"form": config.form}
    return {name: value for name, value in values.items() if value != getattr(Config(), name)} or {"form": "tile"}


def _one_line(match: re.Match[str]) -> str:
    return "{" + re.sub(r"\s+", " ", match[1]) + "}"
