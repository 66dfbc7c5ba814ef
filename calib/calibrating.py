"""`calibrate`: from a checkpoint and data to a folder of statistics."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from k2quant.calib.collecting import Collected, collect
from k2quant.calib.inputs import Reasoning, Samples, read_samples
from k2quant.calib.inputs.choosing import check_rows
from k2quant.checkpoint.reader import open_checkpoint
from k2quant.checkpoint.remote.address import Address, spot
from k2quant.conversion.resume import refuse_nested
from k2quant.ground.saying.meter import TOKENS
from k2quant.ground.saying.progress import Asked, barred, told
from k2quant.ground.saying.showing import as_html, brief
from k2quant.ground.units import parse_size
from k2quant.model.architecture import architecture
from k2quant.model.generation import load_tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What a calibration came to."""

    folder: Path
    """With the statistics."""
    samples: Samples
    """What was read."""
    collected: Collected
    """What the pass came to."""
    seconds: float
    """That the pass took."""

    @property
    def already_done(self) -> bool:
        """Whether the folder was finished before, so that nothing was written."""
        return self.collected.measured == 0

    @property
    def resumed(self) -> int:
        """Layers that an earlier run had finished, where this one went on from them; else 0."""
        return 0 if self.already_done else self.collected.layers - self.collected.measured

    def facts(self) -> dict[str, object]:
        """Return what it comes to, in a few words."""
        return {"folder": str(self.folder), "train": self.samples.train, "validation": self.samples.validation}

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)

    def _repr_html_(self) -> str:
        """Return it as a small table, for notebooks."""
        return as_html(self)


@barred("calibrate", TOKENS)
def calibrate(
    source: str | os.PathLike[str] | Address,
    stats: str | os.PathLike[str],
    *,
    data: str | os.PathLike[str],
    samples: int = 512,
    length: int = 2048,
    validation: str | os.PathLike[str] | None = None,
    test: str | os.PathLike[str] | None = None,
    split: str = "train",
    config_name: str | None = None,
    reasoning: Reasoning = "split",
    hessians: bool = False,
    memory: int | str = "32GB",
    device: str = "cpu",
    follow_links: bool = False,
    restart: bool = False,
    soft_lock: bool = False,
    trust_remote_code: bool = False,
    stage: Callable[[str], None] | None = None,
    progress: Asked = None,
) -> Calibration:
    """Run data through a checkpoint, a layer at a time, and write what goes into each of its matrices.

    The same call after a kill goes on after the last whole layer and writes equal bytes; on a finished folder it does
    nothing. `k2quant.calib.inputs.read_samples` says how data is read and parted.

    Args:
        source: folder of the checkpoint, in any format.
        stats: folder to write; empty, new, or of an earlier run of the same call.
        data: a file in JSON Lines or of plain text, a folder of such, or a dataset.
        samples: rows that are measured, at most.
        length: tokens of a row.
        validation: data that judges, in place of a tenth of the documents.
        test: data that is kept for a final figure, likewise.
        split: of a dataset.
        config_name: of a dataset that has several configurations.
        reasoning: what becomes of reasoning that the chat template drops: `split` or `drop`.
        hessians: whether products of all pairs of columns are summed too, by which `convert` then judges; `solve`
            sums its own.
        memory: bytes, or a size such as `32GB`, that the pass may take.
        device: where layers compute.
        follow_links: whether links of the checkpoint's folder may lead out of it.
        restart: whether to throw away what an earlier run left in `stats`.
        soft_lock: where its file system has no locks, lock the folder by a file, as `convert` does.
        trust_remote_code: whether the tokenizer's own Python code may run.
        stage: called with what is being done before the pass, and with notes on the data.
        progress: called with tokens through layers, done and all; True for a bar.

    Raises:
        UsageError: an option makes no sense, `memory` is too small, or a part of the data gets no document.
        CheckpointError: the checkpoint or the data cannot be used; see `read_samples`.
        MissingExtra: `data` is a dataset, and `datasets` is not installed.
        DestinationForeign, DestinationStale, DestinationInUse: `stats` is not for this run to write.
        OutputError: the disk is full or fails.
    """
    say = stage or _quiet
    place, folder = spot(source), Path(stats)
    refuse_nested(place, folder)
    limit = parse_size(memory) if isinstance(memory, str) else memory
    checkpoint = open_checkpoint(place, follow_links=follow_links)
    config = architecture(checkpoint)
    check_rows(samples, length, longest=config.max_position_embeddings)
    say("reading the data")
    read = read_samples(
        data,
        load_tokenizer(checkpoint.folder, trust_remote_code=trust_remote_code, follow_links=follow_links),
        samples=samples,
        length=length,
        vocabulary=config.vocab_size,
        validation=validation,
        test=test,
        split=split,
        config_name=config_name,
        reasoning=reasoning,
    )
    for note in read.notes():
        say(f"note: {note}")
    say(f"{place.name}, through its layers")
    begun = time.monotonic()
    done = collect(
        checkpoint,
        folder,
        read,
        hessians=hessians,
        memory=limit,
        device=device,
        restart=restart,
        soft_lock=soft_lock,
        progress=told(progress),
    )
    return Calibration(folder=folder, samples=read, collected=done, seconds=time.monotonic() - begun)


def _quiet(_: str) -> None:
    """Tell nobody."""
