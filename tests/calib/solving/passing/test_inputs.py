"""What matrices are settled by, against a loop by hand over transformers' model in float32, one text after another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from k2quant.calib.inputs import Part, Samples
from k2quant.calib.solving.evidence import Evidence
from k2quant.calib.solving.passing import seen
from k2quant.calib.stats import layout
from k2quant.calib.stats.layout import place_of
from k2quant.checkpoint.reader import Checkpoint, open_checkpoint
from k2quant.checkpoint.writing.in_memory import write_checkpoint
from k2quant.conversion.convert import convert
from k2quant.errors import BadValue
from k2quant.model import load_model
from k2quant.nano import architecture, writing
from tiny import NANO

pytestmark = pytest.mark.usefixtures("one_thread")

Seen = dict[str, list[tuple[Tensor, Tensor]]]
ByHand = Callable[[Any, Part], Seen]
VOCABULARY = 64


@pytest.fixture(scope="module")
def data(drawn: Callable[..., Samples]) -> Samples:
    """Rows for the tiny model."""
    return drawn(VOCABULARY)


def holding(source: Checkpoint, values: dict[str, Tensor]) -> Any:
    """Return a checkpoint as a model in float32 that has some of its matrices replaced."""
    model = load_model(source, dtype="float32")
    state = model.state_dict()
    for base, each in values.items():
        state[f"{base}.weight"].copy_(each)
    return model


def hessian_of(rows: Seen, base: str) -> Tensor:
    """Return the mean of w x x^T of what a matrix multiplied."""
    x = torch.cat([values for values, _ in rows[base]]).double()
    w = torch.cat([weights[: len(values)] for values, weights in rows[base]]).double()
    return (x * w[:, None]).T @ x / w.sum()


def mean_of(rows: Seen, base: str) -> Tensor:
    """Return the mean of w x."""
    x = torch.cat([values for values, _ in rows[base]]).double()
    w = torch.cat([weights[: len(values)] for values, weights in rows[base]]).double()
    return w @ x / w.sum()


def far(found: Tensor, wanted: Tensor) -> float:
    """Return how far apart two matrices are, relative to the second."""
    return float((found.double() - wanted).norm() / wanted.norm())


def by_base(asked: list[tuple[tuple[str, ...], Evidence]], bases: list[str]) -> dict[str, Evidence]:
    """Return what was known of each matrix's input; a pass comes to them in the order of `bases`."""
    found, left = {}, list(bases)
    for group, evidence in asked:
        for name in group:
            base = next(base for base in left if base.endswith(f".{name}"))
            left.remove(base)
            found[base] = evidence
    assert not left
    return found


