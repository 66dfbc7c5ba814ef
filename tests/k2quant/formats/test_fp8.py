"""Block FP8 as other tools store it: scales of other dtypes, and the names and config of compressed-tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from numpy.typing import NDArray
from safetensors.torch import save_file

import k2quant
from k2quant import qat
from k2quant.checking.comparison import compare, unlike
from k2quant.checkpoint.reader import CONFIG, REPORT, Checkpoint, open_checkpoint
from k2quant.checkpoint.reading import read_tensor
from k2quant.checkpoint.weights import group_tensors
from k2quant.checkpoint.writing.in_memory import Shard, write_checkpoint
from k2quant.cli import main
from k2quant.conversion.convert import carry_out
from k2quant.conversion.plan import Options, describe, make_plan, plan_of
from k2quant.conversion.recipes.recipe import Recipe, Rule
from k2quant.errors import (
    BadValue,
    CheckpointError,
    DestinationStale,
    DtypeMismatch,
    MalformedFile,
    MissingTensor,
    ShapeMismatch,
    UnsupportedFormat,
    UsageError,
)
from k2quant.formats.dtypes import TensorSpec, as_array, widened
from k2quant.formats.format import Layout
from k2quant.formats.fp8 import Fp8
from k2quant.formats.int4 import Int4
from k2quant.formats.known import FormatName
from k2quant.model import load_model, save_model
from k2quant.qat.loading import load as load_dense
from k2quant.report import write_html
from tiny import write_model

BASE = "model.layers.1.mlp.experts.0.up_proj"
RAGGED = "model.layers.0.self_attn.kv_a_proj_with_mqa"
OTHER: Layout = "compressed-tensors"

NARROW: dict[str, Callable[[NDArray[np.float32]], NDArray[Any]]] = {
    "BF16": lambda scale: (scale.view(np.uint32) >> 16).astype(np.uint16),
    "F16": lambda scale: (scale * 2**8).astype(np.float16),
    "F8_E8M0": lambda scale: (scale.view(np.uint32) >> 23).astype(np.uint8),
}
"""Scales of a small checkpoint in other dtypes: other values, but those alone."""


def tensors_of(folder: Path) -> dict[str, tuple[str, NDArray[Any]]]:
    """Return the tensors of a small checkpoint."""
    found = open_checkpoint(folder)
    return {name: (entry.dtype, array(found, name)) for name, entry in found.tensors.items()}


def array(checkpoint: Checkpoint, name: str) -> NDArray[Any]:
    """Return a tensor as numpy sees it."""
    entry = checkpoint.tensors[name]
    return as_array(
        np.frombuffer(bytearray(read_tensor(checkpoint, entry)), np.uint8), TensorSpec(entry.dtype, entry.shape)
    )


def group(**weights: Any) -> dict[str, Any]:
    """Return a block as llm-compressor's FP8_BLOCK has it, with some entries of the weights' scheme replaced."""
    scheme = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
    blocks = {"strategy": "block", "block_structure": [128, 128], "group_size": None}
    inputs = {"strategy": "group", "group_size": 128}
    return {
        "quant_method": OTHER,
        "format": "float-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": scheme | blocks | weights,
                "input_activations": scheme | inputs | {"dynamic": True},
                "output_activations": None,
            }
        },
        "ignore": ["lm_head"],
    }


def with_scales(source: Path, folder: Path, change: Callable[[NDArray[np.float32]], tuple[str, NDArray[Any]]]) -> Path:
    """Write a checkpoint anew with other scales."""
    shards: dict[str, Shard] = {}
    found = open_checkpoint(source)
    for name, (dtype, values) in tensors_of(source).items():
        scale = name.endswith("_scale_inv")
        shards.setdefault(found.tensors[name].file, {})[name] = change(values) if scale else (dtype, values)
    write_checkpoint(folder, shards, found.config)
    return folder


@pytest.fixture(scope="module", params=NARROW)
def narrow(
    k2_source: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> tuple[Path, Path]:
    """A small K2 with scales of another dtype, and the same values with float32 scales."""
    folder, dtype = tmp_path_factory.mktemp("narrow"), request.param
    stored = with_scales(k2_source, folder / "stored", lambda scale: (dtype, NARROW[dtype](scale)))
    plain = with_scales(k2_source, folder / "plain", lambda scale: ("F32", widened(NARROW[dtype](scale))))
    return stored, plain


@pytest.fixture(scope="module")
def relabelled(k2_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small K2 as compressed-tensors has it."""
    return k2quant.convert(k2_source, tmp_path_factory.mktemp("other") / "K2-CT", to="fp8", layout=OTHER).folder


