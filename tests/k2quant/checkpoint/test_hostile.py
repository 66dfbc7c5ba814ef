"""Checkpoints that lie: each lie has its test, named after it, and ends in one clear sentence and no model."""

from __future__ import annotations

import json
import os
import random
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import SafetensorError, deserialize

import k2quant
from k2quant.checkpoint.header import read_header
from k2quant.checkpoint.reader import CONFIG, INDEX, SINGLE
from k2quant.checkpoint.writing.in_memory import Shard, write_checkpoint
from k2quant.errors import (
    BadValue,
    CheckpointError,
    DtypeMismatch,
    MalformedFile,
    MissingTensor,
    ShapeMismatch,
    UnsafePath,
    UnsupportedFormat,
)
from k2quant.formats.known import FormatName

BASE = "model.layers.1.mlp.experts.0.up_proj"
SHARDS = ("model-1-of-2.safetensors", "model-2-of-2.safetensors")
FP8_CONFIG: dict[str, Any] = {
    "model_type": "kimi_k2",
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
}
SECONDS = 5.0
"""How long a hostile file may keep us busy."""


def int4_config(**scheme: Any) -> dict[str, Any]:
    """Return a config in Moonshot's INT4 form, with some entries of the scheme replaced."""
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "group_size": 32, "strategy": "group"} | scheme
    block = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"weights": weights}},
    }
    return {"model_type": "kimi_k2", "quantization_config": block}


def fp8(base: str = BASE) -> Shard:
    """Return a sound block-FP8 weight of 64 x 64 ones."""
    return {
        f"{base}.weight": ("F8_E4M3", np.full((64, 64), 0x38, np.uint8)),
        f"{base}.weight_scale_inv": ("F32", np.ones((1, 1), np.float32)),
    }


def int4(base: str = BASE) -> Shard:
    """Return a sound INT4 weight of 64 x 64 ones."""
    return {
        f"{base}.weight_packed": ("I32", np.full((64, 8), 0x99999999, np.uint32).view(np.int32)),
        f"{base}.weight_scale": ("BF16", np.full((64, 2), 0x3F80, np.uint16)),
        f"{base}.weight_shape": ("I32", np.array([64, 64], np.int32)),
    }


def bf16(*shape: int, base: str = BASE) -> Shard:
    """Return a BF16 weight of ones."""
    return {f"{base}.weight": ("BF16", np.full(shape, 0x3F80, np.uint16))}


def norm() -> Shard:
    """Return a tensor that no format quantises."""
    return {"model.norm.weight": ("BF16", np.full(64, 0x3F80, np.uint16))}


def library(data: bytes) -> dict[str, Any]:
    """Return what the safetensors library reads in a file: dtype, shape and data of each tensor."""
    return dict(deserialize(data))  # type: ignore[no-untyped-call]


class Case:
    """A source folder to be spoilt, and a destination."""

    def __init__(self, folder: Path) -> None:
        self.source, self.destination = folder / "source", folder / "destination"

    def write(self, first: Shard, second: Shard | None = None, config: dict[str, Any] | None = None) -> None:
        """Write a checkpoint of two shards, the second with a norm alone, and a config without a quantization block."""
        shards = {SHARDS[0]: first, SHARDS[1]: norm() if second is None else second}
        write_checkpoint(self.source, shards, {"model_type": "kimi_k2"} if config is None else config)

    def point(self, tensor: str, file: str) -> None:
        """Let the index say that a tensor lies in another file."""
        path = self.source / INDEX
        index = json.loads(path.read_text())
        index["weight_map"][tensor] = file
        path.write_text(json.dumps(index))

    def convert(self, to: FormatName = "bf16") -> dict[str, Any]:
        """Convert and return the weight map of the output."""
        k2quant.convert(self.source, self.destination, to=to, workers=1)
        weight_map: dict[str, Any] = json.loads((self.destination / INDEX).read_text())["weight_map"]
        return weight_map

    def refused(self, error: type[CheckpointError], *words: str, to: FormatName = "bf16") -> None:
        """Check that a conversion is refused, in one line that has these words, in time, and leaves no model."""
        begun = time.monotonic()
        with pytest.raises(error) as caught:
            self.convert(to)
        assert time.monotonic() - begun < SECONDS
        message = str(caught.value)
        assert message.isprintable()
        for word in words:
            assert word in message
        assert not (self.destination / CONFIG).exists()
        assert not (self.destination / INDEX).exists()
        assert not list(self.destination.glob("*.safetensors"))


@pytest.fixture
def case(tmp_path: Path) -> Case:
    """A place for a hostile checkpoint."""
    return Case(tmp_path)


# --- headers ----------------------------------------------------------------------------------------------------------


