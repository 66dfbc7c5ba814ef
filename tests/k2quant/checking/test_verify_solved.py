"""Verification of what is more than rounding: codes that were solved, powers of two that were moved, and damage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import k2quant
from k2quant.checkpoint.header import TensorEntry
from k2quant.checkpoint.reader import REPORT, Checkpoint, open_checkpoint
from k2quant.checkpoint.reading import read_tensor
from k2quant.conversion.searching.powers import shifted
from k2quant.kernels.codecs.scales.search import candidate_table, is_candidate
from k2quant.kernels.codecs.values import bf16_to_float, float_to_bf16
from k2quant.kernels.solvers.factors import factorise
from k2quant.kernels.solvers.gptq import solve

UP, DOWN = (f"model.layers.1.mlp.experts.0.{name}_proj" for name in ("up", "down"))
WEIGHT = f"{UP}.weight"


class Case(NamedTuple):
    """A source and what was made of it."""

    source: Path
    out: Path

    def bits(self, name: str) -> NDArray[np.uint16]:
        """Return a BF16 tensor of the output."""
        return array(open_checkpoint(self.out), name, np.uint16)

    def put(self, name: str, values: NDArray[Any]) -> None:
        """Overwrite a tensor of the output."""
        entry = open_checkpoint(self.out).tensors[name]
        with (self.out / entry.file).open("r+b") as file:
            file.seek(entry.start)
            file.write(values.tobytes())

    def report(self, change: Any) -> None:
        """Change the report of the output."""
        report = json.loads((self.out / REPORT).read_text())
        change(report)
        (self.out / REPORT).write_text(json.dumps(report))

    def failures(self, against: Path | None = None) -> dict[str, str]:
        """Return what verify finds."""
        return k2quant.verify(self.source, self.out, against=against).failures


def array(checkpoint: Checkpoint, name: str, dtype: Any) -> NDArray[Any]:
    """Return a tensor's elements in its shape."""
    entry: TensorEntry = checkpoint.tensors[name]
    return np.frombuffer(read_tensor(checkpoint, entry), dtype).reshape(entry.shape).copy()


def packed(codes: NDArray[np.int8]) -> NDArray[np.uint32]:
    """Return codes as INT4 stores them."""
    words = (codes.reshape(len(codes), -1, 8).astype(np.int64) + 8) << np.arange(0, 32, 4)
    found: NDArray[np.uint32] = words.sum(2).astype(np.uint32)
    return found


