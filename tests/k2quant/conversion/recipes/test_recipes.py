"""Conversions by a recipe: the same bytes as by arguments, used again from a report, and what cannot be."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import save_file

import k2quant
from k2quant.checkpoint.reader import CONFIG, REPORT, open_checkpoint
from k2quant.checkpoint.weights import group_tensors
from k2quant.checkpoint.writing.in_memory import write_checkpoint
from k2quant.cli import main
from k2quant.errors import DestinationStale, UnsupportedFormat, UsageError
from rewritten import tensors_of

MIXED = r"""
rules:
- {match: 'layers\.2\.', to: bf16}
- {classes: routed experts, to: int4}
- {classes: [attention, shared_experts], to: fp8}
- {to: bf16}
"""


def run(*arguments: object, stdin: str | None = None) -> Result:
    """Run the command line."""
    return CliRunner().invoke(main, list(map(str, arguments)), input=stdin)


def content(folder: Path) -> dict[str, bytes]:
    """Return the files of an output, its report aside."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != REPORT}


def report(folder: Path) -> dict[str, Any]:
    """Return the report of an output."""
    found: dict[str, Any] = json.loads((folder / REPORT).read_text())
    return found


def formats(folder: Path) -> dict[str, set[str]]:
    """Return the formats of some weights of an output, by the last part of their names and layer."""
    found: dict[str, set[str]] = {}
    for weight in group_tensors(open_checkpoint(folder).tensors).weights:
        if weight.format is not None:
            found.setdefault(weight.base.removeprefix("model.layers."), set()).add(weight.format.name)
    return found


@pytest.mark.parametrize(
    ("flags", "recipe"),
    [
        (["--to", "int4"], "rules: [{to: int4}]"),
        (["--to", "bf16", "--shard-size", "5MB"], "rules: [{to: bf16}]\nshard_size: 5MB"),
        (["--to", "fp8", "--layout", "compressed-tensors"], "rules: [{to: fp8, layout: compressed-tensors}]"),
        (
            ["--to", "int4", "--scope", "linear", "--ignore", "o_proj", "--grid", "compressed-tensors"],
            "rules: [{to: int4, scope: linear, ignore: o_proj, grid: compressed-tensors}]",
        ),
        (
            ["--to", "int4", "--ignore", r"experts\.3\.", "--allow-split"],
            "rules: [{to: int4, ignore: 'experts\\.3\\.'}]\nallow_split: true",
        ),
    ],
)
def test_a_recipe_and_the_command_line_give_the_same_bytes(
    k2_source: Path, ram: Path, flags: list[str], recipe: str
) -> None:
    """Of every file; either finds the other's folder finished; the report's own recipe gives them once more."""
    (ram / "r.yaml").write_text(recipe)
    assert run("convert", *flags, k2_source, ram / "flags").exit_code == 0
    assert run("convert", "--config", ram / "r.yaml", k2_source, ram / "recipe").exit_code == 0
    assert content(ram / "flags") == content(ram / "recipe")
    assert "already finished" in run("convert", "--config", ram / "r.yaml", k2_source, ram / "flags").stdout
    assert run("convert", "--config", ram / "flags", k2_source, ram / "again").exit_code == 0
    assert content(ram / "again") == content(ram / "flags")
    assert report(ram / "again")["recipe"] == report(ram / "flags")["recipe"]
    assert "already finished" in run("convert", *flags, k2_source, ram / "again").stdout


