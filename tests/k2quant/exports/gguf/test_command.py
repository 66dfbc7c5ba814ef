"""`k2quant export gguf`: what it says, and with what it ends."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from k2quant.checkpoint.reader import CONFIG
from k2quant.cli import main
from k2quant.cli.exporting.gguf import command
from k2quant.exports.gguf.types import EXPERTS, REST
from k2quant.ground.release import INSTRUCT_CONFIG

TABLE = """\
class           is             becomes  tensors    bytes
routed experts  int4 group 32  Q4_0           6   7.1 MB
attention       bf16           BF16          18   3.1 MB
dense mlp       bf16           BF16           3   3.1 MB
embedding       bf16           BF16           1   2.1 MB
head            bf16           BF16           1   2.1 MB
shared experts  bf16           BF16           6   1.6 MB
router          bf16           F32            2  65.5 kB
norm            bf16           F32           13  18.6 kB
router          f32            F32            2    128 B
"""


def export(*arguments: object) -> Result:
    """Run the command."""
    return CliRunner().invoke(main, ["export", "gguf", *map(str, arguments)])


def test_it_says_what_becomes_of_what(k2_thinking: Path, tmp_path: Path) -> None:
    """A line for each class and type, then sizes; the second time that it is done already."""
    there = tmp_path / "k2.gguf"
    first = export(k2_thinking, there)
    assert first.exit_code == 0
    assert first.stdout.startswith(TABLE)
    assert first.stdout.splitlines()[-1].startswith(f"{there}: 19.2 MB -> 19.2 MB (1.00x) in ")
    assert "note: not written: 3 tensors that llama.cpp makes itself" in first.stderr
    second = export(k2_thinking, there)
    assert (second.exit_code, second.stdout) == (0, f"{there}: already finished, nothing to do\n")


def test_a_dry_run_says_the_same_and_writes_nothing(k2_thinking: Path, tmp_path: Path) -> None:
    """With the disk that it takes; and as JSON with everything."""
    shown = export(k2_thinking, tmp_path / "k2.gguf", "--dry-run")
    assert shown.exit_code == 0
    assert shown.stdout.startswith(TABLE)
    assert "written          19.2 MB in 1 file, 6 parts, 0 of them done\n" in shown.stdout
    assert "disk needed      19.2 MB\n" in shown.stdout
    assert list(tmp_path.iterdir()) == []
    found = json.loads(export(k2_thinking, tmp_path / "k2.gguf", "--dry-run", "--json", "--split-size", "8MB").stdout)
    assert len(found["files"]) > 2
    assert found["bytes_written"] == sum(file["size"] for file in found["files"].values())
    assert found["fits"] is True
    assert found["types"][0] == {
        "kind": "routed experts",
        "source": "int4 group 32",
        "type": "Q4_0",
        "tensors": 6,
        "nbytes": 7077888,
    }


def test_a_disk_that_is_too_small_ends_a_dry_run_with_1(
    k2_thinking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And says so."""
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("", (), {"free": 1000})())
    shown = export(k2_thinking, tmp_path / "k2.gguf", "--dry-run")
    assert shown.exit_code == 1
    assert "disk needed      19.2 MB, TOO SMALL\n" in shown.stdout


def test_what_was_asked_for_is_done(k2_source: Path, tmp_path: Path) -> None:
    """Types of the rest and of the experts, and the report as JSON on stdout."""
    there = tmp_path / "k2.gguf"
    done = export(k2_source, there, "--rest", "q8_0", "--experts", "q8_0", "--json")
    assert done.exit_code == 0
    said = json.loads(done.stdout)
    assert said["destination"] == str(there)
    assert said["options"] == {"rest": "q8_0", "experts": "q8_0", "fallback": None, "split_size": None}
    assert {row["type"] for row in said["types"]} == {"Q8_0", "F32"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["k2.bin"], "k2.bin is no name of a GGUF file, which ends in .gguf"),
        (["k2.gguf", "--split-size", "some"], "some"),
        (["k2.gguf", "--rest", "q2_k"], "q2_k"),
        (["s3://bucket/k2.gguf"], "k2.gguf"),
    ],
)
def test_mistakes_end_with_2(
    k2_thinking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    """With a sentence that names what was said."""
    monkeypatch.chdir(tmp_path)
    done = export(k2_thinking, *arguments)
    assert done.exit_code == 2
    assert said in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_words_are_those_of_the_library() -> None:
    """What may be typed is what `export_gguf` takes."""
    options: dict[str, Any] = {
        param.name: list(param.type.choices)
        for param in command.params
        if isinstance(param.type, click.Choice) and param.name
    }
    assert options == {"rest": list(REST), "experts": list(EXPERTS), "fallback": list(reversed(EXPERTS))}


def test_what_llama_cpp_has_to_be_told_stands_in_the_suggestion(
    k2_thinking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the export is made, and when it stands there already."""
    source, file = tmp_path / "k2", tmp_path / "k2.gguf"
    shutil.copytree(k2_thinking, source)
    config = json.loads((source / CONFIG).read_text())
    (source / CONFIG).write_text(json.dumps(config | {"rope_scaling": INSTRUCT_CONFIG["rope_scaling"]}))
    shown: list[tuple[object, ...]] = []
    monkeypatch.setattr("k2quant.cli.exporting.gguf.suggest", lambda *commands: shown.extend(commands))
    server = ("llama-server", "-m", file, "--yarn-beta-fast", "1")
    for _ in range(2):
        assert CliRunner().invoke(main, ["export", "gguf", str(source), str(file)]).exit_code == 0
    assert shown == [server, ("llama-cli", *server[1:], "-p", "...")] * 2
