"""The models, and the texts they are calibrated and tested on: nano-K2's own tasks, by seeds that never meet."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from k2quant.nano import tasks
from k2quant.nano.batches import mixture
from k2quant.nano.run import run
from k2quant.nano.tasks import Item

SEEDS = (0, 1, 2, 3, 4)
"""Of models: weights and what they are trained on."""
DRAWS = (0, 1, 2)
"""Of documents to calibrate on, for each model."""
WIDTHS = (4, 3, 2)
"""Bits of a code: what is shipped, and two that stress the methods."""
DOCUMENTS = 2000
"""Of a draw, some 17 tokens each; a tenth is held out for rule 6, another for nothing here."""
TESTED = 60
"""Questions of each family and level in the test, 1,080 in all: none was trained on or calibrated on."""

LONGEST = 64
"""Tokens that no document has more of."""

_FIRST_DRAW = 50_000  # far from the seeds of training
_TEST = 7_777


def tell(text: str) -> None:
    """Say how far it is."""
    print(text, file=sys.stderr, flush=True)


def bases(workdir: Path, seeds: Sequence[int] = SEEDS) -> dict[int, Path]:
    """Return the folder of each model, trained where it is not there yet: three minutes each on two idle cores."""
    folders = {seed: workdir / f"seed-{seed}" for seed in seeds}
    for seed, folder in folders.items():
        if not (folder / "config.json").exists():
            tell(f"nano-K2 of seed {seed}")
            run(folder, seed=seed)
    return folders


def write_draw(path: Path, seed: int, draw: int, count: int = DOCUMENTS) -> Path:
    """Write what a model is calibrated on in one draw, a JSON line a document, and return the path."""
    source = _FIRST_DRAW + 100 * seed + draw
    return _written(path, list(islice(mixture(source), count)))


def exam(count: int = TESTED) -> list[Item]:
    """Return the items of the test."""
    return tasks.exam(count, seed=_TEST)


def write_tested(path: Path, count: int = TESTED) -> Path:
    """Write the items of the test as prompts and completions, as `k2quant eval fidelity` reads them."""
    return _written(path, exam(count))


def _written(path: Path, items: list[Item]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"prompt": item.question, "completion": item.answer}) + "\n" for item in items)
    path.write_text("".join(lines))
    return path
