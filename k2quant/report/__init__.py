"""Draw the report of a conversion, a merge or an export as one HTML page: no scripts, no network, inline SVG.

Everything on the page is computed from `k2quant_report.json`; matplotlib draws the pictures.
"""

from __future__ import annotations

from pathlib import Path

from k2quant.checkpoint.files.paths import write_whole
from k2quant.checkpoint.files.sources import check_folder
from k2quant.checkpoint.reader import INCOMPLETE, REPORT
from k2quant.errors import MalformedFile, OutputError, UsageError
from k2quant.ground.extras import need
from k2quant.report.page import page
from k2quant.report.reading import read

PAGE = "k2quant_report.html"
"""The page's name in the folder of the conversion, unless another is asked for."""


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
    target = folder / PAGE if output is None else output
    if target.suffix.lower() not in {".html", ".htm"} or target.is_dir():
        raise UsageError(f"{target} is no name for a page; end it in .html")
    check_folder(folder)
    if (folder / INCOMPLETE).exists():
        raise MalformedFile(
            "the conversion is not finished", file=folder, remedy="run the same k2quant convert again: it resumes"
        )
    text = page(read(folder / REPORT), folder.resolve().name)
    try:
        write_whole(target, text.encode())
    except OSError as error:
        raise OutputError("cannot be written", file=target, found=error.strerror or str(error)) from error
    return target
