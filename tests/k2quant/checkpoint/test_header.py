"""The header of a shard: which are read, which are refused, and the bytes that are written."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from k2quant.checkpoint import header
from k2quant.checkpoint.header import TensorEntry, build_header, read_header
from k2quant.errors import MalformedFile, UnsupportedFormat
from k2quant.formats.dtypes import TensorSpec

Header = dict[str, Any]


def tensor(start: int, stop: int, dtype: str = "BF16", shape: list[Any] | None = None) -> Header:
    """Return what a header says of a tensor; a vector of BF16 unless something else is said."""
    shape = [(stop - start) // 2] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.fixture
def shard(tmp_path: Path) -> Callable[..., Path]:
    """Return what writes a shard with a header and so many bytes of data."""

    def written(content: Header, data: int) -> Path:
        text = json.dumps(content).encode()
        path = tmp_path / "model.safetensors"
        path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))
        return path

    return written


Write = Callable[[Header, int], Path]


def test_a_header_says_where_each_tensor_lies(shard: Write) -> None:
    """Places are counted from the beginning of the file; size, time and digest are those of the file and the header."""
    path = shard({"__metadata__": {"format": "pt"}, "b": tensor(8, 14), "a": tensor(0, 8, "F32", [1, 2])}, 14)
    found = read_header(path)
    start = path.stat().st_size - 14
    assert list(found.tensors.values()) == [
        TensorEntry("b", "BF16", (3,), "model.safetensors", start + 8, start + 14),
        TensorEntry("a", "F32", (1, 2), "model.safetensors", start, start + 8),
    ]
    assert [entry.nbytes for entry in found.tensors.values()] == [6, 8]
    assert (found.size, found.mtime_ns) == (path.stat().st_size, path.stat().st_mtime_ns)
    assert found.sha256 == hashlib.sha256(path.read_bytes()[8:start]).hexdigest()


def test_a_shard_without_tensors_ends_with_its_header(shard: Write) -> None:
    """Its header takes the whole file, and not a byte more."""
    assert read_header(shard({}, 0)).tensors == {}
    path = shard({}, 0)
    path.write_bytes(struct.pack("<Q", 3) + b"{}")
    with pytest.raises(MalformedFile, match="length is impossible"):
        read_header(path)


def test_a_file_of_less_than_a_length_is_refused(tmp_path: Path) -> None:
    """Seven bytes hold no length; eight hold one, of nothing."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(7))
    with pytest.raises(MalformedFile, match=r"too short.*7 bytes"):
        read_header(path)
    path.write_bytes(bytes(8))
    with pytest.raises(MalformedFile, match="JSON"):
        read_header(path)


def test_the_limits_are_those_of_the_library() -> None:
    """100 million bytes, as safetensors has it: what is longer, it refuses too."""
    assert header.HEADER_LIMIT == 100_000_000


