"""From bits a weight to a recipe: which units are raised, that none is split, and what is said of it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import k2quant
from k2quant.calib import Allotment, allot
from k2quant.checkpoint.reader import open_checkpoint
from k2quant.conversion.plan import Plan, make_plan, options_of
from k2quant.conversion.recipes.rules import in_force, recipe_from
from k2quant.errors import CheckpointError, DestinationStale, UsageError
from k2quant.ground import engines
from k2quant.ground.patterns import may_take_for_ever

SCOPES = ("experts", "linear", "projections")


def plan_of(small: Any, found: Allotment) -> Plan:
    """Plan the conversion that a choice asks for."""
    return make_plan(open_checkpoint(small.source), options_of(found.recipe))


def formats(plan: Plan) -> dict[str, str]:
    """Return the format in which each projection is written."""
    return {job.name: job.written.name for job in plan.jobs() if job.written and job.name.endswith("_proj")}


def bits(plan: Plan, found: Allotment) -> float:
    """Return the bits a weight of what is in scope, from the tensors that the plan places."""
    units = {one.unit for one in found.ranked}
    jobs = [job for job in plan.jobs() if unit_of(job.name) in units]
    nbytes = sum(entry.nbytes for job in jobs for entry in job.outputs.values())
    sizes = (job.weight.shape[0] * job.weight.shape[1] for job in jobs)
    return 8 * nbytes / sum(sizes)


def unit_of(base: str) -> str:
    """Return what a ranking calls the unit of a weight."""
    whole = engines.fused(base)
    return whole.name if whole else base.removeprefix("model.")


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("budget", [4.6, 5.5, 7.0, 8.5, 13.0])
def test_bits_are_kept_and_no_unit_is_split(small: Any, scope: Any, budget: float) -> None:
    """Whatever is asked for: no more bits than that, as counted in the plan, and nothing that engines fuse is split."""
    found = allot(small.source, small.stats, scope=scope, budget=budget)
    plan = plan_of(small, found)
    assert found.least <= found.bits <= budget
    assert bits(plan, found) == pytest.approx(found.bits)
    written = formats(plan)
    assert not engines.splits(written.items())
    chosen = {one.unit: one.format for one in found.ranked}
    assert {base: chosen.get(unit_of(base), "bf16") for base in written} == written


def test_more_bits_leave_less_error(small: Any) -> None:
    """From INT4 alone to nothing lost, never the other way; what is asked for is said."""
    least = allot(small.source, small.stats, scope="projections", budget=16).least
    asked = (least, 5.0, 6.0, 7.0, 9.0, 16.0)
    found = [allot(small.source, small.stats, scope="projections", budget=each) for each in asked]
    assert [one.asked for one in found] == [{"bits": each} for each in asked]
    errors = [one.after for one in found]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] == found[0].before
    assert errors[-1] == 0
    assert len(set(errors)) == len(errors)
    assert {one.format for one in found[0].ranked} == {"int4"}


def test_what_int4_spoils_most_a_byte_comes_first(small: Any) -> None:
    """A matrix with planted outliers leads the ranking, and is raised before all others."""
    found = allot(small.source, small.stats, scope="linear", budget=4.7)
    first = found.ranked[0]
    assert (first.unit, first.kind, first.layer, first.tensors) == ("layers.0.self_attn.o_proj", "attention", 0, 1)
    assert first.format != "int4"
    assert re.fullmatch(r"(fp8|bf16): takes away \S+ a MB, above the cut", first.reason)
    gains = [one.gain for one in found.ranked if one.gain is not None]
    assert gains == sorted(gains, reverse=True)
    last = found.ranked[-1]
    assert (last.format, last.reason.endswith("below the cut")) == ("int4", True)
    cut = min(float(one.reason.split()[3]) for one in found.ranked if one.reason.endswith("above the cut"))
    for one in found.ranked:
        if one.format == "int4":
            assert one.gain is not None
            assert one.reason.endswith("no room for it" if one.gain > cut else "below the cut")


def test_the_same_input_gives_the_same_choice(small: Any, tmp_path: Path) -> None:
    """To the last bit, with any number of threads, and where the same weights lie in other files in another order."""
    moved = k2quant.convert(small.source, tmp_path / "moved", "bf16", shard_size=3000).folder
    assert len(list(moved.glob("*.safetensors"))) > 10
    one = allot(small.source, small.stats, scope="linear", budget=6, workers=1)
    for source, workers in ((small.source, 3), (moved, 2)):
        other = allot(source, small.stats, scope="linear", budget=6, workers=workers)
        assert other.as_json() == one.as_json()
        assert other.rules == one.rules


def test_it_converts_and_the_report_says_why(small: Any, tmp_path: Path) -> None:
    """What is written loads as mixed formats and verifies; the report has the ranking, and a recipe that repeats it."""
    found = allot(small.source, small.stats, scope="linear", budget=6)
    done = k2quant.convert(small.source, tmp_path / "out", recipe=found.recipe, stats=small.stats)
    assert done.report["options"]["to"] == "int4"
    assert done.report["budget"] == json.loads(json.dumps(found.as_json()))
    assert done.report["budget"]["stats"] == done.report["method"]["stats"]
    read = {weight.base: weight.format.name for weight in weights_of(done.folder) if weight.format}
    chosen = {one.unit: one.format for one in found.ranked}
    assert len(set(chosen.values())) > 1
    assert all(read[base] == chosen[unit_of(base)] for base in read if unit_of(base) in chosen)
    config = json.loads((done.folder / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    assert not k2quant.verify(small.source, done.folder).failures
    again = recipe_from(done.report)
    assert again.rules == in_force(found.rules)
    assert again.budget is None  # it is a recipe as any other now


def test_what_is_out_of_scope_stays_as_it_is(small: Any) -> None:
    """Floats of another dtype too, whatever is raised: no rule of a budget takes them."""
    found = allot(small.source, small.stats, scope="linear", budget=13)
    assert {one.format for one in found.ranked} >= {"fp8", "bf16"}
    job = next(job for job in plan_of(small, found).jobs() if job.name == "model.norm")
    assert (job.weight.main.dtype, job.target) == ("F32", None)


def weights_of(folder: Path) -> list[Any]:
    """Return the weights of a checkpoint."""
    from k2quant.checkpoint.weights import group_tensors

    return group_tensors(open_checkpoint(folder).tensors).weights


def test_another_choice_is_another_run(small: Any, tmp_path: Path) -> None:
    """It is refused where one stands; a budget that comes to the same rules goes on with what is there."""
    one, same, other = (allot(small.source, small.stats, budget=each, method="rtn") for each in (6.5, 6.6, 9.0))
    assert one.rules == same.rules != other.rules
    k2quant.convert(small.source, tmp_path / "out", recipe=one.recipe)
    assert k2quant.convert(small.source, tmp_path / "out", recipe=same.recipe).already_done
    with pytest.raises(DestinationStale, match="other options"):
        k2quant.convert(small.source, tmp_path / "out", recipe=other.recipe)


@pytest.mark.parametrize("budget", [4.6, 6.0, 8.1])
def test_fp8_that_stays_is_copied_and_the_rest_comes_out_as_ever(small_fp8: Any, tmp_path: Path, budget: float) -> None:
    """A raised unit keeps the source's own codes; weights out of scope become BF16, as they do without a budget."""
    found = allot(small_fp8.source, small_fp8.stats, budget=budget)
    assert {one.format for one in found.ranked} <= {"int4", "fp8"}
    assert all(one.errors["fp8"] == 0 for one in found.ranked)
    plan, plain = plan_of(small_fp8, found), make_plan(open_checkpoint(small_fp8.source), k2quant_options())
    raised = {one.unit for one in found.ranked if one.format == "fp8"}
    for job, ever in zip(plan.jobs(), plain.jobs(), strict=True):
        assert job.name == ever.name
        wanted = "fp8" if unit_of(job.name) in raised else ever.written and ever.written.name
        assert (job.written and job.written.name) == wanted, job.name
    if raised:
        out = k2quant.convert(
            small_fp8.source, tmp_path / "out", recipe=found.recipe, stats=small_fp8.stats if found.searches else None
        )
        facts = out.report["tensors"]["model.layers.1.mlp.experts.0.up_proj.weight"]
        assert "figures" not in facts or unit_of("model.layers.1.mlp.experts.0.up_proj") not in raised


