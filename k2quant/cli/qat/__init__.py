"""`k2quant qat`: a group; each of its commands has a file of its own, loaded when it is asked for."""

from __future__ import annotations

import click

from k2quant.cli.parts.lazy import LazyGroup


@click.command(name="qat", cls=LazyGroup, homes={name: f"{__name__}.{name}" for name in ("plan", "train", "export")})
def command() -> None:
    """Fine-tune a model so that it survives INT4 or block FP8, and export the very values that were trained.

    \b
    Example:
        k2quant qat plan job.yaml
        k2quant qat train job.yaml
        k2quant qat export runs/int4 K2-QAT-INT4
    """
