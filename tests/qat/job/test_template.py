"""The job file that `qat init` writes: every key with its meaning, fit for the model, and a job as it stands."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from k2quant.cli import main
from k2quant.errors import CheckpointError, K2QuantError, MalformedFile
from k2quant.qat.config import QATConfig
from k2quant.qat.job import Job, job_from, read_job
from k2quant.qat.job.building import filled
from k2quant.qat.job.template import MEANINGS, template, write_template
from places import ROOT
from tiny import write_data, write_model

GUIDE = (ROOT / "docs" / "qat.md").read_text()


VALUES = ("2024-13-45", "0x_", "!!int x", "!!timestamp x", "\U0001f600: x")
"""Names that YAML takes for values that are none, and one that needs quotes and has a letter beyond 16 bits."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model. Not to be changed by a test."""
    folder = tmp_path_factory.mktemp("template") / "model"
    write_model(folder)
    return folder


@pytest.fixture
def text(model: Path) -> str:
    """The job file of the small model."""
    return template(model, to="int4", data=None, follow_links=False, name="job.yaml")


def command(*arguments: object) -> Result:
    """Run the command line."""
    return CliRunner().invoke(main, ["qat", *(str(argument) for argument in arguments)])


def parsed(text: str) -> Job:
    """Return the job of a file's text."""
    return job_from(filled(Job, yaml.safe_load(text)))


def test_what_it_writes_is_planned_once_data_is_named(model: Path, tmp_path: Path) -> None:
    """As it stands only the data is missing, and the error names it; with data `plan` takes it."""
    write_data(tmp_path / "data.jsonl", 400)
    shown = command("init", model, "-o", tmp_path / "job.yaml")
    assert shown.exit_code == 0, shown.output
    assert "name your data in it (data.path)" in shown.stdout
    assert f"k2quant qat plan {tmp_path / 'job.yaml'} " in (tmp_path / "job.yaml").read_text()
    missing = command("plan", tmp_path / "job.yaml")
    assert (missing.exit_code, "data: path: train.jsonl: no such file" in missing.stderr) == (2, True), missing.output
    done = command("init", model, "-o", tmp_path / "job.yaml", "--force", "--data", tmp_path / "data.jsonl")
    assert done.exit_code == 0, done.output
    planned = command("plan", tmp_path / "job.yaml", "--json")
    assert planned.exit_code == 0, planned.output
    assert json.loads(planned.stdout)["coverage"]["routed experts"]["quantised"] == 49_152


def test_nothing_is_overwritten_unasked(model: Path, tmp_path: Path) -> None:
    """A file that is there stays as it is without `--force`, and a folder with it too."""
    (tmp_path / "job.yaml").write_text("mine")
    (tmp_path / "folder").mkdir()
    for arguments in (["job.yaml"], ["folder"], ["folder", "--force"]):
        shown = command("init", model, "-o", tmp_path / arguments[0], *arguments[1:])
        assert (shown.exit_code, "is there already" in shown.stderr) == (2, True), shown.output
    assert (tmp_path / "job.yaml").read_text() == "mine"
    assert command("init", model, "-o", tmp_path / "job.yaml", "--force").exit_code == 0
    assert read_job(tmp_path / "job.yaml").quantize == QATConfig()
    nowhere = command("init", model, "-o", tmp_path / "no" / "job.yaml")
    assert (nowhere.exit_code, "cannot be written" in nowhere.stderr) == (1, True)


def test_it_has_every_key_with_the_words_of_the_guide() -> None:
    """What a key means stands in docs/qat.md and in the file in the same words, and no key is left out."""
    rows = dict(re.findall(r"^\| `([\w.]+)` \| [^|]+ \| [^|]+ \| ([^|]+) \|$", GUIDE, re.MULTILINE))
    assert dict(MEANINGS) == rows


def disabled(text: str) -> list[tuple[str, int, str]]:
    """Return the keys behind a #, with their line and text."""
    found = []
    section = ""
    for number, line in enumerate(text.splitlines()):
        if heading := re.fullmatch(r"#?(\w+):", line):
            section = heading[1]
        elif key := re.fullmatch(r"(  +)#(\w+): ?(.*)", line):
            found.append((f"{section}.{key[2]}", number, f"{key[1]}{key[2]}: {key[3]}"))
    return found


