"""How restless the codes of a sample of weights are while they train.

A weight near the border of two codes may be pushed across it and back for ever; Nagel et al. 2022 (arXiv 2203.11086)
describe this and what it costs at 4 bits and below. The rule here is our own and simple: a code that changes has
flipped; one that changes against the direction of its last change, at most `WINDOW` observations later, oscillates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from k2quant.errors import MissingTensor, ShapeMismatch

WINDOW = 16
"""Observations within which a change back counts. A choice: long enough for an oscillation that takes a few steps each
way, short enough that a weight which wandered off and came back in the course of training is not one."""


class Counts(NamedTuple):
    """Weights of a sample."""

    weights: int
    flipped: int
    """Whose code ever changed."""
    oscillating: int
    """Whose code changed back."""


@dataclass(slots=True)
class _Track:
    """What is known of the weights of a sample, each tensor of the sample's shape."""

    codes: Tensor
    """int8, as they were last seen."""
    direction: Tensor
    """int8: sign of the last change; 0 for none."""
    changed: Tensor
    """int32: observation of the last change."""
    flipped: Tensor
    """bool."""
    oscillating: Tensor
    """bool."""

    @classmethod
    def begin(cls, codes: Tensor) -> _Track:
        """Take the first codes."""
        return cls(
            codes.clone(),
            torch.zeros_like(codes),
            torch.zeros_like(codes, dtype=torch.int32),
            *(torch.zeros_like(codes, dtype=torch.bool) for _ in range(2)),
        )

    def rebase(self, codes: Tensor) -> None:
        """Take codes that cannot be compared with those before."""
        self.codes.copy_(codes)
        self.direction.zero_()

    def update(self, codes: Tensor, now: int) -> None:
        """Compare with the codes before."""
        sign = (codes.to(torch.int16) - self.codes).sign().to(torch.int8)  # -128 to 127 is more than int8 holds
        moved = sign != 0
        self.flipped |= moved
        self.oscillating |= moved & (sign == -self.direction) & (now - self.changed <= WINDOW)
        self.direction.copy_(torch.where(moved, sign, self.direction))
        self.changed.masked_fill_(moved, now)
        self.codes.copy_(codes)


class Oscillation:
    """Watches the codes of a fixed sample of each of some tensors, on their device.

    Nothing here waits for the device but what gives the codes may: a rounding that refuses NaN has to look for it.
    """

    def __init__(self, sample: Mapping[str, Callable[[], Tensor]]) -> None:
        """Name what is watched; the first `observe` is what the second compares with.

        Args:
            sample: by a tensor's name, what returns the codes of its sample now, int8, always of the same shape.
        """
        self._sample = dict(sample)
        self._tracks: dict[str, _Track] = {}
        self._observations = 0
        self._rebasing = False

    @torch.no_grad()
    def observe(self) -> None:
        """Look at the codes: once before the first step, then after each, or after every n-th."""
        for name, codes in self._sample.items():
            now = codes()
            if name not in self._tracks:
                self._tracks[name] = _Track.begin(now)
            elif self._rebasing:
                self._tracks[name].rebase(now)
            else:
                self._tracks[name].update(now, self._observations)
        self._rebasing = False
        self._observations += 1

    def rebase(self) -> None:
        """Have the next `observe` compare with nothing: between it and the last, the codes got another width."""
        self._rebasing = True

    def counts(self) -> dict[str, Counts]:
        """Return how many weights of each sample flipped and oscillate; a sample that was never seen is left out."""
        return {
            name: Counts(track.codes.numel(), int(track.flipped.sum()), int(track.oscillating.sum()))
            for name, track in self._tracks.items()
        }

    def state(self) -> dict[str, Tensor]:
        """Return what `restore` needs to go on, as plain tensors on the CPU."""
        parts = {
            f"{name}.{field.name}": getattr(track, field.name).to("cpu", copy=True)
            for name, track in self._tracks.items()
            for field in fields(_Track)
        }
        return parts | {"observations": torch.tensor([self._observations, self._rebasing], dtype=torch.int64)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` returned.

        Raises:
            MissingTensor: it is of another sample.
            ShapeMismatch: a sample has another shape.
        """
        observations, rebasing = _part(state, "observations", (2,), torch.int64).tolist()
        tracks = {name: _restored(name, codes(), state) for name, codes in self._sample.items()} if observations else {}
        self._tracks, self._observations, self._rebasing = tracks, observations, bool(rebasing)


def _restored(name: str, codes: Tensor, state: Mapping[str, Tensor]) -> _Track:
    track = _Track.begin(codes)
    for field in fields(_Track):
        part = getattr(track, field.name)
        part.copy_(_part(state, f"{name}.{field.name}", tuple(part.shape), part.dtype))
    return track


def _part(state: Mapping[str, Tensor], name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if name not in state:
        raise MissingTensor("the state of other codes", tensor=name, remedy="resume with the options of the first run")
    part = state[name]
    if tuple(part.shape) != shape or part.dtype != dtype:
        raise ShapeMismatch(tensor=name, expected=f"{dtype} {shape}", found=f"{part.dtype} {tuple(part.shape)}")
    return part
