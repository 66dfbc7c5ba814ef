"""A prepared model: what its forward pass sees, whatever runs it, and when what it sees is made anew."""

from __future__ import annotations

import copy
import dataclasses
import gc
import io
import threading
import weakref
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from k2quant import qat
from k2quant.errors import BadValue, K2QuantError, ShapeMismatch, UnsupportedFormat, UsageError
from k2quant.kernels.codecs import reference
from k2quant.model import load_model
from k2quant.model.modules import SeparateExperts
from k2quant.qat import Adapter, QATConfig, prepare
from k2quant.qat import preparing as prepared_module
from k2quant.qat.exporting.export import plan_export
from k2quant.qat.job import Method
from k2quant.qat.job import Optimizer as OptimizerSettings
from k2quant.qat.preparing import Prepared, prepared
from k2quant.qat.rounding.autocast import keep_out_of_autocast
from k2quant.qat.rounding.estimators import fake_quantize, fake_quantize_learned
from k2quant.qat.rounding.scales import LearnedScale
from k2quant.qat.rounding.survey import coverage
from k2quant.qat.training.fallback import restore
from k2quant.qat.training.optimizers import Optimizers
from tiny import DEEPSEEK

TRANSFORMERS: Any = import_module("transformers")  # its types are not for us

IDS = torch.tensor([[1, 7, 30, 2, 5, 63, 9, 11], [3, 4, 8, 60, 21, 22, 23, 24]])
EXPERTS = "model.layers.1.mlp.experts"


@pytest.fixture(autouse=True)
def _one_order_of_sums() -> Iterator[None]:
    """Compare bits of gradients: `batched_mm` sums them in the order of whichever thread comes first, unless told."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def build(**options: Any) -> Any:
    """Return a tiny DeepSeek-V3 of float32 weights that are no BF16 numbers, always the same."""
    torch.manual_seed(0)
    model = TRANSFORMERS.DeepseekV3ForCausalLM(TRANSFORMERS.DeepseekV3Config(**DEEPSEEK | options))
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.08)
    return model


def save(folder: Path) -> Path:
    """Write the tiny model, rounded to BF16, as a checkpoint."""
    build().to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a checkpoint in BF16."""
    return save(tmp_path_factory.mktemp("base") / "model")