def same(first: Path, second: Path) -> bool:
    """Tell whether two checkpoints have the same tensors, names and bytes."""
    ours, theirs = tensors_of(first), tensors_of(second)
    return ours.keys() == theirs.keys() and all(
        dtype == theirs[name][0] and values.tobytes() == theirs[name][1].tobytes()
        for name, (dtype, values) in ours.items()
    )


# --- scales of other dtypes -------------------------------------------------------------------------------------------


def test_every_e8m0_byte_is_its_power_of_two() -> None:
    """The byte b is 2^(b - 127), the smallest of them subnormal in float32, and 255 is NaN."""
    found = widened(np.arange(256, dtype=np.uint8))
    assert [float(value) for value in found[:255]] == [2.0 ** (byte - 127) for byte in range(255)]
    assert np.isnan(found[255])


@pytest.mark.parametrize("to", ["bf16", "int4", "fp8"])
def test_scales_of_another_dtype_convert_as_the_float32_that_they_mean(
    narrow: tuple[Path, Path], tmp_path: Path, to: FormatName
) -> None:
    """A good checkpoint refused: BF16, F16 and F8_E8M0 scales give the bytes that equal float32 scales give.

    FP8 stays FP8 with the same codes, and its scales are written as float32.
    """
    stored, plain = narrow
    made = k2quant.convert(stored, tmp_path / "made", to=to).folder
    wanted = k2quant.convert(plain, tmp_path / "wanted", to=to).folder
    assert same(made, wanted)
    assert (made / CONFIG).read_bytes() == (wanted / CONFIG).read_bytes()
    assert k2quant.verify(stored, made).passed
    assert to != "fp8" or same(made, plain)


def test_scales_of_another_dtype_are_inspected_and_compared(narrow: tuple[Path, Path]) -> None:
    """`inspect` finds nothing wrong, and `diff` no value that differs from those of float32 scales."""
    stored, plain = narrow
    found = k2quant.inspect(stored)
    assert not found.problems
    assert {row.format for row in found.rows if row.tensor_class == "routed experts"} == {"fp8 128x128"}
    assert not [finding for finding in compare(stored, plain, workers=1) if unlike(finding)]


def test_scales_of_another_dtype_run_train_and_are_saved_as_they_were(
    narrow: tuple[Path, Path], tmp_path: Path
) -> None:
    """The same logits, the same dense weights to train; a save gives the source's bytes back, narrow scales too."""
    stored, plain = narrow
    ids = torch.randint(0, 2048, (1, 8), generator=torch.Generator().manual_seed(4))
    ours: Any = load_model(stored)
    with torch.no_grad():
        theirs: Any = load_model(plain)
        assert torch.equal(ours(ids).logits, theirs(ids).logits)
    save_model(ours, tmp_path / "saved")
    assert same(tmp_path / "saved", stored)
    again = ours.state_dict()
    ours.load_state_dict(again)
    name = f"{BASE}.weight_scale_inv"
    with pytest.raises(RuntimeError, match="as the checkpoint has it, found"):
        ours.load_state_dict(again | {name: again[name].double()})
    dense, wanted = (dict(load_dense(folder, dtype=torch.bfloat16).named_parameters()) for folder in narrow)
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in dense.items())


