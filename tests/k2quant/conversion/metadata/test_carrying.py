"""What a source says beyond its weights: what of it the output keeps, and what is said of the rest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import k2quant
from k2quant.checkpoint.reader import CONFIG, INDEX, open_checkpoint
from k2quant.checkpoint.writing.in_memory import Shard, write_checkpoint
from k2quant.cli import main
from k2quant.conversion.plan import Options, Plan, make_plan
from k2quant.errors import (
    CheckpointError,
    CheckpointWarning,
    DtypeMismatch,
    MalformedFile,
    ShapeMismatch,
    UnsafePath,
    UnsupportedFormat,
)
from k2quant.formats.format import Layout
from k2quant.formats.known import FormatName
from k2quant.model import load_model
from k2quant.nano.demo import K2_CONFIG

LAYER = "model.layers.1"
EXPERTS = [f"{LAYER}.mlp.experts.{number}.up_proj" for number in range(2)]
ATTENTION = f"{LAYER}.self_attn"
SCALE = ("F32", np.full((1,), 0.5, np.float32))

KV: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
STATIC: dict[str, Any] = {**KV, "strategy": "tensor"}
DYNAMIC: dict[str, Any] = {**KV, "strategy": "token", "dynamic": True}
WEIGHTS: dict[str, Any] = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
FP8_BLOCK: dict[str, Any] = K2_CONFIG["quantization_config"]

CACHE: Shard = {f"{ATTENTION}.k_scale": SCALE, f"{ATTENTION}.v_scale": SCALE}
INPUTS: Shard = {f"{base}.input_scale": SCALE for base in EXPERTS}


def int4_block(*, group: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """Return Moonshot's INT4 block, with changes to its one group and to itself."""
    groups = {"group_0": {"targets": ["Linear"], "weights": WEIGHTS, **(group or {})}}
    fixed = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups, "ignore": []}
    return fixed | changes


def fp8(base: str) -> Shard:
    """Return a block-FP8 weight of 64 x 64 ones."""
    return {
        f"{base}.weight": ("F8_E4M3", np.full((64, 64), 0x38, np.uint8)),
        f"{base}.weight_scale_inv": ("F32", np.ones((1, 1), np.float32)),
    }


def int4(base: str) -> Shard:
    """Return an INT4 weight of 64 x 64 ones."""
    return {
        f"{base}.weight_packed": ("I32", np.full((64, 8), 0x99999999, np.uint32).view(np.int32)),
        f"{base}.weight_scale": ("BF16", np.full((64, 2), 0x3F80, np.uint16)),
        f"{base}.weight_shape": ("I32", np.array([64, 64], np.int32)),
    }


def bf16(base: str) -> Shard:
    """Return a BF16 weight of 64 x 64 ones."""
    return {f"{base}.weight": ("BF16", np.full((64, 64), 0x3F80, np.uint16))}


def written(folder: Path, block: dict[str, Any] | None, *shards: Shard, **config: Any) -> Path:
    """Write a checkpoint of these tensors with a quantization block."""
    tensors: Shard = {name: tensor for shard in shards for name, tensor in shard.items()}
    blocks = {} if block is None else {"quantization_config": block}
    write_checkpoint(folder, {"model.safetensors": tensors}, {"model_type": "kimi_k2", **blocks, **config})
    return folder


def fp8_source(folder: Path, *more: Shard, **block: Any) -> Path:
    """Write two FP8 experts with whatever more, and a block with changes."""
    return written(folder, FP8_BLOCK | block, *map(fp8, EXPERTS), *more)


def int4_source(folder: Path, *more: Shard, group: dict[str, Any] | None = None, **block: Any) -> Path:
    """Write two INT4 experts with whatever more, and a block with changes."""
    return written(folder, int4_block(group=group, **block), *map(int4, EXPERTS), *more)


def planned(folder: Path, to: FormatName, *, substituted: bool = False, layout: Layout | None = None) -> Plan:
    """Plan a conversion."""
    return make_plan(open_checkpoint(folder), Options(to=to, layout=layout), substituted=substituted)


def block_of(plan: Plan) -> dict[str, Any]:
    """Return the quantization block that a plan writes; an empty one where it writes none."""
    config: dict[str, Any] = json.loads(plan.config or b"{}")
    found: dict[str, Any] = config.get("quantization_config", {})
    return found


def names_of(plan: Plan) -> set[str]:
    """Return the names of the tensors that a plan writes."""
    return {entry.name for job in plan.jobs() for entry in job.outputs.values()}


# --- a re-cut ---------------------------------------------------------------------------------------------------------


def test_scales_that_are_only_widened_leave_the_codes_as_they_were(tmp_path: Path) -> None:
    """FP8 with scales of exponents alone gets float32 ones: a key of which k2quant knows nothing is as true as before.

    Of codes that are made anew it may be wrong, and is refused.
    """
    shards = [fp8(base) | {f"{base}.weight_scale_inv": ("F8_E8M0", np.full((1, 1), 127, np.uint8))} for base in EXPERTS]
    source = written(tmp_path / "source", FP8_BLOCK | {"strange": 1}, *shards)
    assert block_of(planned(source, "fp8"))["strange"] == 1
    with pytest.raises(UnsupportedFormat, match="strange"):
        planned(source, "int4")


