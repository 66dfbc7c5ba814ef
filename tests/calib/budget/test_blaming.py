"""What blame measured of groups is shared out among their units; a divergence is promised only by it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

import k2quant
from k2quant.calib import allot
from k2quant.calib.budget.blaming import Damage, Share, matching, read_damage, shared_out
from k2quant.calib.budget.units import Unit
from k2quant.checkpoint.header import TensorEntry
from k2quant.checkpoint.weights import StoredWeight
from k2quant.errors import MalformedResults, UsageError


def blame(
    classes: dict[str, float], suspects: dict[str, float], *, kl: float = 0.5, changed: int = 24
) -> dict[str, Any]:
    """Return the JSON of a blame, as far as it matters here."""

    def group(name: str, share: float) -> dict[str, Any]:
        return {"name": name, "tensors": 1, "share": share, "interval": [share, share]}

    return {
        "schema": 1,
        "kind": "blame",
        "damage": {"value": kl, "error": 0.01},
        "changed": changed,
        "classes": [group(*one) for one in classes.items()],
        "suspects": [group(*one) for one in suspects.items()],
    }


def written(folder: Path, content: Any) -> Path:
    """Write a blame's file."""
    path = folder / "blame.json"
    path.write_text(json.dumps(content))
    return path


def unit(name: str, *bases: str) -> Unit:
    """Return a unit of matrices of equal size."""
    entries = [TensorEntry(f"{base}.weight", "BF16", (2, 32), "one", 0, 128) for base in bases or (f"model.{name}",)]
    return Unit(
        name,
        tuple(StoredWeight(each.name.removesuffix(".weight"), None, (2, 32), {"weight": each}) for each in entries),
        {"int4": 1, "fp8": 2, "bf16": 4},
    )


EXPERTS = tuple(f"model.layers.{{}}.mlp.experts.{n}.up_proj" for n in range(4))
UNITS = [
    unit("layers.0.self_attn.o_proj"),
    unit("layers.1.self_attn.o_proj"),
    *(unit(f"layers.{layer}.mlp.experts", *(base.format(layer) for base in EXPERTS)) for layer in (1, 2)),
]
ERRORS = {"layers.0.self_attn.o_proj": 1.0, "layers.1.self_attn.o_proj": 3.0, "layers.1.mlp.experts": 2.0} | {
    "layers.2.mlp.experts": 6.0
}


def shared(classes: dict[str, float], suspects: dict[str, float]) -> list[float]:
    """Return what the units get of a divergence of 1, in their order."""
    groups, finer = (tuple(Share(*one) for one in each.items()) for each in (classes, suspects))
    damage = Damage(1.0, groups, finer, 10, "")
    found = shared_out(damage, UNITS, ERRORS)
    assert math.isclose(sum(found.values()), 1)
    return [found[one.name] for one in UNITS]


def test_without_groups_errors_say_it_all() -> None:
    """Everything is shared out by them."""
    assert shared({}, {}) == pytest.approx([1 / 12, 3 / 12, 2 / 12, 6 / 12])


def test_within_a_class_errors_share_it_out() -> None:
    """What no class explains goes to those of none."""
    assert shared({"attention": 0.8}, {}) == pytest.approx([0.2, 0.6, 0.2 * 2 / 8, 0.2 * 6 / 8])


def test_a_suspect_has_its_own_share() -> None:
    """The rest of its class goes to the class's others; of a suspect that is part of a unit the unit has it."""
    found = shared({"attention": 0.8, "routed experts": 0.2}, {"model.layers.0.self_attn.o_proj": 0.7})
    assert found == pytest.approx([0.7, 0.1, 0.05, 0.15])
    found = shared({"routed experts": 1.0}, {"experts 1-2 of layer 1": 0.6})
    assert found == pytest.approx([0, 0, 0.6 + 0.4 * 1 / 7, 0.4 * 6 / 7])


def test_a_suspect_within_another_has_its_share_of_it() -> None:
    """Whichever stands first: the inner one has its own, the others of the outer one what is left of that."""
    inner, outer = ("model.layers.1.self_attn.o_proj", 0.5), ("attention", 0.8)
    for suspects in (dict([inner, outer]), dict([outer, inner])):
        assert shared({"attention": 0.8}, suspects) == pytest.approx([0.3, 0.5, 0.2 / 4, 0.2 * 3 / 4])


def test_shares_of_more_than_all_are_scaled_down() -> None:
    """Effects overlap: nothing comes out below 0, and all together is what was measured."""
    found = shared({"attention": 1.0, "routed experts": 1.0}, {})
    assert found == pytest.approx([0.5 / 4, 0.5 * 3 / 4, 0.5 / 4, 0.5 * 3 / 4])
    found = shared({"attention": 0.2}, {"attention of layer 1": 1.5, "routed experts of layer 2": 1.5})
    assert found == pytest.approx([0, 0.5, 0, 0.5])


def test_groups_that_name_nothing_here_explain_nothing() -> None:
    """A class that is not in scope, or a title that nobody gives."""
    assert shared({"router": 0.5}, {"what is this": 0.3}) == pytest.approx(shared({}, {}))


