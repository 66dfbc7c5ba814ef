"""Read a folder of statistics, and trust none of it before it is checked.

Opening checks the manifest, that every file it names is there with its size and digest, each layer's record, and each
header: names, dtypes and shapes are those that the model's config asks for. A layer's moments are checked when they are
first read: the file's sha256, and that every value can have been measured. A Hessian is checked when it is read: its
crc32, that it is finite, and that its diagonal is the mean square.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from k2quant.calib.stats import blending
from k2quant.calib.stats.layout import (
    MANIFEST,
    OUTSIDE,
    PARTS,
    Part,
    Place,
    hessian_specs,
    hessians_file,
    moment_specs,
    moments_file,
    place_of,
    record_file,
)
from k2quant.calib.stats.manifest import Files, Manifest, read_manifest
from k2quant.calib.stats.moments import Moments, check_moments
from k2quant.checkpoint.files import checksum
from k2quant.checkpoint.files.json_kinds import mapping, text, values, whole
from k2quant.checkpoint.files.paths import inside, read_limited
from k2quant.checkpoint.files.sources import check_folder
from k2quant.checkpoint.files.strict_json import parse_object
from k2quant.checkpoint.header import ShardHeader, read_header
from k2quant.checkpoint.reader import INCOMPLETE
from k2quant.checkpoint.reading import read_into
from k2quant.errors import BadValue, CheckpointError, MalformedFile, MissingTensor, ShapeMismatch
from k2quant.formats.dtypes import TensorSpec, as_array
from k2quant.ground import names
from k2quant.ground.saying.showing import brief

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from k2quant.calib.stats.blending import HeldOut
    from k2quant.calib.stats.digests import Digests

    F32 = NDArray[np.float32]
    Arrays = Mapping[str, NDArray[Any]]

AGAIN = "calibrate again"
_ANEW = "calibrate again with `restart=True`"  # a run that finds the layer there reads no Hessian
MANIFEST_LIMIT = 512_000_000
"""Bytes of a manifest: 64 hexadecimal digits for each document, some 100 for each layer."""
RECORD_LIMIT = 64_000_000
"""Bytes of a layer's record: some 110 for each of K2's 1,160 weights of a layer."""

_KEPT = 3  # layers whose moments stay in memory; K2's have 57 MB each
_CRC = re.compile(r"[0-9a-f]{8}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Record(NamedTuple):
    """What a layer's JSON says."""

    size: int
    """Bytes of the file with its moments."""
    sha256: str
    """Of that file."""
    hessians: Mapping[str, tuple[str, ...]]
    """By tensor the crc32 of each matrix in the file with its Hessians; empty where there is none."""
    digests: Digests
    """Of the weights that the layer was measured with."""


class Layer(NamedTuple):
    """A layer whose headers are checked."""

    record: Record
    moments: ShardHeader
    hessians: ShardHeader | None


class Largest(NamedTuple):
    """The largest magnitude of a matrix's input."""

    value: float
    own: bool
    """Whether its own inputs had it; else all experts' of its layer."""


