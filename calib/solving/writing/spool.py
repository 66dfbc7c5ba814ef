"""`Spool`: solved matrices on the disk, from when they are settled until the shards that need them stand.

A file holds matrices that were settled together, as the output stores them: codes and scales, so that nothing is
derived again from values. Beside them stands what the report will say, and which bytes of the source they were solved
for. A file is whole and on the disk, or not there; what is read of it is checked first.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from k2quant.calib.stats.digests import shown
from k2quant.checkpoint.files import json_kinds as kinds
from k2quant.checkpoint.files.checksum import crc32
from k2quant.checkpoint.files.paths import check_inside
from k2quant.checkpoint.files.strict_json import parse_object
from k2quant.checkpoint.header import ShardHeader, TensorEntry, build_header, read_header
from k2quant.checkpoint.panels import panel_state
from k2quant.checkpoint.reading import read_into
from k2quant.checkpoint.writing.writer import ShardWriter
from k2quant.errors import CheckpointError, DestinationForeign, MalformedFile
from k2quant.formats.dtypes import DTYPES, TensorSpec, as_array, as_bits
from k2quant.formats.format import Format, Parts
from k2quant.kernels.codecs.cpu import CODECS
from k2quant.report.choices.searches import read_scales

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from k2quant.calib.solving.choosing import Settled

_NOTES = "notes"
"""The tensor of a file that is no matrix's: eight hexadecimal digits, the crc32 of the JSON that follows them."""

_NOTES_LIMIT = 2**20
_LAYER = "layer-{:05}"
_ANEW = "write the output anew with `restart=True`"


class Wanted(NamedTuple):
    """What a matrix is to be stored as."""

    format: Format
    shape: tuple[int, ...]

    def specs(self) -> dict[str, TensorSpec]:
        """Return its tensors that depend on values, by suffix."""
        return panel_state(self.format, self.shape, 0, self.shape[0])


class Solved(NamedTuple):
    """A matrix as it was solved."""

    parts: Parts
    """Whole tensors, by suffix."""
    facts: dict[str, Any]
    """What the report says of its scales."""
    source: dict[str, str]
    """crc32 of the source's bytes that it was solved for, by suffix."""


