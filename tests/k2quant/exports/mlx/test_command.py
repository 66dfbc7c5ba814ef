"""`k2quant export mlx`: what it says, and with what it ends."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from k2quant.checkpoint.writing.destination import Destination
from k2quant.cli import main

TABLE = """\
class           is             becomes          tensors    bytes
routed experts  int4 group 32  affine group 32        6   7.9 MB
"""


def export(*arguments: object) -> Result:
    """Run the command."""
    return CliRunner().invoke(main, ["export", "mlx", *map(str, arguments)])


def test_it_says_what_becomes_of_what(k2_thinking: Path, tmp_path: Path) -> None:
    """A line for each class and mode, then sizes; the second time that it is done already."""
    there = tmp_path / "out"
    first = export(k2_thinking, there)
    assert first.exit_code == 0
    assert first.stdout.startswith(TABLE)
    assert first.stdout.splitlines()[-1].startswith(f"{there}: 19.2 MB -> ")
    assert "note: not written: 3 tensors that mlx-lm makes itself" in first.stderr
    second = export(k2_thinking, there)
    assert (second.exit_code, second.stdout) == (0, f"{there}: already finished, nothing to do\n")
    third = export(k2_thinking, there, "--shard-size", "4MB")
    assert third.exit_code == 1
    assert "holds a finished export of other options; write it anew with --restart" in third.stderr


def test_a_dry_run_says_the_same_and_writes_nothing(k2_thinking: Path, tmp_path: Path) -> None:
    """With the disk that it takes; and as JSON with everything."""
    shown = export(k2_thinking, tmp_path / "out", "--dry-run")
    assert shown.exit_code == 0
    assert shown.stdout.startswith(TABLE)
    assert " in 1 shard, 0 of them done\n" in shown.stdout
    assert list(tmp_path.iterdir()) == []
    found = json.loads(export(k2_thinking, tmp_path / "out", "--dry-run", "--json", "--shard-size", "4MB").stdout)
    assert found["shards"] > 2
    assert found["fits"] is True
    done = json.loads(export(k2_thinking, tmp_path / "out", "--json", "--shard-size", "4MB").stdout)
    assert found["modes"][0] == done["modes"][0]
    kinds = {"kind": "routed experts", "source": "int4 group 32", "mode": "affine group 32", "tensors": 6}
    assert kinds.items() <= done["modes"][0].items()
    assert found["bytes_written"] == done["bytes_written"]


def test_a_disk_that_is_too_small_ends_with_1(
    k2_thinking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dry run as well, which says so in a line."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("", (), {"free": 1000})())
    shown = export(k2_thinking, tmp_path / "out", "--dry-run")
    assert shown.exit_code == 1
    assert "TOO SMALL" in shown.stdout
    assert export(k2_thinking, tmp_path / "out").exit_code == 1


def test_it_says_what_was_finished_before(k2_thinking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a run that was stopped at its end."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Destination, "finish", stop)
        assert export(k2_thinking, tmp_path / "out").exit_code != 0
    assert "resumed: 1 shard finished before" in export(k2_thinking, tmp_path / "out").stderr


@pytest.mark.parametrize("given", [("--shard-size", "7"), ("--shard-size", "many"), ("--workers", "0"), ("--to", "x")])
def test_what_makes_no_sense_ends_with_2(k2_thinking: Path, tmp_path: Path, given: tuple[str, str]) -> None:
    """And nothing is begun."""
    assert export(k2_thinking, tmp_path / "out", *given).exit_code == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("address", ["hf://moonshotai/K2-mlx", "s3://bucket/K2-mlx"])
def test_an_address_to_write_to_is_refused(
    k2_thinking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    """And no folder is made that is called so."""
    monkeypatch.chdir(tmp_path)
    done = export(k2_thinking, address)
    assert done.exit_code == 2
    assert f"{address} is no folder: export to a folder of this machine first" in done.stderr
    assert list(tmp_path.iterdir()) == []