class Stats:
    """A finished folder of statistics; see `open_stats`. Its methods may be called from any thread."""

    def __init__(
        self, folder: Path, manifest: Manifest, files: Files, layers: Mapping[int, Layer], outside: Digests
    ) -> None:
        """Take what `open_stats` has checked."""
        self.folder, self.manifest = folder, manifest
        self._files, self._layers, self._outside = files, layers, outside
        self._arrays: OrderedDict[int, Arrays] = OrderedDict()
        self._kept = _KEPT
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)

    def facts(self) -> dict[str, object]:
        """Return what it comes to, in a few words."""
        return {"folder": str(self.folder), "layers": len(self.layers), "fingerprint": self.fingerprint}

    @functools.cached_property
    def fingerprint(self) -> str:
        """The sha256 over what was measured, in hex: model, data, settings and every layer; no times, no paths."""
        return self.manifest.fingerprint(self._files)

    def memory(self, layers: int = 0) -> int:
        """Return the most bytes that moments take in memory: those of the layers that are kept, and of one being read.

        Args:
            layers: that `keep` is to be asked for.
        """
        return (max(self._kept, layers) + 1) * max(layer.moments.size for layer in self._layers.values())

    @property
    def layers(self) -> tuple[int, ...]:
        """The decoder layers."""
        return tuple(self._layers)

    def keep(self, layers: int) -> None:
        """Keep at least so many layers' moments in memory, for who works on as many at a time."""
        self._kept = max(self._kept, layers)

    def width(self, base: str) -> int | None:
        """Return the columns of the input of a matrix; None for a matrix that is not measured.

        Args:
            base: its name in the language model without the suffix, such as `model.layers.3.self_attn.o_proj`.
        """
        found = self._place(base)
        if found is None:
            return None
        return self._layers[found.layer].moments.tensors[f"{found.input}.train.mean_square"].shape[-1]

    def moments(self, base: str, part: Part = "train") -> Moments | None:
        """Return what was measured of the input of a matrix.

        Args:
            base: its name in the language model without the suffix, such as `model.layers.3.self_attn.o_proj`.
            part: of the data.

        Returns:
            read-only arrays; None for a matrix that is not measured.

        Raises:
            CheckpointError: the layer's file is not what was written.
        """
        found = self._place(base)
        return None if found is None else self._moments(found.layer, found.input, found.expert, part)

    def layer_moments(self, base: str, part: Part = "train") -> Moments | None:
        """Return the moments of all tokens of the layer, for the gate or up of a routed expert; else None.

        Raises:
            CheckpointError: as for `moments`.
        """
        found = self._place(base)
        return None if found is None or found.prior is None else self._moments(found.layer, found.prior, None, part)

    def hessian(self, base: str, part: Part = "train") -> F32 | None:
        """Return sum w x x^T / sum w of the input of a matrix.

        Returns:
            float32 `[K, K]`; None where no Hessians were collected, or the matrix is not measured.

        Raises:
            CheckpointError: the layer's file is not what was written, or holds no Hessian.
        """
        found = self._place(base)
        if found is None or not self.manifest.hessians:
            return None
        return self._hessian(found.layer, found.input, found.expert, part)

    def layer_hessian(self, base: str, part: Part = "train") -> F32 | None:
        """Return the Hessian over all tokens of the layer, for the gate or up of a routed expert; else None.

        Raises:
            CheckpointError: as for `hessian`.
        """
        found = self._place(base)
        if found is None or found.prior is None or not self.manifest.hessians:
            return None
        return self._hessian(found.layer, found.prior, None, part)

    def importance(self, base: str) -> F32 | None:
        """Return the mean square of each column's input by the train part, blended as `blending` says.

        Returns:
            float32 `[K]`; None for a matrix that is not measured.

        Raises:
            CheckpointError: as for `moments`.
        """
        return self._decisive(base, lambda own: own.mean_square, blending.importance)

    def mean(self, base: str) -> F32 | None:
        """Return the mean of each column's input by the train part, blended as `importance` is.

        Returns:
            float32 `[K]`; None for a matrix that is not measured.

        Raises:
            CheckpointError: as for `moments`.
        """
        return self._decisive(base, lambda own: own.mean, blending.mean)

    def _decisive(
        self, base: str, plain: Callable[[Moments], F32], blended: Callable[[Moments, Moments | None], F32]
    ) -> F32 | None:
        """Return what the train part says of a matrix: a routed expert's is blended, as `held_out` has it too."""
        found, own = self._place(base), self.moments(base)
        if found is None or own is None:
            return None
        return plain(own) if found.expert is None else blended(own, self.layer_moments(base))

    def held_out(self, base: str) -> HeldOut | None:
        """Return what a rounding of a matrix is judged by: the validation part; see `blending`.

        Raises:
            CheckpointError: as for `moments`.
        """
        found, own = self._place(base), self.moments(base, "validation")
        if found is None or own is None:
            return None
        prior = self.layer_moments(base, "validation")
        return blending.held_out(own, prior, routed=found.expert is not None)

    def largest(self, base: str) -> Largest | None:
        """Return the largest magnitude of the input of a matrix, in both parts of the data.

        Returns:
            for an expert whose inputs were none, or nothing but zeros, that of all experts of its layer; None for a
            matrix that is not measured.

        Raises:
            CheckpointError: as for `moments`.
        """
        found = self._place(base)
        if found is None:
            return None
        arrays = self._read(found.layer)
        seen = [arrays[f"{found.input}.{part}.largest"] for part in PARTS]
        own = max(float(each[... if found.expert is None else found.expert]) for each in seen)
        return Largest(own, own=True) if own else Largest(max(float(each.max()) for each in seen), own=False)

    def digest(self, base: str) -> Mapping[str, str] | None:
        """Return, by suffix, the crc32 in hex of the stored bytes of the weight that was calibrated; None: not read."""
        layer = names.layer(base)
        home = self._layers[layer].record.digests if layer is not None and layer in self._layers else self._outside
        return home.get(base)

    def digests(self) -> Iterator[tuple[str, Mapping[str, str]]]:
        """Yield every weight that the pass has read, by its name in the language model, with its digests by suffix."""
        yield from self._outside.items()
        for layer in self._layers.values():
            yield from layer.record.digests.items()

    def load(self, layer: int, part: Part = "train") -> tuple[NDArray[np.int64], NDArray[np.float64]] | None:
        """Return tokens int64 `[E]` and weights float64 `[E]` of a layer's routed experts; None: it has none.

        Raises:
            CheckpointError: as for `moments`.
        """
        if layer not in self._layers or layer < self.manifest.model.first_routed:
            return None
        arrays, name = self._read(layer), f"model.layers.{layer}.mlp.experts.gate_proj.{part}"
        return arrays[f"{name}.tokens"], arrays[f"{name}.weight"]

    def check_layer(self, layer: int) -> None:
        """Read a layer's moments and check them, as their first use would.

        Raises:
            CheckpointError: as for `moments`.
        """
        self._read(layer)

    def _place(self, base: str) -> Place | None:
        """Return where a matrix's statistics stand, if the model has such a matrix."""
        found = place_of(base)
        if found is None or found.layer not in self._layers:
            return None
        if f"{found.input}.train.tokens" not in self._layers[found.layer].moments.tensors:
            return None
        return found if found.expert is None or found.expert < self.manifest.model.experts else None

    def _moments(self, layer: int, name: str, expert: int | None, part: Part) -> Moments:
        arrays = self._read(layer)
        squares, mean, tokens, weight, largest = (
            arrays[f"{name}.{part}.{kind}"][... if expert is None else expert]
            for kind in ("mean_square", "mean", "tokens", "weight", "largest")
        )
        return Moments(squares, int(tokens), float(weight), float(largest), mean)

    def _read(self, layer: int) -> Arrays:
        """Return the checked moments of a layer; those of the last few stay in memory."""
        with self._lock:
            if layer not in self._arrays:
                self._arrays[layer] = read_moments(self._layers[layer].record, self._layers[layer].moments)
                check_moments(self._arrays[layer], self.manifest, layer, file=self._layers[layer].moments.path)
                while len(self._arrays) > self._kept:
                    self._arrays.popitem(last=False)
            self._arrays.move_to_end(layer)
            return self._arrays[layer]

    def _hessian(self, layer: int, name: str, expert: int | None, part: Part) -> F32:
        import numpy as np

        file = self._layers[layer].hessians
        if file is None:  # the manifest says otherwise, and opening compared them
            raise MissingTensor("no Hessians of the layer", file=self.folder, remedy=AGAIN)
        tensor = f"{name}.{part}.hessian"
        width, place = file.tensors[tensor].shape[-1], expert or 0
        found = np.empty((width, width), np.float32)
        read_into(file, file.tensors[tensor].start + place * found.nbytes, found.data.cast("B"))
        crc = self._layers[layer].record.hessians[tensor][place]
        if f"{checksum.crc32(found):08x}" != crc:
            raise MalformedFile("changed since it was written", tensor=tensor, file=file.path, remedy=_ANEW)
        _check_hessian(found, self._moments(layer, name, expert, part), tensor, file.path)
        return found