def test_a_recut_of_fp8_keeps_its_block_to_the_letter(tmp_path: Path) -> None:
    """The kind: keys that are dropped. Static activations, ue8m0, the KV cache, and what k2quant does not know."""
    block = {
        "activation_scheme": "static",
        "fmt": "e4m3",
        "kv_cache_scheme": KV,
        "of_a_later_day": {"a": [1]},
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
        "dequantize": True,
    }
    source = written(tmp_path / "src", block, *map(fp8, EXPERTS), CACHE, INPUTS)
    report = k2quant.convert(source, tmp_path / "out", to="fp8", shard_size=5000).report
    found = json.loads((tmp_path / "out" / CONFIG).read_text())["quantization_config"]
    assert list(found.items()) == list(block.items())
    assert open_checkpoint(tmp_path / "out").tensors.keys() == open_checkpoint(source).tensors.keys()
    assert report["remarks"] == []
    assert k2quant.verify(source, tmp_path / "out").passed


def test_a_recut_of_int4_keeps_what_its_block_means(tmp_path: Path) -> None:
    """The kind: keys that are dropped. Activations, the KV cache, versions and the history of the codes go along."""
    weights = WEIGHTS | {"actorder": "static", "observer": "mse", "observer_kwargs": {"maxshrink": 0.2}}
    more = {"kv_cache_scheme": KV, "version": "0.15.0", "global_compression_ratio": 1.5, "of_a_later_day": 7}
    group = {"weights": weights, "input_activations": STATIC, "output_activations": DYNAMIC}
    source = int4_source(tmp_path / "src", CACHE, INPUTS, group=group, **more)
    report = k2quant.convert(source, tmp_path / "out", to="int4", shard_size=5000).report
    found = json.loads((tmp_path / "out" / CONFIG).read_text())["quantization_config"]
    assert {key: found[key] for key in more} == more
    written_group = found["config_groups"]["group_0"]
    assert (written_group["input_activations"], written_group["output_activations"]) == (STATIC, DYNAMIC)
    assert written_group["weights"].items() >= weights.items()
    assert open_checkpoint(tmp_path / "out").tensors.keys() == open_checkpoint(source).tensors.keys()
    assert report["remarks"] == []
    assert k2quant.verify(source, tmp_path / "out").passed


def test_groups_of_one_format_that_differ_keep_their_targets(tmp_path: Path) -> None:
    """Two INT4 groups, one with quantised activations: a re-cut keeps both, all else says what it drops."""
    groups = {
        "a": {"targets": [EXPERTS[0]], "weights": WEIGHTS, "input_activations": DYNAMIC},
        "b": {"targets": [EXPERTS[1]], "weights": WEIGHTS, "input_activations": None},
    }
    source = int4_source(tmp_path / "src", bf16(f"{LAYER}.mlp.experts.2.up_proj"), config_groups=groups)
    plan = planned(source, "int4")
    assert [group["input_activations"] for group in block_of(plan)["config_groups"].values()] == [None]
    assert "input_activations" in plan.remarks[0]
    plan = planned(int4_source(tmp_path / "all", config_groups=groups), "int4")
    assert block_of(plan)["config_groups"] == groups
    assert plan.remarks == ()


FP8_WEIGHTS: dict[str, Any] = {
    "num_bits": 8,
    "type": "float",
    "symmetric": True,
    "strategy": "block",
    "block_structure": [128, 128],
}
FP8_INPUTS: dict[str, Any] = {**KV, "strategy": "group", "group_size": 128, "dynamic": True}


def other_fp8(base: str) -> Shard:
    """Return a block-FP8 weight of 64 x 64 ones in compressed-tensors' layout."""
    weight, scale = fp8(base).values()
    return {f"{base}.weight": weight, f"{base}.weight_scale": scale}


def other_fp8_source(folder: Path, *more: Shard, **flows: Any) -> Path:
    """Write two FP8 experts in that layout, and a block whose one group says this of activations."""
    groups = {"group_0": {"targets": ["Linear"], "weights": FP8_WEIGHTS, **flows}}
    block = int4_block(format="float-quantized", config_groups=groups)
    return written(folder, block, *map(other_fp8, EXPERTS), *more)


@pytest.mark.parametrize("inputs", [None, FP8_INPUTS, KV | {"type": "int", "strategy": "token", "dynamic": True}])
@pytest.mark.parametrize("more", [{}, bf16(f"{ATTENTION}.o_proj")], ids=["copied", "with new codes"])
def test_fp8_of_weights_alone_stays_so(tmp_path: Path, inputs: dict[str, Any] | None, more: Shard) -> None:
    """The kind: keys that are dropped. W8A16 has no inputs of FP8, W8A8 has those that it had, with new codes too."""
    source = open_checkpoint(other_fp8_source(tmp_path, more, input_activations=inputs))
    plan = make_plan(source, Options(to="fp8", layout="compressed-tensors", shard_size=5000))
    assert block_of(plan)["config_groups"]["group_0"]["input_activations"] == inputs
    assert plan.remarks == ()