def test_a_key_behind_a_mark_has_its_default(text: str) -> None:
    """Taking any # away gives the same job: what is shown is what holds without it."""
    job, keys = parsed(text), disabled(text)
    assert len(keys) + len(re.findall(r"^ *\w+: .", text, re.MULTILINE)) == len(MEANINGS) + 1  # `adapter:` heads two
    for name, number, line in keys:
        lines = text.splitlines()
        lines[number] = line
        if name.startswith("distill."):
            lines[lines.index("#distill:")] = "distill:"
        if name in {"quantize.rank", "quantize.alpha"}:
            lines[lines.index("  #adapter:")] = "  adapter:"
            lines[lines.index("  #train: all")] = "  train: adapters"
        if name == "quantize.adapter":
            continue
        found = parsed("\n".join(lines))
        if name.startswith("distill."):
            assert found.distill is not None, line
        elif name not in {"quantize.rank", "quantize.alpha"}:
            assert found == job, line
        else:
            assert found.quantize.low_rank == QATConfig(train="adapters").low_rank, line


def headers_only(folder: Path, experts: int, *, context: object = 131072) -> Path:
    """Write the headers of a model of K2's widths with so many experts, and no weight: holes stand for them."""
    tensors: dict[str, Any] = {}
    end = 0
    shapes = {f"mlp.experts.{n}.{which}_proj": (2048, 7168) for n in range(experts) for which in ("gate", "up")}
    for name, shape in {**shapes, "self_attn.o_proj": (7168, 8192)}.items():
        nbytes = 2 * shape[0] * shape[1]
        tensors[f"model.layers.1.{name}.weight"] = {
            "dtype": "BF16",
            "shape": shape,
            "data_offsets": [end, end + nbytes],
        }
        end += nbytes
    header = json.dumps(tensors).encode()
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + end)
    config = {"model_type": "kimi_k2", "max_position_embeddings": context}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_values_fit_the_model(tmp_path: Path, text: str) -> None:
    """A small model trains whole in float32; a large one in BF16, a row at a time; a huge one by adapters."""
    small = parsed(text)
    assert (small.quantize.train, small.training.masters, small.data.length) == ("all", "float32", 256)
    large, huge = (
        parsed(template(headers_only(tmp_path / str(n), n), to="fp8", data="d", follow_links=False, name="j"))
        for n in (40, 1100)
    )
    assert (large.quantize.train, large.training.precision, large.training.micro_batch) == ("all", "bfloat16", 1)
    assert (huge.quantize.train, huge.training.masters, huge.data.length) == ("adapters", "bfloat16", 4096)
    assert huge.quantize.low_rank is not None
    assert huge.quantize.to == "fp8"
    assert huge.training.gradient_checkpointing


@pytest.mark.parametrize("context", [2, 1, 0, -5, "8", None, True, 1e9, [8], 10**400])
def test_a_context_that_makes_no_sense_is_passed_over(tmp_path: Path, context: object) -> None:
    """Rows are as long as the model reads, where its config says so as a number."""
    job = parsed(
        template(headers_only(tmp_path / "m", 1, context=context), to="int4", data="d", follow_links=False, name="")
    )
    assert job.data.length == (2 if context == 2 else 256)


@pytest.mark.parametrize(
    "name", ["a b", "null", "1", "x: y", "#x", "\u202e", "-", "'", '"', "a\nb", "*a", "\udcff", *VALUES]
)
def test_names_cannot_break_the_file(model: Path, tmp_path: Path, name: str) -> None:
    """Whatever a folder, a data file or the job file is called, the file is read back with these names."""
    (tmp_path / name).symlink_to(model)
    found = template(tmp_path / name, to="int4", data=name, follow_links=True, name=name)
    job = parsed(found)
    assert (job.model, job.data.path) == (str(tmp_path / name), name)
    assert all(line.isprintable() for line in found.splitlines())


def test_a_model_without_experts_is_refused(tmp_path: Path) -> None:
    """There is nothing that this trains for in a dense model, and no file is left."""
    folder = headers_only(tmp_path / "dense", 0)
    with pytest.raises(CheckpointError, match="no routed experts"):
        write_template(folder, tmp_path / "job.yaml", to="int4")
    with pytest.raises(K2QuantError):
        write_template(tmp_path / "nowhere", tmp_path / "job.yaml", to="int4")
    (folder / "config.json").write_text("{")
    with pytest.raises(MalformedFile, match=r"config\.json"):
        write_template(folder, tmp_path / "job.yaml", to="int4")
    assert not (tmp_path / "job.yaml").exists()
