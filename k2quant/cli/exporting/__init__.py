"""`k2quant export`: a group; each of its commands has a file of its own, loaded when it is asked for."""

from __future__ import annotations

import click

from k2quant.cli.parts.lazy import LazyGroup


@click.command(
    name="export",
    cls=LazyGroup,
    homes={
        "gguf": (f"{__name__}.gguf", "Write a checkpoint as GGUF, for llama.cpp."),
        "mlx": (f"{__name__}.mlx", "Write a checkpoint as mlx-lm loads it, for MLX."),
    },
)
def command() -> None:
    """Write a checkpoint as files that other engines read, with the codes that it has.

    \b
    Example:
        k2quant export gguf Kimi-K2-Thinking kimi-k2-thinking.gguf
        k2quant export mlx Kimi-K2-Thinking kimi-k2-thinking-mlx
    """
