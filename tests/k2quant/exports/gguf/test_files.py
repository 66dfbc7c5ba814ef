"""The bytes before the weights, and models in several files."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import pytest

from k2quant.errors import MalformedFile, UsageError
from k2quant.exports import export_gguf
from k2quant.exports.gguf.blocks import BF16, F32, Q4_0
from k2quant.exports.gguf.files import Tensor, file_plans
from k2quant.exports.gguf.key import Key

KINDS = {
    "uint8": 255,
    "int8": -128,
    "uint16": 65535,
    "int16": -32768,
    "uint32": 2**32 - 1,
    "int32": -(2**31),
    "float32": 0.5,
    "bool": True,
    "string": "Kimi 你好",
    "uint64": 2**64 - 1,
    "int64": -(2**63),
    "float64": 0.1,
}


def test_a_file_begins_with_its_keys_and_tensors() -> None:
    """Byte for byte: magic, version, counts; name, type and value of a key; name, dimensions, type, offset of tensors.

    Dimensions stand the fastest first, and zeros fill up to a multiple of 32.
    """
    tensors = Tensor("t", Q4_0, (3, 64)), Tensor("u", F32, (2,))
    (plan,) = file_plans("k2.gguf", [Key("a", 7, "uint32")], [tensors], None)
    head = b"GGUF" + struct.pack("<IQQ", 3, 2, 1)
    key = struct.pack("<Q", 1) + b"a" + struct.pack("<II", 4, 7)
    first = struct.pack("<Q", 1) + b"t" + struct.pack("<IQQIQ", 2, 64, 3, 2, 0)
    second = struct.pack("<Q", 1) + b"u" + struct.pack("<IQIQ", 1, 2, 0, 128)
    content = head + key + first + second
    assert plan.header == content + bytes(-len(content) % 32)
    assert plan.starts == {"t": len(plan.header), "u": len(plan.header) + 128}
    assert plan.size == len(plan.header) + 128 + 32


def test_keys_of_every_kind_are_read_by_gguf(tmp_path: Path, fields: Any) -> None:
    """Numbers at their ends, texts, and sequences of them, an empty one too."""
    keys = [Key(f"one.{kind}", value, kind) for kind, value in KINDS.items()]
    keys += [Key(f"many.{kind}", [value, value], f"array:{kind}") for kind, value in KINDS.items()]
    (plan,) = file_plans("k2.gguf", keys, [[Tensor("t", BF16, (1, 2))]], None)
    (tmp_path / "k2.gguf").write_bytes(plan.header.ljust(plan.size, b"\0"))
    found = fields(tmp_path / "k2.gguf")
    assert {name: found[f"one.{name}"] for name in KINDS} == KINDS
    assert {name: list(found[f"many.{name}"]) for name in KINDS} == {name: [value] * 2 for name, value in KINDS.items()}
    types = {
        field.name: field.types[-1].name.lower() for field in gguf.GGUFReader(tmp_path / "k2.gguf").fields.values()
    }
    assert {name: types[f"one.{name}"] for name in KINDS} == {name: name for name in KINDS}


@pytest.mark.parametrize(
    ("value", "kind"), [(256, "uint8"), ("a", "uint32"), (1, "string"), (1, "text"), (1, "array:uint8")]
)
def test_a_value_that_has_no_place_in_its_kind_is_named(value: object, kind: str) -> None:
    """Too large a number, a text for a number, a kind that does not exist."""
    with pytest.raises(MalformedFile, match=r"some.key cannot be said in GGUF"):
        file_plans("k2.gguf", [Key("some.key", value, kind)], [[Tensor("t", F32, (1,))]], None)


def test_several_files_are_one_model(k2_thinking: Path, tmp_path: Path, seen: Any, fields: Any) -> None:
    """Each says which it is of how many, the first has all other keys, and together they hold the same tensors."""
    one = export_gguf(k2_thinking, tmp_path / "k2.gguf")
    several = export_gguf(k2_thinking, tmp_path / "parts.gguf", split_size=2_000_000)
    count = len(several.files)
    assert count > 3
    assert [path.name for path in several.files] == [f"parts-{n + 1:05}-of-{count:05}.gguf" for n in range(count)]
    whole, parts = seen(one.file), seen(*several.files)
    assert {name: each.data for name, each in parts.items()} == {name: each.data for name, each in whole.items()}
    for number, path in enumerate(several.files):
        keys = fields(path)
        own = {name: value for name, value in keys.items() if name.startswith("split.")}
        assert own == {"split.no": number, "split.count": count, "split.tensors.count": len(whole)}
        assert ("general.architecture" in keys) == (number == 0)
        most = sum(len(each.data) for each in seen(path).values())
        assert most <= 2_000_000 or len(seen(path)) == 1


def test_a_size_that_one_file_fits_in_makes_one_file(k2_thinking: Path, tmp_path: Path) -> None:
    """It has its plain name then."""
    done = export_gguf(k2_thinking, tmp_path / "k2.gguf", split_size=10**9)
    assert done.files == (tmp_path / "k2.gguf",)


def test_more_files_than_can_be_counted_are_refused() -> None:
    """`split.count` has 16 bits."""
    tensors = [[Tensor(str(number), F32, (1,))] for number in range(2**16)]
    with pytest.raises(UsageError, match="65536 files"):
        file_plans("k2.gguf", [], tensors, 1)


def test_tensors_of_one_weight_lie_in_one_file(fp4: Any, k2_bf16: Path, tmp_path: Path, seen: Any) -> None:
    """Both halves of kv_b_proj, and scales beside the blocks that they belong to, wherever files are cut."""
    for source in (fp4["nvfp4 of ones"], k2_bf16):
        home: dict[str, Path] = {}
        for path in export_gguf(source, tmp_path / f"{source.name}.gguf", split_size=1).files:
            home |= dict.fromkeys(seen(path), path)
        for layer in range(3):
            assert home[f"blk.{layer}.attn_k_b.weight"] == home[f"blk.{layer}.attn_v_b.weight"]
        for name in [name for name in home if name.endswith(".scale")]:
            assert home[name] == home[name.replace(".scale", ".weight")]
