"""A format that the product does not have: all that it takes to have one stands in the class below."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, get_args

import numpy as np
import pytest

import k2quant
from k2quant.checking.comparison import compare, unlike
from k2quant.checkpoint.panels import panel_state, read_values
from k2quant.checkpoint.reader import CONFIG, Checkpoint, open_checkpoint
from k2quant.checkpoint.weights import StoredWeight, group_tensors
from k2quant.conversion.convert import carry_out
from k2quant.conversion.placing import Job
from k2quant.conversion.plan import Options, Plan, describe, make_plan, plan_of
from k2quant.conversion.recipes.recipe import Recipe, Rule
from k2quant.errors import CheckpointError, UnsupportedFormat, UsageError
from k2quant.formats.configs import compressed_tensors
from k2quant.formats.dtypes import DTYPES, TensorSpec
from k2quant.formats.format import Entry, Format, Neighbours, Parts, Scope, Stored, contradiction, matrix
from k2quant.formats.fp8 import Fp8
from k2quant.formats.int4 import Int4
from k2quant.formats.known import FORMATS, ExportFormat, FormatName
from k2quant.formats.transcode import Scratch
from k2quant.kernels.codecs.choice import codecs as codecs_of
from k2quant.kernels.codecs.figures import Figures
from k2quant.kernels.codecs.grids import Grid
from k2quant.kernels.codecs.seam import Codecs
from k2quant.kernels.codecs.values import U16, bf16_to_float, float_to_bf16
from k2quant.report import write_html


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8(Format):
    """Eight-bit codes with a float32 scale for each row."""

    name: ClassVar[str] = "int8"
    mains: ClassVar[tuple[str, ...]] = ("weight",)
    streamed: ClassVar[tuple[str, ...]] = ("weight", "weight_scale")
    partners: ClassVar[tuple[str, ...]] = ("weight_scale",)
    scale_suffix: ClassVar[str | None] = "weight_scale"
    reads: ClassVar[str] = "INT8 with a scale a row"
    stands_for: ClassVar[str] = "INT8 weights"
    method: ClassVar[str | None] = "int8"
    default_scope: ClassVar[Scope | None] = "linear"
    unit: ClassVar[str] = "row"
    label: ClassVar[str] = "int8 row"
    packing: ClassVar[str] = "int-quantized"
    scheme_words: ClassVar[str] = "8-bit int"

    def state(self, shape: tuple[int, ...], *, name: str = "weight") -> dict[str, TensorSpec]:
        """Codes and scales."""
        return {"weight": TensorSpec("I8", shape), "weight_scale": TensorSpec("F32", (shape[0], 1))}

    @classmethod
    def recognise(cls, suffix: str, entry: Entry, beside: Neighbours) -> Stored | None:
        """The dtype tells."""
        if suffix not in cls.mains or entry.dtype != "I8":
            return None
        beside.partner("weight_scale", entry)
        return Stored(cls(), matrix(entry), cls.streamed)

    def decode(self, parts: Parts, out: U16, codecs: Codecs) -> None:
        """Codes times scales."""
        out[...] = float_to_bf16(parts["weight"].astype(np.float32) * parts["weight_scale"])

    def choose(self, weights: U16, codecs: Codecs) -> Any:
        """Amax / 127, or 1 for a row of zeros."""
        amax = np.abs(bf16_to_float(weights)).max(axis=1, keepdims=True) / np.float32(127)
        return np.where(amax > 0, amax, np.float32(1))

    def store(self, weights: U16, scales: Any, parts: Parts, codecs: Codecs) -> Figures:
        """Round to nearest."""
        parts["weight_scale"][...] = scales
        parts["weight"][...] = np.rint(bf16_to_float(weights) / scales).clip(-127, 127)
        decoded = np.empty_like(weights)
        self.decode(parts, decoded, codecs)
        return codecs.floats.compare(weights, decoded)

    def outside(self, before: U16, after: U16, parts: Parts) -> int:
        """Half a step, and what rounding to BF16 adds."""
        return int((np.abs(bf16_to_float(before) - bf16_to_float(after)) > parts["weight_scale"]).sum())

    def config(self, quantised: Iterable[str], kept: list[str]) -> dict[str, Any]:
        """A block of its own."""
        return {"quant_method": self.method, "kept": len(kept)}

    def config_group(self) -> dict[str, Any]:
        """Beside others it is a group of compressed-tensors."""
        return compressed_tensors.scheme(group_size=None, num_bits=8, symmetric=True, type="int")

    @classmethod
    def claims(cls, scheme: Mapping[str, Any]) -> bool:
        """Eight bits."""
        return scheme.get("num_bits") == 8

    @classmethod
    def check_config(cls, block: Mapping[str, Any], stored: list[tuple[Format, tuple[int, ...]]]) -> None:
        """There must be some."""
        if not stored:
            raise contradiction(cls.stands_for, "none")


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the product know the format."""
    monkeypatch.setitem(FORMATS, Int8.name, Int8)


