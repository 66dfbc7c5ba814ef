"""What solving will take, told before it begins."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from inspect import Parameter, signature
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click import Context

from k2quant.calib import operations, plan_calibration, solve
from k2quant.calib.operations import Counts, Work, abreast, measured
from k2quant.calib.solving import planning
from k2quant.calib.solving.planning import SolvingPlan, plan_solving
from k2quant.calib.solving.settings import Settings
from k2quant.calib.stats.model import Model
from k2quant.checkpoint.reader import open_checkpoint
from k2quant.cli import main
from k2quant.conversion.convert import chosen
from k2quant.conversion.plan import make_plan
from k2quant.errors import UsageError
from k2quant.ground.release import INSTRUCT_CONFIG
from k2quant.kernels.solvers.factors import DAMPING

K2 = Model.of(INSTRUCT_CONFIG)
H, I, EXPERTS = 7168, 2048, 384  # noqa: E741  as docs/calibration.md calls them
Planned = Callable[..., SolvingPlan]


@pytest.fixture
def planned(k2_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Planned:
    """Return what plans the small K2, on a machine of round numbers."""
    monkeypatch.setattr(planning, "measured", lambda *_: Work(*[1e9] * 6))
    monkeypatch.setattr(planning, "read_rate", lambda *_: 1e9)

    def made(*, scope: Any = None, **options: Any) -> SolvingPlan:
        plan = make_plan(open_checkpoint(k2_source), chosen(None, to="int4", method="gptq", scope=scope))
        known: dict[str, Any] = {"samples": 16, "length": 64, "memory": 4_000_000_000, "workers": 2}
        return plan_solving(plan, tmp_path / "out", **known | options)

    return made


def matrix(layer: int, part: str, rows: int, columns: int) -> Any:
    """Return what is known of one of K2's matrices before it is read, as a job has it."""
    name = f"model.layers.{layer}.{part}"
    return SimpleNamespace(
        weight=SimpleNamespace(main=SimpleNamespace(name=f"{name}.weight"), shape=(rows, columns), base=name), name=name
    )


def experts(layer: int) -> list[Any]:
    """Return the routed experts of a layer of K2."""
    shapes = (("gate_proj", I, H), ("up_proj", I, H), ("down_proj", H, I))
    return [
        matrix(layer, f"mlp.experts.{expert}.{name}", rows, columns)
        for expert in range(EXPERTS)
        for name, rows, columns in shapes
    ]


