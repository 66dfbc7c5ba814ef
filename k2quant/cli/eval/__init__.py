"""`k2quant eval`: a group; each of its commands has a file of its own, loaded when it is asked for."""

from __future__ import annotations

import signal
from typing import Any, NoReturn

import click

from k2quant.cli.parts.lazy import LazyGroup
from k2quant.cli.parts.terminal.streams import Terminated


class _Commands(LazyGroup):
    def invoke(self, ctx: click.Context) -> Any:
        # A cancelled job ends by SIGTERM; temporary files, gigabytes of them, then go as they do after Ctrl-C.
        signal.signal(signal.SIGTERM, _end)
        return super().invoke(ctx)


def _end(*_: object) -> NoReturn:
    raise Terminated


@click.command(
    name="eval",
    cls=_Commands,
    homes={
        "run": (f"{__name__}.run", "Ask a model the questions of lm-eval's benchmarks."),
        "tools": (f"{__name__}.tools", "Put requests with tools to a model and check its calls."),
        "gate": (f"{__name__}.gate", "Decide whether a candidate is as good as its baseline."),
        "plan": (f"{__name__}.plan", "Say how many items a gate needs, before they are paid for."),
        "fidelity": (f"{__name__}.fidelity", "Measure how far predictions drift, and in which layers."),
        "blame": (f"{__name__}.blame", "Find the layers and weights that carry the damage."),
    },
)
def command() -> None:
    """Measure what quantisation did to accuracy, decide whether that is good enough, find where it comes from.

    \b
    Example:
        k2quant eval run K2-Instruct --tasks k2-quick -o runs/base
        k2quant eval run K2-INT4 --tasks k2-quick -o runs/int4
        k2quant eval gate runs/base runs/int4 --margin 1pp
    """