def test_formats_by_class_and_pattern_stand_side_by_side(k2_source: Path, ram: Path) -> None:
    """INT4 experts, FP8 attention, a layer in BF16: by the first rule; config.json says it, and the report verifies.

    FP8 beside INT4 has the layout that a config can describe, though nobody said so; what was FP8 and is named to be
    BF16 is dequantised; the report holds the rules with all that was left to defaults.
    """
    (ram / "r.yaml").write_text(MIXED)
    done = k2quant.convert(k2_source, ram / "out", recipe=ram / "r.yaml")
    found = formats(done.folder)
    assert found["1.mlp.experts.0.up_proj"] == {"int4"}
    assert found["1.self_attn.o_proj"] == found["1.mlp.shared_experts.up_proj"] == {"fp8"}
    assert found["2.mlp.experts.0.up_proj"] == found["2.self_attn.o_proj"] == found["0.mlp.up_proj"] == {"bf16"}
    block = json.loads((done.folder / CONFIG).read_text())["quantization_config"]
    assert {group["format"] for group in block["config_groups"].values()} == {"pack-quantized", "float-quantized"}
    assert k2quant.verify(k2_source, done.folder).passed
    assert done.report["recipe"]["rules"][2] == {
        "to": "fp8",
        "scope": "linear",
        "classes": ["attention", "shared experts"],
        "layout": "compressed-tensors",
        "method": "rtn",
    }
    again = k2quant.convert(k2_source, ram / "again", recipe=done.report["recipe"])
    assert content(again.folder) == content(done.folder)


def test_two_rules_of_one_format_are_one_group(k2_bf16: Path, ram: Path) -> None:
    """INT4 of the experts of one layer and of attention of another; two grids are refused with both places."""
    rules: list[dict[str, Any]] = [
        {"to": "int4", "classes": ["routed experts"], "match": r"layers\.1\."},
        {"to": "int4", "classes": ["attention"], "match": r"layers\.2\."},
    ]
    done = k2quant.convert(k2_bf16, ram / "out", recipe={"rules": rules})
    found = formats(done.folder)
    assert found["1.mlp.experts.0.up_proj"] == found["2.self_attn.o_proj"] == {"int4"}
    assert found["2.mlp.experts.0.up_proj"] == found["1.self_attn.o_proj"] == {"bf16"}
    assert len(json.loads((done.folder / CONFIG).read_text())["quantization_config"]["config_groups"]) == 1
    rules[0]["grid"], rules[1]["grid"] = "moonshot", "compressed-tensors"
    with pytest.raises(UsageError, match=r"rule 2: grid compressed-tensors, where recipe: rule 1: grid moonshot"):
        k2quant.convert(k2_bf16, ram / "more", recipe={"rules": rules})
    for alone in ({"to": "fp8", "layout": "deepseek"}, {"to": "nvfp4", "layout": "modelopt", "scope": "linear"}):
        mixed = {"rules": [{"to": "int4"}, alone]}
        with pytest.raises(
            UnsupportedFormat, match=r"beside others, .*; write it in another layout: compressed-tensors"
        ):
            k2quant.convert(k2_bf16, ram / "more", recipe=mixed)
    assert not (ram / "more").exists()


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ("[{match: 'layers\\.7\\.', to: int4}]", r"rule 1 \(line 1\): match .* is found in no name; the nearest"),
        ("[{ignore: no_such, to: int4}]", r"rule 1 \(line 1\): ignore 'no_such' is found in no name"),
        ("[{classes: vision, to: fp8}]", "takes no weight: the checkpoint has no weight of vision; it has attention"),
        ("[{to: fp8}, {classes: attention, to: int4}]", r"rule 2 .*rules before it take all 12 .*put it before them"),
        ("[{to: fp8}, {classes: norm, to: fp8}]", r"none of the 13 that it names is in scope \(linear\)"),
        ("[{to: int4}, {classes: norm, match: o_proj, to: bf16}]", "no weight is of its classes and has one of its"),
        ("[{to: fp8, match: o_proj, ignore: proj}]", "`ignore` spares all 3 that it names"),
    ],
)
def test_a_rule_that_takes_nothing_is_an_error(k2_bf16: Path, tmp_path: Path, rules: str, said: str) -> None:
    """It says why: nothing of the class, no name, others before it, engines do not run it; nothing is written."""
    (tmp_path / "r.yaml").write_text(f"rules: {rules}")
    with pytest.raises(UsageError, match=f"r.yaml: .*{said}"):
        k2quant.convert(k2_bf16, tmp_path / "out", recipe=tmp_path / "r.yaml")
    assert not (tmp_path / "out").exists()