@pytest.mark.parametrize(
    ("title", "meant"),
    [
        ("attention", [0, 1]),
        ("routed experts of layers 1, 3-5", [2]),
        ("routed experts of layers 0-7 and outside them", [2, 3]),
        ("routed experts of layer 2", [3]),
        ("expert 3 of layer 2", [3]),
        ("experts 0, 2-3 of layer 1", [2]),
        ("experts 4-7 of layer 1", []),
        ("gate_proj, up_proj of expert 0 of layer 1", [2]),
        ("kv_b_proj, o_proj of layer 1", [1]),
        ("model.layers.1.self_attn.o_proj", [1]),
        ("model.layers.1.self_attn.q_b_proj", []),
    ],
)
def test_every_title_of_a_group_is_understood(title: str, meant: list[int]) -> None:
    """As `eval blame` names groups: classes, layers, experts, matrices of one place, and single weights."""
    told = matching(title)
    assert told is not None
    found = [n for n, one in enumerate(UNITS) if any(told(weight.base) for weight in one.weights)]
    assert found == meant


def test_titles_are_those_that_blame_gives() -> None:
    """Its own words for groups of a model's weights, of every size, mean just these weights here."""
    from k2quant.eval.drift.suspects import _title
    from k2quant.model.passes.mixture import Part

    bases = [f"model.layers.{n}.self_attn.{name}" for n in range(3) for name in ("o_proj", "q_b_proj", "kv_b_proj")]
    bases += [
        f"model.layers.{n}.mlp.experts.{e}.{name}_proj" for n in (1, 2) for e in range(3) for name in ("up", "down")
    ]
    changed = [Part(base, *(StoredWeight(base, Any, (1,), {}),) * 2) for base in bases]  # type: ignore[arg-type]
    groups = [
        slice(0, 9),
        slice(0, 3),
        slice(0, 2),
        slice(3, 9),
        slice(9, 21),
        slice(9, 15),
        slice(9, 11),
        slice(9, 13),
    ]
    groups += [slice(9, 10), slice(4, 5)]
    for group in groups:
        title = _title(changed[group], changed)
        told = matching(title)
        assert told is not None, title
        assert [base for base in bases if told(base)] == bases[group], title


def test_a_divergence_is_met_by_what_was_measured(small: Any, tmp_path: Path) -> None:
    """Units are raised until what is foreseen is as small as asked, those first that blame names; errors are nats."""
    file = written(tmp_path, blame({"attention": 0.9}, {"o_proj, q_b_proj of layer 2": 0.8}, changed=45))
    found = allot(small.source, small.stats, scope="linear", max_kl=0.2, blame=file)
    assert (found.measure, found.asked) == ("kl", {"kl": 0.2})
    assert found.before == pytest.approx(0.5)
    assert found.after <= 0.2
    raised = [one.unit for one in found.ranked if one.format != "int4"]
    assert set(raised) == {"layers.2.self_attn.o_proj", "layers.2.self_attn.q_b_proj"}
    assert found.as_json()["blame"] == read_damage(file).sha256
    easy = allot(small.source, small.stats, scope="linear", max_kl=0.6, blame=file)
    assert {one.format for one in easy.ranked} == {"int4"}
    hard = allot(small.source, small.stats, scope="linear", max_kl=1e-9, blame=file)
    assert hard.after <= 1e-9
    assert "int4" not in {one.format for one in hard.ranked if one.errors["int4"] > 1e-9}


def test_blame_of_other_weights_is_refused(small: Any, tmp_path: Path) -> None:
    """Of the routed experts alone, say, where all projections are in scope; a budget takes blame too."""
    file = written(tmp_path, blame({}, {}, changed=24))
    assert allot(small.source, small.stats, budget=6, blame=file).measure == "kl"
    with pytest.raises(UsageError, match="in which 24 weights are stored otherwise, and INT4 alone would change 45"):
        allot(small.source, small.stats, scope="linear", budget=6, blame=file)


def test_what_else_int4_changes_is_counted_with_it(small_fp8: Any, tmp_path: Path) -> None:
    """Of FP8 the rest becomes BF16: as many weights as a conversion to INT4 stores otherwise, none of them copied."""
    done = k2quant.convert(small_fp8.source, tmp_path / "int4", "int4")
    changed = sum(facts["to"] is not None for facts in done.report["tensors"].values())
    assert changed > 24
    file = written(tmp_path, blame({}, {}, changed=changed))
    assert allot(small_fp8.source, small_fp8.stats, budget=6, blame=file).measure == "kl"


@pytest.mark.parametrize(
    "damaged",
    [
        {"schema": 2},
        {"kind": "fidelity"},
        {"damage": None},
        {"damage": {"value": float("nan")}},
        {"damage": {"value": -1.0}},
        {"changed": -1},
        {"classes": {}},
        {"suspects": [{"name": 3, "share": 0.5}]},
        {"suspects": [{"name": "attention", "share": "all"}]},
        {"suspects": [{"name": "attention"}]},
    ],
    ids=lambda one: next(iter(one)),
)
def test_what_blame_does_not_write_is_refused(tmp_path: Path, damaged: dict[str, Any]) -> None:
    """By name, whatever is wrong; a part that is missing too."""
    file = written(tmp_path, blame({"attention": 0.5}, {}) | damaged)
    with pytest.raises(MalformedResults, match=r"blame\.json"):
        read_damage(file)
    missing = {key: value for key, value in blame({}, {}).items() if key not in damaged}
    with pytest.raises(MalformedResults, match=r"blame\.json"):
        read_damage(written(tmp_path, missing))


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    """A folder, nothing at all, or no JSON."""
    (tmp_path / "text").write_text("{")
    for path in (tmp_path, tmp_path / "none", tmp_path / "text"):
        with pytest.raises(MalformedResults):
            read_damage(path)
