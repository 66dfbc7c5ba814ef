"""What matrices of one input ship with: the best of three ways, whole, and told of; and what is never done to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from k2quant.calib.solving.choosing import Settled, settle
from k2quant.calib.solving.deciding import ways
from k2quant.calib.solving.deciding.drawing import believed
from k2quant.calib.solving.evidence import Evidence
from k2quant.calib.solving.settings import Scales, Settings
from k2quant.errors import UsageError
from k2quant.formats.known import FORMATS
from k2quant.kernels.codecs.choice import codecs
from k2quant.kernels.codecs.views import bits_of
from k2quant.kernels.ops import bf16_to_int4, int4_to_bf16
from k2quant.kernels.solvers.errors import output_error

Plant = Callable[..., Any]
Weights = Callable[..., Tensor]
Seen = Callable[..., Evidence]


def alone(weights: Tensor, evidence: Evidence, settings: Settings | None = None) -> Settled:
    """Settle one matrix."""
    return settle({"down_proj": weights}, evidence, settings or Settings())["down_proj"]


def same(one: Settled, other: Settled) -> bool:
    """Tell whether two ship alike."""
    return torch.equal(one.values, other.values) and torch.equal(one.scales, other.scales) and one.facts == other.facts


def test_matrices_of_one_input_are_settled_as_if_alone(plant: Plant, gaussian: Weights) -> None:
    """Gate and up share a factorisation; neither hears of the other, nor does the evidence of them."""
    evidence = plant("alike", 300, layer=True).evidence
    before = evidence.hessian.clone(), evidence.prior.hessian.clone()
    gate, up = gaussian(1), gaussian(2)
    both = settle({"gate_proj": gate, "up_proj": up}, evidence, Settings())
    assert same(both["gate_proj"], alone(gate, evidence))
    assert same(both["up_proj"], alone(up, evidence))
    assert torch.equal(evidence.hessian, before[0])
    assert torch.equal(evidence.prior.hessian, before[1])


@pytest.mark.parametrize("held", [10, 300], ids=["blended", "own"])
def test_threads_change_no_bit(plant: Plant, gaussian: Weights, held: int) -> None:
    """Values, scales and facts are the same whatever number of threads torch may use."""
    evidence, weights = plant("strange", 8 * held, layer=True).evidence, gaussian(3, rows=600)
    one = alone(weights, evidence)
    torch.set_num_threads(3)
    assert same(alone(weights, evidence), one)


def test_what_is_told_of_a_matrix(plant: Plant, gaussian: Weights) -> None:
    """The facts say what ships, its error over rounding's, who judged, by how many tokens, what became of groups."""
    evidence, weights = plant("uneven", 2000, layer=False).evidence, gaussian(4)
    shipped = alone(weights, evidence)
    facts = dict(shipped.facts)
    plain = ways.plain(weights, 4).values
    errors = [output_error(weights, each, evidence.held, evidence.held_weights) for each in (shipped.values, plain)]
    assert facts.pop("relative") == pytest.approx(errors[0] / errors[1])
    belief = believed(evidence)
    assert belief is not None
    assert torch.equal(shipped.scales, ways.searched(weights, belief, "imatrix", 4).scales)
    codes = (shipped.values.float() / shipped.scales.float().repeat_interleave(32, 1)).round()
    assert facts.pop("short") == (codes.abs().unflatten(1, (-1, 32)).amax(2) < 7).float().mean()
    assert 0 < facts.pop("saturated") < 0.05
    assert facts == {"method": "gptq", "measure": "validation", "tokens": 250, "seen": 2000}


