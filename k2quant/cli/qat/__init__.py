"""`k2quant qat`: a group; each of its commands has a file of its own, loaded when it is asked for."""

from __future__ import annotations

import click

from k2quant.cli.parts.lazy import LazyGroup


@click.command(
    name="qat",
    cls=LazyGroup,
    homes={
        "init": (f"{__name__}.init", "Write a commented job file for a model."),
        "plan": (f"{__name__}.plan", "Say what a job would train, and what memory that takes."),
        "train": (f"{__name__}.train", "Train what a job says; the same command goes on after a kill."),
        "export": (f"{__name__}.export", "Write what was trained, bit for bit, as a checkpoint."),
    },
)
def command() -> None:
    """Fine-tune a model so that it survives INT4 or block FP8, and export the very values that were trained.

    \b
    Example:
        k2quant qat init Kimi-K2-Base -o job.yaml
        k2quant qat plan job.yaml
        k2quant qat train job.yaml
        k2quant qat export runs/int4 K2-QAT-INT4
    """
