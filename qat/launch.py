"""What each of several processes runs: a training, told about by the first of them on stderr."""

from __future__ import annotations

import os
import shlex
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

_SWITCHES = ("--follow-links", "--soft-lock", "--trust-remote-code")
_FLAGS = {flag.strip("-").replace("-", "_"): flag for flag in ("--restart", *_SWITCHES)}
_EVERY = 5.0  # seconds between two lines


def main(arguments: list[str]) -> int:
    """Train the job whose file is named; return the exit code.

    Args:
        arguments: the job's file; `--restart` to throw away what an earlier run left; `--trust-remote-code` to let a
            tokenizer run that is code; `--soft-lock` to lock the output folder by a file where there is no other way;
            `--follow-links` to read a model's files where its links lead out of its folder.
    """
    from k2quant.errors import K2QuantError, UsageError
    from k2quant.ground.extras import need
    from k2quant.ground.saying.arguments import in_flags
    from k2quant.qat.job import read_job

    flags = {argument for argument in arguments if argument.startswith("-")}
    files = [argument for argument in arguments if argument not in flags]
    show = _Lines(leads=os.environ.get("RANK", "0") == "0")
    before = warnings.showwarning
    warnings.showwarning = show.warned(before)
    try:
        if len(files) != 1 or flags - {"--restart", *_SWITCHES}:
            usage = " ".join(f"[{switch}]" for switch in ("--restart", *_SWITCHES))
            raise UsageError(f"usage: accelerate launch -m k2quant.qat JOB.yaml {usage}")
        need("qat", "training")
        from k2quant.qat.training.training import train

        job = read_job(
            Path(files[0]),
            trust_remote_code="--trust-remote-code" in flags,
            follow_links="--follow-links" in flags,
        )
        soft_lock = "--soft-lock" in flags
        train(job, restart="--restart" in flags, soft_lock=soft_lock, progress=show.step, stage=show.say)
    except K2QuantError as error:
        print(f"k2quant: {in_flags(str(error), _FLAGS)}", file=sys.stderr)  # noqa: T201  this is a command
        return error.exit_code
    finally:
        warnings.showwarning = before
    show.say(f"{job.output}: trained; export it with k2quant qat export {shlex.quote(str(job.output))} DST")
    return 0


class _Lines:
    """Says what is going on, a line now and then."""

    def __init__(self, *, leads: bool) -> None:
        self._leads = leads
        self._begun = self._said = time.monotonic()
        self._first: int | None = None

    def say(self, text: str) -> None:
        """Write a line, if this process is the first."""
        if self._leads:
            print(text, file=sys.stderr, flush=True)  # noqa: T201  this is a command

    def warned(self, others: Callable[..., None]) -> Callable[..., None]:
        """Return what shows warnings: those of a checkpoint as lines, without the line of code that says it."""

        def show(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
            from k2quant.errors import CheckpointWarning, printable

            if issubclass(category, CheckpointWarning):
                self.say(printable(str(message)))
            else:
                others(message, category, *rest, **more)

        return show

    def step(self, done: int, total: int, loss: float) -> None:
        """Say how far it is, but not too often."""
        now = time.monotonic()
        if self._first is None:
            self._first, self._begun = done, now
        if now - self._said < _EVERY and done < total:
            return
        self._said = now
        rate = (done - self._first) / (now - self._begun) if now > self._begun else 0.0
        left = f", {(total - done) / rate:.0f} s left" if rate else ""
        self.say(f"step {done} of {total}, loss {loss:.4f}, {rate:.2f} steps/s{left}")
