"""How a pass is planned: what is promised of memory holds, and K2's own sizes come out as stated."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k2quant.calib.collecting.memory import needs, piece_rows, segment_rows
from k2quant.checkpoint.reader import Checkpoint
from k2quant.errors import UsageError
from k2quant.ground.release import EXPERTS

LENGTH, ROWS = 2048, (512, 51)


def test_k2_in_little_memory(k2_headers: Checkpoint) -> None:
    """The hidden states of 563 rows are 16.5 GB; K2 in BF16 can be measured in less than 6 GB."""
    plan = needs(k2_headers, rows=ROWS, length=LENGTH, memory=10**12)
    assert plan.hidden == 563 * 2048 * 7168 * 2
    assert 5e9 < plan.least < 6e9
    assert (plan.chunk, plan.wave) == (EXPERTS, 1)
    assert needs(k2_headers, rows=ROWS, length=LENGTH, memory=plan.least).waves == 36
    with pytest.raises(UsageError, match="at least"):
        needs(k2_headers, rows=ROWS, length=LENGTH, memory=plan.least - 1)


def test_experts_of_k2_are_read_once_where_they_fit(k2_headers: Checkpoint) -> None:
    """A layer's experts are 33.8 GB: with 33 GB they are read in waves, with 45 GB once."""
    few, all_ = (needs(k2_headers, rows=ROWS, length=LENGTH, memory=gb * 10**9) for gb in (33, 45))
    assert few.chunk < EXPERTS
    assert 1 < few.waves < 5
    assert all_.chunk == EXPERTS


def test_hessians_of_k2(k2_headers: Checkpoint) -> None:
    """All rows are one wave, 65 GB, or the Hessians of all experts fit, 170 GB beside 34 GB of weights."""
    plan = needs(k2_headers, rows=ROWS, length=LENGTH, memory=10**12, hessians=True)
    assert 65e9 < plan.least < 80e9
    assert (plan.chunk, plan.wave) == (EXPERTS, 1)
    assert 10**12 - plan.budget > 200e9
    assert needs(k2_headers, rows=ROWS, length=LENGTH, memory=100 * 10**9, hessians=True).waves == 1


@pytest.mark.parametrize(("hessians", "first"), [(False, 6), (True, 75)])
def test_more_memory_never_means_more_reading(k2_headers: Checkpoint, *, hessians: bool, first: int) -> None:
    """Waves cover all segments; with more memory the experts of a layer are not read more often."""
    read = 36
    for memory in (first, first + 1, 12, 20, 31, 39, 47, 60, 90, 240):
        if memory < first:
            continue
        plan = needs(k2_headers, rows=ROWS, length=LENGTH, memory=memory * 10**9, hessians=hessians)
        assert plan.waves * plan.wave >= 36 > (plan.waves - 1) * plan.wave
        assert 0 <= plan.budget < plan.memory
        assert 1 <= plan.chunk <= EXPERTS
        before, read = read, 1 if plan.chunk == EXPERTS else plan.waves
        assert read <= before


@given(st.integers(1, 200_000))
def test_segments_are_whole_pieces(length: int) -> None:
    """However long a row is, pieces and segments have rows, and no piece lies in two segments."""
    assert piece_rows(length) >= 1
    assert segment_rows(length) % piece_rows(length) == 0
    assert segment_rows(length) * length <= max(32768, length)


def test_planning_loads_no_torch() -> None:
    """How much memory a pass takes can be asked where nothing is installed that could run it."""
    code = "import sys; from k2quant.calib.collecting import needs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
