"""Which groups of parts carry the damage: an adaptive search over an abstract measurement.

A part belongs to ever smaller groups, as its key says: class, layer, expert, projection. To put a group back is one
measurement, which gives the damage that is left in each chunk of a text. What the group explains is the share of the
whole damage that is gone then. Shares of several groups may sum to more than 1: damage does not add up.

Intervals stay honest although the search looks for what is large: half of the chunks decide where to look, and only the
other half says how much is explained. A group is named if both halves find it.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

from k2quant.errors import UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

Measure = Callable[[frozenset[int]], "NDArray[np.float64]"]
"""Takes the numbers of the parts that are put back, and returns the damage left in each chunk, `[C]`."""

LEAST_CHUNKS = 16
"""Fewer chunks say too little of how much a share would be on another text."""

_LEVEL = 0.01
"""Chance, over all classes together and in each later step, that a group without any effect is followed."""
_LEAST_SHARE = 0.02
"""Of the whole damage: what explains less is not followed."""
_DENSER = 1.5
"""Times what its size predicts: from there on, a part of a group stands for itself."""
_COVERED = 0.7
"""Share of a group's effect that its finer groups must have for the group itself to go without mention."""
_PATIENCE = 2
"""Halvings in a row after which damage that goes with size counts as spread evenly."""
_SHOWN = 10
"""Suspects at most."""
_RESAMPLES = 2000
_CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A group, and how much of the damage goes when it is put back."""

    parts: frozenset[int]
    share: float
    """From the chunks that the search did not look at."""
    interval: tuple[float, float]
    """95%, from the same chunks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What a search found, largest share first."""

    classes: tuple[Found, ...]
    suspects: tuple[Found, ...]
    together: Found | None
    """All suspects put back at once; None without suspects."""


def search(
    keys: Sequence[tuple[Hashable, ...]],
    sizes: Sequence[int],
    measure: Measure,
    *,
    passes: int,
    seed: int = 0,
) -> Findings:
    """Find the groups whose return to the baseline takes damage away.

    Args:
        keys: of each part, from its largest group to the part itself; all of one length, parts of one group adjacent
            when sorted. The first entry is the class.
        sizes: of each part, such as its number of weights: damage that goes with size is spread evenly.
        measure: is called once for each group, with nothing for the whole damage first.
        passes: how often it may be called.
        seed: of the choice of chunks and of the resampling.

    Raises:
        UsageError: there are too few chunks, or fewer passes than classes need.
    """
    classes = _by_class(keys)
    needed = len(classes) + 2
    if passes < needed:
        raise UsageError(f"passes: expected at least {needed}, for {len(classes)} tensor classes; found {passes}")
    bench = _Bench(measure, passes, seed)
    nodes = [_Node(parts=parts, keys=keys, size=sum(sizes[part] for part in parts)) for parts in classes]
    for node in nodes:
        node.gain = bench.gain(node.parts)
    guilty = [node for node in nodes if bench.explains(node.gain, _LEVEL / len(nodes))]
    _descend(guilty, sizes, bench)
    found = [bench.found(node.parts) for node in guilty]
    suspects = _suspects(guilty, bench)
    together = frozenset().union(*(suspect.parts for suspect in suspects))
    return Findings(
        classes=_named(found),
        suspects=suspects,
        together=bench.found(tuple(together)) if suspects else None,
    )


def _by_class(keys: Sequence[tuple[Hashable, ...]]) -> list[tuple[int, ...]]:
    """Return the parts of each class, in the order of their keys as they were given."""
    found: dict[Hashable, list[int]] = {}
    for part, key in enumerate(keys):
        found.setdefault(key[0], []).append(part)
    return [tuple(parts) for parts in found.values()]


@dataclass(slots=True, kw_only=True)
class _Node:
    """A group on the way down."""

    parts: tuple[int, ...]
    keys: Sequence[tuple[Hashable, ...]]
    size: int
    gain: Any = None
    """Damage that is gone in each chunk of the searching half."""
    flat: int = 0
    """Halvings in a row, down to here, in which no half had more than its size predicts."""
    children: list[_Node] = field(default_factory=list)
    """Those halves that explain something."""

    def halves(self) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Return the group cut in two at the coarsest level at which its parts differ; None for a single part."""
        for level in range(len(self.keys[self.parts[0]])):
            values = list(dict.fromkeys(self.keys[part][level] for part in self.parts))
            if len(values) > 1:
                low = set(values[: (len(values) + 1) // 2])
                first = tuple(part for part in self.parts if self.keys[part][level] in low)
                return first, tuple(part for part in self.parts if self.keys[part][level] not in low)
        return None


class _Bench:
    """Measures groups, each once, and says what the measurements mean."""

    def __init__(self, measure: Measure, passes: int, seed: int) -> None:
        self._measure, self._left = measure, passes
        self._known: dict[frozenset[int], Any] = {}
        self._whole = self._damage(frozenset())
        count = len(self._whole)
        if count < LEAST_CHUNKS:
            raise UsageError(f"expected a text of at least {LEAST_CHUNKS} chunks, found {count}; take shorter chunks")
        order = np.random.default_rng(seed).permutation(count)
        self._seed, self._searching, self._judging = seed, order[: count // 2], order[count // 2 :]

    @property
    def left(self) -> int:
        """Passes that may still be spent on the search; one is kept for all suspects together."""
        return self._left - 1

    def _damage(self, parts: frozenset[int]) -> Any:
        if parts not in self._known:
            self._left -= 1
            self._known[parts] = np.asarray(self._measure(parts), np.float64)
        return self._known[parts]

    def gain(self, parts: tuple[int, ...]) -> Any:
        """Return what goes in each chunk of the searching half when a group is put back."""
        return (self._whole - self._damage(frozenset(parts)))[self._searching]

    def share(self, gain: Any) -> float:
        """Return a gain as a share of the whole damage, on the searching half."""
        return float(gain.sum() / self._whole[self._searching].sum())

    def explains(self, gain: Any, level: float = _LEVEL) -> bool:
        """Tell whether a group explains a share worth following that chance does not give."""
        return clear(gain, level) and self.share(gain) >= _LEAST_SHARE

    def found(self, parts: tuple[int, ...]) -> Found:
        """Return what the judging half says of a group."""
        group = frozenset(parts)
        whole, left = self._whole[self._judging], self._damage(group)[self._judging]
        share, interval = explained(whole, left, seed=self._seed)
        return Found(parts=group, share=share, interval=interval)


def _descend(nodes: list[_Node], sizes: Sequence[int], bench: _Bench) -> None:
    """Halve groups, those of the largest effect first, as long as halves say more than the whole and passes last."""
    queue = [(-bench.share(node.gain), number, node) for number, node in enumerate(nodes)]
    heapq.heapify(queue)
    number = len(nodes)
    while queue and bench.left >= 2:
        _, _, node = heapq.heappop(queue)
        halves = node.halves() if node.flat < _PATIENCE else None
        if halves is None:
            continue
        for child in _children(node, halves, sizes, bench):
            number += 1
            heapq.heappush(queue, (-bench.share(child.gain), number, child))


def _children(node: _Node, halves: tuple[tuple[int, ...], ...], sizes: Sequence[int], bench: _Bench) -> list[_Node]:
    """Measure a group's halves and keep those that explain something."""
    tried: list[_Node] = []
    for parts in halves:
        if tried and bench.explains(tried[0].gain) and not bench.explains(node.gain - tried[0].gain, _LEVEL * 10):
            break  # the first half explains all that the group does
        size = sum(sizes[part] for part in parts)
        tried.append(_Node(parts=parts, keys=node.keys, size=size, gain=bench.gain(parts)))
    uneven = any(_denser(child, node) for child in tried)
    node.children = [child for child in tried if bench.explains(child.gain)]
    for child in node.children:
        child.flat = 0 if uneven else node.flat + 1
    return node.children


def _denser(finer: _Node, node: _Node) -> bool:
    """Tell whether a part of a group has clearly more of its effect than its size predicts."""
    expected = node.gain * (finer.size / node.size)
    return bool(finer.gain.sum() >= _DENSER * expected.sum()) and clear(finer.gain - expected, _LEVEL)


def _finest(node: _Node) -> list[_Node]:
    """Return a group's finest groups that stand out, and the group itself where they leave much unexplained."""
    finer = [found for child in node.children for found in _finest(child)]
    finer = [found for found in finer if _denser(found, node)]
    covered = sum(float(found.gain.sum()) for found in finer) >= _COVERED * float(node.gain.sum())
    return finer if finer and covered else [node, *finer]


def _suspects(nodes: list[_Node], bench: _Bench) -> tuple[Found, ...]:
    finest = {frozenset(found.parts): found for node in nodes for found in _finest(node)}
    return _named([bench.found(node.parts) for node in finest.values()])[:_SHOWN]


def _named(found: list[Found]) -> tuple[Found, ...]:
    """Return what the judging half confirms, largest share first."""
    return tuple(sorted((one for one in found if one.interval[0] > 0), key=lambda one: -one.share))


def clear(values: NDArray[np.float64], level: float) -> bool:
    """Tell whether the mean lies above 0 by more than chance gives: a one-sided t-test.

    Args:
        values: of each chunk, `[C]`.
        level: chance that values of mean 0 pass.
    """
    error = values.std(ddof=1) / math.sqrt(len(values))
    return bool(values.mean() > student(1 - level, len(values) - 1) * error)


def student(share: float, freedom: int) -> float:
    """Return the quantile of Student's t distribution: Cornish and Fisher's series, good to 1% from 7 degrees on."""
    z = NormalDist().inv_cdf(share)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def explained(
    whole: NDArray[np.float64], left: NDArray[np.float64], *, seed: int = 0
) -> tuple[float, tuple[float, float]]:
    """Return the share of the damage that is gone, with its 95% interval over chunks.

    The interval is that of resampled chunks, whole and left of a chunk together, stretched from its middle by what few
    chunks ask for (Student's t, and n - 1 instead of n).

    Args:
        whole: damage of each chunk, `[C]`.
        left: what is left of it with the group put back, `[C]`.
        seed: of the resampling.
    """
    count = len(whole)
    share = 1 - float(left.sum() / whole.sum())
    drawn = np.random.default_rng(seed).integers(count, size=(_RESAMPLES, count))
    shares = 1 - left[drawn].sum(1) / whole[drawn].sum(1)
    tail = (1 - _CONFIDENCE) / 2
    low, high = np.quantile(shares, [tail, 1 - tail])
    stretch = student(1 - tail, count - 1) / NormalDist().inv_cdf(1 - tail) * math.sqrt(count / (count - 1))
    return share, (share - (share - float(low)) * stretch, share + (float(high) - share) * stretch)
