"""What index and headers say of a checkpoint: where its tensors lie, what is an old copy, and what is no checkpoint."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from k2quant.checkpoint.reader import CONFIG, INDEX, SINGLE, open_checkpoint
from k2quant.checkpoint.reading import read_tensor
from k2quant.errors import CheckpointError, MalformedFile, ShapeMismatch

EXPERTS = "model.layers.1.mlp.experts."
Tensors = dict[str, NDArray[np.float32]]


def written(folder: Path, shards: dict[str, Tensors], looks: dict[str, str]) -> Path:
    """Write shards, with an index that looks for some tensors elsewhere, or, without a name, nowhere."""
    shards = {file: tensors | {f"only.{file}": np.ones(1, np.float32)} for file, tensors in shards.items()}
    index = {name: file for file, tensors in shards.items() for name in tensors} | looks
    for file, tensors in shards.items():
        save_file(tensors, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": {name: file for name, file in index.items() if file}}))
    return folder


def test_the_rows_of_fused_experts_lie_one_after_the_other(tmp_path: Path) -> None:
    """Of `[E, 2I, H]` each expert has first its gate, then its up; of `[E, H, I]` its down: places and values."""
    gate_up, down = np.arange(48, dtype=np.float32).reshape(2, 6, 4), np.arange(24, dtype=np.float32).reshape(2, 4, 3)
    save_file({f"{EXPERTS}gate_up_proj": gate_up, f"{EXPERTS}down_proj": down}, tmp_path / SINGLE)
    found = open_checkpoint(tmp_path)
    expected = {f"{EXPERTS}{expert}.down_proj.weight": down[expert] for expert in (0, 1)}
    for expert in (0, 1):
        expected[f"{EXPERTS}{expert}.gate_proj.weight"] = gate_up[expert, :3]
        expected[f"{EXPERTS}{expert}.up_proj.weight"] = gate_up[expert, 3:]
    assert found.tensors.keys() == expected.keys()
    for name, values in expected.items():
        entry = found.tensors[name]
        assert (entry.shape, entry.nbytes) == (values.shape, values.nbytes)
        assert read_tensor(found, entry) == values.tobytes()
    ends = sorted((entry.start, entry.stop) for entry in found.tensors.values())
    assert all(stop == start for (_, stop), (start, _) in pairwise(ends))


def test_an_old_copy_is_told_from_a_tensor_that_nobody_names(tmp_path: Path) -> None:
    """Old copies are those of which the index has the tensor elsewhere, fused experts if it has their first part."""
    one = np.ones((2, 4, 2), np.float32)
    parts = {f"{EXPERTS}0.{each}_proj.weight": one[0] for each in ("gate", "down")}
    copies = {"lm_head.weight": one[0], "stray": one[0], f"{EXPERTS}gate_up_proj": one, f"{EXPERTS}down_proj": one}
    looks = {"lm_head.weight": "b.safetensors"} | {name: "" for name in copies if name != "lm_head.weight"}
    folder = written(tmp_path, {"a.safetensors": copies, "b.safetensors": parts | {"lm_head.weight": one[0]}}, looks)
    found = open_checkpoint(folder)
    assert sorted(found.unlisted) == sorted(copies)
    assert sorted(found.stale) == sorted(copies.keys() - {"stray"})


def test_without_its_first_part_a_fused_tensor_is_no_old_copy(tmp_path: Path) -> None:
    """Of gate and up the gate comes first; another expert's, or the up alone, are not what it holds first."""
    one = np.ones((2, 4, 2), np.float32)
    parts = {f"{EXPERTS}1.gate_proj.weight": one[0], f"{EXPERTS}0.up_proj.weight": one[0]}
    fused = f"{EXPERTS}gate_up_proj"
    found = open_checkpoint(written(tmp_path, {"a.safetensors": {fused: one}, "b.safetensors": parts}, {fused: ""}))
    assert (found.unlisted, found.stale) == ((fused,), ())


def test_where_no_checkpoint_is_five_files_are_named(tmp_path: Path) -> None:
    """The first ones, in the order of their names: enough to see which folder it is."""
    for number in range(7):
        (tmp_path / f"{number}.txt").touch()
    with pytest.raises(CheckpointError, match="no checkpoint here") as caught:
        open_checkpoint(tmp_path)
    assert "0.txt, 1.txt, 2.txt, 3.txt, 4.txt" in str(caught.value)
    assert "5.txt" not in str(caught.value)


def test_a_config_of_16_megabytes_is_read_and_none_that_is_larger(tmp_path: Path) -> None:
    """A config is small: one that is not keeps nobody busy."""
    save_file({"lm_head.weight": np.ones((2, 2), np.float32)}, tmp_path / SINGLE)
    (tmp_path / CONFIG).write_bytes(b"{}".ljust(16_000_000))
    assert open_checkpoint(tmp_path).config == {}
    (tmp_path / CONFIG).write_bytes(b"{}".ljust(16_000_001))
    with pytest.raises(MalformedFile, match=CONFIG):
        open_checkpoint(tmp_path)


def test_more_than_65536_fused_experts_are_refused(tmp_path: Path) -> None:
    """It is the number of experts that is limited, whatever the matrices' own lengths are."""
    name = f"{EXPERTS}down_proj"
    for shape in ((2, 2**16 + 1, 1), (2, 1, 2**16 + 1), (2**16, 1, 1)):
        save_file({name: np.zeros(shape, np.float32)}, tmp_path / SINGLE)
        assert len(open_checkpoint(tmp_path).tensors) == shape[0]
    save_file({name: np.zeros((2**16 + 1, 1, 1), np.float32)}, tmp_path / SINGLE)
    with pytest.raises(ShapeMismatch, match="fused experts"):
        open_checkpoint(tmp_path)
