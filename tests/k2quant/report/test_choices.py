"""What a report says of solved codes, of folds and of a budget: on the page, in JSON, in a line; and whose words."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import k2quant
from k2quant.checkpoint.reader import REPORT
from k2quant.conversion.searching.gains import bought
from k2quant.errors import MalformedFile
from k2quant.report import read_figures, write_html
from k2quant.report.reading import read

Json = dict[str, Any]
Draw = Callable[[Json], str]

EVIL = "<script>alert(1)</script>\"'\u202e"


@pytest.fixture(scope="module")
def plain(k2_source: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The report of a conversion to INT4, as text."""
    out = k2quant.convert(k2_source, tmp_path_factory.mktemp("choices") / "Small", to="int4")
    return (out.folder / REPORT).read_text()


def rounded(report: Json) -> list[Json]:
    """Return the facts of the weights that were rounded."""
    return [facts for facts in report["tensors"].values() if "figures" in facts]


@pytest.fixture
def solved(plain: str) -> Json:
    """A report of a conversion by gptq: all but three of its matrices ship as solved."""
    report: Json = json.loads(plain)
    data = {"train": {"documents": 90, "tokens": 12_345}, "validation": {"documents": 1, "tokens": 678}}
    report["method"] = {"asked": "gptq", "scales": "imatrix", "damping": 0.1, "propagate": True, "data": data}
    report["layers"] = [
        {"layer": 0, "solved": 0, "relative": None, "tokens": 678},
        {"layer": 1, "solved": 48, "relative": 0.004, "tokens": 678},
        {"layer": 2, "solved": 48, "relative": 0.012, "tokens": 678},
    ]
    for facts in rounded(report):
        facts["scales"] = {"method": "gptq", "relative": 0.25, "measure": "validation", "tokens": 90, "seen": 900}
        facts["scales"] |= {"saturated": 0.0034, "short": 0.0012}
    for facts, method in zip(rounded(report), ("imatrix", "imatrix", "rtn"), strict=False):
        facts["scales"] |= {"method": method, "reason": "worse on held-out tokens", "saturated": 0.0, "short": 0.0}
    return report


@pytest.fixture
def folded(plain: str) -> Json:
    """A report of a conversion by awq: one expert folded, the others not."""
    report: Json = json.loads(plain)
    report["method"] = {"asked": "awq", "candidates": 16, "stats": "ab" * 32}
    for number, (name, facts) in enumerate(pair for pair in report["tensors"].items() if "figures" in pair[1]):
        facts["scales"] = {"method": "imatrix", "relative": 0.8, "measure": "validation", "tokens": 90}
        if ".gate_proj." not in name:
            facts["fold"] = {"columns": 0, "least": 0, "most": 0, "relative": 1.0, "crc32": "00", "reason": "no gain"}
        if ".down_proj." in name and number < 3:
            facts["fold"] = {"columns": 17, "least": -1, "most": 2, "relative": 0.93, "crc32": "00"}
    return report


@pytest.fixture
def budgeted(plain: str) -> Json:
    """A report of a conversion with a budget: one module of two in FP8."""
    report: Json = json.loads(plain)
    sizes = {"int4": 5_000_000, "fp8": 9_000_000, "bf16": 18_000_000}
    units = [
        {
            "unit": f"layers.{layer}.mlp.experts",
            "class": "routed experts",
            "layer": layer,
            "tensors": 48,
            "weights": 9_000_000,
            "format": written,
            "bytes": sizes,
            "errors": {"int4": 3e-5, "fp8": 1e-6, "bf16": 0.0},
            "gain": 7.25e-6 / layer,
            "reason": f"{written}: 7.2e-06 of the error a MB, {side} the cut",
        }
        for layer, written, side in ((1, "fp8", "above"), (2, "int4", "below"))
    ]
    report["budget"] = {
        "asked": {"bits": 6.5},
        "bits": 6.22,
        "least": 4.5,
        "most": 16.0,
        "weights": 18_000_000,
        "bytes": 14_000_000,
        "scales": "imatrix",
        "measure": "outputs",
        "stats": "ab" * 32,
        "error": {"int4": 6e-5, "chosen": 3.1e-5},
        "units": units,
    }
    return report


def test_solving_has_its_numbers(solved: Json, said: Draw) -> None:
    """How, by what, the layers' errors with the furthest, shares of codes at the end, and what ships why are there."""
    words, count = said(solved), len(rounded(solved))
    assert "Codes are solved column by column by gptq, at scales by imatrix." in words
    assert re.search(rf"Held-out error 0\.250 of rounding.s, median of {count} matrices; 1 ships rounded", words)
    assert re.search(r"Error of outputs 0\.8% of an MLP.s output, median layer; 1\.2% in layer 2, the furthest", words)
    assert "layer error held-out tokens 1 0.4% 678 2 1.2% 678" in words
    assert f"gptq {count - 3} 0.34% 0.12%" in words
    assert "imatrix 2 validation worse on held-out tokens" in words
    assert "gptq at scales by imatrix, damping 0.1; each layer sees what quantised layers before it give" in words
    assert "data: train 12,345 tokens of 90 documents data: validation 678 tokens of 1 document" in words


