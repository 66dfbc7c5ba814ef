"""Draw a folder of statistics as one HTML page: no scripts, no network, pictures as inline SVG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from k2quant.calib.coverage import coverage_of
from k2quant.calib.report.page import page
from k2quant.calib.stats.reading import open_stats
from k2quant.ground.extras import need
from k2quant.report.document import page_file, write_page


def write_html(folder: Path, output: Path | None = None) -> Path:
    """Write what a calibration measured as one HTML page.

    Args:
        folder: what `k2quant calibrate` wrote.
        output: the file to write, `.html`; None for `k2quant_report.html` in `folder`.

    Returns:
        the file written.

    Raises:
        CheckpointError: it is no such folder, is not finished, or is not what was written.
        UsageError: `output` is no name of a page.
        OutputError: the page cannot be written.
        MissingExtra: matplotlib is not installed.
    """
    need("report", "drawing a report")
    target = page_file(folder, output)
    stats = open_stats(folder)
    write_page(target, page(stats.manifest, stats.fingerprint, coverage_of(stats), folder.resolve().name))
    return target


def read_figures(folder: Path) -> dict[str, Any]:
    """Return the figures of the page as JSON holds them; nothing is drawn or written.

    Args:
        folder: what `k2quant calibrate` wrote.

    Returns:
        the fingerprint, documents and tokens of each part of the data, and `Coverage.as_json`.

    Raises:
        CheckpointError: it is no such folder, is not finished, or is not what was written.
    """
    stats = open_stats(folder)
    data = {name: {"documents": part.documents, "tokens": part.tokens} for name, part in stats.manifest.data.items()}
    return {"fingerprint": stats.fingerprint, "data": data, "coverage": coverage_of(stats).as_json()}