def test_a_layout_that_cannot_leave_inputs_alone_says_so(tmp_path: Path) -> None:
    """The kind: keys that are dropped. DeepSeek's block always means FP8 inputs; INT4 and BF16 have none, as before."""
    said = "engines will quantise the inputs of fp8 weights, which by the source's config stay as they are"
    alone = other_fp8_source(tmp_path / "alone", input_activations=None)
    assert planned(alone, "fp8").remarks == (said,)
    assert planned(alone, "int4").remarks == planned(alone, "bf16").remarks == ()
    usual = other_fp8_source(tmp_path / "usual", input_activations=FP8_INPUTS)
    assert planned(usual, "fp8").remarks == planned(usual, "bf16").remarks == ()


def test_groups_of_fp8_that_differ_in_their_inputs_are_told_apart(tmp_path: Path) -> None:
    """With new codes both become one group with FP8 inputs, and that is said."""
    groups = {
        "a": {"targets": [EXPERTS[0]], "weights": FP8_WEIGHTS, "input_activations": FP8_INPUTS},
        "b": {"targets": [EXPERTS[1]], "weights": FP8_WEIGHTS},
    }
    block = int4_block(format="float-quantized", config_groups=groups)
    source = open_checkpoint(written(tmp_path, block, *map(other_fp8, EXPERTS), bf16(f"{ATTENTION}.o_proj")))
    plan = make_plan(source, Options(to="fp8", layout="compressed-tensors"))
    assert block_of(plan)["config_groups"]["group_0"]["input_activations"]["dynamic"] is True
    assert "engines will quantise the inputs of fp8 weights" in plan.remarks[0]


@pytest.mark.parametrize(
    "flows",
    [
        {"input_activations": FP8_INPUTS | {"type": "int"}},
        {"input_activations": FP8_INPUTS | {"num_bits": 4}},
        {"input_activations": FP8_INPUTS, "output_activations": FP8_INPUTS},
    ],
    ids=["int8", "fp4", "outputs"],
)
def test_activations_that_are_not_those_of_block_fp8_are_said(tmp_path: Path, flows: dict[str, Any]) -> None:
    """The kind: keys that are dropped. INT8 inputs, or quantised outputs, of FP8 weights are not what FP8 means."""
    source = other_fp8_source(tmp_path, **flows)
    name = list(flows)[-1]
    for to in ("fp8", "bf16"):
        assert planned(source, to).remarks == (f"left out, for the output's config does not say it: {name}",)


# --- weights that change ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["bf16", "int4"])
def test_scales_of_static_fp8_are_left_out_and_it_is_said(tmp_path: Path, to: FormatName) -> None:
    """The kind: stray scales. `input_scale` of FP8 means nothing to BF16 or INT4: stderr and report say so."""
    source = fp8_source(tmp_path / "src", INPUTS, activation_scheme="static")
    done = CliRunner().invoke(main, ["convert", "--to", to, str(source), str(tmp_path / "out")])
    assert done.exit_code == 0
    assert f"2 input_scale, such as {EXPERTS[0]}.input_scale" in done.stderr
    assert "note: left out, for the output's config does not say it: static activations" in done.stderr
    remarks = json.loads((tmp_path / "out" / "k2quant_report.json").read_text())["remarks"]
    assert [f"note: {remark}" for remark in remarks] == done.stderr.splitlines()[:2]
    assert not any(name.endswith("input_scale") for name in open_checkpoint(tmp_path / "out").tensors)
    assert k2quant.verify(source, tmp_path / "out").passed


def test_the_dry_run_says_it_too(tmp_path: Path) -> None:
    """What will be left out is known before anything is written."""
    source = fp8_source(tmp_path / "src", INPUTS, activation_scheme="static")
    done = CliRunner().invoke(
        main, ["convert", "--dry-run", "--json", "--to", "bf16", str(source), str(tmp_path / "o")]
    )
    assert "2 input_scale" in done.stderr
    assert json.loads(done.stdout)["remarks"] == list(planned(source, "bf16").remarks)


def test_static_activations_stay_where_every_fp8_weight_has_its_scale(tmp_path: Path) -> None:
    """Merged values leave the scales of activations true; a weight that comes to FP8 without one makes them dynamic."""
    source = fp8_source(tmp_path / "src", INPUTS, activation_scheme="Static")  # transformers takes any case
    plan = planned(source, "fp8", substituted=True)
    assert block_of(plan)["activation_scheme"] == "Static"
    assert INPUTS.keys() <= names_of(plan)
    other = fp8_source(tmp_path / "more", INPUTS, bf16(f"{ATTENTION}.o_proj"), activation_scheme="static")
    plan = planned(other, "fp8")
    assert block_of(plan)["activation_scheme"] == "dynamic"
    assert not INPUTS.keys() & names_of(plan)
    assert "static activations" in plan.remarks[0]