def convert(source: Path, folder: Path, to: str, **options: Any) -> Path:
    """Convert; what a format is called is no longer one of three words."""
    return k2quant.convert(source, folder, to=to, **options).folder  # type: ignore[arg-type]


def test_it_is_planned_converted_inspected_verified_and_reported(k2_source: Path, tmp_path: Path) -> None:
    """From FP8 to the made-up format: every job of the product works, and says its name."""
    plan = make_plan(open_checkpoint(k2_source), Options("int8"))  # type: ignore[arg-type]
    assert describe(plan)["routed experts"] == {"fp8 -> int8": 96}
    made = convert(k2_source, tmp_path / "int8", "int8")
    labels = {row.tensor_class: row.format for row in k2quant.inspect(made).rows}
    assert labels["attention"] == labels["routed experts"] == "int8 row"
    assert not k2quant.inspect(made).problems
    assert json.loads((made / CONFIG).read_text())["quantization_config"]["quant_method"] == "int8"
    assert k2quant.verify(k2_source, made).passed
    assert k2quant.verify_checksums(made).passed
    page = write_html(made).read_text()
    assert "FP8 &rarr; INT8" in page
    assert "INT8" in page.partition("<h1>")[2].partition("</h1>")[0]


@pytest.mark.parametrize("to", ["bf16", "fp8", "int4"])
def test_it_converts_to_every_format_and_back(k2_source: Path, tmp_path: Path, to: str) -> None:
    """Pairs that no table names go through BF16: the same bytes as by way of a BF16 checkpoint."""
    made = convert(k2_source, tmp_path / "int8", "int8")
    direct = convert(made, tmp_path / "direct", to)
    by_way = convert(convert(made, tmp_path / "bf16", "bf16"), tmp_path / "by way", to)
    assert not [finding for finding in compare(direct, by_way, workers=1) if unlike(finding)]
    again = convert(direct, tmp_path / "again", "int8")
    assert k2quant.verify(direct, again).passed


def test_verify_finds_what_its_rounding_does_not_explain(k2_source: Path, tmp_path: Path) -> None:
    """A code that is off by many steps fails, whoever wrote it."""
    made = convert(k2_source, tmp_path / "int8", "int8")
    entry = next(e for e in open_checkpoint(made).tensors.values() if e.dtype == "I8")
    with (made / entry.file).open("r+b") as file:
        file.seek(entry.start)
        first = file.read(1)
        file.seek(entry.start)
        file.write(bytes([first[0] ^ 0x40]))
    assert list(k2quant.verify(k2_source, made).failures) == [entry.name]


def test_its_options_are_checked(k2_source: Path, tmp_path: Path) -> None:
    """A format without grids has no `--grid`; one that nobody knows is refused with the names of all."""
    with pytest.raises(UsageError, match="`grid=` has no meaning with int8: it is the rounding rule of INT4"):
        convert(k2_source, tmp_path / "out", "int8", grid="moonshot")
    with pytest.raises(UsageError, match="unknown format 'int3'; expected bf16, fp8, int4, nvfp4, mxfp4, int8"):
        convert(k2_source, tmp_path / "out", "int3")