@pytest.fixture(scope="module")
def made(k2_bf16: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """An output at searched scales of which one matrix is solved under correlated inputs."""
    out = k2quant.convert(k2_bf16, tmp_path_factory.mktemp("solved") / "out", to="int4", method="mse").folder
    case = Case(k2_bf16, out)
    weights = torch.from_numpy(array(open_checkpoint(k2_bf16), WEIGHT, np.int16)).view(torch.bfloat16)
    scales = torch.from_numpy(case.bits(f"{UP}.weight_scale").view(np.int16)).view(torch.bfloat16)
    inputs = torch.randn(96, weights.shape[1], generator=torch.Generator().manual_seed(0))
    factor = factorise(inputs.T @ inputs, damping=0.1)
    assert factor is not None
    found = solve(weights, scales, factor)
    case.put(f"{UP}.weight_packed", packed(found.codes.numpy()))
    lost = weights.double() - found.values.double()

    def solved(report: dict[str, Any]) -> None:
        report["method"] = {"asked": "gptq", "scales": "mse"}
        facts = report["tensors"][f"{UP}.weight_packed"]
        facts["scales"]["method"] = "gptq"
        facts["figures"] |= {"error": float(lost.square().sum()), "changed": int(lost.count_nonzero())}
        facts["figures"]["worst"] = float(lost.abs().max())

    case.report(solved)
    return case


@pytest.fixture
def case(made: Case, tmp_path: Path) -> Case:
    """A copy of it to damage."""
    return Case(made.source, Path(shutil.copytree(made.out, tmp_path / "out")))


def test_codes_that_were_solved_pass(case: Case) -> None:
    """None of them need be the nearest; without the word of a report the same weights are too far off."""
    assert not case.failures()
    assert not case.failures(against=case.out / REPORT)
    findings = {finding.name: finding for finding in k2quant.verify(case.source, case.out).findings}
    assert findings[WEIGHT].solved
    assert not findings[f"{DOWN}.weight"].solved
    (case.out / REPORT).unlink()
    assert "further off than int4 rounding explains" in case.failures()[WEIGHT]


def test_one_code_that_is_one_off_is_found(case: Case) -> None:
    """Among codes that are none of the nearest no rule finds it; the figures of the report do, better or worse."""
    words = array(open_checkpoint(case.out), f"{UP}.weight_packed", np.uint32)
    inner = np.argwhere(((words >> 4 & 15) > 2) & ((words >> 4 & 15) < 14))
    for row, column in inner[:2]:
        damaged = words.copy()
        damaged[row, column] ^= 0x10
        case.put(f"{UP}.weight_packed", damaged)
        assert list(case.failures()) == [WEIGHT]
        assert "the report has" in case.failures()[WEIGHT]
        assert list(case.failures(against=case.out / REPORT)) == [WEIGHT]


def test_the_code_that_the_grid_lacks_is_found_without_figures(case: Case) -> None:
    """-8 is no code of the moonshot grid, whatever was solved."""
    words = array(open_checkpoint(case.out), f"{UP}.weight_packed", np.uint32)
    words[7, 1] &= 0xFFFFFFF0
    case.put(f"{UP}.weight_packed", words)
    assert case.failures()[WEIGHT].startswith("1 weights have scales or codes")


def test_a_permuted_row_is_found_without_figures(case: Case) -> None:
    """Two rows with codes and scales in each other's place: scales are none that their weights ask for."""
    for name, dtype in ((f"{UP}.weight_packed", np.uint32), (f"{UP}.weight_scale", np.uint16)):
        rows = array(open_checkpoint(case.out), name, dtype)
        rows[[3, 9]] = rows[[9, 3]]
        case.put(name, rows)
    assert "weights have scales or codes that solving does not give" in case.failures()[WEIGHT]


@pytest.mark.parametrize("factor", [0.9, 1.05, 2.0])
def test_a_wrong_scale_is_found_without_figures(case: Case, factor: float) -> None:
    """A group whose scale is none that a rule or a search would choose counts whole."""
    scales = case.bits(f"{UP}.weight_scale")
    scales[5, 3] = float_to_bf16(bf16_to_float(scales[5, 3:4]) * np.float32(factor))[0]
    case.put(f"{UP}.weight_scale", scales)
    found = case.failures()[WEIGHT]
    assert found.startswith("32 weights have scales or codes") or "the report has" in found


def test_a_lost_matrix_is_found_without_figures(case: Case) -> None:
    """Codes of zero at the right scales lose all of the energy, of which solving explains half."""
    case.put(
        f"{UP}.weight_packed", np.full_like(array(open_checkpoint(case.out), f"{UP}.weight_packed", "<u4"), 0x88888888)
    )
    assert case.failures()[WEIGHT] == "squared error 1 of its energy; solving explains 0.5"


def test_what_ships_otherwise_is_held_to_rounding(case: Case) -> None:
    """A matrix that ships with searched scales in the same output has codes that are the nearest."""
    name = f"{DOWN}.weight_packed"
    words = array(open_checkpoint(case.out), name, np.uint32)
    words[3, 5] ^= 0x10
    case.put(name, words)
    assert "further off than int4 rounding explains" in case.failures()[f"{DOWN}.weight"]


@pytest.mark.parametrize(
    "lie",
    [
        lambda report: report.update(method="gptq"),
        lambda report: report.update(method={"asked": ["gptq"]}),
        lambda report: report.update(method={"asked": "rtn"}),
        lambda report: report["tensors"][f"{UP}.weight_packed"].update(scales=["gptq"]),
        lambda report: report["tensors"][f"{UP}.weight_packed"].update(scales={"method": 7}),
        lambda report: report["tensors"][f"{UP}.weight_packed"].pop("scales"),
    ],
    ids=["text", "list", "another", "scales", "number", "nothing"],
)
def test_a_report_that_says_nothing_sensible_excuses_nothing(case: Case, lie: Any) -> None:
    """What was solved then counts as rounded, and fails; nothing breaks."""
    case.report(lie)
    assert list(case.failures()) == [WEIGHT]


def test_a_report_cannot_excuse_what_solving_does_not_give(case: Case) -> None:
    """One that calls everything solved, of an output that is damaged, with its figures forged to match."""
    scales = case.bits(f"{DOWN}.weight_scale")
    scales[0, 0] = float_to_bf16(bf16_to_float(scales[0, :1]) * np.float32(0.5))[0]
    case.put(f"{DOWN}.weight_scale", scales)

    def forge(report: dict[str, Any]) -> None:
        report["tensors"][f"{DOWN}.weight_packed"]["scales"]["method"] = "gptq"

    case.report(forge)
    assert case.failures()[f"{DOWN}.weight"].startswith("32 weights have scales or codes")


def test_candidates_are_told_from_all_other_scales() -> None:
    """By the largest weight of a group, in every binade that is searched; outside of them none is one."""
    table = candidate_table(4)
    amax = np.arange(127 << 7, 128 << 7, dtype=np.uint16)
    assert is_candidate(amax[:, None].repeat(16, 1), table).all()
    assert is_candidate(amax[:, None].repeat(16, 1) - (20 << 7), table - (20 << 7)).all()
    assert not is_candidate(amax, table[:, -1] - 2).any()
    assert not is_candidate(np.zeros(3, np.uint16), np.zeros(3, np.uint16)).any()


@pytest.fixture
def folded(made: Case, tmp_path: Path) -> Case:
    """An output of which one expert was folded: a row of up halved, the same column of down doubled."""
    source = Path(shutil.copytree(made.source, tmp_path / "changed"))
    powers = np.zeros(256, np.int8)
    powers[[2, 40, 41]] = (1, -2, 3)
    changed = Case(source, source)
    changed.put(WEIGHT, shifted(changed.bits(WEIGHT), -powers[:, None]))
    changed.put(f"{DOWN}.weight", shifted(changed.bits(f"{DOWN}.weight"), powers[None]))
    out = k2quant.convert(source, tmp_path / "folded", to="int4", method="mse").folder
    case = Case(made.source, out)
    case.report(lambda report: report.update(method={"asked": "awq"}))
    return case


def test_powers_of_two_that_both_sides_have_pass(folded: Case) -> None:
    """Each row is compared as it was before it was rounded; without the word of a report both fail."""
    assert not folded.failures()
    assert not folded.failures(against=folded.out / REPORT)
    folded.report(lambda report: report.update(method={"asked": "imatrix"}))
    assert set(folded.failures()) == {WEIGHT, f"{DOWN}.weight"}


def test_half_a_fold_is_found(folded: Case) -> None:
    """A down without the powers that its up lost would break the model."""
    plain = k2quant.convert(folded.source, folded.out.parent / "plain", to="int4", method="mse").folder
    for suffix, dtype in (("weight_packed", np.uint32), ("weight_scale", np.uint16)):
        folded.put(f"{DOWN}.{suffix}", array(open_checkpoint(plain), f"{DOWN}.{suffix}", dtype))
    assert "further off than int4 rounding explains" in folded.failures()[f"{DOWN}.weight"]


def test_a_scale_of_another_power_of_two_in_one_group_is_no_fold(folded: Case) -> None:
    """A fold is of a whole row: one group that is doubled is damage."""
    scales = folded.bits(f"{UP}.weight_scale")
    scales[2, 0] += 1 << 7
    folded.put(f"{UP}.weight_scale", scales)
    assert WEIGHT in folded.failures()


def test_one_wrong_code_of_a_folded_row_is_found(folded: Case) -> None:
    """A fold excuses no code."""
    words = array(open_checkpoint(folded.out), f"{UP}.weight_packed", np.uint32)
    words[2, 5] ^= 0x10
    folded.put(f"{UP}.weight_packed", words)
    assert list(folded.failures()) == [WEIGHT]