def test_only_scales_of_inputs_beside_fp8_weights_count(tmp_path: Path) -> None:
    """A scale of an output makes no input static; one beside a weight that stays BF16 goes, the others stay."""
    outputs: Shard = {f"{base}.output_scale": SCALE for base in EXPERTS}
    source = fp8_source(tmp_path / "outputs", outputs, activation_scheme="static")
    assert block_of(planned(source, "fp8", substituted=True))["activation_scheme"] == "dynamic"
    stray: Shard = {"lm_head.input_scale": SCALE}
    source = fp8_source(tmp_path / "stray", INPUTS, bf16("lm_head"), stray, activation_scheme="static")
    assert {*INPUTS, *stray} <= names_of(planned(source, "fp8"))
    plan = planned(source, "fp8", substituted=True)
    assert INPUTS.keys() <= names_of(plan)
    assert not stray.keys() & names_of(plan)


def test_powers_of_two_are_promised_only_of_scales_that_are_copied(tmp_path: Path) -> None:
    """`scale_fmt: ue8m0` is no longer true once a weight is rounded anew, as by a merge: it goes with a word."""
    source = fp8_source(tmp_path / "src", scale_fmt="ue8m0")
    assert block_of(planned(source, "fp8"))["scale_fmt"] == "ue8m0"
    mixed = fp8_source(tmp_path / "mixed", bf16(f"{ATTENTION}.o_proj"), scale_fmt="ue8m0")
    for plan in (planned(source, "fp8", substituted=True), planned(mixed, "fp8")):
        assert "scale_fmt" not in block_of(plan)
        assert plan.remarks == ("left out, for it tells of the codes as they were: scale_fmt",)
    assert planned(source, "int4").remarks == planned(source, "bf16").remarks == ()  # which have no such scales
    renamed = planned(source, "fp8", layout="compressed-tensors")  # the scales are the same, but no key says so there
    assert renamed.remarks == ("left out, for it tells of the codes as they were: scale_fmt",)


def test_the_cache_goes_where_a_config_can_speak_of_it(tmp_path: Path) -> None:
    """The kind: scales beyond the weights. FP8 -> INT4 keeps scheme and scales; INT4 -> FP8, and BF16, name them."""
    source = fp8_source(tmp_path / "fp8", CACHE, kv_cache_scheme=KV, dequantize=True)
    for plan in (planned(source, "int4"), planned(source, "fp8", substituted=True)):
        assert block_of(plan)["kv_cache_scheme"] == KV
        assert CACHE.keys() <= names_of(plan)
        assert block_of(plan).get("dequantize", False) == (block_of(plan)["quant_method"] == "fp8")
    source = int4_source(tmp_path / "int4", CACHE, kv_cache_scheme=KV)
    for to in ("fp8", "bf16"):
        plan = planned(source, to)
        assert "kv_cache_scheme" not in block_of(plan)
        assert not CACHE.keys() & names_of(plan)
        assert "kv_cache_scheme" in plan.remarks[0]
        assert f"1 k_scale, 1 v_scale, such as {ATTENTION}.k_scale" in plan.remarks[1]


def test_scales_without_a_scheme_stay_with_the_method_that_reads_them(tmp_path: Path) -> None:
    """Engines load `k_scale` of FP8 by its name: more FP8 weights keep it, another format leaves it out with a word."""
    source = fp8_source(tmp_path / "src", CACHE, bf16(f"{ATTENTION}.o_proj"))
    assert CACHE.keys() <= names_of(planned(source, "fp8"))
    plan = planned(source, "int4")
    assert not CACHE.keys() & names_of(plan)
    assert "1 k_scale" in plan.remarks[0]


@pytest.mark.parametrize("missing", ["k_scale", "v_scale"])
def test_verify_misses_scales_of_the_cache_that_engines_find_by_name(tmp_path: Path, missing: str) -> None:
    """The kind: scales beyond the weights. Lost with the method that reads them, they fail; left out with it, not."""
    source = fp8_source(tmp_path / "src", CACHE)
    lost = {name: scale for name, scale in CACHE.items() if not name.endswith(missing)}
    found = k2quant.verify(source, fp8_source(tmp_path / "lost", lost))
    assert found.failures == {f"{ATTENTION}.{missing}": "is missing"}
    k2quant.convert(source, tmp_path / "int4", to="int4")
    assert k2quant.verify(source, tmp_path / "int4").passed
    stale = written(tmp_path / "stale", FP8_BLOCK, *map(bf16, EXPERTS), CACHE)
    assert k2quant.verify(stale, k2quant.convert(stale, tmp_path / "fp8", to="fp8").folder).passed


def test_bf16_has_no_scales_even_where_it_is_copied(tmp_path: Path) -> None:
    """A script made BF16 and left scales behind, with a block or without: no engine reads them, so they go."""
    for number, block in enumerate([FP8_BLOCK | {"activation_scheme": "static"}, None]):
        source = written(tmp_path / str(number), block, *map(bf16, EXPERTS), CACHE, INPUTS)
        plan = planned(source, "bf16")
        assert names_of(plan) == {f"{base}.weight" for base in EXPERTS}
        assert "2 input_scale" in plan.remarks[-1]


