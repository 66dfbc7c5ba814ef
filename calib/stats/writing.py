"""Write a folder of statistics so that whatever has its final name is whole and on the disk.

A layer's file comes first, its record after it; the manifest comes last of all. While a calibration runs the folder
holds `INCOMPLETE`, and `.k2quant/` with the lock and a journal of one line: what is being measured. So a run that was
stopped goes on, and one of another model, data or settings is refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from k2quant.calib.stats.layout import (
    MANIFEST,
    OUTSIDE,
    Part,
    files,
    hessian_specs,
    hessians_file,
    moments_file,
    record_file,
)
from k2quant.calib.stats.manifest import Manifest, read_manifest
from k2quant.calib.stats.moments import check_moments
from k2quant.calib.stats.reading import RECORD_LIMIT, checked, open_layer, open_stats, read_moments
from k2quant.checkpoint.files import checksum
from k2quant.checkpoint.files.paths import read_limited, write_whole
from k2quant.checkpoint.header import build_header
from k2quant.checkpoint.reader import INCOMPLETE
from k2quant.checkpoint.writing.destination import Destination, locked
from k2quant.checkpoint.writing.writer import ShardWriter
from k2quant.errors import CheckpointError, DestinationForeign, DestinationStale, MissingTensor, ShapeMismatch
from k2quant.formats.dtypes import TensorSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from k2quant.calib.stats.digests import Digests
    from k2quant.calib.stats.model import Model


class Measured(NamedTuple):
    """What was measured of one input over one part of the data; with a row for each expert where it is theirs."""

    mean_square: NDArray[np.float32]
    """`[K]` or `[E, K]`: sum w x^2 / sum w; zeros without tokens."""
    weight: NDArray[np.float64] | float
    """`[]` or `[E]`: sum w."""
    tokens: NDArray[np.int64] | int
    """`[]` or `[E]`."""
    largest: NDArray[np.float32] | float
    """`[]` or `[E]`: max |x|."""
    mean: NDArray[np.float32]
    """As `mean_square`: sum w x / sum w."""


LayerStats = Mapping[tuple[str, Part], Measured]
"""By input, as `layout.inputs` names them, and part."""


class HessianWriter:
    """A layer's Hessians, written one by one, for all of them are more than memory holds: 85 GB for a layer of K2."""

    def __init__(self, folder: Path, layer: int, model: Model) -> None:
        """Begin `layer-N.hessians.safetensors`; a Hessian that is not written is zeros, as of an expert without tokens.

        Raises:
            OSError: it cannot be created.
        """
        (folder / record_file(layer)).unlink(missing_ok=True)  # which spoke of those that stood there
        self._specs = hessian_specs(model, layer)
        header, self._spans = build_header(self._specs)
        self._writer = ShardWriter(folder / hessians_file(layer), header, max(stop for _, stop in self._spans.values()))
        self._crcs: dict[str, dict[int, int]] = {name: {} for name in self._specs}

    def write(self, name: str, part: Part, hessian: NDArray[np.float32], *, expert: int | None = None) -> None:
        """Write sum w x x^T / sum w of one input.

        Args:
            name: of the input.
            part: of the data.
            hessian: float32 `[K, K]`.
            expert: whose it is, for a routed expert.

        Raises:
            ShapeMismatch: it has another shape or dtype.
            OSError: the disk is full or fails.
        """
        import numpy as np

        tensor = f"{name}.{part}.hessian"
        shape = self._specs[tensor].shape
        if hessian.shape != shape[-2:] or hessian.dtype != np.float32 or (expert is None) != (len(shape) == 2):
            raise ShapeMismatch(
                tensor=tensor, expected=f"float32 {shape[-2:]}", found=f"{hessian.dtype} {hessian.shape}"
            )
        data = np.ascontiguousarray(hessian).data.cast("B")
        place = expert or 0
        if self._writer.write(self._spans[tensor][0] + place * len(data), data):
            self._writer.flush()
        self._crcs[tensor][place] = checksum.crc32(data)

    def finish(self) -> dict[str, list[str]]:
        """Give the file its name; return, by tensor, the crc32 of each Hessian, for `write_layer`."""
        self._writer.finish()
        return {
            name: [f"{self._crcs[name].get(place, zeros):08x}" for place in range(count)]
            for name, spec in self._specs.items()
            for count, zeros in [(spec.shape[0] if len(spec.shape) == 3 else 1, _crc_of_zeros(spec.shape[-1]))]
        }

    def close(self) -> None:
        """Leave it unfinished; harmless after `finish`."""
        self._writer.close()


