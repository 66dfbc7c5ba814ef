"""Draw the report of a conversion, a merge or an export as one HTML page: no scripts, no network, inline SVG.

Everything on the page is computed from `k2quant_report.json`; matplotlib draws the pictures.
"""

from __future__ import annotations

from pathlib import Path

from k2quant.checkpoint.files.sources import check_folder
from k2quant.checkpoint.reader import INCOMPLETE, REPORT
from k2quant.errors import MalformedFile
from k2quant.ground.extras import need
from k2quant.report.document import page_file, write_page
from k2quant.report.page import page
from k2quant.report.reading import read


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
    check_folder(folder)
    if (folder / INCOMPLETE).exists():
        raise MalformedFile(
            "the conversion is not finished", file=folder, remedy="run the same k2quant convert again: it resumes"
        )
    write_page(target, page(read(folder / REPORT), folder.resolve().name))
    return target