def test_activations_of_int4_stay_with_int4(tmp_path: Path) -> None:
    """W4A8 stays W4A8 where more weights become INT4; as FP8 or BF16 it is said that activations are no longer so."""
    source = int4_source(tmp_path / "src", bf16(f"{LAYER}.mlp.experts.2.up_proj"), group={"input_activations": DYNAMIC})
    plan = planned(source, "int4")
    assert block_of(plan)["config_groups"]["group_0"]["input_activations"] == DYNAMIC
    assert plan.remarks == ()
    for to in ("fp8", "bf16"):
        remarks = planned(source, to).remarks
        assert remarks == ("left out, for the output's config does not say it: input_activations",)


def test_static_activations_of_int4_stay_with_their_scales(tmp_path: Path) -> None:
    """New codes leave the scales of inputs true where each weight has one; those of outputs go with a word."""
    outputs: Shard = {f"{base}.output_scale": SCALE for base in EXPERTS}
    group = {"input_activations": STATIC, "output_activations": STATIC}
    source = int4_source(tmp_path / "src", INPUTS, outputs, group=group)
    plan = planned(source, "int4", substituted=True)
    found = block_of(plan)["config_groups"]["group_0"]
    assert (found["input_activations"], found["output_activations"]) == (STATIC, None)
    assert INPUTS.keys() <= names_of(plan)
    assert not outputs.keys() & names_of(plan)
    assert plan.remarks[0].endswith("does not say it: output_activations")
    plan = planned(int4_source(tmp_path / "none", outputs, group=group), "int4", substituted=True)
    assert block_of(plan)["config_groups"]["group_0"]["input_activations"] is None


@pytest.mark.parametrize("flow", ["input", "output"])
def test_verify_misses_scales_that_the_config_speaks_of(tmp_path: Path, flow: str) -> None:
    """Scales may be missing beside dynamic activations, and not beside static ones."""
    scales: Shard = {f"{base}.{flow}_scale": SCALE for base in EXPERTS}
    for name, scheme, failed in (("static", STATIC, set(scales)), ("dynamic", DYNAMIC, set())):
        group = {f"{flow}_activations": scheme}
        source = int4_source(tmp_path / f"{name} with", scales, group=group)
        done = k2quant.verify(source, int4_source(tmp_path / f"{name} without", group=group))
        assert done.failures.keys() == failed


def test_a_key_that_nobody_knows_is_refused_where_codes_are_converted(tmp_path: Path) -> None:
    """It may say what the codes mean: refused by name before anything is written; what says nothing is no matter."""
    for key, source in (
        ("of_a_later_day", fp8_source(tmp_path / "fp8", of_a_later_day={"a": 1}, nothing=None)),
        ("moe_sparsity_config", int4_source(tmp_path / "int4", moe_sparsity_config={"method": "prune"})),
    ):
        with pytest.raises(UnsupportedFormat, match=f"quantization_config: {key}.*take it out"):
            planned(source, "bf16")
        with pytest.raises(UnsupportedFormat, match=key):
            planned(source, "fp8", substituted=True)
        assert any(key in remark for remark in k2quant.inspect(source).remarks)
        assert not k2quant.inspect(source).problems
    silent = fp8_source(tmp_path / "silent", nothing=None, no=False, text="", several=[], whole={})
    assert planned(silent, "bf16").remarks == ()


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"transform_config": {"config_groups": {"R1": {"type": "hadamard"}}}},
        {"sparsity_config": {"format": "sparse-24-bitmask"}},
        {"sparsity_config": "dense"},
        {"quantization_status": "half"},
        {"kv_cache_scheme": [KV]},
        {"kv_cache_scheme": {"bits": 8}},
        {"kv_cache_scheme": {"dynamic": "sometimes"}},
        {"ignore": "lm_head"},
        {"ignore": [["lm_head"]] * 10_000},
        {"version": {"a": 1}},
        {"group": {"input_activations": "fp8"}},
        {"group": {"input_activations": {"codebook": "x" * 10_000}}},
        {"group": {"output_activations": [DYNAMIC]}},
        {"group": {"targets": "Linear"}},
        {"group": {"format": "nvfp4-pack-quantized"}},
        {"group": {"zero_point": True}},
        {"group": {"weights": WEIGHTS | {"dynamic": True}}},
        {"group": {"weights": WEIGHTS | {"zero_point": True}}},
        {"group": {"weights": WEIGHTS | {"block_structure": [128, 128]}}},
        {"group": {"weights": WEIGHTS | {"scale_dtype": "torch.float8_e4m3fn"}}},
        {"group": {"weights": WEIGHTS | {"observer_kwargs": "x"}}},
        {"group": {"weights": WEIGHTS | {"actorder": "group"}}},
        {"group": {"weights": WEIGHTS | {"actorder": "dynamic"}}},
        {"group": {"weights": WEIGHTS | {"actorder": True}}},
        {"group": {"weights": WEIGHTS | {"strategy": None, "group_size": None}}},
    ],
    ids=lambda change: json.dumps(change)[:60],
)
def test_what_int4_does_not_understand_is_refused_by_name(tmp_path: Path, change: dict[str, Any]) -> None:
    """Rotations, sparse codes, other orders, odd types: whatever the target, even a copy, and in one short line."""
    source = int4_source(tmp_path / "src", **change)
    key = next(iter(change.get("group", change)))
    for to in ("int4", "bf16"):
        with pytest.raises(CheckpointError) as caught:
            planned(source, to)
        words = {
            "weights": "actorder dynamic zero_point scale_dtype block_structure observer_kwargs group_size strategy"
        }
        named = words.get(key, key).split()
        assert any(word in str(caught.value) for word in named)
        assert len(str(caught.value)) < 1000
    assert k2quant.inspect(source).problems


