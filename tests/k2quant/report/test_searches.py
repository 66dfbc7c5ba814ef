"""The page of a conversion whose scales were searched: what the search bought, what ships rounded, and whose words."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from k2quant.checkpoint.reader import REPORT
from k2quant.cli import main
from k2quant.conversion.convert import convert
from k2quant.conversion.searching.gains import bought
from k2quant.errors import MalformedFile
from k2quant.report import write_html
from k2quant.report.choices.searches import projection

Json = dict[str, Any]
Draw = Callable[[Json], str]

WORSE = "worse than rounding on held-out data"
EVIL = "<script>alert(1)</script>\"'\u202e"


@pytest.fixture(scope="module")
def plain(k2_source: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The report of a conversion to INT4, as text."""
    return (convert(k2_source, tmp_path_factory.mktemp("searched") / "Small", to="int4").folder / REPORT).read_text()


@pytest.fixture
def report(plain: str) -> Json:
    """A report that says of each expert that `imatrix` leaves 0.5 to 0.8 of rounding's error, one aside."""
    found: Json = json.loads(plain)
    found["method"] = {"asked": "imatrix", "candidates": 16, "stats": "ab" * 32}
    weights = rounded(found)
    for number, facts in enumerate(weights):
        relative = 0.5 + 0.3 * number / (len(weights) - 1)
        facts["scales"] = {"method": "imatrix", "relative": relative, "measure": "validation", "tokens": 100 + number}
    weights[7]["scales"] = {"method": "rtn", "relative": 1.25, "measure": "validation, blended", "tokens": 3}
    weights[7]["scales"]["reason"] = WORSE
    return found


def rounded(report: Json) -> list[Json]:
    """Return the facts of the weights that were rounded."""
    return [facts for facts in report["tensors"].values() if "figures" in facts]


def test_a_search_has_its_numbers(report: Json, said: Draw) -> None:
    """Method, candidates, the median of all matrices, what ships rounded and why, and the fingerprint are there."""
    words, count = said(report), len(rounded(report))
    assert "Scales are the best of 16 a group by imatrix, weighed by what a calibration saw." in words
    assert re.search(rf"Held-out error 0\.65\d of rounding.s, median of {count} matrices; 1 ships rounded", words)
    assert f"imatrix {count - 1} validation \N{EN DASH}" in words
    assert f"rtn 1 validation, blended {WORSE}" in words
    assert f"statistics {'ab' * 32}" in words


def test_what_ships_rounded_counts_as_rounding(report: Json, said: Draw) -> None:
    """The number at the head is of what ships, as in the command's last line, not of what was dropped."""
    for facts in rounded(report):
        facts["scales"] = {"method": "rtn", "relative": 1.25, "measure": "validation", "tokens": 9, "reason": WORSE}
    assert "Held-out error 1.000 of rounding" in said(report)
    assert f"median of {len(rounded(report))} matrices" in str(bought(report))
    assert "held-out error 1.00 of rounding's" in str(bought(report))


def test_the_ends_are_listed(report: Json, said: Draw) -> None:
    """The one that is worse than rounding stands first, and the one that gained most last."""
    words = said(report)
    names = [name for name, facts in report["tensors"].items() if "figures" in facts]
    listed = words[words.index("Least and most gained") :]
    assert f"{names[7]} 1.250 rtn validation, blended 3" in listed
    assert listed.index(names[7]) < listed.index(names[-1]) < listed.index(f"{names[0]} 0.500 imatrix validation 100")


def test_projections_and_layers_have_rows(report: Json, said: Draw) -> None:
    """Both pictures come with their numbers: gate, up and down by layer, and over all layers."""
    words = said(report)
    assert "layer expert gate_proj expert up_proj expert down_proj 1 0." in words
    number = len(rounded(report)) // 3
    assert re.search(rf"expert gate_proj {number} 0\.500 0\.5\d\d 0\.6\d\d", words)


def test_without_statistics_the_weights_judge(report: Json, said: Draw) -> None:
    """A search by the weights alone speaks of their squared error, and of nothing that was held out."""
    report["method"] = {"asked": "mse", "candidates": 16}
    for facts in rounded(report):
        facts["scales"] = {"method": "mse", "relative": 0.9, "measure": "weights"}
    words = said(report)
    assert "Squared error 0.900 of rounding" in words
    assert "Scales are the best of 16 a group by mse." in words
    assert "ship rounded" not in words
    assert "Held-out error" not in words
    assert "Without statistics a matrix is judged on its weights" in words


def test_plain_rounding_says_nothing_of_it(plain: str, said: Draw) -> None:
    """A conversion by rounding to nearest, and every report of earlier releases, has no word of a search."""
    words = said(json.loads(plain))
    assert "Least and most gained" not in words
    assert "Scales are" not in words


def test_a_search_of_nothing_is_said(report: Json, said: Draw) -> None:
    """Where no weight got new codes, the page says so in place of empty pictures."""
    for facts in rounded(report):
        del facts["scales"]
    words = said(report)
    assert "no weight got new codes, so no scales were searched" in words
    assert "Error beside that of rounding" not in words


