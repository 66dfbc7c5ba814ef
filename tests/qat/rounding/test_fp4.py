"""Training for FP4: a scale of whole matrices that what engines fuse has in common, and codes that are clamped."""

from __future__ import annotations

import copy
from importlib import import_module
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from k2quant.errors import BadValue, UsageError
from k2quant.formats.dtypes import as_bits
from k2quant.formats.format import Layout
from k2quant.formats.known import FORMATS
from k2quant.formats.transcode import Scratch
from k2quant.kernels.codecs.choice import codecs
from k2quant.kernels.codecs.values import ValueAt
from k2quant.model.modules import SeparateExperts
from k2quant.qat import Adapter, QATConfig, fake_quantize, prepare, prepared
from k2quant.qat.rounding import estimators as rounding
from k2quant.qat.rounding.estimators import largest_of
from tiny import DEEPSEEK

TRANSFORMERS: Any = import_module("transformers")  # its types are not for us

EXPERTS = "model.layers.1.mlp.experts"
IDS = torch.tensor([[1, 7, 30, 2, 5, 63, 9, 11], [3, 4, 8, 60, 21, 22, 23, 24]])
RULES: list[dict[str, Any]] = [
    {"to": "nvfp4"},
    {"to": "nvfp4", "layout": "compressed-tensors"},
    {"to": "mxfp4"},
]


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Return numbers of a size that weights have."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02


def converted(weights: Tensor, to: str, layout: Layout | None = None) -> Tensor:
    """Return BF16 `[R, K]` as a converter stores it and reads it back."""
    arithmetic, bits, scratch = codecs("cpu"), as_bits(weights), Scratch()
    asked = FORMATS[to].asked_for(layout=layout)
    target = asked.settled([asked.survey(bits, arithmetic)])
    state = target.state((bits.shape[0], bits.shape[1]))
    parts = {suffix: scratch.take(suffix, spec) for suffix, spec in state.items()}
    target.encode(bits, parts, arithmetic)
    out = torch.empty_like(weights)
    target.decode(parts, as_bits(out), arithmetic)
    return out


