"""Which weights a recipe takes; what engines fuse stays in one format, unless somebody insists."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

import k2quant
from k2quant.checkpoint.header import TensorEntry
from k2quant.checkpoint.reader import REPORT, open_checkpoint
from k2quant.checkpoint.weights import StoredWeight, group_tensors
from k2quant.cli import main
from k2quant.conversion.plan import Options, make_plan, plan_of
from k2quant.conversion.recipes.recipe import Recipe, Rule, in_scope, make_recipe
from k2quant.conversion.recipes.rules import WrittenRule
from k2quant.errors import CheckpointError, DestinationStale, UsageError
from k2quant.formats.bf16 import Bf16
from k2quant.formats.format import Format, Scope
from k2quant.formats.fp8 import Fp8
from k2quant.formats.int4 import Int4

SPLITTING: list[tuple[dict[str, Any], str]] = [
    ({"to": "int4", "ignore": (r"experts\.3\.",)}, r"one kernel.*experts\.0\.\w+` is int4.*experts\.3\.\w+` is bf16"),
    ({"to": "int4", "ignore": ("down_proj",)}, r"one kernel.*gate_proj` is int4.*down_proj` is bf16"),
    ({"to": "fp8", "ignore": (r"mlp\.up_proj",)}, r"gate_proj and up_proj as one matrix.*mlp\.up_proj` is bf16"),
    ({"to": "fp8", "ignore": (r"shared_experts\.gate",)}, r"as one matrix.*shared_experts\.gate_proj` is bf16"),
    ({"to": "int4", "scope": "linear", "ignore": ("q_a_proj",)}, r"kv_a_proj_with_mqa as one matrix.*q_a_proj` is"),
    ({"to": "fp8", "ignore": ("kv_a",)}, r"kv_a_proj_with_mqa as one matrix.*kv_a_proj_with_mqa` is bf16"),
]


@pytest.mark.parametrize(("options", "reason"), SPLITTING)
def test_a_policy_that_splits_what_engines_fuse_is_refused(
    k2_bf16: Path, tmp_path: Path, options: dict[str, Any], reason: str
) -> None:
    """Fused groups split: engines look at the first member alone, so the reason and both names are said, and how to."""
    with pytest.raises(UsageError, match=f"(?s){reason}.*`allow_split=True`"):
        k2quant.convert(k2_bf16, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["int4", "fp8"])
@pytest.mark.parametrize(
    "ignore", [(r"layers\.1\.mlp\.experts",), (r"\.(q|kv)_a_proj", "o_proj"), (r"\.mlp\.down_proj",)]
)
def test_whole_groups_may_stay_out(k2_bf16: Path, to: str, ignore: tuple[str, ...]) -> None:
    """All experts of a layer, q_a with kv_a, or what stands alone: nothing is split."""
    options = Options(to, "linear", ignore)  # type: ignore[arg-type]
    plan = make_plan(open_checkpoint(k2_bf16), options)
    assert plan.remarks == ()


def test_a_rule_for_each_half_is_a_split_too(k2_bf16: Path) -> None:
    """Recipes of several rules are held to the same: experts of two formats in one layer are refused."""
    source = open_checkpoint(k2_bf16)
    weights = group_tensors(source.tensors).weights
    rules = (Rule(format=Int4(), scope="experts", ignore=(re.compile(r"experts\.1\."),)),)
    with pytest.raises(UsageError, match="one kernel"):
        plan_of(source, weights, Recipe(rules), Options("int4"))
    assert len(plan_of(source, weights, Recipe(rules), Options("int4", allow_split=True)).remarks) == 1


def test_a_split_that_is_allowed_is_written_said_and_copied(k2_bf16: Path, tmp_path: Path) -> None:
    """With --allow-split it is written and noted; a source that is split already is copied with a note, not refused.

    Nothing becomes worse by copying; but a conversion that rewrites a part of the group is one that splits it.
    """
    done = k2quant.convert(k2_bf16, tmp_path / "split", to="int4", ignore=(r"experts\.3\.",), allow_split=True)
    (said,) = done.report["remarks"]
    assert said.startswith("the output splits what engines fuse: engines run all experts")
    assert said.endswith("2 such groups")
    assert k2quant.inspect(done.folder).remarks == [said.replace("the output", "the checkpoint")]
    options: dict[str, Any] = {"to": "int4", "ignore": (r"experts\.3\.",)}
    copied = k2quant.convert(done.folder, tmp_path / "copied", shard_size=10**6, **options)
    assert copied.report["remarks"] == [said]
    with pytest.raises(UsageError, match="one kernel"):
        k2quant.convert(done.folder, tmp_path / "more", to="fp8", ignore=(r"experts\.5\.",))
    with pytest.raises(UsageError, match="q_a_proj and kv_a"):
        k2quant.convert(done.folder, tmp_path / "more", to="fp8", ignore=("q_a_proj",))
    assert k2quant.convert(done.folder, tmp_path / "whole", to="int4").report["remarks"] == []


def test_a_merge_keeps_groups_whole_too(k2_bf16: Path, tmp_path: Path) -> None:
    """`merge` writes a checkpoint, so it is refused, and allowed, like a conversion."""
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["o_proj"], "peft_version": "0.19.0"}
    prefix = "base_model.model.model.layers.0.self_attn.o_proj"
    rows, columns = open_checkpoint(k2_bf16).tensors["model.layers.0.self_attn.o_proj.weight"].shape
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    shapes = {"A": (2, columns), "B": (rows, 2)}
    factors = {f"{prefix}.lora_{side}.weight": np.ones(shape, np.float32) for side, shape in shapes.items()}
    save_file(factors, tmp_path / "adapter" / "adapter_model.safetensors")
    options: dict[str, Any] = {"to": "fp8", "ignore": ("q_a_proj",)}
    with pytest.raises(UsageError, match="q_a_proj and kv_a"):
        k2quant.merge(k2_bf16, tmp_path / "adapter", tmp_path / "out", **options)
    done = k2quant.merge(k2_bf16, tmp_path / "adapter", tmp_path / "out", **options, allow_split=True)
    assert done.report["options"]["allow_split"]
    assert done.report["remarks"]


def test_the_permission_is_one_of_the_options_of_a_run(k2_bf16: Path, tmp_path: Path) -> None:
    """A finished folder knows whether a split was allowed; one of a release that could not ask for it is the same."""
    done = k2quant.convert(k2_bf16, tmp_path / "out", to="int4")
    assert done.report["options"].pop("allow_split") is False
    (tmp_path / "out" / REPORT).write_text(json.dumps(done.report))
    assert k2quant.convert(k2_bf16, tmp_path / "out", to="int4").already_done
    with pytest.raises(DestinationStale, match="other options"):
        k2quant.convert(k2_bf16, tmp_path / "out", to="int4", allow_split=True)


def test_the_command_line_says_what_it_splits(k2_bf16: Path, tmp_path: Path) -> None:
    """`convert` without the switch exits 2; with it, dry run and run say so on stderr and in JSON."""
    call = ["convert", "--to", "int4", "--ignore", r"experts\.3\.", str(k2_bf16), str(tmp_path / "out")]
    refused = CliRunner().invoke(main, call)
    assert refused.exit_code == 2
    assert "--allow-split" in refused.stderr
    for more in (["--dry-run"], []):
        found = CliRunner().invoke(main, [*call, "--allow-split", "--json", *more])
        assert found.exit_code == 0, found.stderr
        assert "note: the output splits what engines fuse" in found.stderr
        assert len(json.loads(found.stdout)["remarks"]) == 1


# --- what a recipe says of weights ---

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
    assert spared.startswith(f"`ignore=` spares `{LAYER.format(1, EXPERT.format(1))}`, which stays quantised")
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
        make_recipe([WrittenRule(to="int4")], weights(Bf16(), OUT))
    assert make_recipe([WrittenRule(to="int4")], weights(Bf16(), EXPERT.format(0))).quantises
    assert not make_recipe([WrittenRule(to="bf16")], []).quantises
