"""The command line: thin skins over the package. Each command loads what it needs when it runs."""

from __future__ import annotations

import atexit
import gc
import signal
from traceback import walk_tb
from typing import Any

import click

from k2quant.cli.parts.flags import in_flags
from k2quant.cli.parts.flags import running as command_at_work  # a folder here is called `running`, too
from k2quant.cli.parts.lazy import LazyGroup
from k2quant.cli.parts.screen import remarks
from k2quant.cli.parts.terminal import colour
from k2quant.cli.parts.terminal.streams import CUT_OFF, Terminated, cut_off, open_closed, say
from k2quant.errors import K2QuantError, printable
from k2quant.ground.version import __version__

_RESUMED = {"calibrate", "convert", "merge", "push", "train", "export", "gguf", "mlx"}
"""What goes on where it was stopped; commands of which that depends on their options say it themselves."""


class _Commands(LazyGroup):
    """Turns our errors into one line and an exit code."""

    def main(self, *args: Any, **settings: Any) -> Any:
        open_closed()
        return super().main(*args, **settings)

    def make_context(self, *args: Any, **settings: Any) -> click.Context:
        try:
            return super().make_context(*args, **settings)
        except OSError as error:  # of `--help` and `--version`, which print before there is a command
            raise click.exceptions.Exit(_ended(error)) from error

    def invoke(self, ctx: click.Context) -> Any:
        import os

        # The headers of 140,000 tensors are no garbage, but the collector would walk them again and again: a third of
        # the time of `inspect`. A command makes no cycles worth collecting before it ends, or when it does: the
        # interpreter's own last look at numba alone took a quarter of a second.
        gc.disable()
        atexit.register(gc.freeze)
        ctx.color = colour.wanted(os.environ)
        try:
            with remarks():
                return super().invoke(ctx)
        except K2QuantError as error:
            say(f"k2quant: {in_flags(str(error))}")
            ctx.exit(error.exit_code)
        except OSError as error:
            ctx.exit(_ended(error))
        except KeyboardInterrupt as error:
            command = command_at_work()
            resumes = command is not None and command.name in _RESUMED
            say(f"k2quant: stopped{'; the same command resumes' if resumes else ''}")
            ctx.exit(128 + (signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT))


def _ended(error: OSError) -> int:
    """Say what the system refused, unless nobody reads any more, and return the exit code."""
    if isinstance(error, BrokenPipeError) and cut_off():
        return CUT_OFF
    place = error.filename or ("stdout" if _was_printed(error) else None)
    where = f"{place}: " if place else ""
    say(f"k2quant: {printable(f'{where}{error.strerror or error}')}")
    return 1


def _was_printed(error: OSError) -> bool:
    """Return whether it is a result that could not be printed; `say` lets nothing out of what it prints on stderr."""
    return any(frame.f_code is click.echo.__code__ for frame, _ in walk_tb(error.__traceback__))


@click.command(
    cls=_Commands,
    homes={
        "convert": ("k2quant.cli.convert", "Convert a checkpoint to BF16, FP8, INT4, NVFP4 or MXFP4."),
        "calibrate": ("k2quant.cli.calibrate", "Learn from data what a checkpoint's matrices multiply."),
        "export": ("k2quant.cli.exporting", "Write a checkpoint as GGUF, for llama.cpp, or for MLX."),
        "merge": ("k2quant.cli.merge", "Merge a LoRA adapter into a checkpoint, in any format."),
        "push": ("k2quant.cli.places.push", "Upload a finished output to a Hugging Face hub."),
        "clean": ("k2quant.cli.places.clean", "Name what a stopped run left, and remove it."),
        "inspect": ("k2quant.cli.checking.inspect", "Describe a checkpoint, and what does not fit together."),
        "verify": ("k2quant.cli.checking.verify", "Check a conversion against its source, or its checksums."),
        "check": ("k2quant.cli.checking.check", "Check what an engine requires, before machines are rented."),
        "diff": ("k2quant.cli.checking.diff", "List the tensors in which two checkpoints differ."),
        "report": ("k2quant.cli.checking.report", "Draw a conversion or a calibration as a page with pictures."),
        "generate": ("k2quant.cli.running.generate", "Continue a prompt with a checkpoint in any format."),
        "qat": ("k2quant.cli.qat", "Train a model to survive rounding, and export it exactly."),
        "eval": ("k2quant.cli.eval", "Measure and judge what quantisation did to accuracy."),
        "tune": ("k2quant.cli.running.tune", "Find the fastest kernel configurations on this GPU."),
        "demo": ("k2quant.cli.demo", "Try it all on a small K2 that is made here."),
        "nano": ("k2quant.cli.nano", "Train nano-K2, a K2 in everything but size."),
    },
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__, prog_name="k2quant")
def main() -> None:
    """Convert Kimi K2 checkpoints between BF16, FP8, INT4 and FP4, run them, and judge what that did to accuracy.

    \b
    Example:
        k2quant convert --to int4 Kimi-K2-Instruct Kimi-K2-Instruct-INT4
    """
