"""`convert --budget`: what a dry run says, what is written, and what makes no sense."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import k2quant
from k2quant.calib import allot
from k2quant.calib.solving.writing.planned import plan_solved
from k2quant.checkpoint.reader import open_checkpoint
from k2quant.cli import main
from k2quant.conversion.plan import options_of


def run(small: Any, *more: str | Path, to: Path | str = "out") -> Result:
    """Run `convert --to int4` on the small model."""
    return CliRunner().invoke(main, ["convert", "--to", "int4", *map(str, more), str(small.source), str(to)])


def test_a_dry_run_ranks_units(small: Any, tmp_path: Path) -> None:
    """Bits that were asked for and reached, how many units are raised, the first of the ranking, and bits by layer."""
    given = ("--scope", "linear", "--budget", "6", "--stats", small.stats, "--method", "imatrix", "--dry-run")
    found = run(small, *given, to=tmp_path / "out")
    assert found.exit_code == 0, found.output
    expected = allot(small.source, small.stats, scope="linear", budget=6)
    assert f"6 bits asked; {expected.bits:.3f} bits a weight, {expected.least:.3f} were all of it int4" in found.output
    lines = found.output.splitlines()
    head = next(number for number, line in enumerate(lines) if line.startswith("unit "))
    names = [line.split()[0] for line in lines[head + 1 : head + 9]]
    assert names == [one.unit for one in expected.ranked[:8]]
    assert f"({len(expected.ranked) - 8} more: --json)" in lines
    assert "bits by layer" in found.output
    said = json.loads(run(small, *given, "--json", to=tmp_path / "out").output)
    assert said["budget"] == json.loads(json.dumps(expected.as_json()))
    assert not (tmp_path / "out").exists()


def test_it_converts_by_any_method(small: Any, tmp_path: Path) -> None:
    """With scales that statistics chose, and with plain ones, which read no statistics but for the ranking."""
    for method in ("rtn", "imatrix"):
        found = run(
            small, "--budget", "6.5", "--stats", small.stats, "--method", method, "--json", to=tmp_path / method
        )
        assert found.exit_code == 0, found.output
        report = json.loads((tmp_path / method / "k2quant_report.json").read_text())
        assert report["budget"]["asked"] == {"bits": 6.5}
        assert report["budget"]["scales"] == method
        assert ("method" in report) == (method == "imatrix")


def test_what_is_solved_is_what_stays_int4(small: Any) -> None:
    """GPTQ takes such a recipe: raised units are none of its matrices. They are ranked by the scales of `imatrix`."""
    found = allot(small.source, small.stats, budget=6.5, method="gptq")
    assert found.said["scales"] == "imatrix"
    planned = plan_solved(open_checkpoint(small.source), options_of(found.recipe))
    kept = {one.layer for one in found.ranked if one.format == "int4"}
    assert len(kept) == 1
    assert {int(base.split(".")[2]) for base in planned.jobs} == kept
    assert len(planned.jobs) == 12


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--budget", "6"), "--budget weighs errors by what a calibration kept apart, and --stats names none"),
        (("--blame", "x"), "--blame says where a budget counts: it belongs to --budget or --max-kl"),
        (
            ("--budget", "6", "--max-kl", "1", "--stats", "STATS"),
            "--budget in bits a weight, or what it may lose, --max-kl",
        ),
        (("--max-kl", "1", "--stats", "STATS"), "--max-kl needs --blame"),
        (("--budget", "6", "--stats", "STATS", "--method", "gptq"), "--method gptq runs text through the model"),
        (("--budget", "3", "--stats", "STATS"), "--budget 3: these 49,152 weights take"),
    ],
)
def test_what_makes_no_sense_is_refused(small: Any, given: tuple[str, ...], message: str) -> None:
    """As a mistake of whoever typed it, in the command's own flags."""
    found = run(small, *(small.stats if each == "STATS" else each for each in given))
    assert found.exit_code == 2
    assert message in " ".join(found.output.split())


def test_a_recipe_beside_it_is_refused(small: Any, tmp_path: Path) -> None:
    """A budget makes one of its own; without --to there is nothing to share out."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("rules: [{to: int4}]")
    where = [str(small.source), str(tmp_path / "out")]
    for more, message in ((["--config", str(recipe)], "leave out --config"), ([], "say --to int4")):
        found = CliRunner().invoke(main, ["convert", *more, "--budget", "6", "--stats", str(small.stats), *where])
        assert found.exit_code == 2
        assert message in " ".join(found.output.split())


def test_bits_that_raise_nothing_say_what_the_next_step_takes(small: Any, tmp_path: Path) -> None:
    """Units are large: with the experts of a layer alone in scope, a tenth of a bit more changes nothing."""
    given = ("--budget", "4.6", "--stats", small.stats, "--dry-run")
    said = run(small, *given, to=tmp_path / "out")
    assert said.exit_code == 0, said.output
    found = re.search(r"note: with 4.6 bits nothing is raised: (\S+) in (fp8|bf16) alone takes (\S+)", said.stderr)
    assert found
    assert found[1] in said.stdout
    assert "below the cut" not in said.stdout
    again = run(small, "--budget", str(float(found[3]) + 0.01), *given[2:], to=tmp_path / "out")
    assert "nothing is raised" not in again.stderr


def test_a_budget_that_leaves_nothing_to_solve_reads_no_text(small: Any, tmp_path: Path) -> None:
    """With room for BF16 everywhere GPTQ has no matrix: what it was given is no mistake of whoever typed it."""
    data = tmp_path / "text.txt"
    data.write_text("some")
    given = ("--budget", "16", "--stats", small.stats, "--method", "gptq", "--data", data, "--samples", "8")
    done = run(small, *given, to=tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    assert "note: the budget leaves nothing for gptq to solve, and no text is read" in done.stderr
    assert k2quant.verify(small.source, tmp_path / "out").passed
