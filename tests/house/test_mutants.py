"""What `make mutants` is told is still true: modules and tests are there, and so is every line that it leaves out."""

from __future__ import annotations

import runpy
import tomllib

from places import ROOT

MUTATION = ROOT / "scripts" / "mutation"
TARGETS: dict[str, tuple[str, ...]] = runpy.run_path(str(MUTATION / "targets.py"))["TARGETS"]
ENTRIES = tomllib.loads((MUTATION / "equivalent.toml").read_text(encoding="utf-8"))["equivalent"]


def test_modules_and_their_tests_are_there() -> None:
    """A module that moves takes its line of the table with it."""
    named = [*TARGETS, *(test for tests in TARGETS.values() for test in tests)]
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_changes_that_change_nothing_are_changes_of_lines_that_are_there() -> None:
    """Each with a reason; one whose line was edited has to be thought about again."""
    lines = {
        module: {line.strip() for line in (ROOT / module).read_text(encoding="utf-8").splitlines()}
        for module in TARGETS
    }
    assert [entry for entry in ENTRIES if entry["line"] not in lines[entry["module"]]] == []
    assert [entry for entry in ENTRIES if not entry["reason"].strip() or entry["line"] == entry["change"]] == []
