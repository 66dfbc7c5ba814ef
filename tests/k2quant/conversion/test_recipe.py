"""Which weights a recipe takes, and what it says of those that it does not."""

from __future__ import annotations

import re

import pytest

from k2quant.checkpoint.header import TensorEntry
from k2quant.checkpoint.weights import StoredWeight
from k2quant.conversion.recipe import Recipe, Rule, in_scope, make_recipe
from k2quant.errors import CheckpointError, UsageError
from k2quant.formats.bf16 import Bf16
from k2quant.formats.format import Format, Scope
from k2quant.formats.fp8 import Fp8
from k2quant.formats.int4 import Int4

LAYER = "model.layers.{}.{}"
EXPERT, ABSORBED, OUT = "mlp.experts.{}.up_proj", "self_attn.kv_b_proj", "self_attn.o_proj"


def weights(form: Format, *names: str, layers: tuple[int, ...] = (1, 2)) -> list[StoredWeight]:
    """Return weights of some layers that are stored in a format."""
    bases = [LAYER.format(layer, name) for layer in layers for name in names]
    entries = [(base, TensorEntry(f"{base}.{form.main}", "BF16", (64, 64), "a.safetensors", 0, 8192)) for base in bases]
    return [StoredWeight(base, form, (64, 64), {form.main: entry}) for base, entry in entries]


@pytest.mark.parametrize(
    ("scope", "taken"),
    [
        (None, {EXPERT.format(0), ABSORBED, OUT, "mlp.gate", "input_layernorm"}),
        ("experts", {EXPERT.format(0)}),
        ("linear", {EXPERT.format(0), OUT}),
        ("projections", {EXPERT.format(0), ABSORBED, OUT}),
    ],
)
def test_a_scope_takes_its_weights_and_no_others(scope: Scope | None, taken: set[str]) -> None:
    """Without a scope all; routed experts; projections, of which `linear` leaves what engines absorb."""
    names = [EXPERT.format(0), ABSORBED, OUT, "mlp.gate", "input_layernorm"]
    assert {name for name in names if in_scope(LAYER.format(3, name), scope, Int4())} == taken
    of_fp8 = {name for name in names if in_scope(LAYER.format(3, name), scope, Fp8())}
    assert of_fp8 == (taken | {ABSORBED} if scope == "linear" else taken)  # engines run it in FP8


def test_what_stays_quantised_is_named_by_its_first_weight() -> None:
    """One sentence each for what engines absorb, what a pattern spares and what is out of scope, with their numbers."""
    held = weights(Int4(), ABSORBED, OUT, EXPERT.format(1))
    recipe = Recipe((Rule(format=Int4(), scope="experts", ignore=(re.compile(r"experts\.1\."),)),))
    absorbed, spared, others = recipe.remarks(held)
    assert absorbed.startswith(f"`{LAYER.format(1, ABSORBED)}` stays quantised as in the source (2 such): engines")
    assert spared.startswith(f"--ignore spares `{LAYER.format(1, EXPERT.format(1))}`, which stays quantised")
    assert "(2 such)" in spared
    assert others.startswith(f"`{LAYER.format(1, OUT)}` is out of scope and stays quantised as in the source (2 such)")
    assert recipe.remarks(weights(Int4(), OUT, layers=(5,)))[0].startswith(f"`{LAYER.format(5, OUT)}` is out of scope")
    assert not recipe.remarks(weights(Bf16(), ABSORBED, OUT, EXPERT.format(1)))


@pytest.mark.parametrize(("layers", "more"), [((1,), "is bf16; take all"), ((1, 2, 3), r"\(3 such groups\); take all")])
def test_a_split_of_what_engines_fuse_is_refused_with_its_number(layers: tuple[int, ...], more: str) -> None:
    """The first such group is named; of a single one no number is said."""
    held = weights(Bf16(), EXPERT.format(0), EXPERT.format(1), layers=layers)
    recipe = Recipe((Rule(format=Int4(), scope="experts", ignore=(re.compile(r"experts\.1\."),)),))
    splits = recipe.splits(held)
    assert len(splits) == len(layers)
    with pytest.raises(UsageError, match=rf"`{LAYER.format(1, EXPERT.format(0))}` is int4 and .*{more}"):
        recipe.check_splits(splits, held)


def test_a_quantisation_of_nothing_is_refused() -> None:
    """A source without weights in scope; into BF16 nothing needs be in scope."""
    with pytest.raises(CheckpointError, match="no weight is in scope"):
        make_recipe("int4", weights(Bf16(), OUT), grid=None)
    assert make_recipe("int4", weights(Bf16(), EXPERT.format(0)), grid=None).quantises
    assert not make_recipe("bf16", [], grid=None).quantises
