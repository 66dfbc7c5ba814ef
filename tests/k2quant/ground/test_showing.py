"""Results in one line, and as a table in a notebook, whatever they hold."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import k2quant
from k2quant.checking.inspection import Inspection
from k2quant.checkpoint.reader import open_checkpoint
from k2quant.checkpoint.weights import group_tensors
from k2quant.conversion.plan import Options, make_plan
from k2quant.ground.saying.showing import as_html, brief, shown

LONGEST = 700
"""Letters of the longest: a dozen facts."""


class Pair(NamedTuple):
    """A result with two fields."""

    name: str
    many: list[int]


@dataclass(frozen=True)
class Result:
    """A result with a field of its own use."""

    pair: Pair
    _hidden: int = 0
    more: dict[str, Any] = field(default_factory=dict)


class Said:
    """A result that says its facts."""

    def facts(self) -> dict[str, object]:
        """Return one fact, as a hostile file may have it."""
        return {"<b>": "<script>\x1b[31m"}


def test_a_result_is_one_line() -> None:
    """Fields by name, few items written out, of many their number; hidden ones not, facts in place of fields."""
    assert brief(Pair("a", [1, 2])) == "Pair(name='a', many=[1, 2])"
    assert brief(Result(Pair("a\nb", list(range(1000))), more={"x": "y"})).startswith("Result(pair=")
    assert "hidden" not in brief(Result(Pair("a", [])))
    assert brief(Said()) == "Said(<b>='<script>\\x1b[31m')"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ([1, 2, 3], "[1, 2, 3]"),
        ([1, 2, 3, 4], "<4 items>"),
        ({"a": 1}, "[['a', 1]]"),
        (["x" * 100], "<1 item>"),
        ("x" * 100, "'" + "x" * 56 + "..."),
        (np.zeros((3, 4)), "<float64 [3, 4]>"),
        (range(10**9), "<1,000,000,000 items>"),
        (None, "None"),
    ],
)
def test_values_are_short(value: object, text: str) -> None:
    """What is long is cut, what holds many is counted, line breaks are spaces."""
    assert shown(value) == text


def test_a_table_holds_no_markup_but_its_own() -> None:
    """Names and values come from files that may be hostile."""
    html = as_html(Said())
    assert "&lt;script&gt;" in html
    assert "<script" not in html
    assert "<b>" not in html
    assert html.count("<tr>") == 1


def test_what_public_functions_return_is_short(k2_source: Path, tmp_path: Path) -> None:
    """Of a checkpoint of 262 tensors: conversions, plans, checks, tensors; those that notebooks show have a table."""
    done = k2quant.convert(k2_source, tmp_path / "out", "int4")
    checkpoint = open_checkpoint(done.folder)
    plan = make_plan(checkpoint, Options("bf16"))
    results: list[Any] = [
        done,
        k2quant.verify(k2_source, done.folder),
        k2quant.verify(k2_source, tmp_path / "out", against=done.folder / "k2quant_report.json"),
        k2quant.verify_checksums(done.folder),
        k2quant.inspect(done.folder),
        k2quant.quantize(np.ones((128, 128), np.float32), "fp8"),
        checkpoint,
        next(iter(checkpoint.shards.values())),
        plan,
        plan.shards[0],
        plan.shards[0].jobs[0],
        group_tensors(checkpoint.tensors),
    ]
    for result in results:
        assert len(repr(result)) < LONGEST, type(result)
        assert "\n" not in repr(result)
        assert repr(result).startswith(f"{type(result).__name__}(")
    assert "passed=True" in repr(results[1])
    assert "to='int4', read='20.8 MB'" in repr(done)
    for result in results[:5]:
        html = result._repr_html_()
        assert html.startswith(f"<table><caption>{type(result).__name__}")


def test_a_verification_that_failed_says_its_first_failure(k2_source: Path, k2_thinking: Path) -> None:
    """Which tensor, and why; of the others the number."""
    failed = k2quant.Verification([], {"config.json": "is missing", "b": "is missing"})
    assert repr(failed) == "Verification(passed=False, failed=2, failure of config.json='is missing')"
    assert isinstance(k2quant.inspect(k2_thinking), Inspection)
    assert "problems=0" in repr(k2quant.inspect(k2_source))