def test_folds_have_their_numbers(folded: Json, said: Draw) -> None:
    """One MLP counts once, by its down; the gain where one was folded, and why the others were not."""
    words = said(folded)
    downs = sum(".down_proj." in name for name, facts in folded["tensors"].items() if "fold" in facts)
    assert f"folded 1 \N{EN DASH} not folded {downs - 1} no gain" in words
    assert re.search(r"held-out error is 0\.930 of what it is without", words)
    assert re.search(r"down_proj\.weight_packed 0\.930 17 -1 to 2", words)


def test_a_budget_has_its_ranking(budgeted: Json, said: Draw) -> None:
    """Bits, sums by format, and each module with format, gain and reason, in the report's order."""
    words = said(budgeted)
    assert "Bits a weight 6.22 6.5 asked for" in words
    assert "their errors come to 6e-05 of the energy where they are added, as chosen to 3.1e-05, 0.52 of it" in words
    assert "FP8 1 9.00 million 9.0 MB 1e-06 INT4 1 9.00 million 5.0 MB 3e-05" in words
    first = "layers.1.mlp.experts FP8 7.3e-06 1e-06 9.0 MB fp8: 7.2e-06 of the error a MB, above the cut"
    assert first in words
    assert words.index(first) < words.index("layers.2.mlp.experts INT4")


def test_the_last_line_says_it(solved: Json, folded: Json, budgeted: Json) -> None:
    """In a sentence each, and both where a budget's output was searched."""
    count = len(rounded(solved))
    median = f"held-out error 0.25 of rounding's (median of {count} matrices)"
    assert bought(solved) == f"gptq: {median}, 2 ship at imatrix scales, 1 ships rounded"
    assert str(bought(folded)).endswith(f"; 1 of {count // 3} MLPs folded")
    spent = "budget: 6.22 bits a weight (1 in fp8, 1 in int4), error 0.52 of what all in int4 would have"
    assert bought(budgeted) == spent
    assert bought(budgeted | {key: solved[key] for key in ("method", "tensors")}) == f"{bought(solved)}; {spent}"


def test_json_has_the_figures_of_the_page(solved: Json, folded: Json, budgeted: Json, tmp_path: Path) -> None:
    """Under `search` and `budget`, plain values alone; None where nothing of the kind was asked for."""

    def figures(report: Json) -> Json:
        (tmp_path / REPORT).write_text(json.dumps(report))
        found: Json = json.loads(json.dumps(read_figures(tmp_path)))
        return found

    search = figures(solved)["search"]
    assert (search["candidates"], search["stats"], search["folds"]) == (None, None, None)
    assert search["solving"]["layers"][1] == {"layer": 2, "relative": 0.012, "tokens": 678}
    assert search["solving"]["codes"]["gptq"]["saturated"] == pytest.approx(0.0034)
    assert search["solving"]["data"]["train"] == {"documents": 90, "tokens": 12_345}
    folds = figures(folded)["search"]["folds"]
    assert (folds["folded"], folds["relative"], folds["not"][0]["reason"]) == (1, 0.93, "no gain")
    found = figures(budgeted)
    assert found["search"] is None
    assert found["budget"]["formats"]["fp8"] == {"units": 1, "weights": 9_000_000}
    assert figures(solved)["budget"] is None


def test_a_page_of_k2_stays_small(solved: Json, budgeted: Json, drawn: Draw) -> None:
    """Sixty layers and five hundred modules make rows for a few; each list is cut and says so."""
    report = solved | {"budget": budgeted["budget"]}
    report["layers"] = [{"layer": layer, "solved": 1152, "relative": 0.01, "tokens": 9} for layer in range(61)]
    unit = report["budget"]["units"][0]
    report["budget"]["units"] = [unit | {"unit": f"layers.{n}.mlp", "reason": f"reason {n}"} for n in range(500)]
    for number, facts in enumerate(rounded(report)):
        facts["scales"]["method"] = f"method {number}"
    html = drawn(report)
    assert "and 470 more" in html
    assert len(set(re.findall(r"layers\.<wbr>(\d+)\.<wbr>mlp<", html))) == 30
    assert len(html) < 400_000


def test_hostile_words_are_text(solved: Json, folded: Json, budgeted: Json, drawn: Draw) -> None:
    """Markup in any word of method, data, folds and units shows as text."""
    solved["method"] |= {"scales": EVIL, "data": {EVIL: {"documents": 1, "tokens": 2}}}
    for facts in rounded(solved)[:3]:
        facts["scales"] |= {"method": EVIL, "reason": EVIL}
    unit = {"unit": EVIL, "class": EVIL, "reason": EVIL}
    budgeted["budget"]["units"][0] |= unit
    for name, facts in folded["tensors"].items():
        if "fold" in facts:
            solved["tensors"][name]["fold"] = facts["fold"] | {"reason": EVIL}
    html = drawn(solved | {"budget": budgeted["budget"]})
    assert "<script" not in html
    assert "\u202e" not in html
    assert html.count("&lt;script&gt;") >= 7


