"""The process that checks arguments against schemas, asked with patience that ends."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib.util import find_spec
from types import TracebackType
from typing import Any, Self

from k2quant.errors import HarnessFault, MissingExtra
from k2quant.eval.tools.checking import UNCHECKED
from k2quant.ground.extras import install

PATIENCE = 10.0
"""Seconds for one check; an honest one takes a thousandth."""
_START = 60.0  # seconds until the process is there: it imports jsonschema, on a disk that may be slow
_PROGRAM = "from k2quant.eval.tools.checking import main; main()"


def check_installed() -> None:
    """Refuse to begin without jsonschema.

    Raises:
        MissingExtra: it is not installed.
    """
    if find_spec("jsonschema") is None:
        raise MissingExtra("checking tool calls needs jsonschema, which is not installed", remedy=install("eval"))


class Schemas:
    """Checks schemas and arguments in a process of its own; a context that ends it."""

    def __init__(self, patience: float = PATIENCE) -> None:
        """Begin nothing yet.

        Args:
            patience: seconds for one check.
        """
        self._patience = patience
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        """Return it."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the process."""
        self._end()

    def unusable(self, schema: Any) -> str | None:
        """Say why nothing can be checked against a schema; None where it can."""
        return self._ask({"schema": schema})

    def fault(self, schema: Mapping[str, Any], arguments: str) -> str | None:
        """Say what is wrong with a call's arguments; None where nothing is."""
        return self._ask({"schema": schema, "arguments": arguments})

    def _ask(self, asked: Mapping[str, Any]) -> str | None:
        process = self._process or self._begin()
        assert process.stdin  # noqa: S101  it is a pipe
        try:
            process.stdin.write(json.dumps(asked).encode() + b"\n")
            process.stdin.flush()
            return self._answer(process, self._patience)
        except TimeoutError:
            self._end()
            return f"{UNCHECKED} within {self._patience:g} s: a pattern or a $ref that never ends"
        except (BrokenPipeError, EOFError):
            self._end()
            return f"{UNCHECKED}: the check broke down, out of memory perhaps"

    def _begin(self) -> subprocess.Popen[bytes]:
        paths = os.pathsep.join(filter(None, sys.path))
        self._process = process = subprocess.Popen(  # noqa: S603  ourselves
            [sys.executable, "-P", "-c", _PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": paths},
        )
        assert process.stdin  # noqa: S101  it is a pipe
        try:
            process.stdin.write(b'{"schema": {}}\n')
            process.stdin.flush()
            why = self._answer(process, _START)
        except (BrokenPipeError, EOFError, TimeoutError) as error:
            self._end()
            raise HarnessFault("the process that checks schemas does not start", found=str(error)[:200]) from error
        if why is not None:
            raise HarnessFault("the process that checks schemas is of no use", found=why)
        return process

    def _answer(self, process: subprocess.Popen[bytes], patience: float) -> str | None:
        assert process.stdout  # noqa: S101  it is a pipe
        end, line = time.monotonic() + patience, b""
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([process.stdout], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                raise TimeoutError
            piece = os.read(process.stdout.fileno(), 2**16)
            if not piece:
                raise EOFError
            line += piece
        why: str | None = json.loads(line)
        return why

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()
