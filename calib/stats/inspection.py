"""What is in a folder of statistics, finished or not, in a few figures."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from k2quant.calib.stats.layout import MANIFEST, PARTS, Part
from k2quant.calib.stats.manifest import Manifest, Setting, read_manifest
from k2quant.calib.stats.reading import Stats, open_stats
from k2quant.calib.stats.writing import written_layers
from k2quant.checkpoint.reader import INCOMPLETE
from k2quant.checkpoint.writing.destination import Destination
from k2quant.ground.saying.showing import as_html, brief


class DataRow(NamedTuple):
    """One part of the data."""

    part: str
    documents: int
    rows: int
    tokens: int


class Reach(NamedTuple):
    """How the tokens of one part came to the routed experts of all layers."""

    experts: int
    """Routed experts of all layers together."""
    mean: float
    """Tokens of one, on average."""
    least: int
    """Tokens of the one that has fewest."""
    thinnest: str
    """Its name, the first where several have as few, such as `model.layers.3.mlp.experts.17`."""
    empty: int
    """How many have none."""


class StatsInspection(NamedTuple):
    """What a folder of statistics holds."""

    folder: str
    finished: bool
    layers: int
    """Decoder layers of the model."""
    layers_done: int
    """Those that stand there whole."""
    sizes: dict[str, int]
    """Of the model, by the keys of its config.json."""
    data: list[DataRow]
    settings: dict[str, Setting]
    hessians: bool
    """Whether there are Hessians."""
    version: str
    """The release that measured."""
    nbytes: int
    """Bytes of the folder's files."""
    reach: dict[str, Reach]
    """By part; empty for a model without routed experts, and while the folder is not finished."""
    fingerprint: str | None
    """What tells these statistics from all others; None while the folder is not finished."""

    def facts(self) -> dict[str, object]:
        """Return what it comes to, in a few words."""
        named = ("folder", "finished", "layers", "layers_done", "hessians", "fingerprint")
        return {name: getattr(self, name) for name in named}

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)

    def _repr_html_(self) -> str:
        """Return it as a small table, for notebooks."""
        return as_html(self)


def is_stats(folder: Path) -> bool:
    """Tell whether a folder is one of statistics, finished or not."""
    if not os.path.isdir(folder):  # noqa: PTH112  it never raises
        return False
    try:
        return (folder / MANIFEST).is_file() or _begun(folder) is not None
    except OSError:  # whoever opens it says what is wrong
        return False


def inspect_stats(folder: Path, *, progress: Callable[[int, int], None] | None = None) -> StatsInspection:
    """Describe a folder of statistics; the moments of a finished one are all read and checked.

    Args:
        folder: for which `is_stats` holds.
        progress: called with layers done and layers in all.

    Raises:
        CheckpointError: it is not what was written.
    """
    begun = _begun(folder)
    if begun is not None and (folder / INCOMPLETE).exists():
        return _described(folder, begun, done=len(written_layers(folder, begun)), stats=None, reach={})
    stats = open_stats(folder)
    reach = _reach(stats, progress or (lambda _done, _total: None))
    return _described(folder, stats.manifest, done=len(stats.layers), stats=stats, reach=reach)


def _begun(folder: Path) -> Manifest | None:
    """Return what an unfinished folder says that is measured; None where no calibration was begun, or none is left."""
    journal = Destination(folder, report=MANIFEST, incomplete=INCOMPLETE).journal()
    return read_manifest(journal[0], file=folder)[0] if journal and "layout" in journal[0] else None


def _described(
    folder: Path, manifest: Manifest, *, done: int, stats: Stats | None, reach: dict[str, Reach]
) -> StatsInspection:
    return StatsInspection(
        folder=str(folder),
        finished=stats is not None,
        layers=manifest.model.layers,
        layers_done=done,
        sizes={key: value for key, value in manifest.model.config.items() if type(value) is int},
        data=[DataRow(name, part.documents, part.rows, part.tokens) for name, part in manifest.data.items()],
        settings=dict(manifest.settings),
        hessians=manifest.hessians,
        version=manifest.version,
        nbytes=sum(path.stat().st_size for path in folder.iterdir() if path.is_file()),
        reach=reach,
        fingerprint=None if stats is None else stats.fingerprint,
    )


def _reach(stats: Stats, progress: Callable[[int, int], None]) -> dict[str, Reach]:
    """Read every layer and count the tokens of its experts."""
    loads: Mapping[Part, dict[int, list[int]]] = {part: {} for part in PARTS}
    for number, layer in enumerate(stats.layers):
        stats.check_layer(layer)
        for part in PARTS:
            if (load := stats.load(layer, part)) is not None:
                loads[part][layer] = load[0].tolist()
        progress(number + 1, len(stats.layers))
    return {part: _reached(load) for part, load in loads.items() if load}


def _reached(loads: Mapping[int, list[int]]) -> Reach:
    named = {(layer, expert): count for layer, load in loads.items() for expert, count in enumerate(load)}
    layer, expert = min(named, key=named.__getitem__)
    return Reach(
        experts=len(named),
        mean=sum(named.values()) / len(named),
        least=named[layer, expert],
        thinnest=f"model.layers.{layer}.mlp.experts.{expert}",
        empty=sum(count == 0 for count in named.values()),
    )
