"""What every page of k2quant is framed by."""

from __future__ import annotations

from k2quant.report.style import style_sheet


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
