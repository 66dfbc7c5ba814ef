"""Experts that saw too few tokens keep post-training rounding: what little they learnt would be noise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from k2quant.checkpoint.panels import panel_rows
from k2quant.checkpoint.reader import Checkpoint, open_checkpoint
from k2quant.checkpoint.weights import StoredWeight, group_tensors
from k2quant.model.decoding import decoded_rows
from k2quant.qat.exporting.starting import PostTraining, take_over
from k2quant.qat.exporting.trained import key
from k2quant.qat.preparing import Prepared


@torch.no_grad()
def restore(
    found: Prepared,
    experts: Sequence[str],
    base: Path,
    *,
    post_training: PostTraining | None = None,
    follow_links: bool = False,
) -> None:
    """Give experts the weights that training began with, rounded as a model is that was not trained.

    Args:
        found: of a prepared model, sharded or not.
        experts: names such as `model.layers.3.mlp.experts.17`.
        base: the checkpoint that training began with.
        post_training: how they are rounded; None: by the plain rule.
        follow_links: whether its links may lead out of it.

    Raises:
        CheckpointError: it cannot be read.
    """
    if not experts:
        return
    source, how = open_checkpoint(base, follow_links=follow_links), post_training or PostTraining()
    weights = {key(weight): weight for weight in group_tensors(source.tensors).weights}
    chosen = set(experts)
    for target in found.targets:
        parts = [part for part in target.parts if part.base.rpartition(".")[0] in chosen]
        if parts:
            bits = found.bits
            values = ((part, how.rounded(part.base, _decoded(source, weights[part.base]), bits)) for part in parts)
            take_over(target, values, bits)
    found.refresh()


def _decoded(source: Checkpoint, weight: StoredWeight) -> Tensor:
    return torch.cat(list(_rows(source, weight)))


def _rows(source: Checkpoint, weight: StoredWeight) -> Iterator[Tensor]:
    yield from (decoded_rows(source, weight, start, stop) for start, stop in panel_rows(weight.shape))