def test_a_config_that_promises_it_is_held_to_the_tensors(k2_source: Path, tmp_path: Path) -> None:
    """A config that speaks of the format beside weights of another one is refused."""
    folder = tmp_path / "claims"
    convert(k2_source, folder, "fp8")
    config = json.loads((folder / CONFIG).read_text()) | {"quantization_config": {"quant_method": "int8"}}
    (folder / CONFIG).write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"expected INT8 weights, found none"):
        convert(folder, tmp_path / "out", "bf16")


def mixed(source: Path, *rules: Rule) -> Plan:
    """Plan what several rules say."""
    checkpoint = open_checkpoint(source)
    return plan_of(checkpoint, group_tensors(checkpoint.tensors).weights, Recipe(rules), Options("int4"))


def test_a_recipe_holds_several_formats(k2_bf16: Path, tmp_path: Path) -> None:
    """INT4 experts beside INT8 elsewhere: one conversion, a config group for each, read back as it was meant."""
    plan = mixed(k2_bf16, Rule(format=Int4(), scope="experts"), Rule(format=Int8(), scope="linear"))
    done = carry_out(replace(plan, values={"recipe": "mixed"}), tmp_path / "out", workers=1)
    labels = {row.tensor_class: row.format for row in k2quant.inspect(done.folder).rows}
    assert (labels["routed experts"], labels["shared experts"]) == ("int4 group 32", "int8 row")
    block = json.loads((done.folder / CONFIG).read_text())["quantization_config"]
    groups = block["config_groups"]
    assert (block["format"], groups["group_0"]["format"]) == ("mixed-precision", "int-quantized")
    assert [group["weights"]["num_bits"] for group in groups.values()] == [8, 4]
    assert groups["group_1"]["targets"] == ["Linear"]
    assert "model.layers.0.self_attn.q_a_proj" in groups["group_0"]["targets"]
    assert not k2quant.inspect(done.folder).problems
    assert k2quant.verify(k2_bf16, done.folder).passed


def test_formats_that_no_config_can_name_together_are_refused(k2_bf16: Path) -> None:
    """Block FP8 has a config of its own kind, which says nothing of other formats."""
    with pytest.raises(UnsupportedFormat, match=r"beside others, expected fp8 128x128 alone"):
        mixed(k2_bf16, Rule(format=Int4(), scope="experts"), Rule(format=Fp8(), scope="linear"))


@pytest.mark.parametrize("grids", [("moonshot", "compressed-tensors")])
def test_a_recipe_asks_for_a_format_in_one_way(grids: tuple[Grid, Grid]) -> None:
    """Two grids of INT4 in one checkpoint would be told apart by nothing."""
    first, second = (Rule(format=Int4(grid=grid), scope="experts") for grid in grids)
    with pytest.raises(UsageError, match="a recipe asks for int4 in two ways"):
        Recipe((first, second))


@dataclass(frozen=True, slots=True, kw_only=True)
class Surveyed(Int8):
    """The same with one scale for a whole tensor, which no panel knows by itself."""

    name: ClassVar[str] = "surveyed"
    surveyed: ClassVar[bool] = True
    whole: ClassVar[tuple[str, ...]] = ("weight_scale",)

    amax: float = 0.0

    def state(self, shape: tuple[int, ...], *, name: str = "weight") -> dict[str, TensorSpec]:
        """Codes and a scale."""
        return {"weight": TensorSpec("I8", shape), "weight_scale": TensorSpec("F32", (1, 1))}

    def rows(self, suffix: str, start: int, stop: int) -> tuple[int, int]:
        """Every panel has the scale."""
        return (0, 1) if suffix in self.whole else (start, stop)

    def survey(self, weights: U16, codecs: Codecs) -> float:
        """The largest magnitude of a panel."""
        return float(np.abs(bf16_to_float(weights)).max())

    def settled(self, surveys: list[Any]) -> Format:
        """The largest of all."""
        return replace(self, amax=max(surveys))

    def choose(self, weights: U16, codecs: Codecs) -> Any:
        """One for all rows."""
        return np.full((1, 1), self.amax / 127, np.float32)