def _check_hessian(found: F32, own: Moments, tensor: str, file: Path) -> None:
    import numpy as np

    if not np.isfinite(found).all():
        raise BadValue(tensor=tensor, file=file, expected="finite values", found="NaN or infinity", remedy=_ANEW)
    if not np.allclose(found.diagonal(), own.mean_square, rtol=0.01, atol=1e-6 * (own.mean_square.max(initial=0))):
        raise BadValue(
            tensor=tensor, file=file, expected="the mean squares on the diagonal", found="others", remedy=_ANEW
        )


def read_moments(record: Record, header: ShardHeader) -> Arrays:
    """Read a layer's file, compare its sha256, and return its tensors by name, read-only.

    Raises:
        CheckpointError: it cannot be read, or is not what was written.
    """
    import numpy as np

    data = np.empty(header.size, np.uint8)
    read_into(header, 0, data.data)
    if hashlib.sha256(data.data).hexdigest() != record.sha256:
        raise MalformedFile("changed since it was written", file=header.path, found="another sha256", remedy=AGAIN)
    data.flags.writeable = False
    return {
        entry.name: as_array(data[entry.start : entry.stop], TensorSpec(entry.dtype, entry.shape))
        for entry in header.tensors.values()
    }


def open_stats(folder: str | os.PathLike[str]) -> Stats:
    """Open what `k2quant calibrate` wrote.

    Args:
        folder: of the statistics.

    Raises:
        CheckpointError: it is no such folder, is unfinished, or is not what was written, as the module says above.
    """
    try:
        return _open(Path(folder))
    except OSError as error:
        found = error.strerror or str(error)
        raise CheckpointError("cannot be read", file=error.filename or folder, found=found, remedy=AGAIN) from error


