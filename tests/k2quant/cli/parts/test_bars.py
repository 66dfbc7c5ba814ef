"""Progress on stderr: bars that fit and leave nothing, plain lines elsewhere, silence where it is asked for."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
from click.testing import CliRunner

from k2quant.cli.parts.lazy import LazyGroup
from k2quant.cli.parts.screen import counting, progress, remark, training, warn
from k2quant.cli.parts.terminal import bars
from k2quant.ground.saying import meter
from terminal import Seen, on_terminal

_JOB = """
import os, signal, sys, time
import click
from k2quant.cli.parts.screen import remark, training
def work():
    with training("training a model whose name is rather long") as show:
        for step in range(1, 7):
            show(step, 6, 2.345)
            time.sleep(0.15)
            if step == 3:
                remark("note: a word of step 3")
                click.echo("a result")
            if step == 4 and sys.argv[1] == "error":
                raise SystemExit(3)
            if step == 4 and sys.argv[1] == "stopped":
                os.kill(os.getpid(), signal.SIGINT)
try:
    work()
except KeyboardInterrupt:
    click.echo("stopped", err=True)
"""


@pytest.fixture
def terminal_seen(request: pytest.FixtureRequest) -> Seen:
    """Return what a job left on a terminal that ended as the test says."""
    how, columns = request.param
    return on_terminal(["-c", _JOB, how], columns=columns)


@pytest.mark.parametrize(
    ("terminal_seen", "code", "last"),
    [(("well", 80), 0, []), (("well", 40), 0, []), (("error", 60), 3, []), (("stopped", 60), 0, ["stopped"])],
    indirect=["terminal_seen"],
)
def test_a_bar_leaves_nothing_behind(terminal_seen: Seen, code: int, last: list[str]) -> None:
    """After a job, an error in it or Ctrl-C, only what was said stands on the terminal; the bar was there."""
    assert (terminal_seen.code, terminal_seen.screen) == (code, ["note: a word of step 3", "a result", *last])
    drawn = [line for line in terminal_seen.written.split("\r") if "%" in line]
    assert drawn
    assert all(len(re.sub(r"\x1b\[K|\n.*", "", line)) < terminal_seen.columns for line in drawn)


def test_a_bar_does_not_take_what_goes_to_a_file(tmp_path: Path) -> None:
    """Where stdout is a file, results go there, past the bar on the terminal."""
    with (tmp_path / "out").open("wb") as file:
        seen = on_terminal(["-c", _JOB, "well"], columns=60, stdout=file.fileno())
    assert (seen.code, seen.screen) == (0, ["note: a word of step 3"])
    assert (tmp_path / "out").read_text() == "a result\n"


def test_a_dumb_terminal_gets_no_codes() -> None:
    """With `TERM=dumb` nothing is drawn over."""
    seen = on_terminal(["-c", _JOB, "well"], columns=60, more={"TERM": "dumb"})
    assert "\x1b" not in seen.written
    assert seen.screen == ["note: a word of step 3", "a result"]


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> click.Group:
    """Return a command line whose one command counts, with lines that come at once."""
    for name in ("FIRST", "LEAST", "MOST"):
        monkeypatch.setattr(meter, name, 0.0)
    monkeypatch.setattr(bars, "_LOOK", 0.02)

    @click.command()
    def count() -> None:
        with counting("things") as show, progress("bytes"), training("steps"):
            for done in range(4):
                if show:
                    show(done, 3)
                time.sleep(0.05)
        remark("a note")
        warn("a warning")
        click.echo('{"json": true}')

    monkeypatch.setattr("k2quant.cli.parts.lazy.import_module", lambda _: SimpleNamespace(command=count))
    return LazyGroup(name="tool", homes={"count": ("made.up", "Count.")})


def test_lines_go_to_stderr_and_leave_json_alone(hasty: click.Group) -> None:
    """Where stderr is no terminal, lines of text stand there and nothing in stdout."""
    done = CliRunner().invoke(hasty, ["count"])
    assert done.stdout == '{"json": true}\n'
    assert "k2quant: things: 33% (1 of 3)" in done.stderr
    assert done.stderr.endswith("a note\na warning\n")
    assert "\x1b" not in done.stderr


@pytest.mark.parametrize("arguments", [["-q", "count"], ["count", "--quiet"], ["-v", "count", "-q"]])
def test_quiet_keeps_warnings_alone(hasty: click.Group, arguments: list[str]) -> None:
    """`-q`, before or behind the command, leaves out progress and notes, not warnings and results."""
    done = CliRunner().invoke(hasty, arguments)
    assert (done.stdout, done.stderr) == ('{"json": true}\n', "a warning\n")


def test_nobody_who_reads_progress_is_no_reason_to_fail(hasty: click.Group) -> None:
    """A stderr whose reader has gone loses the lines; the job goes on."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as gone, pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stderr", gone)
        hasty.main(["count"], standalone_mode=False)
        patch.undo()
        with pytest.raises(BrokenPipeError):
            gone.flush()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, writing)
        os.close(nowhere)
