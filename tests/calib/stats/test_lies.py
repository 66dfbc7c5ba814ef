"""Each way in which a folder of statistics can lie, by name: the error says file and tensor, and what to do."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from k2quant.calib.stats.reading import Stats, open_stats
from k2quant.checkpoint.header import read_header
from k2quant.errors import BadValue, CheckpointError, MalformedFile, MissingTensor, ShapeMismatch, UnsafePath

MANIFEST = "k2quant_stats.json"
FILE, RECORD = "layer-00001.safetensors", "layer-00001.json"
E, ATTENTION = "model.layers.1.mlp.experts", "model.layers.1.self_attn"


@pytest.fixture
def folder(standing: Any, tmp_path: Path) -> Path:
    """Return a finished folder with Hessians, to be spoilt."""
    whole = standing.home / "whole"
    if not whole.exists():
        standing.write("whole", standing.manifest(hessians=True), empty=3)
    return Path(shutil.copytree(whole, tmp_path / "spoilt"))


def use(stats: Stats) -> None:
    """Read all that there is."""
    for layer in stats.layers:
        stats.check_layer(layer)
        for part in ("train", "validation"):
            stats.load(layer, part)
            stats.hessian(f"model.layers.{layer}.self_attn.o_proj", part)
            stats.hessian(f"model.layers.{layer}.mlp.experts.0.down_proj", part)
            stats.layer_hessian(f"model.layers.{layer}.mlp.experts.0.gate_proj", part)


def resealed(folder: Path) -> None:
    """Have records and manifest name what lies there now: a liar who knows how sums are made."""
    for layer in range(2):
        path, file = folder / f"layer-{layer:05}.json", folder / f"layer-{layer:05}.safetensors"
        record = json.loads(path.read_bytes())
        data = file.read_bytes()
        path.write_text(json.dumps(record | {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}))
    manifest = json.loads((folder / MANIFEST).read_bytes())
    for name in manifest["files"]:
        data = (folder / name).read_bytes()
        manifest["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / MANIFEST).write_text(json.dumps(manifest))


def put(folder: Path, tensor: str, value: float, *, at: int = 0, file: str = FILE) -> None:
    """Write one value of a tensor, and mend every sum."""
    entry = read_header(folder / file).tensors[tensor]
    dtype = {"F32": np.float32, "F64": np.float64, "I64": np.int64}[entry.dtype]
    data = bytearray((folder / file).read_bytes())
    view = np.frombuffer(data, dtype, prod(entry.shape), entry.start)
    view[at] = value
    (folder / file).write_bytes(data)
    resealed(folder)


def edit(folder: Path, name: str, change: Callable[[dict[str, Any]], None], *, seal: bool = True) -> None:
    """Change a JSON."""
    content = json.loads((folder / name).read_bytes())
    change(content)
    (folder / name).write_text(json.dumps(content))
    if seal:
        resealed(folder)


def test_a_folder_that_was_resealed_is_read(folder: Path) -> None:
    """So that the lies below are found for what they are, and not for their sums; nothing is left but what is there."""
    resealed(folder)
    use(open_stats(folder))
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize(
    ("tensor", "at", "value", "said"),
    [
        (f"{ATTENTION}.o_proj.train.mean_square", 5, np.nan, "expected finite values, found NaN"),
        (f"{E}.gate_proj.validation.mean_square", 70, np.inf, "expected finite values"),
        (f"{E}.down_proj.train.mean_square", 3, -0.5, "expected values from 0, found -0.5"),
        (f"{ATTENTION}.o_proj.train.weight", 0, np.nan, "expected finite values"),
        (f"{E}.gate_proj.train.weight", 1, -3, "expected values from 0, found -3"),
        (f"{ATTENTION}.o_proj.train.largest", 0, np.inf, "expected finite values"),
        (f"{E}.gate_proj.train.tokens", 0, -1, "expected counts, found -1"),
        (f"{E}.gate_proj.train.tokens", 0, 601, "expected 2 experts for each of 600 tokens"),
        (f"{E}.gate_proj.train.tokens", 0, 5, "expected 2 experts for each of 600 tokens"),
        (f"{ATTENTION}.o_proj.validation.tokens", 0, 61, "expected 60 tokens, as the manifest says, found 61"),
        (f"{E}.gate_proj.train.mean", 4, np.nan, "expected finite values"),
        (f"{E}.gate_proj.train.mean", 4, -1000, "expected no more than the root of the mean square"),
        (f"{E}.gate_proj.train.weight", 3, 1, "expected zeros where no token came"),
        (f"{E}.gate_proj.train.mean_square", 3 * 64, 1, "expected zeros where no token came"),
        (f"{E}.gate_proj.train.mean", 3 * 64 + 1, -1, "expected zeros where no token came"),
        (f"{ATTENTION}.o_proj.train.largest", 0, 0.1, "expected no more than the square of the largest value"),
    ],
)
def test_a_value_that_no_pass_can_have_measured(folder: Path, tensor: str, at: int, value: float, said: str) -> None:
    """NaN, infinity, something negative, counts that are none: the layer is refused when it is first read."""
    put(folder, tensor, value, at=at)
    stats = open_stats(folder)
    stats.check_layer(0)
    with pytest.raises(BadValue, match=said) as raised:
        stats.moments("model.layers.1.self_attn.q_a_proj")
    assert (raised.value.file, raised.value.remedy) == (folder / FILE, "calibrate again")
    assert str(raised.value.tensor).rpartition(".")[0] in tensor


def test_down_counts_other_than_gate_counts(folder: Path) -> None:
    """An expert's intermediate has the tokens of its input, so sums that fit are not enough."""
    stats = open_stats(folder)
    tokens, _ = stats.load(1) or (None, None)
    assert tokens is not None
    for expert, more in ((0, 1), (1, -1)):
        put(folder, f"{E}.down_proj.train.tokens", int(tokens[expert]) + more, at=expert)
    with pytest.raises(BadValue, match="as many tokens as reach the expert's gate"):
        open_stats(folder).load(1)


