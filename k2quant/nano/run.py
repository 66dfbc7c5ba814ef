"""`k2quant nano` from its first check to its last line."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from k2quant.ground.saying.showing import brief
from k2quant.nano import tasks, training, writing
from k2quant.nano.scoring import Score, score

EXAM = 100
"""Held-out items of each family and level."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What was trained, and how well it answers."""

    folder: Path
    steps: int
    seed: int
    seconds: float
    """Of the training alone."""
    parameters: int
    score: Score
    """Of `tasks.exam`, by the weights that were written."""

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)

    def rows(self) -> Iterator[list[str]]:
        """Yield a row for each family: its name, all levels with their interval, then each level."""
        for family in tasks.FAMILIES:
            whole = self.score.accuracy(family)
            low, high = whole.interval
            levels = [f"{self.score.accuracy(family, level).share:.0%}" for level in tasks.LEVELS]
            yield [family, f"{whole.share:.1%}", f"{low:.1%}-{high:.1%}", *levels]

    @property
    def summary(self) -> dict[str, Any]:
        """The same for machines: shares from 0 to 1, losses in nats."""
        loss, error = self.score.loss
        families = {family: self.score.accuracy(family) for family in tasks.FAMILIES}
        return {
            "folder": str(self.folder),
            "steps": self.steps,
            "seed": self.seed,
            "seconds": round(self.seconds, 1),
            "parameters": self.parameters,
            "loss": loss,
            "loss_standard_error": error,
            "accuracy": {
                name: {"right": it.right, "count": it.count, "share": it.share, "interval": it.interval}
                for name, it in families.items()
            },
        }


def run(
    folder: Path,
    *,
    steps: int | None = None,
    seed: int = 0,
    exam: int = EXAM,
    soft_lock: bool = False,
    progress: Callable[[int, int, float], None] | None = None,
) -> Result:
    """Train, write and score a nano-K2.

    Args:
        folder: where; it must be empty, not there, or a nano's.
        steps: of the training; None for the default of `training.Recipe`.
        seed: of weights and items.
        exam: held-out items of each family and level to score.
        soft_lock: where the file system has no locks, lock the folder by a file.
        progress: is told the steps done, all steps and the last loss.

    Raises:
        UsageError: steps or seed make no sense.
        DestinationForeign: the folder holds something that no `k2quant nano` wrote.
        DestinationInUse: another run trains for it.
    """
    recipe = training.Recipe(seed=seed) if steps is None else training.Recipe(seed=seed, steps=steps)
    with writing.claimed(folder, soft_lock=soft_lock):
        begun = time.perf_counter()
        model = training.train(recipe, progress=progress)
        seconds = time.perf_counter() - begun
        writing.write(folder, model, {"steps": recipe.steps, "seed": recipe.seed, "torch": torch.__version__})
    return Result(
        folder=folder,
        steps=recipe.steps,
        seed=seed,
        seconds=seconds,
        parameters=model.num_parameters(),
        score=score(writing.load(folder), tasks.exam(exam)),
    )