@pytest.mark.parametrize(
    "change",
    [
        {"scale_fmt": "ue4m3"},
        {"scale_fmt": ["ue8m0"]},
        {"activation_scheme": "sometimes"},
        {"activation_scheme": 1},
        {"expert_dtype": "fp4"},
        {"kv_cache_scheme": "fp8"},
        {"kv_cache_scheme": {"codebook": 1}},
        {"modules_to_not_convert": "lm_head"},
        {"ignored_layers": [1]},
        {"modules_to_convert": {"a": 1}},
        {"dequantize": "yes"},
        {"transform_config": {"config_groups": {"R1": {"type": "hadamard"}}}},
    ],
    ids=json.dumps,
)
def test_what_fp8_does_not_understand_is_refused_by_name(tmp_path: Path, change: dict[str, Any]) -> None:
    """Another way to write scales, FP4 experts, odd types: whatever the target, even a copy."""
    source = fp8_source(tmp_path / "src", **change)
    for to in ("fp8", "bf16"):
        with pytest.raises(CheckpointError, match=next(iter(change))):
            planned(source, to)


@pytest.mark.parametrize("order", ["static", "weight", False, None])
def test_an_order_of_columns_that_is_past_is_read(tmp_path: Path, order: object) -> None:
    """The kind: good checkpoints refused. GPTQ by order of weights leaves the columns alone; new codes have none."""
    source = int4_source(tmp_path / "src", group={"weights": WEIGHTS | {"actorder": order}})
    assert block_of(planned(source, "int4"))["config_groups"]["group_0"]["weights"]["actorder"] in (order, None)
    assert planned(source, "bf16").remarks == ()
    new = block_of(planned(source, "int4", substituted=True))["config_groups"]["group_0"]["weights"]
    assert new["actorder"] is None


def test_a_strategy_that_is_not_named_follows_from_the_group_size(tmp_path: Path) -> None:
    """As compressed-tensors infers it: -1 is one scale a row, and that is what the tensors must have."""
    weights = WEIGHTS | {"strategy": None, "group_size": -1}
    rows: Shard = {f"{EXPERTS[0]}.weight_scale": ("BF16", np.full((64, 1), 0x3F80, np.uint16))}
    group = {"targets": ["Linear"], "weights": weights}
    block = int4_block(group=group)
    assert planned(written(tmp_path / "rows", block, int4(EXPERTS[0]), rows), "bf16").remarks == ()
    with pytest.raises(CheckpointError, match="one group a row"):
        planned(written(tmp_path / "groups", block, int4(EXPERTS[0])), "bf16")


NO_SCALES: list[tuple[type[CheckpointError], str, Any]] = [
    (DtypeMismatch, "I8", np.ones(1, np.int8)),
    (ShapeMismatch, "F32", np.ones((0,), np.float32)),
    (ShapeMismatch, "F32", np.ones((64, 64), np.float32)),
]


@pytest.mark.parametrize("name", ["k_scale", "v_scale", "input_scale", "output_scale"])
def test_scales_that_can_be_none_are_refused(tmp_path: Path, name: str) -> None:
    """A scale of whole numbers, an empty one, and a whole matrix of them; one for each head is one."""
    full = f"{EXPERTS[0] if 'put' in name else ATTENTION}.{name}"
    for number, (error, dtype, values) in enumerate(NO_SCALES):
        source = fp8_source(tmp_path / str(number), {full: (dtype, values)})
        with pytest.raises(error, match=full):
            planned(source, "bf16")
    for number, shape in enumerate([(), (1,), (1, 1), (64, 1, 1)]):
        source = fp8_source(tmp_path / f"good {number}", {full: ("F32", np.ones(shape, np.float32))})
        assert full in names_of(planned(source, "fp8"))


@pytest.mark.parametrize("key", ["scale_fmt", "weight_block_size", "kv_cache_scheme", "of_a_later_day"])
@pytest.mark.parametrize("home", ["compression_config", "text_config"])
def test_blocks_that_contradict_each_other_are_refused(tmp_path: Path, key: str, home: str) -> None:
    """Engines read one home or another: where both speak, they must say the same, lists of names aside."""
    values: dict[str, list[Any]] = {
        "scale_fmt": ["ue8m0", "float"],
        "weight_block_size": [[128, 128], [1, 128]],
        "kv_cache_scheme": [KV, KV | {"num_bits": 4}],
        "of_a_later_day": [1, 2],
    }
    first, second = (FP8_BLOCK | {key: value, "ignored_layers": [str(value)]} for value in values[key])

    def source(folder: str, other: dict[str, Any]) -> Path:
        more = {home: {"quantization_config": other} if home == "text_config" else other}
        return written(tmp_path / folder, first, *map(fp8, EXPERTS), **more)

    assert planned(source("same", first | {"ignored_layers": ["x"]}), "fp8").remarks == ()
    with pytest.raises(CheckpointError, match="contradict"):
        planned(source("other", second), "fp8")


