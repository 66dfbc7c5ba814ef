"""What commands say at their end: how good the result is, and what to type next."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from k2quant.checkpoint.reader import open_checkpoint
from k2quant.cli import main
from k2quant.cli.demo import entering
from k2quant.cli.nano import ask
from k2quant.nano import demo, tasks
from k2quant.nano.scoring import Score
from terminal import on_terminal


def k2quant(*arguments: object) -> Result:
    """Run the command line in this process."""
    return CliRunner().invoke(main, [*map(str, arguments)])


@pytest.mark.parametrize(
    ("options", "words", "engines"),
    [
        (["--to", "int4"], r"SQNR: routed experts 20\.\d dB, the rest exact", r"checked for vLLM, .*"),
        (["--to", "bf16"], r"exact: every value is as it was", ""),
        (
            ["--to", "int4", "--scope", "projections"],
            r"SQNR: routed experts 20\.\d dB, .*attention 20\.\d dB, .*exact",
            r"note: SGLang, KTransformers would not run it: kv_b_proj: .*; see .*\nchecked for vLLM, transformers: .*",
        ),
    ],
    ids=["int4", "bf16", "projections"],
)
def test_a_conversion_ends_with_its_quality(
    options: list[str], words: str, engines: str, k2_source: Path, tmp_path: Path
) -> None:
    """After the sizes, what rounding did to which classes: on stdout, for it is a result. Then who runs it."""
    done = k2quant("convert", *options, k2_source, tmp_path / "out")
    assert re.fullmatch(rf"[^\n]+MB/s\n{words}\n", done.stdout)
    assert re.fullmatch(engines, done.stderr.rstrip("\n"))


def test_a_conversion_on_a_terminal_says_what_comes_next(k2_source: Path, tmp_path: Path) -> None:
    """On stderr, each command on a line, quoted as a shell wants it; they work as printed. `-q` leaves them out."""
    destination = tmp_path / "it's out"
    command = ["-m", "k2quant", "convert", "--to", "int4", str(k2_source), str(destination)]
    with (tmp_path / "stdout").open("w") as stdout:
        said = "\n".join(on_terminal(command, columns=200, stdout=stdout.fileno()).screen)
    verify, report = re.findall(r"(?:next: |      )(k2quant .+)", said)
    assert "k2quant verify" not in (tmp_path / "stdout").read_text()
    assert shlex.split(verify) == ["k2quant", "verify", str(k2_source), str(destination)]
    assert k2quant(*shlex.split(verify)[1:]).exit_code == 0
    assert k2quant(*shlex.split(report)[1:]).exit_code == 0
    again = on_terminal([*command, "-q"], columns=200)
    assert again.screen == [f"{destination}: already finished, nothing to do"]


def test_verify_says_what_was_found_in_words_of_a_promise(k2_source: Path, k2_thinking: Path) -> None:
    """What was rounded is within the rounding of its format, not `differs`; a row has the dtypes that are there."""
    done = k2quant("verify", k2_source, k2_thinking)
    rows = {tuple(re.split(r"\s{2,}", line)[:4]) for line in done.stdout.splitlines()}
    assert ("routed experts", "fp8 -> int4", "96", "within INT4 rounding") in rows
    assert ("attention", "bf16", "3", "bit-equal") in rows
    assert ("router", "f32", "2", "bit-equal") in rows
    assert "differs" not in done.stdout
    assert "dB" in done.stdout.split("SQNR: ")[1]  # the unit is explained
    assert done.stdout.endswith("\npassed: 142 tensors: 46 equal, 96 within INT4 rounding\n")
    same = k2quant("verify", k2_thinking, k2_thinking)
    assert "codes and scales equal" in same.stdout
    assert same.stdout.endswith("\npassed: 142 tensors: 142 equal\n")


def test_verify_says_what_failed(k2_source: Path, k2_thinking: Path) -> None:
    """The row of what failed says so, and no more failures are listed than a person reads, with how many are left."""
    done = k2quant("verify", k2_thinking, k2_source)
    assert done.exit_code == 3
    assert re.search(r"^routed experts +int4 -> fp8 +96 +within FP8 rounding", done.stdout, re.MULTILINE) is None
    assert re.search(r"^routed experts +int4 -> fp8 +\d+ +FAILED", done.stdout, re.MULTILINE)
    listed = [line for line in done.stdout.splitlines() if line.startswith("FAILED ")]
    more = re.search(r"\.\.\. and (\d+) more that failed", done.stdout)
    assert more is not None
    assert f"{len(listed) + int(more[1])} of 142 checks failed" in done.stderr
    assert done.stdout.endswith("\nfailed\n")


def test_verify_keeps_its_json(k2_source: Path, k2_thinking: Path) -> None:
    """Machines read the relations of old, with the dtypes beside them."""
    found = json.loads(k2quant("verify", "--json", k2_source, k2_thinking).stdout)["findings"]
    expert = next(each for each in found if ".experts.3.up_proj" in each["name"])
    assert (expert["relation"], expert["formats"]) == ("differs", ["fp8", "int4"])
    assert expert["dtypes"] == ["F8_E4M3", "I32"]
    assert all(each["dtypes"][0] == open_checkpoint(k2_source).tensors[each["name"]].dtype for each in found[:5])


def test_the_demo_ends_with_commands_that_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the five is typed as it is printed, where the demo was made, and does what it should."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    done = k2quant("demo", "my demo", "--steps", "0")
    assert (done.exit_code, done.stderr) == (0, "")
    assert max(map(len, done.stdout.partition("Now you:")[0].splitlines())) <= 80
    commands = re.findall(r"^  (k2quant .+)$", done.stdout.partition("Now you:")[2], re.MULTILINE)
    assert len(commands) == 5
    for command in commands:
        assert k2quant(*shlex.split(command)[1:]).exit_code == 0, command


@pytest.mark.parametrize("columns", [60, 80])
def test_the_tables_of_the_demo_fit(columns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it measured, at the width of the terminal."""
    step = demo.Step("fp8-int4-bf16", "int4", "the bytes of fp8-int4: what lies on the grid stays there")
    outcomes = [demo.Outcome(step, 19_200_000, 0.5, [], {}), demo.Outcome(step, 1, 0.5, [], {"x": "differs"})]
    monkeypatch.setattr(demo, "begin", lambda folder: folder)
    monkeypatch.setattr(demo, "compile_codecs", lambda: None)
    monkeypatch.setattr(demo, "tour", lambda _: outcomes)
    (tmp_path / demo.STEPS[0].folder).mkdir()
    (tmp_path / demo.STEPS[0].folder / "model.safetensors").write_bytes(b"x")
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.chdir(tmp_path)
    done = k2quant("demo", ".", "--steps", "0")
    assert done.exit_code == 3
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= columns
    assert "fp8>int4>bf16>int4" in done.stdout
    assert any(line.startswith("  yes fp8>int4>bf16>int4: ") for line in lines)
    assert any(line.startswith("  NO  fp8>int4>bf16>int4: ") for line in lines)


