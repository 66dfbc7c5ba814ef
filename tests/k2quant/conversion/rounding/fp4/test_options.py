"""What an FP4 checkpoint says beside its weights, which search it takes by itself, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

import k2quant
from k2quant.calib.stats.layout import Input, Part
from k2quant.calib.stats.reading import open_stats
from k2quant.checkpoint.reader import CONFIG, open_checkpoint
from k2quant.checkpoint.reading import read_tensor
from k2quant.checkpoint.writing.in_memory import write_checkpoint
from k2quant.cli import main
from k2quant.conversion.convert import chosen
from k2quant.conversion.plan import Options, make_plan, options_from
from k2quant.errors import CheckpointError, DestinationStale, UnsupportedFormat, UsageError
from k2quant.kernels.codecs.fp4 import input_scale
from k2quant.kernels.codecs.scales.fp4 import NVFP4_STEPS
from k2quant.report import write_html

BASE = "model.layers.{}.mlp.experts.{}.{}_proj"
BESIDE = "hf_quant_config.json"


def block(folder: Path) -> dict[str, Any]:
    """Return the quantization block of a checkpoint."""
    found: dict[str, Any] = json.loads((folder / CONFIG).read_text())["quantization_config"]
    return found


def beside(folder: Path) -> dict[str, Any]:
    """Return what ModelOpt's own file says."""
    found: dict[str, Any] = json.loads((folder / BESIDE).read_text())["quantization"]
    return found


def input_scales(folder: Path, suffix: str = "input_scale") -> dict[str, float]:
    """Return every scale of inputs, by base."""
    source = open_checkpoint(folder)
    return {
        name.removesuffix(f".{suffix}"): float(np.frombuffer(read_tensor(source, entry), np.float32)[0])
        for name, entry in source.tensors.items()
        if name.endswith(f".{suffix}")
    }