@pytest.fixture
def _surveyed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the product know that one instead."""
    monkeypatch.setitem(FORMATS, "surveyed", Surveyed)
    monkeypatch.delitem(FORMATS, "int8")


def largest(weight: StoredWeight, source: Checkpoint) -> float:
    """Return the largest magnitude of a weight."""
    panel = read_values(source, weight, 0, weight.shape[0], codecs=codecs_of("cpu"), scratch=Scratch())
    return float(np.abs(bf16_to_float(panel.values)).max())


@pytest.mark.usefixtures("_surveyed")
def test_a_survey_of_the_whole_tensor_comes_before_its_first_panel(
    k2_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut into panels of 128 rows, each tensor has one scale, of its largest weight, written and summed once."""
    monkeypatch.setattr("k2quant.checkpoint.panels.PANEL_WEIGHTS", 1)
    made, source = convert(k2_source, tmp_path / "out", "surveyed", workers=3), open_checkpoint(k2_source)
    scales = {}
    for weight in group_tensors(open_checkpoint(made).tensors).weights:
        if weight.format is not None and weight.format.quantised:
            entry = weight.parts["weight_scale"]
            data = (made / entry.file).read_bytes()[entry.start : entry.stop]
            scales[weight.base] = float(np.frombuffer(data, np.float32)[0])
    weights = {weight.base: weight for weight in group_tensors(source.tensors).weights}
    assert len(scales) > 100
    assert scales == {base: float(np.float32(largest(weights[base], source) / 127)) for base in scales}
    assert k2quant.verify_checksums(made).passed
    assert k2quant.verify(k2_source, made).passed


@pytest.mark.usefixtures("_surveyed")
def test_a_tensor_in_memory_is_surveyed_too() -> None:
    """`quantize` looks at the whole weight first."""
    weight = np.linspace(-1, 1, 256, dtype=np.float32).reshape(2, 128)
    found = k2quant.quantize(weight, "surveyed")  # type: ignore[arg-type]
    assert found.scale.tolist() == [[float(np.float32(1 / 127))]]


@pytest.mark.usefixtures("_surveyed")
def test_values_that_come_by_panels_are_surveyed_by_whoever_has_them(
    k2_bf16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A substitute surveys all its panels, and is asked for the first of a weight when the format is settled."""
    monkeypatch.setattr("k2quant.checkpoint.panels.PANEL_WEIGHTS", 1)
    ones, seen = np.uint16(0x3F80), dict[str, float]()

    class Other:
        """Has 1 for every weight of the experts, and somewhere in the last row a 2."""

        def replaces(self, weight: StoredWeight) -> bool:
            """All experts."""
            return ".experts." in weight.base

        def survey(self, job: Job, asked: Format, start: int, stop: int) -> object:
            """Look at rows."""
            return asked.survey(self._rows(job, start, stop), codecs_of("cpu"))

        def panel(self, job: Job, start: int, stop: int) -> tuple[Parts, None]:
            """Write rows as what the surveys came to."""
            assert isinstance(job.written, Surveyed)
            seen[job.name] = job.written.amax
            state = panel_state(job.written, job.weight.shape, start, stop)
            parts = {suffix: np.empty(spec.shape, DTYPES[spec.dtype].numpy) for suffix, spec in state.items()}
            job.written.encode(self._rows(job, start, stop), parts, codecs_of("cpu"))
            return parts, None

        def _rows(self, job: Job, start: int, stop: int) -> U16:
            rows = np.full((stop - start, job.weight.shape[1]), ones)
            rows[-1, 7] += 0x80 * (stop == job.weight.shape[0])
            return rows

    plan = make_plan(open_checkpoint(k2_bf16), Options("surveyed"))  # type: ignore[arg-type]
    carry_out(plan, tmp_path / "out", substitute=Other(), workers=2)
    assert len(seen) > 10
    assert set(seen.values()) == {2.0}
    assert k2quant.verify_checksums(tmp_path / "out").passed


def test_names_of_formats_are_those_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """The types that annotations use name the formats of the table, and those that QAT trains for."""
    monkeypatch.delitem(FORMATS, "int8")
    assert set(get_args(FormatName)) == FORMATS.keys()
    assert set(get_args(ExportFormat)) == {name for name, kind in FORMATS.items() if kind.trained}
