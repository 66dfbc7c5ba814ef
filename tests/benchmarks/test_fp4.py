"""The proof of FP4 and its peers: errors are what they say, tensors are compared whole, and pages say their results."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import k2quant
import tiny
from k2quant.checkpoint.reader import open_checkpoint
from k2quant.checkpoint.writing.in_memory import write_checkpoint
from places import ROOT
from rewritten import tensors_of

sys.path.insert(0, str(ROOT / "benchmarks"))

from suites.calib import truth
from suites.fp4 import proof, run
from suites.fp4.peers import beside

pytestmark = pytest.mark.usefixtures("one_thread")

RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture(scope="module")
def int4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny nano-K2 with INT4 experts."""
    place = tmp_path_factory.mktemp("fp4")
    tiny.write_model(place / "bf16")
    return k2quant.convert(place / "bf16", place / "int4", to="int4").folder


def test_errors_are_relative_squares() -> None:
    """Of weights 3 and 4, of which one comes out 1 away: 1/25, 14 dB, half of them unchanged; two matrices add up."""
    found = proof.errors(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 5.0]]))
    assert found.relative == 1 / 25
    assert math.isclose(found.decibels, 10 * math.log10(25))
    assert found.record()["exact"] == 0.5
    none = proof.errors(torch.tensor([[5.0]]), torch.tensor([[5.0]]))
    assert none.record()["decibels"] is None
    assert proof.added([found, none]).relative == 1 / 50


def test_slices_of_k2_lose_less_where_scales_are_searched(tmp_path: Path) -> None:
    """The published slice of K2.6 goes through every target that needs no data; a search is never worse."""
    rows = {row["target"]: row for row in proof.slices(tmp_path, proof.SLICES)}
    assert set(rows) == {target.name for target in proof.TARGETS if target.method != "imatrix"}
    assert {row["weights"] for row in rows.values()} == {512}
    assert 0.001 < rows["nvfp4 mse"]["relative"] < rows["nvfp4 rtn"]["relative"] < 0.02
    assert rows["mxfp4 mse"]["relative"] <= rows["mxfp4 rtn"]["relative"] < 0.02


def test_what_is_measured_is_what_stands_in_the_files(int4: Path, tmp_path: Path) -> None:
    """INT4 -> FP4 -> BF16 changes the experts and nothing else of the model that is loaded."""
    plain = k2quant.convert(int4, tmp_path / "plain", to="bf16").folder
    made = proof.converted(int4, tmp_path, proof.Target("nvfp4", "mse"), "experts", None)
    before, after = truth.matrices(truth.load(plain)), truth.matrices(truth.load(made))
    changed = {base for base, matrix in before.items() if not torch.equal(matrix, after[base])}
    assert changed == {base for base in before if ".experts." in base}
    assert proof.values(made).keys() >= before.keys()


def test_checkpoints_are_compared_tensor_by_tensor(int4: Path, tmp_path: Path) -> None:
    """Equal tensors count, one that differs does not, and one that only one has is named."""
    tensors = tensors_of(open_checkpoint(int4))
    scale = next(name for name in tensors if name.endswith("weight_scale"))
    gone = next(name for name in tensors if name.endswith("norm.weight"))
    other = {name: tensor for name, tensor in tensors.items() if name != gone}
    other[scale] = (tensors[scale][0], tensors[scale][1] + 1)
    write_checkpoint(tmp_path / "other", {"model.safetensors": other}, {})
    found = beside.compared(int4, tmp_path / "other")
    assert found["only ours"] == [gone]
    assert found["only theirs"] == []
    here = found["parts"]["weight_scale"]
    assert here["equal"] == here["of"] - 1
    assert found["parts"]["weight_packed"]["equal"] == found["parts"]["weight_packed"]["of"]


@pytest.mark.parametrize("part", list(run.PARTS))
def test_pages_are_what_their_results_say(part: str) -> None:
    """Each page is drawn from its JSON, and says nothing of where things lay."""
    path = RESULTS / f"fp4-{part}.json"
    if not path.exists():
        pytest.skip("not measured yet")
    results: dict[str, Any] = json.loads(path.read_text())
    page = run.PARTS[part][1](results)
    assert path.with_suffix(".md").read_text() == page
    assert "/tmp" not in page + path.read_text()  # noqa: S108  no place of ours
    assert results["command"] in page


def test_bars_are_what_the_rows_say() -> None:
    """A task is met at fifteen times."""
    task = beside.TASKS["bf16-nvfp4-modelopt"]._asdict()
    rows = {name: task | {"times": times} for name, times in (("a", 15.0), ("b", 14.9))}
    assert [bar["met"] for bar in beside.bars(rows)] == [True, False]
