"""What a search refuses, by name and before anything looks finished; what it says of weights that nobody measured."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

import k2quant
from k2quant.calib.stats.layout import moments_file
from k2quant.checkpoint.reader import CONFIG, INDEX, open_checkpoint
from k2quant.checkpoint.writing.in_memory import write_checkpoint
from k2quant.cli import main
from k2quant.conversion.plan import Options, make_plan
from k2quant.errors import CheckpointError, UsageError
from k2quant.formats.int4 import Int4
from k2quant.kernels.codecs.choice import codecs


def run(*arguments: object) -> Result:
    """Run a command."""
    return CliRunner().invoke(main, [str(each) for each in arguments])


def changed(source: Path, folder: Path, tensor: str) -> Path:
    """Copy a checkpoint and change one bit of a tensor, in the middle."""
    shutil.copytree(source, folder)
    entry = open_checkpoint(folder).tensors[tensor]
    with (folder / entry.file).open("r+b") as file:
        file.seek((entry.start + entry.stop) // 2)
        (byte,) = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    return folder


def unfinished(folder: Path) -> bool:
    """Tell whether nothing in a folder looks like a finished checkpoint."""
    return not any((folder / name).exists() for name in (CONFIG, INDEX))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "imatrix"}, "`stats=` names none: make it with `k2quant calibrate SOURCE STATS --data FILE`"),
        ({"method": "rtn", "stats": "there"}, "`stats=` has no meaning with `method=` rtn"),
        ({"stats": "there"}, "`stats=` has no meaning with `method=` rtn"),
        (
            {"to": "fp8", "method": "mse"},
            "`method=` mse has no meaning with fp8: it searches better scales, .* for INT4",
        ),
        ({"to": "bf16", "method": "mse"}, "`method=` mse has no meaning with bf16"),
        ({"grid": "compressed-tensors", "method": "mse"}, "on the grid moonshot alone, found compressed-tensors"),
        ({"method": "optq"}, "unknown method 'optq'; expected rtn, mse, imatrix, gptq, awq"),
        ({"method": "gptq"}, "runs data through the model while it converts: call `k2quant.calib.solve` with `data=`"),
        ({"method": "awq"}, "and `stats=` names none: make it with"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], words: str, small: Path, tmp_path: Path) -> None:
    """A search needs a format and a grid that can be searched; statistics somebody who reads them, and the reverse."""
    with pytest.raises(UsageError, match=words):
        k2quant.convert(small, tmp_path / "out", **({"to": "int4"} | options))
    assert not (tmp_path / "out").exists()


def test_a_recipe_searches_in_one_way(small: Path, tmp_path: Path) -> None:
    """Two methods that search are refused with both places, and so is one beside a recipe."""
    rules = [{"to": "int4", "match": "gate_proj", "method": "mse"}, {"to": "int4", "method": "imatrix"}]
    with pytest.raises(UsageError, match="rule 2: method imatrix, where recipe: rule 1: method says mse"):
        k2quant.convert(small, tmp_path / "out", recipe={"rules": rules}, allow_split=True)
    with pytest.raises(UsageError, match="`method=` beside `recipe=`"):
        k2quant.convert(small, tmp_path / "out", recipe={"rules": rules[:1]}, method="mse")


def test_other_values_are_not_searched(small: Path) -> None:
    """A merge or an export, whose values are not the source's own, refuses the method by name."""
    with pytest.raises(UsageError, match="which only `k2quant convert` writes: write bf16 here"):
        make_plan(open_checkpoint(small), Options("int4", method="mse"), substituted=True)


def test_a_format_refuses_a_grid_that_is_not_searched() -> None:
    """Whoever asks it for scales on the other grid is told, not given scales of this one."""
    with pytest.raises(CheckpointError, match="expected moonshot, found compressed-tensors"):
        Int4(grid="compressed-tensors").search(np.zeros((1, 32), np.uint16), None, codecs("cpu"))


def test_statistics_of_another_model_are_refused(small: Path, make_stats: Callable[..., Path], tmp_path: Path) -> None:
    """A size of the config tells, before a byte is written."""
    config = json.loads((small / CONFIG).read_text())
    stats = make_stats(config={**config, "qk_nope_head_dim": 64})
    found = run("convert", "--to", "int4", "--method", "imatrix", "--stats", stats, small, tmp_path / "out")
    assert found.exit_code == 1
    assert "of another model: qk_nope_head_dim" in found.stderr
    assert not (tmp_path / "out").exists()


