"""What a budget came to: each unit with what it would cost and lose, what it gets, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from k2quant.calib.budget.units import DEARER, LEAST
from k2quant.conversion.recipes.rules import WrittenRecipe, WrittenRule
from k2quant.conversion.searching.fitting import PLAIN, SOLVED
from k2quant.formats.format import Method
from k2quant.formats.known import FormatName
from k2quant.ground.saying.showing import as_html, brief

_WITHOUT_STATS: frozenset[Method] = frozenset({PLAIN, SOLVED})
"""Methods that convert without a folder of statistics: by no data, and by data of their own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranked:
    """A unit, what it would cost and lose in each format, and which one it gets."""

    unit: str
    """As engines call the module, such as `layers.3.mlp.experts`, or the matrix that stands alone."""
    kind: str
    """Its tensor class."""
    layer: int | None
    tensors: int
    weights: int
    """Counted."""
    format: FormatName
    """What it gets."""
    nbytes: Mapping[FormatName, int]
    """In each format that it may have, scales counted."""
    errors: Mapping[FormatName, float]
    """In each, as `Allotment.measure` says; empty for what was not measured."""
    gain: float | None
    """Error that its first step up removes a MB; None where there is none."""
    reason: str

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)

    def as_json(self) -> dict[str, Any]:
        """Return it as a report has it."""
        said: dict[str, Any] = {
            "unit": self.unit,
            "class": self.kind,
            "layer": self.layer,
            "tensors": self.tensors,
            "weights": self.weights,
            "format": self.format,
            "bytes": dict(self.nbytes),
        }
        said |= {"errors": dict(self.errors)} if self.errors else {}
        said |= {} if self.gain is None else {"gain": self.gain}
        return {**said, "reason": self.reason}


@dataclass(frozen=True, slots=True, kw_only=True)
class Allotment:
    """Which unit gets which format, and why."""

    rules: tuple[WrittenRule, ...]
    """By which each unit gets its format."""
    ranked: tuple[Ranked, ...]
    """Most error removed a byte first; what was not measured or is copied last."""
    bits: float
    """A weight, over all weights in scope, scales counted."""
    least: float
    """The same with all of them in INT4."""
    most: float
    """The same with all of them where no further byte removes an error."""
    before: float
    """Sum of errors of what was measured, all in INT4."""
    after: float
    """The same as chosen."""
    measure: str
    """`outputs`: shares of the residual stream's energy; `kl`: nats a token, of `eval blame`'s measure."""
    asked: Mapping[str, float]
    """What was asked for: `bits`, or `kl`."""
    said: Mapping[str, Any]
    """By what it was measured: the scales' method, the statistics, and blame's file."""

    @property
    def recipe(self) -> WrittenRecipe:
        """What `convert(recipe=...)` takes; the report of that conversion then has this choice under `budget`."""
        return WrittenRecipe(rules=self.rules, budget=self.as_json())

    @property
    def searches(self) -> bool:
        """Whether its recipe has scales chosen by statistics, which stand beside it then."""
        return self.recipe.method not in _WITHOUT_STATS

    @property
    def cheapest(self) -> FormatName:
        """The format of all that nothing is spent on."""
        return LEAST

    def facts(self) -> dict[str, object]:
        """Return what it comes to, in a few words."""
        units: dict[str, object] = {name: sum(one.format == name for one in self.ranked) for name in (*DEARER, LEAST)}
        return {"bits": f"{self.bits:.3f}", **units, "error": f"{self.before:.3g} -> {self.after:.3g}"}

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)

    def _repr_html_(self) -> str:
        """Return it as a small table, for notebooks."""
        return as_html(self)

    def as_json(self) -> dict[str, Any]:
        """Return what a report says of it under `budget`."""
        return {
            "asked": dict(self.asked),
            "bits": self.bits,
            "least": self.least,
            "most": self.most,
            "weights": sum(one.weights for one in self.ranked),
            "bytes": sum(one.nbytes[one.format] for one in self.ranked),
            "measure": self.measure,
            **self.said,
            "error": {LEAST: self.before, "chosen": self.after},
            "units": [one.as_json() for one in self.ranked],
        }