# --- a block that does not speak of all -------------------------------------------------------------------------------


def test_a_source_with_more_formats_than_its_config_says_is_read_by_its_tensors(tmp_path: Path) -> None:
    """The kind: wrong without a word. INT4's block beside an FP8 weight: a reader is told, and verify fails it."""
    attention = f"{ATTENTION}.o_proj"
    source = int4_source(tmp_path / "src", fp8(attention))
    said = f"config.json speaks of int4 alone, but 1 weights are fp8, such as {attention}.weight: the tensors"
    assert k2quant.inspect(source).problems == []
    assert k2quant.inspect(source).remarks[0].startswith(said)
    assert planned(source, "bf16").remarks[0].startswith(said)
    failures = k2quant.verify(source, source).failures
    assert list(failures) == [CONFIG]
    assert f"expected weights of int4, found 1 of fp8, such as {attention}.weight" in failures[CONFIG]


# --- a block that was left behind -------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [FP8_BLOCK, int4_block()], ids=["fp8", "int4"])
def test_a_block_beside_bf16_weights_is_not_believed(tmp_path: Path, block: dict[str, Any]) -> None:
    """The kind: good checkpoints refused. DeepSeek's cast script leaves its block: the tensors count; it is said."""
    source = written(tmp_path / "src", block, *map(bf16, EXPERTS))
    said = f"config.json speaks of {block['quant_method']}, but no weight is quantised"
    assert k2quant.inspect(source).problems == []
    assert said in k2quant.inspect(source).remarks[0]
    for to in ("bf16", "fp8", "int4"):
        report = k2quant.convert(source, tmp_path / to, to=to).report
        assert said in report["remarks"][0]
        assert k2quant.verify(source, tmp_path / to).passed
    assert "quantization_config" not in json.loads((tmp_path / "bf16" / CONFIG).read_text())


def test_an_output_must_not_keep_such_a_block(tmp_path: Path) -> None:
    """An engine would look for the scales: verify fails whoever wrote it so."""
    source = written(tmp_path / "src", FP8_BLOCK, *map(bf16, EXPERTS))
    assert list(k2quant.verify(source, source).failures) == [CONFIG]


def test_nothing_that_such_a_block_says_goes_along(tmp_path: Path) -> None:
    """Whatever it says of activations, of the cache or of an embedding is not true of new codes, and is named."""
    block = FP8_BLOCK | {"activation_scheme": "static", "kv_cache_scheme": KV, "modules_to_convert": ["lm_head"]}
    source = written(tmp_path / "src", block, *map(bf16, EXPERTS), CACHE, INPUTS)
    plan = planned(source, "fp8")
    assert block_of(plan) == FP8_BLOCK
    assert not (CACHE | INPUTS).keys() & names_of(plan)
    said = "\n".join(plan.remarks)
    assert all(
        word in said for word in ("kv_cache_scheme", "static activations", "modules_to_convert", "2 input_scale")
    )


def test_such_a_block_refuses_nothing_by_keys_that_tell_of_codes(tmp_path: Path) -> None:
    """The kind: good checkpoints refused. There are no codes whose meaning an unknown key could change."""
    source = written(tmp_path / "src", FP8_BLOCK | {"of_a_later_day": 1}, *map(bf16, EXPERTS))
    assert len(k2quant.inspect(source).remarks) == 1
    for to in ("bf16", "fp8", "int4"):
        plan = planned(source, to)
        assert "no weight is quantised" in plan.remarks[0]
        assert "of_a_later_day" not in block_of(plan)


def test_two_such_blocks_need_not_agree(tmp_path: Path) -> None:
    """The kind: good checkpoints refused. What neither is believed in cannot contradict; what each says is named."""
    other = FP8_BLOCK | {"weight_block_size": [1, 128], "modules_to_convert": ["lm_head"]}
    more = {"text_config": {"quantization_config": other}}
    source = written(tmp_path / "src", FP8_BLOCK, *map(bf16, EXPERTS), **more)
    assert k2quant.inspect(source).problems == []
    plan = planned(source, "fp8")
    assert json.loads(plan.config or b"")["text_config"]["quantization_config"] == FP8_BLOCK
    assert "modules_to_convert" in plan.remarks[1]
    int4_too = written(tmp_path / "two", int4_block(), *map(bf16, EXPERTS), **more)
    assert planned(int4_too, "bf16").config is not None


def test_a_block_that_was_left_behind_is_still_read(tmp_path: Path) -> None:
    """Rotated weights are rotated as BF16 too, and another method's block is nobody's to drop."""
    for number, block in enumerate(
        [int4_block(transform_config={"config_groups": {"R1": {}}, "x": 1}), {"quant_method": "bitsandbytes"}, ["fp8"]]
    ):
        source = written(tmp_path / str(number), block, *map(bf16, EXPERTS))  # type: ignore[arg-type]  # a lie
        with pytest.raises((UnsupportedFormat, MalformedFile)):
            planned(source, "bf16")


