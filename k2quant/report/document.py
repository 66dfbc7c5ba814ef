"""What every page of k2quant is framed by, and how it is written."""

from __future__ import annotations

from pathlib import Path

from k2quant.checkpoint.files.paths import write_whole
from k2quant.errors import OutputError, UsageError
from k2quant.report.style import style_sheet

PAGE = "k2quant_report.html"
"""The page's name in the folder that it is about, unless another is asked for."""


def document(title: str, body: str, *, css: str = "", head: str = "") -> str:
    """Return an HTML document.

    Args:
        title: of the window, as HTML.
        body: header and main part, as HTML, with a newline at its end.
        css: rules of this page, behind those of all pages.
        head: elements of this page's head, as HTML, with a newline at its end.
    """
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        # Names come from strangers: should one ever slip through the escaping, it still may not load or run anything.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"{head}<title>{title}</title>\n<style>{style_sheet()}{css}</style>\n</head>\n<body>\n{body}</body>\n</html>\n"
    )


def page_file(folder: Path, output: Path | None) -> Path:
    """Return the file of a folder's page.

    Args:
        folder: what the page is about.
        output: the file to write, `.html`; None for `PAGE` in `folder`.

    Raises:
        UsageError: `output` is no name of a page.
    """
    target = folder / PAGE if output is None else output
    if target.suffix.lower() not in {".html", ".htm"} or target.is_dir():
        raise UsageError(f"{target} is no name for a page; end it in .html")
    return target


def write_page(target: Path, text: str) -> None:
    """Write a page, whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        write_whole(target, text.encode())
    except OSError as error:
        raise OutputError("cannot be written", file=target, found=error.strerror or str(error)) from error