def outcome(model: Any, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the logits, and the gradients of the loss by name."""
    model.zero_grad()
    found = model(IDS, labels=IDS, use_cache=False, **options)
    found.loss.backward()
    return found.logits.detach(), {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }


def in_bf16(model: Any) -> Any:
    """Round the parameters, and nothing else, to BF16 numbers."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    return model


def logits(model: Any) -> Tensor:
    """Return the logits."""
    with torch.no_grad():
        found: Tensor = model(IDS, use_cache=False).logits
    return found


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Tell whether two dicts hold the same names and bits."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def baked(model: Any) -> Any:
    """Return a copy whose parameters are what a prepared model's forward pass sees."""
    found, twin = prepared(model), copy.deepcopy(model)
    with torch.no_grad():
        for target in found.targets + found.plain:
            found.fill(target, twin.get_parameter(target.name))
    prepared(twin).remove()
    return twin


CONFIGS = {
    "int4": QATConfig(),
    "compressed-tensors": QATConfig(grid="compressed-tensors"),
    "8 bits": QATConfig(bits=8),
    "2 bits": QATConfig(bits=2),
    "linear": QATConfig(scope="linear"),
    "fp8": QATConfig(to="fp8"),
    "clipped": QATConfig(estimator="clipped"),
    "learned": QATConfig(estimator="learned"),
    "adapters": QATConfig(train="adapters", adapter=Adapter(rank=4, alpha=8)),
    "fp8 adapters": QATConfig(to="fp8", train="adapters"),
    "experts": QATConfig(train="experts"),
    "router": QATConfig(train_router=True),
}


def moved(model: Any) -> Any:
    """Move everything that trains a little, so that nothing is where it began."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype), alpha=0.01)
    return model


# --- what is touched --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_stay_what_and_where_they_were(name: str) -> None:
    """Names, objects and values of the model's own parameters survive; what is added lies beside the experts."""
    model = build()
    before, state = dict(model.named_parameters()), {key: value.clone() for key, value in model.state_dict().items()}
    prepare(model, CONFIGS[name])
    outcome(model)
    after = dict(model.named_parameters())
    added = after.keys() - before.keys()
    assert all(after[key] is parameter for key, parameter in before.items())
    assert same({key: model.state_dict()[key] for key in state}, state)
    wanted = {"learned": "learned_scale", "adapters": "adapter", "fp8 adapters": "adapter"}.get(name)
    assert all(wanted is not None and f".{wanted}." in key for key in added)
    assert bool(added) == (wanted is not None)


def trains(config: QATConfig) -> set[str]:
    """Return the names that have a gradient asked for."""
    return {name for name, parameter in prepare(build(), config).named_parameters() if parameter.requires_grad}


def test_what_trains_is_what_was_asked_for() -> None:
    """`all` leaves the router out unless told; `experts` is what is fake-quantised; `adapters` are alone."""
    everything = {name for name, _ in build().named_parameters()}
    router, stacks = "model.layers.1.mlp.gate.weight", {f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj"}
    assert trains(QATConfig()) == everything - {router}
    assert trains(QATConfig(train_router=True)) == everything
    assert trains(QATConfig(train="experts")) == stacks
    linear = trains(QATConfig(train="experts", scope="linear"))
    assert stacks < linear < everything - {router}
    assert "model.layers.0.self_attn.q_a_proj.weight" in linear
    kv_b = {f"model.layers.{layer}.self_attn.kv_b_proj.weight" for layer in range(2)}
    assert not kv_b & linear  # INT4 that MLA engines could not absorb
    assert trains(QATConfig(train="experts", scope="projections")) == linear | kv_b
    assert kv_b < trains(QATConfig(train="experts", to="fp8"))
    names = [f"{EXPERTS}.adapter.{stack}.{part}" for stack in ("gate_up_proj", "down_proj") for part in "ab"]
    assert trains(QATConfig(train="adapters")) == set(names)
    scales = {f"{EXPERTS}.learned_scale.{stack}.ratio" for stack in ("gate_up_proj", "down_proj")}
    assert trains(QATConfig(train="experts", estimator="learned")) == stacks | scales


def test_coverage_counts_weights() -> None:
    """The table says how much of each class is fake-quantised; nothing that was added is counted."""
    for config in (QATConfig(), QATConfig(estimator="learned")):
        model = prepare(build(), config)
        table = coverage(model, prepared(model).targets)
        assert table["routed experts"] == (4 * 3 * 64 * 32, 4 * 3 * 64 * 32)
        assert table["router"] == (0, 4 * 64)
        assert table["attention"][0] == 0


# --- what the forward pass sees ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_the_forward_pass_is_that_of_the_rounded_weights(name: str) -> None:
    """Logits are, bit for bit, those of a model that has the rounded values for parameters."""
    model = moved(prepare(build(), CONFIGS[name]))
    twin = baked(model)
    assert torch.equal(logits(model), logits(twin))
    assert not torch.equal(logits(model), logits(moved(build())))


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", ["int4", "fp8", "linear"])
def test_every_implementation_of_experts_sees_the_same(implementation: str, name: str) -> None:
    """Values and gradients are those of the rounded model under the same implementation, bit for bit."""
    model = build()
    model.set_experts_implementation(implementation)
    prepare(model, CONFIGS[name])
    twin = baked(model)
    seen, gradients = outcome(model)
    expected, theirs = outcome(twin)
    assert torch.equal(seen, expected)
    assert same(gradients, {name: theirs[name] for name in gradients})
    assert f"{EXPERTS}.down_proj" in gradients


def test_the_values_are_those_of_the_functions() -> None:
    """Each matrix of a stack is rounded as `fake_quantize` rounds it alone, FP8 with its small heights included."""
    for config in (QATConfig(), QATConfig(to="fp8"), QATConfig(grid="compressed-tensors")):
        model = prepare(build(), config)
        twin = baked(model)
        for expert in range(4):
            for own, rows in (
                ("gate_up_proj", slice(0, 32)),
                ("gate_up_proj", slice(32, 64)),
                ("down_proj", slice(64)),
            ):
                master = model.get_parameter(f"{EXPERTS}.{own}")[expert, rows]
                seen = twin.get_parameter(f"{EXPERTS}.{own}")[expert, rows]
                assert torch.equal(seen, fake_quantize(master, to=config.to, grid=config.grid))
        head = model.get_parameter("lm_head.weight")
        assert torch.equal(twin.lm_head.weight, head.bfloat16().float())


def test_our_own_model_sees_the_same(base: Path) -> None:
    """A model from `qat.load` runs on rounded values as transformers' own does, with and without gradients."""
    model = moved(prepare(qat.load(base)))
    twin = baked(model)
    assert torch.equal(logits(model), logits(twin))
    seen, gradients = outcome(model)
    expected, theirs = outcome(twin)
    assert torch.equal(seen, expected)
    assert same(gradients, {name: theirs[name] for name in gradients})


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


@pytest.mark.parametrize("name", ["int4", "fp8", "learned", "adapters"])
def test_experts_may_be_linears(name: str) -> None:
    """A model whose experts are linears is rounded to the values of the fused one."""
    model = moved(prepare(separate(build()), CONFIGS[name]))
    assert torch.equal(logits(model), logits(baked(model)))
    fused = baked(prepare(build(), CONFIGS[name]))
    lone = baked(prepare(separate(build()), CONFIGS[name]))
    assert torch.equal(
        lone.get_parameter(f"{EXPERTS}.2.up_proj.weight"), fused.get_parameter(f"{EXPERTS}.gate_up_proj")[2, 32:]
    )


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["int4", "clipped", "learned", "adapters"])
def test_gradient_checkpointing_changes_no_gradient(name: str, reentrant: bool) -> None:  # noqa: FBT001  a parameter of the test
    """Layers that run again in the backward pass see the same values: gradients are equal to the bit."""
    plain = moved(prepare(build(), CONFIGS[name])).train()
    again = moved(prepare(build(), CONFIGS[name])).train()
    again.gradient_checkpointing_enable({"use_reentrant": reentrant})
    again.enable_input_require_grads()
    expected, found = outcome(plain), outcome(again)
    assert torch.equal(expected[0], found[0])
    assert same(expected[1], found[1])
    assert expected[1]


@pytest.mark.parametrize("name", ["int4", "fp8", "clipped", "learned", "adapters"])
def test_autocast_to_bf16_sees_the_values_that_are_served(name: str) -> None:
    """Under autocast the rounded values come in BF16, which holds each exactly; gradients stay float32."""
    model = moved(prepare(build(), CONFIGS[name]))
    model.set_experts_implementation("eager")  # whose products autocast knows, unlike those of grouped_mm
    twin = baked(model)
    keep_out_of_autocast(twin)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits(model), logits(twin))
        gradients = outcome(model)[1]
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_autocast_to_float16_is_refused() -> None:
    """Float16 cannot hold every value of the grid, so the model does not run in it."""
    model = prepare(build())
    with torch.autocast("cpu", torch.float16), pytest.raises(UsageError, match="float16"):
        model(IDS)
    assert torch.equal(logits(model), logits(baked(model)))


