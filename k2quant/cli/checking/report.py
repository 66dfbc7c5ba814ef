"""`k2quant report`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(name="report")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="File to write; default: k2quant_report.html in FOLDER."
)
@click.option("--json", "as_json", is_flag=True, help="Print the page's figures as JSON, and draw nothing.")
def command(folder: Path, output: Path | None, *, as_json: bool) -> None:
    """Draw the report of a finished conversion or calibration in FOLDER as one HTML page with pictures.

    Of a merge it shows what rounding left of the update, of an export from training how far the weights are from the
    base's, of a calibration how its tokens spread over the experts.

    \b
    Example:
        k2quant report Kimi-K2-Instruct-INT4
    """
    import json

    from k2quant.calib.stats.inspection import is_stats
    from k2quant.cli.parts.screen import working
    from k2quant.errors import UsageError

    if as_json and output is not None:
        raise UsageError("--output names a page, and --json draws none")
    with working("reading" if as_json else "drawing"):
        if is_stats(folder):
            from k2quant.calib.report import read_figures, write_html
        else:
            from k2quant.report import read_figures, write_html

        said = json.dumps(read_figures(folder), indent=1) if as_json else str(write_html(folder, output))
    click.echo(said)
