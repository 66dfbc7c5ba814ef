"""The command line: thin skins over the package. Each command loads what it needs when it runs."""

from __future__ import annotations

import gc
from typing import Any

import click

from k2quant.cli.parts.lazy import LazyGroup
from k2quant.cli.parts.screen import remarks
from k2quant.ground.version import __version__


class _Commands(LazyGroup):
    """Turns our errors into one line and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        from k2quant.errors import K2QuantError, printable

        # The headers of 140,000 tensors are no garbage, but the collector would walk them again and again: a third of
        # the time of `inspect`. A command makes no cycles worth collecting before it ends.
        gc.disable()
        try:
            with remarks():
                return super().invoke(ctx)
        except K2QuantError as error:
            click.echo(f"k2quant: {error}", err=True)
            ctx.exit(error.exit_code)
        except OSError as error:
            place = f"{error.filename}: " if error.filename else ""
            click.echo(f"k2quant: {printable(f'{place}{error.strerror or error}')}", err=True)
            ctx.exit(1)
        except KeyboardInterrupt:
            resumes = "; the same command resumes" if ctx.invoked_subcommand in {"convert", "merge", "qat"} else ""
            click.echo(f"k2quant: stopped{resumes}", err=True)
            ctx.exit(130)


@click.command(
    cls=_Commands,
    homes={
        "convert": "k2quant.cli.convert",
        "merge": "k2quant.cli.merge",
        "inspect": "k2quant.cli.checking.inspect",
        "verify": "k2quant.cli.checking.verify",
        "diff": "k2quant.cli.checking.diff",
        "report": "k2quant.cli.checking.report",
        "generate": "k2quant.cli.generate",
        "qat": "k2quant.cli.qat",
        "eval": "k2quant.cli.eval",
        "tune": "k2quant.cli.tune",
        "demo": "k2quant.cli.demo",
        "nano": "k2quant.cli.nano",
    },
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__, prog_name="k2quant")
def main() -> None:
    """Convert Kimi K2 checkpoints between BF16, block-FP8 and INT4, run them, and judge what that did to accuracy.

    \b
    Example:
        k2quant convert --to int4 Kimi-K2-Instruct Kimi-K2-Instruct-INT4
    """
