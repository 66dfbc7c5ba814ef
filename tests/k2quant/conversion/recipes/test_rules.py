"""Recipes as people write them: what is read, what is refused and where it says that it stands."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as some

from k2quant.checkpoint.header import TensorEntry
from k2quant.checkpoint.reader import REPORT
from k2quant.checkpoint.weights import StoredWeight
from k2quant.conversion.plan import Options, options_from, options_of
from k2quant.conversion.recipes.recipe import make_recipe
from k2quant.conversion.recipes.rules import LIMIT, WrittenRecipe, WrittenRule, in_force, parse_recipe, read_recipe
from k2quant.errors import CheckpointError, UsageError
from k2quant.formats.bf16 import Bf16
from k2quant.ground.names import TENSOR_CLASSES, tensor_class

WHOLE = r"""
version: 1
rules:
  - {classes: routed_experts, to: int4, grid: moonshot, method: rtn}
  - match: ['layers\.0\.', "layers\\.1\\."]
    ignore: o_proj
    to: bf16
  - {to: fp8, scope: linear, layout: compressed-tensors}
shard_size: 5GB
allow_split: true
"""


def read(text: str) -> WrittenRecipe:
    """Read a recipe's text."""
    return parse_recipe(text.encode(), file="r.yaml")


def test_a_recipe_says_all_that_arguments_say() -> None:
    """Rules in their order with formats, classes, patterns, scope, grid and layout; size of shards, permission."""
    found = read(WHOLE)
    assert found == WrittenRecipe(
        rules=(
            WrittenRule(to="int4", classes=("routed experts",), grid="moonshot"),
            WrittenRule(to="bf16", match=(r"layers\.0\.", r"layers\.1\."), ignore=("o_proj",)),
            WrittenRule(to="fp8", scope="linear", layout="compressed-tensors"),
        ),
        shard_size=5 * 10**9,
        allow_split=True,
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "rules:\n- {to: int4, scop: experts}",
            r"rule 1 \(line 2\): unknown key 'scop', did you mean 'scope'\?",
        ),
        ("rules:\n- to: int4\n  zzz: 1", r"rule 1 \(line 3\): unknown key 'zzz'; known are to, scope, classes"),
        ("rule:\n- {to: int4}", r" \(line 1\): unknown key 'rule', did you mean 'rules'\?"),
        ("version: 2\nrules: [{to: int4}]", r"\(line 1\): version: expected 1, found 2"),
        ("version: true\nrules: [{to: int4}]", "version: expected 1, found True"),
        ("version: 1", "rules: expected a list of rules, found None"),
        ("rules: []", "expected a list of rules"),
        ("rules: {to: int4}", "expected a list of rules"),
        ("rules: [int4]", "rule 1: expected keys and values, found 'int4'"),
        ("rules: [{scope: experts}]", "rule 1: the key 'to' is missing"),
        ("rules: [{to: int3}]", "to: expected bf16, fp8, int4, nvfp4, mxfp4, found 'int3'"),
        ("rules: [{to: [int4]}]", "to: expected bf16, fp8, int4"),
        ("rules: [{to: int4, grid: gptq}]", "grid: expected moonshot, compressed-tensors, found 'gptq'"),
        ("rules: [{to: int4, scope: all}]", "scope: expected experts, linear, projections"),
        ("rules: [{to: fp8, layout: x}]", "layout: expected deepseek, compressed-tensors"),
        ("rules: [{to: int4, method: optq}]", "method: expected rtn, mse, imatrix, gptq, awq, found 'optq'"),
        ("rules: [{to: int4, classes: [attn]}]", "unknown class 'attn'.*known are routed experts"),
        ("rules: [{to: int4, classes: attention, match: []}]", "match: an empty list takes nothing"),
        ("rules: [{to: int4, match: 5}]", "match: expected text or a list of texts, found 5"),
        ("rules: [{to: int4, match: ['']}]", "match: expected text or a list"),
        ("rules: [{to: int4, match: '(('}]", "match: .* is no regular expression"),
        ("rules: [{to: int4, ignore: '(a+)+b'}]", "ignore: .* might take for ever"),
        ("rules: [{to: int4}]\nshard_size: 5 parsecs", r"\(line 2\): shard_size: '5 parsecs' is no size"),
        ("rules: [{to: int4}]\nshard_size: -1", "shard_size: expected bytes"),
        ("rules: [{to: int4}]\nshard_size: 999KB", r"\(line 2\): shard_size: expected at least 1.0 MB, found 999.0 kB"),
        ("rules: [" + "{to: int4}," * 1001 + "]", "rules: expected at most 1,000, found 1,001"),
        ("tool: k2quant\nrecipe: {tool: k2quant, recipe: {rules: [{to: int4}]}}", "expected .* found another report"),
        ("rules: [{to: int4}]\nallow_split: 1", "allow_split: expected true or false, found 1"),
        ("rules: [{to: int4, to: fp8}]", "not YAML: a key stands twice"),
        ("a: &x [1]\nrules: *x", "aliases"),
        ("rules: [{to: !!python/name:os.system int4}]", "not YAML"),
        ("rules: !!set {a}", "expected a list of rules"),
        ("- to: int4", "expected keys and values, found list"),
        ("", "expected keys and values, found NoneType"),
        ("[" * 5000, "not YAML"),
        ("rules: [{to: int4, match: " + "9" * 5000 + "}]", "."),
        ("#" * (LIMIT + 1), "too large for a recipe"),
    ],
)
def test_what_makes_no_sense_is_refused_where_it_stands(text: str, said: str) -> None:
    """Unknown keys and words by name, with the nearest and the line; wrong kinds of values; hostile YAML."""
    with pytest.raises(UsageError, match=f"(?s)^r.yaml.*{said}"):
        read(text)


