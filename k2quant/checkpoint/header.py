"""The header of one safetensors file: 8 bytes of length, JSON, data without gaps.

A header is checked as strictly as the safetensors library checks it (`safetensors/src/tensor.rs`): the length fits the
file, offsets start at 0, follow one another without gap or overlap and end where the file ends, and each tensor's bytes
are those that its dtype and shape need.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import struct
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from k2quant.checkpoint.files.paths import open_regular
from k2quant.checkpoint.files.pointers import POINTER_LIMIT, refuse_pointer
from k2quant.checkpoint.files.strict_json import parse_object
from k2quant.errors import MalformedFile, UnsupportedFormat
from k2quant.formats.dtypes import DTYPES, TensorSpec
from k2quant.ground.saying.showing import brief

if TYPE_CHECKING:
    from k2quant.checkpoint.remote.place import Place
    from k2quant.checkpoint.supply.supply import Supply

HEADER_LIMIT = 100_000_000
"""Largest header in bytes; the limit of the safetensors library."""

DIMENSION_LIMIT = 16
"""Most dimensions of a tensor; more are an attempt to keep the reader busy."""

_FIRST_BYTES = 2**16
"""Bytes that are asked for before a header's length is known. A megabyte would spare K2's 61 shards, whose headers have
some 350 kB, a second request each, but is 61 MB where 21 MB are needed; on a slow line that is what counts."""

_SUB_BYTE = ("F4", "F6_E2M3", "F6_E3M2")


class TensorEntry(NamedTuple):
    """Where one tensor lies."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    """Name of the shard."""
    start: int
    """First byte, from the beginning of the file."""
    stop: int
    """One past the last byte."""

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return self.stop - self.start


class ShardHeader(NamedTuple):
    """One safetensors file, as its header describes it."""

    path: Path
    size: int
    """Bytes of the file."""
    mtime_ns: int
    """When it was last changed, in nanoseconds."""
    sha256: str
    """Digest of the header's bytes."""
    tensors: dict[str, TensorEntry]
    supply: Supply | None = None
    """Who has the file's bytes, where it is no local one; `path` says only where it would lie."""
    version: str | None = None
    """What changes when the content does, where the file's place says that; `mtime_ns` is 0 then."""

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)

    @property
    def bytes_asked(self) -> int:
        """Bytes that reading the header took, where it came over a network; 0 where it did not."""
        if self.supply is None:
            return 0
        data_start = min((entry.start for entry in self.tensors.values()), default=self.size)
        return max(min(_FIRST_BYTES, self.size), data_start)


def read_header(path: Path) -> ShardHeader:
    """Read and check a shard's header.

    Raises:
        MalformedFile: the file is no safetensors file, or lies about its content.
        UnsupportedFormat: it holds a dtype that belongs to another format.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        status = os.fstat(file.fileno())
        length = _length(file.read(8), file=path, size=status.st_size)
        raw = file.read(length)
    if len(raw) < length:
        raise MalformedFile("the file shrank while it was read", file=path)
    tensors = _parsed(raw, name=path.name, file=path, size=status.st_size)
    return ShardHeader(path, status.st_size, status.st_mtime_ns, hashlib.sha256(raw).hexdigest(), tensors)


def read_remote_header(place: Place, name: str, path: Path, supply: Supply) -> ShardHeader:
    """Read and check the header of a place's shard, by its first bytes and, where it is longer, once more.

    Args:
        place: where it is.
        name: of the file.
        path: where it would lie, were it here.
        supply: who gives the file's bytes.

    Raises:
        MalformedFile: it is no safetensors file, or lies about its content.
        UnsupportedFormat: it holds a dtype that belongs to another format.
        CheckpointError: it cannot be read.
    """
    file, shown = place.files[name], place.address.child(name)
    begin = bytearray(min(_FIRST_BYTES, file.size))
    if begin:
        place.read_into(name, 0, memoryview(begin))
    if file.size <= POINTER_LIMIT:
        refuse_pointer(shown, bytes(begin))
    length = _length(bytes(begin[:8]), file=shown, size=file.size)
    raw = bytes(begin[8 : 8 + length])
    if len(raw) < length:
        rest = bytearray(length - len(raw))
        place.read_into(name, len(begin), memoryview(rest))
        raw += rest
    tensors = _parsed(raw, name=name, file=shown, size=file.size)
    supply.expect(name, bytes(begin[:8]) + raw)
    return ShardHeader(path, file.size, 0, hashlib.sha256(raw).hexdigest(), tensors, supply, file.version)


def _length(prefix: bytes, *, file: object, size: int) -> int:
    """Return how many bytes a header has, from the first eight of its file."""
    if len(prefix) < 8:
        raise MalformedFile("too short for a safetensors file", file=file, found=f"{size} bytes")
    length = int.from_bytes(prefix, "little")
    if length > min(HEADER_LIMIT, size - 8):
        raise MalformedFile(
            "the header's length is impossible",
            file=file,
            expected=f"at most {min(HEADER_LIMIT, size - 8):,} bytes",
            found=f"{length:,} bytes",
            remedy="was the download cut short?",
        )
    return length


def _parsed(raw: bytes, *, name: str, file: object, size: int) -> dict[str, TensorEntry]:
    """Return the tensors of a header's JSON, if they are what a file of that size can hold."""
    if raw.startswith(codecs.BOM_UTF8):  # the library takes none
        raise MalformedFile("the header begins with a byte-order mark", file=file, expected="{")
    entries = _entries(parse_object(raw, file=file), shard=name, file=file, data_start=8 + len(raw))
    _check_coverage(entries, file=file, data_start=8 + len(raw), size=size)
    return {entry.name: entry for entry in entries}


