"""`kv_b_proj` as MLA's absorption takes it: each engine has two tensors in its place.

See llama.cpp, conversion/deepseek.py (`attn_k_b` is `[heads, rank, nope]`, `attn_v_b` is `[heads, v, rank]`), and
mlx-lm, models/deepseek_v3.py, `sanitize` (`embed_q` and `unembed_out`, which are the same).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from k2quant.exports.written import Written
from k2quant.formats.dtypes import TensorSpec
from k2quant.formats.format import Format, Parts

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from k2quant.kernels.codecs.figures import Figures
    from k2quant.kernels.codecs.seam import Codecs
    from k2quant.kernels.codecs.values import U16


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads(Written):
    """`kv_b_proj` as two matrices: of each head the keys' rows transposed, and the values'."""

    name: ClassVar[str] = "heads"
    mains: ClassVar[tuple[str, ...]] = ("k_b", "v_b")

    for_keys: Format
    """What the keys' half is written in: a format with one tensor."""
    for_values: Format
    """The values' half, likewise."""
    nope: int
    """Rows of a head that make keys."""
    v: int
    """Rows that make values."""
    rank: int
    """Columns."""

    @property
    def row_step(self) -> int:
        """Rows of a head."""
        return self.nope + self.v

    @property
    def label(self) -> str:
        """Those of its halves."""
        return " and ".join(dict.fromkeys((self.for_keys.label.upper(), self.for_values.label.upper())))

    def state(self, shape: tuple[int, ...], *, name: str = "weight") -> dict[str, TensorSpec]:
        """Return both halves: matrices that have the rows of all heads one after another."""
        heads = shape[0] // self.row_step
        halves = (self.for_keys, (heads * self.rank, self.nope)), (self.for_values, (heads * self.v, self.rank))
        specs = (half.state(inner, name=name)[half.main] for half, inner in halves)
        return dict(zip(self.mains, specs, strict=True))

    def rows(self, suffix: str, start: int, stop: int) -> tuple[int, int]:
        """Return the rows of a half that belong to whole heads."""
        each = self.rank if suffix == self.main else self.v
        return start // self.row_step * each, stop // self.row_step * each

    def restates(self, source: Format) -> bool:
        """Tell what both halves restate: floats that stay floats are not rounded on the way."""
        return not source.quantised and self.for_keys.restates(source) and self.for_values.restates(source)

    def restate(self, source: Format, parts: Parts, outputs: Parts, codecs: Codecs) -> None:
        """Divide floats among the halves."""
        halves = zip(self.mains, (self.for_keys, self.for_values), self._halves(parts[source.main]), strict=True)
        for suffix, half, values in halves:
            own = {half.main: outputs[suffix]}
            half.restate(source, {source.main: values}, own, codecs)
            outputs[suffix] = own[half.main]

    def encode(self, weights: U16, parts: Parts, codecs: Codecs) -> Figures:
        """Divide weights among the halves, and write each as its type has it."""
        keys, others = self._halves(weights)
        done = _written(self.for_keys, keys, parts[self.mains[0]], codecs)
        return done + _written(self.for_values, others, parts[self.mains[1]], codecs)

    def _halves(self, weights: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        import numpy as np

        heads = weights.reshape(-1, self.row_step, self.rank)
        keys = np.ascontiguousarray(heads[:, : self.nope].transpose(0, 2, 1)).reshape(-1, self.nope)
        return keys, np.ascontiguousarray(heads[:, self.nope :]).reshape(-1, self.rank)


def _written(half: Format, weights: U16, out: NDArray[Any], codecs: Codecs) -> Figures:
    """Write BF16 weights `[R, K]` in a type, or as they are; return what that did."""
    return half.encode(weights, {half.main: out}, codecs)
