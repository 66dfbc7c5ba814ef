"""Draw a folder of statistics as one HTML page: no scripts, no network, pictures as inline SVG."""

from __future__ import annotations

from pathlib import Path

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
