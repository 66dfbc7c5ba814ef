"""What Python calls an argument, the command line calls by the flag of the command that runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

import k2quant
from k2quant.cli import main
from k2quant.errors import UsageError
from k2quant.ground.saying.arguments import in_flags


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("write it with `restart=True`", "write it with --restart"),
        ("take all with `scope=` and `ignore=`", "take all with --scope and `ignore=`"),
        ("use `device=cpu`", "use --device cpu"),
        ("`model.layers.0` and `a=b c` and `Scope=`", "`model.layers.0` and `a=b c` and `Scope=`"),
        ("nothing", "nothing"),
    ],
)
def test_marks_become_flags(text: str, said: str) -> None:
    """A name with an equals sign in backticks, with its value if it has one; what has no flag stays as it is."""
    assert in_flags(text, {"restart": "--restart", "scope": "--scope", "device": "--device"}) == said


def test_one_message_is_said_in_two_ways(k2_bf16: Path, tmp_path: Path) -> None:
    """From Python a split is allowed by `allow_split=True`, on the command line by --allow-split."""
    with pytest.raises(UsageError, match=r"`scope=` and `ignore=`, or .* `allow_split=True`$"):
        k2quant.convert(k2_bf16, tmp_path / "out", "int4", ignore=(r"experts\.3\.",))
    call = ["convert", "--to", "int4", "--ignore", r"experts\.3\.", str(k2_bf16), str(tmp_path / "out")]
    said = CliRunner().invoke(main, call).stderr
    assert said.endswith(
        "take all of them or none with --scope and --ignore, or write it all the same with --allow-split\n"
    )


def test_commands_of_groups_know_their_flags(tmp_path: Path) -> None:
    """A command below `eval` says its own flags, those of another name than the argument too."""
    call = ["eval", "run", "K2", "--tasks", "x", "--backend", "api", "-o", str(tmp_path / "run")]
    assert "such as --base-url http://localhost:8000/v1" in CliRunner().invoke(main, call).stderr


def test_remarks_are_said_in_flags_too(k2_thinking: Path, tmp_path: Path) -> None:
    """What is no error, such as a note on what a pattern spares; the report keeps it as Python says it."""
    call = ["convert", "--to", "int4", "--ignore", r"layers\.1\.", str(k2_thinking), str(tmp_path / "out")]
    assert "note: --ignore spares" in CliRunner().invoke(main, call).stderr
    assert "`ignore=` spares" in (tmp_path / "out" / "k2quant_report.json").read_text()
