"""What people type nearly right: words in another case, commands misspelt, sizes without a unit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from k2quant.cli import main


def k2quant(*arguments: object) -> Result:
    """Run the command line in this process."""
    return CliRunner().invoke(main, [*map(str, arguments)])


def commands(group: click.Group, path: str = "") -> Iterator[tuple[str, click.Command]]:
    """Yield every command of a group and of the groups in it, with its path."""
    with click.Context(group) as ctx:
        for name in group.list_commands(ctx):
            command = group.get_command(ctx, name)
            assert command is not None
            yield f"{path}{name}", command
            if isinstance(command, click.Group):
                yield from commands(command, f"{path}{name} ")


def test_words_are_taken_in_whatever_case() -> None:
    """Each option that is one word of a few takes it in capitals, and the command sees the word as it is written."""
    found = 0
    for path, command in commands(main):
        for param in command.params:
            if isinstance(param.type, click.Choice):
                found += 1
                for word in param.type.choices:
                    assert param.type.convert(word.upper(), param, None) == word, f"{path} {param.name}"
    assert found >= 12


def test_a_conversion_in_capitals_is_the_same_conversion(k2_source: Path, tmp_path: Path) -> None:
    """`--to INT4 --scope EXPERTS` writes what `--to int4 --scope experts` writes."""
    assert k2quant("convert", "--to", "INT4", "--scope", "EXPERTS", k2_source, tmp_path / "out").exit_code == 0
    again = k2quant("convert", "--to", "int4", "--scope", "experts", k2_source, tmp_path / "out")
    assert "already finished" in again.stdout


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("convrt", "`convert`"),
        ("CONVERT", "`convert`"),
        ("evl", "`eval`"),
        ("eval rn", "`run`"),
        ("qat expotr", "`export`"),
        ("gate", "`eval gate`"),
        ("eval-gate", "`eval gate`"),
        ("trian", "`qat train`"),
    ],
)
def test_a_misspelt_command_is_answered_with_the_one_that_was_meant(typed: str, meant: str) -> None:
    """Commands of groups too, also where the group was left out; the exit code is that of wrong usage."""
    done = k2quant(*typed.split())
    assert done.exit_code == 2
    assert f"No such command {typed.rsplit(maxsplit=1)[-1]!r}. Did you mean {meant}?" in done.stderr


def test_what_is_like_no_command_is_answered_without_a_guess() -> None:
    """Nothing is suggested where nothing is near; an option of the group is still an option."""
    assert k2quant("frobnicate").stderr.endswith("No such command 'frobnicate'.\n")
    assert "No such option '--frobnicate'" in k2quant("--frobnicate").stderr.replace(
        "No such option: ", "No such option "
    )


def test_a_misspelt_option_is_answered_with_the_one_that_was_meant() -> None:
    """Those of every command."""
    assert "--shard-size" in k2quant("convert", "--shard-sze", "5GB", "a", "b").stderr


@pytest.mark.parametrize("command", [("convert",), ("merge", "base")])
@pytest.mark.parametrize(
    ("size", "found"), [("1", "1 B"), ("999kB", "999.0 kB"), ("0.5MB", "500.0 kB"), ("", "no size"), ("5XB", "no size")]
)
def test_a_shard_size_below_a_megabyte_is_refused(command: tuple[str, ...], size: str, found: str) -> None:
    """Whoever writes `--shard-size 5` meant gigabytes; the message has units and says what becomes of large weights."""
    done = k2quant(*command, "--to", "int4", "--shard-size", size, "src", "dst")
    assert done.exit_code == 2
    assert found in done.stderr
    if found.endswith("B"):
        assert "expected at least 1.0 MB" in done.stderr
        assert "a larger weight has its own shard" in done.stderr


def test_the_smallest_shard_size_is_taken(k2_source: Path, tmp_path: Path) -> None:
    """1MB is a size like others."""
    done = k2quant("convert", "--dry-run", "--to", "int4", "--shard-size", "1MB", k2_source, tmp_path / "out")
    assert done.exit_code == 0
