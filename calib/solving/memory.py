"""How much memory and disk a pass that solves takes, and what a given amount allows. No torch is needed here.

    memory >= process + layer + layer-wide sums + workers x one expert + what is kept of each token + hidden states

- layer: the weights of the largest layer without its routed experts, and a piece of rows in attention.
- one expert: its weights, as they were and as they are solved, its Hessian and what factorising and solving make of it,
  a block of tokens, and outputs that wait to be added in the order of experts.
- what is kept of each token of a layer: its routing, and 8 H bytes, input, output and residual of its MLP. What memory
  has no room for lies in files.

Bytes of results depend on none of it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from k2quant.calib.collecting.memory import BLOCK, PROCESS, Sizes
from k2quant.calib.stats.layout import Input, inputs, place_of
from k2quant.calib.stats.model import Model
from k2quant.checkpoint.reader import Checkpoint
from k2quant.checkpoint.weights import group_tensors
from k2quant.errors import UsageError
from k2quant.ground.pool import checked_workers
from k2quant.ground.saying.showing import brief
from k2quant.ground.units import enough, size

KEPT = 2**15
"""Tokens of an expert whose h, and whose output where it waits for its turn, are kept rather than computed again."""

HELD = 256
"""Held-out tokens of an input that judge its matrices at most, evenly spaced. Of each the loss is summed over all rows,
so that a few hundred tell ways apart. At K2's sizes judging three ways takes a sixth of what gate and up take, and half
of what down does."""

_COPIES = 5
"""Arrays of a Hessian's size while it is solved: itself, blended, sorted, its factor, and the factor's work space."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a pass takes, and how it goes about it in the memory that it is given."""

    least: int
    """Bytes below which it does not work."""
    memory: int
    """Bytes that it may take."""
    workers: int
    """Routed experts that are solved at a time."""
    arrays: int
    """Bytes of what is kept of a layer's tokens, in memory or in files."""
    kept: int
    """Bytes of these in memory."""
    budget: int
    """Bytes of hidden states that are kept in memory beside the files."""
    hidden: int
    """Bytes of hidden states between two layers."""

    @property
    def in_files(self) -> int:
        """Bytes of what is kept of a layer's tokens that lie in files."""
        return self.arrays - self.kept

    @property
    def disk(self) -> int:
        """Bytes of files that a pass works with: hidden states before and behind a layer, and perhaps its tokens."""
        return 2 * self.hidden + self.in_files

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)


def needs(
    source: Checkpoint,
    *,
    rows: Sequence[int],
    length: int,
    bases: Collection[str],
    memory: int,
    workers: int | None = None,
) -> Needs:
    """Plan a pass.

    Args:
        source: the checkpoint; its headers and config alone are looked at.
        rows: how many of each part, train and validation.
        length: tokens of a row.
        bases: the matrices that are solved, by their names in the language model without suffix.
        memory: bytes that the pass may take.
        workers: experts that may be solved at a time; None: as many as there are cores. Where memory is short, fewer
            are.

    Raises:
        UsageError: `memory` is too small, with the least that works; or so many workers make no sense.
        CheckpointError: the checkpoint is no model.
    """
    asked = checked_workers(workers)
    taken = _Taken(Sizes(Model.of(source.config), group_tensors(source.tensors).weights, length), bases)
    tokens, held = sum(rows) * length, rows[-1] * length
    least = taken.bytes(1, tokens)
    if memory < least:
        raise UsageError(
            f"`memory=` is too small: solving this model, in rows of {length:,} tokens, takes at least "
            f"{enough(least)}, found {size(memory)}"
        )
    workers = max(count for count in range(1, asked + 1) if taken.bytes(count, tokens) <= memory)
    arrays = kept_of_tokens(tokens, held, taken.model.hidden)
    left = memory - taken.bytes(workers, tokens)
    kept = in_memory(arrays, left)
    return Needs(
        least=least,
        memory=memory,
        workers=workers,
        arrays=sum(arrays.values()),
        kept=kept,
        budget=left - kept,
        hidden=tokens * taken.model.hidden * 2,
    )


def kept_of_tokens(tokens: int, held: int, hidden: int) -> dict[str, int]:
    """Return the bytes of what is kept of the tokens of a layer, by name, what is read most often first.

    Args:
        tokens: all of them.
        held: those that are held out.
        hidden: columns of each.
    """
    state = tokens * hidden
    return {"x": 2 * state, "out": 4 * state, "residual": 2 * state, "aside": 4 * held * hidden}


def in_memory(arrays: Mapping[str, int], memory: int) -> int:
    """Return how many bytes of what is kept lie in memory: each in turn, if what is left holds it."""
    left = memory
    for nbytes in arrays.values():
        left -= nbytes if nbytes <= left else 0
    return memory - left


class _Taken:
    """Bytes of what a pass holds."""

    def __init__(self, sizes: Sizes, bases: Collection[str]) -> None:
        self._sizes, self.model = sizes, sizes.model
        wanted = {(place.layer, place.input) for base in bases if (place := place_of(base)) is not None}
        layers = {layer for layer, _ in wanted}
        found = [one for layer in layers if layer < self.model.layers for one in inputs(self.model, layer)]
        names = {name for _, name in wanted}
        self._inputs: set[tuple[bool, int, int]] = {
            (one.experts is not None, one.width, rows)
            for one in found
            if one.name in names
            for rows in [max(self._rows(one))]
        }
        """Of those that are solved: whether they are routed experts', columns, and rows of what multiplies them."""

    def _rows(self, one: Input) -> Iterator[int]:
        """Yield the rows of the matrices that multiply an input."""
        model, last = self.model, one.name.rpartition(".")[2]
        inner = model.inner if one.experts else model.dense if ".shared_experts." not in one.name else model.shared
        heads = int(model.config["num_attention_heads"])
        nope, rope, value = (int(model.config[f"{name}_head_dim"]) for name in ("qk_nope", "qk_rope", "v"))
        yield {
            "gate_proj": 2 * inner,
            "q_a_proj": (model.query or heads * (nope + rope)) + model.latent + rope,
            "q_b_proj": heads * (nope + rope),
            "kv_b_proj": heads * (nope + value),
        }.get(last, model.hidden)

    def bytes(self, workers: int, tokens: int) -> int:
        """Return what so many experts at a time take, what is kept of each token but its routing aside."""
        model = self.model
        plain = max((self._solving(width, rows) for routed, width, rows in self._inputs if not routed), default=0)
        one = max((self._solving(width, rows) for routed, width, rows in self._inputs if routed), default=0)
        kept = min(tokens, KEPT)
        inner = max(model.dense, model.shared)
        whole = plain + self._block(inner) + 2 * kept * inner
        expert = one + 2 * self._sizes.expert + self._block(model.inner) + 2 * kept * (model.inner + 2 * model.hidden)
        wide = 4 * model.hidden**2 + 2 * HELD * model.hidden if one else 0
        routing = 40 * model.top_k * tokens if one else 24 * tokens
        layer = self._sizes.layer() + routing + max(whole, wide + workers * expert)
        return PROCESS + max(layer, self._sizes.outside())

    @staticmethod
    def _solving(width: int, rows: int) -> int:
        """Return the bytes of solving: Hessians; weights in float32, errors, values, scales; tokens that judge."""
        return 4 * _COPIES * width**2 + rows * width * 14 + HELD * (2 * width + 8 * rows)

    def _block(self, inner: int) -> int:
        return BLOCK * (16 * self.model.hidden + 18 * inner)
