"""The checksum of written bytes: one polynomial, whoever computes it, and pieces that make up a whole."""

from __future__ import annotations

import importlib.util
import sys
import zlib
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k2quant.checkpoint.files import checksum


@given(st.binary(max_size=300), st.integers(0, 2**32 - 1), st.integers(0, 40))
def test_it_is_the_crc32_of_zlib(data: bytes, value: int, offset: int) -> None:
    """Any bytes, from any place in memory and any value to begin with, give zlib's number, so old journals hold."""
    view = memoryview(bytearray(data))[offset:]
    assert checksum.crc32(view, value) == zlib.crc32(view, value)
    assert checksum.crc32(view) == zlib.crc32(view)


@pytest.mark.parametrize("size", [0, 1, 15, 16, 255, 256, 4095, 5121, 1_000_003])
def test_long_bytes_too(size: int) -> None:
    """Lengths about the steps of a carry-less multiplication, and beyond those at which threads let each other go."""
    data = bytes(range(251)) * (size // 251 + 1)
    assert checksum.crc32(data[:size]) == zlib.crc32(data[:size])


def without_isal(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Load the module as it is where isal has no wheel, beside the one that is in use."""
    monkeypatch.setitem(sys.modules, "isal", None)
    monkeypatch.setitem(sys.modules, "isal.isal_zlib", None)
    spec = importlib.util.spec_from_file_location("checksum_without_isal", checksum.__file__)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_where_isal_is_missing_zlib_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without isal's wheel computes the same numbers; where there is one, the faster one is in use."""
    assert (checksum.crc32 is zlib.crc32) == (importlib.util.find_spec("isal") is None)
    assert without_isal(monkeypatch).crc32 is zlib.crc32
    assert checksum.crc32(b"123456789") == 0xCBF43926  # the check value of the polynomial of ISO 3309


@given(st.lists(st.binary(max_size=90), max_size=5))
def test_pieces_combine_to_the_whole(pieces: list[bytes]) -> None:
    """The checksums of pieces, empty ones too, give that of the bytes laid end to end."""
    parts = [(checksum.crc32(piece), len(piece)) for piece in pieces]
    assert checksum.combine(parts) == zlib.crc32(b"".join(pieces))