def test_an_expert_with_more_tokens_than_there_are(folder: Path) -> None:
    """Though the sum over the experts is what it should be."""
    for projection in ("gate_proj", "down_proj"):
        for expert, count in enumerate((601, 598, 1)):
            put(folder, f"{E}.{projection}.train.tokens", count, at=expert)
    with pytest.raises(BadValue, match="found 1200 tokens, 601 of one expert"):
        open_stats(folder).load(1)


@pytest.mark.parametrize("name", [MANIFEST, "outside.json", FILE, RECORD, "layer-00001.hessians.safetensors"])
def test_cut_short(folder: Path, name: str) -> None:
    """Every file, by one byte or to nothing; the file is named."""
    data = (folder / name).read_bytes()
    for kept in (data.rstrip()[:-1], b""):
        (folder / name).write_bytes(kept)
        with pytest.raises(CheckpointError, match=name):
            open_stats(folder)


@pytest.mark.parametrize("name", ["outside.json", FILE, RECORD, "layer-00001.hessians.safetensors"])
def test_missing(folder: Path, name: str) -> None:
    """A file that should be there is named when the folder is opened."""
    (folder / name).unlink()
    with pytest.raises(MissingTensor, match=f"{name}: is not there; calibrate again"):
        open_stats(folder)


def test_a_byte_changed(folder: Path) -> None:
    """A value that could have been measured: the sum of the layer says that it was not."""
    data = bytearray((folder / FILE).read_bytes())
    data[-1] ^= 1
    (folder / FILE).write_bytes(data)
    stats = open_stats(folder)
    with pytest.raises(MalformedFile, match=f"{FILE}: changed since it was written"):
        stats.importance(f"{ATTENTION}.o_proj")


def test_a_byte_of_a_hessian_changed(folder: Path) -> None:
    """Its checksum says so when it is read; the others are read all the same."""
    file = "layer-00001.hessians.safetensors"
    tensor = f"{E}.gate_proj.train.hessian"
    entry = read_header(folder / file).tensors[tensor]
    data = bytearray((folder / file).read_bytes())
    data[entry.start + 64 * 64 * 4 + 2] ^= 1  # of expert 1
    (folder / file).write_bytes(data)
    stats = open_stats(folder)
    assert stats.hessian(f"{E}.0.up_proj") is not None
    with pytest.raises(MalformedFile, match="changed since it was written") as raised:
        stats.hessian(f"{E}.1.up_proj")
    assert raised.value.tensor == tensor


@pytest.mark.parametrize(("value", "said"), [(np.nan, "finite"), (77.0, "mean squares on the diagonal")])
def test_a_hessian_of_something_else(folder: Path, value: float, said: str) -> None:
    """With a checksum that fits: NaN, or a diagonal that is not what the moments say."""
    from k2quant.checkpoint.files.checksum import crc32

    file, tensor = "layer-00001.hessians.safetensors", f"{ATTENTION}.o_proj.train.hessian"
    entry = read_header(folder / file).tensors[tensor]
    put(folder, tensor, value, file=file)
    crc = crc32((folder / file).read_bytes()[entry.start : entry.stop])
    edit(folder, RECORD, lambda record: record["hessians"].update({tensor: [f"{crc:08x}"]}))
    with pytest.raises(BadValue, match=said):
        open_stats(folder).hessian(f"{ATTENTION}.o_proj")


