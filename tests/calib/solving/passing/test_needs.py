"""How a pass that solves is planned: K2's sizes come out as stated, and memory decides only how it goes about it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from k2quant.calib.inputs import Samples
from k2quant.calib.solving.memory import KEPT, Needs, needs
from k2quant.checkpoint.reader import Checkpoint
from k2quant.errors import OutputError, UsageError
from k2quant.ground import names

LENGTH, ROWS = 2048, (512, 51)
TOKENS, HELD = 563 * 2048, 51 * 2048


@pytest.fixture(scope="module")
def planned(k2_headers: Checkpoint) -> Callable[..., Needs]:
    """Give the function that plans a pass over K2's first two layers."""
    every = [name.removesuffix(".weight") for name in k2_headers.tensors if ".layers." in name]

    def plan(memory: float, workers: int = 2, *, experts: bool = True) -> Needs:
        bases = [base for base in every if names.is_routed_expert(base) or not experts]
        return needs(k2_headers, rows=ROWS, length=LENGTH, bases=bases, memory=int(memory * 1e9), workers=workers)

    return plan


def test_k2_in_little_memory(planned: Callable[..., Needs]) -> None:
    """The tokens of a layer are 69 GB: they lie in files, and K2's experts are solved one at a time in 9 GB."""
    plan = planned(1000)
    assert plan.hidden == TOKENS * 7168 * 2
    assert plan.arrays == TOKENS * 8 * 7168 + HELD * 4 * 7168
    assert 6e9 < plan.least < 9e9
    least = planned(plan.least / 1e9)
    assert (least.workers, least.kept, least.budget) == (1, 0, 0)
    assert least.disk == 2 * plan.hidden + plan.arrays
    with pytest.raises(UsageError, match="at least"):
        planned(plan.least / 1e9 - 0.001)


def test_the_dense_layer_takes_more(planned: Callable[..., Needs]) -> None:
    """Its down has 18,432 columns, a Hessian of 1.4 GB."""
    assert planned(1000).least < planned(1000, experts=False).least < 20e9


def test_more_memory_never_means_fewer_experts(planned: Callable[..., Needs]) -> None:
    """First as many experts as were asked for go side by side, then tokens are kept, x first, then hidden states."""
    before = planned(9, 16)
    for memory in (12, 16, 24, 32, 64, 96, 128, 1000):
        plan = planned(memory, 16)
        assert before.workers <= plan.workers <= 16
        assert plan.kept + plan.in_files == plan.arrays
        assert plan.kept <= plan.memory - plan.budget
        assert 0 <= plan.budget < plan.memory
        before = plan
    assert (before.workers, before.in_files) == (16, 0)
    assert planned(32, 2).kept == 2 * TOKENS * 7168 + 4 * HELD * 7168
    assert planned(128, 2).disk == 2 * before.hidden


def test_planning_loads_no_torch() -> None:
    """How much memory a pass takes can be asked where nothing is installed that could run it."""
    code = "import sys; from k2quant.calib.solving.memory import needs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_is_kept_of_an_expert_is_bounded() -> None:
    """So many tokens of K2 have outputs of half a gigabyte."""
    assert KEPT * 7168 * 2 < 5e8


def test_a_disk_that_is_too_small_is_found_before_any_work(
    tiny: Checkpoint, drawn: Callable[..., Samples], through: Any, sinks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what it would take."""

    class Usage(NamedTuple):
        free: int = 1000

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage())
    with pytest.raises(OutputError, match=r"too small, expected 98\.3 kB free, for hidden states .* found 1\.0 kB"):
        through(tiny, drawn(64), sinks(), upto=0)


@pytest.mark.parametrize("base", ["model.layers.2.self_attn.o_proj", "lm_head", "model.layers.1.mlp.gate"])
def test_a_matrix_of_no_layer_is_refused(
    tiny: Checkpoint, drawn: Callable[..., Samples], through: Any, sinks: Any, base: str
) -> None:
    """A pass would never come to it."""
    with pytest.raises(UsageError, match=f"{base}: expected a projection of one of 2 decoder layers"):
        through(tiny, drawn(64), sinks(), bases=[base])