class Bad:
    """A weight whose scales, config or partners are spoilt."""

    def __init__(self, folder: Path) -> None:
        self.source, self.destination = folder / "source", folder / "destination"

    def write(self, *scales: tuple[str, str, NDArray[Any]], block: object = None, code: int = 0x38) -> None:
        """Write 160 x 128 ones, one code of them another, with these scales: suffix, dtype and values.

        The second scale lies in another shard.
        """
        codes = np.full((160, 128), 0x38, np.uint8)
        codes[130, 7] = code
        first: Shard = {f"{BASE}.weight": ("F8_E4M3", codes)}
        second: Shard = {"model.norm.weight": ("BF16", np.full(64, 0x3F80, np.uint16))}
        for number, (suffix, dtype, values) in enumerate(scales):
            (second if number else first)[f"{BASE}.{suffix}"] = (dtype, values)
        config = {"model_type": "kimi_k2"} | ({} if block is None else {"quantization_config": block})
        write_checkpoint(self.source, {"a.safetensors": first, "b.safetensors": second}, config)

    def refused(self, error: type[CheckpointError], *words: str, to: FormatName = "bf16", **options: Any) -> None:
        """Check that a conversion is refused in words, and leaves nothing that looks finished."""
        with pytest.raises(error) as caught:
            k2quant.convert(self.source, self.destination, to=to, workers=1, **options)
        for word in words:
            assert word in str(caught.value)
        assert not (self.destination / CONFIG).exists()
        assert not list(self.destination.glob("*.safetensors"))


@pytest.fixture
def bad(tmp_path: Path) -> Bad:
    """A place for a hostile checkpoint."""
    return Bad(tmp_path)


ONES = np.ones((2, 1), np.float32)


@pytest.mark.parametrize("suffix", ["weight_scale_inv", "weight_scale"])
@pytest.mark.parametrize(
    ("dtype", "value", "words"),
    [
        ("BF16", 0xBF80, "negative scale -1.0"),
        ("BF16", 0x7F80, "non-finite scale inf"),
        ("BF16", 0xFFC0, "non-finite scale nan"),
        ("F8_E8M0", 255, "non-finite scale nan"),
        ("F16", -1.0, "negative scale -1.0"),
    ],
)
def test_bad_scales_of_another_dtype(bad: Bad, suffix: str, dtype: str, value: float, words: str) -> None:
    """A scale that is negative, infinite or NaN is named with its row, also where codes stay FP8 and only it widens."""
    kinds = {"BF16": np.uint16, "F8_E8M0": np.uint8, "F16": np.float16}
    scale = np.full((2, 1), {"BF16": 0x3F80, "F8_E8M0": 127, "F16": 1.0}[dtype]).astype(kinds[dtype])
    scale[1] = value
    bad.write((suffix, dtype, scale))
    bad.refused(BadValue, f"{BASE}.{suffix}", words, "row 1, column 0")
    bad.refused(BadValue, f"{BASE}.{suffix}", words, "row 1, column 0", to="fp8", restart=True)
    with pytest.raises(CheckpointError, match=words):
        load_values(bad.source)


def load_values(folder: Path) -> None:
    """Convert on to INT4, which reads FP8 by a loop of its own."""
    k2quant.convert(folder, folder.parent / "int4", to="int4", workers=1)


@pytest.mark.parametrize("suffix", ["weight_scale_inv", "weight_scale"])
@pytest.mark.parametrize("dtype", ["F64", "I32", "U8", "F8_E4M3"])
def test_scales_of_a_dtype_that_is_none(bad: Bad, suffix: str, dtype: str) -> None:
    """Doubles, integers and codes are no scales."""
    kind = {"F64": np.float64, "I32": np.int32}.get(dtype, np.uint8)
    bad.write((suffix, dtype, np.ones((2, 1), kind)))
    bad.refused(DtypeMismatch, f"{BASE}.{suffix}", "BF16 or F16 or F32 or F8_E8M0", dtype)


# --- the layout of compressed-tensors ---------------------------------------------------------------------------------


def test_a_relabelling_keeps_codes_and_scales_byte_for_byte(k2_source: Path, relabelled: Path, tmp_path: Path) -> None:
    """A good checkpoint refused: `--layout compressed-tensors` writes the same bytes under the other name, and back.

    Ragged blocks and scales in another shard than their codes among them; the config is the source's again.
    """
    ours, theirs = tensors_of(k2_source), tensors_of(relabelled)
    assert f"{RAGGED}.weight_scale" in theirs
    assert not [name for name in theirs if name.endswith("_inv")]
    assert ours.keys() == {name.replace("weight_scale", "weight_scale_inv") for name in theirs}
    for name, (dtype, values) in theirs.items():
        source = ours[name.replace("weight_scale", "weight_scale_inv")]
        assert (dtype, values.tobytes()) == (source[0], source[1].tobytes())
    back = k2quant.convert(relabelled, tmp_path / "back", to="fp8").folder
    assert same(back, k2_source)
    assert json.loads((back / CONFIG).read_text()) == json.loads((k2_source / CONFIG).read_text())