def test_a_layer_of_k2_is_as_on_paper() -> None:
    """384 experts, a Hessian for gate with up and one for down, summed over 8 of 384 of 512 x 2048 tokens each."""
    tokens, jobs = 512 * 2048, experts(3)
    counts = Counts(K2, jobs, tokens, tokens // 8, 2048)
    found = counts.work([job.weight for job in jobs], searched=True, propagate=True)
    assert len(counts.inputs) == 2 * EXPERTS
    assert found.hessians == pytest.approx(tokens * (8 * (H**2 + I**2) + H**2) / 2)  # that of all tokens once
    assert found.factors == pytest.approx(EXPERTS * (H**3 + I**3) / 6)
    assert found.sweeps == EXPERTS * (2 * I * H**2 + H * I**2) / 2
    assert found.search == 3 * EXPERTS * H * I
    flops = 2 * (2 * found.hessians + found.factors + found.sweeps)
    assert 1.0e15 < flops < 1.4e15  # docs: 1.2e15 a layer, where both halves of each Hessian are summed


def test_attention_runs_once_more_for_each_stage() -> None:
    """Each of its three inputs is seen after those before it were quantised; without it, it runs once."""
    attention = [
        matrix(3, "self_attn.q_a_proj", 1536, H),
        matrix(3, "self_attn.q_b_proj", 12288, 1536),
        matrix(3, "self_attn.o_proj", H, 8192),
    ]
    weights = [job.weight for job in attention]

    def forward(jobs: list[Any]) -> float:
        return Counts(K2, jobs, 1000, 0, 2).work(weights, searched=False, propagate=True).model

    looks = K2.layers * 64 * (128 + 64 + 128) * 2 // 2
    products = sum(prod(weight.shape) for weight in weights)
    assert forward([]) == pytest.approx(1000 * (products + looks))
    assert forward(attention) == pytest.approx(1000 * (4 * products + looks * (1 + 3 / K2.layers)))


def test_shared_experts_have_the_hessian_of_the_layer() -> None:
    """All tokens of a layer are summed once, for the prior of its routed experts and for what is shared."""
    alone, both = (
        Counts(K2, [*experts(3)[:1], *more], 1000, 0, 2).work([], searched=True, propagate=True).hessians
        for more in ([], [matrix(3, "mlp.shared_experts.gate_proj", I, H)])
    )
    assert alone == both


def test_twice_the_rows_take_twice_the_products(planned: Planned) -> None:
    """And factors and sweeps, which are of weights, stay."""
    once, twice = planned(), planned(samples=32)
    assert (twice.work.hessians, twice.work.model) == (2 * once.work.hessians, 2 * once.work.model)
    assert (twice.work.factors, twice.work.sweeps, twice.work.search) == (
        once.work.factors,
        once.work.sweeps,
        once.work.search,
    )


def test_what_is_not_searched_takes_no_time(planned: Planned) -> None:
    """Plain scales are no search; what does not propagate runs all MLPs twice."""
    assert planned(scales="rtn").parts()["search"] == 0
    assert planned(propagate=False).work.model > 1.3 * planned().work.model


def test_only_what_the_pass_reaches_is_counted(planned: Planned) -> None:
    """By default the routed experts; with every projection more of them, and more Hessians."""
    routed, every = planned(), planned(scope="projections")
    assert routed.matrices == 3 * 16 * (routed.matrices // 48)
    assert routed.hessians == 2 * routed.matrices // 3
    assert every.matrices > routed.matrices
    assert every.work.model > routed.work.model  # attention runs again for each of its inputs


def test_the_disk_must_hold_output_states_and_spool(planned: Planned, monkeypatch: pytest.MonkeyPatch) -> None:
    """`fits` compares all of it with what is free, to the byte."""
    found = planned()
    needed = found.output + 2 * found.passes.hidden + found.spool
    assert found.disk_needed == needed + (found.passes.arrays if found.passes.in_files else 0)
    for free, fits in ((found.disk_needed, True), (found.disk_needed - 1, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        plan = planned()
        assert plan.fits is fits
        assert ("TOO SMALL" in plan.lines()["disk needed"]) is not fits


def test_it_is_told_in_lines_json_and_one_line(planned: Planned) -> None:
    """Time is the sum of its parts, JSON has plain values only, and the repr stays short."""
    found = planned()
    said = json.loads(json.dumps(found.as_json()))
    assert said["seconds"] == pytest.approx(sum(said["parts"].values()))
    assert said["work"]["hessians"] == found.work.hessians
    assert "\n" not in repr(found)
    assert len(repr(found)) < 800
    assert found.lines()["time"].startswith("about ")
    assert f"{found.matrices:,} matrices by {found.hessians:,} Hessians, 2 experts at a time" in found.lines()["solved"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"memory": 1}, "`memory=` is too small"),
        ({"samples": 0}, "`samples=`: expected at least 1, found 0"),
        ({"workers": 0}, "0 workers"),
    ],
)
def test_what_cannot_be_is_refused(planned: Planned, options: Any, expected: str) -> None:
    """In the words of the pass itself."""
    with pytest.raises(UsageError, match=expected):
        planned(**options)


def test_rates_are_measured_with_the_real_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is more than a hand does and less than a thousand of the fastest GPUs; torch's threads are as before."""
    for name, value in (("_PROBE_SECONDS", 0.001), ("_PROBE_COLUMNS", 128)):
        monkeypatch.setattr(operations, name, value)
    small = Model.of(INSTRUCT_CONFIG | {"hidden_size": 128, "moe_intermediate_size": 64})
    threads = torch.get_num_threads()
    found = measured(small, "cpu", 2, None)
    assert all(1e5 < rate < 1e18 for rate in found._replace(search=1e9))
    assert torch.get_num_threads() == threads


def test_workers_are_measured_side_by_side() -> None:
    """Every thread works; what one takes is shared out over all that were done."""
    import threading

    seen = set()

    def work() -> None:
        seen.add(threading.get_ident())

    assert 0 < abreast(work, 3) < 1
    assert len(seen) >= 3  # the first piece was the caller's


def test_defaults_are_the_same_wherever_they_are_said() -> None:
    """A pass, its plan and the command take what `Settings` has where nobody asks, and solvers are measured with it."""
    settings = Settings().as_json()
    said = {name: each.default for name, each in signature(solve).parameters.items()}
    convert = main.get_command(Context(main), "convert")
    assert convert is not None
    typed = {each.name: each.default for each in convert.params}
    assert settings["damping"] == DAMPING
    for name in ("scales", "damping", "propagate"):
        assert said[name] == typed[name] == settings[name]
    for other in (plan_solving, plan_calibration):
        for name, each in signature(other).parameters.items():
            assert name not in said or each.default in {Parameter.empty, said[name]}
    for name in ("samples", "length", "memory", "split", "reasoning"):
        assert typed[name] == said[name]