def test_a_header_of_another_shape(folder: Path) -> None:
    """As many bytes, but of another model: refused when the folder is opened."""
    data = (folder / FILE).read_bytes()
    changed = data.replace(b'"shape":[4,64]', b'"shape":[64,4]', 1)
    assert changed != data
    (folder / FILE).write_bytes(changed)
    resealed(folder)
    with pytest.raises(ShapeMismatch, match=r"expected F32 \[4, 64\], found F32 \[64, 4\]; calibrate again"):
        open_stats(folder)


def test_a_header_with_another_name(folder: Path) -> None:
    """A tensor that is missing, and one that nobody asked for."""
    data = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(data.replace(b"o_proj.train.largest", b"o_proj.train.laziest"))
    resealed(folder)
    with pytest.raises(MissingTensor, match=r"o_proj.train.la.*est` in .*calibrate again"):
        open_stats(folder)


def test_a_header_that_leaves_a_gap(folder: Path) -> None:
    """It is checked as a checkpoint's is."""
    data = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(data + b"\0")
    resealed(folder)
    with pytest.raises(MalformedFile, match="does not end where its last tensor ends"):
        open_stats(folder)


def test_records_exchanged(folder: Path) -> None:
    """A layer's record that is another layer's is told by its number."""
    (folder / RECORD).write_bytes((folder / "layer-00000.json").read_bytes())
    manifest = json.loads((folder / MANIFEST).read_bytes())
    manifest["files"][RECORD] = manifest["files"]["layer-00000.json"]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(MalformedFile, match="the record of another layer, expected 1, found 0"):
        open_stats(folder)


def test_a_record_that_the_manifest_does_not_know(folder: Path) -> None:
    """A record changed alone does not fit the manifest's sum."""
    edit(folder, RECORD, lambda record: record["digests"].clear(), seal=False)
    with pytest.raises(MalformedFile, match=f"{RECORD}: not the file that the manifest names"):
        open_stats(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"size": -1}, "-1 where a count"),
        ({"size": 5}, "layer-00001.safetensors: not whole, expected 5 bytes"),
        ({"sha256": "0" * 63}, "where a digest stands"),
        ({"digests": {"a": {"weight": 3}}}, "3 where text stands"),
        ({"digests": {"a": {"weight": "xyz"}}}, "'xyz' where a digest stands"),
        ({"digests": []}, "where an object stands"),
        ({"hessians": {}}, "not a checksum for each Hessian"),
        ({"hessians": None}, "where an object stands"),
    ],
)
def test_a_record_that_says_nonsense(folder: Path, change: dict[str, Any], said: str) -> None:
    """Whatever stands where sizes, sums and digests should."""
    record = json.loads((folder / RECORD).read_bytes()) | change
    data = json.dumps(record).encode()
    (folder / RECORD).write_bytes(data)
    known = {RECORD: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}}
    edit(folder, MANIFEST, lambda manifest: manifest["files"].update(known), seal=False)
    with pytest.raises(MalformedFile, match=said):
        open_stats(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tool": "other"}, "not what `k2quant calibrate` writes"),
        ({"layout": 2}, "a folder of another release, expected layout 1, found 2"),
        ({"layout": None}, "a folder of another release"),
        ({"model": {}}, "lacks a size of the model"),
        ({"model": 3}, "3 where an object stands"),
        ({"data": {"train": {}}}, "where train, validation, test stand"),
        ({"hessians": 1}, "1 where true or false stands"),
        ({"settings": {"a": [1]}}, r"\[1\] where the setting 'a' stands"),
        ({"version": 1}, "1 where text stands"),
        ({"files": {}}, "the files of another model"),
        ({"files": {"../x": {"size": 1, "sha256": "0" * 64}}}, "the files of another model"),
        ({"files": 5}, "5 where an object stands"),
    ],
)
def test_a_manifest_that_says_nonsense(folder: Path, change: dict[str, Any], said: str) -> None:
    """Of another tool or release, or with something else where its parts should stand; the file is named."""
    edit(folder, MANIFEST, lambda manifest: manifest.update(change), seal=False)
    with pytest.raises(CheckpointError, match=said) as raised:
        open_stats(folder)
    assert raised.value.file == folder / MANIFEST


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokens": -5}, "-5 where a count"),
        ({"tokens": 6.5}, "6.5 where a count"),
        ({"digest": "abc"}, "'abc' where a sha256 stands"),
        ({"hashes": ["Z" * 64]}, "where a sha256 stands"),
        ({"hashes": ["a" * 64, "a" * 64]}, "document aaaaaaaaaaaaaaaa... in train and in train"),
        ({"hashes": [hashlib.sha256(b"validation 0").hexdigest()]}, r"document .* in train and in validation"),
    ],
)
def test_data_that_are_none(folder: Path, change: dict[str, Any], said: str) -> None:
    """Counts, hashes, and a document of the train part that is held out as well."""
    edit(folder, MANIFEST, lambda manifest: manifest["data"]["train"].update(change), seal=False)
    with pytest.raises(MalformedFile, match=said):
        open_stats(folder)