def k2quant_options() -> Any:
    """Return what plain INT4 asks for."""
    from k2quant.conversion.plan import Options

    return Options(to="int4")


def test_int4_that_is_there_is_copied(small: Any, standing: Any, tmp_path: Path, measured: Callable[..., Path]) -> None:
    """It is counted, and never raised; where nothing else is in scope there is nothing to choose."""
    native = k2quant.convert(small.source, tmp_path / "native", "int4").folder
    stats = measured(standing, native, "stats-native")
    found = allot(native, stats, scope="linear", budget=8)
    copied = [one for one in found.ranked if one.kind == "routed experts"]
    assert {(one.format, one.reason, one.gain) for one in copied} == {
        ("int4", "int4: in the source already, copied", None)
    }
    assert any(one.format != "int4" for one in found.ranked)
    with pytest.raises(UsageError, match="every weight in scope is INT4 already"):
        allot(native, stats, budget=8)


def test_what_was_not_measured_stays_int4(
    small: Any, standing: Any, tmp_path: Path, measured: Callable[..., Path], written: Callable[..., Path]
) -> None:
    """Layers that the pass does not reach are counted and said, come last, and change no other unit's place."""
    source = written(tmp_path / "mtp", more=1)
    stats = measured(standing, source, "stats-mtp", layers=3)
    found, plain = (allot(each, known, budget=7) for each, known in ((source, stats), (small.source, small.stats)))
    last = found.ranked[-1]
    assert (last.unit, last.format, last.errors, last.gain) == ("layers.3.mlp.experts", "int4", {}, None)
    assert last.reason == "int4: not measured by the calibration"
    assert [one.unit for one in found.ranked[:-1]] == [one.unit for one in plain.ranked]
    assert found.as_json()["weights"] == plain.as_json()["weights"] * 3 // 2