# --- what reaches a terminal ------------------------------------------------------------------------------------------


def test_no_key_or_name_of_a_file_reaches_the_terminal_as_it_is(tmp_path: Path) -> None:
    """The kind: hostile input. Codes for the terminal are escaped, and what is long is cut, in remarks as in errors."""
    bad = "\x1b[2J\u202e" + "k" * 100_000
    many = {f"{bad}{number}": 1 for number in range(20)}
    source = fp8_source(tmp_path / "src", {f"{ATTENTION}.{'x' * 10_000}.k_scale": SCALE}, **many)
    (tmp_path / "src" / "\x1b[31m.safetensors").write_bytes(b"")
    remarks = [*k2quant.inspect(source).remarks, *planned(source, "fp8").remarks]
    assert any("and 15 more, of which k2quant knows nothing" in remark for remark in remarks)
    assert any("\\x1b[31m.safetensors" in remark for remark in remarks)
    assert all(remark.isprintable() and len(remark) < 2000 for remark in remarks)
    with pytest.raises(UnsupportedFormat) as caught:
        planned(source, "bf16")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


def test_a_type_of_model_is_said_as_a_terminal_can_show_it(tmp_path: Path) -> None:
    """The kind: hostile input. `inspect` prints it whatever it is."""
    source = written(tmp_path, None, *map(bf16, EXPERTS), model_type="\x1b[2J" + "k" * 100_000)
    found = k2quant.inspect(source).model_type or ""
    assert found.startswith("\\x1b[2Jk")
    assert len(found) < 300


# --- a config that changes meanwhile ----------------------------------------------------------------------------------


def test_a_config_that_grew_since_it_was_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kind: hostile input. One that is copied as it is was read within the same limit as one that is edited."""
    source = open_checkpoint(written(tmp_path / "src", None, *map(bf16, EXPERTS)))
    assert make_plan(source, Options(to="bf16")).config == (tmp_path / "src" / CONFIG).read_bytes()
    monkeypatch.setattr("k2quant.checkpoint.reader._CONFIG_LIMIT", 10)
    with pytest.raises(MalformedFile, match="too large"):
        make_plan(source, Options(to="bf16"))


def test_a_config_that_became_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    """The kind: hostile input. What was checked when the folder was opened is checked when it is read again."""
    source = open_checkpoint(written(tmp_path / "src", None, *map(bf16, EXPERTS)))
    (tmp_path / "src" / CONFIG).rename(tmp_path / CONFIG)
    (tmp_path / "src" / CONFIG).symlink_to(tmp_path / CONFIG)
    with pytest.raises(UnsafePath):
        make_plan(source, Options(to="bf16"))


# --- a model ----------------------------------------------------------------------------------------------------------


def test_a_model_without_its_scales_says_so(k2_source: Path, tmp_path: Path) -> None:
    """The kind: static FP8. The model computes in BF16 without the scales, says so, and saves them as they were."""
    folder = tmp_path / "src"
    shutil.copytree(k2_source, folder)
    scales = {f"{ATTENTION}.o_proj.input_scale": SCALE} | CACHE
    written(tmp_path / "more", None, scales)
    (tmp_path / "more" / "model.safetensors").rename(folder / "scales.safetensors")
    index, config = (json.loads((folder / name).read_text()) for name in (INDEX, CONFIG))
    index["weight_map"] |= dict.fromkeys(scales, "scales.safetensors")
    config["quantization_config"] |= {"activation_scheme": "static", "kv_cache_scheme": KV}
    for name, content in ((INDEX, index), (CONFIG, config)):
        (folder / name).write_text(json.dumps(content))
    with pytest.warns(CheckpointWarning) as heard:
        model = load_model(folder)
    said = "\n".join(str(warning.message) for warning in heard)
    assert "1 input_scale, 1 k_scale, 1 v_scale" in said
    assert "kv_cache_scheme, static activations" in said
    assert "weights have no input_scale" in said
    model.save_pretrained(tmp_path / "saved")
    for name in ("scales.safetensors", CONFIG):
        assert (tmp_path / "saved" / name).read_bytes() == (folder / name).read_bytes()


def test_a_model_of_bf16_weights_loads_whatever_block_is_left(k2_bf16: Path, tmp_path: Path) -> None:
    """BF16 weights beside an FP8 block load as BF16, with a word, even where a key might say what codes mean."""
    folder = tmp_path / "src"
    shutil.copytree(k2_bf16, folder)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"quantization_config": FP8_BLOCK | {"of_a_later_day": 1}}))
    with pytest.warns(CheckpointWarning, match="no weight is quantised"):
        load_model(folder)


def test_a_model_of_codes_is_refused_with_a_key_that_may_say_what_they_mean(k2_source: Path, tmp_path: Path) -> None:
    """Beside FP8 weights the same key stops it."""
    folder = tmp_path / "src"
    shutil.copytree(k2_source, folder)
    config = json.loads((folder / CONFIG).read_text())
    config["quantization_config"] |= {"of_a_later_day": 1}
    (folder / CONFIG).write_text(json.dumps(config))
    with pytest.raises(UnsupportedFormat, match="of_a_later_day"):
        load_model(folder)