def test_bf16_masters_are_seen_rounded() -> None:
    """A model in BF16 runs on BF16 values."""
    model = prepare(build().to(torch.bfloat16))
    assert torch.equal(logits(model), logits(baked(model)))
    assert {gradient.dtype for gradient in outcome(model)[1].values()} == {torch.bfloat16}


def test_a_frozen_weight_that_is_no_bf16_number_is_seen_rounded() -> None:
    """What the export cannot keep is not run on, trained or not."""
    model = prepare(build(), QATConfig(train="experts"))
    names = {target.name for target in prepared(model).plain}
    assert {"lm_head.weight", "model.layers.1.mlp.gate.weight", "model.norm.weight"} <= names
    assert prepared(prepare(in_bf16(build()), QATConfig(train="experts"))).plain == ()


def test_without_quantisation_weights_are_bf16() -> None:
    """`unquantised` shows the model in BF16, without rounding to the grid; afterwards all is as before."""
    model, bf16 = prepare(build()), in_bf16(build())
    before = logits(model)
    with prepared(model).unquantised():
        assert torch.equal(logits(model), logits(bf16))
    assert torch.equal(logits(model), before)
    with pytest.raises(ZeroDivisionError), prepared(model).unquantised():
        raise ZeroDivisionError
    assert prepared(model).enabled