def test_codes_and_scales_are_stored_as_they_were_solved(plant: Plant, gaussian: Weights) -> None:
    """Stored at its scales, a matrix decodes to its values bit by bit; by the plain rule some groups would not."""
    shipped = alone(gaussian(5, rows=400), plant("alike", 500, layer=True).evidence)
    packed = torch.empty(400, 16, dtype=torch.int32)
    parts = {"weight_packed": packed.numpy(), "weight_scale": bits_of(torch.empty_like(shipped.scales))}
    FORMATS["int4"]().store(bits_of(shipped.values), bits_of(shipped.scales), parts, codecs("cpu"))
    assert torch.equal(int4_to_bf16(packed, shipped.scales), shipped.values)
    assert shipped.facts["short"] > 0


def test_native_int4_stays_what_it_is(plant: Plant, gaussian: Weights) -> None:
    """Weights that lie on their grid come back, with their own scales, beside a matrix that is solved."""
    packed, scales = bf16_to_int4(gaussian(6))
    native = int4_to_bf16(packed, scales)
    evidence = plant("uneven", 1000, layer=False).evidence
    found = settle({"gate_proj": native, "up_proj": gaussian(7)}, evidence, Settings())
    assert torch.equal(found["gate_proj"].values, native)
    assert torch.equal(found["gate_proj"].scales, scales)
    assert found["gate_proj"].facts["reason"] == "rounding loses nothing"
    assert found["up_proj"].facts["method"] == "gptq"


def test_a_group_on_the_grid_keeps_its_scale(plant: Plant, gaussian: Weights) -> None:
    """Of a matrix that is native in part the search leaves those groups alone."""
    weights = gaussian(8)
    packed, scales = bf16_to_int4(weights)
    weights[:, :32] = int4_to_bf16(packed, scales)[:, :32]
    shipped = alone(weights, plant("uneven", 1000, layer=False).evidence)
    assert torch.equal(shipped.scales[:, 0], scales[:, 0])
    assert not torch.equal(shipped.scales[:, 1], scales[:, 1])


@pytest.mark.parametrize("scales", ["rtn", "mse"])
def test_other_scales(plant: Plant, gaussian: Weights, scales: Scales) -> None:
    """The scales that a matrix is solved at are those that were asked for."""
    shipped = alone(weights := gaussian(9), plant("uneven", 1000, layer=False).evidence, Settings(scales=scales))
    way = ways.plain(weights, 4) if scales == "rtn" else ways.searched(weights, None, "mse", 4)
    assert shipped.facts["method"] == "gptq"
    assert torch.equal(shipped.scales, way.scales)


@pytest.mark.parametrize("bits", [3, 2])
def test_narrow_codes(plant: Plant, gaussian: Weights, bits: int) -> None:
    """Three and two bits are solved with codes that they have."""
    shipped = alone(gaussian(10), plant("alike", 1000, layer=True).evidence, Settings(bits=bits))
    codes = (shipped.values.float() / shipped.scales.float().repeat_interleave(32, 1)).round()
    assert shipped.facts["method"] == "gptq"
    assert codes.abs().max() == 2 ** (bits - 1) - 1


def test_columns_without_input_keep_their_rounded_weights(plant: Plant, gaussian: Weights) -> None:
    """A column that is always 0 is neither zeroed nor moved: its weights are those at the searched scales."""
    evidence, weights = plant("uneven", 1000, layer=False).evidence, gaussian(11)
    dead = torch.tensor([0, 5, 77, 127])
    alive = torch.ones(128)
    alive[dead] = 0
    known = replace(evidence, hessian=evidence.hessian * alive * alive[:, None], mean=evidence.mean * alive)
    shipped = alone(weights, known)
    assert shipped.facts["method"] == "gptq"
    at_scales = ways.searched(weights, believed(known), "imatrix", 4).values
    assert torch.equal(shipped.values[:, dead], at_scales[:, dead])
    assert shipped.values[:, dead].any()


def _nothing(hessian: Tensor) -> Tensor:
    return hessian * 0


def _not_a_number(hessian: Tensor) -> Tensor:
    broken = hessian.clone()
    broken[3, 3] = torch.nan
    return broken


def _endless(hessian: Tensor) -> Tensor:
    broken = hessian.clone()
    broken[9, 2] = broken[2, 9] = torch.inf
    return broken


