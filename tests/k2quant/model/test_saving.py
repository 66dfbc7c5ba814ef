"""Saving: a save that was stopped, what lies beside the weights, and values that memory holds less exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch

from k2quant.checkpoint.files.paths import copy_file
from k2quant.checkpoint.reader import CONFIG, open_checkpoint
from k2quant.checkpoint.writing.in_memory import write_checkpoint
from k2quant.errors import CheckpointError, DestinationStale, MalformedFile, UsageError
from k2quant.model import load_model, save_model, saving
from rewritten import tensors_of
from tiny import write_model


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tiny K2 in BF16, with a file beside it."""
    write_model(tmp_path / "source")
    (tmp_path / "source" / "notes.txt").write_text("first")
    return tmp_path / "source"


def stop(model: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Save a model, and stop when all files stand."""

    def copied(source: Path, target: Path) -> None:
        copy_file(source, target)
        if target.name == CONFIG:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(saving, "copy_file", copied)
        with pytest.raises(KeyboardInterrupt):
            save_model(model, folder)


def test_a_stopped_save_of_another_model_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resumed run that mixes: what a stopped save left is not finished with another model's files."""
    write_model(tmp_path / "other", seed=1)
    stop(load_model(source), tmp_path / "out", monkeypatch)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(DestinationStale, match=r"stopped save of another model.*; name another folder, or delete what"):
        save_model(load_model(tmp_path / "other"), tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    (source / "later.txt").write_text("a file that came between")
    with pytest.raises(DestinationStale, match="whose files have changed since"):
        save_model(load_model(source), tmp_path / "out")


def test_a_stopped_save_goes_on_with_the_files_of_now(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resumed run that mixes: what the save itself copied is copied again; what was there before it stays."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "tokenizer_config.json").write_text("mine")
    stop(load_model(source), out, monkeypatch)
    (source / "notes.txt").write_text("second")
    save_model(load_model(source), out)
    assert (out / "notes.txt").read_text() == "second"
    assert (out / "tokenizer_config.json").read_text() == "mine"
    assert not (out / "INCOMPLETE").exists()


@pytest.mark.parametrize(
    ("rest", "error"),
    [(b"", DestinationStale), (b'{"kept": 3}', DestinationStale), (b"[", MalformedFile), (b"[]", MalformedFile)],
)
def test_a_mark_that_says_nothing_is_refused(
    rest: bytes, error: type[Exception], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An earlier release's mark names no source, and a broken one none that could be believed."""
    stop(load_model(source), tmp_path / "out", monkeypatch)
    mark = tmp_path / "out" / "INCOMPLETE"
    wrong = mark.read_bytes().splitlines(keepends=True)[0] + rest
    mark.write_bytes(wrong)
    with pytest.raises(error):
        save_model(load_model(source), tmp_path / "out")
    assert mark.read_bytes() == wrong


def test_a_folder_within_the_sources_is_refused(source: Path, tmp_path: Path) -> None:
    """As a conversion, a save does not write between the files that it reads."""
    for folder in (source / "inner", tmp_path):
        with pytest.raises(UsageError, match="neither inside the other"):
            save_model(load_model(source), folder)
    assert not (source / "inner").exists()
    assert not (tmp_path / "INCOMPLETE").exists()


HEAD = "lm_head.weight"
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


def stored_as(dtype: str, source: Path, folder: Path) -> Path:
    """Write a checkpoint anew with weights that BF16 cannot hold."""
    tensors = tensors_of(open_checkpoint(source))
    generator, kind = np.random.default_rng(0), {"F32": np.float32, "F16": np.float16}[dtype]
    for name, (held, value) in tensors.items():
        if held == "BF16":
            tensors[name] = (dtype, (generator.standard_normal(value.shape) * 0.02).astype(kind))
    tensors[HEAD][1].flat[:2] = 0.0, -0.0
    write_checkpoint(folder, {"model.safetensors": tensors}, open_checkpoint(source).config)
    return folder


@pytest.mark.parametrize("stored", ["F32", "F16"])
@pytest.mark.parametrize("held", ["bfloat16", "float16", "float32"])
def test_what_loading_rounded_is_saved_as_it_was(stored: str, held: str, source: Path, tmp_path: Path) -> None:
    """Overwrites weights that nobody changed: F16 and F32 come back byte for byte, whatever memory made of them."""
    there = stored_as(stored, source, tmp_path / "stored")
    load_model(there, dtype=held).save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors").read_bytes() == (there / "model.safetensors").read_bytes()


def test_a_model_in_float16_gives_bf16_back(source: Path, tmp_path: Path) -> None:
    """Overwrites weights that nobody changed: values below F16's come back from the source too."""
    tensors = tensors_of(open_checkpoint(source))
    small = tensors[HEAD][1].copy()
    small.flat[:3] = 0x3001, 0x8001, 0x0001  # 4.7e-10 and two subnormals: all 0 in F16
    tensors[HEAD] = ("BF16", small)
    write_checkpoint(tmp_path / "small", {"model.safetensors": tensors}, open_checkpoint(source).config)
    save_model(load_model(tmp_path / "small", dtype="float16"), tmp_path / "saved")
    one, two = (tmp_path / name / "model.safetensors" for name in ("small", "saved"))
    assert one.read_bytes() == two.read_bytes()


def test_only_what_was_changed_is_rounded(source: Path, tmp_path: Path) -> None:
    """Overwrites weights that nobody changed: of an F32 tensor one new value and one new sign of zero."""
    there = stored_as("F32", source, tmp_path / "stored")
    model: Any = load_model(there)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = -0.0
        model.lm_head.weight[3, 5] = 0.75
    given = torch.zeros(model.state_dict()[EXPERT].shape)
    save_model(model, tmp_path / "saved", state={EXPERT: given})
    before, after = (tensors_of(open_checkpoint(folder)) for folder in (there, tmp_path / "saved"))
    changed = {name for name in before if before[name][1].tobytes() != after[name][1].tobytes()}
    assert changed == {HEAD, EXPERT}
    bits = [tensors[HEAD][1].view(np.uint32) for tensors in (before, after)]
    assert np.argwhere(bits[0] != bits[1]).tolist() == [[0, 0], [3, 5]]
    assert after[HEAD][1][3, 5] == 0.75
    assert not after[EXPERT][1].any()


def test_a_model_from_an_address_is_saved_as_from_a_folder(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The very bytes come back; one that was changed there since is refused by its address."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    store = fsspec.filesystem("memory")
    store.put(str(source), "/saved/K2", recursive=True)
    shards = [path.name for path in source.glob("*.safetensors")]
    try:
        model = load_model("memory://saved/K2")
        model.save_pretrained(tmp_path / "out")
        assert {name: (tmp_path / "out" / name).read_bytes() for name in shards} == {
            name: (source / name).read_bytes() for name in shards
        }
        store.pipe_file(f"/saved/K2/{shards[0]}", (source / shards[0]).read_bytes())
        with pytest.raises(CheckpointError, match=f"memory://saved/K2/{shards[0]}: changed since"):
            model.save_pretrained(tmp_path / "again")
    finally:
        store.rm("/saved", recursive=True)
