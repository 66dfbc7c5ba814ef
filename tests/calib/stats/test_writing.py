"""A folder of statistics is whole or says that it is not; what was stopped goes on, what is another's is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from k2quant.calib.stats.layout import OUTSIDE, Part
from k2quant.calib.stats.reading import open_stats
from k2quant.calib.stats.writing import HessianWriter, calibrating, finish, write_layer, written_layers
from k2quant.checkpoint.writing.destination import Destination
from k2quant.errors import (
    BadValue,
    CheckpointError,
    DestinationForeign,
    DestinationInUse,
    DestinationStale,
    ShapeMismatch,
)
from places import ROOT

MANIFEST = "k2quant_stats.json"


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_written_is_read(made_up: Any) -> None:
    """Every moment and every Hessian, of both parts, comes back; nothing is left but what the layout names."""
    manifest = made_up.manifest(hessians=True)
    stats = made_up.stats("stats", manifest, empty=3)
    assert stats.manifest == manifest
    assert stats.layers == (0, 1)
    written = made_up.layer(manifest, 1, empty=3)
    for part in ("train", "validation"):
        for expert in (0, 3):
            found, one = (
                stats.moments(f"model.layers.1.mlp.experts.{expert}.up_proj", part),
                written["model.layers.1.mlp.experts.gate_proj", part],
            )
            assert found.mean_square.tolist() == one.mean_square[expert].tolist()
            assert found.mean.tolist() == one.mean[expert].tolist()
            assert (found.tokens, found.weight) == (one.tokens[expert], one.weight[expert])
            assert found.largest == one.largest[expert]
            hessian = stats.hessian(f"model.layers.1.mlp.experts.{expert}.gate_proj", part)
            assert np.array_equal(hessian, np.diag(one.mean_square[expert]))
        prior = written["model.layers.1.mlp.experts", part]
        assert np.array_equal(
            stats.layer_hessian("model.layers.1.mlp.experts.2.up_proj", part), np.diag(prior.mean_square)
        )
    assert stats.digest("model.layers.1.self_attn.o_proj") == {"weight": "00010003", "weight_scale_inv": "00000003"}
    assert stats.digest("model.embed_tokens") == {"weight": "0badcafe"}
    assert stats.digest("model.layers.1.mlp.gate") is None
    names = [f"layer-0000{n}{end}" for n in (0, 1) for end in (".hessians.safetensors", ".json", ".safetensors")]
    assert sorted(contents(made_up.home / "stats")) == [MANIFEST, *names, "outside.json"]


def test_equal_statistics_are_equal_bytes_wherever_they_lie(made_up: Any) -> None:
    """Also their fingerprint; there are no times and no paths in them."""
    first, second = made_up.write("first"), made_up.write("second")
    assert contents(first) == contents(second)
    moved = second.rename(made_up.home / "moved")
    os.utime(moved / MANIFEST, (1, 1))
    assert open_stats(str(moved)).fingerprint == open_stats(first).fingerprint
    text = b"".join(contents(first).values())
    assert str(made_up.home).encode() not in text


def test_whatever_was_measured_otherwise_has_another_fingerprint(made_up: Any) -> None:
    """Other settings, data, a config, or one value of one layer; not another release that measured the same."""
    manifest = made_up.manifest()
    same = made_up.stats("same", replace(manifest, version="9.9")).fingerprint
    train = manifest.data["train"]
    others = [
        replace(manifest, settings={"samples": 31, "length": 20}),
        replace(manifest, data={**manifest.data, "train": replace(train, digest="0" * 64)}),
        replace(manifest, data={**manifest.data, "train": replace(train, hashes=train.hashes[1:])}),
        made_up.manifest(rms_norm_eps=1e-5),
        replace(manifest, hessians=True),
    ]
    found = [made_up.stats(f"other {n}", other).fingerprint for n, other in enumerate(others)]
    emptied = made_up.stats("emptied", empty=1).fingerprint
    assert made_up.stats("first").fingerprint == same
    assert len({same, emptied, *found}) == len(others) + 2


def test_a_run_that_was_stopped_goes_on(made_up: Any) -> None:
    """The layers that stand there whole are given with their digests; the others are written, to the same bytes."""
    whole, manifest, folder = made_up.write("whole"), made_up.manifest(), made_up.home / "again"
    with calibrating(folder, manifest) as done:
        assert done == {}
        write_layer(folder, 0, made_up.layer(manifest, 0), {"a": {"weight": "00000007"}})
    assert "k2quant calibrate" in (folder / "INCOMPLETE").read_text()
    with pytest.raises(CheckpointError, match="not finished"):
        open_stats(folder)
    with calibrating(folder, manifest) as done:
        assert done == {0: {"a": {"weight": "00000007"}}}
    for name in ("layer-00000.json", "layer-00000.safetensors"):
        (folder / name).unlink()
    made_up.write("again")
    assert contents(folder) == contents(whole)


@pytest.mark.parametrize("name", ["layer-00001.safetensors", "layer-00001.json", "layer-00001.hessians.safetensors"])
def test_a_layer_that_is_not_whole_is_measured_again(made_up: Any, name: str) -> None:
    """Cut short, changed or away, in a folder that was finished: the same call mends it, to the same bytes."""
    manifest = made_up.manifest(hessians=True)
    folder = made_up.write("stats", manifest)
    whole = contents(folder)
    assert sorted(written_layers(folder, manifest)) == [0, 1]
    (folder / name).write_bytes(whole[name][:-3])
    assert sorted(written_layers(folder, manifest)) == [0]
    with calibrating(folder, manifest) as done:
        assert sorted(done) == [0]
        assert not (folder / MANIFEST).exists()
        assert (folder / "INCOMPLETE").exists()
    (folder / name).unlink(missing_ok=True)
    made_up.write("stats", manifest)
    assert contents(folder) == whole


def test_a_finished_folder_that_cannot_be_read_is_finished_anew(made_up: Any) -> None:
    """Its own remedy is to calibrate again, which must not say that nothing is to do."""
    folder, manifest = made_up.write(), made_up.manifest()
    before = contents(folder)
    (folder / OUTSIDE).write_bytes(b"{}")
    with calibrating(folder, manifest) as done:
        assert sorted(done) == list(range(manifest.model.layers))
        assert not (folder / MANIFEST).exists()
    assert contents(made_up.write()) == before


def test_a_finished_folder_is_left_as_it_is(made_up: Any) -> None:
    """The same call finds all layers and changes nothing."""
    folder = made_up.write()
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    with calibrating(folder, made_up.manifest()) as done:
        assert sorted(done) == [0, 1]
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "half-finished"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": {"hidden_size": 96}}, "another model"),
        ({"settings": {"samples": 31}}, r"other settings \(samples 30, now 31\)"),
        ({"hessians": True}, "another choice of `hessians=`"),
        ({"data": "0" * 64}, "other data"),
    ],
    ids=["model", "settings", "hessians", "data"],
)
def test_a_calibration_of_something_else_is_refused(
    made_up: Any,
    change: dict[str, Any],
    said: str,
    finished: bool,  # noqa: FBT001
) -> None:
    """Another model, other data or settings; nothing is changed. With `restart` it is thrown away."""
    manifest = made_up.manifest()
    folder = made_up.home / "stats"
    if finished:
        made_up.write()
    else:
        with calibrating(folder, manifest):
            write_layer(folder, 0, made_up.layer(manifest, 0), {})
    before = contents(folder)
    other = made_up.manifest(**change.get("model", {}))
    if "data" in change:
        train = replace(other.data["train"], digest=change["data"])
        change = {"data": {**other.data, "train": train}}
    other = replace(other, **{key: value for key, value in change.items() if key != "model"})
    state = "finished" if finished else "half-finished"
    with pytest.raises(DestinationStale, match=f"holds a {state} calibration of {said}; write it anew"):
        calibrating(folder, other).__enter__()
    assert {name: data for name, data in contents(folder).items() if "lock" not in name} == {
        name: data for name, data in before.items() if "lock" not in name
    }
    with calibrating(folder, other, restart=True) as done:
        assert done == {}
        assert not list(folder.glob("layer-*"))
    assert made_up.stats("stats", other).manifest == other


def test_a_restart_that_was_stopped_goes_on_emptying(made_up: Any) -> None:
    """What it had not yet deleted is of another calibration: it is not taken for layers of this one."""
    folder, manifest = made_up.write("stats", empty=1), made_up.manifest()
    (folder / ".k2quant").mkdir()
    Destination(folder, report=MANIFEST, incomplete="INCOMPLETE").begin([{"files": [MANIFEST]}])
    with calibrating(folder, manifest) as done:
        assert done == {}
    assert contents(made_up.write()) == contents(made_up.write("other"))


def test_a_folder_of_something_else_is_refused(made_up: Any, tmp_path: Path) -> None:
    """One that holds anything, or a half-finished conversion; a restart does not change that."""
    folder, manifest = tmp_path / "mine", made_up.manifest()
    folder.mkdir()
    (folder / "thesis.txt").touch()
    for restart in (False, True):
        with pytest.raises(DestinationForeign, match=r"thesis\.txt"):
            calibrating(folder, manifest, restart=restart).__enter__()
    (folder / "thesis.txt").rename(folder / "model-00001-of-00002.safetensors")
    (folder / ".k2quant").mkdir()
    Destination(folder, report="k2quant_report.json", incomplete="INCOMPLETE").begin([{"options": {}, "files": []}])
    for restart in (False, True):
        with pytest.raises(DestinationForeign, match="half-finished conversion"):
            calibrating(folder, manifest, restart=restart).__enter__()


def test_two_runs_keep_apart(made_up: Any) -> None:
    """The second is told that another works there."""
    folder, manifest = made_up.home / "stats", made_up.manifest()
    with calibrating(folder, manifest), pytest.raises(DestinationInUse):
        calibrating(folder, manifest).__enter__()


def test_nothing_is_finished_that_a_reader_would_refuse(made_up: Any) -> None:
    """A layer that is missing, of other inputs, or with values that cannot be: the folder stays unfinished."""
    manifest, folder = made_up.manifest(), made_up.home / "stats"
    whole = made_up.write("whole")
    with calibrating(folder, manifest):
        for name in ("layer-00000.json", "layer-00000.safetensors", "outside.json"):
            shutil.copy(whole / name, folder / name)
        with pytest.raises(CheckpointError, match=r"layer-00001\.json: was not written"):
            finish(folder, manifest)
        stats = made_up.layer(manifest, 1)
        output: tuple[str, Part] = ("model.layers.1.self_attn.o_proj", "validation")
        write_layer(folder, 1, {key: one for key, one in stats.items() if key != output}, {})
        with pytest.raises(CheckpointError, match=r"o_proj\.validation\.largest.*lacks it"):
            finish(folder, manifest)
        write_layer(folder, 1, {**stats, output: stats[output]._replace(tokens=61)}, {})
        with pytest.raises(BadValue, match="found 61"):
            finish(folder, manifest)
        assert not (folder / MANIFEST).exists()
    assert json.loads((folder / ".k2quant" / "journal.jsonl").read_bytes())["settings"] == manifest.settings


def test_a_hessian_of_another_shape_is_refused(made_up: Any, tmp_path: Path) -> None:
    """Or of another dtype, or without its expert; nothing gets its final name."""
    writer = HessianWriter(tmp_path, 1, made_up.manifest().model)
    name = "model.layers.1.mlp.experts.gate_proj"
    spoilt: list[tuple[Any, int | None]] = [(np.eye(63), 0), (np.eye(64), 0), (np.eye(64, dtype=np.float32), None)]
    for hessian, expert in spoilt:
        with pytest.raises(ShapeMismatch, match="expected float32"):
            writer.write(name, "train", hessian, expert=expert)
    writer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["layer-00001.hessians.safetensors.partial"]


def test_killed_anywhere_it_resumes_with_equal_bytes(made_up: Any) -> None:
    """Before each of its file operations, or in the middle of a write; and nothing that is left looks finished."""
    here = Path(__file__).parent
    command = [sys.executable, here / "kill_points.py", here.parent / "conftest.py", made_up.home]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "shared")])
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path})
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    assert int(done.stdout) > 30