def packed(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    """Return the bytes of a safetensors file; a header that is no `bytes` is written as JSON."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(dtype: object = "BF16", shape: object = (2, 2), offsets: object = (0, 8)) -> dict[str, object]:
    """Return a header's entry."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def one(**changes: object) -> bytes:
    """Return a file of one tensor of 8 bytes, spoilt by these changes to its entry."""
    return packed({"a": entry() | changes}, bytes(8))


def two(first: tuple[int, int], second: tuple[int, int], size: int = 16) -> bytes:
    """Return a file of two tensors of 8 bytes each at these offsets."""
    return packed({"a": entry(offsets=first), "b": entry(offsets=second)}, bytes(size))


_SOUND = b'{"dtype":"BF16","shape":[2,2],"data_offsets":[0,8]}'

LIES = {
    "empty_file": b"",
    "seven_bytes": bytes(7),
    "length_of_zero": packed(b""),
    "length_beyond_the_file": packed({}, length=1000),
    "length_of_2_to_the_64": packed({}, length=2**64 - 1),
    "length_cuts_the_header": packed({"a": entry()}, bytes(8), length=20),
    "header_is_not_utf8": packed(b'{"\xff":' + _SOUND + b"}", bytes(8)),
    "header_is_not_json": packed(b"{]"),
    "header_is_a_list": packed([]),
    "header_is_null": packed(None),
    "header_is_a_number": packed(7),
    "header_has_a_byte_order_mark": packed(b"\xef\xbb\xbf{}"),
    "header_ends_in_zeros": packed(b"{}\0\0"),
    "header_ends_in_garbage": packed(b"{}{}"),
    "header_holds_NaN": packed(b'{"a":{"dtype":"BF16","shape":[NaN],"data_offsets":[0,8]}}', bytes(8)),
    "deep_nesting": packed(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "deep_nesting_of_objects": packed(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "duplicate_dtype": packed(
        b'{"a":{"dtype":"I8","dtype":"BF16","shape":[2,2],"data_offsets":[0,8]}}',
        bytes(8),
    ),
    "duplicate_metadata": packed(b'{"__metadata__":{},"__metadata__":{}}'),
    "metadata_is_a_list": packed({"__metadata__": []}),
    "metadata_holds_a_number": packed({"__metadata__": {"format": 1}}),
    "metadata_holds_half_a_character": packed(b'{"__metadata__":{"format":"\\ud800"}}'),
    "entry_is_null": packed({"a": None}),
    "entry_is_a_number": packed({"a": 1}),
    "entry_lacks_dtype": packed({"a": {"shape": [2, 2], "data_offsets": [0, 8]}}, bytes(8)),
    "entry_lacks_shape": packed({"a": {"dtype": "BF16", "data_offsets": [0, 8]}}, bytes(8)),
    "entry_lacks_offsets": packed({"a": {"dtype": "BF16", "shape": [2, 2]}}, bytes(8)),
    "unknown_dtype": one(dtype="BF17"),
    "dtype_in_lower_case": one(dtype="bf16"),
    "dtype_is_a_number": one(dtype=16),
    "dtype_is_a_list": one(dtype=["BF16"]),
    "dtype_of_another_size": one(dtype="F32"),
    "negative_size": one(shape=[-2, -2]),
    "size_of_minus_zero": packed(b'{"a":{"dtype":"BF16","shape":[-0],"data_offsets":[0,0]}}'),
    "fractional_size": one(shape=[2.0, 2]),
    "size_is_a_string": one(shape=["2", 2]),
    "size_is_true": one(shape=[True, 4]),
    "size_is_a_list": one(shape=[[2, 2]]),
    "shape_is_a_number": one(shape=4),
    "shape_is_null": one(shape=None),
    "shape_of_more_than_64_bits": one(shape=[2**64, 2]),
    "shape_that_wraps_to_the_right_size": one(shape=[2**62 + 1, 4]),
    "shape_whose_product_overflows_before_a_zero": one(shape=[2**62, 2**62, 0], data_offsets=[0, 0]),
    "negative_offset": one(data_offsets=[-8, 0]),
    "fractional_offset": one(data_offsets=[0, 8.0]),
    "reversed_offsets": one(data_offsets=[8, 0]),
    "one_offset": one(data_offsets=[8]),
    "three_offsets": one(data_offsets=[0, 4, 8]),
    "offsets_are_null": one(data_offsets=None),
    "offsets_beyond_the_file": one(data_offsets=[0, 16], shape=[2, 4]),
    "offsets_of_more_than_64_bits": one(data_offsets=[2**64, 2**64 + 8]),
    "offsets_that_do_not_fit_the_shape": one(data_offsets=[0, 4]),
    "data_begins_late": packed({"a": entry(offsets=[8, 16])}, bytes(16)),
    "overlapping_tensors": two((0, 8), (4, 12)),
    "two_tensors_in_one_place": two((0, 8), (0, 8), 8),
    "gap_between_tensors": two((0, 8), (12, 20), 20),
    "data_cut_short": packed({"a": entry()}, bytes(7)),
    "data_after_the_last_tensor": packed({"a": entry()}, bytes(9)),
    "data_without_tensors": packed({}, bytes(8)),
}
"""Files that the safetensors library refuses."""

STRICTER = {
    "duplicate_tensor": packed(b'{"a":' + _SOUND + b',"a":' + _SOUND + b"}", bytes(8)),
    "unknown_key": packed({"a": entry() | {"stride": [2, 1]}}, bytes(8)),
    "seventeen_dimensions": one(shape=[1] * 16 + [4]),
    "name_of_nothing": packed({"": entry()}, bytes(8)),
    "name_with_a_line_break": packed({"a\nb": entry()}, bytes(8)),
    "name_that_begins_with_a_dot": packed({".weight": entry()}, bytes(8)),
    "sub_byte_dtype": packed({"a": entry("F4", [4, 4])}, bytes(8)),
}
"""Files that the safetensors library takes and k2quant does not: they have no place in a checkpoint of K2."""


def _single(case: Case, data: bytes) -> None:
    case.source.mkdir()
    (case.source / SINGLE).write_bytes(data)


@pytest.mark.parametrize("lie", LIES)
def test_lying_header(case: Case, lie: str) -> None:
    """What the safetensors library refuses is refused."""
    with pytest.raises(SafetensorError):
        library(LIES[lie])
    _single(case, LIES[lie])
    case.refused(MalformedFile, SINGLE)


@pytest.mark.parametrize("lie", STRICTER)
def test_header_that_only_the_library_takes(case: Case, lie: str) -> None:
    """Some headers that the safetensors library takes are refused too."""
    library(STRICTER[lie])
    _single(case, STRICTER[lie])
    case.refused(CheckpointError, SINGLE)


def test_whatever_the_library_refuses_is_refused(ram: Path) -> None:
    """On random damage to a header we are never more lenient than the safetensors library, and read the same."""
    header = {
        "__metadata__": {"format": "pt"},
        "a": entry("F32", [2, 1], [0, 8]),
        "b": entry("U8", [0, 3], [8, 8]),
        "c": entry("BF16", [1, 2, 2], [8, 16]),
    }
    data = bytes(range(16))
    sound = json.dumps(header, separators=(",", ":")).encode()
    dice = random.Random(20)  # noqa: S311  not for secrets
    file, both, refused = ram / SINGLE, 0, 0
    for number in range(3000):
        raw = bytearray(sound)
        for _ in range(dice.randint(1, 3)):
            at = dice.randrange(len(raw))
            choice = dice.randrange(4)
            if choice == 0:
                raw[at] = dice.choice(b'0123456789-+.eE"{}[],: \n\\\x00\x7f\xc3truenl')
            elif choice == 1:
                raw[at : at + dice.randint(1, 4)] = b""
            elif choice == 2:
                raw[at:at] = dice.choice(
                    [b"0", b"-", b" ", b"1", b",", b'"', b"\\ud800", b"\\u0041", b".0", b"e0", b"[]"]
                )
            else:
                other = dice.randrange(len(raw))
                raw[at:at] = raw[other : other + dice.randint(1, 30)]
        content = packed(bytes(raw), data)
        file.write_bytes(content)
        try:
            theirs = {name: (x["dtype"], x["shape"], bytes(x["data"])) for name, x in library(content).items()}
        except SafetensorError:
            with pytest.raises(CheckpointError):
                pytest.fail(f"case {number}: {bytes(raw)!r} was read as {read_header(file).tensors}")
            refused += 1
            continue
        try:
            ours = read_header(file).tensors
        except CheckpointError:
            continue
        both += 1
        assert {n: (e.dtype, list(e.shape), content[e.start : e.stop]) for n, e in ours.items()} == theirs
    assert both > 50
    assert refused > 1000


def _sparse(path: Path, head: bytes, size: int) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        file.write(head)
        file.truncate(size)


def test_header_of_100_mb_of_zeros(case: Case) -> None:
    """A header as long as the format allows that holds nothing is refused at once."""
    _sparse(case.source / SINGLE, struct.pack("<Q", 100_000_000), 100_000_008)
    case.refused(MalformedFile, "not valid JSON")


def test_header_of_more_than_100_mb(case: Case) -> None:
    """A header that is longer than the safetensors library allows is not even read."""
    _sparse(case.source / SINGLE, struct.pack("<Q", 100_000_001), 200_000_000)
    case.refused(MalformedFile, "length is impossible", "100,000,001 bytes")


def test_header_of_100_mb_of_brackets(case: Case) -> None:
    """A header of nothing but opening brackets neither crashes nor hangs the reader."""
    case.source.mkdir()
    (case.source / SINGLE).write_bytes(packed(b'{"a":' + b"[" * 99_999_995))
    case.refused(MalformedFile, "not valid JSON")


def test_header_of_100_mb_of_one_string(case: Case) -> None:
    """A header of one endless name is refused without printing it."""
    case.source.mkdir()
    (case.source / SINGLE).write_bytes(packed(b'{"' + b"a" * 90_000_000 + b'":1}'))
    begun = time.monotonic()
    with pytest.raises(MalformedFile) as caught:
        case.convert()
    assert time.monotonic() - begun < SECONDS
    assert len(str(caught.value)) < 2000


def test_weight_of_endless_empty_rows(case: Case) -> None:
    """2^62 rows of no columns take no bytes, and no time either."""
    name = "model.layers.0.self_attn.q_a_proj.weight"
    begun = time.monotonic()
    _single(case, packed({name: entry("F32", [2**40, 0], [0, 0]), "model.norm.weight": entry("F32", [2])}, bytes(8)))
    k2quant.convert(case.source, case.destination, to="bf16", workers=1)
    assert k2quant.verify(case.source, case.destination, workers=1).passed
    assert time.monotonic() - begun < SECONDS


def test_fused_experts_beyond_number(case: Case) -> None:
    """A fused tensor of millions of experts of one weight each is refused, not taken apart."""
    name = "model.layers.1.mlp.experts.down_proj"
    size = 2**31
    raw = json.dumps({name: entry("BF16", [2**30, 1, 1], [0, size])}).encode()
    _sparse(case.source / SINGLE, packed(raw), 8 + len(raw) + size)
    case.refused(CheckpointError, name)


# --- the index --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    ["../outside.safetensors", "sub/../../outside.safetensors", "sub/inside.safetensors", "..\\outside.safetensors"],
)
def test_index_path_leaves_the_folder(case: Case, path: str) -> None:
    """A path in the index that is no plain file name is refused, whether it leads out or not."""
    case.write(fp8())
    (case.source / "sub").mkdir()
    for target in (case.source.parent / "outside.safetensors", case.source / "sub" / "inside.safetensors"):
        target.write_bytes((case.source / SHARDS[1]).read_bytes())
    case.point("model.norm.weight", path)
    case.refused(UnsafePath, "not a plain file name")


def test_index_path_is_absolute(case: Case) -> None:
    """An absolute path in the index is refused, even one that points into the folder."""
    case.write(fp8())
    case.point("model.norm.weight", str((case.source / SHARDS[1]).resolve()))
    case.refused(UnsafePath, "not a plain file name")


@pytest.mark.parametrize("name", [SHARDS[1], INDEX, CONFIG, "tokenizer.json"])
def test_link_out_of_the_folder(case: Case, name: str) -> None:
    """A link that leads out of the folder is not followed: no shard, index, config or other file."""
    case.write(fp8(), config=FP8_CONFIG)
    outside = case.source.parent / "outside"
    (case.source / "tokenizer.json").write_text("{}")
    (case.source / name).rename(outside)
    (case.source / name).symlink_to(outside)
    case.refused(UnsafePath, "leaves the folder", name)


def test_link_out_of_the_folder_in_two_steps(case: Case) -> None:
    """A link to a linked folder within leads out as well."""
    case.write(fp8())
    outside = case.source.parent / "outside"
    outside.mkdir()
    (case.source / SHARDS[1]).rename(outside / SHARDS[1])
    (case.source / "sub").symlink_to(outside)
    (case.source / SHARDS[1]).symlink_to(Path("sub") / SHARDS[1])
    case.refused(UnsafePath, "leaves the folder")


def test_link_within_the_folder(case: Case) -> None:
    """A link to a file of the same folder is followed."""
    case.write(fp8())
    (case.source / SHARDS[1]).rename(case.source / "real")
    (case.source / SHARDS[1]).symlink_to("real")
    assert set(case.convert()) == {f"{BASE}.weight", "model.norm.weight"}


def test_links_in_a_circle(case: Case) -> None:
    """Links that lead round in a circle are refused."""
    case.write(fp8())
    (case.source / SHARDS[1]).unlink()
    (case.source / SHARDS[1]).symlink_to("circle")
    (case.source / "circle").symlink_to(SHARDS[1])
    case.refused(CheckpointError, SHARDS[1])


def test_linked_folder_is_not_walked(case: Case) -> None:
    """Other files are not gathered through a linked folder."""
    case.write(fp8())
    outside = case.source.parent / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_text("secret")
    (case.source / "sub").symlink_to(outside)
    case.convert()
    assert not (case.destination / "sub").exists()


def _hub_snapshot(case: Case) -> Path:
    """Lay a checkpoint out as huggingface_hub's cache does and return the snapshot."""
    case.write(fp8(), config=FP8_CONFIG)
    repository = case.source.parent / "models--moonshotai--tiny"
    snapshot, blobs = repository / "snapshots" / "0123abcd", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(case.source.iterdir())):
        path.rename(blobs / f"{number:064}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"{number:064}")
    case.source = snapshot
    return repository


def test_snapshot_in_a_hub_cache(case: Case) -> None:
    """A Hugging Face cache, whose snapshots are links to blobs, is a source like any other."""
    _hub_snapshot(case)
    assert set(case.convert()) == {f"{BASE}.weight", "model.norm.weight"}
    assert not any(path.is_symlink() for path in case.destination.rglob("*"))


def test_snapshot_that_leaves_its_repository(case: Case) -> None:
    """A snapshot in a Hugging Face cache may link to its own repository's blobs, not to another's."""
    repository = _hub_snapshot(case)
    other = repository.with_name("models--other") / "blobs" / "0"
    other.parent.mkdir(parents=True)
    link = case.source / SHARDS[1]
    link.resolve().rename(other)
    link.unlink()
    link.symlink_to(other)
    case.refused(UnsafePath, "leaves the folder")


def test_index_names_an_absent_file(case: Case) -> None:
    """A file that the index names and that is not there is an incomplete download."""
    case.write(fp8())
    (case.source / SHARDS[1]).unlink()
    case.refused(MissingTensor, SHARDS[1], "not there")


def test_index_names_a_dangling_link(case: Case) -> None:
    """A link to nothing is a file that is not there, and is named with what it leads to."""
    case.write(fp8())
    (case.source / SHARDS[1]).unlink()
    (case.source / SHARDS[1]).symlink_to("nothing.safetensors")
    case.refused(CheckpointError, SHARDS[1], "a link to a file that is not there", "nothing.safetensors")


def test_index_names_an_absent_tensor(case: Case) -> None:
    """A tensor that the index names and no shard holds is missing."""
    case.write(fp8())
    case.point("model.layers.1.input_layernorm.weight", SHARDS[0])
    case.refused(MissingTensor, "model.layers.1.input_layernorm.weight", SHARDS[0])


def test_index_names_the_wrong_shard(case: Case) -> None:
    """A tensor that lies in another shard than the index says is missing: nobody knows which of the two is wrong."""
    case.write(fp8())
    case.point(f"{BASE}.weight", SHARDS[1])
    case.refused(MissingTensor, f"{BASE}.weight", SHARDS[1])


def test_partner_in_the_wrong_shard(case: Case) -> None:
    """A scale that lies in another shard than the index says is missing."""
    case.write(fp8())
    case.point(f"{BASE}.weight_scale_inv", SHARDS[1])
    case.refused(MissingTensor, f"{BASE}.weight_scale_inv", SHARDS[1])


def test_partner_in_another_shard_is_found(case: Case) -> None:
    """A scale in another shard than its weight is right where the index says so, as in DeepSeek-V3."""
    tensors = fp8()
    scale = {f"{BASE}.weight_scale_inv": tensors.pop(f"{BASE}.weight_scale_inv")}
    case.write(tensors, norm() | scale)
    assert set(case.convert()) == {f"{BASE}.weight", "model.norm.weight"}


def test_unlisted_tensors_are_ignored(case: Case) -> None:
    """What a shard holds and the index does not name is no part of the checkpoint."""
    stray = fp8("model.layers.1.mlp.experts.9.up_proj")
    case.write(fp8() | stray)
    path = case.source / INDEX
    index = json.loads(path.read_text())
    for name in stray:
        del index["weight_map"][name]
    path.write_text(json.dumps(index))
    assert set(case.convert()) == {f"{BASE}.weight", "model.norm.weight"}


def test_tensor_in_two_shards(case: Case) -> None:
    """Of two tensors of one name the one that the index names is read."""
    other = {name: (dtype, np.zeros_like(array)) for name, (dtype, array) in fp8().items()}
    case.write(fp8(), norm() | other)
    for name in other:
        case.point(name, SHARDS[0])
    case.convert()
    found = library((case.destination / SHARDS[0]).read_bytes())
    assert bytes(found[f"{BASE}.weight"]["data"]) == b"\x80\x3f" * 64 * 64


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"weight_map": {}}',
        '{"weight_map": []}',
        '{"weight_map": null}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": null}}',
        '{"weight_map": {"a": ["model.safetensors"]}}',
        '{"weight_map": {"a": "m.safetensors"}, "weight_map": {"a": "m.safetensors"}}',
        '{"weight_map": {"a": "m.safetensors", "a": "m.safetensors"}}',
        '{"weight_map": ' + "[" * 100_000,
        '{"weight_map": ' + '{"a":' * 100_000,
        '{"weight_map": {"a": NaN}}',
    ],
    ids=range(16),
)
def test_index_that_does_not_parse(case: Case, content: str) -> None:
    """An index that is no index, or holds a key twice, is refused, although the shards are sound."""
    case.write(fp8())
    (case.source / INDEX).write_text(content)
    case.refused(MalformedFile, INDEX)


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[2Jb", "a\ud800b", ""])
def test_index_with_an_unprintable_tensor(case: Case, name: str) -> None:
    """The name of a tensor cannot break the error message into lines or send codes to the terminal."""
    case.write(fp8())
    case.point(name, SHARDS[0])
    case.refused(CheckpointError)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a\nb.safetensors", "\x1b[2J.safetensors", "\x00.safetensors", "x" * 300]
)
def test_index_with_an_impossible_file(case: Case, name: str) -> None:
    """A file name that no file of a checkpoint has is refused."""
    case.write(fp8())
    case.point("model.norm.weight", name)
    case.refused(CheckpointError)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.pth", "model.ckpt", "model.pkl"])
def test_index_names_a_pickle(case: Case, name: str) -> None:
    """Pickled weights are never loaded, although the index names them."""
    case.write(fp8())
    (case.source / name).write_bytes(b"\x80\x04cos\nsystem\n")
    case.point("model.norm.weight", name)
    case.refused(UnsupportedFormat, name, "pickled weights are never loaded")


def test_only_pickles(case: Case) -> None:
    """A folder with nothing but pickled weights is refused, with the reason."""
    case.source.mkdir()
    (case.source / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    case.refused(UnsupportedFormat, "pickled weights are never loaded")


def test_pickles_are_not_copied(case: Case) -> None:
    """Pickles beside the shards are left where they are."""
    case.write(fp8())
    for name in ("pytorch_model.bin", "optimizer.pt"):
        (case.source / name).write_bytes(b"\x80\x04cos\nsystem\n")
    case.convert()
    assert not {"pytorch_model.bin", "optimizer.pt"} & {path.name for path in case.destination.iterdir()}


def test_empty_folder(case: Case) -> None:
    """A folder without a checkpoint is refused."""
    case.source.mkdir()
    case.refused(CheckpointError, "no checkpoint here", "an empty folder")


def test_absent_folder(case: Case) -> None:
    """A source that is not there is refused."""
    case.refused(CheckpointError, "no such folder")


@pytest.mark.parametrize("name", [SHARDS[0], INDEX, CONFIG, SINGLE])
@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_not_a_file(case: Case, name: str, kind: str) -> None:
    """A pipe, folder or device in the place of a file neither hangs nor crashes the reader."""
    case.write(fp8(), config=FP8_CONFIG)
    if name == SINGLE:
        for path in case.source.iterdir():
            path.unlink()
    path = case.source / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    case.refused(CheckpointError, name)


@pytest.mark.parametrize("name", ["INCOMPLETE", "k2quant_report.json", f"{SHARDS[0]}.partial", ".k2quant"])
def test_folder_in_our_place(case: Case, name: str) -> None:
    """A folder of the source that bears the name of a file of ours is not copied into its place."""
    case.write(fp8(), config=FP8_CONFIG)
    (case.source / name).mkdir()
    (case.source / name / "x.txt").write_text("x")
    if name == "INCOMPLETE":
        case.refused(CheckpointError, "not finished")
    else:
        case.convert()
        assert not (case.destination / name / "x.txt").exists()


@pytest.mark.parametrize("name", ["a\nb.txt", "a\x1b[2J.txt", "a\udcff.txt"])
def test_other_file_with_an_unprintable_name(case: Case, name: str) -> None:
    """A file beside the weights whose name no journal or terminal can hold is refused."""
    case.write(fp8())
    (case.source / name).write_text("x")
    case.refused(UnsafePath, "not a plain file name")


def test_pipe_beside_the_weights(case: Case) -> None:
    """A pipe among the other files is passed over."""
    case.write(fp8())
    os.mkfifo(case.source / "tokenizer.json")
    case.convert()
    assert not (case.destination / "tokenizer.json").exists()


# --- weights and their partners ---------------------------------------------------------------------------------------


def test_fp8_without_scale(case: Case) -> None:
    """An FP8 weight whose scale the index lacks is named."""
    tensors = fp8()
    del tensors[f"{BASE}.weight_scale_inv"]
    case.write(tensors)
    case.refused(MissingTensor, f"{BASE}.weight_scale_inv")


@pytest.mark.parametrize("suffix", ["weight_scale", "weight_shape"])
def test_int4_without_partner(case: Case, suffix: str) -> None:
    """A packed weight whose scale or shape the index lacks is named."""
    tensors = int4()
    del tensors[f"{BASE}.{suffix}"]
    case.write(tensors)
    case.refused(MissingTensor, f"{BASE}.{suffix}")


@pytest.mark.parametrize("suffix", ["weight_scale_inv", "weight_scale", "weight_shape"])
def test_partner_without_weight(case: Case, suffix: str) -> None:
    """A scale or shape without its weight is a part of something that is missing."""
    orphan = {**fp8(), **int4()}[f"{BASE}.{suffix}"]
    case.write({f"{BASE}.{suffix}": orphan})
    case.refused(MissingTensor, f"{BASE}.{suffix}", "without its weight")


@pytest.mark.parametrize("shape", [(2, 1), (1, 2), (1,), (), (1, 1, 1), (0, 1), (64, 2)])
def test_fp8_scale_of_wrong_shape(case: Case, shape: tuple[int, ...]) -> None:
    """A scale must have one entry for each block."""
    case.write(fp8() | {f"{BASE}.weight_scale_inv": ("F32", np.ones(shape, np.float32))})
    case.refused(ShapeMismatch, f"{BASE}.weight_scale_inv", "expected (1, 1)", f"found {shape}")


@pytest.mark.parametrize("dtype", ["I16", "F64", "I32", "F8_E5M2"])
def test_fp8_scale_of_wrong_dtype(case: Case, dtype: str) -> None:
    """The scale of an FP8 weight is F32, or of a dtype that is exact in F32."""
    width = {"F64": np.uint64, "I32": np.uint32, "F8_E5M2": np.uint8}.get(dtype, np.uint16)
    case.write(fp8() | {f"{BASE}.weight_scale_inv": (dtype, np.ones((1, 1), width))})
    case.refused(DtypeMismatch, f"{BASE}.weight_scale_inv", "F32", dtype)


@pytest.mark.parametrize("shape", [(63, 2), (64, 3), (64, 0), (64,), (2, 64), (64, 2, 1), (64, 128)])
def test_int4_scale_of_wrong_shape(case: Case, shape: tuple[int, ...]) -> None:
    """The scales of a packed weight must divide its rows into groups."""
    case.write(int4() | {f"{BASE}.weight_scale": ("BF16", np.full(shape, 0x3F80, np.uint16))})
    case.refused(ShapeMismatch, f"{BASE}.weight_scale", f"found {shape}")


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E8M0", "I8"])
def test_int4_scale_of_wrong_dtype(case: Case, dtype: str) -> None:
    """The scales of a packed weight are floats."""
    case.write(int4() | {f"{BASE}.weight_scale": (dtype, np.ones((64, 2), np.uint8))})
    case.refused(DtypeMismatch, f"{BASE}.weight_scale", dtype)


@pytest.mark.parametrize("to", ["bf16", "fp8", "int4"])
@pytest.mark.parametrize("claim", [(64, 63), (63, 64), (128, 32), (-64, 64), (0, 0)])
def test_int4_shape_of_wrong_value(case: Case, claim: tuple[int, int], to: FormatName) -> None:
    """What weight_shape says must be what the packed words hold, even where it would only be copied."""
    case.write(int4() | {f"{BASE}.weight_shape": ("I32", np.array(claim, np.int32))})
    case.refused(ShapeMismatch, f"{BASE}.weight_shape", f"found {claim}", to=to)


def test_int4_shape_of_wrong_shape(case: Case) -> None:
    """weight_shape holds two numbers."""
    case.write(int4() | {f"{BASE}.weight_shape": ("I32", np.array([64, 64, 1], np.int32))})
    case.refused(ShapeMismatch, f"{BASE}.weight_shape", "found (3,)")


def test_int4_shape_of_wrong_dtype(case: Case) -> None:
    """weight_shape holds integers."""
    case.write(int4() | {f"{BASE}.weight_shape": ("F32", np.array([64, 64], np.float32))})
    case.refused(DtypeMismatch, f"{BASE}.weight_shape", "F32")


@pytest.mark.parametrize("group", [1, 2, 4, 8, 16, 64])
def test_int4_of_another_group(case: Case, group: int) -> None:
    """INT4 of another group size is read as what it is, and refused as a target."""
    scales = np.random.default_rng(0).integers(0x3F00, 0x3F80, (64, 64 // group), np.uint16)
    case.write(int4() | {f"{BASE}.weight_scale": ("BF16", scales)}, config=int4_config(group_size=group))
    case.refused(UnsupportedFormat, f"groups of {group}", to="int4")
    case.convert()
    found = library((case.destination / SHARDS[0]).read_bytes())
    assert bytes(found[f"{BASE}.weight"]["data"]) == scales.repeat(group, 1).tobytes()


@pytest.mark.parametrize("shape", [(4096,), (16, 16, 16), ()])
@pytest.mark.parametrize("to", ["fp8", "int4"])
def test_expert_that_is_no_matrix(case: Case, shape: tuple[int, ...], to: FormatName) -> None:
    """A projection that is no matrix cannot be quantised."""
    case.write(bf16(*shape))
    case.refused(ShapeMismatch, f"{BASE}.weight", f"found {shape}", to=to)


@pytest.mark.parametrize("shape", [(0, 64), (64, 0), (0, 0)])
@pytest.mark.parametrize("to", ["fp8", "int4"])
def test_expert_that_is_empty(case: Case, shape: tuple[int, ...], to: FormatName) -> None:
    """A projection without a weight cannot be quantised."""
    case.write(bf16(*shape))
    case.refused(ShapeMismatch, f"{BASE}.weight", f"found {shape}", to=to)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "I32"])
@pytest.mark.parametrize("shape", [(64,), (64, 8, 8), (0, 8), ()])
def test_quantised_weight_that_is_no_matrix(case: Case, dtype: str, shape: tuple[int, ...]) -> None:
    """An FP8 or packed weight of any but two dimensions, or of none, is no weight."""
    name, numpy = ("weight", np.uint8) if dtype == "F8_E4M3" else ("weight_packed", np.int32)
    case.write({**(fp8() if name == "weight" else int4()), f"{BASE}.{name}": (dtype, np.zeros(shape, numpy))})
    case.refused(ShapeMismatch, f"{BASE}.{name}", f"found {shape}")


def test_width_that_32_does_not_divide(case: Case) -> None:
    """INT4 needs a width that 32 divides, and the error says so and what to do."""
    case.write(bf16(64, 48))
    case.refused(ShapeMismatch, f"{BASE}.weight", "32", "(64, 48)", "`ignore=`", to="int4")


@pytest.mark.parametrize("other", [bf16(64, 64), fp8()])
def test_weight_stored_twice(case: Case, other: Shard) -> None:
    """A weight that is stored plain, or as FP8, and packed as well has no one meaning."""
    case.write(int4() | other)
    case.refused(MalformedFile, BASE, "twice")


def test_expert_alone_and_fused(case: Case) -> None:
    """An expert that stands alone and in a fused tensor as well has no one meaning."""
    fused = {"model.layers.1.mlp.experts.down_proj": ("BF16", np.zeros((2, 64, 32), np.uint16))}
    case.write(fused | bf16(64, 32, base="model.layers.1.mlp.experts.1.down_proj"))
    case.refused(MalformedFile, "model.layers.1.mlp.experts.1.down_proj.weight", "twice")


@pytest.mark.parametrize("shape", [(2, 3, 64), (64, 64), (2, 0, 64), (0, 2, 64), (2, 2, 2, 64)])
def test_fused_experts_of_wrong_shape(case: Case, shape: tuple[int, ...]) -> None:
    """Fused gate and up projections have three dimensions and an even number of rows."""
    name = "model.layers.1.mlp.experts.gate_up_proj"
    case.write({name: ("BF16", np.zeros(shape, np.uint16))})
    case.refused(ShapeMismatch, name, f"found {shape}")


def test_fused_experts_in_fp8(case: Case) -> None:
    """Fused experts in FP8 are refused: no release has them, and nobody knows their blocks."""
    name = "model.layers.1.mlp.experts.gate_up_proj"
    case.write({name: ("F8_E4M3", np.zeros((2, 4, 64), np.uint8))})
    case.refused(UnsupportedFormat, name, "F8_E4M3")


def test_no_weight_in_scope(case: Case) -> None:
    """A quantisation that would quantise nothing is refused."""
    case.write(norm())
    case.refused(CheckpointError, "no weight is in scope", to="int4")


# --- formats that are real but not ours -------------------------------------------------------------------------------


def test_asymmetric_int4(case: Case) -> None:
    """INT4 with zero points is refused by name."""
    case.write(int4() | {f"{BASE}.weight_zero_point": ("I32", np.zeros((8, 2), np.int32))})
    case.refused(UnsupportedFormat, f"{BASE}.weight_zero_point", "asymmetric INT4")


def test_reordered_int4(case: Case) -> None:
    """INT4 with reordered columns is refused by name."""
    case.write(int4() | {f"{BASE}.weight_g_idx": ("I32", np.zeros(64, np.int32))})
    case.refused(UnsupportedFormat, f"{BASE}.weight_g_idx", "reordered columns")


@pytest.mark.parametrize("suffix", ["weight_blocks", "weight_scales", "qweight", "qzeros"])
def test_tensor_of_another_format(case: Case, suffix: str) -> None:
    """Tensors of MXFP4, GPTQ and AWQ checkpoints are refused by name; FP4 that is read has hostile tests of its own."""
    case.write({f"{BASE}.{suffix}": ("U8", np.zeros((64, 32), np.uint8))})
    case.refused(UnsupportedFormat, f"{BASE}.{suffix}", "expected BF16")


@pytest.mark.parametrize("dtype", ["F8_E5M2", "I8", "F64", "U8"])
def test_weight_of_another_dtype(case: Case, dtype: str) -> None:
    """A weight of any dtype but BF16, F16, F32 and E4M3 is refused."""
    numpy = np.float64 if dtype == "F64" else np.uint8
    case.write({f"{BASE}.weight": (dtype, np.zeros((64, 64), numpy))})
    case.refused(UnsupportedFormat, f"{BASE}.weight", dtype)


@pytest.mark.parametrize("shape", [(), (1,), (64,), (64, 1)])
def test_fp8_with_a_scale_for_the_tensor_or_for_rows(case: Case, shape: tuple[int, ...]) -> None:
    """FP8 with a `weight_scale` that is not one for each block, as other tools write it, is refused by name."""
    tensors = fp8()
    del tensors[f"{BASE}.weight_scale_inv"]
    case.write(tensors | {f"{BASE}.weight_scale": ("F32", np.ones(shape, np.float32))})
    case.refused(UnsupportedFormat, f"{BASE}.weight_scale", "for each row or tensor")


# --- the config -------------------------------------------------------------------------------------------------------


def quantization(**changes: Any) -> dict[str, Any]:
    """Return a config of block FP8 with changes to its quantization block."""
    return FP8_CONFIG | {"quantization_config": FP8_CONFIG["quantization_config"] | changes}


@pytest.mark.parametrize("model_type", ["llama", "kimi_vl", "deepseek_v2", 3, ["kimi_k2"], {}])
def test_config_of_another_model(case: Case, model_type: object) -> None:
    """A model whose tensor names we do not know is refused."""
    case.write(fp8(), config=FP8_CONFIG | {"model_type": model_type})
    case.refused(UnsupportedFormat, "not a model of this family", "kimi_k2")


def test_config_of_another_model_inside(case: Case) -> None:
    """The model type in `text_config` counts as well."""
    case.write(fp8(), config={"model_type": "kimi_k25", "text_config": {"model_type": "llama"}})
    case.refused(UnsupportedFormat, "llama")


@pytest.mark.parametrize("method", ["gptq", "awq", "mxfp4", "bitsandbytes", None, 4, [], {}])
def test_config_of_unknown_method(case: Case, method: object) -> None:
    """A quant_method that we do not read is refused by name."""
    case.write(fp8(), config=quantization(quant_method=method))
    case.refused(UnsupportedFormat, "quant_method", repr(method))


@pytest.mark.parametrize("size", [[1, 128], [64, 64], [128], 128, None, "128", [[128], [128]], [128, 128, 1], {}])
def test_config_of_another_block(case: Case, size: object) -> None:
    """A block size that the scales contradict is refused."""
    case.write(fp8() | fp8_of_rows(256), config=quantization(weight_block_size=size))
    case.refused(CheckpointError, "weight_block_size", "contradicts the tensors")


def fp8_of_rows(rows: int) -> Shard:
    """Return a weight whose scales tell 128x128 blocks from 1x128 ones."""
    base = "model.layers.1.mlp.experts.1.up_proj"
    return {
        f"{base}.weight": ("F8_E4M3", np.full((rows, 64), 0x38, np.uint8)),
        f"{base}.weight_scale_inv": ("F32", np.ones((-(-rows // 128), 1), np.float32)),
    }


@pytest.mark.parametrize("fmt", ["e5m2", None, 1, []])
def test_config_of_another_fp8(case: Case, fmt: object) -> None:
    """An FP8 that is not E4M3 is refused."""
    case.write(fp8(), config=quantization(fmt=fmt))
    case.refused(UnsupportedFormat, "fmt", "e4m3")


def test_config_claims_fp8_beside_int4(case: Case) -> None:
    """A config that says FP8 for a checkpoint whose quantised weights are INT4 belongs to other files."""
    case.write(int4() | bf16(64, 64, base="model.layers.1.mlp.experts.1.up_proj"), config=FP8_CONFIG)
    case.refused(CheckpointError, "contradicts the tensors")


def test_config_claims_int4_beside_fp8(case: Case) -> None:
    """A config that says INT4 for a checkpoint whose quantised weights are FP8 belongs to other files."""
    case.write(fp8() | bf16(64, 64, base="model.layers.1.mlp.experts.1.up_proj"), config=int4_config())
    case.refused(CheckpointError, "contradicts the tensors")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_bits", 8),
        ("num_bits", "4"),
        ("num_bits", [4]),
        ("type", "float"),
        ("type", None),
        ("symmetric", False),
        ("symmetric", None),
        ("actorder", "group"),
        ("actorder", []),
        ("actorder", {}),
        ("group_size", 128),
        ("group_size", "32"),
        ("group_size", None),
        ("group_size", [32]),
        ("group_size", {}),
    ],
)
def test_config_of_another_int4(case: Case, key: str, value: object) -> None:
    """A scheme that is not symmetric 4-bit int in groups of 32, as the tensors are, is refused."""
    case.write(int4(), config=int4_config(**{key: value}))
    case.refused(CheckpointError, CONFIG, key)


@pytest.mark.parametrize("layout", ["int-quantized", "mxfp8-quantized", None, [], {}])
def test_config_of_another_packing(case: Case, layout: object) -> None:
    """A compressed-tensors format other than pack-quantized and float-quantized is refused by name."""
    config = int4_config()
    config["quantization_config"]["format"] = layout
    case.write(int4(), config=config)
    case.refused(UnsupportedFormat, "pack-quantized", repr(layout))


@pytest.mark.parametrize("groups", [None, {}, [], {"group_0": None}, {"group_0": {}}, {"group_0": {"weights": []}}])
def test_config_without_groups(case: Case, groups: object) -> None:
    """A compressed-tensors block without a scheme is refused."""
    config = int4_config()
    config["quantization_config"]["config_groups"] = groups
    case.write(int4(), config=config)
    case.refused(MalformedFile, CONFIG)


@pytest.mark.parametrize("block", ["fp8", 8, [], True])
def test_quantization_block_that_is_no_object(case: Case, block: object) -> None:
    """A quantization_config that is no object is refused."""
    case.write(fp8(), config=FP8_CONFIG | {"quantization_config": block})
    case.refused(MalformedFile, "quantization_config")


@pytest.mark.parametrize("place", ["compression_config", "text_config"])
def test_second_block_that_contradicts(case: Case, place: str) -> None:
    """Every place where engines look for the block is checked."""
    other = int4_config()["quantization_config"]
    case.write(fp8(), config=FP8_CONFIG | {place: {"quantization_config": other} if place == "text_config" else other})
    case.refused(CheckpointError, "contradicts the tensors")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{",
        b"\xff{}",
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b'{"a": 1e999}',
        b'{"a": 1, "a": 2}',
        b'{"a":' * 100_000,
        b'{"a": ' + b"9" * 5000 + b"}",
        b'{"a": "\\ud800"}',
    ],
    ids=range(11),
)
def test_config_that_does_not_parse(case: Case, content: bytes) -> None:
    """A config that other JSON readers would refuse, or read otherwise, is refused."""
    case.write(fp8())
    (case.source / CONFIG).write_bytes(content)
    case.refused(MalformedFile, CONFIG)


# --- values -----------------------------------------------------------------------------------------------------------

Spoil = Callable[[], tuple[Shard, str, str]]


def _spoilt(tensors: Shard, suffix: str, place: tuple[int, int], value: float) -> tuple[Shard, str, str]:
    name = f"{BASE}.{suffix}"
    tensors[name][1][place] = value
    return tensors, name, f"row {place[0]}, column {place[1]}"


def _f32(base: str = BASE) -> Shard:
    return {f"{base}.weight": ("F32", np.ones((64, 64), np.float32))}


BAD_VALUES: dict[str, Spoil] = {
    "nan_in_bf16": lambda: _spoilt(bf16(64, 64), "weight", (63, 17), 0x7FC0),
    "negative_nan_in_bf16": lambda: _spoilt(bf16(64, 64), "weight", (0, 0), 0xFF81),
    "infinity_in_bf16": lambda: _spoilt(bf16(64, 64), "weight", (5, 63), 0xFF80),
    "nan_in_f32": lambda: _spoilt(_f32(), "weight", (63, 17), np.nan),
    "infinity_in_f32": lambda: _spoilt(_f32(), "weight", (40, 1), -np.inf),
    "f32_beyond_bf16": lambda: _spoilt(_f32(), "weight", (40, 1), 3.4e38),
    "nan_in_fp8": lambda: _spoilt(fp8(), "weight", (63, 17), 0x7F),
    "negative_nan_in_fp8": lambda: _spoilt(fp8(), "weight", (1, 2), 0xFF),
    "negative_scale_of_fp8": lambda: _spoilt(fp8(), "weight_scale_inv", (0, 0), -1.0),
    "nan_scale_of_fp8": lambda: _spoilt(fp8(), "weight_scale_inv", (0, 0), np.nan),
    "infinite_scale_of_fp8": lambda: _spoilt(fp8(), "weight_scale_inv", (0, 0), np.inf),
    "negative_scale_of_int4": lambda: _spoilt(int4(), "weight_scale", (63, 1), 0xBF80),
    "nan_scale_of_int4": lambda: _spoilt(int4(), "weight_scale", (63, 1), 0x7FC0),
    "infinite_scale_of_int4": lambda: _spoilt(int4(), "weight_scale", (0, 1), 0x7F80),
}


@pytest.mark.parametrize("to", ["bf16", "fp8", "int4"])
@pytest.mark.parametrize("value", BAD_VALUES)
def test_value_that_no_conversion_can_carry(case: Case, value: str, to: FormatName) -> None:
    """NaN, infinity or a bad scale ends a conversion, with the tensor's name and place; what is copied may hold it."""
    tensors, name, place = BAD_VALUES[value]()
    source = "int4" if "int4" in value else "fp8" if "fp8" in value else "bf16" if "f32" not in value else "f32"
    case.write(tensors)
    if source == to:
        case.convert(to)
        assert k2quant.verify(case.source, case.destination, workers=1).passed
    else:
        case.refused(BadValue, name, place, to=to)


def test_bad_value_in_a_later_panel(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The place of a bad value counts from the beginning of the tensor, whatever part of it was being worked on."""
    monkeypatch.setattr("k2quant.checkpoint.panels.PANEL_WEIGHTS", 1)
    tensors = fp8_of_rows(600)
    name = next(iter(tensors))
    tensors[name][1][599, 3] = 0x7F
    case.write(tensors)
    case.refused(BadValue, name, "row 599, column 3")


def test_bad_scale_in_a_later_panel(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The place of a bad scale counts from the beginning of the scales."""
    monkeypatch.setattr("k2quant.checkpoint.panels.PANEL_WEIGHTS", 1)
    tensors = fp8_of_rows(600)
    name = list(tensors)[1]
    tensors[name][1][4, 0] = -2
    case.write(tensors)
    case.refused(BadValue, name, "row 4, column 0", "negative scale")


def test_bad_value_in_a_vector(case: Case) -> None:
    """A bad value in a tensor of one dimension is found as well."""
    values = np.ones(64, np.float32)
    values[33] = np.inf
    case.write({"model.norm.weight": ("F32", values)}, bf16(2, 2))
    case.refused(BadValue, "model.norm.weight", "row 33, column 0")


def test_partner_in_fused_experts_keeps_its_place(case: Case) -> None:
    """A bad value in fused experts is named by its expert."""
    fused = np.full((3, 64, 64), 0x3F80, np.uint16)
    fused[2, 40, 7] = 0x7F80
    case.write({"model.layers.1.mlp.experts.gate_up_proj": ("BF16", fused)})
    case.refused(BadValue, "model.layers.1.mlp.experts.2.up_proj.weight", "row 8, column 7", to="int4")
