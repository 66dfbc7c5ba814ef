"""Columns: of terminals, of texts."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from k2quant.ground.saying.width import cells_of, shortened, terminal_width


@pytest.mark.parametrize("text", ["short", "model.layers.12.mlp.experts.3.up_proj.weight", "月之暗面" * 9])
def test_the_middle_of_a_long_text_gives_way(text: str) -> None:
    """Both ends stay, and what is short stays whole."""
    for room in range(5, 50):
        found = shortened(text, room)
        assert cells_of(found) <= room
        assert found == text if cells_of(text) <= room else found[0] + found[-1] == text[0] + text[-1]
        assert ("…" in found) == (found != text)


def test_columns_that_are_no_number_and_terminals_without_a_size(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """COLUMNS that says nothing is not believed; a terminal without a size has 80 columns."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for given in ("", "0", "-5", "wide", "²"):
        monkeypatch.setenv("COLUMNS", given)
        assert terminal_width(Terminal()) == 80
        with (tmp_path / "file").open("w") as file:
            assert terminal_width(file) is None
