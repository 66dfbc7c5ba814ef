"""Streams that are closed or cut off, and colour that nobody asked for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from k2quant.cli.parts.terminal.colour import verdict, wanted


def shell(line: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a line of bash in which `$K` is k2quant and `$1` the first argument."""
    command = ["bash", "-c", f'K="{sys.executable} -m k2quant"; {line}', "bash", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_pipe_that_nobody_reads_ends_a_command_in_silence(k2_source: Path) -> None:
    """No traceback and nothing ignored; the exit code is that of SIGPIPE."""
    done = shell('$K inspect "$1" | true; echo "${PIPESTATUS[0]}"', k2_source)
    assert (done.stdout, done.stderr) == ("141\n", "")
    done = shell('$K inspect --json "$1" | head -c 1; echo " ${PIPESTATUS[0]}"', k2_source)
    assert (done.stdout, done.stderr) in {("{ 141\n", ""), ("{ 0\n", "")}  # 0: all fitted into the pipe


def test_closed_streams_make_no_command_fail(k2_source: Path, tmp_path: Path) -> None:
    """`2>&-` and `>&-` lose what is said; the work is done, and an error keeps its exit code."""
    whole = shell('$K inspect "$1"', k2_source).stdout
    done = shell('$K inspect "$1" 2>&-; $K inspect "$1" >&-', k2_source)
    assert (done.returncode, done.stdout, done.stderr) == (0, whole, "")
    done = shell('$K -v convert --to int4 "$1" "$2" <&- >&- 2>&- && $K verify "$1" "$2"', k2_source, tmp_path / "out")
    assert (done.returncode, done.stderr) == (0, "")
    assert "passed" in done.stdout
    assert shell("$K inspect /dev/null/x 2>&-").returncode == 1
    assert shell("$K convert --config - a b <&-").stderr == "k2quant: stdin: expected keys and values, found NoneType\n"


def test_what_is_said_on_a_full_disk_is_lost_and_the_result_is_not(k2_source: Path) -> None:
    """Stderr that cannot be written is no reason to fail; stdout is."""
    done = shell('$K -v inspect "$1" 2>/dev/full', k2_source)
    assert (done.returncode, done.stderr) == (0, "")
    assert "3 layers" in done.stdout
    done = shell('$K inspect "$1" >/dev/full', k2_source)
    assert (done.returncode, done.stderr) == (1, "k2quant: stdout: No space left on device\n")


@pytest.mark.parametrize("asked", ["--help", "--version"])
def test_what_is_printed_before_there_is_a_command_ends_like_one(asked: str) -> None:
    """A help that cannot be printed is an error in a line, and nobody who reads it is none."""
    done = shell(f'$K {asked} >/dev/full; echo $? >&2; $K {asked} | true; echo "${{PIPESTATUS[0]}}"')
    assert (done.stdout, done.stderr) == ("141\n", "k2quant: stdout: No space left on device\n1\n")


@pytest.mark.parametrize(
    ("environment", "colour"),
    [
        ({}, None),
        ({"NO_COLOR": "1"}, False),
        ({"NO_COLOR": "1", "FORCE_COLOR": "1"}, False),
        ({"NO_COLOR": ""}, None),
        ({"TERM": "dumb"}, False),
        ({"FORCE_COLOR": "1"}, True),
        ({"CLICOLOR_FORCE": "0"}, None),
    ],
)
def test_whether_colour_is_wanted(environment: dict[str, str], colour: bool | None) -> None:  # noqa: FBT001
    """NO_COLOR and a dumb terminal want none, FORCE_COLOR wants it anywhere; else it stands on terminals."""
    assert wanted(environment) is colour


def test_words_that_decide_have_a_colour() -> None:
    """Green, red and yellow; other words have none."""
    assert [verdict(word)[:5] for word in ("PASS", "FAIL", "INCONCLUSIVE")] == ["\x1b[32m", "\x1b[31m", "\x1b[33m"]
    assert verdict("items") == "items"
