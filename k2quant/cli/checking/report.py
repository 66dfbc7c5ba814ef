"""`k2quant report`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(name="report")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="File to write; default: k2quant_report.html in FOLDER."
)
def command(folder: Path, output: Path | None) -> None:
    """Draw the report of a finished conversion or calibration in FOLDER as one HTML page with pictures.

    Of a merge it shows what rounding left of the update, of an export from training how far the weights are from the
    base's, of a calibration how its tokens spread over the experts.

    \b
    Example:
        k2quant report Kimi-K2-Instruct-INT4
    """
    from k2quant.calib.stats.inspection import is_stats
    from k2quant.cli.parts.screen import working

    with working("drawing"):
        if is_stats(folder):
            from k2quant.calib.report import write_html
        else:
            from k2quant.report import write_html

        page = write_html(folder, output)
    click.echo(str(page))
