"""A population of held-out items that nano-K2 answers, whole and with damage planted in it.

What a resample of it is drawn from is all that there is: the drop of a plant over the population is the exact truth.
"""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from k2quant.kernels.ops import fake_quantize_int4
from k2quant.nano import writing
from k2quant.nano.rounding import rounded
from k2quant.nano.scoring import score
from k2quant.nano.tasks import Item, exam

LAYER, EXPERT = 1, 3  # where the damage of one expert sits
AT_ONCE, OTHER = 256, 61  # items of a forward pass: as the scorer has it, and of the second run of an A/A pair
GROUP = 32  # columns of a scale
WHOLE, AGAIN, SHORT, SHORT_AGAIN = "BF16", "other batches", "BF16 sums", "BF16 sums, other batches"

Right = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A baseline and a candidate on all items of the population."""

    name: str
    base: Right
    candidate: Right

    @property
    def lost(self) -> float:
        """Share of items only the baseline has right."""
        return float((self.base & ~self.candidate).mean())

    @property
    def gained(self) -> float:
        """Share of items only the candidate has right."""
        return float((self.candidate & ~self.base).mean())

    @property
    def drop(self) -> float:
        """The true drop."""
        return self.lost - self.gained

    @property
    def flips(self) -> float:
        """The true share of flips."""
        return self.lost + self.gained


def _experts(model: Any, layer: int = LAYER) -> Any:
    return model.model.layers[layer].mlp.experts


def _scaled_group(model: Any) -> Any:
    """One scale of one expert's down_proj is 16 times too large: a group of 32 weights of one row."""
    _experts(model).down_proj[EXPERT, 7, :GROUP] *= 16
    return model


def _scaled_column(model: Any) -> Any:
    """The first scale of every row of one expert's down_proj is 16 times too large."""
    _experts(model).down_proj[EXPERT, :, :GROUP] *= 16
    return model


def _swapped(model: Any) -> Any:
    """Routed experts in INT4, and one of them read with the nibbles of each byte swapped: neighbours change places."""
    model = rounded(model, 4, "routed")
    for weight in (_experts(model).gate_up_proj, _experts(model).down_proj):
        rows = fake_quantize_int4(weight[EXPERT].bfloat16(), bits=4)
        # Both nibbles of a byte have the same scale, so their values change places as their codes do.
        weight[EXPERT] = rows.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return model


def _no_bias(model: Any) -> Any:
    """The router's correction bias is gone in all layers."""
    for layer in model.model.layers[1:]:
        layer.mlp.gate.e_score_correction_bias.zero_()
    return model


def _no_shared(model: Any) -> Any:
    """The shared experts give nothing, in all layers."""
    for layer in model.model.layers[1:]:
        layer.mlp.shared_experts.down_proj.weight.zero_()
    return model


PLANTS: dict[str, Callable[[Any], Any]] = {
    "INT4, routed experts": lambda model: rounded(model, 4, "routed"),
    "INT2, routed experts": lambda model: rounded(model, 2, "routed"),
    "INT4, all projections": lambda model: rounded(model, 4, "all"),
    "INT3, all projections": lambda model: rounded(model, 3, "all"),
    "INT2, all projections": lambda model: rounded(model, 2, "all"),
    "one scale x 16": _scaled_group,
    "one column of scales x 16": _scaled_column,
    "swapped nibbles, one expert": _swapped,
    "no router bias": _no_bias,
    "no shared expert": _no_shared,
}
"""What is planted, by name: each takes a copy of the model and returns what became of it."""


def _answers(model: Any, items: Sequence[Item], at_once: int = AT_ONCE) -> Right:
    """Return for each item whether the answer is right; only as many items as said share a forward pass."""
    if at_once == AT_ONCE:
        return np.array(score(model, items).right)
    parts = [score(model, items[first : first + at_once]).right for first in range(0, len(items), at_once)]
    return np.array([right for part in parts for right in part])


@torch.no_grad()
def answers(folder: Path, count: int, tell: Callable[[str], None]) -> dict[str, Right]:
    """Score a nano-K2 whole, with each damage, and again with other batches and sums.

    Args:
        folder: what `k2quant nano` wrote.
        count: held-out items of each family and level.
        tell: is told what is done.
    """
    model, items = writing.load(folder), exam(count)
    found: dict[str, Right] = {}

    def note(name: str, made: Any, at_once: int = AT_ONCE) -> None:
        begun = time.perf_counter()
        found[name] = _answers(made, items, at_once)
        tell(f"{name}: {found[name].mean():.2%} of {len(items):,} right, {time.perf_counter() - begun:.0f} s")

    note(WHOLE, model)
    for name, plant in PLANTS.items():
        note(name, plant(copy.deepcopy(model)))
    note(AGAIN, model, OTHER)
    short = copy.deepcopy(model).bfloat16()
    note(SHORT, short)
    note(SHORT_AGAIN, short, OTHER)
    return found


def kept_answers(folder: Path, count: int, file: Path, tell: Callable[[str], None]) -> dict[str, Right]:
    """Return what `answers` does; from a file, if the same model, items and damage made it."""
    key = _key(folder, count)
    if file.exists():
        with np.load(file) as kept:
            if str(kept["key"]) == key:
                tell(f"answers of {file} are those of this model")
                return {name: kept[name] for name in kept.files if name != "key"}
    found: dict[str, Any] = answers(folder, count, tell)
    np.savez_compressed(file, key=np.array(key), **found)
    return found


def _key(folder: Path, count: int) -> str:
    """Return a hash of all that answers depend on: weights, items, and this file."""
    digest = hashlib.sha256(f"{count} ".encode() + Path(__file__).read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def pairs(found: dict[str, Right]) -> tuple[list[Pair], list[Pair]]:
    """Return the plants beside the whole model, and the A/A pairs: the same weights twice."""
    plants = [Pair(name=name, base=found[WHOLE], candidate=found[name]) for name in PLANTS]
    same = {
        f"A/A, FP32 sums, batches of {AT_ONCE} and {OTHER}": (WHOLE, AGAIN),
        f"A/A, BF16 sums, batches of {AT_ONCE} and {OTHER}": (SHORT, SHORT_AGAIN),
        "A/A, FP32 sums and BF16 sums": (WHOLE, SHORT_AGAIN),
    }
    return plants, [Pair(name=name, base=found[one], candidate=found[other]) for name, (one, other) in same.items()]