def test_a_header_at_the_limit_is_read_and_a_longer_one_is_not(shard: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit itself is allowed, in a file that is larger by far."""
    path = shard({"a": tensor(0, 4000)}, 4000)
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    monkeypatch.setattr(header, "HEADER_LIMIT", length)
    assert set(read_header(path).tensors) == {"a"}
    monkeypatch.setattr(header, "HEADER_LIMIT", length - 1)
    with pytest.raises(MalformedFile, match="length is impossible"):
        read_header(path)


def test_a_file_that_shrinks_while_it_is_read_is_refused(shard: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """The length fitted the size that the file had; the bytes are not there any more."""
    path = shard({}, 0)
    path.write_bytes(struct.pack("<Q", 100) + b"{}")
    status = SimpleNamespace(st_size=108, st_mtime_ns=0)
    monkeypatch.setattr(header, "os", SimpleNamespace(fdopen=os.fdopen, fstat=lambda _: status))
    with pytest.raises(MalformedFile, match="shrank"):
        read_header(path)


@pytest.mark.parametrize("shape", [[0], [3, 0], [2**63 - 1, 0], [0] * 16])
def test_an_empty_tensor_has_a_place_too(shape: list[int], shard: Write) -> None:
    """Up to 16 dimensions, each up to 2^63 - 1; it may stand at the start of another, listed before or after it."""
    empty = tensor(0, 0, shape=shape)
    assert read_header(shard({"a": tensor(0, 4), "empty": empty}, 4)).tensors["empty"].nbytes == 0
    assert read_header(shard({"empty": empty, "a": tensor(0, 4)}, 4)).tensors["empty"].shape == tuple(shape)


@pytest.mark.parametrize("shape", [[2**63, 0], [-1], [True], [1.0], ["1"], [0] * 17, 0, None, {}])
def test_a_shape_that_no_tensor_has_is_refused(shape: Any, shard: Write) -> None:
    """Negative, beyond 64 bits, a truth value, a fraction, words, 17 dimensions, or no list."""
    entry = tensor(0, 0) | {"shape": shape}
    with pytest.raises(MalformedFile, match="no list of sizes"):
        read_header(shard({"a": entry}, 0))


@pytest.mark.parametrize("offsets", [[0], [0, 4, 4], [4, 0], [-4, 0], [0, True], [0.0, 4], None, {"0": 4}])
def test_offsets_that_are_no_pair_are_refused(offsets: Any, shard: Write) -> None:
    """One, three, backwards, negative, a truth value, a fraction, or no list."""
    with pytest.raises(MalformedFile, match="no pair of sizes"):
        read_header(shard({"a": tensor(0, 4) | {"data_offsets": offsets}}, 4))


@pytest.mark.parametrize("name", ["", ".a", "a\n", "\x1b[2J"])
def test_a_name_that_no_tensor_has_is_refused(name: str, shard: Write) -> None:
    """Nothing, a hidden one, and what a terminal would obey."""
    with pytest.raises(MalformedFile, match="no name for a tensor"):
        read_header(shard({name: tensor(0, 4)}, 4))


@pytest.mark.parametrize(
    "entry", [[], None, {}, {"dtype": "BF16", "shape": [2]}, tensor(0, 4) | {"stride": 1}], ids=str
)
def test_an_entry_has_three_keys_and_no_other(entry: Any, shard: Write) -> None:
    """Fewer say too little, and one more might mean something."""
    with pytest.raises(MalformedFile, match="data_offsets alone"):
        read_header(shard({"a": entry}, 4))


@pytest.mark.parametrize("dtype", ["bf16", "X", 5, None, ["BF16"]])
def test_an_unknown_dtype_is_refused(dtype: Any, shard: Write) -> None:
    """Names are exact, and a name is text."""
    with pytest.raises(MalformedFile, match="unknown dtype"):
        read_header(shard({"a": tensor(0, 4) | {"dtype": dtype}}, 4))


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F6_E3M2"])
def test_a_dtype_below_a_byte_is_named_as_another_format(dtype: str, shard: Write) -> None:
    """It is known, and not read."""
    with pytest.raises(UnsupportedFormat, match=dtype):
        read_header(shard({"a": tensor(0, 4) | {"dtype": dtype}}, 4))


@pytest.mark.parametrize("metadata", [[], "pt", None, {"format": 1}, {"format": "pt", "more": None}])
def test_metadata_maps_strings_to_strings(metadata: Any, shard: Write) -> None:
    """Anything else is no metadata."""
    with pytest.raises(MalformedFile, match="__metadata__"):
        read_header(shard({"__metadata__": metadata, "a": tensor(0, 4)}, 4))


@pytest.mark.parametrize("stop", [2, 6])
def test_bytes_are_those_that_dtype_and_shape_need(stop: int, shard: Write) -> None:
    """Two BF16 take four bytes: not two, not six."""
    with pytest.raises(MalformedFile, match="do not fit the shape"):
        read_header(shard({"a": tensor(0, stop, shape=[2])}, stop))


@pytest.mark.parametrize(
    ("content", "data"),
    [
        ({"a": tensor(2, 6)}, 6),
        ({"a": tensor(0, 4), "b": tensor(6, 8)}, 8),
        ({"a": tensor(0, 4), "b": tensor(2, 6)}, 6),
        ({"a": tensor(0, 4), "b": tensor(0, 4)}, 4),
    ],
    ids=["gap before", "gap", "overlap", "twice"],
)
def test_tensors_follow_one_another(content: Header, data: int, shard: Write) -> None:
    """No byte belongs to nobody or to two."""
    with pytest.raises(MalformedFile, match="overlap or leave a gap"):
        read_header(shard(content, data))


@pytest.mark.parametrize("data", [0, 3, 5, 12])
def test_a_file_ends_where_its_last_tensor_ends(data: int, shard: Write) -> None:
    """Cut short or with something behind it, it is another file."""
    with pytest.raises(MalformedFile, match="does not end where its last tensor ends"):
        read_header(shard({"a": tensor(0, 4)}, data))


def test_wider_elements_come_first_and_the_header_is_padded_to_eight_bytes() -> None:
    """Within a width the order is kept, so a tensor is aligned to its elements; the bytes are these."""
    specs = {"u": TensorSpec("U8", (3,)), "b": TensorSpec("BF16", (2, 1)), "é": TensorSpec("F32", (1,))}
    specs["a"] = TensorSpec("BF16", (1,))
    content, spans = build_header(specs)
    text = (
        '{"__metadata__":{"format":"pt"},"é":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        '"b":{"dtype":"BF16","shape":[2,1],"data_offsets":[4,8]},"a":{"dtype":"BF16","shape":[1],"data_offsets":[8,10]},'
        '"u":{"dtype":"U8","shape":[3],"data_offsets":[10,13]}}'
    ).encode()
    padded = text + b" " * (-len(text) % 8)
    start = 8 + len(padded)
    assert len(padded) > len(text)
    assert content == struct.pack("<Q", len(padded)) + padded
    assert spans == {
        "é": (start, start + 4),
        "b": (start + 4, start + 8),
        "a": (start + 8, start + 10),
        "u": (start + 10, start + 13),
    }


def test_a_header_that_is_written_is_read(tmp_path: Path) -> None:
    """What was laid out is found where it was laid."""
    content, spans = build_header({"a": TensorSpec("U8", (3,)), "b": TensorSpec("F32", (2, 2))})
    path = tmp_path / "model.safetensors"
    path.write_bytes(content + bytes(19))
    found = read_header(path).tensors
    assert {name: (entry.start, entry.stop) for name, entry in found.items()} == spans