Break = Callable[[Json], object]
NUMBERS: dict[str, Any] = {
    "text": "1",
    "negative": -1,
    "NaN": math.nan,
    "infinite": math.inf,
    "truth": True,
    "list": [],
}


def broken(report: Json, tmp_path: Path) -> None:
    """Refuse a report by name."""
    (tmp_path / REPORT).write_text(json.dumps(report))
    with pytest.raises(MalformedFile):
        read(tmp_path / REPORT)


@pytest.mark.parametrize("value", NUMBERS.values(), ids=NUMBERS.keys())
@pytest.mark.parametrize("place", ["damping", "layer", "relative", "tokens", "saturated", "short", "seen", "documents"])
def test_a_false_number_of_solving_is_refused(solved: Json, tmp_path: Path, place: str, value: Any) -> None:
    """Of the wrong kind, negative, or none at all."""
    facts, layer = rounded(solved)[5]["scales"], solved["layers"][1]
    owner: Any = {
        "damping": solved["method"],
        "layer": layer,
        "relative": layer,
        "tokens": layer,
        "documents": solved["method"]["data"]["train"],
    }.get(place, facts)
    owner[place] = value
    broken(solved, tmp_path)


@pytest.mark.parametrize("value", NUMBERS.values(), ids=NUMBERS.keys())
@pytest.mark.parametrize("place", ["bits", "limit", "chosen", "int4", "weights", "bytes", "gain", "error"])
def test_a_false_number_of_a_budget_is_refused(budgeted: Json, tmp_path: Path, place: str, value: Any) -> None:
    """Likewise."""
    budget = budgeted["budget"]
    unit = budget["units"][0]
    owner, key = {
        "bits": (budget, "bits"),
        "limit": (budget["asked"], "bits"),
        "chosen": (budget["error"], "chosen"),
        "int4": (budget["error"], "int4"),
        "weights": (unit, "weights"),
        "bytes": (unit["bytes"], "fp8"),
        "gain": (unit, "gain"),
        "error": (unit["errors"], "fp8"),
    }[place]
    owner[key] = value
    if place == "bytes":
        unit["bytes"] = dict(unit["bytes"])  # the other unit keeps its own
    broken(budgeted, tmp_path)


BREAKS: dict[str, Break] = {
    "no scales": lambda report: report["method"].pop("scales"),
    "no damping": lambda report: report["method"].pop("damping"),
    "propagate is a number": lambda report: report["method"].update(propagate=1),
    "data is a list": lambda report: report["method"].update(data=[]),
    "a part of the data is text": lambda report: report["method"]["data"].update(train="all"),
    "many parts": lambda report: report["method"].update(
        data={str(n): {"documents": 1, "tokens": 1} for n in range(99)}
    ),
    "layers are text": lambda report: report.update(layers="all"),
    "a layer is a number": lambda report: report.update(layers=[3]),
    "a layer twice": lambda report: report["layers"].append(report["layers"][0]),
    "a share above one": lambda report: rounded(report)[0]["scales"].update(saturated=1.5),
    "a fold is text": lambda report: rounded(report)[0].update(fold="yes"),
    "a fold without columns": lambda report: rounded(report)[0].update(fold={"least": 0, "most": 0, "relative": 1}),
    "powers beyond a float": lambda report: rounded(report)[0].update(
        fold={"columns": 1, "least": -999, "most": 0, "relative": 1}
    ),
    "a budget is text": lambda report: report.update(budget="4.6"),
    "a budget of nothing": lambda report: report.update(budget={}),
    "a budget that asks for two": lambda report: report.update(
        budget={"asked": {"bits": 1, "kl": 1}, "error": {"int4": 1, "chosen": 1}, "units": []}
    ),
    "units are an object": lambda report: report.update(
        budget={"asked": {"bits": 1}, "bits": 1, "measure": "outputs", "error": {"int4": 1, "chosen": 1}, "units": {}}
    ),
}


@pytest.mark.parametrize("harm", BREAKS.values(), ids=BREAKS.keys())
def test_what_no_report_says_is_refused(solved: Json, tmp_path: Path, harm: Break) -> None:
    """A part that is missing or of the wrong kind is MalformedFile; verify says its own of it, and breaks as little."""
    harm(solved)
    broken(solved, tmp_path)
    with pytest.raises(MalformedFile):
        write_html(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [REPORT]


def test_a_format_that_nobody_knows_is_refused(budgeted: Json, tmp_path: Path) -> None:
    """As any other word that is none of the report's."""
    budgeted["budget"]["units"][0]["format"] = "int5"
    broken(budgeted, tmp_path)
