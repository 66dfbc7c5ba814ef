"""The part that runs inside pytest: who ran which line, and which tests run for a change, in which order."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import hypothesis
import pytest

ENDLESS = 124
"""Exit code of a run one of whose tests did not end."""

hypothesis.settings.register_profile("mutants", deadline=None, derandomize=True, database=None)


class Steady:
    """Hypothesis draws the same examples in every run, however slow the machine is."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_configure(self) -> None:
        """Choose the profile before a test is read."""
        hypothesis.settings.load_profile("mutants")


class Watch(Steady):
    """Notes for each test how long it took and which lines of one file it ran, alone or by its fixtures."""

    def __init__(self, path: Path) -> None:
        self.seconds: dict[str, float] = {}
        self.lines: dict[str, list[int]] = {}
        self._file = os.path.realpath(path)
        self._real = cache(os.path.realpath)
        self._sinks: list[set[int]] = []
        self._fixtures: defaultdict[str, set[int]] = defaultdict(set)

    def _called(self, frame: FrameType, _event: str, _argument: Any) -> Any:
        return self._ran if self._real(frame.f_code.co_filename) == self._file else None  # by a link, too

    def _ran(self, frame: FrameType, _event: str, _argument: Any) -> Any:
        for sink in self._sinks:
            sink.add(frame.f_lineno)
        return self._ran

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Watch a test from its fixtures to their end; what other tests cached is forgotten, so that all is seen."""
        _forget()
        sink: set[int] = set()
        self._sinks.append(sink)
        threading.settrace(self._called)
        sys.settrace(self._called)
        start = time.perf_counter()
        try:
            return (yield)
        finally:
            sys.settrace(None)
            threading.settrace(None)
            self._sinks.pop()
            self.seconds[item.nodeid] = time.perf_counter() - start
            names: Sequence[str] = getattr(item, "fixturenames", ())
            self.lines[item.nodeid] = sorted(sink.union(*(self._fixtures[name] for name in names)))

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[None]:
        """Note what a fixture runs for all tests that use it: the first one sets it up."""
        sink = self._fixtures[fixturedef.argname]
        self._sinks.append(sink)
        try:
            return (yield)
        finally:
            self._sinks.pop()


class Select(Steady):
    """Runs the tests that it is given, in that order, and notes the one that failed; one that does not end ends all."""

    def __init__(self, wanted: Sequence[str], seconds: Mapping[str, float]) -> None:
        self.failed: str | None = None
        self._place = {name: place for place, name in enumerate(wanted)}
        self._seconds = seconds

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Give each test eight times what it took unchanged, and five seconds more."""
        signal.signal(signal.SIGALRM, lambda *_: os._exit(ENDLESS))
        signal.setitimer(signal.ITIMER_REAL, 5 + 8 * self._seconds[item.nodeid])
        try:
            return (yield)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Leave all others out."""
        items[:] = sorted(
            (item for item in items if item.nodeid in self._place), key=lambda item: self._place[item.nodeid]
        )

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note the first failure."""
        if report.failed and self.failed is None:
            self.failed = report.nodeid


def _forget() -> None:
    modules = [module for name, module in sys.modules.items() if name.partition(".")[0] == "k2quant" and module]
    caches: Collection[Any] = [value for module in modules for value in list(vars(module).values())]
    for value in caches:
        if callable(clear := getattr(type(value), "cache_clear", None)):
            clear(value)
