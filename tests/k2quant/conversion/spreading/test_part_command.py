"""`k2quant convert --part`: what it says, what it would do, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from k2quant.checkpoint.reader import CONFIG
from k2quant.cli import main


def convert(source: Path, there: Path, *words: str) -> Result:
    """Run the command."""
    return CliRunner().invoke(main, ["convert", "--to", "int4", *words, str(source), str(there)])


def test_each_part_says_how_things_stand(k2_source: Path, tmp_path: Path) -> None:
    """One that is not the last ends well and says what is missing; the last says what the whole came to."""
    there = tmp_path / "there"
    first = convert(k2_source, there, "--part", "1/3")
    assert first.exit_code == 0, first.output
    assert first.stdout == f"{there}: part 1 of 3 done; the rest is still to come: 2 of 3 shards\n"
    second = json.loads(convert(k2_source, there, "--part", "3/3", "--json").stdout)
    assert second | {"missing": ()} == {
        "destination": str(there),
        "already_done": False,
        "part": "3/3",
        "missing": (),
        "shards": 3,
    }
    assert len(second["missing"]) == 1
    again = convert(k2_source, there, "--part", "1/3")
    assert again.exit_code == 0
    assert "resumed: 1 shard finished before" in again.stderr
    last = convert(k2_source, there, "--part", "2/3")
    assert last.exit_code == 0
    assert last.stdout.startswith(f"{there}: ")
    assert "B/s" not in last.stdout.splitlines()[0]  # its time is not that of all bytes
    assert (there / CONFIG).exists()
    assert "already finished" in convert(k2_source, there, "--part", "2/3").stdout


def test_a_dry_run_says_what_a_part_would_do(k2_source: Path, tmp_path: Path) -> None:
    """Its shards, the bytes and the disk are its own; what stands there of another conversion counts for nothing."""
    there = tmp_path / "there"
    whole = json.loads(convert(k2_source, there, "--dry-run", "--json").stdout)
    parts = [json.loads(convert(k2_source, there, "--dry-run", "--json", "--part", f"{n}/2").stdout) for n in (1, 2)]
    assert sum(len(each["part"]["shards"]) for each in parts) == whole["shards"] == 3
    assert sum(each["part"]["bytes_read"] for each in parts) == whole["bytes_read"]
    assert all(each["disk_needed"] < whole["disk_needed"] for each in parts)
    assert not there.exists()
    convert(k2_source, there, "--part", "1/2")
    for more in ((), ("--restart",)):  # which other parts need not fear
        done = convert(k2_source, there, "--dry-run", "--part", "1/2", *more)
        assert done.exit_code == 0, done.output
        assert re.search(
            r"^part {13}1 of 2: (\d) shards?, \1 of them done; .* read, .* written$", done.stdout, re.MULTILINE
        )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--part", "0/2"), "expected K/N"),
        (("--part", "0/2", "--dry-run"), "expected K/N"),
        (("--part", "1/2", "--cluster", "auto"), "--part beside --cluster"),
        (("--part", "1/2", "--budget", "4.6"), "--budget beside --part: each part would weigh the whole checkpoint"),
        (("--part", "1/2", "--method", "gptq", "--data", "x"), "--part with --method gptq, which solves each layer"),
    ],
)
def test_what_cannot_be_done_in_parts_is_refused(
    k2_source: Path, tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    """By name, with the reason, before anything is read or written."""
    done = convert(k2_source, tmp_path / "there", *words)
    assert done.exit_code == 2
    assert said in " ".join(done.stderr.split())
    assert not (tmp_path / "there").exists()