@pytest.mark.parametrize("source", [5, ["a"], None])
def test_what_is_no_recipe_at_all(source: Any) -> None:
    """Neither a path nor what a file holds."""
    with pytest.raises(UsageError, match="expected a path"):
        read_recipe(source)


def test_files_folders_and_reports_are_read(tmp_path: Path) -> None:
    """YAML, JSON of any length of lines, a report of a conversion, one of an older release, or the folder of one."""
    recipe: dict[str, Any] = {"rules": [{"to": "int4"}], "shard_size": 10**9}
    wanted = WrittenRecipe(rules=(WrittenRule(to="int4"),), shard_size=10**9)
    (tmp_path / "r.yaml").write_text("rules: [{to: int4}]\nshard_size: 1GB\n")
    (tmp_path / "r.json").write_text(json.dumps(recipe))
    (tmp_path / "new.json").write_text(json.dumps({"tool": "k2quant", "recipe": recipe, "options": {"to": "fp8"}}))
    options: dict[str, Any] = {"to": "int4", "scope": None, "ignore": [], "grid": None, "shard_size": 10**9}
    (tmp_path / REPORT).write_text(json.dumps({"tool": "k2quant", "options": options}))
    files: list[Any] = [tmp_path / name for name in ("r.yaml", "r.json", "new.json")]
    for source in (tmp_path, *files, recipe):
        assert read_recipe(source) == wanted, source
    assert read_recipe(wanted) is wanted


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("absent.yaml", None, "No such file"),
        ("absent.json", None, "No such file"),
        ("a.json", "{", "not valid JSON"),
        ("a.json", '{"tool": "k2quant"}', "a report without a recipe and without options"),
        ("a.json", '{"tool": "k2quant", "options": {"to": "int4", "x": 1}}', "unknown key 'x'"),
        ("a.json", '{"tool": "k2quant", "recipe": {"rules": [{"to": "int5"}]}}', "rule 1: to: expected bf16"),
    ],
)
def test_files_that_are_no_recipe_are_named(tmp_path: Path, name: str, content: str | None, said: str) -> None:
    """A file that is not there, broken JSON, reports that lie."""
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=f"{name}.*{said}"):
        read_recipe(tmp_path / name)