def _open(folder: Path) -> Stats:
    check_folder(folder)
    path = inside(folder, MANIFEST)
    if (folder / INCOMPLETE).exists():
        raise CheckpointError(
            "not finished: a calibration is still at work, or was stopped",
            file=folder,
            remedy="run the same `k2quant calibrate` again: it resumes",
        )
    if not path.exists():
        raise CheckpointError(
            "no statistics here",
            file=folder,
            expected=MANIFEST,
            found=", ".join(sorted(each.name for each in folder.iterdir())[:5]) or "an empty folder",
            remedy="name a folder that `k2quant calibrate` wrote",
        )
    manifest, files = read_manifest(parse_object(read_limited(path, MANIFEST_LIMIT), file=path), file=path)
    return checked(folder, manifest, files)


def checked(folder: Path, manifest: Manifest, files: Files) -> Stats:
    """Return the statistics of a folder whose manifest is read; all else is checked as `open_stats` does."""
    wanted = [OUTSIDE, *map(record_file, range(manifest.model.layers))]
    if files.keys() != set(wanted):
        other = min(files.keys() ^ set(wanted))
        raise MalformedFile(
            "the files of another model",
            file=folder / MANIFEST,
            expected=f"{OUTSIDE} and the records of {manifest.model.layers} layers",
            found=f"{other!r:.100} {'besides' if other in files else 'missing'}",
            remedy=AGAIN,
        )
    content = {name: _known(folder, name, *files[name]) for name in wanted}
    layers = {
        layer: open_layer(folder, layer, manifest, content[record_file(layer)])
        for layer in range(manifest.model.layers)
    }
    return Stats(folder, manifest, files, layers, read_outside(content[OUTSIDE], file=folder / OUTSIDE))


def _known(folder: Path, name: str, size: int, sha256: str) -> bytes:
    """Return a file's bytes, which the manifest knows."""
    path = inside(folder, name)
    if not path.exists():
        raise MissingTensor("is not there", file=path, remedy=AGAIN)
    data = read_limited(path, RECORD_LIMIT)
    if (len(data), hashlib.sha256(data).hexdigest()) != (size, sha256):
        raise MalformedFile(
            "not the file that the manifest names",
            file=path,
            expected=f"{size:,} bytes, sha256 {sha256[:16]}...",
            found=f"{len(data):,} bytes, sha256 {hashlib.sha256(data).hexdigest()[:16]}...",
            remedy=AGAIN,
        )
    return data