def test_a_relabelled_checkpoint_is_known_to_every_command(k2_source: Path, relabelled: Path, tmp_path: Path) -> None:
    """`inspect` names the layout, `verify` and `diff` find equal codes, the page says what was done."""
    rows = {row.tensor_class: row.format for row in k2quant.inspect(relabelled).rows}
    assert rows["attention"] == rows["routed experts"] == f"fp8 128x128 {OTHER}"
    assert not k2quant.inspect(relabelled).problems
    assert k2quant.verify(k2_source, relabelled).passed
    assert k2quant.verify_checksums(relabelled).passed
    findings = compare(k2_source, relabelled, workers=1)
    assert not [finding for finding in findings if unlike(finding)]
    assert {finding.relation for finding in findings if finding.formats[0] == Fp8.name} == {"codes equal"}
    plan = make_plan(open_checkpoint(k2_source), Options("fp8", layout=OTHER))
    assert describe(plan)["routed experts"] == {"relabelled": 96}
    page = write_html(relabelled, tmp_path / "page.html").read_text()
    assert "kept codes and scales of" in page
    assert "under other names or as float32 scales" in page
    assert OTHER in page


def test_verify_finds_a_code_or_scale_that_a_relabelling_changed(k2_source: Path, tmp_path: Path) -> None:
    """A byte of codes, or a scale that means the same values, differs from the source's: both are named."""
    made = k2quant.convert(k2_source, tmp_path / "made", to="fp8", layout=OTHER).folder
    entries = open_checkpoint(made).tensors
    for name in (f"{BASE}.weight", f"{RAGGED}.weight_scale"):
        with (made / entries[name].file).open("r+b") as file:
            file.seek(entries[name].start)
            first = file.read(1)
            file.seek(entries[name].start)
            file.write(bytes([first[0] ^ 1]))
    assert list(k2quant.verify(k2_source, made).failures) == [f"{RAGGED}.weight", f"{BASE}.weight"]


@pytest.mark.parametrize("to", ["bf16", "int4"])
def test_other_formats_are_written_from_both_layouts_alike(
    k2_source: Path, relabelled: Path, tmp_path: Path, to: FormatName
) -> None:
    """What compressed-tensors' layout becomes is what DeepSeek's becomes, config and all."""
    ours = k2quant.convert(relabelled, tmp_path / "ours", to=to).folder
    theirs = k2quant.convert(k2_source, tmp_path / "theirs", to=to).folder
    assert same(ours, theirs)
    assert (ours / CONFIG).read_bytes() == (theirs / CONFIG).read_bytes()


def test_bf16_is_rounded_to_both_layouts_alike(k2_bf16: Path, relabelled: Path, tmp_path: Path) -> None:
    """From BF16, `--layout` changes names and config and no code; what is kept out stands in the ignore list."""
    made = k2quant.convert(k2_bf16, tmp_path / "made", to="fp8", layout=OTHER, ignore=(r"layers\.0\.mlp",)).folder
    theirs = tensors_of(relabelled)
    for name, (dtype, values) in tensors_of(made).items():
        if name.endswith(".weight") and dtype == "F8_E4M3":
            assert values.tobytes() == theirs[name][1].tobytes()
    block = json.loads((made / CONFIG).read_text())["quantization_config"]
    assert (
        "model.layers.0.mlp.up_proj" in block["ignore"] or r"re:.*mlp\.(gate|up|gate_up|down)_proj.*" in block["ignore"]
    )
    assert k2quant.verify(k2_bf16, made).passed


def test_out_of_scope_the_layout_holds_too(k2_source: Path, tmp_path: Path) -> None:
    """FP8 weights that `--ignore` keeps out stay FP8, under the names that the config speaks of."""
    made = k2quant.convert(k2_source, tmp_path / "made", to="fp8", layout=OTHER, ignore=("experts",)).folder
    assert not [name for name in open_checkpoint(made).tensors if name.endswith("_inv")]
    assert k2quant.verify(k2_source, made).passed


