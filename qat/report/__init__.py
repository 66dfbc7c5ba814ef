"""Draw a training run as one HTML page: no scripts, no network, pictures as inline SVG."""

from __future__ import annotations

from pathlib import Path

from k2quant.checkpoint.files.paths import write_whole
from k2quant.errors import OutputError
from k2quant.qat.report.page import page
from k2quant.qat.run.history import Records
from k2quant.qat.run.summary import Summary

PAGE = "report.html"
"""The page's name in the folder of a run."""


def write_report(folder: Path, history: Records, summary: Summary) -> Path:
    """Write the page of a training run, whole or not at all.

    Args:
        folder: of the run; the page is `report.html` in it.
        history: from `read_history`.
        summary: from `read_summary`.

    Returns:
        the file written.

    Raises:
        OutputError: it cannot be written.
    """
    target = folder / PAGE
    text = page(history, summary, folder.resolve().name)
    try:
        write_whole(target, text.encode())
    except OSError as error:
        raise OutputError("cannot be written", file=target, found=error.strerror or str(error)) from error
    return target