def test_the_page_of_a_real_search(k2_source: Path, tmp_path: Path) -> None:
    """What `method="mse"` writes is drawn, and each matrix is better than rounded."""
    folder = convert(k2_source, tmp_path / "out", to="int4", method="mse", scope="linear").folder
    html = write_html(folder).read_text()
    assert "Squared error" in html
    assert all(legend in html for legend in ("expert gate_proj", "attention o_proj", "dense mlp down_proj"))
    report = json.loads((folder / REPORT).read_text())
    assert all(facts["scales"]["relative"] < 1 for facts in rounded(report))


def test_json_has_the_figures_of_the_page(report: Json, tmp_path: Path) -> None:
    """`--json` prints classes and what the search bought, draws nothing, and needs no name of a page."""
    (tmp_path / REPORT).write_text(json.dumps(report))
    result = CliRunner().invoke(main, ["report", str(tmp_path), "--json"])
    assert result.exit_code == 0, result.output
    found, count = json.loads(result.output), len(rounded(report))
    search = found["search"]
    assert (search["method"], search["candidates"], search["matrices"]) == ("imatrix", 16, count)
    assert search["relative"]["best"] == 0.5
    assert search["relative"]["worst"] == 1.25
    assert [way["matrices"] for way in search["ships"]] == [count - 1, 1]
    assert sum(row["tensors"] for row in found["classes"]) == len(report["tensors"])
    assert all(row["sqnr_db"] is None or row["sqnr_db"] > 15 for row in found["classes"])
    assert [path.name for path in tmp_path.iterdir()] == [REPORT]
    result = CliRunner().invoke(main, ["report", str(tmp_path), "--json", "-o", str(tmp_path / "x.html")])
    assert result.exit_code == 2
    assert "--json draws none" in result.output


def test_errors_beyond_the_picture_are_counted(report: Json, said: Draw, drawn: Draw) -> None:
    """An error of a billion times rounding's is drawn at the edge, counted in words, and whole in the table."""
    rounded(report)[0]["scales"]["relative"] = 1e9
    assert "1 matrix beyond 2 is drawn there." in said(report)
    assert "1e+09" in said(report)
    assert all(len(svg) < 100_000 for svg in re.findall(r"<svg.*?</svg>", drawn(report), flags=re.DOTALL))


def test_hostile_words_are_text(report: Json, drawn: Draw) -> None:
    """Markup in method, measure, reason, fingerprint and name shows as text, in no picture's axis as an element."""
    report["method"] = {"asked": EVIL, "candidates": 16, "stats": EVIL}
    name, facts = next((name, facts) for name, facts in report["tensors"].items() if "scales" in facts)
    facts["scales"] = {"method": EVIL, "relative": 1.5, "measure": EVIL, "tokens": 0, "reason": EVIL}
    report["tensors"][f"{EVIL}.{EVIL}.weight_packed"] = report["tensors"].pop(name)
    html = drawn(report)
    assert "<script" not in html
    assert "\u202e" not in html
    assert html.count("&lt;script&gt;") >= 6


def test_many_kinds_of_words_make_a_small_page(report: Json, drawn: Draw) -> None:
    """A reason of its own for each matrix does not make a row for each."""
    for number, facts in enumerate(rounded(report)):
        facts["scales"]["reason"] = f"reason {number}"
    assert len(set(re.findall(r"reason \d+", drawn(report)))) == 30


BREAKS: dict[str, Callable[[Json, Json], object]] = {
    "method is text": lambda report, _: report.update(method="mse"),
    "no candidates": lambda report, _: report["method"].pop("candidates"),
    "no candidate": lambda report, _: report["method"].update(candidates=0),
    "asked for a list": lambda report, _: report["method"].update(asked=[]),
    "fingerprint is a number": lambda report, _: report["method"].update(stats=1),
    "scales are a list": lambda _, facts: facts.update(scales=[]),
    "no method": lambda _, facts: facts["scales"].pop("method"),
    "error is text": lambda _, facts: facts["scales"].update(relative="0.5"),
    "error below zero": lambda _, facts: facts["scales"].update(relative=-0.5),
    "error is infinite": lambda _, facts: facts["scales"].update(relative=1e300),
    "no measure": lambda _, facts: facts["scales"].pop("measure"),
    "tokens below zero": lambda _, facts: facts["scales"].update(tokens=-1),
    "tokens are a truth": lambda _, facts: facts["scales"].update(tokens=True),
    "reason is a number": lambda _, facts: facts["scales"].update(reason=1),
}


@pytest.mark.parametrize("harm", BREAKS.values(), ids=BREAKS.keys())
def test_a_malformed_search_is_refused(report: Json, tmp_path: Path, harm: Callable[[Json, Json], object]) -> None:
    """A part of a search that is missing or of the wrong kind is MalformedFile, and nothing is written."""
    harm(report, rounded(report)[0])
    (tmp_path / REPORT).write_text(json.dumps(report))
    with pytest.raises(MalformedFile):
        write_html(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [REPORT]


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("model.layers.3.mlp.experts.17.gate_proj.weight_packed", "routed experts", "expert gate_proj"),
        ("model.layers.3.self_attn.o_proj.weight", "attention", "attention o_proj"),
        ("model.embed_tokens.weight", "embedding", "embedding"),
        ("<b>.<b>", "other", "other"),
    ],
)
def test_projections_are_named(name: str, kind: str, expected: str) -> None:
    """A projection is named by class and role; what is none by its class, whatever its name holds."""
    assert projection(name, kind) == expected