def in_order(bases: list[str]) -> list[str]:
    """Return matrices in the order in which a pass settles them."""
    stages = ("q_a_proj", "kv_a_proj_with_mqa", "q_b_proj", "kv_b_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

    def key(base: str) -> tuple[Any, ...]:
        place = place_of(base)
        assert place is not None
        above, _, last = base.rpartition(".")
        expert = -1 if place.expert is None else place.expert
        return place.layer, ".mlp" in base, expert, above if ".mlp" in base else "", stages.index(last)

    return sorted(bases, key=key)


def test_each_matrix_sees_those_before_it_as_they_ship(
    tiny: Checkpoint, data: Samples, coarse: Any, through: Any, sinks: Any, matrices: Any, by_hand: ByHand
) -> None:
    """In the order of a forward pass, each input is what a model gives whose matrices all have the values that ship."""
    sink = sinks()
    through(tiny, data, sink)
    bases = in_order(matrices(tiny))
    assert sink.values.keys() == set(bases)
    assert all(sink.layers[base] == place_of(base).layer for base in bases)  # type: ignore[union-attr]
    found = by_base(coarse.seen, bases)
    nothing: dict[str, Tensor] = {}
    shipped, source = (by_hand(holding(tiny, values), data.train) for values in (sink.values, nothing))
    held = by_hand(holding(tiny, sink.values), data.validation)
    apart = 0
    for base in bases:
        count = sum(len(values) for values, _ in shipped.get(base, []))
        weight = sum(float(weights[: len(values)].sum()) for values, weights in shipped.get(base, []))
        assert found[base].weight == pytest.approx(weight, rel=0.03 if count >= 20 else 0.5)
        assert abs(found[base].tokens - count) <= 3  # BF16 sends a token elsewhere now and then
        if found[base].tokens < 20:
            continue
        wanted = hessian_of(shipped, base)
        assert far(found[base].hessian, wanted) < 0.15, base
        assert (found[base].mean - mean_of(shipped, base)).norm() < 0.1 * wanted.trace() ** 0.5
        if len(found[base].held) >= 20:
            own = found[base].held.double() * found[base].held_weights.double().sqrt()[:, None]
            total = found[base].held_weights.double().sum()
            assert far(own.T @ own / total, hessian_of(held, base)) < 0.2, base
        apart += far(hessian_of(source, base), wanted) > 0.3
    assert apart > len(bases) / 2  # what the source's own weights give is something else
    for base, evidence in found.items():
        routed = ".experts." in base and not base.endswith("down_proj")
        assert (evidence.prior is not None) == routed
        if evidence.prior is not None:  # all tokens of the layer, each of them alike
            assert evidence.prior.tokens == data.train.count
            assert far(evidence.prior.hessian, hessian_of(shipped, "model.layers.1.mlp.experts")) < 0.1
            assert len(evidence.prior.held) == data.validation.count


def test_without_propagation_a_layer_sees_the_source(
    tiny: Checkpoint, data: Samples, coarse: Any, through: Any, sinks: Any, matrices: Any, by_hand: ByHand
) -> None:
    """All inputs are those of the source's model but for down's, whose h comes from the gate and up that ship."""
    sink = sinks()
    through(tiny, data, sink, propagate=False)
    bases = in_order(matrices(tiny))
    found = by_base(coarse.seen, bases)
    model = holding(tiny, {})
    source = by_hand(model, data.train)
    gates = {base: each for base, each in sink.values.items() if base.endswith((".gate_proj", ".up_proj"))}
    last = {base: each for base, each in gates.items() if ".layers.0." in base}
    shipped = by_hand(holding(tiny, last), data.train)
    for base in bases:
        if found[base].tokens < 20:
            continue
        if not base.endswith(".down_proj"):
            assert far(found[base].hessian, hessian_of(source, base)) < 0.15, base
        elif ".layers.0." in base:
            assert far(found[base].hessian, hessian_of(shipped, base)) < 0.15, base
            assert far(hessian_of(source, base), hessian_of(shipped, base)) > 0.3
        else:
            assert far(found[base].hessian, hessian_of(source, base)) > 0.3


def test_padding_counts_nowhere(tiny: Checkpoint, data: Samples, coarse: Any, through: Any, sinks: Any) -> None:
    """What the rows hold behind their texts changes no bit of what is settled; it is not counted either."""
    through(tiny, data, sinks())
    first = list(coarse.seen)
    coarse.seen.clear()
    tokens = data.train.tokens.clone()
    tokens[~data.train.real] = 7
    through(tiny, replace(data, train=replace(data.train, tokens=tokens, digest="other")), sinks(), work="other")
    for (names, evidence), (again, other) in zip(first, coarse.seen, strict=True):
        assert names == again
        assert evidence.tokens == other.tokens <= data.train.count
        assert torch.equal(evidence.hessian, other.hessian)


@pytest.mark.parametrize("count", [0, 1, 9, 10, 11, 37, 1000])
def test_held_out_tokens_are_an_even_sample(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many come, and in whatever blocks: all of them up to a number, then every so many-th, with its weight."""
    monkeypatch.setattr(seen, "HELD", 10)
    found = seen.Seen("a matrix", 4, count, torch.device("cpu"))
    x = torch.arange(count).bfloat16()[:, None].repeat(1, 4)
    for start in range(0, count, 7):
        block = x[start : start + 7]
        found.see("validation", block, torch.arange(start, start + len(block)).float())
    evidence = found.evidence()
    wanted = [number * count // min(count, 10) for number in range(min(count, 10))]
    assert evidence.held_weights.tolist() == wanted
    assert torch.equal(evidence.held, x[wanted])
    assert (evidence.tokens, evidence.weight) == (0, 0)
    assert not evidence.hessian.any()


@pytest.mark.parametrize("part", ["train", "validation"])
def test_one_token_that_is_not_finite_is_not_passed_over(part: layout.Part, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that only judges ends a pass too, by name, also where it is not among those that are kept."""
    monkeypatch.setattr(seen, "HELD", 10)
    found = seen.Seen("model.layers.0.mlp.down_proj", 32, 1000, torch.device("cpu"))
    x = torch.ones(1000, 32, dtype=torch.bfloat16)
    x[999, 3] = torch.nan
    found.see(part, x, torch.ones(1000))
    with pytest.raises(BadValue, match=r"layers\.0\.mlp\.down_proj.*found NaN or infinity"):
        found.evidence()


@pytest.mark.usefixtures("coarse")
def test_equal_values_give_equal_bits(
    k2_mixed: Path, tmp_path: Path, drawn: Callable[..., Samples], through: Any, sinks: Any
) -> None:
    """FP8 and INT4 side by side: matrices settle at the bits of the checkpoint converted to BF16."""
    plain = convert(k2_mixed, tmp_path / "bf16", to="bf16").folder
    asked = ["model.layers.0.self_attn.o_proj", "model.layers.1.mlp.experts.3.up_proj"]
    asked += [f"model.layers.1.mlp.{name}.down_proj" for name in ("shared_experts", "experts.3", "experts.15")]
    found = []
    for folder in (k2_mixed, plain):
        found.append(sinks())
        through(open_checkpoint(folder), drawn(2048), found[-1], bases=asked, work=folder.name, upto=2)
    assert found[0].values.keys() == set(asked)
    assert all(torch.equal(each, found[1].values[base]) for base, each in found[0].values.items())


@pytest.mark.usefixtures("coarse")
@pytest.mark.parametrize("change", [{"q_lora_rank": None}, {"attention_bias": True}])
def test_other_shapes_of_the_family(
    change: dict[str, Any], tmp_path: Path, data: Samples, through: Any, sinks: Any, matrices: Any
) -> None:
    """Queries that are not compressed, biases: every matrix is settled."""
    config = NANO | {"num_hidden_layers": 2} | change
    write_checkpoint(tmp_path / "model", writing._shards(architecture.build(config)), config)  # noqa: SLF001  nano's own
    source, sink = open_checkpoint(tmp_path / "model"), sinks()
    through(source, data, sink)
    assert sink.values.keys() == set(matrices(source))
