"""What a calibration will take, told before it begins."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from k2quant.calib import planning
from k2quant.calib.planning import pairs, plan_calibration, product_rate, scores
from k2quant.calib.stats.model import Model
from k2quant.errors import UsageError
from k2quant.ground.release import INSTRUCT_CONFIG

K2 = Model.of(INSTRUCT_CONFIG)


@pytest.fixture
def plan(k2_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return what plans a calibration of the small K2, on a machine of round numbers."""
    monkeypatch.setattr(planning, "product_rate", lambda *_: 1e6)
    monkeypatch.setattr(planning, "read_rate", lambda *_: 1e6)

    def made(**options: Any) -> planning.CalibrationPlan:
        known: dict[str, Any] = {"samples": 16, "length": 64, "memory": 2_000_000_000}
        return plan_calibration(k2_source, tmp_path / "stats", **known | options)

    return made


def test_hessians_of_k2_are_as_on_paper() -> None:
    """A token adds to the pairs of 7,168 and of 2,048 columns of 8 experts, and to those that all share."""
    routed = 60 * 8 * (7168**2 + 2048**2) / 2
    shared = (
        61 * (7168**2 + 1536**2 + 512**2 + 8192**2) / 2 + 60 * (2 * 7168**2 + 2048**2) / 2 + (7168**2 + 18432**2) / 2
    )
    assert pairs(K2) == routed + shared
    assert 4 * 7168**2 == 205_520_896  # bytes of one, which is what the memory of a pass counts


def test_attention_looks_at_half_a_row() -> None:
    """64 heads of 128 + 64 columns of keys and 128 of values, over 1,024 tokens in the mean."""
    assert scores(K2, 2048) == 61 * 64 * (128 + 64 + 128) * 1024


def test_tokens_of_an_expert_follow_from_the_rows(plan: Any) -> None:
    """The mean expert sees 8 of 16 parts of what is measured, a thin one a tenth of that; what judges is apart."""
    found = plan()
    assert (found.tokens, found.judging) == (16 * 64, 2 * 64)
    assert found.mean == found.tokens * 8 / 16
    assert found.thin == pytest.approx(found.mean / 10)


def test_memory_may_be_written_as_people_write_it(plan: Any) -> None:
    """As `calibrate` takes it."""
    assert plan(memory="2GB").passes == plan(memory=2_000_000_000).passes


def test_twice_the_rows_take_twice_the_work(plan: Any) -> None:
    """And read no byte more of the checkpoint, where its experts fit into memory."""
    once, twice = plan(), plan(samples=32)
    assert twice.work == 2 * once.work
    assert twice.bytes_read == once.bytes_read


def test_hessians_cost_work_and_disk(plan: Any) -> None:
    """What is asked for is planned."""
    plain, more = plan(), plan(hessians=True)
    assert more.work > plain.work
    assert more.stats_bytes > plain.stats_bytes
    assert more.disk_needed - plain.disk_needed == more.stats_bytes - plain.stats_bytes


def test_a_disk_that_is_too_small_is_said(plan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`fits` compares what is needed with what is free."""
    needed = plan().disk_needed
    for free, fits in ((needed, True), (needed - 1, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: Usage(free))
        assert plan().fits is fits


class Usage:
    """What `shutil.disk_usage` says."""

    def __init__(self, free: int) -> None:
        """Hold the bytes that are free."""
        self.free = free


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"memory": 1}, "`memory=` is too small"),
        ({"length": 200_000}, "`length=`: expected at most the 131,072 tokens that the model reads, found 200,000"),
        ({"samples": 0}, "`samples=`: expected at least 1, found 0"),
        ({"length": 1}, "`length=`: expected at least 2, found 1"),
    ],
)
def test_what_cannot_be_is_refused(plan: Any, options: Any, expected: str) -> None:
    """In the words of the calibration itself."""
    with pytest.raises(UsageError, match=expected):
        plan(**options)


def test_a_rate_is_measured() -> None:
    """Of a product of this machine: more than a hand, less than a thousand of the fastest GPUs."""
    assert (
        1e6 < product_rate(Model.of(INSTRUCT_CONFIG | {"hidden_size": 128, "moe_intermediate_size": 64}), "cpu") < 1e18
    )