def open_layer(folder: Path, layer: int, manifest: Manifest, data: bytes) -> Layer:
    """Return a layer whose record and headers are checked.

    Args:
        folder: of the statistics.
        layer: its number.
        manifest: of the folder.
        data: the bytes of its record.

    Raises:
        CheckpointError: a file is missing, short, or not as the record and the model have it.
    """
    record = read_record(data, layer, file=folder / record_file(layer))
    header = _header(folder, moments_file(layer), moment_specs(manifest.model, layer))
    if header.size != record.size:
        raise MalformedFile(
            "not whole",
            file=header.path,
            expected=f"{record.size:,} bytes",
            found=f"{header.size:,} bytes",
            remedy=AGAIN,
        )
    if not manifest.hessians:
        return Layer(record, header, None)
    specs = hessian_specs(manifest.model, layer)
    found = {name: len(crcs) for name, crcs in record.hessians.items()}
    if found != {name: spec.shape[0] if len(spec.shape) == 3 else 1 for name, spec in specs.items()}:
        raise MalformedFile("not a checksum for each Hessian", file=folder / record_file(layer), remedy=AGAIN)
    return Layer(record, header, _header(folder, hessians_file(layer), specs))


def _header(folder: Path, name: str, specs: Mapping[str, TensorSpec]) -> ShardHeader:
    path = inside(folder, name)
    if not path.exists():
        raise MissingTensor("is not there", file=path, remedy=AGAIN)
    header = read_header(path)
    for tensor in sorted(header.tensors.keys() ^ specs.keys()):
        state = "has one that it should not have" if tensor in header.tensors else "lacks it"
        raise MissingTensor(state, tensor=tensor, file=path, remedy=AGAIN)
    for tensor, spec in specs.items():
        found = header.tensors[tensor]
        if (found.dtype, found.shape) != spec:
            raise ShapeMismatch(
                tensor=tensor,
                file=path,
                expected=f"{spec.dtype} {list(spec.shape)}",
                found=f"{found.dtype} {list(found.shape)}",
                remedy=AGAIN,
            )
    return header


def read_record(data: bytes, layer: int, *, file: Path) -> Record:
    """Parse a layer's JSON.

    Raises:
        MalformedFile: it is none, or of another layer.
    """
    content = parse_object(data, file=file)
    try:
        if content["layer"] != layer:
            raise MalformedFile(
                "the record of another layer",
                file=file,
                expected=layer,
                found=repr(content["layer"])[:50],
                remedy=AGAIN,
            )
        return Record(
            whole(content["size"]),
            _hex(content["sha256"], _SHA256),
            {
                name: tuple(_hex(crc, _CRC) for crc in values(crcs))
                for name, crcs in mapping(content["hessians"]).items()
            },
            _digests(content["digests"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise _no_record(error, file) from error


def read_outside(data: bytes, *, file: Path) -> Digests:
    """Parse the JSON with the digests of the weights outside the layers.

    Raises:
        MalformedFile: it is none.
    """
    try:
        return _digests(parse_object(data, file=file)["digests"])
    except (KeyError, TypeError, ValueError) as error:
        raise _no_record(error, file) from error


def _no_record(error: Exception, file: Path) -> MalformedFile:
    found = f"no {error}" if isinstance(error, KeyError) else str(error)
    return MalformedFile("does not say what it should", file=file, found=found[:200], remedy=AGAIN)


def _digests(value: object) -> Digests:
    return {
        base: {suffix: _hex(crc, _CRC) for suffix, crc in mapping(parts).items()}
        for base, parts in mapping(value).items()
    }


def _hex(value: object, pattern: re.Pattern[str]) -> str:
    if not pattern.fullmatch(text(value)):
        msg = f"{value!r:.100} where a digest stands"
        raise ValueError(msg)
    return text(value)
