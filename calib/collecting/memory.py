"""How much memory a pass takes, and what a given amount allows: how many experts and how many rows at a time.

    memory >= process + layer + chunk + wave + hidden states that are kept

- process: Python, torch and transformers themselves.
- layer: the weights of the largest layer without its routed experts, or the embedding; the buffers of a piece in
  attention and in a dense MLP; sums.
- chunk: the weights of some routed experts, the buffers of `BLOCK` tokens in one of them, its Hessians.
- wave: what a layer keeps of each token of some rows while experts come and go: 8 H bytes and its routing.

Where all experts of a layer fit they are read once a layer, and a wave is one segment. Otherwise they are read once a
wave, and waves are as large as memory allows. With Hessians, either those of all experts fit or all rows are one wave.

Weights lie there in BF16, whatever the checkpoint's format: they are decoded once, as they are read. No torch is needed
here.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import TypeVar

from k2quant.calib.stats.layout import Input, inputs
from k2quant.calib.stats.model import Model
from k2quant.checkpoint.reader import Checkpoint
from k2quant.checkpoint.weights import StoredWeight, group_tensors
from k2quant.errors import UsageError
from k2quant.ground import names
from k2quant.ground.saying.showing import brief
from k2quant.ground.units import enough, size

PROCESS = 800_000_000
"""Bytes that Python with torch and transformers takes before a weight is read (measured)."""

BLOCK = 2048
"""Tokens that an expert computes, or that are squared, at once."""

PIECE_TOKENS = 2048
"""Tokens that go through attention at once, unless one row has more."""

SEGMENT_TOKENS = 2**15
"""Tokens that an expert sees at once, some 700 of them its own in K2: enough that its weights are read from memory
seldom."""

_CHUNK = 32
"""Experts that are read at once where not all fit; more leave less for waves, and these decide how often all are
read."""

_PARTS = 2


def piece_rows(length: int) -> int:
    """Return the rows of a piece."""
    return max(PIECE_TOKENS // length, 1)


def segment_rows(length: int) -> int:
    """Return the rows of a segment, a multiple of those of a piece."""
    return max(SEGMENT_TOKENS // length // piece_rows(length), 1) * piece_rows(length)


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a pass takes, and how it goes about it in the memory that it is given."""

    least: int
    """Bytes below which it does not work."""
    memory: int
    """Bytes that it may take."""
    chunk: int
    """Routed experts in memory at a time."""
    wave: int
    """Segments that go through a chunk together."""
    waves: int
    """How many there are: so often the experts of a layer are read, unless all fit."""
    budget: int
    """Bytes of hidden states that are kept in memory beside the files."""
    hidden: int
    """Bytes of hidden states between two layers; files of twice as many lie on the disk."""

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)