def test_what_a_rule_leaves_out_is_what_the_format_has_by_default() -> None:
    """Scope and grid of the format; with classes or patterns, all that engines run in it; of BF16 everything."""

    def of(**rule: Any) -> dict[str, Any]:
        (found,) = in_force((WrittenRule(**rule),))
        return found.as_json()

    assert of(to="int4") == {"to": "int4", "scope": "experts", "grid": "moonshot"}
    assert of(to="fp8") == {"to": "fp8", "scope": "linear", "layout": "deepseek"}
    assert of(to="bf16") == {"to": "bf16"}
    assert of(to="int4", classes=("attention",))["scope"] == "linear"
    assert of(to="int4", match=("x",), scope="projections")["scope"] == "projections"


def test_a_grid_or_layout_said_once_holds_for_all_rules_of_the_format() -> None:
    """One is enough; two that differ are refused by both places; beside INT4, FP8 has the layout with groups."""
    first, second = WrittenRule(to="int4", match=("a",)), WrittenRule(to="int4", grid="compressed-tensors")
    assert {rule.grid for rule in in_force((first, second))} == {"compressed-tensors"}
    with pytest.raises(UsageError, match="B: grid compressed-tensors, where A: grid moonshot stands for int4 too"):
        in_force((replace(first, grid="moonshot", place="A"), replace(second, place="B")))
    beside = in_force((first, WrittenRule(to="fp8")))
    assert beside[1].layout == "compressed-tensors"
    assert in_force((first, WrittenRule(to="fp8", layout="deepseek")))[1].layout == "deepseek"  # the config refuses it


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ({"to": "bf16", "scope": "experts"}, "scope.*no meaning with bf16 alone.*becomes BF16"),
        ({"to": "bf16", "classes": ("norm",)}, "classes.*no meaning with bf16 alone"),
        ({"to": "fp8", "grid": "moonshot"}, "grid.*no meaning with fp8: it is the rounding rule of INT4"),
        ({"to": "int4", "layout": "deepseek"}, "layout.*no meaning with int4: .* of FP8"),
    ],
)
@pytest.mark.parametrize(("place", "how"), [("", r"^`\w+=` "), ("r.yaml: rule 1", "^r.yaml: rule 1: ")])
def test_what_has_no_meaning_for_a_format_is_refused(rule: dict[str, Any], said: str, place: str, how: str) -> None:
    """By the argument's name, or by the rule's place."""
    with pytest.raises(UsageError, match=said):
        in_force((WrittenRule(**rule, place=place),))
    with pytest.raises(UsageError, match=how):
        in_force((WrittenRule(**rule, place=place),))


def test_what_journals_say_of_plain_options_has_not_changed() -> None:
    """Those of releases without recipes go on: the same keys and values, and no rules."""
    assert Options("int4", "experts", ("a",), shard_size=5).as_json() == {
        "to": "int4",
        "scope": "experts",
        "ignore": ["a"],
        "grid": None,
        "shard_size": 5,
        "layout": None,
        "allow_split": False,
    }


def test_a_plain_recipe_is_the_arguments_that_say_the_same() -> None:
    """So a folder that one began the other goes on with; options and permission stand in either, not in both."""
    recipe = read("rules: [{to: int4, grid: compressed-tensors, ignore: [a]}]\nshard_size: 5MB")
    plain = Options("int4", None, ("a",), "compressed-tensors", 5 * 10**6)
    assert options_of(recipe).as_json() == plain.as_json()
    assert options_of(recipe, allow_split=True).allow_split
    with pytest.raises(UsageError, match=r"`to=`, `shard_size=` beside `recipe=`"):
        options_of(recipe, to="int4", shard_size=1)
    with pytest.raises(UsageError, match="a recipe says in its rules what `grid=` would"):
        Options(rules=recipe.rules, grid="moonshot")
    with pytest.raises(UsageError, match=r"say which format to write, `to=`, or by which recipe, `recipe=`"):
        Options()


