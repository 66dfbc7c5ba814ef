"""The README's commands run as they are pasted, on a clean clone after `make demo`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from k2quant.cli import main
from k2quant.formats.known import FORMATS
from k2quant.nano import tasks
from pages import Step, blocks, run_step, skeleton, stage, steps
from places import ROOT

README = ROOT / "README.md"
NOTHING_TO_LOSE = ("not clearly better than chance", "say nothing")
"""How the gate refuses a baseline that knows nothing."""
ALIKE = 0.75
"""Share of the lines of a pasted output that must be found again; lines that tell what a model answers may differ."""


def demo(folder: Path, trained: int) -> Result:
    """Run what `make demo` runs, with so many steps of training and fewer questions: a nano-K2 of two knows nothing.

    In this process: what follows runs in those of a shell.
    """
    exam = tasks.exam
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("k2quant.cli.demo._ITEMS", 10)
        patch.setattr("k2quant.cli.demo._ROWS", 32)
        patch.setattr(tasks, "exam", lambda count: exam(count // 20))
        words = ["demo", "demo-run", "--steps", str(trained)]
        return CliRunner().invoke(main, words, prog_name="k2quant", env={"COLUMNS": "100"})


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone after `make demo`, of a nano-K2 that had two steps instead of three minutes."""
    folder = tmp_path_factory.mktemp("readme") / "clone"
    folder.mkdir()
    stage(folder)
    for trained, formats in ((0, []), (2, list(FORMATS))):  # the second time over its own folder
        done = demo(folder, trained)
        assert done.exit_code == 0, f"{done.output}\n{done.exception!r}"
        assert done.stdout.count("\n  yes ") == 8
        assert "  NO  " not in done.stdout
        rows = [line.split() for line in done.stdout.splitlines()]
        assert [row[0] for row in rows if row and row[0] in FORMATS] == formats
    return folder


def expected_codes(step: Step) -> set[int]:
    """Return the exit codes that the page's note allows: `<!-- exit 3 or 4 -->`; 0 without one."""
    allowed = re.findall(r"\d+", step.block.note) if step.block.note.startswith("exit") else ["0"]
    return set(map(int, allowed))


def fresh(step: Step, printed: str) -> Iterator[str]:
    """Yield the lines of a pasted output that the command no longer prints, numbers aside."""
    now = skeleton(printed)
    yield from (line for line in skeleton(step.output.text if step.output else "") if line not in now)


def test_the_readme_runs_as_pasted_after_make_demo(clone: Path) -> None:
    """Every promise of the demo is kept; then each block runs where it stands, and prints what stands below it.

    A nano-K2 of two steps knows nothing, so the gate may say that there is nothing to lose, and answers differ.
    """
    shown = steps(README)
    assert len(shown) >= 5
    for step in shown:
        done = run_step(step, clone)
        nothing_to_lose = done.returncode == 1 and any(word in done.stdout for word in NOTHING_TO_LOSE)
        assert nothing_to_lose or done.returncode in expected_codes(step), f"{step.block.place}\n{done.stdout}"
        if step.output is not None and not nothing_to_lose:
            lost = list(fresh(step, done.stdout))
            found = len(skeleton(step.output.text)) - len(lost)
            assert found >= ALIKE * (found + len(lost)), f"{step.block.place}: stale\n{lost}\n{done.stdout}"


def test_a_stale_output_is_found() -> None:
    """Other numbers are no matter; other words are."""
    step = next(step for step in steps(README) if step.output is not None)
    assert step.output is not None
    assert list(fresh(step, re.sub(r"\d", "7", step.output.text))) == []
    assert list(fresh(step, "something else")) == skeleton(step.output.text)


def test_what_does_not_run_says_why() -> None:
    """A shell block of the README that is not run has a reason in the line above it."""
    notes = [block.note for block in blocks(README) if block.language == "sh" and block.note.startswith("not run")]
    assert all(re.fullmatch(r"not run: .{10,}", note) for note in notes)
