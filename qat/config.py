"""What is trained for, and how: pure data, checked when it is made."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from k2quant.errors import UsageError
from k2quant.formats.format import Format, Layout, Scope
from k2quant.formats.known import FORMATS, ExportFormat
from k2quant.ground.patterns import SAFE_PATTERN, may_take_for_ever
from k2quant.ground.units import one_of
from k2quant.kernels.codecs.grids import Grid, largest_code

Estimator = Literal["plain", "clipped", "learned"]
"""What takes the place of the gradient of rounding. `plain`: the gradient passes unchanged (Bengio et al., 2013).
`clipped`: it stops at codes that were clamped. `learned`: the scales are trained too (LSQ, arXiv 1902.08153)."""
TrainedPart = Literal["all", "experts", "adapters"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """Low-rank updates within the rounding: the forward pass uses Q(W + alpha / rank * B A).

    Raises:
        UsageError: a value makes no sense.
    """

    rank: int = 16
    """Inner dimension of the update."""
    alpha: float = 32.0
    """The update is multiplied by alpha / rank."""

    def __post_init__(self) -> None:
        if type(self.rank) is not int or not 1 <= self.rank <= 2**16:
            raise UsageError(f"rank: expected a whole number from 1 to {2**16}, found {shown(self.rank)}")
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, int | float) or not 0 < self.alpha < 1e6:
            raise UsageError(f"alpha: expected a number above 0, below 1000000, found {shown(self.alpha)}")

    @property
    def scaling(self) -> float:
        """What the product of the two matrices is multiplied by."""
        return self.alpha / self.rank


@dataclass(frozen=True, slots=True, kw_only=True)
class QATConfig:
    """Which weights are fake-quantised, by which rule, and what trains.

    Raises:
        UsageError: a value does not exist, or two of them make no sense together.
    """

    to: ExportFormat = "int4"
    """Format of the export."""
    bits: int = 4
    """Width of the codes: 4, or 3 or 2, which sit in INT4 nibbles, or 8, which trains but has no export. INT4 alone."""
    grid: Grid = "moonshot"
    """Rounding rule of INT4."""
    layout: Layout | None = None
    """Whose names and config the export has, where the format has several; None: the format's own."""
    scope: Scope | None = None
    """`experts` (default for INT4): the routed experts. `linear` (default for FP8): every projection, of INT4 without
    `kv_b_proj`. `projections`: every projection."""
    ignore: tuple[str, ...] = ()
    """Regular expressions; a weight in whose name one is found stays out of scope."""
    allow_split: bool = False
    """Whether what engines fuse may be fake-quantised in part."""
    estimator: Estimator = "plain"
    """The straight-through estimator."""
    train: TrainedPart = "all"
    """`all` weights; `experts`: what is fake-quantised, alone; `adapters`: low-rank updates to what is."""
    adapter: Adapter | None = None
    """Of `train: adapters`; None for the default rank."""
    train_router: bool = False
    """Whether the router's weights train. Its correction bias never does."""

    def __post_init__(self) -> None:
        for name, kinds in (("to", ExportFormat), ("grid", Grid), ("estimator", Estimator), ("train", TrainedPart)):
            one_of(name, getattr(self, name), get_args(kinds))
        for name, kind in (("scope", Scope), ("layout", Layout)):
            if getattr(self, name) is not None:
                one_of(name, getattr(self, name), get_args(kind))
        if not isinstance(self.ignore, tuple) or not all(isinstance(pattern, str) for pattern in self.ignore):
            raise UsageError(f"ignore: expected a tuple of regular expressions, found {self.ignore!r}")
        for pattern in self.ignore:
            _compiled(pattern)
        for name in ("allow_split", "train_router"):
            if type(getattr(self, name)) is not bool:
                raise UsageError(f"{name}: expected true or false, found {getattr(self, name)!r}")
        self._check_rule()
        self._check_trained()

    def _check_rule(self) -> None:
        whole = type(self.bits) is int  # 4.0 equals 4, and would fail where codes are made
        if self.bit_widths:
            if not whole or self.bits not in self.bit_widths:
                raise UsageError(f"bits: expected {' or '.join(map(str, self.bit_widths))}, found {shown(self.bits)}")
            largest_code(self.grid, self.bits)
        elif not whole or (self.bits, self.grid) != (4, "moonshot"):
            raise UsageError(f"bits and grid have a meaning with INT4 alone; leave them out for {self.to}")
        layouts = FORMATS[self.to].layouts
        if self.layout is not None and self.layout not in layouts:
            known = " or ".join(layouts) or f"none, for {self.to} has one"
            raise UsageError(f"layout: expected {known}, found {self.layout}")
        estimators = (
            "plain",
            *(["clipped"] if FORMATS[self.to].clips else []),
            *(["learned"] if self.bit_widths else []),
        )
        if self.estimator not in estimators:
            said = " or ".join(f"`{name}`" for name in estimators)
            raise UsageError(
                f"estimator: {self.to} has a scale from each block's largest weight: only {said} has a meaning"
            )
        if self.estimator == "learned" and self.grid != "moonshot":
            raise UsageError("estimator: learned scales are for the grid moonshot")

    def _check_trained(self) -> None:
        if self.adapter is not None and self.train != "adapters":
            raise UsageError(f"adapter: has a meaning with `train: adapters` alone, found `train: {self.train}`")
        if self.train == "adapters" and self.estimator != "plain":
            raise UsageError("estimator: adapters are trained with `plain`")
        if self.train != "all" and self.train_router:
            raise UsageError(f"train_router: has a meaning with `train: all` alone, found `train: {self.train}`")

    @property
    def resolved_scope(self) -> Scope:
        """The scope, the format's default where none was asked for."""
        return self.scope or FORMATS[self.to].default_scope or "linear"

    @property
    def bit_widths(self) -> tuple[int, ...]:
        """Widths of codes among which the format lets one choose; none where it has one width."""
        return FORMATS[self.to].bit_widths

    @property
    def format(self) -> Format:
        """The format of the export."""
        return FORMATS[self.to].asked_for(grid=self.grid, layout=self.layout)

    @property
    def low_rank(self) -> Adapter | None:
        """The adapters that are trained, if any."""
        return (self.adapter or Adapter()) if self.train == "adapters" else None

    @property
    def patterns(self) -> tuple[re.Pattern[str], ...]:
        """The patterns of `ignore`."""
        return tuple(_compiled(pattern) for pattern in self.ignore)

    def ignores(self, base: str) -> bool:
        """Tell whether one of the patterns is found in a weight's name."""
        return any(pattern.search(base) for pattern in self.patterns)


def shown(value: object) -> str:
    """Return the beginning of a value for a message; Python writes no whole number of thousands of digits."""
    try:
        return f"{value!r:.100}"
    except ValueError:
        return "a number of thousands of digits"


def _compiled(pattern: str) -> re.Pattern[str]:
    if may_take_for_ever(pattern):
        raise UsageError(f"ignore: {pattern!r:.200} might take for ever to match; use {SAFE_PATTERN}")
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UsageError(f"ignore: {pattern!r} is no regular expression: {error}") from error
