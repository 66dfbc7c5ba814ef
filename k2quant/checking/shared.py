"""Whether matrices that engines lay into one have one scale, where a format has a scale for a whole matrix."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from k2quant.checkpoint.panels import read_whole
from k2quant.ground import engines

if TYPE_CHECKING:
    from k2quant.checkpoint.reader import Checkpoint
    from k2quant.checkpoint.weights import StoredWeight


def unlike_scales(checkpoint: Checkpoint, weights: Iterable[StoredWeight]) -> dict[str, tuple[str, str]]:
    """Return the weights whose whole scales are not those of another that engines lay into one matrix with them.

    Engines take one of the two for both: the weights of the other come out wrong.

    Args:
        checkpoint: that holds them.
        weights: its weights.

    Returns:
        by the name of a weight's main tensor, its base and that of the other, the first of its kind.

    Raises:
        CheckpointError: a shard cannot be read.
    """
    first: dict[tuple[str, str], tuple[str, bytes]] = {}
    found: dict[str, tuple[str, str]] = {}
    for weight in weights:
        if weight.format is None or not weight.format.together:
            continue
        shared = engines.scaled_together(weight.base)
        if shared is None:
            continue
        scales = _whole(checkpoint, weight)
        other, its = first.setdefault((weight.format.label, shared), (weight.base, scales))
        if its != scales:
            found[weight.main.name] = (weight.base, other)
    return found


def _whole(checkpoint: Checkpoint, weight: StoredWeight) -> bytes:
    """Return the bytes of the tensors that every panel of a weight has whole, a few for each."""
    return b"".join(array.tobytes() for array in read_whole(checkpoint, weight).values())
