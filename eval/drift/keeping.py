"""What a killed search for blame keeps: what each pass measured, in a folder with a journal as `eval run` has it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from k2quant.eval.gating.verdict import Side
from k2quant.eval.runs.folder import JOURNAL, begin, held, tidy
from k2quant.eval.runs.identity import digest
from k2quant.eval.runs.journal import Journal
from k2quant.ground.version import __version__
from k2quant.model.passes.texts import Text


class Measurements:
    """Sums over chunks, by what was measured."""

    def __init__(self, journal: Journal | None) -> None:
        """Keep measurements.

        Args:
            journal: where they are kept; None for nowhere.
        """
        self._journal = journal

    def __len__(self) -> int:
        """How many there are."""
        return 0 if self._journal is None else len(self._journal)

    def get(self, what: Sequence[str], chunks: int) -> Tensor | None:
        """Return what was measured, float64 `[C]`; None where nothing was, or what stands there is no measurement."""
        found = None if self._journal is None else self._journal.get(digest(list(what)))
        if found is None or len(found) != chunks or not all(type(x) is float and math.isfinite(x) for x in found):
            return None
        return torch.tensor(found, dtype=torch.float64)

    def add(self, what: Sequence[str], sums: Tensor) -> None:
        """Keep a measurement, float64 `[C]`, whole and on the disk.

        Raises:
            OSError: it cannot be written.
        """
        if self._journal is not None:
            self._journal.add(digest(list(what)), sums.tolist())


@contextmanager
def measurements(
    folder: Path | None, identity: Callable[[], Mapping[str, Any]], *, soft_lock: bool
) -> Iterator[Measurements]:
    """Give the measurements of a folder, and keep others out of it while the block runs.

    Args:
        folder: made if need be; None to keep nothing.
        identity: returns all that measurements depend on; not called where nothing is kept.
        soft_lock: whether a file may be the lock where the file system has no others.

    Raises:
        OutputError: the folder is another's, or holds measurements of other models, another text or other settings.
    """
    if folder is None:
        yield Measurements(None)
        return
    with held(folder, soft_lock=soft_lock):
        begin(folder, identity())
        yield Measurements(Journal(folder / JOURNAL))


def asked(job: str, models: Sequence[str], base: Side, text: Text, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return all that a measurement depends on.

    Args:
        job: what is measured.
        models: what tells the baseline's content from any other's, and the candidate's.
        base: the baseline, whose tokenizer reads the text.
        text: what is read.
        settings: of the passes, and how the text was cut.
    """
    return {
        "k2quant": __version__,
        "job": job,
        "baseline": models[0],
        "candidate": models[1],
        "tokenizer": base.tokenizer_hash,
        "text": text.hash,
        "settings": {name: value if isinstance(value, int) else _plain(value) for name, value in settings.items()}
        | {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def _plain(value: object) -> str:
    """Return a device or a dtype by its name, whether torch's own or a string."""
    return str(value).removeprefix("torch.")


def discard_passes(folder: Path, *, soft_lock: bool = False) -> None:
    """Take measurements away: their result is written.

    Args:
        folder: `resume` of `find_blame`, which need not exist.
        soft_lock: whether a file may be the lock where the file system has no others.

    Raises:
        OutputError: the folder is another's, or in use.
    """
    if not folder.exists():  # there was nothing to measure
        return
    with held(folder, soft_lock=soft_lock):
        tidy(folder)
    with suppress(OSError):  # somebody has put something there
        folder.rmdir()
