"""The bytes of GGUF files that stand before the weights, and where each tensor lies.

A file is: `GGUF`, version 3, the number of tensors and of keys; the keys; for each tensor its name, dimensions (the
fastest first), type and offset; then, aligned, the data. Numbers are little-endian. See llama.cpp, ggml/include/gguf.h.
Of a split model each file has the keys of its part, and the first one all others.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from k2quant.errors import MalformedFile, UsageError
from k2quant.exports.gguf.blocks import Type
from k2quant.exports.gguf.key import Key
from k2quant.ground.saying.showing import brief

SUFFIX = ".gguf"
ALIGNMENT = 32
"""Bytes; GGUF's default (`GGUF_DEFAULT_ALIGNMENT`)."""
_VERSION = 3
_MOST_FILES = 2**16 - 1
"""`split.count` has 16 bits."""
_SPLIT_NAME = re.compile(r"-[0-9]{5}-of-[0-9]{5}\Z")

_NUMBERS = {
    "uint8": (0, "<B"),
    "int8": (1, "<b"),
    "uint16": (2, "<H"),
    "int16": (3, "<h"),
    "uint32": (4, "<I"),
    "int32": (5, "<i"),
    "float32": (6, "<f"),
    "bool": (7, "<?"),
    "uint64": (10, "<Q"),
    "int64": (11, "<q"),
    "float64": (12, "<d"),
}
_STRING, _ARRAY = 8, 9
_OF_ARRAY = "array:"


class Tensor(NamedTuple):
    """A tensor as a file will have it."""

    name: str
    type: Type
    shape: tuple[int, ...]
    """Rows before columns, as everywhere here; a header has it the other way round."""

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        count = 1
        for length in self.shape[:-1]:
            count *= length
        return count * self.type.bytes_of(self.shape[-1])


class FilePlan(NamedTuple):
    """One file."""

    name: str
    header: bytes
    """All that stands before the data."""
    starts: dict[str, int]
    """First byte of each tensor, from the beginning of the file."""
    size: int
    """Bytes of the whole file."""
    tensors: tuple[Tensor, ...]

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)


def file_plans(
    name: str, keys: Sequence[Key], groups: Sequence[Sequence[Tensor]], split_size: int | None
) -> tuple[FilePlan, ...]:
    """Lay tensors out in files, in their order.

    Args:
        name: of the file; of a split model, what the files' names begin with.
        keys: the metadata.
        groups: what lies in them; tensors of a group lie in one file.
        split_size: the most bytes of tensors in a file, a larger group has its own; None: one file.

    Raises:
        UsageError: there would be more files than a header can count.
    """
    files = [[tensor for group in groups for tensor in group]] if split_size is None else _filled(groups, split_size)
    if len(files) == 1:
        return (_file(name, keys, files[0]),)
    if len(files) > _MOST_FILES:
        raise UsageError(f"`split_size=` {split_size} makes {len(files)} files; GGUF counts at most {_MOST_FILES}")
    counts = Key("split.count", len(files), "uint16"), Key("split.tensors.count", sum(map(len, files)), "int32")
    base = name.removesuffix(SUFFIX)
    return tuple(
        _file(
            f"{base}-{number + 1:05}-of-{len(files):05}{SUFFIX}",
            [*(() if number else keys), Key("split.no", number, "uint16"), *counts],
            tensors,
        )
        for number, tensors in enumerate(files)
    )


def _filled(groups: Iterable[Sequence[Tensor]], most: int) -> list[list[Tensor]]:
    files: list[list[Tensor]] = []
    room = 0
    for group in groups:
        nbytes = sum(tensor.nbytes for tensor in group)
        if not files or nbytes > room:
            files.append([])
            room = most
        files[-1] += group
        room -= nbytes
    return files


def _file(name: str, keys: Sequence[Key], tensors: Sequence[Tensor]) -> FilePlan:
    header = bytearray(b"GGUF" + struct.pack("<IQQ", _VERSION, len(tensors), len(keys)))
    for key in keys:
        header += _string(key.name) + _value(key)
    offsets: list[int] = []
    end = 0
    for tensor in tensors:
        offsets.append(end)
        header += _string(tensor.name) + struct.pack("<I", len(tensor.shape))
        header += struct.pack(f"<{len(tensor.shape)}Q", *reversed(tensor.shape))
        header += struct.pack("<IQ", tensor.type.number, end)
        end += _padded(tensor.nbytes)
    header += bytes(-len(header) % ALIGNMENT)
    starts = {tensor.name: len(header) + offset for tensor, offset in zip(tensors, offsets, strict=True)}
    return FilePlan(name, bytes(header), starts, len(header) + end, tuple(tensors))


def _padded(size: int) -> int:
    return size + -size % ALIGNMENT


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(key: Key) -> bytes:
    """Return the type and the value of a key.

    Raises:
        MalformedFile: it has no place in that type.
    """
    try:
        if not key.kind.startswith(_OF_ARRAY):
            return struct.pack("<I", _number(key.kind)) + _packed(key.kind, key.value)
        kind, values = key.kind.removeprefix(_OF_ARRAY), list(key.value)  # type: ignore[call-overload]  # a sequence
        begin = struct.pack("<IIQ", _ARRAY, _number(kind), len(values))
        return begin + b"".join(_packed(kind, value) for value in values)
    except (struct.error, OverflowError, UnicodeEncodeError, KeyError, TypeError) as error:
        raise MalformedFile(
            f"{key.name} cannot be said in GGUF", expected=key.kind, found=repr(key.value)[:100]
        ) from error


def _number(kind: str) -> int:
    return _STRING if kind == "string" else _NUMBERS[kind][0]


def _packed(kind: str, value: object) -> bytes:
    return _string(value) if kind == "string" and isinstance(value, str) else struct.pack(_NUMBERS[kind][1], value)


def check_name(name: str) -> None:
    """Refuse a file's name that is none of GGUF, or looks like a part of a split model.

    Raises:
        UsageError: it is such a one.
    """
    if not name.endswith(SUFFIX) or name == SUFFIX:
        raise UsageError(f"{name} is no name of a GGUF file, which ends in {SUFFIX}")
    if _SPLIT_NAME.search(name.removesuffix(SUFFIX)):
        raise UsageError(f"{name} names a part of a split model: leave the number out, and say `split_size=`")


def is_of(output: str, name: str) -> bool:
    """Tell whether a file has the name of an output, or that of a part of it."""
    base = name.removesuffix(SUFFIX)
    return name == output or (name.endswith(SUFFIX) and _SPLIT_NAME.sub("", base) + SUFFIX == output)