def shards(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every shard."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def lost(report: dict[str, Any]) -> float:
    """Return the squared error of all weights."""
    return sum(float(facts["figures"]["error"]) for facts in report["tensors"].values() if "figures" in facts)


def test_weights_only_is_what_is_written_where_nobody_asks_for_more(small_bf16: Path, tmp_path: Path) -> None:
    """No scale of an input stands there, and config.json and its companion say so alike."""
    done = k2quant.convert(small_bf16, tmp_path / "out", "nvfp4")
    assert input_scales(done.folder) == {}
    assert block(done.folder)["quant_algo"] == beside(done.folder)["quant_algo"] == "W4A16_NVFP4"
    assert beside(done.folder)["kv_cache_quant_algo"] is None
    assert done.report["activation_scales"] == {"from": "none", "weights": 0}
    assert "rounded" not in done.report
    assert k2quant.verify_checksums(done.folder).passed
    assert BESIDE in done.report["files"]
    (done.folder / BESIDE).write_text("{}")
    assert list(k2quant.verify_checksums(done.folder).failures) == [BESIDE]


@pytest.mark.parametrize(
    ("layout", "suffix"), [("modelopt", "input_scale"), ("compressed-tensors", "input_global_scale")]
)
def test_activation_scales_of_one(small_bf16: Path, tmp_path: Path, layout: Any, suffix: str) -> None:
    """Beside every expert stands 1.0, the config says that inputs are quantised, and the report where it comes from."""
    done = k2quant.convert(small_bf16, tmp_path / "out", "nvfp4", layout=layout, activation_scales="one")
    found = input_scales(done.folder, suffix)
    assert set(found.values()) == {1.0}
    assert len(found) == 24
    assert done.report["activation_scales"] == {"from": "one", "weights": 24}
    said = block(done.folder)
    assert said["config_groups"]["group_0"]["input_activations"] is not None
    assert said.get("quant_algo", "NVFP4") == "NVFP4"
    assert k2quant.verify(small_bf16, done.folder).passed
    assert k2quant.verify_checksums(done.folder).passed


def none_of_one_expert(one: Input, _part: Part, squares: NDArray[np.float32]) -> NDArray[np.float32]:
    """Let expert 2 of layer 0 have had no input but zeros."""
    if one.experts is not None and ".layers.0." in one.name:
        squares[2] = 0
    return squares


def test_activation_scales_of_statistics(small: Path, tmp_path: Path, make_stats: Callable[..., Path]) -> None:
    """Each is that of its own largest input, gate and up have one, and an expert without any its layer's largest."""
    folder = make_stats(squares=none_of_one_expert)
    stats = open_stats(folder)
    done = k2quant.convert(small, tmp_path / "out", "nvfp4", activation_scales=folder)
    found = input_scales(done.folder)
    assert len(found) == 24
    for layer in (0, 1):
        for expert in range(4):
            for name in ("gate", "up", "down"):
                base = BASE.format(layer, expert, name)
                largest = [stats.moments(base, part).largest for part in ("train", "validation")]  # type: ignore[union-attr]
                if (layer, expert) == (0, 2):
                    others = [BASE.format(0, other, name) for other in range(4)]
                    parts: tuple[Part, ...] = ("train", "validation")
                    largest = [stats.moments(b, part).largest for b in others for part in parts]  # type: ignore[union-attr]
                assert found[base] == input_scale(max(largest), divides=False)
    assert done.report["activation_scales"] == {
        "from": "stats",
        "weights": 24,
        "stats": stats.fingerprint,
        "layer_maximum": 3,
    }
    assert k2quant.verify(small, done.folder).passed


def test_statistics_of_another_checkpoint_are_refused(
    small: Path, small_bf16: Path, stats: Path, tmp_path: Path
) -> None:
    """Of other tensors before anything is written; of other bytes when they are read."""
    with pytest.raises(CheckpointError, match="calibrated in other tensors"):
        k2quant.convert(small_bf16, tmp_path / "out", "nvfp4", activation_scales=stats)
    other = tmp_path / "other"
    other.mkdir()
    for path in small.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    entry = open_checkpoint(other).tensors[f"{BASE.format(1, 0, 'down')}.weight"]
    with (other / entry.file).open("r+b") as file:
        file.seek(entry.start)
        file.write(b"\x01\x02\x03")
    with pytest.raises(CheckpointError, match="is not the weight that was calibrated"):
        k2quant.convert(other, tmp_path / "out", "nvfp4", activation_scales=stats)
    assert not (tmp_path / "out" / CONFIG).exists()


def test_other_activation_scales_are_another_run(small: Path, stats: Path, tmp_path: Path) -> None:
    """A finished folder is refused for others, and is itself found done."""
    out = tmp_path / "out"
    k2quant.convert(small, out, "nvfp4", activation_scales=stats)
    assert k2quant.convert(small, out, "nvfp4", activation_scales=stats).already_done
    for other in ("one", None):
        with pytest.raises(DestinationStale, match="another"):
            k2quant.convert(small, out, "nvfp4", activation_scales=other)


def test_scales_of_inputs_go_along(small_bf16: Path, tmp_path: Path) -> None:
    """Cut anew and in another layout they stay, with the config that speaks of them; in BF16 they are left behind."""
    first = k2quant.convert(small_bf16, tmp_path / "first", "nvfp4", activation_scales="one").folder
    again = k2quant.convert(first, tmp_path / "again", "nvfp4", shard_size=200_000).folder
    assert input_scales(again) == input_scales(first)
    assert block(again) == block(first)
    bf16 = k2quant.convert(first, tmp_path / "bf16", "bf16").folder
    assert input_scales(bf16) == {}
    assert k2quant.verify(first, bf16).passed


@pytest.mark.parametrize(
    ("asked", "scheme"),
    [
        ({"to": "nvfp4"}, {"dynamic": False, "num_bits": 8, "type": "float"}),
        ({"to": "nvfp4", "layout": "compressed-tensors"}, {"num_bits": 8, "type": "float", "strategy": "tensor"}),
        ({"to": "mxfp4"}, {"num_bits": 8, "type": "float", "symmetric": True}),
        ({"to": "int4"}, {"num_bits": 8, "type": "float", "symmetric": True}),
        ({"to": "fp8", "layout": "compressed-tensors"}, {"num_bits": 8, "dynamic": False}),
    ],
)
def test_engines_are_asked_for_an_fp8_cache(
    small_bf16: Path, tmp_path: Path, asked: dict[str, Any], scheme: dict[str, Any]
) -> None:
    """The scheme stands where engines read it, and is read back as no problem."""
    done = k2quant.convert(small_bf16, tmp_path / "out", **asked, kv_cache="fp8")
    assert block(done.folder)["kv_cache_scheme"].items() >= scheme.items()
    if (done.folder / BESIDE).exists():
        assert beside(done.folder)["kv_cache_quant_algo"] == "FP8"
    assert k2quant.inspect(done.folder).problems == []
    assert k2quant.verify(small_bf16, done.folder).passed


@pytest.mark.parametrize("asked", [{"to": "bf16"}, {"to": "fp8"}])
def test_a_cache_of_which_no_config_speaks_is_refused(small_bf16: Path, tmp_path: Path, asked: dict[str, Any]) -> None:
    """BF16 has no block, and engines read none of DeepSeek's for it."""
    with pytest.raises(UsageError, match=r"`kv_cache=` has no"):
        k2quant.convert(small_bf16, tmp_path / "out", **asked, kv_cache="fp8")


def write_wide(folder: Path, exponents: tuple[int, int]) -> Path:
    """Write a down_proj in MXFP4 whose rows have scales of these two powers of two."""
    codes = np.random.default_rng(0).integers(0, 256, (128, 64), np.uint8)
    scale = np.repeat(np.array([[127 + exponents[0]], [127 + exponents[1]]], np.uint8), 64, 0).repeat(4, 1)
    base = BASE.format(1, 0, "down")
    shard = {f"{base}.weight_packed": ("U8", codes), f"{base}.weight_scale": ("U8", scale)}
    weights = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True}
    group = {"weights": {**weights, "dynamic": False, "scale_dtype": "torch.uint8"}, "targets": ["Linear"]}
    config = {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized", "config_groups": {"g": group}}
    write_checkpoint(folder, {"model.safetensors": shard}, {"model_type": "kimi_k2", "quantization_config": config})
    return folder


def test_scales_that_lie_too_far_apart_are_refused_or_rounded_and_counted(tmp_path: Path) -> None:
    """Seventeen powers of two are carried over; eighteen are refused by name, and rounded where that is allowed."""
    near = write_wide(tmp_path / "near", (-20, -3))
    done = k2quant.convert(near, tmp_path / "exact", "nvfp4", allow_rounding=True)
    assert done.report["rounded"] == {"matrices": 0, "weights": 0, "of": 1}
    assert done.report["remarks"] == []
    far = write_wide(tmp_path / "far", (-25, -3))
    with pytest.raises(UnsupportedFormat, match=r"0.down_proj.*22, from 2\^-25 to 2\^-3; .*`allow_rounding=True`"):
        k2quant.convert(far, tmp_path / "out", "nvfp4")
    assert not (tmp_path / "out" / CONFIG).exists()
    done = k2quant.convert(far, tmp_path / "out", "nvfp4", allow_rounding=True, restart=True)
    rounded = done.report["rounded"]
    assert (rounded["matrices"], rounded["of"]) == (1, 1)
    assert 0 < rounded["weights"] <= 64 * 128
    assert "rounded, for their codes cannot be carried over" in done.report["remarks"][0]


@pytest.mark.parametrize("to", ["nvfp4", "mxfp4"])
def test_int4_is_searched_where_nobody_says_how(rounded: Path, small_bf16: Path, tmp_path: Path, to: Any) -> None:
    """Codes 5 and 7 lie on no E2M1: searched scales lose no more, of NVFP4 less. BF16 is rounded as ever."""
    done = k2quant.convert(rounded, tmp_path / "default", to)
    asked = k2quant.convert(rounded, tmp_path / "mse", to, method="mse")
    plain = k2quant.convert(rounded, tmp_path / "rtn", to, method="rtn")
    assert shards(done.folder) == shards(asked.folder)
    assert lost(done.report) <= lost(plain.report) * (0.8 if to == "nvfp4" else 1.0)
    assert done.report["method"]["asked"] == "mse"
    assert done.report["method"]["default"]
    assert "method" not in done.report["recipe"]["rules"][0]
    assert plain.report["recipe"]["rules"][0]["method"] == "rtn"
    assert k2quant.verify(rounded, done.folder).passed
    again = k2quant.convert(rounded, tmp_path / "again", recipe=plain.folder)
    assert shards(again.folder) == shards(plain.folder)
    other = k2quant.convert(small_bf16, tmp_path / "bf16", to)
    assert "method" not in other.report


@pytest.mark.parametrize("to", ["nvfp4", "mxfp4"])
def test_a_calibration_weighs_errors(small: Path, stats: Path, tmp_path: Path, to: Any) -> None:
    """`imatrix` gives other scales than `mse`, judges by data that was held out, and says by how much it won."""
    done = k2quant.convert(small, tmp_path / "imatrix", to, method="imatrix", stats=stats)
    plain = k2quant.convert(small, tmp_path / "mse", to, method="mse")
    assert shards(done.folder) != shards(plain.folder)
    scales = [facts["scales"] for facts in done.report["tensors"].values() if "scales" in facts]
    assert len(scales) == 24
    assert {each["measure"] for each in scales} <= {"validation", "validation, blended"}
    assert np.median([each["relative"] for each in scales]) < 1
    assert k2quant.verify(small, done.folder).passed


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"to": "nvfp4", "method": "gptq"}, "`method=` gptq is not there for nvfp4: .* by mse or imatrix"),
        ({"to": "mxfp4", "method": "awq"}, "`method=` awq is not there for mxfp4"),
        ({"to": "mxfp4", "activation_scales": "one"}, "`activation_scales=` has no meaning with mxfp4: .* NVFP4"),
        ({"to": "int4", "allow_rounding": True}, "`allow_rounding=` has no meaning with int4: .* NVFP4"),
        ({"to": "nvfp4", "activation_scales": 1.0}, r"activation_scales is 1\.0; expected .*, or 'one'"),
        ({"to": "nvfp4", "kv_cache": "fp4"}, "KV cache"),
        ({"to": "nvfp4", "layout": "deepseek"}, "deepseek"),
        ({"to": "mxfp4", "layout": "modelopt"}, "modelopt"),
        ({"to": "nvfp4", "grid": "moonshot"}, "grid"),
    ],
)
def test_what_makes_no_sense_is_refused(small_bf16: Path, tmp_path: Path, asked: dict[str, Any], why: str) -> None:
    """Before anything is read, with what would make sense."""
    with pytest.raises(UsageError, match=why):
        k2quant.convert(small_bf16, tmp_path / "out", **asked)
    assert not (tmp_path / "out").exists()