def test_the_dry_run_says_what_each_rule_takes(k2_source: Path, ram: Path) -> None:
    """A line for each rule with its number of weights, those that are copied among them; the same in JSON."""
    (ram / "r.yaml").write_text(MIXED)
    call = ("convert", "--config", ram / "r.yaml", "--dry-run", k2_source, ram / "out")
    found = run(*call)
    assert found.exit_code == 0, found.stderr
    assert "rule 2           48 weights to int4 moonshot: linear, of routed experts\n" in found.stdout
    rules = json.loads(run(*call, "--json").stdout)["rules"]
    assert [rule["weights"] for rule in rules] == [61, 48, 13, 15]
    assert rules[0]["match"] == [r"layers\.2\."]


def test_options_beside_a_recipe(k2_source: Path, ram: Path) -> None:
    """What a recipe says cannot stand beside it, by its flag or argument; what it leaves open can; one is needed."""
    (ram / "r.yaml").write_text("rules: [{to: int4}]")
    call = ("convert", "--config", ram / "r.yaml", k2_source, ram / "out")
    for flags in (["--to", "int4"], ["--scope", "linear"], ["--ignore", "x"], ["--grid", "moonshot"]):
        refused = run(*call, *flags)
        assert refused.exit_code == 2
        assert f"{flags[0]} beside --config, which says it already" in refused.stderr
    with pytest.raises(UsageError, match="`layout=` beside `recipe=`"):
        k2quant.convert(k2_source, ram / "out", recipe=ram / "r.yaml", layout="deepseek")
    assert run(*call, "--shard-size", "5MB").exit_code == 0
    assert report(ram / "out")["recipe"]["shard_size"] == 5 * 10**6
    neither = run("convert", k2_source, ram / "more")
    assert neither.exit_code == 2
    assert "say which format to write, --to, or by which recipe, --config" in neither.stderr


def test_a_recipe_comes_by_stdin_and_by_a_pipe(k2_thinking: Path, ram: Path) -> None:
    """`-`, and what a shell makes of `<(...)`."""
    call = ("convert", k2_thinking, ram / "out", "--dry-run", "--json", "--config")
    assert json.loads(run(*call, "-", stdin="rules: [{to: int4}]").stdout)["rules"][0]["to"] == "int4"
    assert "stdin: expected keys and values" in run(*call, "-", stdin="int4").stderr
    os.mkfifo(ram / "pipe")
    writer = threading.Thread(target=(ram / "pipe").write_text, args=("rules: [{to: int4}]",), daemon=True)
    writer.start()
    found = run(*call, ram / "pipe")
    writer.join(5)
    assert json.loads(found.stdout)["rules"][0]["scope"] == "experts"


def test_another_recipe_is_another_run(k2_thinking: Path, ram: Path) -> None:
    """A finished folder of other rules is refused; options that come to the same, as older reports have them, are one.

    `--to int4` and `--to int4 --scope experts` write the same bytes, and so do they by a recipe.
    """
    done = k2quant.convert(k2_thinking, ram / "out", "int4")
    for recipe in ({"rules": [{"to": "int4", "scope": "experts", "grid": "moonshot"}]}, done.folder):
        assert k2quant.convert(k2_thinking, ram / "out", recipe=recipe).already_done
    assert k2quant.convert(k2_thinking, ram / "out", to="int4", scope="experts").already_done
    with pytest.raises(DestinationStale, match="other options"):
        k2quant.convert(k2_thinking, ram / "out", recipe={"rules": [{"to": "int4", "match": "experts"}]})
    old = report(ram / "out")
    del old["recipe"], old["options"]["allow_split"], old["options"]["layout"]
    (ram / "out" / REPORT).write_text(json.dumps(old))
    assert k2quant.convert(k2_thinking, ram / "out", to="int4").already_done
    wrong: list[Any] = [{"to": "int4", "rules": "x"}, {"to": 5}, {"to": "int4", "ignore": [1]}, None, [], {"grid": []}]
    for broken in wrong:
        (ram / "out" / REPORT).write_text(json.dumps(old | {"options": broken}))
        with pytest.raises(DestinationStale, match="other options"):
            k2quant.convert(k2_thinking, ram / "out", to="int4")