# --- random rules ---

NAMES = (
    "mlp.experts.0.up_proj",
    "mlp.experts.1.up_proj",
    "mlp.shared_experts.up_proj",
    "self_attn.o_proj",
    "self_attn.kv_b_proj",
    "mlp.gate",
    "input_layernorm",
)
HELD = [
    StoredWeight(base, Bf16(), (64, 64), {"weight": TensorEntry(f"{base}.weight", "BF16", (64, 64), "a", 0, 8192)})
    for base in (f"model.layers.{layer}.{name}" for layer in (1, 2) for name in NAMES)
]
PATTERNS = [r"layers\.1\.", r"experts\.1\.", "o_proj", "mlp", r"norm$"]
RULES = some.builds(
    WrittenRule,
    to=some.sampled_from(["bf16", "fp8", "int4", "nvfp4", "mxfp4"]),
    scope=some.sampled_from([None, None, "experts", "linear", "projections"]),
    classes=some.lists(some.sampled_from(TENSOR_CLASSES[:6]), max_size=2, unique=True).map(tuple),
    match=some.lists(some.sampled_from(PATTERNS), max_size=2, unique=True).map(tuple),
    ignore=some.lists(some.sampled_from(PATTERNS), max_size=1).map(tuple),
    method=some.sampled_from([None, None, "rtn", "mse"]),
)


@given(some.lists(RULES, min_size=1, max_size=4))
def test_the_first_rule_that_takes_a_weight_counts(rules: list[WrittenRule]) -> None:
    """Whatever rules: a weight has the format of the first whose classes, patterns and scope it meets, or none.

    What was in force, written as JSON and read again, says the same and makes the same; so do a journal's options.
    """
    try:
        recipe, resolved = make_recipe(rules, HELD), in_force(tuple(rules))
    except (UsageError, CheckpointError):  # one that takes nothing, or has no meaning
        return
    for weight in HELD:
        wanted = next((rule.to for rule in resolved if _takes(rule, weight.base)), None)
        found = recipe.rule_of(weight)
        assert (found.format.name if found else None) == wanted
    written = WrittenRecipe(rules=resolved).as_json(methods=True)
    again = read_recipe(json.loads(json.dumps(written)))
    assert again.rules == resolved == in_force(again.rules)
    options = options_of(WrittenRecipe(rules=tuple(rules)))
    assert options_from(json.loads(json.dumps(options.as_json()))).in_force == options.in_force


def _takes(rule: WrittenRule, base: str) -> bool:
    """Tell, in other words than the recipe's, whether a rule takes a weight."""
    last = base.partition("layers.")[2].partition(".")[2]
    takes = {
        None: True,
        "experts": "mlp.experts" in last,
        "linear": last.endswith("proj") and not ("kv_b" in last and rule.to not in {"bf16", "fp8"}),
        "projections": last.endswith("proj"),
    }[rule.scope]
    named = not rule.match or any(pattern.replace("\\", "").rstrip("$") in base for pattern in rule.match)
    spared = any(pattern.replace("\\", "").rstrip("$") in base for pattern in rule.ignore)
    return takes and named and not spared and (not rule.classes or tensor_class(f"{base}.weight") in rule.classes)


def test_lines_of_yaml_are_known_however_it_is_written() -> None:
    """Flow and block style, comments in between."""
    with pytest.raises(UsageError, match=r"rule 2 \(line 6\): unknown key 'x'"):
        read("# a comment\nrules:\n- to: int4\n# another\n- to: fp8\n  x: 1\n")
    assert isinstance(parse_recipe(b"rules: [{to: int4}]", file="r").as_json(), Mapping)
