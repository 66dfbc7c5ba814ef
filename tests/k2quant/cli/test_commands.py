"""The command line: help, exit codes, what goes to stdout and what to stderr."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from k2quant.checkpoint.writing.in_memory import Shard, write_checkpoint
from k2quant.cli import main
from k2quant.errors import OutputError, UsageError
from terminal import but_progress

COMMANDS = ("convert", "merge", "inspect", "verify", "diff", "report", "generate", "tune", "nano", "demo")


def k2quant(*arguments: object) -> Result:
    """Run the command line in this process, and see that it ends as a command does."""
    columns = {"COLUMNS": "100"} if "--help" in arguments else {}
    done = CliRunner().invoke(main, [*map(str, arguments)], prog_name="k2quant", env=columns)
    assert done.exception is None or isinstance(done.exception, SystemExit)
    return done


def process(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run it in a process of its own, with streams of its own."""
    command = [sys.executable, "-m", "k2quant", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_help_lists_every_command() -> None:
    """`k2quant --help` names all commands and exits 0."""
    done = process("--help")
    assert done.returncode == 0
    assert all(f"  {name} " in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("group", [[], ["eval"], ["qat"]])
def test_summaries_fit(group: list[str]) -> None:
    """On 80 columns each command has one line in the help of its group, a whole sentence; no module is loaded."""
    done = CliRunner().invoke(main, [*group, "--help"], env={"COLUMNS": "80"})
    lines = done.stdout.partition("Commands:\n")[2].splitlines()
    context = click.Context(main)
    home = main.get_command(context, group[0]) if group else main
    assert isinstance(home, click.Group)
    assert [line.split()[0] for line in lines] == home.list_commands(context)
    assert all(len(line) <= 80 and line.endswith(".") and not line.endswith("...") for line in lines)


def test_verbose_says_what_is_done_and_when(k2_source: Path) -> None:
    """On stderr, with the time of day; the next command says nothing again."""
    done = CliRunner().invoke(main, ["-v", "inspect", "-v", "--json", str(k2_source)])
    json.loads(done.stdout)
    first, last = done.stderr.splitlines()
    assert re.fullmatch(r"\d\d:\d\d:\d\d  .*: 3 shards, \d+ tensors; headers read in .* s", first)
    assert re.search(r"  ended after .* s, at most .* in memory$", last)
    assert CliRunner().invoke(main, ["inspect", str(k2_source)]).stderr == ""


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example_and_every_option_is_explained(name: str) -> None:
    """A command's help is a sentence, then an example; each option says what it does."""
    done = k2quant(name, "--help")
    assert done.exit_code == 0
    examples = [line.strip() for line in done.stdout.partition("Example:")[2].partition("Options:")[0].splitlines()]
    assert f"k2quant {name}" in " ".join(examples[1].split()[:2])
    assert "\\b" not in done.stdout
    command = main.get_command(click.Context(main), name)
    assert command is not None
    assert all(option.help for option in command.params if option.param_type_name == "option")


def test_convert_prints_its_result_to_stdout_alone(k2_source: Path, tmp_path: Path) -> None:
    """Piped, a conversion prints its result, no bar; again, it says that nothing is to do; both exit 0."""
    done = process("convert", "--to", "int4", k2_source, tmp_path / "out")
    checked = "checked for vLLM, SGLang, KTransformers, transformers: nothing stands against it\n"
    assert (done.returncode, but_progress(done.stderr)) == (0, checked)
    assert done.stdout.startswith(f"{tmp_path / 'out'}: ")
    again = process("convert", "--to", "int4", k2_source, tmp_path / "out")
    assert (again.returncode, again.stderr) == (0, "")
    assert "already finished" in again.stdout


def test_convert_prints_json_for_machines(k2_source: Path, tmp_path: Path) -> None:
    """`--json` gives one object with sizes and time."""
    done = k2quant("convert", "--to", "bf16", "--json", k2_source, tmp_path / "out")
    result = json.loads(done.stdout)
    assert result["already_done"] is False
    assert result["bytes_written"] > result["bytes_read"] > 0


def test_errors_are_one_line_without_a_traceback(tmp_path: Path) -> None:
    """An error of the input exits 1, one of usage 2; neither prints a traceback."""
    (tmp_path / "empty").mkdir()
    bad = process("convert", "--to", "int4", tmp_path / "empty", tmp_path / "out")
    assert (bad.returncode, bad.stdout) == (1, "")
    assert bad.stderr.startswith("k2quant: ")
    assert bad.stderr.count("\n") == 1
    for wrong in (("convert", "--to", "int3", "a", "b"), ("verify", "a"), ("convert", "--to", "bf16", "a", "a")):
        done = process(*wrong)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("error", [UsageError, OutputError, OSError])
def test_errors_carry_nothing_to_the_terminal(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    """Line breaks and escape codes in a name arrive as text, on one line, whoever raised the error."""

    def refuse(_source: Path, **_options: object) -> None:
        raise error("x\n\x1b[31mRED\u202e")

    monkeypatch.setattr("k2quant.checking.inspection.open_checkpoint", refuse)
    result = CliRunner().invoke(main, ["inspect", "anything"])
    assert (result.exit_code, result.stderr) == (getattr(error, "exit_code", 1), "k2quant: x\\n\\x1b[31mRED\\u202e\n")


def test_dry_run_writes_nothing_and_says_what_it_would(k2_source: Path, tmp_path: Path) -> None:
    """`--dry-run` prints bytes, memory, free disk and time; the destination is not made."""
    done = k2quant("convert", "--to", "int4", "--dry-run", "--json", k2_source, tmp_path / "out")
    assert done.exit_code == 0
    cost = json.loads(done.stdout)
    assert cost["fits"] is True
    assert cost["work"]["routed experts"] == {"fp8 -> int4": 96}
    assert not (tmp_path / "out").exists()
    k2quant("convert", "--to", "int4", k2_source, tmp_path / "out")
    aside = {"k2quant_report.json", "README.md"}  # what a run says of itself is known when it is done
    written = sum(path.stat().st_size for path in (tmp_path / "out").iterdir() if path.name not in aside)
    assert cost["bytes_written"] == written
    assert "peak memory" in k2quant("convert", "--to", "int4", "--dry-run", k2_source, tmp_path / "more").stdout


def test_dry_run_exits_1_when_the_disk_is_too_small(
    k2_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk without room is found before anything is written."""
    import shutil

    from click.testing import CliRunner

    from k2quant.cli import main

    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    arguments = ["convert", "--to", "int4", str(k2_source), str(tmp_path / "out")]
    dry = CliRunner().invoke(main, [*arguments, "--dry-run"])
    assert dry.exit_code == 1
    assert "TOO SMALL" in dry.output
    real = CliRunner().invoke(main, arguments)
    assert real.exit_code == 1
    assert "disk is too small" in real.output


def test_verify_and_diff_exit_codes(k2_source: Path, tmp_path: Path) -> None:
    """`verify` and `diff` exit 0 or 3, and both print tables that name classes."""
    k2quant("convert", "--to", "int4", k2_source, tmp_path / "int4")
    good = k2quant("verify", k2_source, tmp_path / "int4")
    assert good.exit_code == 0
    assert "routed experts" in good.stdout
    assert good.stdout.endswith("passed: 142 tensors: 46 equal, 96 within INT4 rounding\n")
    rows = [re.split(r"\s{2,}", line) for line in good.stdout.splitlines()]
    assert ["routed experts", "fp8 -> int4", "96", "within INT4 rounding"] in [row[:4] for row in rows]
    assert ["router", "f32", "2", "bit-equal"] in rows
    assert "differs" not in good.stdout
    assert k2quant("verify", "--checksums", tmp_path / "int4").exit_code == 0
    differ = k2quant("diff", k2_source, tmp_path / "int4")
    assert differ.exit_code == 3
    assert differ.stderr.startswith("k2quant: ")
    assert "fp8 in the first, int4 in the second" in differ.stdout
    same = k2quant("diff", k2_source, k2_source)
    assert (same.exit_code, same.stdout.startswith("no difference")) == (0, True)
    shard = next((tmp_path / "int4").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-5000] ^= 0x40
    shard.write_bytes(data)
    bad = k2quant("verify", "--checksums", tmp_path / "int4")
    assert bad.exit_code == 3
    assert "FAILED" in bad.stdout


def test_verify_prints_findings_as_json(k2_source: Path, tmp_path: Path) -> None:
    """`--json` lists every weight with its relation and figures."""
    k2quant("convert", "--to", "int4", k2_source, tmp_path / "int4")
    result = json.loads(k2quant("verify", "--json", k2_source, tmp_path / "int4").stdout)
    assert result["passed"] is True
    expert = next(f for f in result["findings"] if ".experts.3.up_proj" in f["name"])
    assert expert["relation"] == "differs"
    assert expert["formats"] == ["fp8", "int4"]
    assert 18 < expert["figures"]["sqnr_db"] < 25


def test_inspect_describes_a_checkpoint(k2_source: Path) -> None:
    """`inspect` counts classes, formats, layers and experts; `--json` has the same in full."""
    done = k2quant("inspect", k2_source)
    assert done.exit_code == 0
    assert "3 layers, 16 experts a layer" in done.stdout
    assert "fp8 128x128" in done.stdout
    found = json.loads(k2quant("inspect", "--json", k2_source).stdout)
    row = next(row for row in found["rows"] if row["tensor_class"] == "routed experts")
    assert row == {
        "tensor_class": "routed experts",
        "format": "fp8 128x128",
        "tensors": 192,
        "weights": 96 * 256 * 512,
        "nbytes": 96 * (256 * 512 + 32),
    }
    assert found["problems"] == []


@pytest.mark.parametrize("columns", [80, 60, 40])
def test_inspect_fits_the_terminal(columns: int, k2_source: Path) -> None:
    """No line is longer than the terminal is wide, and all classes stand there."""
    environment = {"COLUMNS": str(columns)}
    lines = CliRunner().invoke(main, ["inspect", str(k2_source)], env=environment).stdout.splitlines()
    assert max(map(len, lines)) <= columns
    starts = [line.removeprefix("class ") for line in lines]
    assert all(any(start.startswith(name) for start in starts) for name in ("routed experts", "attention", "norm"))


def test_inspect_lists_what_does_not_fit_together(tmp_path: Path) -> None:
    """A missing and a stray partner are named, and inspect exits 1."""
    import numpy as np

    shard: Shard = {
        "model.layers.1.mlp.experts.0.up_proj.weight": ("F8_E4M3", np.zeros((128, 128), np.uint8)),
        "model.layers.1.mlp.experts.1.up_proj.weight_scale_inv": ("F32", np.ones((1, 1), np.float32)),
    }
    write_checkpoint(tmp_path / "src", {"model.safetensors": shard}, None)
    done = k2quant("inspect", tmp_path / "src")
    assert done.exit_code == 1
    assert "experts.0.up_proj.weight_scale_inv`" in done.stdout
    assert "a partner without its weight" in done.stdout


def test_demo_touches_nothing_that_is_not_its_own(tmp_path: Path) -> None:
    """A folder that no demo made is refused, whatever it holds."""
    (tmp_path / "fp8").mkdir()
    (tmp_path / "fp8" / "config.json").write_text("mine")
    done = k2quant("demo", tmp_path)
    assert done.exit_code == 1
    assert "no demo's" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["fp8"]
    assert (tmp_path / "fp8" / "config.json").read_text() == "mine"


def test_dry_run_refuses_what_convert_refuses(k2_source: Path, tmp_path: Path) -> None:
    """A foreign destination, the source itself and an unknown device are no to both; a finished one is free of cost."""
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "x").write_text("x")
    for arguments in ((k2_source, tmp_path / "foreign"), (k2_source, k2_source), ("--device", "tpu", k2_source, "x")):
        dry, real = (k2quant("convert", "--to", "int4", *extra, *arguments) for extra in (("--dry-run",), ()))
        assert dry.exit_code == real.exit_code != 0
        assert dry.stderr == real.stderr
    k2quant("convert", "--to", "int4", k2_source, tmp_path / "out")
    cost = json.loads(k2quant("convert", "--to", "int4", "--dry-run", "--json", k2_source, tmp_path / "out").stdout)
    assert (cost["disk_needed"], cost["shards_done"]) == (0, 3)


def test_names_that_no_file_can_have_are_errors_of_one_line(k2_source: Path) -> None:
    """A path that the system refuses ends in a line, not in a traceback."""
    for arguments in (
        ("convert", "--to", "int4", "--dry-run", k2_source, "x" * 300),
        ("verify", k2_source, k2_source, "--against", "x" * 300),
        ("demo", k2_source / "config.json" / "x"),
        ("inspect", "x" * 300),
    ):
        done = k2quant(*arguments)
        assert done.exit_code in {1, 2}
        assert done.stderr.startswith("k2quant: ")
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("call", "reads", "said"),
    [
        (
            "convert --to int4 a b",
            "k2quant.conversion.searching.asked.open_checkpoint",
            "stopped; the same command resumes",
        ),
        ("qat train job.yaml", "k2quant.qat.job.read_job", "stopped; the same command resumes"),
        ("qat plan job.yaml", "k2quant.qat.job.read_job", "stopped"),
        ("inspect a", "k2quant.checking.inspection.inspect", "stopped"),
    ],
)
def test_ctrl_c_says_what_resumes(call: str, reads: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that goes on where it was stopped says so, also in a group; one that begins anew promises nothing."""

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(reads, stop)
    done = CliRunner().invoke(main, call.split())
    assert (done.exit_code, done.stderr) == (130, f"k2quant: {said}\n")
