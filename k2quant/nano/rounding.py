"""What rounding to nearest does to a nano-K2: the yardstick that any better quantisation is held against."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from transformers import DeepseekV3ForCausalLM

from k2quant.errors import UsageError
from k2quant.ground.names import is_projection
from k2quant.ground.units import one_of
from k2quant.kernels.ops import fake_quantize_int4
from k2quant.nano import writing
from k2quant.nano.scoring import Score, mean, score
from k2quant.nano.tasks import Item

Which = Literal["routed", "all"]
"""The routed experts' projections, as Kimi K2's INT4 releases have it, or every projection that any release rounds."""

BITS = (8, 4, 3, 2)

_ROUTED = (".mlp.experts.gate_up_proj", ".mlp.experts.down_proj")
"""Endings of the parameters that hold all experts of a layer, `[E, out, in]`."""


@torch.no_grad()
def rounded(model: DeepseekV3ForCausalLM, bits: int, which: Which = "routed") -> DeepseekV3ForCausalLM:
    """Return a copy of a model whose weights lie on the grid of so many bits: groups of 32, `moonshot`'s rule.

    Args:
        model: BF16 values in any floating dtype.
        bits: 8, 4, 3 or 2.
        which: the weights to round.

    Returns:
        A model of the same dtype.

    Raises:
        UsageError: there is no such width or choice, or the model has no such weights.
    """
    one_of("choice of weights", which, get_args(Which))
    result = copy.deepcopy(model)
    chosen = [weight for name, weight in result.named_parameters() if _is_chosen(name, which)]
    if not chosen:
        raise UsageError("the model has no weights to round; expected a BF16 model")
    for weight in chosen:
        weight.copy_(_rounded(weight, bits))
    return result


def _is_chosen(name: str, which: Which) -> bool:
    return name.endswith(_ROUTED) or (which == "all" and is_projection(name.removesuffix(".weight")))


def _rounded(weight: nn.Parameter, bits: int) -> Tensor:
    rows = weight.detach().bfloat16().flatten(0, -2)
    return fake_quantize_int4(rows, bits=bits).view(weight.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table."""

    which: Which | None
    """None for the model as it is."""
    bits: int
    score: Score
    gap: tuple[float, float]
    """How much more the answers cost than the model's own, item by item: mean and standard error, in nats."""


def rounding_table(folder: Path, items: Iterable[Item]) -> list[Row]:
    """Score a nano-K2 as it is and rounded to every number of bits, on the same items.

    Args:
        folder: what `k2quant nano` wrote.
        items: such as `tasks.exam(256)`.
    """
    model, items = writing.load(folder), list(items)
    plain = score(model, items)
    rows = [Row(which=None, bits=16, score=plain, gap=(0.0, 0.0))]
    ways: tuple[Which, ...] = ("routed", "all")
    for which in ways:
        for bits in BITS:
            found = score(rounded(model, bits, which), items)
            gaps = [after - before for after, before in zip(found.losses, plain.losses, strict=True)]
            rows.append(Row(which=which, bits=bits, score=found, gap=mean(gaps)))
    return rows
