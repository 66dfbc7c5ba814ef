"""The page of an export: whose values it has, how far they are from the base's, and commands that pass."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from k2quant.checkpoint.reader import REPORT
from k2quant.cli import main
from k2quant.errors import MalformedFile
from k2quant.kernels.codecs.figures import Figures
from tiny import job_content, write_data, write_model

pytestmark = pytest.mark.usefixtures("one_thread")

Json = dict[str, Any]
Draw = Callable[[Json], str]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a training to 2 bits, `out` of its last checkpoint and `rounded` of its job. Not to be changed."""
    folder = tmp_path_factory.mktemp("exports")
    write_model(folder / "model")
    write_data(folder / "data.jsonl")
    job = job_content(folder, quantize={"bits": 2, "scope": "projections"})
    (folder / "job.yaml").write_text(yaml.safe_dump(job))
    for arguments in (
        ["train", folder / "job.yaml"],
        ["export", folder / "run", folder / "out", "--shard-size", "1MB"],
        ["export", folder / "job.yaml", folder / "rounded"],
    ):
        done = CliRunner().invoke(main, ["qat", *map(str, arguments)])
        assert done.exit_code == 0, done.output
    return folder


def read(folder: Path) -> Json:
    """Return an export's report."""
    report: Json = json.loads((folder / REPORT).read_text())
    return report


def of_an_earlier_release(report: Json) -> Json:
    """Return a report without what exports have noted since."""
    old = {"substituted", "figures"}
    facts = {name: {k: v for k, v in facts.items() if k not in old} for name, facts in report["tensors"].items()}
    return {key: value for key, value in report.items() if key != "origin"} | {"tensors": facts}


def test_a_training_is_called_trained_and_rounded_to_its_bits(home: Path, said: Draw) -> None:
    """Title, sentence and badges name the run, its step and the width of the codes, and nothing is called exact."""
    report = read(home / "out")
    coded = sum(facts["to"] == "int4" for facts in report["tensors"].values())
    assert report["origin"] == {"run": "run", "step": 4}
    text = said(report)
    assert "model trained for 2-bit INT4" in text
    assert f"k2quant wrote the weights of the training run after step 4: {coded} tensors rounded to 2-bit INT4" in text
    assert f"and {len(report['tensors']) - coded} tensors unquantised." in text
    assert "trained" in text
    assert "rounded to 2 bits" in text
    assert "base model training run, after step 4 format 2-bit INT4" in text
    assert "exact" not in text
    assert "copied" not in text


def test_the_distance_from_the_base_is_that_of_the_figures(home: Path, said: Draw) -> None:
    """SQNR against the base, overall, by class and of the furthest tensor, comes from the report's figures."""
    report = read(home / "out")
    figures = {name: Figures(**facts["figures"]) for name, facts in report["tensors"].items()}
    changed = {name: found for name, found in figures.items() if found.changed}
    furthest = min(changed, key=lambda name: changed[name].sqnr_db)
    text = said(report)
    assert f"SQNR against the base {sum(changed.values(), start=Figures()).sqnr_db:.2f} dB" in text
    assert f"Furthest tensor {changed[furthest].sqnr_db:.2f} dB {furthest}" in text
    assert "Distance from the base by layer: SQNR in dB" in text
    experts = [found for name, found in changed.items() if report["tensors"][name]["class"] == "routed experts"]
    total = sum(experts, start=Figures())
    assert 0 < total.sqnr_db < math.inf
    row = rf"routed experts BF16 → INT4, trained {len(experts)} [\d.,]+( million)? {total.sqnr_db:.2f} dB"
    assert re.search(row, text)
    assert "norm BF16, trained" in text


def test_the_layers_show_what_was_rounded(home: Path, said: Draw) -> None:
    """Norms that trained in BF16 have their row and their bar, but no line that would flatten those of the codes."""
    report = read(home / "out")
    heads = re.search(r"As a table layer (.*?) 0 ", said(report))
    assert heads is not None
    assert "attention" in heads[1]
    assert "norm" not in heads[1]