def test_a_relabelled_checkpoint_computes_the_same(k2_source: Path, relabelled: Path, tmp_path: Path) -> None:
    """Equal logits, and a save that gives the bytes back."""
    ids = torch.randint(0, 2048, (1, 8), generator=torch.Generator().manual_seed(4))
    ours: Any = load_model(relabelled)
    theirs: Any = load_model(k2_source)
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)
    assert f"{BASE}.weight_scale" in ours.state_dict()
    save_model(ours, tmp_path / "saved")
    assert same(tmp_path / "saved", relabelled)


def test_formats_beside_each_other_have_a_config_group_each(k2_bf16: Path, tmp_path: Path) -> None:
    """INT4 experts beside FP8 elsewhere, which only this layout's config can say, are written and read back."""
    source = open_checkpoint(k2_bf16)
    rules = (Rule(format=Int4(), scope="experts"), Rule(format=Fp8(layout=OTHER), scope="linear"))
    plan = plan_of(source, group_tensors(source.tensors).weights, Recipe(rules), Options("int4"))
    made = carry_out(plan, tmp_path / "made", workers=1).folder
    block = json.loads((made / CONFIG).read_text())["quantization_config"]
    found = {each["format"]: each for each in block["config_groups"].values()}
    assert block["format"] == "mixed-precision"
    assert found["pack-quantized"]["input_activations"] is None
    assert found["float-quantized"]["input_activations"]["group_size"] == 128
    assert not k2quant.inspect(made).problems
    assert k2quant.verify(k2_bf16, made).passed
    k2quant.convert(made, tmp_path / "bf16", to="bf16")


def test_the_layout_is_one_of_the_options_that_a_run_remembers(
    k2_source: Path, relabelled: Path, tmp_path: Path
) -> None:
    """A finished folder of the other layout is not taken for this one's, and the report says which it is."""
    assert json.loads((relabelled / REPORT).read_text())["options"]["layout"] == OTHER
    made = tmp_path / "made"
    k2quant.convert(k2_source, made, to="fp8", layout=OTHER)
    with pytest.raises(DestinationStale, match="other options"):
        k2quant.convert(k2_source, made, to="fp8")
    assert k2quant.convert(k2_source, made, to="fp8", layout=OTHER).already_done


def test_what_an_earlier_release_finished_is_finished(k2_source: Path, tmp_path: Path) -> None:
    """A report that knows no layouts is that of a conversion to DeepSeek's, the only one that there was."""
    made = k2quant.convert(k2_source, tmp_path / "made", to="fp8").folder
    report = json.loads((made / REPORT).read_text())
    del report["options"]["layout"]
    (made / REPORT).write_text(json.dumps(report))
    assert k2quant.convert(k2_source, made, to="fp8").already_done
    with pytest.raises(DestinationStale, match="other options"):
        k2quant.convert(k2_source, made, to="fp8", layout=OTHER)
    assert "deepseek (default)" in write_html(made, tmp_path / "page.html").read_text()


@pytest.mark.parametrize("to", ["bf16", "int4"])
def test_a_layout_has_no_meaning_for_other_formats(k2_source: Path, tmp_path: Path, to: FormatName) -> None:
    """`--layout` with another format is a usage error, exit 2; so is one that nobody knows."""
    command = ["convert", str(k2_source), str(tmp_path / "out"), "--to", to, "--layout", OTHER]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 2
    assert f"--layout has no meaning with {to}" in done.stderr
    unknown: Any = "gguf"
    with pytest.raises(UsageError, match="unknown layout 'gguf'; expected deepseek, compressed-tensors"):
        k2quant.convert(k2_source, tmp_path / "out", to="fp8", layout=unknown)


