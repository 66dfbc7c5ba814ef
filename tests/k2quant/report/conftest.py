"""What tests of pages share: a page out of a report as it stands, or as a test has changed it."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from k2quant.checkpoint.reader import REPORT
from k2quant.report import write_html

Draw = Callable[[dict[str, Any]], str]


@pytest.fixture
def drawn(tmp_path: Path) -> Draw:
    """Return a function that draws a report's page and returns its HTML."""

    def draw(report: dict[str, Any]) -> str:
        folder = tmp_path / "out"
        folder.mkdir(exist_ok=True)
        (folder / REPORT).write_text(json.dumps(report))
        return write_html(folder).read_text()

    return draw


@pytest.fixture
def said(drawn: Draw) -> Draw:
    """Return a function that draws a report's page and returns its words, in single spaces."""

    def words(report: dict[str, Any]) -> str:
        plain = re.sub(r"<style>.*?</style>|</?(b|code|wbr|span)\b[^>]*>", "", drawn(report), flags=re.DOTALL)
        return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]*>", " ", plain)))

    return words