def _crc_of_zeros(width: int) -> int:
    row = checksum.crc32(bytes(4 * width))
    return checksum.combine((row, 4 * width) for _ in range(width))


@contextlib.contextmanager
def calibrating(
    folder: Path, manifest: Manifest, *, restart: bool = False, soft_lock: bool = False
) -> Iterator[dict[int, Digests]]:
    """Hold a folder while it is calibrated; give the digests of the layers that stand there whole, by layer.

    Args:
        folder: where; it is made if need be.
        manifest: what is measured.
        restart: whether what stands there, finished or not, is thrown away.
        soft_lock: whether a file may be the lock where the file system has no others.

    Raises:
        DestinationInUse: another process works there.
        DestinationForeign: it holds something that k2quant did not write.
        DestinationStale: it holds a calibration of another model, other data or settings, finished or not.
    """
    with locked(
        folder, report=MANIFEST, incomplete=INCOMPLETE, restart=restart, soft=soft_lock, mark=_MARK
    ) as destination:
        _refuse_conversion(destination)
        if restart or _is_being_emptied(destination):
            _clear(destination, manifest)
        else:
            _check_same(destination, manifest)
        whole = written_layers(folder, manifest)
        if destination.finished_report() is None or len(whole) < manifest.model.layers or not _opens(folder):
            destination.begin([manifest.as_json({})])
            destination.delete([MANIFEST])  # a run that was stopped at its very end may have left it
        yield whole


def _opens(folder: Path) -> bool:
    """Tell whether a finished folder can be read; one that says `calibrate again` must be."""
    try:
        open_stats(folder)
    except CheckpointError:
        return False
    return True


_MARK = (
    b"k2quant is calibrating into this folder, or was stopped while it did. It cannot be used yet.\n"
    b"Run the same `k2quant calibrate` again: it resumes where it stopped.\n"
)


def _refuse_conversion(destination: Destination) -> None:
    """Refuse a folder that is half-finished, but not by a calibration."""
    journal = destination.journal()
    if journal and "layout" not in journal[0] and not _is_being_emptied(destination):
        raise DestinationForeign(
            "holds a half-finished conversion", file=destination.folder, remedy="finish it, or name another folder"
        )


def _is_being_emptied(destination: Destination) -> bool:
    """Tell whether a run with `restart=True` was stopped while it deleted what stood there."""
    journal = destination.journal()
    listed = journal[0].get("files") if journal else None
    return isinstance(listed, list) and MANIFEST in listed


def _clear(destination: Destination, manifest: Manifest) -> None:
    """Delete what an earlier calibration left, be it of another model."""
    layers = [path.name for path in destination.folder.iterdir() if _LAYER_FILE.fullmatch(path.name)]
    destination.clear([*files(manifest.model, hessians=True), *sorted(layers)])


_LAYER_FILE = re.compile(r"layer-[0-9]{5}\.(?:json|safetensors|hessians\.safetensors)(?:\.partial)?")


def _check_same(destination: Destination, manifest: Manifest) -> None:
    report, journal = destination.finished_report(), destination.journal()
    found = report if report is not None else journal[0] if journal else None
    if found is None:
        return
    changed = [key for key, value in manifest.identity.items() if found.get(key) != json.loads(json.dumps(value))]
    if changed:
        what = " and ".join(_WORDS.get(key, f"another {key}") for key in changed)
        if "settings" in changed:
            what += _compared(found.get("settings"), manifest.settings)
        state = "a finished" if report is not None else "a half-finished"
        raise DestinationStale(
            f"holds {state} calibration of {what}",
            file=destination.folder,
            remedy="write it anew with `restart=True`, or name another folder",
        )


def _compared(was: object, now: Mapping[str, object]) -> str:
    """Return, in brackets, which settings were others; nothing where a folder does not say."""
    if not isinstance(was, dict):
        return ""
    other = [f"{key} {was.get(key)!r:.40}, now {value!r}" for key, value in now.items() if was.get(key) != value]
    return f" ({'; '.join(other)})" if other else ""


