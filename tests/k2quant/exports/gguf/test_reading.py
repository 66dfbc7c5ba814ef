"""An export that is read back holds the values of its source, and one that does not is found out."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest

from k2quant.errors import MissingTensor
from k2quant.exports import export_gguf, read_back_gguf


@pytest.mark.parametrize("kind", ["k2_thinking", "k2_source", "k2_bf16"])
def test_every_value_comes_back(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """INT4, FP8 and BF16, in one file or in several."""
    source = request.getfixturevalue(kind)
    done = export_gguf(source, tmp_path / "k2.gguf", split_size=2_000_000)
    back = read_back_gguf(source, done.files)
    assert len(done.files) > 1
    assert back.tensors > 50
    assert back.other == ()


def test_one_nibble_is_found_out(k2_thinking: Path, tmp_path: Path) -> None:
    """Of one expert of a stack; the tensor is named, and no other."""
    done = export_gguf(k2_thinking, tmp_path / "k2.gguf")
    name = "blk.2.ffn_down_exps.weight"
    tensor = next(each for each in gguf.GGUFReader(done.file).tensors if each.name == name)
    at = int(tensor.data_offset) + 3 * 18 * 100 + 5
    data = bytearray(done.file.read_bytes())
    data[at] ^= 0x10
    done.file.write_bytes(data)
    assert read_back_gguf(k2_thinking, done.files).other == (name,)


def test_what_was_rounded_is_named(k2_bf16: Path, tmp_path: Path) -> None:
    """Q8_0 holds other values than BF16, in the routed experts alone where they alone were asked for."""
    done = export_gguf(k2_bf16, tmp_path / "k2.gguf", experts="q8_0")
    other = read_back_gguf(k2_bf16, done.files).other
    assert len(other) == 6
    assert all("_exps" in name for name in other)


def test_a_part_that_is_not_given_is_missed(k2_bf16: Path, tmp_path: Path) -> None:
    """Of an export in parts all must be there."""
    done = export_gguf(k2_bf16, tmp_path / "k2.gguf", split_size=2_000_000)
    with pytest.raises(MissingTensor, match="is in none of the files"):
        read_back_gguf(k2_bf16, done.files[:1])