def test_what_is_not_finite_is_refused_by_name(
    standing: Any, tmp_path: Path, measured: Callable[..., Path], written: Callable[..., Path]
) -> None:
    """Also in a matrix that no budget decides about, but that writes to the residual stream."""
    source = written(tmp_path / "broken")
    weight = next(each for each in weights_of(source) if each.base == "model.layers.0.self_attn.o_proj")
    with (source / weight.main.file).open("r+b") as file:
        file.seek(weight.main.start)
        file.write(b"\x80\x7f")
    stats = measured(standing, source, "stats-broken")
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.self_attn\.o_proj"):
        allot(source, stats, budget=7)


def test_patterns_are_few_and_harmless() -> None:
    """Those of all of K2's layers: as a file may have them, each found in the names that are meant and in no others."""
    from k2quant.calib.budget.units import Unit
    from k2quant.calib.budget.wording import patterns

    layers = [0, *range(2, 61, 3), 100]
    bases = [
        f"language_model.model.layers.{layer}.self_attn.{name}" for layer in layers for name in ("o_proj", "q_b_proj")
    ]
    bases += [f"model.layers.{layer}.mlp.experts.{n}.up_proj" for layer in range(61) for n in (0, 383)]
    found = patterns([Unit("all", tuple(_named(base) for base in bases), {"int4": 1})])
    assert len(found) == 3
    assert not any(map(may_take_for_ever, found))
    recipe_from({"rules": [{"to": "int4"}, {"to": "fp8", "match": list(found)}]})
    others = [
        "model.layers.1.self_attn.o_proj",
        "language_model.model.layers.10.self_attn.o_proj",
        "xmodel.layers.0.mlp",
    ]
    others += ["model.layers.61.mlp.experts.0.up_proj", "model.layers.0.mlp.experts.0.up_projx"]
    assert all(any(re.search(each, base) for each in found) for base in bases)
    assert not any(re.search(each, base) for each in found for base in others)


def _named(base: str) -> Any:
    from k2quant.checkpoint.weights import StoredWeight

    return StoredWeight(base, None, (1, 1), {})


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "say what the output may cost, `budget=`"),
        ({"budget": 5.0, "max_kl": 1.0}, "say what the output may cost"),
        (
            {"budget": 4.4},
            r"`budget=` 4.4: these 49,152 weights take 4\.\d+ bits each in INT4, scales counted, and 16.0000",
        ),
        ({"budget": 16.1}, "and 16.0000 in BF16; ask for something between"),
        ({"budget": float("nan")}, "expected a number above 0"),
        ({"budget": 0}, "expected a number above 0"),
        ({"budget": True}, "expected a number above 0"),
        ({"budget": 5.0, "to": "fp8"}, "found `to=` fp8"),
        ({"max_kl": 0.1}, "`max_kl=` needs `blame=`"),
        ({"budget": 5.0, "method": "best"}, "method"),
        ({"budget": 5.0, "ignore": ("nowhere",)}, "found in no name"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_no_choice_meets_is_refused(small: Any, asked: dict[str, Any], message: str) -> None:
    """With the numbers, before anything is measured where that can be."""
    with pytest.raises(UsageError, match=message):
        allot(small.source, small.stats, **asked)


def test_statistics_of_another_model_are_refused(small: Any, small_fp8: Any, tmp_path: Path) -> None:
    """And so are damaged ones."""
    with pytest.raises(CheckpointError, match="was calibrated in other tensors"):
        allot(small.source, small_fp8.stats, budget=6)
    broken = shutil.copytree(small.stats, tmp_path / "broken")
    file = broken / "layer-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(CheckpointError, match="changed since it was written"):
        allot(small.source, broken, budget=6)


def test_it_shows_itself_in_a_line(small: Any) -> None:
    """However many units there are; each of them too."""
    found = allot(small.source, small.stats, scope="linear", budget=6)
    assert re.fullmatch(r"Allotment\(bits='\d\.\d+', fp8=\d+, bf16=\d+, int4=\d+, error='\S+ -> \S+'\)", repr(found))
    assert "\n" not in repr(found.ranked[0])
    assert "<table>" in found._repr_html_()