@pytest.mark.parametrize(("rest", "dtype"), [("bf16", "bfloat16"), (None, "float32")])
def test_the_config_says_bfloat16_where_all_floats_became_bf16(
    k2_bf16: Path, ram: Path, rest: str | None, dtype: str
) -> None:
    """By a rule for the rest; where some stay F32, as without one, the source's word stays."""
    tensors = {
        name: ("F32", as_float(array)) if kind == "BF16" else (kind, array)
        for name, (kind, array) in tensors_of(open_checkpoint(k2_bf16)).items()
    }
    config: dict[str, Any] = json.loads((k2_bf16 / CONFIG).read_text())
    write_checkpoint(ram / "F32", {"model.safetensors": tensors}, {**config, "torch_dtype": "float32"})
    rules: list[dict[str, Any]] = [{"to": "int4", "classes": ["routed experts"]}, *([{"to": rest}] if rest else [])]
    done = k2quant.convert(ram / "F32", ram / "out", recipe={"rules": rules})
    assert json.loads((done.folder / CONFIG).read_text())["torch_dtype"] == dtype


def as_float(bits: Any) -> Any:
    """Return BF16 bits as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def test_a_merge_takes_a_recipe_too(k2_bf16: Path, ram: Path) -> None:
    """It gives the bytes that options give; its report's recipe says no method, for the values are not the source's."""
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["o_proj"], "peft_version": "0.19.0"}
    rows, columns = open_checkpoint(k2_bf16).tensors["model.layers.0.self_attn.o_proj.weight"].shape
    (ram / "adapter").mkdir()
    (ram / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    factors = {
        f"base_model.model.model.layers.0.self_attn.o_proj.lora_{side}.weight": np.ones(shape, np.float32)
        for side, shape in {"A": (2, columns), "B": (rows, 2)}.items()
    }
    save_file(factors, ram / "adapter" / "adapter_model.safetensors")
    (ram / "r.yaml").write_text("rules: [{to: int4, scope: experts}]")
    call = ("merge", k2_bf16, ram / "adapter")
    assert run(*call, ram / "recipe", "--config", ram / "r.yaml").exit_code == 0
    assert run(*call, ram / "flags", "--to", "int4").exit_code == 0
    assert content(ram / "recipe") == content(ram / "flags")
    assert report(ram / "flags")["recipe"]["rules"] == [{"to": "int4", "scope": "experts", "grid": "moonshot"}]


def test_a_conversion_by_rules_resumes(k2_source: Path, ram: Path) -> None:
    """A run that was stopped goes on by the same recipe, and by no other; a page is drawn of the end."""

    def stop(done: int, _total: int) -> None:
        if done > 12_000_000:
            raise KeyboardInterrupt

    rules: dict[str, Any] = {"rules": [{"to": "int4"}, {"to": "fp8"}], "shard_size": 10**6}
    with pytest.raises(KeyboardInterrupt):
        k2quant.convert(k2_source, ram / "out", recipe=rules, progress=stop, workers=1)
    with pytest.raises(DestinationStale, match="half-finished conversion of other options"):
        k2quant.convert(k2_source, ram / "out", recipe={**rules, "rules": [{"to": "int4"}]})
    done = k2quant.convert(k2_source, ram / "out", recipe=rules)
    assert done.resumed
    assert run("report", ram / "out", "-o", ram / "page.html").exit_code == 0
    page = (ram / "page.html").read_text()
    assert "<h1>Kimi-K2-Small as INT4 and FP8</h1>" in page
    assert "<dt>rule 1</dt><dd><code>int4 moonshot: experts</code></dd>" in page
    assert "<dt>rule 2</dt><dd><code>fp8 compressed-tensors: linear</code></dd>" in page
    lie = report(ram / "out") | {"recipe": {"rules": [{"to": "<script>"}]}}
    (ram / "out" / REPORT).write_text(json.dumps(lie))
    refused = run("report", ram / "out", "-o", ram / "page.html")
    assert (refused.exit_code, "expected bf16, fp8, int4" in refused.stderr) == (1, True)
    (ram / "out" / REPORT).write_text(json.dumps(done.report))
    assert k2quant.verify(k2_source, done.folder).passed