def needs(source: Checkpoint, *, rows: Sequence[int], length: int, memory: int, hessians: bool = False) -> Needs:
    """Plan a pass.

    Args:
        source: the checkpoint; its headers and config alone are looked at.
        rows: how many of each part that is measured, train and validation.
        length: tokens of a row.
        memory: bytes that the pass may take.
        hessians: whether E[x x^T] is collected too.

    Raises:
        UsageError: `memory` is too small; the least that works is named.
        CheckpointError: the checkpoint is no model.
    """
    sizes = Sizes(Model.of(source.config), group_tensors(source.tensors).weights, length, hessians=hessians)
    tokens = sum(rows) * length
    largest = min(segment_rows(length), max(rows)) * length
    segments = sum(-(-count // segment_rows(length)) for count in rows)
    if memory < (least := sizes.least(largest, tokens)):
        raise UsageError(
            f"`memory=` is too small: a pass over this model, in rows of {length:,} tokens, takes at least "
            f"{enough(least)}, found {size(memory)}"
        )
    chunk, wave = sizes.shares(memory, largest, segments, tokens)
    taken = sizes.taken(chunk, min(wave * largest, tokens), all_hessians=wave < segments)
    return Needs(
        least=least,
        memory=memory,
        chunk=chunk,
        wave=wave,
        waves=-(-segments // wave),
        budget=max(memory - taken, 0),
        hidden=tokens * sizes.model.hidden * 2,
    )


class Sizes:
    """Bytes of what a pass holds."""

    def __init__(self, model: Model, weights: Sequence[StoredWeight], length: int, *, hessians: bool = False) -> None:
        """Look at headers.

        Args:
            model: its sizes.
            weights: of the checkpoint.
            length: tokens of a row.
            hessians: whether E[x x^T] is collected too.
        """
        self.model, self._length, self._hessians = model, length, hessians
        held = _Held(weights)
        self._layer = max(held.layers.values(), default=0)
        self._outside, self._matrix = held.outside, held.matrix
        self.expert = max(held.experts.values(), default=0)
        """Of a routed expert's weights."""

    def least(self, largest: int, tokens: int) -> int:
        """Return the least that works, where the largest segment has `largest` tokens."""
        alone = self.taken(1, tokens if self._hessians else largest)
        return min(alone, self.taken(self.model.experts, largest, all_hessians=True))

    def shares(self, memory: int, largest: int, segments: int, tokens: int) -> tuple[int, int]:
        """Return how many experts and how many segments go together."""
        experts = self.model.experts
        if self.taken(experts, largest, all_hessians=segments > 1) <= memory:
            return experts, 1
        if self._hessians:
            return self._most(1, experts, lambda chunk: self.taken(chunk, tokens) <= memory), segments
        chunk = self._most(1, min(_CHUNK, experts), lambda chunk: self.taken(chunk, largest) <= memory)
        chunk = max(chunk // 2, 1) if chunk < _CHUNK else chunk
        return chunk, self._most(1, segments, lambda wave: self.taken(chunk, min(wave * largest, tokens)) <= memory)

    @staticmethod
    def _most(low: int, high: int, fits: Callable[[int], bool]) -> int:
        """Return the largest number that fits; the lowest does."""
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle) else (low, middle - 1)
        return low

    def taken(self, chunk: int, tokens: int, *, all_hessians: bool = False) -> int:
        """Return the bytes that a pass takes, hidden states aside.

        Args:
            chunk: experts in memory.
            tokens: of a wave.
            all_hessians: whether those of all experts are, if any are asked for, as they must be where there are
                several waves.
        """
        layer = self.layer() + self._sums()
        routed = 0
        if self.expert:
            routed = chunk * self.expert + self._block() + tokens * self._token()
        if self.expert and self._hessians:
            pair = 4 * (self.model.hidden**2 + self.model.inner**2)
            routed += _PARTS * pair * (self.model.experts if all_hessians else 1)
        return PROCESS + max(layer + routed, self.outside())

    def layer(self) -> int:
        """Return the bytes of a layer without its routed experts while a piece goes through."""
        return self._layer + 2 * self._matrix + self._piece()

    def outside(self) -> int:
        """Return the bytes of the embedding, or of the head, and of a piece."""
        return self._outside + self._piece()

    def _piece(self) -> int:
        """Return the bytes of a piece in attention, or in a dense MLP."""
        model, rows = self.model, piece_rows(self._length)
        heads = int(model.config["num_attention_heads"])
        nope, rope, value = (int(model.config[f"{name}_head_dim"]) for name in ("qk_nope", "qk_rope", "v"))
        attention = heads * 2 * (7 * (nope + rope) + nope + value) + 5 * self._length  # states, and a mask of positions
        mlp = 8 * max(model.dense, model.shared)
        width = max(one.width for layer in (0, model.layers - 1) for one in inputs(model, layer))
        return rows * self._length * (20 * model.hidden + max(attention, mlp)) + BLOCK * 8 * width

    def _sums(self) -> int:
        """Return the bytes of moments, twice, and of the Hessians of what is no routed expert's."""
        found = [one for layer in (0, self.model.layers - 1) for one in inputs(self.model, layer)]
        sums = sum(one.width * (one.experts or 1) * 24 for one in found)
        return _PARTS * (sums + (max(map(self._plain_hessians, (0, self.model.layers - 1))) if self._hessians else 0))

    def _plain_hessians(self, layer: int) -> int:
        plain: list[Input] = [one for one in inputs(self.model, layer) if one.experts is None]
        return sum(4 * one.width**2 for one in plain)

    def _block(self) -> int:
        """Return the bytes of a block of tokens in an expert."""
        return BLOCK * (12 * self.model.hidden + 18 * self.model.inner)

    def _token(self) -> int:
        """Return what a wave keeps of a token: input, residual, and the sum of its experts; ids, weights, order."""
        return 8 * self.model.hidden + 40 * self.model.top_k


_Key = TypeVar("_Key", bound=Hashable)


class _Held:
    """Bytes of weights as they lie in memory, in BF16."""

    def __init__(self, weights: Iterable[StoredWeight]) -> None:
        self.layers: dict[int, int] = {}
        """Of each layer without its routed experts."""
        self.experts: dict[tuple[int, int], int] = {}
        """Of each routed expert."""
        self.outside = 0
        """Of the largest weight outside the layers."""
        self.matrix = 0
        """Of the largest matrix of a layer."""
        for weight in weights:
            if (name := names.in_language_model(weight.main.name)) is not None:
                self._add(name, weight)

    def _add(self, name: str, weight: StoredWeight) -> None:
        layer, expert = names.layer(name), names.expert(names.split(name)[0])
        held = 2 * prod(weight.shape)
        if layer is None:
            self.outside = max(self.outside, held)
        elif expert is not None:
            _count(self.experts, (layer, expert), held)
        else:
            _count(self.layers, layer, held)
            self.matrix = max(self.matrix, held)


def _count(found: dict[_Key, int], key: _Key, nbytes: int) -> None:
    found[key] = found.get(key, 0) + nbytes
