"""The pass that solves, over a nano-K2 and one draw of documents, with what it settles kept in memory."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from k2quant.calib.inputs import Samples, read_samples
from k2quant.calib.solving.choosing import Settled
from k2quant.calib.solving.passing import Pass
from k2quant.calib.solving.settings import Settings
from k2quant.calib.solving.solve import solve
from k2quant.checkpoint.reader import open_checkpoint
from k2quant.conversion.convert import convert
from k2quant.model.generation import load_tokenizer
from k2quant.nano import vocabulary
from suites.calib import samples, truth
from suites.calib.proof import LENGTH

MEMORY = 4_000_000_000


class Kept:
    """A sink in memory."""

    def __init__(self) -> None:
        """Hold nothing yet."""
        self.found: dict[str, Settled] = {}

    def find(self, base: str) -> None:
        """Return that nothing stands: nothing is solved twice."""

    def put(self, layer: int, found: Mapping[str, Settled]) -> None:  # noqa: ARG002  as the pass calls it
        """Hold matrices."""
        self.found |= found


def data_of(workdir: Path, seed: int, draw: int, documents: int = samples.DOCUMENTS) -> Path:
    """Return the file of a draw; it is written if it is not there yet."""
    path = workdir / "data" / f"{seed}-{draw}.jsonl"
    return path if path.exists() else samples.write_draw(path, seed, draw, documents)


def read(workdir: Path, folder: Path, seed: int, draw: int, documents: int = samples.DOCUMENTS) -> Samples:
    """Return what a model is calibrated on in a draw, in the parts that `calibrate` makes of it."""
    data, tokenizer = data_of(workdir, seed, draw, documents), load_tokenizer(folder)
    return read_samples(data, tokenizer, samples=documents, length=LENGTH, vocabulary=vocabulary.SIZE)


def solved(
    folder: Path, given: Samples, bases: Collection[str], settings: Settings, workers: int | None = None
) -> dict[str, Settled]:
    """Return what the pass makes of a checkpoint's matrices, by base."""
    sink = Kept()
    with tempfile.TemporaryDirectory() as work:
        source = open_checkpoint(folder)
        walk = Pass(source, given, bases, settings, sink=sink, work=Path(work), memory=MEMORY, workers=workers)
        while walk.next < walk.layers:
            walk.advance()
    return sink.found


@torch.no_grad()
def with_values(model: Any, found: Mapping[str, Settled]) -> Any:
    """Return a copy of a model with the matrices that were settled."""
    result = copy.deepcopy(model)
    for base, matrix in truth.matrices(result).items():
        if base in found:
            matrix.copy_(found[base].values)
    return result


def written(folder: Path, data: Path, destination: Path, documents: int = samples.DOCUMENTS) -> dict[str, torch.Tensor]:
    """Return the values, by base, of the checkpoint that `k2quant.calib.solve` writes of the same documents."""
    solve(folder, destination, "int4", data=data, samples=documents, length=LENGTH, memory=MEMORY, scope="projections")
    decoded = destination.with_name(f"{destination.name}-bf16")
    convert(destination, decoded, "bf16")
    return truth.matrices(truth.load(decoded))