# --- the forward pass: bits -------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), exponent=st.integers(-36, 36), rule=st.sampled_from(RULES))
def test_values_are_what_a_conversion_decodes(seed: int, exponent: int, rule: dict[str, Any]) -> None:
    """A matrix has the bits of the converter's codec and back, whatever its magnitude and the layout of its export."""
    weights = (torch.randn(5, 96, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent).bfloat16()
    seen = fake_quantize(weights, **rule)
    assert torch.equal(seen, converted(weights, **rule))


@pytest.mark.parametrize("rule", RULES)
def test_zeros_stay_zeros(rule: dict[str, Any]) -> None:
    """A matrix of zeros, and blocks of zeros beside others, mean zeros in every layout."""
    assert not fake_quantize(torch.zeros(3, 64), **rule).any()
    weights = noise(3, 64)
    weights[1, 32:] = 0
    assert not fake_quantize(weights, **rule)[1, 32:].any()


@pytest.mark.parametrize("rule", RULES[:2])
def test_a_scale_may_be_shared(rule: dict[str, Any]) -> None:
    """With the largest weight of both, two matrices have the bits that they have as one below the other."""
    weights = noise(2, 8, 64)
    weights[1] *= 3
    both, alone = fake_quantize(weights.view(16, 64), **rule).view(2, 8, 64), fake_quantize(weights, **rule)
    largest = weights.bfloat16().abs().amax().float()
    assert torch.equal(fake_quantize(weights, **rule, largest=largest), both)
    assert torch.equal(fake_quantize(weights[0], **rule, largest=largest), both[0])
    assert not torch.equal(alone[0], both[0])
    own = largest_of(weights, 2)
    assert torch.equal(fake_quantize(weights, **rule, largest=own), alone)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"to": "mxfp4", "largest": torch.tensor(1.0)}, "no scale of a whole matrix"),
        ({"largest": torch.tensor([1.0, 1.0])}, "one for each matrix"),
        ({"largest": torch.tensor(1e-9)}, "no weight exceeds"),
        ({"largest": torch.tensor(float("inf"))}, "no weight exceeds"),
        ({"bits": 3}, "leave them out for nvfp4"),
        ({"grid": "compressed-tensors"}, "leave them out for nvfp4"),
        ({"estimator": "learned"}, "only `plain` or `clipped` has a meaning"),
        ({"layout": "deepseek"}, "layout: expected modelopt or compressed-tensors"),
        ({"to": "mxfp4", "layout": "modelopt"}, "layout: expected compressed-tensors"),
        ({"to": "int4", "layout": "modelopt"}, "int4 has one"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], why: str) -> None:
    """FP4 has one width and no grid; the largest magnitude is at least that of the weights."""
    with pytest.raises(UsageError, match=why):
        fake_quantize(noise(2, 64), **{"to": "nvfp4", **options})


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_clipped_stops_the_gradient_beyond_six_times_the_scale(
    rule: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients pass where |w| is at most 6 times what a code is multiplied with, and nowhere else; pieces or not.

    A value of magnitude 6 S tells S: a block's largest weight gets the code 6, or 4.
    """
    weights = noise(2, 64, 96, seed=3).requires_grad_()
    pull = noise(2, 64, 96, seed=4)
    values = fake_quantize(weights, **rule, estimator="clipped")
    (found,) = torch.autograd.grad(values, weights, pull)
    assert torch.equal(values, fake_quantize(weights.detach(), **rule))
    stopped = found == 0
    block = 32 if rule["to"] == "mxfp4" else 16
    top = (
        values.detach().abs().view(2, 64, -1, block).amax(-1, keepdim=True).expand(-1, -1, -1, block).reshape(2, 64, 96)
    )
    assert 0.002 < float(stopped.float().mean()) < 0.1
    assert torch.equal(values.detach().abs()[stopped], top[stopped])  # they have the largest code
    assert (weights.detach().bfloat16().float().abs() * 1.001 > values.detach().abs())[stopped].all()  # and lost
    assert torch.equal(found[~stopped], pull[~stopped])
    monkeypatch.setattr(rounding, "PIECE", 96 * 5)
    (again,) = torch.autograd.grad(fake_quantize(weights, **rule, estimator="clipped"), weights, pull)
    assert torch.equal(again, found)


# --- models -----------------------------------------------------------------------------------------------------------


def build() -> Any:
    """Return a tiny DeepSeek-V3, always the same."""
    torch.manual_seed(0)
    model = TRANSFORMERS.DeepseekV3ForCausalLM(TRANSFORMERS.DeepseekV3Config(**DEEPSEEK))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.08)
    return model


def separate(model: Any) -> Any:
    """Put experts that are linears, one by one, in the place of the fused ones."""
    fused, experts = model.model.layers[1].mlp.experts, SeparateExperts(model.config)
    with torch.no_grad():
        for expert in range(4):
            gate, up = fused.gate_up_proj[expert].chunk(2)
            for own, value in (("gate_proj", gate), ("up_proj", up), ("down_proj", fused.down_proj[expert])):
                experts.get_parameter(f"{expert}.{own}.weight").copy_(value)
    model.model.layers[1].mlp.experts = experts
    return model


def seen(model: Any, name: str) -> Tensor:
    """Return what a prepared model's forward pass sees of a parameter."""
    found = prepared(model)
    target = next(target for target in found.targets if target.name == name)
    out = torch.empty_like(target.master)
    with torch.no_grad():
        found.fill(target, out)
    return out


def logits(model: Any) -> Tensor:
    """Return the logits."""
    with torch.no_grad():
        found: Tensor = model(IDS, use_cache=False).logits
    return found


CONFIGS = {
    "modelopt": QATConfig(to="nvfp4"),
    "compressed-tensors": QATConfig(to="nvfp4", layout="compressed-tensors"),
    "linear": QATConfig(to="nvfp4", scope="linear"),
    "adapters": QATConfig(to="nvfp4", train="adapters", adapter=Adapter(rank=4, alpha=8)),
}


@pytest.mark.parametrize("name", ["modelopt", "compressed-tensors"])
def test_gate_and_up_of_an_expert_share_a_scale(name: str) -> None:
    """Fused experts and experts that are linears have the same bits: those of both matrices rounded as one."""
    fused, lone = prepare(build(), CONFIGS[name]), prepare(separate(build()), CONFIGS[name])
    rule: dict[str, Any] = {"to": "nvfp4", "layout": CONFIGS[name].layout}
    for expert in range(4):
        master = fused.get_parameter(f"{EXPERTS}.gate_up_proj").detach()[expert]
        expected = fake_quantize(master, **rule)
        assert torch.equal(seen(fused, f"{EXPERTS}.gate_up_proj")[expert], expected)
        halves = [seen(lone, f"{EXPERTS}.{expert}.{own}_proj.weight") for own in ("gate", "up")]
        assert torch.equal(torch.cat(halves), expected)
        down = fake_quantize(fused.get_parameter(f"{EXPERTS}.down_proj").detach()[expert], **rule)
        assert torch.equal(seen(fused, f"{EXPERTS}.down_proj")[expert], down)
        assert torch.equal(seen(lone, f"{EXPERTS}.{expert}.down_proj.weight"), down)


def test_what_engines_fuse_beyond_experts_shares_too() -> None:
    """With the scope `linear`, q_a and kv_a are rounded as one matrix, and so are gate and up of a dense MLP."""
    model = prepare(build(), CONFIGS["linear"])
    for place, names in (("self_attn", ("q_a_proj", "kv_a_proj_with_mqa")), ("mlp", ("gate_proj", "up_proj"))):
        weights = [f"model.layers.0.{place}.{name}.weight" for name in names]
        masters = torch.cat([model.get_parameter(name).detach() for name in weights])
        assert torch.equal(torch.cat([seen(model, name) for name in weights]), fake_quantize(masters, to="nvfp4"))
    alone = "model.layers.0.self_attn.o_proj.weight"
    assert torch.equal(seen(model, alone), fake_quantize(model.get_parameter(alone).detach(), to="nvfp4"))


@pytest.mark.parametrize("name", ["modelopt", "adapters"])
def test_a_partner_that_moves_is_noticed(name: str) -> None:
    """When up's largest weight grows, gate is rounded anew, also where it was rounded before and kept."""
    model = prepare(separate(build()), CONFIGS[name])
    gate, up = (f"{EXPERTS}.1.{own}_proj.weight" for own in ("gate", "up"))
    logits(model)
    target = next(target for target in prepared(model).targets if target.name == gate)
    kept = prepared(model).kept(target)
    assert kept is not None
    before = kept.clone()
    with torch.no_grad():
        if name == "adapters":
            model.get_parameter(f"{EXPERTS}.1.up_proj.adapter.weight.b").fill_(0.5)
        else:
            model.get_parameter(up)[3, 5] = 2.0
    assert prepared(model).kept(target) is None
    logits(model)
    after = prepared(model).kept(target)
    assert after is not None
    assert torch.equal(after, seen(model, gate))
    assert not torch.equal(after, before)


def test_a_copy_shares_within_itself() -> None:
    """A copied model looks at its own partners, not at those that it was copied from."""
    model = prepare(separate(build()), CONFIGS["modelopt"])
    twin = copy.deepcopy(model)
    gate, up = (f"{EXPERTS}.1.{own}_proj.weight" for own in ("gate", "up"))
    before = seen(model, gate)
    with torch.no_grad():
        twin.get_parameter(up)[3, 5] = 2.0
    assert torch.equal(seen(model, gate), before)
    assert not torch.equal(seen(twin, gate), before)


@pytest.mark.parametrize("name", ["modelopt", "adapters"])
def test_a_partner_in_shards_is_gathered(name: str) -> None:
    """Of up, which lies in shards of its own, all rows count, not those of this process; of its update, too."""

    class DTensor(Tensor):  # shards are known by this name
        rest: Tensor

        def full_tensor(self) -> Tensor:
            return torch.cat([self.as_subclass(Tensor), self.rest.as_subclass(Tensor)])

        def detach(self) -> DTensor:
            return self

    def in_shards(parameters: dict[str, Any], own: str) -> None:
        first, rest = parameters[own].detach().chunk(2)
        parameters[own] = first.as_subclass(DTensor)
        parameters[own].rest = rest

    model = prepare(separate(build()), CONFIGS[name])
    gate: Any = model.get_submodule(f"{EXPERTS}.1.gate_proj")
    up: Any = model.get_submodule(f"{EXPERTS}.1.up_proj")
    with torch.no_grad():
        if name == "adapters":
            up.adapter.weight.b[-1] = 1.0
        else:
            up.weight[-1, 5] = 2.0
    expected = seen(model, f"{EXPERTS}.1.gate_proj.weight")
    in_shards(up._parameters, "weight")  # noqa: SLF001  as `fully_shard` exchanges them
    if name == "adapters":
        for own in "ab":
            in_shards(up.adapter.weight._parameters, own)  # noqa: SLF001
    assert torch.equal(seen(model, f"{EXPERTS}.1.gate_proj.weight"), expected)
    assert not torch.equal(expected, fake_quantize(gate.weight.detach(), to="nvfp4"))


def test_a_bad_partner_is_named() -> None:
    """NaN in up stops gate, and the message says whose it is."""
    model = prepare(separate(build()), CONFIGS["modelopt"])
    with torch.no_grad():
        model.get_parameter(f"{EXPERTS}.1.up_proj.weight")[3, 5] = torch.nan
    with pytest.raises(BadValue, match=r"experts\.1\.up_proj.*row 3, column 5"):
        seen(model, f"{EXPERTS}.1.gate_proj.weight")
    stack = noise(2, 4, 64)
    stack[1, 2, 7] = torch.inf
    with pytest.raises(ValueAt, match="row 6, column 7"):
        fake_quantize(stack, to="nvfp4")