def test_the_commands_on_the_page_pass(home: Path, drawn: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command that the page of a training or of a job prints ends with 0; none compares with the base."""
    monkeypatch.chdir(home)
    for folder, gate in (("out", "qat export run"), ("rounded", "qat export job.yaml")):
        commands = re.findall(r"<pre>k2quant (.*?)</pre>", drawn(read(home / folder)))
        assert len(commands) == 2
        assert commands[0].startswith("verify --checksums ")
        assert commands[1].startswith(gate)
        for command in commands:
            done = CliRunner().invoke(main, [folder if part == "out" else part for part in shlex.split(command)])
            assert done.exit_code == 0, done.output
            assert "passed" in done.output or "already finished; every weight equals, bit for bit" in done.output


def test_a_jobs_model_is_rounded_and_not_trained(home: Path, said: Draw) -> None:
    """Post-training rounding is an error as in a conversion: the SQNR of what was rounded, all else unchanged."""
    report = read(home / "rounded")
    assert report["origin"] == {"job": "job.yaml"}
    coded = [Figures(**facts["figures"]) for facts in report["tensors"].values() if facts["to"] == "int4"]
    text = said(report)
    assert "model rounded to 2-bit INT4" in text
    assert "k2quant wrote the model of job.yaml as it was before training" in text
    assert f"Overall SQNR {sum(coded, start=Figures()).sqnr_db:.2f} dB" in text
    assert "Error of rounding by layer" in text
    assert "norm BF16, exported" in text
    assert "unchanged" in text
    assert "trained" not in text


def test_a_model_out_of_memory_has_no_run(home: Path, said: Draw) -> None:
    """An export from Python names no training: it was exported, at its width, and checksums are what checks it."""
    report = read(home / "out")
    del report["origin"]
    text = said(report)
    assert "k2quant wrote the weights of a model that was prepared for training" in text
    assert "SQNR against the base" in text
    assert "k2quant verify --checksums" in text
    assert "k2quant qat" not in text


def test_an_earlier_release_did_not_measure(home: Path, said: Draw) -> None:
    """A report without figures still makes a page, which says what it does not know and calls nothing exact."""
    text = said(of_an_earlier_release(read(home / "out")))
    assert "rounded to 2 bits" in text
    assert "Distance from the base not measured" in text
    assert "Not measured: the values are those of a model" in text
    assert "attention BF16 → INT4, exported" in text
    assert not re.search("exact|copied|unchanged|Error by|k2quant verify model", text)


def test_fp8_has_no_width(home: Path, said: Draw) -> None:
    """The width of codes is said of formats that have a choice: what a training noted beside FP8 means nothing."""
    report = read(home / "out")
    report["options"]["to"] = "fp8"
    for facts in report["tensors"].values():
        facts["to"] = facts["to"] and "fp8"
    text = said(report)
    assert "model trained for FP8" in text
    assert "rounded to FP8" in text
    assert "2-bit" not in text


def test_values_of_a_later_release_are_not_called_the_sources(home: Path, said: Draw) -> None:
    """Values that this release knows nothing of are no conversion: no claim of being exact, no comparison."""
    report = read(home / "out") | {"values": {"distilled": True}}
    text = said(report)
    assert "other values" in text
    assert "Distance from the base not measured" in text
    assert not re.search("Nothing was rounded|every value unchanged|SQNR|exact", text)
    assert "k2quant replaced the values of" in text
    assert "k2quant verify --checksums" in text
    assert "k2quant verify model" not in text


BREAKS: dict[str, Callable[[Json], object]] = {
    "values are a list": lambda report: report.update(values=[]),
    "no width": lambda report: report["values"].pop("bits"),
    "a width that no code has": lambda report: report["values"].update(bits=5),
    "a width of text": lambda report: report["values"].update(bits="2"),
    "an origin of text": lambda report: report.update(origin="run"),
    "a run that is a list": lambda report: report["origin"].update(run=[]),
    "a run without a step": lambda report: report["origin"].pop("step"),
    "a step below zero": lambda report: report["origin"].update(step=-1),
    "a job that is a number": lambda report: report.update(origin={"job": 1}),
    "substituted is a number": lambda report: next(iter(report["tensors"].values())).update(substituted=1),
}


@pytest.mark.parametrize("harm", BREAKS.values(), ids=BREAKS.keys())
def test_a_malformed_export_is_refused(home: Path, drawn: Draw, harm: Callable[[Json], object]) -> None:
    """What a report says of a training is checked as strictly as all else: MalformedFile, which names the file."""
    report = read(home / "out")
    harm(report)
    with pytest.raises(MalformedFile, match=REPORT):
        drawn(report)


def test_names_of_runs_are_text(home: Path, drawn: Draw) -> None:
    """Markup in the name of a run or a job is text, in the sentence and in the command."""
    for key in ("run", "job"):
        report = read(home / "out")
        report["origin"] = {key: "<script>x</script>; rm -rf ~", "step": 4}
        html = drawn(report)
        assert "<script" not in html
        assert "k2quant qat export &#x27;&lt;script&gt;x&lt;/script&gt;; rm -rf ~&#x27; out" in html
