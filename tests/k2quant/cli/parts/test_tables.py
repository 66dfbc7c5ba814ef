"""Tables and sentences that fit the terminal."""

from __future__ import annotations

import click
import pytest

from k2quant.cli.parts.terminal.colour import verdict
from k2quant.cli.parts.terminal.tables import Column, paragraph, table
from k2quant.ground.saying.width import cells_of

COLUMNS = (
    Column(head="task", left=True),
    Column(head="verdict", left=True, style=verdict),
    Column(head="items"),
    Column(head="same experts"),
    Column(head="95% interval"),
    Column(head="never used", minor=True),
)
ROWS = (
    ("minerva_math500_with_a_long_name", "PASS", "500", "98.1%", "-1.20 to +2.40", "3"),
    ("gsm8k", "INCONCLUSIVE", "1,319", "98.1%", "-1.20 to +2.40", "12"),
)


def at(columns: int | None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the lines of the table on a terminal of this width; None: in a pipe."""
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns:
        monkeypatch.setenv("COLUMNS", str(columns))
    return [click.unstyle(line) for line in table(COLUMNS, ROWS).split("\n")]


def test_a_piped_table_has_its_natural_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """Machines read it: a line a row, nothing folded, whatever the terminal is."""
    heads, *rows = at(None, monkeypatch)
    assert heads.split("  ")[0] == "task"
    assert [row.split() for row in rows] == [" ".join(row).split() for row in ROWS]
    assert len({len(row) for row in rows}) == 1


def test_a_table_fits_and_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """At every width no line is too long, and each cell stands there, or a line says which column does not."""
    for columns in range(20, 120):
        lines = at(columns, monkeypatch)
        assert max(map(cells_of, lines)) <= columns
        text = " ".join(" ".join(lines).split())
        missing = "never used" in text.partition("left out")[2]
        for row in ROWS:
            cells = row[1:-1] if missing else row[1:]
            assert all(word in text for cell in cells for word in cell.split())
            assert row[0] in "".join(text.split())


def test_the_ways_to_fold_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads of several lines, then without minor columns, then names on lines of their own, then all stacked."""
    assert at(90, monkeypatch)[:2] == [
        "                                                          same             95%  never",
        "task                              verdict       items  experts        interval   used",
    ]
    assert at(78, monkeypatch)[-1] == "(left out on this narrow terminal: never used)"
    assert at(60, monkeypatch)[3:5] == [
        "minerva_math500_with_a_long_name",
        "  PASS            500    98.1%  -1.20 to +2.40      3",
    ]
    assert at(30, monkeypatch)[:4] == [
        "task minerva_math500_with_a_lo",
        "  ng_name",
        "  verdict PASS, items 500,",
        "  same experts 98.1%,",
    ]


def test_a_cell_has_its_colour_and_keeps_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Colours take no columns, wherever the table is folded."""
    for columns in ("200", "60", "30"):
        monkeypatch.setenv("COLUMNS", columns)
        coloured = table(COLUMNS, ROWS)
        assert click.style("PASS", fg="green", bold=True) in coloured
        assert click.style("INCONCLUSIVE", fg="yellow", bold=True) in coloured


def test_a_name_reaches_the_terminal_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """A code in a cell is text, a wide character takes two columns, and a row may be short."""
    monkeypatch.setenv("COLUMNS", "40")
    lines = table((Column(head="a", left=True), Column(head="b"), Column(head="c")), [("x\x1b[31m", "1"), ("月", "22")])
    assert lines.split("\n") == ["a           b  c", "x\\x1b[31m   1", "月         22"]


def test_a_sentence_is_folded_at_spaces(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal, never in a pipe."""
    text = "one two three four five six seven eight nine ten"
    monkeypatch.setenv("COLUMNS", "24")
    assert paragraph(text, indent="- ", hang="  ").split("\n") == [
        "- one two three four",
        "  five six seven eight",
        "  nine ten",
    ]
    monkeypatch.delenv("COLUMNS")
    assert paragraph(text, indent="- ", hang="  ") == f"- {text}"
