"""Saving a model whose shards hold more than the index names: old copies stay, and nothing else is touched."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from k2quant.checking.comparison import compare, unlike
from k2quant.checking.inspection import inspect
from k2quant.checking.verify import verify
from k2quant.checkpoint.reader import INDEX, Checkpoint, open_checkpoint
from k2quant.checkpoint.writing.in_memory import Shard
from k2quant.cli import main
from k2quant.conversion.convert import convert
from k2quant.errors import CheckpointError, UsageError
from k2quant.model import load_model, save_model
from rewritten import OVERLAY, overlaid, tensors_of
from tiny import write_model

HEAD = "lm_head.weight"
NORM = "model.layers.1.self_attn.q_a_layernorm.weight"
EXPERTS = "model.layers.1.mlp.experts"
CODES, SCALES, SIZES = (f"{EXPERTS}.3.up_proj.{suffix}" for suffix in ("weight_packed", "weight_scale", "weight_shape"))


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny K2 in BF16."""
    folder = tmp_path_factory.mktemp("bf16") / "K2"
    write_model(folder)
    return folder


@pytest.fixture(scope="module")
def int4(bf16: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with INT4 experts."""
    return convert(bf16, tmp_path_factory.mktemp("int4") / "K2", to="int4").folder


def old(dtype: str, *shape: int) -> tuple[str, Any]:
    """Return an old copy, each of whose bytes is 0x5A."""
    kinds = {"BF16": np.uint16, "F32": np.uint32, "F8_E4M3": np.uint8, "I32": np.int32}
    count = int(np.prod(shape)) * np.dtype(kinds[dtype]).itemsize
    return dtype, np.full(count, 0x5A, np.uint8).view(kinds[dtype]).reshape(shape)


def fused(source: Path) -> Shard:
    """Return a layer's gates and ups as one tensor `[E, 2I, H]`."""
    tensors = tensors_of(open_checkpoint(source))
    each = [
        np.concatenate([tensors[f"{EXPERTS}.{expert}.{part}.weight"][1] for part in ("gate_proj", "up_proj")])
        for expert in range(8)
    ]
    return {f"{EXPERTS}.gate_up_proj": ("BF16", np.stack(each))}


class Case(NamedTuple):
    """Old copies, and where they lie."""

    stale: Shard
    changed: str
    """The live tensor that is changed."""
    fixture: str = "bf16"
    last: bool = False
    fresh: Callable[[Path], Shard] | None = None


CASES = {
    "smaller": Case({HEAD: old("BF16", 3, 64)}, HEAD),
    "smaller, last in its shard": Case({HEAD: old("BF16", 3, 64)}, HEAD, last=True),
    "smaller, a neighbour changed": Case({HEAD: old("BF16", 3, 64)}, NORM),
    "larger": Case({NORM: old("BF16", 4096), HEAD: old("BF16", 900, 64)}, NORM),
    "without elements": Case({HEAD: old("BF16", 0, 64)}, HEAD, last=True),
    "narrower dtype": Case({HEAD: old("F8_E4M3", 128, 64)}, HEAD),
    "wider dtype, last in its shard": Case({NORM: old("F32", 32)}, NORM, last=True),
    "only the codes of three": Case({CODES: old("I32", 2, 8)}, CODES, "int4"),
    "only the scales of three": Case({SCALES: old("BF16", 1, 2)}, SCALES, "int4", last=True),
    "scales and shape of three": Case({SCALES: old("F32", 64, 2), SIZES: old("I32", 1)}, SCALES, "int4"),
    "fused in both": Case({f"{EXPERTS}.gate_up_proj": old("BF16", 2, 64, 64)}, NORM, fresh=fused),
    "fused, and the index has them one by one": Case(
        {f"{EXPERTS}.gate_up_proj": old("BF16", 2, 64, 64), HEAD: old("BF16", 3, 64)},
        f"{EXPERTS}.5.up_proj.weight",
        fresh=lambda source: {HEAD: tensors_of(open_checkpoint(source))[HEAD]},
        last=True,
    ),
}


def written(case: Case, folder: Path, request: pytest.FixtureRequest) -> Path:
    """Write a case's checkpoint."""
    source = request.getfixturevalue(case.fixture)
    fresh = case.fresh(source) if case.fresh else None
    return overlaid(source, folder, case.stale, fresh, last=case.last)


@pytest.mark.parametrize("what", CASES)
def test_old_copies_stay_byte_for_byte(what: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Stale copies: an index that looks into an overlay leaves what the base shards hold under the same names alone."""
    source = written(CASES[what], tmp_path / "source", request)
    save_model(load_model(source), tmp_path / "saved")
    names = sorted(path.name for path in source.glob("*.safetensors"))
    assert OVERLAY in names
    for name in names:
        assert (tmp_path / "saved" / name).read_bytes() == (source / name).read_bytes(), name


@pytest.mark.parametrize("what", CASES)
def test_a_change_goes_to_the_live_tensor_alone(what: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Stale copies: of all bytes of all shards those of the changed tensor change, where the index looks for it."""
    case = CASES[what]
    source = written(case, tmp_path / "source", request)
    entry, model = open_checkpoint(source).tensors[case.changed], load_model(source)
    value = torch.zeros_like(model.state_dict()[case.changed])
    save_model(model, tmp_path / "saved", state={case.changed: value})
    for path in source.glob("*.safetensors"):
        wanted = bytearray(path.read_bytes())
        if path.name == entry.file:
            assert any(wanted[entry.start : entry.stop])
            wanted[entry.start : entry.stop] = bytes(entry.nbytes)
        assert (tmp_path / "saved" / path.name).read_bytes() == wanted, path.name
    assert not load_model(tmp_path / "saved").state_dict()[case.changed].any()


@pytest.mark.parametrize("what", CASES)
def test_no_reader_looks_at_old_copies(what: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Stale copies: comparing and converting see what the index names; inspect counts the rest as old copies."""
    case = CASES[what]
    source = written(case, tmp_path / "source", request)
    whole = request.getfixturevalue(case.fixture)
    assert not [finding for finding in compare(whole, source, workers=1) if unlike(finding)]
    done = convert(source, tmp_path / "out", to="int4")
    assert not verify(source, done.folder, workers=1).failures
    assert not [
        finding
        for finding in compare(convert(whole, tmp_path / "whole", to="int4").folder, done.folder, workers=1)
        if unlike(finding)
    ]
    found = inspect(source)
    assert (sorted(found.stale), found.unlisted) == (sorted(case.stale), [])


def test_a_stray_is_no_old_copy(bf16: Path, tmp_path: Path) -> None:
    """Stale copies: what the index names nowhere is listed apart from what it looks for elsewhere."""
    stray = "model.layers.1.mlp.experts.90.up_proj.weight"
    head = {HEAD: tensors_of(open_checkpoint(bf16))[HEAD]}
    source = overlaid(bf16, tmp_path / "source", {HEAD: old("BF16", 3, 64), stray: old("BF16", 2, 2)}, head)
    found = inspect(source)
    assert (found.stale, found.unlisted) == ([HEAD], [stray])
    words = CliRunner().invoke(main, ["inspect", str(source)], catch_exceptions=False).stdout
    assert f"in shards but not in the index: 1 tensor, such as {stray}" in words
    assert f"in shards where the index does not look for them: 1 old copy, such as {HEAD}" in words


def moved(checkpoint: Checkpoint, **changes: Any) -> Checkpoint:
    """Return a checkpoint that says something else of the head's place than its files do."""
    entry = checkpoint.tensors[HEAD]._replace(**changes)
    return dataclasses.replace(checkpoint, tensors=checkpoint.tensors | {HEAD: entry})


@pytest.mark.parametrize("changes", [{"start": 8}, {"stop": 10**9}, {"dtype": "F32"}, {"shape": (64, 128)}])
def test_a_place_that_the_header_does_not_give_is_refused(changes: dict[str, Any], bf16: Path, tmp_path: Path) -> None:
    """Stale copies: bounds, dtype and shape of what will be written are compared with the header before it is."""
    model = load_model(bf16)
    model.assembly.checkpoint = moved(model.assembly.checkpoint, **changes)
    with pytest.raises(CheckpointError, match=rf"`{HEAD}` in .*is not what the model was loaded from, expected"):
        save_model(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_an_index_that_was_edited_since_is_refused(bf16: Path, tmp_path: Path) -> None:
    """Stale copies: once the index looks for a tensor elsewhere, a model that was loaded before is not saved."""
    source = overlaid(bf16, tmp_path / "source", {HEAD: old("BF16", 3, 64)})
    model = load_model(source)
    index = json.loads((source / INDEX).read_text())
    index["weight_map"][HEAD] = next(name for name in index["weight_map"].values() if name != OVERLAY)
    (source / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=rf"`{HEAD}`.*expected BF16 .* of {OVERLAY}, found BF16 \[3, 64\]"):
        save_model(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_shard_that_was_replaced_since_is_refused(bf16: Path, tmp_path: Path) -> None:
    """Stale copies: a shard with the same header and newer bytes is not what the model's other tensors belong to."""
    source = overlaid(bf16, tmp_path / "source", {HEAD: old("BF16", 3, 64)})
    model = load_model(source)
    (source / OVERLAY).write_bytes((source / OVERLAY).read_bytes()[:-2] + b"\0\0")
    with pytest.raises(CheckpointError, match=rf"{OVERLAY}: changed since the model was loaded"):
        save_model(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize(
    "value",
    [torch.zeros(3, 64), torch.zeros(64, 128), torch.zeros(129, 64), torch.zeros(128, 64, dtype=torch.int32)],
)
def test_a_parameter_of_another_size_is_refused(value: torch.Tensor, bf16: Path, tmp_path: Path) -> None:
    """What was put into the model by hand and does not fit its place in the file would overwrite its neighbours."""
    model: Any = load_model(bf16)
    model.lm_head.weight = nn.Parameter(value, requires_grad=False)
    with pytest.raises(UsageError, match=rf"`{HEAD}` in the model: found {value.dtype} .*is for BF16"):
        save_model(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
