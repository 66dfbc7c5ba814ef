"""The example of QAT and its documentation: every command, key and line of code that a reader may copy works."""

from __future__ import annotations

import gc
import re
import subprocess
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner

from k2quant.cli import main
from k2quant.qat.job import Job, job_from, read_job
from places import ROOT

EXAMPLE = ROOT / "examples" / "qat"
README = (EXAMPLE / "README.md").read_text()
GUIDE = (ROOT / "docs" / "qat.md").read_text()

STUB = """#!/bin/sh
echo "$*" >> "$STUB_CALLS"
case "$1 $2" in
    "eval gate") exit "$STUB_GATE" ;;
    "qat train") exit "$STUB_TRAIN" ;;
esac
"""
SMALL = {"batch: 16 ": "batch: 2 ", "held_out: 64 ": "held_out: 8 "}
"""What is changed in a job besides, where it is trained."""
SHORT = {"NANO_STEPS": "2", "STEPS": "2", "ITEMS": "1", "JOBS": "int2"}


class Story:
    """run.sh with a stub in place of k2quant, which notes how it was called."""

    def __init__(self, folder: Path) -> None:
        self.place = folder / "story"
        self._calls = folder / "calls"
        self._bin = folder / "bin"
        self._bin.mkdir()
        (self._bin / "k2quant").write_text(STUB)
        (self._bin / "k2quant").chmod(0o755)

    def run(
        self, *, gate: int = 0, train: int = 0, variables: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run it; the stub's gate and training end with these codes."""
        environment = {
            "PATH": f"{self._bin}:/usr/bin:/bin",
            "STUB_CALLS": str(self._calls),
            "STUB_GATE": str(gate),
            "STUB_TRAIN": str(train),
            **(variables or {}),
        }
        command = ["sh", str(EXAMPLE / "run.sh"), str(self.place)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)

    @property
    def calls(self) -> list[str]:
        """The arguments of each call."""
        return self._calls.read_text().splitlines() if self._calls.exists() else []


@pytest.fixture
def story(tmp_path: Path) -> Story:
    """Return the story, ready to run."""
    return Story(tmp_path)


@pytest.fixture
def command_line() -> Iterator[CliRunner]:
    """Return what runs commands in this process; they switch the collector off."""
    yield CliRunner()
    gc.enable()


def blocks(text: str, language: str) -> list[str]:
    """Return the fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(("name", "bits"), [("int2", 2), ("int4", 4)])
def test_the_job_files_are_jobs(name: str, bits: int) -> None:
    """Each is read, and is what its name says: codes of that width in every projection, in a folder of that name."""
    job = read_job(EXAMPLE / f"{name}.yaml")
    assert (job.quantize.to, job.final_bits, job.quantize.resolved_scope) == ("int4", bits, "projections")
    assert job.output == str(Path.cwd() / "runs" / name)


def test_the_readme_shows_what_the_script_does(story: Story) -> None:
    """Commands of the README are those of run.sh, in its order, and of the INT2 part none is left out."""
    assert story.run().returncode == 0
    shown = [line.removeprefix("$ k2quant ") for line in README.splitlines() if line.startswith("$ k2quant ")]
    left = iter(story.calls)
    for command in shown:
        assert command in left, f"not in run.sh, or not in this place: {command}"  # consumes what stands before it
    assert [call for call in story.calls if "int4" not in call and call not in shown] == []


@pytest.mark.parametrize("verdict", [0, 3, 4])
def test_a_verdict_is_no_error(story: Story, verdict: int) -> None:
    """FAIL and INCONCLUSIVE do not end the story."""
    done = story.run(gate=verdict)
    assert done.returncode == 0, done.stderr
    assert sum(call.startswith("eval gate ") for call in story.calls) == 4
    assert "done in " in done.stdout


@pytest.mark.parametrize(("gate", "train"), [(1, 0), (2, 0), (0, 1), (0, 130)])
def test_an_error_ends_the_story(story: Story, gate: int, train: int) -> None:
    """Whatever is no verdict is passed on, and nothing is run after it."""
    done = story.run(gate=gate, train=train)
    assert done.returncode == (gate or train)
    assert story.calls[-1].startswith("eval gate " if gate else "qat train ")


def test_the_script_touches_no_folder_that_exists(story: Story) -> None:
    """A second run in the same folder ends before it does anything."""
    story.place.mkdir()
    assert story.run().returncode != 0
    assert story.calls == []


def test_the_short_story_runs(
    story: Story, command_line: CliRunner, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The commands of run.sh, shortened by its variables, do what they say; a gate finds nothing in two steps' nano."""
    assert story.run(variables=SHORT).returncode == 0
    monkeypatch.chdir(story.place)
    assert read_job(Path("int2.yaml")).training.steps == 2
    for old, new in SMALL.items():
        text = Path("int2.yaml").read_text()
        assert old in text
        Path("int2.yaml").write_text(text.replace(old, new))
    for call in story.calls:
        done = command_line.invoke(main, call.split())
        said = done.output + capfd.readouterr().err
        if call.startswith("eval gate "):  # a model of two steps has nothing to lose, and the gate says so
            assert (done.exit_code, said.startswith("k2quant: the baseline")) == (1, True), said
        else:
            assert done.exit_code == 0, f"{call}\n{said}\n{done.exception!r}"
    assert all(Path(f"nano-int2-{how}", "config.json").is_file() for how in ("rounded", "qat"))


def keys(kind: type, prefix: str = "") -> Iterator[tuple[str, Any, Field[Any]]]:
    """Yield the keys of a job file with their types."""
    hints = typing.get_type_hints(kind)
    for part in fields(kind):
        if kind is Job and part.name in {"bits", "follow_links", "trust_remote_code"}:  # no keys of a file
            continue
        inner = [one for one in (hints[part.name], *typing.get_args(hints[part.name])) if is_dataclass(one)]
        if inner:
            yield from keys(typing.cast("type", inner[0]), f"{prefix}{part.name}.")
        else:
            yield f"{prefix}{part.name}", hints[part.name], part


def expected_row(kind: Any, part: Field[Any]) -> tuple[str, str]:
    """Return how the guide writes a key's type and default."""
    if typing.get_origin(kind) in {types.UnionType, typing.Union}:
        kind = next(one for one in typing.get_args(kind) if one is not type(None))
    words = {str: "text", int: "whole number", float: "number", bool: "true or false", tuple[str, ...]: "list of text"}
    choices = ", ".join(f"`{choice}`" for choice in typing.get_args(kind))
    if part.default is MISSING:
        return words.get(kind, choices), "required"
    written = {None: "null", True: "true", False: "false", (): "[]"}
    text = str(part.default) if type(part.default) in {int, float, str} else written[part.default]
    return words.get(kind, choices), f"`{text}`"


def test_the_guide_has_a_row_for_every_key() -> None:
    """Each key of a job file stands in docs/qat.md with its type and default, and no other key does."""
    rows = re.findall(r"^\| `([\w.]+)` \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", GUIDE, re.MULTILINE)
    table = {name: (kind, default) for name, kind, default, _ in rows}
    expected = {name: expected_row(kind, part) for name, kind, part in keys(Job)}
    expected["quantize.bits"] = ("`4`, `3`, `2`, or a ramp", "`4`")  # the file takes a mapping, too
    assert table == expected


def _merged(job: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    return job | {
        name: {**job.get(name, {}), **value} if isinstance(value, dict) else value for name, value in part.items()
    }


def test_the_jobs_of_the_guide_are_jobs() -> None:
    """Every YAML block of the guide is a job, or the part of one that its text is about."""
    needed = {"model": "m", "output": "o", "data": {"path": "p"}, "training": {"steps": 1000}}
    found = [job_from(_merged(needed, yaml.safe_load(block))) for block in blocks(GUIDE, "yaml")]
    _, ramp, searched, control = found
    assert [ramp.bits_at(step) for step in (0, 150, 299, 300)] == [None, 8, 4, 2]
    assert (searched.training.fallback, searched.training.fallback_stats) == ("imatrix", "Kimi-K2-stats")
    assert not control.training.fake_quantize


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A nano-K2 of two steps and its tasks, in one folder. Not to be changed by a test."""
    from k2quant.nano.benchmark import write_tasks
    from k2quant.nano.run import run

    folder = tmp_path_factory.mktemp("nano")
    run(folder / "K2", steps=2, seed=0, exam=1)
    write_tasks(folder / "nano-tasks")
    return folder


@pytest.mark.parametrize("number", range(len(blocks(GUIDE, "python"))))
def test_the_code_of_the_guide_runs(number: int, nano: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each Python block of the guide runs as it stands, given a model and batches."""
    for name in ("K2", "nano-tasks"):
        (tmp_path / name).symlink_to(nano / name)
    job = yaml.safe_load((EXAMPLE / "int2.yaml").read_text()) | {"model": "K2"}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    monkeypatch.chdir(tmp_path)
    batches = [torch.randint(1, 60, (2, 16), generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    code = blocks(GUIDE, "python")[number]
    exec(compile(code, "docs/qat.md", "exec"), {"batches": batches})  # noqa: S102  our own
    if "export(" in code:
        assert (tmp_path / "K2-QAT" / "config.json").is_file()
