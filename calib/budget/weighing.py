"""Errors of different matrices in one measure: what share of the residual stream they spoil.

What a module writes, `o_proj` of attention or `down_proj` of an MLP or an expert, is added to the stream. An error
there counts as it is, for an expert times the squares of the weights that its router gives. An error of a matrix before
it (gate, up, q_a, q_b, kv_a, kv_b) reaches the stream through the others: it counts as the same share of what the
module writes. For up that is nearly so, since an expert's hidden values are linear in up; for the others it is a rule.
Both are one formula, relative error times what the module writes, and give a mean square a token.

It is then taken relative to the stream at that place: the embedding's energy and all that was written until there. What
follows is normed and multiplied, and passes a relative error on as it is: the stream grows by what layers write, and
the error in it likewise. So early layers, where the stream is small, count for more.

Of twenty units of a nano-K2, each alone in INT4, ranks by this measure and by KL on held-out questions correlate with
0.90, 0.74 and 0.84 in three models; errors that are not taken relative to the stream with -0.10, -0.19 and -0.16,
relative errors of matrices alone with 0.01, 0.12 and 0.04.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import accumulate
from typing import NamedTuple

from k2quant.calib.budget.measuring import Lost
from k2quant.calib.stats.digests import base_of
from k2quant.calib.stats.layout import PARTS
from k2quant.calib.stats.reading import Stats
from k2quant.checkpoint.weights import StoredWeight
from k2quant.formats.known import FormatName
from k2quant.ground import names

_WRITERS = frozenset({"o_proj", "down_proj"})


def is_writer(base: str) -> bool:
    """Tell whether what a matrix gives is added to the residual stream."""
    return names.is_projection(base) and names.split(base)[1] in _WRITERS


class _Module(NamedTuple):
    """What writes to the stream once: attention, an MLP, an expert."""

    layer: int
    second: bool
    """Whether it stands behind the layer's attention."""
    written: float
    """Mean of what it adds to |x|^2, a token."""


def shares(
    weights: Iterable[StoredWeight], lost: Mapping[str, Lost], stats: Stats, embedding: float
) -> dict[str, float]:
    """Return, by base, what a matrix's relative error counts: what its module writes over the stream behind it.

    Args:
        weights: of the source.
        lost: what was measured of them.
        stats: that it was measured with.
        embedding: mean |x|^2 of what enters the first layer.

    Returns:
        for every matrix that was measured and whose module's writer was; 0 for an expert that no token reached. Sums
        are taken in the order of names, whatever files the weights lie in.
    """
    writers = sorted((weight for weight in weights if _writes(weight, lost)), key=lambda weight: weight.base)
    modules = {_parent(weight.base): _module(weight, lost, stats) for weight in writers}
    written: dict[tuple[int, bool], float] = {}
    for module in modules.values():
        place = module.layer, module.second
        written[place] = written.get(place, 0.0) + module.written
    heights = accumulate((written[place] for place in sorted(written)), initial=embedding)
    next(heights)  # before anything is written
    stream = dict(zip(sorted(written), heights, strict=True))
    found = {}
    for base in lost:
        if (own := modules.get(_parent(base))) is not None:
            behind = stream[own.layer, own.second]
            found[base] = own.written / behind if behind else 0.0
    return found


def relative(lost: Lost, name: FormatName) -> float:
    """Return a matrix's error in a format over the energy of its output; 0 where nothing comes out."""
    return lost.errors[name] / lost.energy if lost.energy else 0.0


def _writes(weight: StoredWeight, lost: Mapping[str, Lost]) -> bool:
    return is_writer(weight.base) and weight.base in lost


def _parent(base: str) -> str:
    return names.split(base)[0]


def _module(weight: StoredWeight, lost: Mapping[str, Lost], stats: Stats) -> _Module:
    layer = names.layer(weight.base) or 0
    second = not _parent(weight.base).endswith(".self_attn")
    return _Module(layer, second, _load(weight, stats) * lost[weight.base].energy)


def _load(weight: StoredWeight, stats: Stats) -> float:
    """Return the sum of squares of the router's weights that an expert has, a token; 1 for what every token passes.

    Both parts of the data count: how often an expert is chosen was fitted to neither.
    """
    base = base_of(weight) or ""
    if names.expert(weight.base) is None:
        return 1.0
    found = [stats.moments(base, part) for part in PARTS]
    tokens = sum(stats.manifest.data[part].tokens for part in PARTS)
    return sum(own.weight for own in found if own is not None) / max(tokens, 1)