def _entries(header: dict[str, Any], *, shard: str, file: object, data_start: int) -> list[TensorEntry]:
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise MalformedFile("__metadata__ must map strings to strings", file=file)
    return [_entry(name, value, shard=shard, file=file, data_start=data_start) for name, value in header.items()]


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _entry(name: str, value: Any, *, shard: str, file: object, data_start: int) -> TensorEntry:
    if not name.isprintable() or not name or name.startswith("."):
        raise MalformedFile("no name for a tensor", file=file, found=repr(name)[:200])
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise MalformedFile("expected dtype, shape and data_offsets alone", tensor=name, file=file)
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        _refuse_dtype(name, dtype, file)
    if not isinstance(shape, list) or len(shape) > DIMENSION_LIMIT or not all(map(_is_size, shape)):
        raise MalformedFile("the shape is no list of sizes", tensor=name, file=file, found=repr(shape)[:200])
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)) or offsets[0] > offsets[1]:
        raise MalformedFile("data_offsets are no pair of sizes", tensor=name, file=file, found=repr(offsets)[:200])
    if DTYPES[dtype].nbytes * prod(shape) != offsets[1] - offsets[0]:
        raise MalformedFile(
            "the offsets do not fit the shape",
            tensor=name,
            file=file,
            expected=f"{dtype} {shape}",
            found=f"{offsets[1] - offsets[0]} bytes",
        )
    return TensorEntry(name, dtype, tuple(shape), shard, data_start + offsets[0], data_start + offsets[1])


def _refuse_dtype(name: str, dtype: object, file: object) -> None:
    if dtype in _SUB_BYTE:
        raise UnsupportedFormat(
            f"dtype {dtype} belongs to a format that k2quant does not read",
            tensor=name,
            file=file,
            expected="BF16, block-FP8 (E4M3) or INT4 weights",
        )
    raise MalformedFile("unknown dtype", tensor=name, file=file, found=repr(dtype)[:200])


def _check_coverage(entries: Iterable[TensorEntry], *, file: object, data_start: int, size: int) -> None:
    end = data_start
    for entry in sorted(entries, key=lambda entry: (entry.start, entry.stop)):
        if entry.start != end:
            raise MalformedFile(
                "tensors overlap or leave a gap",
                tensor=entry.name,
                file=file,
                expected=f"data from byte {end - data_start}",
                found=f"byte {entry.start - data_start}",
            )
        end = entry.stop
    if end != size:
        raise MalformedFile(
            "the file does not end where its last tensor ends",
            file=file,
            expected=f"{end:,} bytes",
            found=f"{size:,} bytes",
            remedy="download it again",
        )


def build_header(specs: Mapping[str, TensorSpec]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """Lay tensors out in a file.

    Wider elements come first, so that every tensor is aligned to its own element; within a width the order is kept.

    Args:
        specs: the tensors in their order of preference.

    Returns:
        the file's first bytes (length and padded JSON), and for each tensor its first byte and one past its last,
        counted from the beginning of the file.
    """
    ordered = sorted(specs.items(), key=lambda item: -DTYPES[item[1].dtype].nbytes)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, spec in ordered:
        end = position + spec.nbytes
        header[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    spans: dict[str, tuple[int, int]] = {}
    for name, spec in ordered:
        spans[name] = (start, start + spec.nbytes)
        start = spans[name][1]
    return struct.pack("<Q", len(text)) + text, spans