def test_blocks_that_the_layout_does_not_have(tmp_path: Path) -> None:
    """Blocks of 1x128 are read, and refused under compressed-tensors' names."""
    shard: Shard = {
        f"{BASE}.weight": ("F8_E4M3", np.full((4, 128), 0x38, np.uint8)),
        f"{BASE}.weight_scale_inv": ("F32", np.ones((4, 1), np.float32)),
    }
    write_checkpoint(tmp_path / "src", {"model.safetensors": shard}, {"model_type": "kimi_k2"})
    with pytest.raises(UnsupportedFormat, match="expected blocks of 128x128, found fp8 1x128"):
        k2quant.convert(tmp_path / "src", tmp_path / "out", to="fp8", layout=OTHER)


def adapter(folder: Path) -> Path:
    """Write a LoRA adapter of rank 2 for one projection and one expert."""
    random = torch.Generator().manual_seed(7)
    tensors = {}
    for base, (rows, columns) in {RAGGED: (160, 512), BASE: (256, 512)}.items():
        tensors[f"base_model.model.{base}.lora_A.weight"] = torch.randn(2, columns, generator=random) * 0.1
        tensors[f"base_model.model.{base}.lora_B.weight"] = torch.randn(rows, 2, generator=random) * 0.1
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_an_update_is_merged_into_and_out_of_both_layouts(k2_source: Path, relabelled: Path, tmp_path: Path) -> None:
    """Merged values are stored in the layout that is asked for, from a base of either, and the rest is relabelled."""
    update = adapter(tmp_path / "update")
    plain = k2quant.merge(k2_source, update, tmp_path / "plain", to="fp8").folder
    from_other = k2quant.merge(relabelled, update, tmp_path / "from", to="fp8").folder
    into_other = k2quant.merge(k2_source, update, tmp_path / "into", to="fp8", layout=OTHER).folder
    assert same(from_other, plain)
    assert not same(plain, k2_source)
    assert same(k2quant.convert(into_other, tmp_path / "back", to="fp8").folder, plain)


def test_an_update_is_merged_into_scales_of_another_dtype(narrow: tuple[Path, Path], tmp_path: Path) -> None:
    """New values get float32 scales, as all that is written as FP8."""
    update = adapter(tmp_path / "update")
    ours, theirs = (k2quant.merge(base, update, tmp_path / base.name, to="fp8").folder for base in narrow)
    assert same(ours, theirs)


@pytest.mark.parametrize("kind", ["layout", "dtype"])
def test_qat_trains_on_and_exports_over_such_bases(tmp_path: Path, kind: str) -> None:
    """What QAT exports over a base of the other layout, or with BF16 scales, is what it exports over the plain one."""
    write_model(tmp_path / "bf16")
    plain = k2quant.convert(tmp_path / "bf16", tmp_path / "fp8", to="fp8").folder
    bits = NARROW["BF16"]
    if kind == "dtype":
        base = with_scales(plain, tmp_path / "base", lambda scale: ("BF16", bits(scale)))
        plain = with_scales(plain, tmp_path / "plain", lambda scale: ("F32", widened(bits(scale))))
    else:
        base = k2quant.convert(plain, tmp_path / "base", to="fp8", layout=OTHER).folder
    ours, theirs = (
        qat.export(qat.prepare(load_dense(folder), qat.QATConfig(to="fp8")), tmp_path / f"{folder.name} out").folder
        for folder in (base, plain)
    )
    assert same(ours, theirs)


# --- hostile ----------------------------------------------------------------------------------------------------------


def test_scales_of_both_names(bad: Bad) -> None:
    """A weight that is scaled under both names, whether they agree or not, is refused: only one can be meant."""
    bad.write(("weight_scale", "F32", ONES), ("weight_scale_inv", "F32", ONES * 2))
    bad.refused(MalformedFile, f"{BASE}.weight", "scaled twice, by weight_scale_inv and by weight_scale")
    assert len(k2quant.inspect(bad.source).problems) == 1