_WORDS = {
    "model": "another model",
    "data": "other data",
    "hessians": "another choice of `hessians=`",
    "settings": "other settings",
}


def write_layer(
    folder: Path,
    layer: int,
    stats: LayerStats,
    digests: Digests,
    *,
    hessians: Mapping[str, list[str]] | None = None,
) -> None:
    """Write one layer: its moments, then the record that says that it is whole.

    Args:
        folder: of the statistics.
        layer: its number.
        stats: all inputs of the layer.
        digests: of the weights that it was measured with, by base in the language model.
        hessians: what `HessianWriter.finish` gave, where there are any.

    Raises:
        OSError: the disk is full or fails.
    """
    arrays = {
        f"{name}.{part}.{kind}": array
        for (name, part), measured in stats.items()
        for kind, array in _arrays(measured).items()
    }
    data = _moments_file(arrays)
    write_whole(folder / moments_file(layer), data)
    record = {
        "layer": layer,
        "size": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "hessians": dict(hessians or {}),
        "digests": {base: dict(sorted(parts.items())) for base, parts in sorted(digests.items())},
    }
    write_whole(folder / record_file(layer), json.dumps(record, indent=0).encode() + b"\n")


def _arrays(measured: Measured) -> dict[str, NDArray[Any]]:
    import numpy as np

    return {
        "mean_square": np.asarray(measured.mean_square, np.float32),
        "mean": np.asarray(measured.mean, np.float32),
        "weight": np.asarray(measured.weight, np.float64),
        "tokens": np.asarray(measured.tokens, np.int64),
        "largest": np.asarray(measured.largest, np.float32),
    }


_DTYPES = {"float32": "F32", "float64": "F64", "int64": "I64"}


def _moments_file(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """Return the safetensors file of these tensors, which are small: 57 MB for a layer of K2."""
    ordered = dict(sorted(arrays.items()))
    header, spans = build_header(
        {name: TensorSpec(_DTYPES[str(array.dtype)], array.shape) for name, array in ordered.items()}
    )
    return b"".join([header, *(ordered[name].tobytes() for name in spans)])


def write_outside(folder: Path, digests: Digests) -> None:
    """Write the digests of the weights outside the layers: embedding, last norm, head."""
    content = {"digests": {base: dict(sorted(parts.items())) for base, parts in sorted(digests.items())}}
    write_whole(folder / OUTSIDE, json.dumps(content, indent=0).encode() + b"\n")


def finish(folder: Path, manifest: Manifest) -> None:
    """Check what was written as a reader will, write the manifest, and take away what says that it is not finished.

    Raises:
        CheckpointError: a layer is missing, or holds what cannot have been measured.
        OSError: the disk is full or fails.
    """
    names = [OUTSIDE, *map(record_file, range(manifest.model.layers))]
    known = {}
    for name in names:
        if not (folder / name).is_file():
            raise MissingTensor("was not written", file=folder / name, remedy="calibrate again")
        data = read_limited(folder / name, RECORD_LIMIT)
        known[name] = (len(data), hashlib.sha256(data).hexdigest())
    written = checked(folder, manifest, known)
    for layer in written.layers:
        written.check_layer(layer)
    content = manifest.as_json(known)
    read_manifest(content, file=folder / MANIFEST)
    write_whole(folder / MANIFEST, json.dumps(content, indent=0).encode() + b"\n")
    Destination(folder, report=MANIFEST, incomplete=INCOMPLETE).finish()


def written_layers(folder: Path, manifest: Manifest) -> dict[int, Digests]:
    """Return the layers that stand in a folder whole, finished or not, each with the digests of its weights.

    The moments are read and checked; of Hessians the size is.
    """
    found: dict[int, Digests] = {}
    for layer in range(manifest.model.layers):
        path = folder / record_file(layer)
        if not path.is_file():
            continue
        try:
            opened = open_layer(folder, layer, manifest, read_limited(path, RECORD_LIMIT))
            check_moments(read_moments(opened.record, opened.moments), manifest, layer, file=opened.moments.path)
        except (CheckpointError, OSError):  # cut short, or of another release: it is measured again
            continue
        found[layer] = opened.record.digests
    return found