def test_a_teacher_may_run_between_a_students_passes() -> None:
    """A pass without quantisation between forward and backward changes no gradient."""
    model = prepare(build())
    expected = outcome(model)[1]
    model.zero_grad()
    loss = model(IDS, labels=IDS).loss
    with prepared(model).unquantised():
        logits(model)
    loss.backward()
    assert same({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, expected)


def test_inference_mode_leaves_a_model_that_trains() -> None:
    """Rounded values that were made in inference mode serve in training afterwards."""
    model = prepare(build())
    with torch.inference_mode():
        seen = model(IDS, use_cache=False).logits
    assert torch.equal(outcome(model)[0], seen)
    step(torch.optim.SGD(trained(model), 0.1))
    with torch.inference_mode():
        model(IDS)
    outcome(model)


# --- when values are made anew ----------------------------------------------------------------------------------------


@pytest.fixture
def rounded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of weights that were rounded, in order."""
    calls: list[str] = []
    original = Prepared.fill

    def fill(self: Prepared, target: Any, out: Tensor) -> None:
        calls.append(target.name)
        original(self, target, out)

    monkeypatch.setattr(Prepared, "fill", fill)
    return calls


def trained(model: nn.Module) -> list[nn.Parameter]:
    """Return what trains."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def step(optimizer: torch.optim.Optimizer) -> None:
    """Make a step."""
    optimizer.step()
    optimizer.zero_grad()


def test_weights_are_rounded_once_a_step(rounded: list[str]) -> None:
    """Micro-batches share rounded values; after a step each weight is rounded once more."""
    model = prepare(build())
    optimizer = torch.optim.AdamW(trained(model), 1e-3)
    for number in range(1, 4):
        for _ in range(3):
            model(IDS, labels=IDS).loss.backward()
        assert len(rounded) == len(set(rounded)) * number
        step(optimizer)
    assert {f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj"} <= set(rounded)


def views(model: nn.Module) -> Callable[[], None]:
    """Return a step of Muon, which moves matrices through views of their stacks."""
    settings = OptimizerSettings(method="muon", rate=0.05)
    optimizers = Optimizers(model, prepared(model), settings)
    return lambda: optimizers.step(1.0)


def by(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> Callable[[nn.Module], Callable[[], None]]:
    """Return what makes a model's step."""
    return lambda model: make(trained(model)).step


STEPS: dict[str, Callable[[nn.Module], Callable[[], None]]] = {
    "AdamW": by(lambda p: torch.optim.AdamW(p, 0.05, foreach=False)),
    "AdamW foreach": by(lambda p: torch.optim.AdamW(p, 0.05, foreach=True)),
    "AdamW fused": by(lambda p: torch.optim.AdamW(p, 0.05, fused=True)),
    "SGD": by(lambda p: torch.optim.SGD(p, 5.0)),
    "Muon": views,
}


@pytest.mark.parametrize("method", STEPS)
@pytest.mark.parametrize("name", ["int4", "learned", "adapters"])
def test_after_a_step_values_are_new(method: str, name: str) -> None:
    """Whatever optimizer moves the weights, the next pass sees them."""
    if method == "Muon" and name != "int4":
        return
    model = prepare(build(), CONFIGS[name])
    move = STEPS[method](model)
    before, _ = outcome(model)
    move()
    assert torch.equal(logits(model), logits(baked(model)))
    assert not torch.equal(logits(model), before)


@pytest.mark.parametrize("method", ["adamw", "muon"])
def test_weight_decay_is_for_matrices(method: Method) -> None:
    """A step without gradients takes rate times decay off every matrix, and nothing off norms and learned scales."""
    model = prepare(build(), CONFIGS["learned"])
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in trained(model):
        parameter.grad = torch.zeros_like(parameter)
    settings = OptimizerSettings(method=method, rate=0.5, weight_decay=0.1)
    Optimizers(model, prepared(model), settings).step(1.0)
    scales = {id(part.ratio) for part in model.modules() if isinstance(part, LearnedScale)}
    for name, parameter in model.named_parameters():
        decays = parameter.requires_grad and parameter.ndim > 1 and id(parameter) not in scales
        expected = before[name] * (1 - 0.5 * 0.1) if decays else before[name]
        assert torch.allclose(parameter, expected, rtol=1e-6, atol=0), name


def stack(model: Any) -> nn.Parameter:
    """Return a stack of experts."""
    found: nn.Parameter = model.get_parameter(f"{EXPERTS}.down_proj")
    return found


@torch.no_grad()
def copied(model: Any) -> None:
    """Write one weight in place."""
    stack(model)[3, 5, 7] += 0.5


def copied_through_data(model: Any) -> None:
    """Write a whole weight where no version is counted."""
    stack(model).data.copy_(stack(model).detach() * 1.3)


def exchanged(model: Any) -> None:
    """Give a parameter other memory."""
    stack(model).data = stack(model).detach() * 1.3


def loaded(model: Any) -> None:
    """Load a state."""
    model.load_state_dict({name: tensor * 1.3 for name, tensor in model.state_dict().items()})


def replaced(model: Any) -> None:
    """Put another parameter in its place."""
    model.get_submodule(EXPERTS).down_proj = nn.Parameter(stack(model).detach() * 1.3)


@torch.no_grad()
def refreshed(model: Any) -> None:
    """Write one value where nothing tells, and say so."""
    stack(model).data[3, 5, 7] += 0.5
    prepared(model).refresh()


@pytest.mark.parametrize("change", [copied, copied_through_data, exchanged, loaded, replaced, refreshed])
def test_after_a_change_values_are_new(change: Callable[[Any], None]) -> None:
    """Values are made anew after a write in place, into `.data`, other memory, a loaded state, another parameter."""
    model = prepare(build())
    before = logits(model)
    change(model)
    assert torch.equal(logits(model), logits(baked(model)))
    assert not torch.equal(logits(model), before)


def test_other_widths_are_seen_at_once() -> None:
    """`set_bits` changes what the next pass sees; learned scales begin anew; widths that do not exist are refused."""
    for estimator in ("plain", "learned"):
        model = moved(prepare(build(), QATConfig(bits=8, estimator=estimator)))
        for bits in (4, 3, 2):
            prepared(model).set_bits(bits)
            twin = baked(model)
            assert torch.equal(logits(model), logits(twin))
            expected = fake_quantize(stack(model).detach(), bits=bits)
            assert torch.equal(stack(twin), expected)
        with pytest.raises(UsageError):
            prepared(model).set_bits(5)
    with pytest.raises(UsageError):
        prepared(prepare(build(), QATConfig(to="fp8"))).set_bits(4)


@pytest.mark.parametrize("name", ["int4", "compressed-tensors", "8 bits", "2 bits", "learned", "adapters"])
def test_codes_times_scales_are_the_values(name: str) -> None:
    """`codes` gives the integers behind what the forward pass sees, also of every other row."""
    model = moved(prepare(build(), CONFIGS[name]))
    found, twin = prepared(model), baked(model)
    for target in found.targets:
        seen = twin.get_parameter(target.name).detach()
        values = seen.reshape(-1, seen.shape[-1] // 32, 32)
        codes = found.codes(target, slice(0, None)).view(values.shape).float()
        unit = (values / codes).nan_to_num(0, 0, 0).amax(-1, keepdim=True)
        assert torch.allclose(codes * unit, values, rtol=2**-7, atol=0)
        assert not ((codes == 0) & (values != 0)).any()
        assert torch.equal(found.codes(target, slice(0, None, 3)), found.codes(target, slice(0, None))[::3])
    if name == "compressed-tensors":
        assert min(int(found.codes(target, slice(0, None)).min()) for target in found.targets) == -8


# --- what is refused --------------------------------------------------------------------------------------------------


def test_a_model_without_routed_experts_is_refused() -> None:
    """Nothing to fake-quantise is an error, whoever is to blame: the model, the scope or a pattern."""
    for model, config in (
        (nn.Linear(32, 32), QATConfig()),
        (build(first_k_dense_replace=2), QATConfig()),
        (build(first_k_dense_replace=2), QATConfig(to="fp8")),
        (build(), QATConfig(ignore=("experts",))),
    ):
        with pytest.raises(UsageError, match="no routed expert"):
            prepare(model, config)
        assert not hasattr(model, "k2quant_qat")


def test_a_pattern_may_not_cut_a_stack() -> None:
    """Matrices that lie in one parameter are rounded together; one whole parameter may stay out."""
    for pattern in (r"experts\.3\.", "up_proj"):
        with pytest.raises(UsageError, match="match all or none"):
            prepare(build(), QATConfig(ignore=(pattern,)))
    model = prepare(build(), QATConfig(ignore=(r"experts\.\d+\.down_proj",), allow_split=True))
    twin = baked(model)
    assert torch.equal(logits(model), logits(twin))
    assert torch.equal(stack(twin), stack(model).bfloat16().float())


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (QATConfig(ignore=(r"\.down_proj",)), "one kernel"),
        (QATConfig(scope="linear", ignore=(r"shared_experts\.up_proj",)), "gate_proj and up_proj"),
        (QATConfig(to="fp8", ignore=("q_a_proj",)), "q_a_proj and kv_a_proj_with_mqa"),
    ],
)
def test_what_engines_fuse_is_trained_whole(config: QATConfig, reason: str) -> None:
    """Fused groups split: a policy that fake-quantises a part of one is refused before a step, unless allowed."""
    with pytest.raises(UsageError, match=rf"{reason}.* is .*allow_split"):
        prepare(build(), config)
    assert prepared(prepare(build(), dataclasses.replace(config, allow_split=True))).targets


def test_a_pattern_that_is_found_nowhere_is_refused() -> None:
    """A pattern that matches nothing would train what it was meant to spare."""
    with pytest.raises(UsageError, match=r"ignore: 'q_a_porj' is found in no name; .*q_a_proj"):
        prepare(build(), QATConfig(to="fp8", ignore=("q_a_porj",)))
    assert prepare(build(), QATConfig(ignore=("lm_head", r"layers\.0\.", "norm", r"mlp\.gate$")))


@pytest.mark.parametrize("ignore", ["self_attn$", "experts$", "vision_towr"])
def test_a_pattern_is_looked_for_where_the_export_looks(ignore: str, base: Path) -> None:
    """Names of modules are no names of weights: `self_attn$` passed, and failed after the training as `--ignore`."""
    for model in (qat.load(base), build()):
        with pytest.raises(UsageError, match=r"ignore: .* is found in no name; the nearest names are"):
            prepare(model, QATConfig(ignore=(ignore,)))


def test_a_pattern_of_what_the_model_does_without_is_found(k25: Path) -> None:
    """`vision_tower` is in the checkpoint, though not in the model: a list of a release's config can be taken over."""
    model = qat.load(k25)
    prepare(model, QATConfig(ignore=("vision_tower", "lm_head")))
    assert plan_export(model, model.checkpoint)


def test_packed_weights_are_refused(base: Path, tmp_path: Path) -> None:
    """A model that was loaded to be run says how to load it to be trained."""
    qat.export(prepare(qat.load(base)), tmp_path / "int4")
    with pytest.raises(UsageError, match=r"packed.*k2quant\.qat\.load"):
        prepare(load_model(tmp_path / "int4"))


class Wrapped(nn.Module):
    """What DDP and its like look like from outside."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **options: Any) -> Any:
        """Run what is wrapped."""
        return self.module(*args, **options)


def test_a_model_is_prepared_once() -> None:
    """A second time is refused: of the model, of what wraps it, of what is within."""
    model = prepare(build())
    for again in (model, Wrapped(model), model.get_submodule("model")):
        with pytest.raises(UsageError, match="prepared already"):
            prepare(again)
    assert prepared(Wrapped(Wrapped(model))) is prepared(model)
    with pytest.raises(UsageError, match="not prepared"):
        prepared(build())


def test_a_wrapped_model_may_be_prepared() -> None:
    """Names are understood behind a wrapper's prefix."""
    model = prepare(Wrapped(build()))
    assert len(prepared(model).targets) == 2
    assert torch.equal(logits(model), logits(prepare(build())))


def test_removing_undoes_it() -> None:
    """After `remove` the model runs on its masters, has nothing added, and may be prepared anew, otherwise."""
    model, untouched = build(), logits(build())
    names = set(model.state_dict())
    for name in ("learned", "adapters", "int4", "fp8"):
        prepare(model, CONFIGS[name])
        assert not torch.equal(logits(model), untouched)
        prepared(model).remove()
        assert torch.equal(logits(model), untouched)
        assert set(model.state_dict()) == names
    assert torch.equal(logits(prepare(model)), logits(prepare(build())))


@pytest.mark.parametrize("flag", [{"is_transposed": True}, {"is_concatenated": False}, {"has_gate": False}])
def test_experts_of_another_layout_are_refused(flag: dict[str, bool]) -> None:
    """What transformers marks as transposed, interleaved or without a gate is not rounded along the wrong axis."""
    model = build()
    for name, value in flag.items():
        setattr(model.get_submodule(EXPERTS), name, value)
    with pytest.raises(UnsupportedFormat):
        prepare(model)


def test_widths_that_groups_do_not_divide_are_refused() -> None:
    """An INT4 group of 32 columns has to fit; FP8 takes the same model."""
    with pytest.raises(ShapeMismatch, match="width"):
        prepare(build(moe_intermediate_size=40))
    model = prepare(build(moe_intermediate_size=40), QATConfig(to="fp8"))
    assert torch.equal(logits(model), logits(baked(model)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    """Masters are float32 or BF16."""
    with pytest.raises(UsageError, match="float32 or bfloat16"):
        prepare(build().to(dtype))


def test_a_diverged_weight_is_named() -> None:
    """NaN in a master weight ends in a sentence that names the expert's weight and the place in it."""
    for name in ("int4", "learned", "fp8"):
        model = prepare(build(), CONFIGS[name])
        with torch.no_grad():
            stack(model)[3, 5, 7] = torch.nan
        with pytest.raises(BadValue, match=rf"{EXPERTS}\.3\.down_proj.*row 5, column 7"):
            model(IDS)


# --- what goes wrong on the way ---------------------------------------------------------------------------------------


def shadows(model: nn.Module) -> list[str]:
    """Return the attributes that shadow a parameter now."""
    return [name for module in model.modules() for name in module._parameters if name in module.__dict__]  # noqa: SLF001


class Faulty:
    """An implementation of experts that does something first."""

    def __init__(self, model: Any, act: Callable[[], None]) -> None:
        experts = model.get_submodule(EXPERTS)
        self.usual, self.act = type(experts).forward, act

    def __call__(self, module: Any, *args: Any, **options: Any) -> Any:
        """Do it, and then what is usual."""
        self.act()
        return self.usual(module, *args, **options)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_pass_that_breaks_leaves_nothing_behind(error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    """After an error or an interrupt no value shadows a parameter, and the next pass is as ever."""
    model = prepare(build())
    before = logits(model)

    def fail() -> None:
        assert shadows(model)
        raise error

    with monkeypatch.context() as patch:
        faulty = Faulty(model, fail)
        patch.setattr(type(model.get_submodule(EXPERTS)), "forward", faulty)
        with pytest.raises(error):
            model(IDS)
    assert shadows(model) == []
    assert torch.equal(logits(model), before)


def test_a_second_thread_is_refused_and_the_first_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads in one module end in an error for the later one; the earlier one still sees rounded values."""
    model = prepare(build())
    expected = logits(model)
    inside, go, results = threading.Event(), threading.Event(), []

    def wait() -> None:
        inside.set()
        assert go.wait(20)

    faulty = Faulty(model, wait)
    monkeypatch.setattr(type(model.get_submodule(EXPERTS)), "forward", faulty)
    thread = threading.Thread(target=lambda: results.append(logits(model)))
    thread.start()
    assert inside.wait(20)
    try:
        with pytest.raises(UsageError, match="two threads"):
            model(IDS)
    finally:
        go.set()
        thread.join()
    assert torch.equal(results[0], expected)
    assert torch.equal(logits(model), expected)


def test_threads_may_take_turns() -> None:
    """One after the other, threads may run a model."""
    model = prepare(build())
    expected, results = logits(model), []
    thread = threading.Thread(target=lambda: results.append(logits(model)))
    thread.start()
    thread.join()
    assert torch.equal(results[0], expected)


@pytest.mark.parametrize("name", ["int4", "learned", "adapters"])
def test_a_copy_lives_by_itself(name: str) -> None:
    """A deep copy is fake-quantised like its original, by a `Prepared` of its own; neither moves the other."""
    model = moved(prepare(build(), CONFIGS[name]))
    expected = logits(model)
    twin = copy.deepcopy(model)
    assert prepared(twin) is not prepared(model)
    assert torch.equal(logits(twin), expected)
    moved(twin)
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(twin), logits(baked(twin)))
    assert not torch.equal(logits(twin), expected)
    assert all(prepared(twin).kept(target) is not None for target in prepared(twin).targets)
    prepared(twin).remove()
    assert torch.equal(logits(model), expected)


def test_parameters_that_were_replaced_are_let_go() -> None:
    """Sharding puts its own parameters in the place of the whole ones: nothing here keeps those alive."""
    model = prepare(build(), CONFIGS["learned"])
    logits(model)
    known = [weakref.ref(parameter) for parameter in model.parameters()]
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            module._parameters[name] = nn.Parameter(parameter.detach().clone())  # noqa: SLF001  as fully_shard does
    del parameter
    gc.collect()
    assert not [found for reference in known if (found := reference()) is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_routers_stay_out_of_autocast(dtype: torch.dtype) -> None:
    """Their logits are float32 under autocast too, as the served model computes them; `remove` leaves no trace."""
    model = prepare(build().to(dtype))
    gate = model.get_submodule("model.layers.1.mlp.gate")
    inner, seen = type(gate).forward, []
    hidden = torch.randn(6, 64)
    with torch.autocast("cpu", torch.bfloat16):
        seen = [part for part in gate(hidden) if part.is_floating_point()]
        cast = [part for part in inner(gate, hidden) if part.is_floating_point()]
    expected = [part for part in gate(hidden) if part.is_floating_point()]
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(cast, expected, strict=True))
    prepared(model).remove()
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("name", ["int4", "learned", "adapters"])
def test_a_state_goes_through_torch_save(name: str, base: Path) -> None:
    """`state_dict` is plain tensors: saved, read without pickle's code and loaded, it gives the same model."""
    for make in (build, lambda: qat.load(base)):
        model = moved(prepare(make(), CONFIGS[name]))
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        other = prepare(make(), CONFIGS[name])
        assert not torch.equal(logits(other), logits(model))
        other.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(logits(other), logits(model))
        assert shadows(model) == []


# --- starved experts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["int4", "learned", "adapters", "fp8"])
def test_starved_experts_go_back_to_the_start(name: str, base: Path) -> None:
    """Restored experts have the values of post-training rounding; their neighbours keep what they learnt."""
    start = baked(prepare(qat.load(base), CONFIGS[name]))
    model = moved(prepare(qat.load(base), CONFIGS[name]))
    before = baked(model)
    logits(model)
    restore(prepared(model), [f"{EXPERTS}.2"], base)
    after = baked(model)
    for own in ("gate_up_proj", "down_proj"):
        was, now, began = (twin.get_parameter(f"{EXPERTS}.{own}") for twin in (before, after, start))
        assert torch.equal(now[2], began[2])
        assert not torch.equal(was[2], began[2])
        assert torch.equal(now[[0, 1, 3]], was[[0, 1, 3]])
    assert torch.equal(logits(model), logits(after))


def test_learned_scales_begin_as_plain_ones_and_stay_above_zero() -> None:
    """A scale begins at bf16(amax / 7); pushed below zero it stops at a small share of that."""
    weights = torch.randn(4, 64)
    module = LearnedScale(weights, 4)
    assert torch.equal(module.scale(), reference.plain_int4_scale(weights.bfloat16(), "moonshot").float())
    with torch.no_grad():
        module.ratio.fill_(-3.0)
    assert (module.scale() > 0).all()
    assert fake_quantize_learned(weights, module.scale()).isfinite().all()


# --- the peers' training loops ----------------------------------------------------------------------------------------


class Texts(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Two texts, over and over."""

    def __len__(self) -> int:
        """Return how many."""
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return one."""
        return {"input_ids": IDS[index % 2], "labels": IDS[index % 2]}


def test_transformers_trainer_trains_it(base: Path, tmp_path: Path) -> None:
    """Two steps of transformers' Trainer with checkpointing, then an export that has the trained model's logits."""
    model: Any = prepare(qat.load(base))
    before = logits(model)
    arguments = TRANSFORMERS.TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=2,
        learning_rate=1e-2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    TRANSFORMERS.Trainer(model=model, args=arguments, train_dataset=Texts()).train()
    after = logits(model.eval())
    assert not torch.equal(after, before)
    qat.export(model, tmp_path / "int4")
    assert torch.equal(logits(qat.load(tmp_path / "int4")), after)


@pytest.fixture
def accelerator() -> Iterator[Any]:
    """Accelerate on a CPU, its global state put back afterwards."""
    accelerate = import_module("accelerate")
    state = import_module("accelerate.state")
    state.AcceleratorState._reset_state(reset_partial_state=True)  # noqa: SLF001  as its own tests do
    yield accelerate.Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    state.AcceleratorState._reset_state(reset_partial_state=True)  # noqa: SLF001


def test_accelerate_trains_it(accelerator: Any, base: Path, tmp_path: Path) -> None:
    """A plain loop under accelerate, autocast included, ends in a model that exports what it runs on."""
    model: Any = prepare(qat.load(base))
    loader = torch.utils.data.DataLoader(Texts(), batch_size=2)
    wrapped, optimizer, loader = accelerator.prepare(model, torch.optim.AdamW(trained(model), 1e-2), loader)
    for batch in loader:
        with accelerator.accumulate(wrapped):
            accelerator.backward(wrapped(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
    unwrapped = accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    qat.export(unwrapped, tmp_path / "int4")
    assert torch.equal(logits(qat.load(tmp_path / "int4")), logits(unwrapped))
    assert not torch.equal(logits(unwrapped), logits(prepare(qat.load(base))))


def test_errors_are_ours() -> None:
    """What `prepare` refuses is an error of this package's tree."""
    with pytest.raises(K2QuantError):
        prepared_module.prepare(nn.Linear(2, 2))