@pytest.mark.parametrize(
    ("code", "scale", "words"), [(0x7F, 1.0, "NaN code 0x7F"), (0x7E, 3e38, "overflow: 448 * 3e+38")]
)
def test_a_bad_value_is_not_relabelled(bad: Bad, code: int, scale: float, words: str) -> None:
    """No silent damage: what cannot be decoded is refused under its new name too, with its row and column."""
    bad.write(("weight_scale_inv", "F32", np.array([[1.0], [scale]], np.float32)), code=code)
    bad.refused(BadValue, f"{BASE}.weight", words, "row 130, column 7", to="fp8", layout=OTHER)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (160,), (160, 1)])
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_a_scale_for_each_row_or_tensor_is_refused_by_name(bad: Bad, shape: tuple[int, ...], dtype: str) -> None:
    """Nothing reads FP8 scaled by rows or as a whole; the scale's own name and shape are in the message."""
    bad.write(("weight_scale", dtype, np.ones(shape, np.float32 if dtype == "F32" else np.uint16)))
    bad.refused(UnsupportedFormat, f"{BASE}.weight_scale", "for each row or tensor", f"found {dtype} {list(shape)}")


@pytest.mark.parametrize("shape", [(1, 2), (3, 1), (2, 1, 1), (160, 2), (2,), (0, 1)])
def test_block_scales_of_wrong_shape(bad: Bad, shape: tuple[int, ...]) -> None:
    """There must be one entry for each block, the ragged one too."""
    bad.write(("weight_scale", "F32", np.ones(shape, np.float32)))
    bad.refused(ShapeMismatch, f"{BASE}.weight_scale", "expected (2, 1)", f"found {shape}")


def test_block_scales_in_another_shard(bad: Bad) -> None:
    """The index says where a scale lies; without it, the codes lack a partner."""
    bad.write()
    bad.refused(MissingTensor, f"{BASE}.weight_scale_inv")
    shards: dict[str, Shard] = {
        "a.safetensors": {f"{BASE}.weight": ("F8_E4M3", np.full((160, 128), 0x38, np.uint8))},
        "b.safetensors": {f"{BASE}.weight_scale": ("BF16", np.array([[0x3F80], [0x4000]], np.uint16))},
    }
    write_checkpoint(bad.source, shards, {"model_type": "kimi_k2", "quantization_config": group()})
    k2quant.convert(bad.source, bad.destination, to="bf16")
    values = widened(array(open_checkpoint(bad.destination), f"{BASE}.weight"))
    assert np.array_equal(values, np.repeat([1.0, 2.0], [128, 32])[:, None] * np.ones((1, 128)))


@pytest.mark.parametrize(
    ("block", "error", "words"),
    [
        (
            group(block_structure=[64, 64]),
            CheckpointError,
            "block_structure [64, 64], found scales for blocks of (128, 128)",
        ),
        (group(block_structure="128x128"), CheckpointError, "block_structure '128x128'"),
        (group(block_structure=None), CheckpointError, "block_structure None"),
        (group(block_structure=[[128], {}]), CheckpointError, "contradicts the tensors"),
        (group(strategy="tensor"), UnsupportedFormat, "expected block, found 'tensor'"),
        (group(strategy="channel"), UnsupportedFormat, "expected block, found 'channel'"),
        (group(strategy=["block"]), UnsupportedFormat, "expected block, found ['block']"),
        (group(num_bits=4), UnsupportedFormat, "expected symmetric 8-bit float, found num_bits 4, type"),
        (group(num_bits="8"), UnsupportedFormat, "expected symmetric 8-bit float"),
        (group(type="int"), UnsupportedFormat, "expected symmetric 8-bit float"),
        (group(symmetric=False), UnsupportedFormat, "expected symmetric 8-bit float"),
        (group() | {"format": "naive-quantized"}, UnsupportedFormat, "float-quantized (FP8)"),
        (
            {"quant_method": "fp8", "weight_block_size": [128, 128]},
            CheckpointError,
            "expected block-FP8 weights with weight_scale_inv, as quant_method fp8 says, found weight_scale",
        ),
    ],
)
def test_a_config_that_says_otherwise(bad: Bad, block: object, error: type[CheckpointError], words: str) -> None:
    """Block size, strategy, width, type and names of a config must be those of the scales beside it."""
    bad.write(("weight_scale", "F32", ONES), block=block)
    bad.refused(error, words)


def test_a_config_of_the_other_layout(bad: Bad) -> None:
    """compressed-tensors' config beside DeepSeek's names would leave an engine without scales."""
    bad.write(("weight_scale_inv", "F32", ONES), block=group())
    bad.refused(CheckpointError, "weight_scale, as format float-quantized says, found weight_scale_inv")
