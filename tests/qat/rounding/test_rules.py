"""The rule of one matrix, and learned scales as ratios to the ones that training began with."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from k2quant.errors import UsageError
from k2quant.formats.bf16 import Bf16
from k2quant.formats.fp8 import Fp8
from k2quant.formats.int4 import Int4
from k2quant.kernels.codecs import reference
from k2quant.qat.rounding import estimators, scales
from k2quant.qat.rounding.rules import ROUNDED, Rule, as_bf16, check_packed
from k2quant.qat.rounding.scales import LearnedScale
from k2quant.qat.rounding.targets import Target


@pytest.mark.parametrize("bits", [8, 5, 1, 0])
def test_codes_that_no_nibble_holds_are_not_stored(bits: int) -> None:
    """Eight bits train and have no place in a checkpoint; four, three and two have one."""
    with pytest.raises(UsageError, match=f"{bits}-bit codes have no place"):
        check_packed(bits)
    with pytest.raises(UsageError, match="no place"):
        Rule(Int4(), bits).stored(torch.ones(1, 32).bfloat16())
    for width in (4, 3, 2):
        check_packed(width)


def test_formats_without_a_choice_of_widths_are_stored_whatever_the_bits_say() -> None:
    """BF16 has 16 of them, and is what it is."""
    weights = torch.randn(2, 32).bfloat16()
    assert (ROUNDED.bits, ROUNDED.format, ROUNDED.height) == (16, Bf16(), 1)
    assert ROUNDED.values(weights) is weights
    assert ROUNDED.stored(weights) == {"weight": weights}
    assert set(Rule(Fp8(), 8).stored(weights)) == {"weight", "weight_scale_inv"}
    assert Rule(Fp8(), 8).height == 128


def test_what_is_stored_means_what_the_forward_pass_sees() -> None:
    """Words and scales of INT4, decoded, are the values; no scale is recovered on either side."""
    weights = (torch.randn(4, 64) * 0.02).bfloat16()
    rule = Rule(Int4(), 3)
    stored = rule.stored(weights)
    decoded = reference.int4_to_bf16(stored["weight_packed"], stored["weight_scale"].float(), 32)
    assert torch.equal(decoded, rule.values(weights))


def test_masters_are_rounded_half_to_even() -> None:
    """And BF16 ones are themselves."""
    assert as_bf16(torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8])).tolist() == [1.0, 1 + 2.0**-6]
    master = torch.ones(3).bfloat16()
    assert as_bf16(master) is master


@pytest.mark.parametrize("shape", [(3, 64), (2, 3, 96)])
def test_scales_begin_with_those_of_plain_rounding(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """One for each 32 columns, ratios of one, and the same when worked on in pieces."""
    monkeypatch.setattr(estimators, "PIECE", 64)
    master = torch.randn(shape)
    found = LearnedScale(master, 4)
    expected = reference.plain_int4_scale(as_bf16(master.reshape(-1, shape[-1])), "moonshot", 4)
    assert found.start.shape == found.ratio.shape == (*shape[:-1], shape[-1] // 32)
    assert torch.equal(found.start.reshape(expected.shape), expected)
    assert torch.equal(found.ratio, torch.ones_like(found.ratio))
    assert found.ratio.requires_grad
    assert torch.equal(found.scale(), found.start.float())


def test_scales_begin_anew_at_another_width() -> None:
    """From other weights and for other codes, with ratios of one again."""
    found = LearnedScale(torch.randn(2, 64), 4)
    with torch.no_grad():
        found.ratio.mul_(3)
    master = torch.randn(2, 64)
    found.restart(master, 3)
    assert torch.equal(found.start, reference.plain_int4_scale(as_bf16(master), "moonshot", 3))
    assert torch.equal(found.ratio, torch.ones(2, 2))
    assert found.ratio.requires_grad


def test_a_plan_has_scales_without_weights() -> None:
    """On the meta device there is a shape and nothing to begin with."""
    found = LearnedScale(torch.empty(2, 64, device="meta"), 4)
    assert found.ratio.is_meta
    assert found.start.shape == (2, 2)


def test_a_scale_is_its_start_times_the_ratio_and_never_vanishes() -> None:
    """No ratio is below 2^-8; a product that BF16 cannot hold is 2^-7, as a zero block has it."""
    found = LearnedScale(torch.ones(1, 128), 4)
    with torch.no_grad():
        found.start.copy_(torch.tensor([[1.0, 1.0, 1.0, 2.0**-133]]))
        found.ratio.copy_(torch.tensor([[1.5, 2.0**-9, -1.0, 0.25]]))
    assert found.scale().tolist() == [[1.5, 2.0**-8, 2.0**-8, 2.0**-7]]
    assert scales.CHILD == "learned_scale"
    found.scale().sum().backward()
    assert found.ratio.grad is not None
    assert found.ratio.grad.tolist()[0][0] == 1.0


def test_a_target_has_the_scales_that_stand_beside_its_parameter() -> None:
    """By the parameter's name; without the child, without that name, or with something else there, it has none."""
    module = nn.Module()
    module.register_parameter("weight", nn.Parameter(torch.ones(2, 32)))
    target = Target(name="layer.weight", module=module, parameter="weight", parts=())
    assert scales.learned_scale(target) is None
    found = LearnedScale(torch.ones(2, 32), 4)
    module.add_module(scales.CHILD, nn.ModuleDict({"other": found}))
    assert scales.learned_scale(target) is None
    module.add_module(scales.CHILD, nn.ModuleDict({"weight": nn.Identity()}))
    assert scales.learned_scale(target) is None
    module.add_module(scales.CHILD, nn.ModuleDict({"weight": found}))
    assert scales.learned_scale(target) is found