def test_journals_say_what_was_asked_for_and_no_more() -> None:
    """Options of before have the JSON that they had; later ones come back as they were."""
    before = {"to", "scope", "ignore", "grid", "shard_size", "layout", "allow_split"}
    assert Options("int4").as_json().keys() == before
    asked = Options("nvfp4", activation_scales="one", kv_cache="fp8", allow_rounding=True)
    assert options_from(asked.as_json()) == asked


def test_options_stand_beside_a_recipe(small_bf16: Path) -> None:
    """Of them no recipe speaks: they hold for what its rules write in the format."""
    recipe = {"rules": [{"to": "nvfp4", "scope": "experts"}, {"to": "fp8", "scope": "linear"}]}
    plan = make_plan(open_checkpoint(small_bf16), chosen(recipe, activation_scales="one", kv_cache="fp8"))
    assert plan.config is not None
    said = json.loads(plan.config)["quantization_config"]
    assert said["format"] == "mixed-precision"
    assert said["kv_cache_scheme"]["num_bits"] == 8
    formats = {group["format"]: group["input_activations"] for group in said["config_groups"].values()}
    assert formats["nvfp4-pack-quantized"]["dynamic"] == "local"


def test_dry_run_and_report_say_what_was_asked_for(small: Path, rounded: Path, stats: Path, tmp_path: Path) -> None:
    """A dry run says which search a source asks for by itself; the page says whence scales come, and what is asked."""
    runner = CliRunner()
    said = runner.invoke(main, ["convert", "--to", "nvfp4", "--dry-run", str(rounded), str(tmp_path / "no")])
    assert "24 searched, int4 -> nvfp4" in said.output
    assert f"mse, {len(NVFP4_STEPS)} scales a group; 24 weights searched" in " ".join(said.output.split())
    assert "no scales: weights only" in said.output
    asked = ["convert", "--to", "nvfp4", "--activation-scales", str(stats), "--kv-cache", "fp8"]
    done = runner.invoke(main, [*asked, str(small), str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    write_html(tmp_path / "out")
    page = (tmp_path / "out" / "k2quant_report.html").read_text()
    assert "by the largest inputs of a calibration, beside 24 weights" in page
    assert "fp8, without scales: engines take 1.0" in page
    described = runner.invoke(main, ["inspect", str(tmp_path / "out")]).output
    assert "modelopt, quant_algo NVFP4, kv_cache_scheme, " in " ".join(described.split())
    k2quant.convert(rounded, tmp_path / "int4", "nvfp4")
    write_html(tmp_path / "int4")
    page = (tmp_path / "int4" / "k2quant_report.html").read_text()
    assert f"mse</code> (default for what the source holds), the best of {len(NVFP4_STEPS)} scales a group" in page
    assert "none: weights only" in page


@pytest.mark.parametrize(
    ("asked", "code", "why"),
    [
        (["--to", "nvfp4", "--activation-scales", "nowhere"], 1, "nowhere"),
        (["--to", "int4", "--activation-scales", "one"], 2, "with int4: scales of inputs stand only beside NVFP4"),
        (["--to", "nvfp4", "--kv-cache", "int8"], 2, "'int8' is not"),
        (["--to", "bf16", "--kv-cache", "fp8"], 2, "--kv-cache has no"),
        (["--to", "fp8", "--kv-cache", "fp8"], 2, "write such a layout, or ask the engine"),
        (["--to", "fp8", "--allow-rounding"], 2, "--allow-rounding has no meaning with fp8"),
        (["--to", "nvfp4", "--method", "gptq", "--data", "x"], 2, "--method gptq is not there for nvfp4"),
        (["--to", "nvfp4", "--layout", "deepseek"], 2, "--layout deepseek is none of nvfp4"),
    ],
)
def test_the_command_line_says_what_makes_no_sense(
    small_bf16: Path, tmp_path: Path, asked: list[str], code: int, why: str
) -> None:
    """With its own words for options, and an exit code that says whose mistake it is."""
    done = CliRunner().invoke(main, ["convert", *asked, str(small_bf16), str(tmp_path / "out")])
    assert why in " ".join(done.output.split())
    assert done.exit_code == code
    assert not (tmp_path / "out" / CONFIG).exists()


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
def test_verify_misses_scales_of_which_the_config_speaks(small_bf16: Path, tmp_path: Path, layout: Any) -> None:
    """A config that has inputs quantised beside weights without their scales fails: engines would read anything."""
    out = tmp_path / "out"
    scaled = k2quant.convert(small_bf16, tmp_path / "scaled", "nvfp4", layout=layout, activation_scales="one").folder
    k2quant.convert(small_bf16, out, "nvfp4", layout=layout)
    assert k2quant.verify(small_bf16, out).passed
    for name in (CONFIG, BESIDE):
        if (scaled / name).exists():
            (out / name).write_bytes((scaled / name).read_bytes())
    assert "24 weights have no scale of them" in k2quant.verify(small_bf16, out).failures[CONFIG]


@pytest.mark.parametrize("to", ["nvfp4", "mxfp4", "int4"])
def test_a_bias_of_a_weight_that_is_searched_is_copied(tmp_path: Path, to: Any) -> None:
    """It has the weight's name but for the end, and bytes of its own, whichever of the two comes last."""
    weight = np.random.default_rng(0).standard_normal((32, 64)).astype(np.float32)
    bits, bias = (weight.view(np.uint32) >> 16).astype(np.uint16), np.arange(32, dtype=np.uint16)
    base = "model.layers.1.mlp.experts.0.up_proj"
    for order in (("bias", "weight"), ("weight", "bias")):
        source = tmp_path / "-".join(order)
        shard = {f"{base}.{name}": ("BF16", {"weight": bits, "bias": bias}[name]) for name in order}
        write_checkpoint(source, {"model.safetensors": shard}, {"model_type": "kimi_k2"})
        made = open_checkpoint(k2quant.convert(source, tmp_path / f"{to}-{order[0]}", to, method="mse").folder)
        assert read_tensor(made, made.tensors[f"{base}.bias"]) == bias.tobytes()