class Spool:
    """A folder of solved matrices. It is a `Sink`; what it says may be asked for from several threads."""

    def __init__(self, folder: Path, wanted: Mapping[str, Wanted]) -> None:
        """Look at what an earlier run left.

        Args:
            folder: where; it is made if need be. The caller has it locked.
            wanted: every matrix that is to be solved, by its name in the language model without suffix.

        Raises:
            MalformedFile: a file is not what a spool holds.
            DestinationForeign: a link stands where it would write.
            OSError: the disk fails.
        """
        self._folder, self._wanted = folder, wanted
        self._lock = threading.Lock()
        self._files: dict[str, ShardHeader] = {}
        self.read: Mapping[str, Mapping[str, str]] = {}
        """crc32 of the source's bytes by base and suffix, as the pass reads them."""
        for path in (folder, *(folder.iterdir() if folder.is_dir() else ())):
            if path.is_symlink():
                raise DestinationForeign("a link where k2quant keeps what it solved", file=path, remedy="remove it")
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(folder.glob("layer-*/*.safetensors")):
            self._take_up(path)

    def __len__(self) -> int:
        """Return the number of matrices that stand there."""
        return len(self._files)

    def find(self, base: str) -> Tensor | None:
        """Return the values of a matrix that stands there, BF16 `[R, K]`; None: it does not.

        Raises:
            MalformedFile: its file is not what was written.
            CheckpointError: it was solved for other bytes than the source has now.
        """
        import torch

        if base not in self._files:
            return None
        solved = self.solved(base)
        now = self.read.get(base, {})
        if any(now.get(suffix, crc) != crc for suffix, crc in solved.source.items()):
            raise not_solved_for(base, self._folder)
        return torch.from_numpy(self._decoded(base, solved.parts)).view(torch.bfloat16)

    def put(self, layer: int, found: Mapping[str, Settled]) -> None:
        """Keep matrices that were settled together; they last when this returns.

        Raises:
            OSError: the disk is full or fails.
        """
        notes: dict[str, Any] = {}
        tensors: dict[str, NDArray[Any]] = {}
        for base, each in found.items():
            parts = self._stored(base, each)
            crcs = {suffix: shown(crc32(array.data.cast("B"))) for suffix, array in parts.items()}
            notes[base] = {"crc32": crcs, "facts": each.facts, "source": dict(self.read.get(base, {}))}
            tensors |= {f"{base}.{suffix}": array for suffix, array in parts.items()}
        text = json.dumps(notes, allow_nan=False).encode()
        tensors[_NOTES] = np.frombuffer(f"{crc32(text):08x}".encode() + text, np.uint8)
        path = self._folder / _LAYER.format(layer) / _name(found)
        path.parent.mkdir(exist_ok=True)
        self._write(path, found, tensors)
        header = read_header(path)
        with self._lock:
            self._files |= dict.fromkeys(found, header)

    def _write(self, path: Path, found: Mapping[str, Settled], tensors: Mapping[str, NDArray[Any]]) -> None:
        header, spans = build_header(self._specs(found, tensors[_NOTES]))
        writer = ShardWriter(path, header, max(stop for _, stop in spans.values()))
        try:
            for name, (start, _) in spans.items():
                writer.write(start, tensors[name].data.cast("B"))
            writer.finish()
        finally:
            writer.close()

    def _specs(self, found: Iterable[str], notes: NDArray[Any] | TensorEntry | None) -> dict[str, TensorSpec]:
        """Return the tensors of a file that holds some matrices, and notes of some length."""
        own = {f"{base}.{suffix}": spec for base in found for suffix, spec in self._wanted[base].specs().items()}
        return own | {_NOTES: TensorSpec("U8", (0,) if notes is None else notes.shape)}

    def _stored(self, base: str, settled: Settled) -> Parts:
        """Return codes and scales of values that were rounded at given scales."""
        target, shape = self._wanted[base]
        parts = {
            suffix: np.empty(spec.shape, DTYPES[spec.dtype].numpy)
            for suffix, spec in self._wanted[base].specs().items()
        }
        values = as_bits(settled.values)
        target.store(values, as_bits(settled.scales), parts, CODECS)
        if CODECS.floats.compare(values, self._decoded(base, parts)).changed or values.shape != shape:
            msg = f"{base}: values that are no codes times scales"  # never: a solver gives such
            raise AssertionError(msg)
        return parts

    def _decoded(self, base: str, parts: Parts) -> NDArray[np.uint16]:
        target, shape = self._wanted[base]
        values = np.empty(shape, np.uint16)
        target.decode(parts, values, CODECS)
        return values

    def solved(self, base: str) -> Solved:
        """Return a matrix as it was solved.

        Raises:
            MalformedFile: it does not stand there, or its file is not what was written.
        """
        header = self._files.get(base)
        if header is None:
            raise MalformedFile("was solved, and is not there any more", tensor=base, file=self._folder, remedy=_ANEW)
        notes = _notes(header)
        try:
            facts, source, crcs = (kinds.mapping(notes[base][key]) for key in ("facts", "source", "crc32"))
            read_scales({"scales": facts})
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(header.path) from error
        parts: Parts = {}
        for suffix, spec in self._wanted[base].specs().items():
            data = _read(header, header.tensors[f"{base}.{suffix}"])
            if shown(crc32(data)) != crcs.get(suffix):
                raise _damaged(header.path, tensor=f"{base}.{suffix}")
            parts[suffix] = as_array(np.frombuffer(data, np.uint8), spec)
        return Solved(parts, facts, source)

    def forget(self, layer: int) -> None:
        """Delete what stands there of a layer: its shards are written."""
        folder = self._folder / _LAYER.format(layer)
        with self._lock:
            self._files = {base: header for base, header in self._files.items() if header.path.parent != folder}
        if folder.is_dir() and not folder.is_symlink():
            shutil.rmtree(folder)

    def _take_up(self, path: Path) -> None:
        """Note which matrices a file holds, if it is one of this run's."""
        check_inside(self._folder, path)
        try:
            header = read_header(path)
        except CheckpointError as error:
            raise _damaged(path) from error
        found = {name.rpartition(".")[0]: None for name in header.tensors if name != _NOTES}
        known = found.keys() <= self._wanted.keys() - self._files.keys() and found
        if not known or path.name != _name(found) or _specs(header) != self._specs(found, header.tensors.get(_NOTES)):
            raise _damaged(path)
        self._files |= dict.fromkeys(found, header)


def not_solved_for(base: str, file: Path | str) -> CheckpointError:
    """Return the error of a weight of the source that has changed since it was solved."""
    return CheckpointError("is not the weight that was solved", tensor=base, file=file, remedy=_ANEW)


def _name(found: Mapping[str, Any]) -> str:
    """Return the name of the file of matrices that were settled together: that of the first, in its layer."""
    return min(found).split(".", 3)[3] + ".safetensors"


def _specs(header: ShardHeader) -> dict[str, TensorSpec]:
    return {name: TensorSpec(entry.dtype, entry.shape) for name, entry in header.tensors.items()}


def _read(header: ShardHeader, entry: TensorEntry) -> bytearray:
    data = bytearray(entry.nbytes)
    read_into(header, entry.start, memoryview(data))
    return data


def _notes(header: ShardHeader) -> dict[str, Any]:
    entry = header.tensors[_NOTES]
    if not 8 < entry.nbytes <= _NOTES_LIMIT:
        raise _damaged(header.path)
    data = bytes(_read(header, entry))
    if f"{crc32(data[8:]):08x}".encode() != data[:8]:
        raise _damaged(header.path)
    return parse_object(data[8:], file=header.path)


def _damaged(path: Path, tensor: str | None = None) -> MalformedFile:
    return MalformedFile("not what was solved", tensor=tensor, file=path, remedy=_ANEW)
