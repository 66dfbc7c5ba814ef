"""`progress=True`: a bar in notebooks, a line on stderr elsewhere; functions are called as ever."""

from __future__ import annotations

import io
import sys
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import k2quant
from k2quant.errors import UsageError
from k2quant.ground.saying import progress
from k2quant.ground.saying.meter import Meter, each
from k2quant.ground.saying.progress import barred, showing


class Clock:
    """Time that passes as a test says."""

    now = 100.0

    def perf_counter(self) -> float:
        """Return it."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Let a clock stand still."""
    found = Clock()
    monkeypatch.setattr(progress, "time", found)
    monkeypatch.setattr(progress, "Meter", partial(Meter, clock=found.perf_counter))
    return found


def test_what_is_asked_for_is_given() -> None:
    """None and False give nothing, a function itself; what is neither is refused."""

    def tell(done: int, total: int) -> None:
        raise AssertionError(done, total)

    for nothing in (None, False):
        with showing(nothing, "work") as given:
            assert given is None
    with showing(tell, "work") as given:
        assert given is tell
    with pytest.raises(UsageError, match="progress is 'yes'; expected True, or a function"), showing("yes", "x"):  # type: ignore[arg-type]
        pass


def test_a_log_has_a_line_now_and_then(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """None of short work; then each 5% or 30 s, 5 s apart, with amount, rate and time left; bytes with their units."""
    with showing(True, "convert K2") as tell:
        assert tell is not None
        for second in range(0, 101, 2):
            clock.now = 100.0 + second
            tell(second * 10**9, 100 * 10**9)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "k2quant: convert K2: 10% (10.0 GB of 100.0 GB), 1.0 GB/s, 1 min 30 s left"
    assert len(lines) == 16
    with showing(True, "short") as tell:
        assert tell is not None
        tell(1, 2)
    assert capsys.readouterr().err == ""


def test_slow_work_says_so_each_half_minute(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever little is done; what an earlier run had done does not count into the rate."""
    with showing(True, "blame", each("pass", "passes")) as tell:
        assert tell is not None
        for second in range(0, 91, 2):
            clock.now = 100.0 + second
            tell(500 + second // 15, 10_000)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert lines[-1] == "k2quant: blame: 5% (504 of 10,000 passes), 14.5 s a pass, 38 h 14 min left"


def test_a_terminal_has_one_line_that_goes(
    clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is drawn over and over, not too often, and erased at the end, also of work that failed."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)

    def fail() -> None:
        with showing(True, "load") as tell:
            assert tell is not None
            for tick in range(10):
                clock.now += 0.0625
                tell(tick, 10)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    said = capsys.readouterr().err
    assert "\n" not in said
    assert said.count("\r\x1b[Kload  ") == 5
    assert all(len(line) < 80 for line in said.split("\r\x1b[K"))
    assert said.endswith("\r\x1b[K")


def test_a_line_fits_the_terminal(
    clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long the name is; a terminal that cannot draw over a line gets those of a log."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    for dumb in (False, True):
        with showing(True, "convert a-folder-with-a-name\x1b[31m-that-is-long") as tell:
            assert tell is not None
            tell(0, 10)
            clock.now += 20
            tell(5, 10)
        said = capsys.readouterr().err
        assert "\x1b[31m" not in said
        assert ("\r\x1b[K" in said) != dumb
        if dumb:
            assert said.endswith("-that-is-long: 50% (5 B of 10 B), 0 B/s, 20 s left\n")
        else:
            assert "50%" in said
            assert all(len(line) < 40 for line in said.split("\r\x1b[K"))
        monkeypatch.setenv("TERM", "dumb")


@pytest.mark.parametrize("stream", [None, io.StringIO, SimpleNamespace(isatty=lambda: True)])
def test_a_stderr_of_whatever_kind_is_no_reason_to_fail(
    stream: object, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None, as in a window without a console, one that is closed, one that can do nothing: the work goes on."""
    if stream is io.StringIO:
        stream = io.StringIO()
        stream.close()
    monkeypatch.setattr(sys, "stderr", stream)
    with showing(True, "load") as tell:
        assert tell is not None
        for second in (0, 20):
            clock.now += second
            tell(second, 20)


def test_a_notebook_has_a_bar(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """One output that is updated; its words are escaped."""
    shown: list[str] = []
    handle = SimpleNamespace(update=shown.append)

    def display(what: str, *, display_id: bool) -> Any:
        assert display_id
        shown.append(what)
        return handle

    module = ModuleType("IPython")
    module.get_ipython = lambda: SimpleNamespace(kernel=object())  # type: ignore[attr-defined]
    inner = ModuleType("IPython.display")
    inner.HTML, inner.display = str, display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", module)
    monkeypatch.setitem(sys.modules, "IPython.display", inner)
    with showing(True, "<K2>") as tell:
        assert tell is not None
        for done in (0, 1, 2):
            clock.now += 0.2
            tell(done, 2)
    assert len(shown) == 3
    assert shown[-1] == '<progress value="2" max="2"></progress> &lt;K2&gt;: 100% (2 B of 2 B), 5 B/s'


def test_a_function_names_what_it_works_on(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """The last part of its first argument, if that is a path; called without progress it is as it was."""

    @barred("convert")
    def work(_source: object, *, progress: progress.Asked = None) -> str:
        if callable(progress):
            progress(0, 1)
            clock.now += 20
            progress(1, 1)
        return "done"

    assert work(Path("a/K2")) == "done"
    assert capsys.readouterr().err == ""
    assert work("a/K2", progress=True) == "done"
    assert "k2quant: convert K2: 100%" in capsys.readouterr().err
    assert work(5, progress=True) == "done"
    assert "k2quant: convert: 100%" in capsys.readouterr().err


def test_public_functions_take_true(k2_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`convert`, `verify` and `verify_checksums` show a line where somebody looks."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    said: list[str] = []
    monkeypatch.setattr(progress, "_write", said.append)
    k2quant.convert(k2_source, tmp_path / "out", "bf16", progress=True)
    k2quant.verify(k2_source, tmp_path / "out", progress=True)
    k2quant.verify_checksums(tmp_path / "out", progress=True)
    for what in ("convert Kimi-K2-Small  ", "verify Kimi-K2-Small  ", "verify out  "):
        assert any(what in line for line in said)
    with pytest.raises(UsageError, match="progress is 'bar'"):
        k2quant.convert(k2_source, tmp_path / "more", "bf16", progress="bar")  # type: ignore[arg-type]