def test_statistics_of_another_format_are_refused(
    small_bf16: Path, small: Path, make_stats: Callable[..., Path], tmp_path: Path
) -> None:
    """Those of the BF16 checkpoint do not fit the FP8 one that it was made of, nor the reverse."""
    with pytest.raises(
        CheckpointError,
        match=r"was calibrated in other tensors, expected weight, as .*, found weight, weight_scale_inv",
    ):
        k2quant.convert(small, tmp_path / "out", "int4", method="imatrix", stats=make_stats(small_bf16))
    with pytest.raises(CheckpointError, match="was calibrated in other tensors, expected weight, weight_scale_inv, as"):
        k2quant.convert(small_bf16, tmp_path / "out", "int4", method="imatrix", stats=make_stats(small))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "tensor",
    [
        "model.layers.1.mlp.experts.2.up_proj.weight",
        "model.layers.0.mlp.experts.0.down_proj.weight_scale_inv",
        "model.layers.1.mlp.gate.weight",
        "model.layers.0.self_attn.o_proj.weight",
    ],
    ids=["searched", "its scale", "copied", "becomes BF16"],
)
def test_a_weight_that_was_changed_is_refused(tensor: str, small: Path, stats: Path, tmp_path: Path) -> None:
    """One bit of any weight that the calibration read: named, and nothing looks finished."""
    other = changed(small, tmp_path / "other", tensor)
    with pytest.raises(CheckpointError, match=re.escape(f"`{tensor}`") + ".*is not the weight that was calibrated"):
        k2quant.convert(other, tmp_path / "out", "int4", method="imatrix", stats=stats)
    assert unfinished(tmp_path / "out")
    if ".experts." in tensor:
        with pytest.raises(CheckpointError, match="is not the weight that was calibrated"):
            k2quant.convert(other, tmp_path / "out", "int4", method="imatrix", stats=stats)  # nor when it resumes


def test_damaged_statistics_are_refused(small: Path, stats: Path, tmp_path: Path) -> None:
    """Cut short or not there, before a byte is written; NaN when it is read, and nothing looks finished: by name."""
    broken = shutil.copytree(stats, tmp_path / "broken")
    path = broken / moments_file(1)
    path.write_bytes(path.read_bytes()[:-1])
    for folder in (broken, tmp_path / "nowhere", small):
        with pytest.raises(CheckpointError, match=re.escape(str(folder))):
            k2quant.convert(small, tmp_path / "out", "int4", method="imatrix", stats=folder)
    assert not (tmp_path / "out").exists()
    shutil.rmtree(broken)
    shutil.copytree(stats, broken)
    data = bytearray(path.read_bytes())
    data[-4:] = np.float32(np.nan).tobytes()
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=re.escape(path.name)):
        k2quant.convert(small, tmp_path / "out", "int4", method="imatrix", stats=broken)
    assert unfinished(tmp_path / "out")


def test_what_was_not_measured_is_said(small: Path, make_stats: Callable[..., Path], tmp_path: Path) -> None:
    """Experts of layers that no pass runs (MTP) are searched plainly: a remark counts them, each has a reason."""
    source = open_checkpoint(small)
    base = "model.layers.2.mlp.experts.0.gate_proj"
    random = np.random.default_rng(5)
    bits = (random.standard_normal((128, 128)).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    extra = {f"{base}.weight": ("BF16", bits)}
    write_checkpoint(tmp_path / "source", {"model-x.safetensors": extra}, source.config or {})
    index = json.loads((small / INDEX).read_text())
    for path in small.glob("*.safetensors"):
        shutil.copy(path, tmp_path / "source")
    index["weight_map"][f"{base}.weight"] = "model-x.safetensors"
    (tmp_path / "source" / INDEX).write_text(json.dumps(index))
    done = k2quant.convert(
        tmp_path / "source", tmp_path / "out", "int4", method="imatrix", stats=make_stats(tmp_path / "source")
    )
    assert (
        "not measured by the calibration, so searched for the least squared error alone (mse): 1 weight, such as "
        f"{base}"
    ) in done.report["remarks"]
    scales = done.report["tensors"][f"{base}.weight_packed"]["scales"]
    assert (scales["method"], scales["measure"]) == ("mse", "weights")
    assert scales["reason"] == "not measured by the calibration"


def test_the_command_line_says_what_was_bought(small: Path, stats: Path, tmp_path: Path) -> None:
    """The last line is in words; the dry run says method, statistics and what would be searched; flags are flags."""
    call = ("convert", "--to", "int4", "--method", "IMATRIX", "--stats", stats, small, tmp_path / "out")
    dry = run(*call, "--dry-run")
    assert re.search(r"^method +imatrix, 16 scales a group; 24 weights searched$", dry.stdout, re.MULTILINE)
    assert re.search(r"^stats +[0-9a-f]{64}$", dry.stdout, re.MULTILINE)
    assert re.search(r"^routed experts +24 searched, fp8 -> int4$", dry.stdout, re.MULTILINE)
    found = json.loads(run(*call, "--dry-run", "--json").stdout)
    assert not (tmp_path / "out").exists()
    done = run(*call)
    assert done.exit_code == 0, done.output
    assert re.fullmatch(
        r"imatrix: held-out error 0\.\d\d of rounding's \(median of 24 matrices\)", done.stdout.splitlines()[-1]
    )
    again = json.loads(run(*call, "--restart", "--json").stdout)
    assert found["method"] == {**again["method"], "weights": 24}
    assert (again["bought"], again["method"]["asked"]) == (done.stdout.splitlines()[-1], "imatrix")
    refused = run("convert", "--to", "int4", "--method", "imatrix", small, tmp_path / "more")
    assert (
        refused.exit_code,
        "--method imatrix weighs errors by what a calibration saw, and --stats names none" in refused.stderr,
    ) == (2, True)


def test_figures_of_a_search_are_those_of_its_values(small: Path, tmp_path: Path) -> None:
    """A report's figures are the error that shipped, so that `verify --against` holds the output to it."""
    done = k2quant.convert(small, tmp_path / "out", "int4", method="mse")
    assert k2quant.verify(small, done.folder, against=done.folder / "k2quant_report.json").passed