def _indefinite(hessian: Tensor) -> Tensor:
    broken = hessian.clone()
    broken[4, 7] = broken[7, 4] = 50 * hessian.diagonal().max()
    return broken


@pytest.mark.parametrize("held", [0, 8, 1000])
@pytest.mark.parametrize(
    ("spoil", "method", "reason"),
    [
        (_nothing, "mse", "the Hessian is zero or not finite"),
        (_not_a_number, "mse", "the Hessian is zero or not finite"),
        (_endless, "imatrix", "the Hessian is not positive definite"),
        (_indefinite, "imatrix", "the Hessian is not positive definite"),
    ],
)
def test_a_broken_hessian_ends_in_searched_scales(
    plant: Plant, gaussian: Weights, spoil: Callable[[Tensor], Tensor], method: str, reason: str, held: int
) -> None:
    """It is no error and costs no weight: the matrix ships searched, by moments if these are sound, and says why."""
    evidence, weights = plant("uneven", 8000, layer=False).evidence, gaussian(12)
    few = {"held": evidence.held[:held], "held_weights": evidence.held_weights[:held]}
    shipped = alone(weights, replace(evidence, hessian=spoil(evidence.hessian), **few))
    assert (shipped.facts["method"], shipped.facts["reason"]) == (method, reason)
    assert shipped.values.isfinite().all()
    assert 0 < shipped.facts["relative"] < 1


@settings(deadline=None)
@given(seed=st.integers(0, 2**32), held=st.integers(64, 200), rank=st.integers(1, 128))
def test_nothing_ships_that_held_out_tokens_find_worse_than_rounding(seed: int, held: int, rank: int) -> None:
    """Whatever was seen in training: on held-out tokens of another kind no matrix loses more than rounded."""
    dice = torch.Generator().manual_seed(seed)
    weights = torch.randn(4, 128, generator=dice).bfloat16()
    train = torch.randn(40, 128, generator=dice) @ torch.randn(128, 128, generator=dice)
    other = (torch.randn(held, rank, generator=dice) @ torch.randn(rank, 128, generator=dice)).bfloat16()
    evidence = Evidence(
        hessian=train.T @ train / 40,
        mean=train.mean(0),
        weight=40.0,
        tokens=40,
        prior=None,
        held=other,
        held_weights=torch.rand(held, generator=dice),
    )
    shipped = alone(weights, evidence)
    lost = [
        output_error(weights, each, other, evidence.held_weights)
        for each in (shipped.values, ways.plain(weights, 4).values)
    ]
    assert lost[0] <= lost[1] * (1 + 1e-6)
    assert (shipped.facts["method"] == "gptq") == ("reason" not in shipped.facts)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_held_out_tokens_that_are_not_finite_judge_for_rounding(plant: Plant, gaussian: Weights, value: float) -> None:
    """What cannot be compared does not ship."""
    evidence = plant("alike", 1000, layer=True).evidence
    held = evidence.held.clone()
    held[3, 50] = value
    shipped = alone(weights := gaussian(13, rows=1), replace(evidence, held=held))
    assert (shipped.facts["method"], shipped.facts["relative"]) == ("rtn", 1)
    assert shipped.facts["reason"] == "errors on held-out data are not finite"
    assert torch.equal(shipped.values, ways.plain(weights, 4).values)


@pytest.mark.parametrize(
    "asked", [{"scales": "awq"}, {"damping": 0.0}, {"damping": float("nan")}, {"damping": -1.0}, {"bits": 8}]
)
def test_settings_without_a_meaning_are_refused(asked: dict[str, Any]) -> None:
    """Each is named when settings are made."""
    with pytest.raises(UsageError, match=next(iter(asked))):
        Settings(**asked)


def test_settings_as_they_are_written() -> None:
    """The defaults, as a report has them."""
    assert Settings().as_json() == {"scales": "imatrix", "damping": 0.1, "propagate": True, "bits": 4}