def test_the_demo_says_how_its_environment_is_entered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where it runs from a virtual environment whose `k2quant` the shell would not find."""
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "activate").touch()
    (programs / "k2quant").touch()
    (programs / "k2quant").chmod(0o755)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.chdir(tmp_path)
    assert entering() == ". .venv/bin/activate"
    (tmp_path / "else where").mkdir()
    monkeypatch.chdir(tmp_path / "else where")
    assert entering() == f". {shlex.quote(str(programs / 'activate'))}"
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin")
    assert entering() is None
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    assert entering() is None


def test_a_nano_suggests_what_it_knows(capsys: pytest.CaptureFixture[str]) -> None:
    """Held-out questions that were answered wholly right, each of another family, the surest first; or none at all."""
    items = [tasks.items(family, 1, 2)[place] for family in ("brackets", "add", "sort") for place in (0, 1)]
    score = Score(items=items, right=[True, True, False, True, False, False], losses=[0.3, 0.2, 0.0, 0.1, 0.0, 0.0])
    assert score.known() == [items[3], items[1]]
    assert score.known(1) == [items[3]]
    ask(Path("my nano"), score.known())
    printed = capsys.readouterr().out
    commands = [shlex.split(line) for line in printed.splitlines() if line.startswith("  k2quant")]
    assert commands == [["k2quant", "generate", "my nano", "--prompt", item.question] for item in score.known()]
    assert all(f"\n    {item.answer}\n" in printed for item in score.known())
    ask(Path("my nano"), [])
    assert "k2quant" not in capsys.readouterr().out
