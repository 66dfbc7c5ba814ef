"""Experts that saw too few tokens keep post-training rounding: what little they learnt would be noise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from k2quant.checkpoint.panels import panel_rows
from k2quant.checkpoint.reader import Checkpoint, open_checkpoint
from k2quant.checkpoint.weights import StoredWeight, group_tensors
from k2quant.kernels.codecs import reference
from k2quant.model.decoding import decoded_rows
from k2quant.qat.exporting.trained import key
from k2quant.qat.preparing import Prepared
from k2quant.qat.rounding.adapters import low_rank
from k2quant.qat.rounding.scales import learned_scale
from k2quant.qat.rounding.targets import Part, Target
from k2quant.qat.run.shards import is_sharded, like, whole


@torch.no_grad()
def restore(found: Prepared, experts: Sequence[str], base: Path, *, follow_links: bool = False) -> None:
    """Give experts the weights that training began with, and plain scales.

    Args:
        found: of a prepared model, sharded or not.
        experts: names such as `model.layers.3.mlp.experts.17`.
        base: the checkpoint that training began with.
        follow_links: whether its links may lead out of it.

    Raises:
        CheckpointError: it cannot be read.
    """
    if not experts:
        return
    source = open_checkpoint(base, follow_links=follow_links)
    weights = {key(weight): weight for weight in group_tensors(source.tensors).weights}
    chosen = set(experts)
    for target in found.targets:
        parts = [part for part in target.parts if part.base.rpartition(".")[0] in chosen]
        if parts:
            _restore(found, target, [(part, _decoded(source, weights[part.base])) for part in parts])
    found.refresh()


def _restore(found: Prepared, target: Target, values: list[tuple[Part, Tensor]]) -> None:
    _assign(target.master, values)
    if (update := low_rank(target)) is not None:
        high = whole(update.b)
        _assign(update.b, [(part, torch.zeros_like(part.of(high))) for part, _ in values])
    if (scale := learned_scale(target)) is not None:
        plain = [(part, reference.plain_int4_scale(value, "moonshot", found.bits)) for part, value in values]
        _assign(scale.start, plain)
        _assign(scale.ratio, [(part, torch.ones_like(value)) for part, value in plain])


def _assign(tensor: Tensor, values: list[tuple[Part, Tensor]]) -> None:
    """Write parts of a parameter, which may lie in shards."""
    full = whole(tensor)
    for part, value in values:
        part.of(full).copy_(value)
    if is_sharded(tensor):
        tensor.copy_(like(full, tensor, file="", name=""))


def _decoded(source: Checkpoint, weight: StoredWeight) -> Tensor:
    return torch.cat(list(_rows(source, weight)))


def _rows(source: Checkpoint, weight: StoredWeight) -> Iterator[Tensor]:
    yield from (decoded_rows(source, weight, start, stop) for start, stop in panel_rows(weight.shape))
