"""Draw the report of a conversion, a merge or an export as one HTML page: no scripts, no network, inline SVG.

Everything on the page is computed from `k2quant_report.json`; matplotlib draws the pictures.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from k2quant.checkpoint.files.sources import check_folder
from k2quant.checkpoint.reader import INCOMPLETE, REPORT
from k2quant.errors import MalformedFile
from k2quant.ground.extras import need
from k2quant.report.content import Report
from k2quant.report.document import page_file, write_page
from k2quant.report.page import page
from k2quant.report.reading import read
from k2quant.report.sections import budgeted, searched


def write_html(folder: Path, output: Path | None = None) -> Path:
    """Write the report of a finished conversion as one HTML page.

    Args:
        folder: what `k2quant convert` wrote.
        output: the file to write, `.html`; None for `k2quant_report.html` in `folder`.

    Returns:
        the file written.

    Raises:
        CheckpointError: there is no such folder.
        MalformedFile: it holds no report, or one that does not parse, or its conversion is not finished.
        UsageError: `output` is no name of a page.
        OutputError: the page cannot be written.
        MissingExtra: matplotlib is not installed.
    """
    need("report", "drawing a report")
    target = page_file(folder, output)
    write_page(target, page(_finished(folder), folder.resolve().name))
    return target


def read_figures(folder: Path) -> dict[str, Any]:
    """Return the figures of a finished conversion's report as JSON holds them; nothing is drawn or written.

    Args:
        folder: what `k2quant convert` wrote.

    Returns:
        sizes, a row for each class and format under `classes`, and under `search` what a search of scales bought,
        under `budget` how bits were shared out, or None.

    Raises:
        CheckpointError: there is no such folder.
        MalformedFile: it holds no report, or one that does not parse, or its conversion is not finished.
    """
    report = _finished(folder)
    return {**report.as_json(), "search": searched.as_json(report), "budget": budgeted.as_json(report)}


def _finished(folder: Path) -> Report:
    check_folder(folder)
    if (folder / INCOMPLETE).exists():
        raise MalformedFile(
            "the conversion is not finished", file=folder, remedy="run the same k2quant convert again: it resumes"
        )
    return read(folder / REPORT)