def test_a_layer_fewer_than_the_model_has(folder: Path) -> None:
    """A model that claims more layers, or fewer, than the manifest has files for."""
    for layers in (1, 3):
        edit(folder, MANIFEST, lambda m, n=layers: m["model"].update(num_hidden_layers=n), seal=False)  # type: ignore[misc]
        with pytest.raises(MalformedFile, match=f"records of {layers} layers"):
            open_stats(folder)


def test_a_link_out_of_the_folder(folder: Path, tmp_path: Path) -> None:
    """A layer's file that lies elsewhere is not read, nor is a manifest."""
    for name in (FILE, RECORD, MANIFEST):
        (folder / name).rename(tmp_path / name)
        (folder / name).symlink_to(tmp_path / name)
        with pytest.raises(UnsafePath, match=name):
            open_stats(folder)
        (folder / name).unlink()
        (tmp_path / name).rename(folder / name)


@pytest.mark.parametrize(
    "data", [b"[" * 100_000, b"{}", b"", b"null", b"\xff\xfe", b'{"tool":"k2quant","tool":"k2quant"}'], ids=range(6)
)
def test_a_manifest_that_is_none(folder: Path, data: bytes) -> None:
    """Too deep, empty, of another kind, or with a key twice."""
    (folder / MANIFEST).write_bytes(data)
    with pytest.raises(CheckpointError, match=MANIFEST):
        open_stats(folder)


def test_too_large(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A manifest or a record beyond all measure is not read to its end."""
    monkeypatch.setattr("k2quant.calib.stats.reading.RECORD_LIMIT", 100)
    with pytest.raises(MalformedFile, match="too large"):
        open_stats(folder)
    monkeypatch.setattr("k2quant.calib.stats.reading.MANIFEST_LIMIT", 100)
    with pytest.raises(MalformedFile, match=f"{MANIFEST}: too large"):
        open_stats(folder)


def test_not_there(tmp_path: Path) -> None:
    """No folder, a file, an empty folder, a checkpoint: each is told what was expected."""
    for path in (tmp_path / "none", tmp_path / "file"):
        if path.name == "file":
            path.touch()
        with pytest.raises(CheckpointError, match=path.name):
            open_stats(path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"no statistics here, expected k2quant_stats\.json, found file, model"):
        open_stats(tmp_path)


def test_unfinished(folder: Path) -> None:
    """What says that it is not finished is believed, whatever else lies there."""
    (folder / "INCOMPLETE").touch()
    with pytest.raises(CheckpointError, match=r"not finished.*run the same `k2quant calibrate` again: it resumes"):
        open_stats(folder)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(st.data())
def test_whatever_byte_is_changed_nothing_but_a_checkpoint_error_comes(folder: Path, data: st.DataObject) -> None:
    """And it does come, but for a byte of a Hessian that was not read, and for white space of the manifest."""
    names = sorted(path.name for path in folder.iterdir())
    name = data.draw(st.sampled_from([*names, FILE, MANIFEST]))
    whole = (folder / name).read_bytes()
    spoilt = bytearray(whole)
    for place in data.draw(st.lists(st.integers(0, min(len(whole), 3000) - 1), min_size=1, max_size=3, unique=True)):
        spoilt[place] ^= data.draw(st.integers(1, 255))
    fingerprint = open_stats(folder).fingerprint
    try:
        (folder / name).write_bytes(spoilt)
        stats = open_stats(folder)
        use(stats)
        told = stats.fingerprint != fingerprint or stats.manifest.version != "0.0"
        assert "hessians" in name or (name == MANIFEST and (told or json.loads(spoilt) == json.loads(whole)))
    except CheckpointError:
        pass
    finally:
        (folder / name).write_bytes(whole)
