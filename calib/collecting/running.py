"""`collect`: run the data through a checkpoint, a layer at a time, and write what goes into its matrices.

After each layer its statistics are written, then its hidden states are whole: a run that is killed goes on from there,
and writes the same bytes. What makes it the same run is told by what was read: settings and data by the folder's own
journal, weights by their digests, those of the layers that are done and of the embedding.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from k2quant.calib.collecting.attention import IMPLEMENTATION
from k2quant.calib.collecting.memory import Needs, needs
from k2quant.calib.collecting.pieces import segments
from k2quant.calib.collecting.walking import Walk, digests
from k2quant.calib.stats.digests import Digests, base_of
from k2quant.calib.stats.layout import MANIFEST, PARTS, stats_bytes
from k2quant.calib.stats.manifest import DataPart, Manifest, canonical
from k2quant.calib.stats.model import Model
from k2quant.calib.stats.reading import open_stats
from k2quant.calib.stats.writing import calibrating, finish, write_outside
from k2quant.checkpoint.files.paths import as_output_error, nearest_folder
from k2quant.checkpoint.reader import Checkpoint
from k2quant.checkpoint.weights import group_tensors
from k2quant.errors import DestinationStale, OutputError, UsageError
from k2quant.ground.saying.showing import brief
from k2quant.ground.units import size
from k2quant.ground.version import __version__
from k2quant.kernels.devices.precision import whole_float32
from k2quant.model.loading import assemble
from k2quant.model.passes.activations import Activations
from k2quant.model.placement import execution_device

if TYPE_CHECKING:
    from k2quant.calib.inputs import Samples
    from k2quant.ground.saying.progress import Progress

_WORK = ".k2quant"
_HIDDEN = "hidden"
"""Below the folder where a half-finished calibration keeps its lock: its hidden states."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """What a pass came to."""

    folder: Path
    """Where the statistics lie."""
    layers: int
    """Layers of the model."""
    measured: int
    """Those among them that were measured by this call; the others stood there."""
    tokens: Mapping[str, int]
    """Tokens of each part that were measured."""
    needs: Needs
    """How it went about it."""

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)


def collect(
    source: Checkpoint,
    stats: Path,
    samples: Samples,
    *,
    hessians: bool = False,
    memory: int,
    device: str | torch.device = "cpu",
    restart: bool = False,
    soft_lock: bool = False,
    progress: Progress | None = None,
) -> Collected:
    """Measure what goes into every projection of every decoder layer.

    The same samples on the same machine give the same bytes, whatever `memory`, and after any number of kills. Another
    device, CPU or number of threads, or another torch, may change the last bits of a product, and by them which
    experts a token is sent to.

    Args:
        source: the checkpoint, in any format; layers that only predict further tokens (MTP) are left out.
        stats: folder for the statistics; see `stats.layout`.
        samples: rows of tokens. `train` and `validation` go through the model side by side and are summed apart.
        hessians: whether E[x x^T] is collected beside E[x] and E[x^2].
        memory: bytes that the pass may take; the rest of the hidden states lies on disk, below the folder.
        device: where layers compute.
        restart: whether what stands in the folder is thrown away.
        soft_lock: whether a file may be the lock where the file system has no others.
        progress: called with tokens times layers that are done, and all.

    Raises:
        UsageError: `memory` is too small, or a token is none of the model's.
        CheckpointError: the checkpoint is no model, cannot be read, or gives a matrix an input that is not finite.
        DestinationStale: the folder holds a calibration of other weights, other data or other settings.
        DestinationForeign: it holds something else.
        DestinationInUse: another process works there.
        OutputError: the disk is full or fails.
    """
    model, place = Model.of(source.config), execution_device(device)
    plan = needs(source, rows=_rows(samples), length=samples.train.tokens.shape[1], memory=memory, hessians=hessians)
    check_tokens(samples, source)
    assembly = assemble(source, device=place, dtype=torch.bfloat16, backend="decoded")
    assembly.make_dense()  # decoded once, when they are read, and not for every product
    if place.type == "cpu":
        assembly.model.set_attn_implementation(IMPLEMENTATION)
    manifest = _manifest(model, samples, place, hessians=hessians)
    walk = Walk(assembly, model, segments(samples), plan, hessians=hessians)
    locked = calibrating(stats, manifest, restart=restart, soft_lock=soft_lock)
    with whole_float32(), as_output_error(stats), locked as whole:
        measured = _Run(walk, manifest, source, stats).go(whole, progress, restart=restart)
    tokens: dict[str, int] = {part: getattr(samples, part).count for part in PARTS}
    return Collected(folder=stats, layers=model.layers, measured=measured, tokens=tokens, needs=plan)


class _Run:
    """One call, in a folder that is locked."""

    def __init__(self, walk: Walk, manifest: Manifest, source: Checkpoint, stats: Path) -> None:
        self._walk, self._manifest, self._source, self._stats = walk, manifest, source, stats
        self._hidden = stats / _WORK / _HIDDEN

    @torch.no_grad()
    def go(self, whole: Mapping[int, Digests], progress: Progress | None, *, restart: bool) -> int:
        """Do what is not done yet; return how many layers that was."""
        layers = self._manifest.model.layers
        if (self._stats / MANIFEST).is_file():
            self._check(dict(open_stats(self._stats).digests()))
            return 0
        kept = self._kept(whole, fresh=restart)
        self._check({base: parts for layer in range(kept.finished) for base, parts in whole[layer].items()})
        if kept.finished < 0:
            self._walk.embed(kept)
        begun, tokens = kept.finished, self._walk.tokens
        for layer in range(begun, layers):

            def tell(done: int, before: int = layer * tokens) -> None:
                if progress:
                    progress(before + done, layers * tokens)

            self._walk.run_layer(layer, kept, self._stats, tell)
        write_outside(self._stats, self._walk.outside())
        finish(self._stats, self._manifest)
        kept.clear()
        return layers - begun

    def _kept(self, whole: Mapping[int, Digests], *, fresh: bool) -> Activations:
        """Return the hidden states of an earlier run, if its layers stand there; else none."""
        if fresh:
            shutil.rmtree(self._hidden, ignore_errors=True)
        kept = self._opened()
        if not set(range(kept.finished)) <= whole.keys():  # of a run that `restart=True` threw away
            shutil.rmtree(self._hidden)
            kept = self._opened()
        if kept.finished < 0:
            self._check_room()
        return kept

    def _opened(self) -> Activations:
        self._hidden.mkdir(parents=True, exist_ok=True)
        identity = {
            "calibration": hashlib.sha256(canonical(self._manifest.identity)).hexdigest(),
            "version": __version__,
            "embedding": self._walk.embedded(),
        }
        shapes, plan = self._walk.shapes, self._walk.plan
        try:
            return Activations(
                self._hidden, shapes, torch.bfloat16, budget=plan.budget, identity=identity, lasting=True
            )
        except DestinationStale as error:
            raise self._stale("a half-finished calibration of another checkpoint, or of another release") from error

    def _check_room(self) -> None:
        needed = 2 * self._walk.plan.hidden + stats_bytes(self._manifest.model, hessians=self._manifest.hessians)
        check_room(self._stats, needed, "hidden states between two layers and statistics")

    def _check(self, wanted: Mapping[str, Mapping[str, str]]) -> None:
        """Read weights whose digests are known, and compare.

        Raises:
            DestinationStale: they are not those that were measured.
        """
        weights = [weight for weight in group_tensors(self._source.tensors).weights if base_of(weight) in wanted]
        found = digests(self._source, weights)
        for base, parts in wanted.items():
            now = found.get(base, {})
            if any(now.get(suffix) != digest for suffix, digest in parts.items()):
                raise self._stale("a calibration of other weights", tensor=base)

    def _stale(self, what: str, tensor: str | None = None) -> DestinationStale:
        return DestinationStale(
            f"holds {what}",
            tensor=tensor,
            file=self._stats,
            remedy="write it anew with `restart=True`, or name another folder",
        )


def _rows(samples: Samples) -> list[int]:
    return [len(getattr(samples, part).tokens) for part in PARTS]


def _manifest(model: Model, samples: Samples, device: torch.device, *, hessians: bool) -> Manifest:
    data = {name: getattr(samples, name) for name in (*PARTS, "test")}
    return Manifest(
        model=model,
        data={
            name: DataPart(hashes=part.hashes, tokens=part.count, rows=len(part.tokens), digest=part.digest)
            for name, part in data.items()
        },
        hessians=hessians,
        settings={
            "samples": samples.wanted,
            "length": samples.train.tokens.shape[1],
            "reasoning": samples.reasoning,
            "device": device.type,
        },
        version=__version__,
    )


def check_room(folder: Path, needed: int, what: str) -> None:
    """Refuse a disk that is too small before anything is computed.

    Args:
        folder: where files will lie; it need not be there.
        needed: bytes.
        what: they are for.

    Raises:
        OutputError: fewer are free.
    """
    free = shutil.disk_usage(nearest_folder(folder)).free
    if free < needed:
        raise OutputError(
            "the disk is too small",
            file=folder,
            expected=f"{size(needed)} free, for {what}",
            found=size(free),
            remedy="free some space, or name a folder on another disk",
        )


def check_tokens(samples: Samples, source: Checkpoint) -> None:
    """Refuse tokens that the model does not have.

    Raises:
        UsageError: there are some.
    """
    text: Any = (source.config or {}).get("text_config", source.config)
    vocabulary = text["vocab_size"]
    for part in PARTS:
        tokens = getattr(samples, part).tokens
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= vocabulary:
            raise UsageError(
                f"samples, {part}: expected tokens from 0 to {vocabulary - 1}, found {low} to {high}; is the "
                "tokenizer that of this checkpoint?"
            )
