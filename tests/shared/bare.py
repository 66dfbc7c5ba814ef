"""Run commands and expressions as if some packages were not installed; a script, and what starts it.

A GPU's driver is pretended to be there: without one a device is refused before anything is missed.

As a script it reads `{"without": [names], "commands": [[words]], "expressions": [texts]}` and writes a list with what
became of each, commands first.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any, NamedTuple


class Outcome(NamedTuple):
    """What a command or an expression ended with."""

    code: int
    stdout: str
    stderr: str
    """Of an expression, the kind of its error and what that says."""


def without(
    packages: list[str], *, commands: list[list[str]] | None = None, expressions: list[str] | None = None
) -> list[Outcome]:
    """Run all in one process of its own in which the packages cannot be imported."""
    work = json.dumps({"without": packages, "commands": commands or [], "expressions": expressions or []})
    environment = os.environ | {"COLUMNS": "80"}
    done = subprocess.run(
        [sys.executable, __file__], input=work, capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    return [Outcome(*found) for found in json.loads(done.stdout)]


def _command(words: list[str]) -> tuple[int, str, str]:
    from click.testing import CliRunner

    from k2quant.cli import main

    done = CliRunner().invoke(main, words, prog_name="k2quant")
    crash = "" if done.exception is None or isinstance(done.exception, SystemExit) else repr(done.exception)
    return done.exit_code, done.stdout, done.stderr + crash


def _expression(text: str) -> tuple[int, str, str]:
    import k2quant  # what expressions speak of

    try:
        return 0, repr(eval(text, {"k2quant": k2quant})), ""  # noqa: S307  the tests' own
    except Exception as error:  # noqa: BLE001  whatever it is, it is told
        return 1, "", f"{type(error).__name__}: {error}"


def _main() -> None:
    work: dict[str, Any] = json.load(sys.stdin)
    for name in work["without"]:
        sys.modules[name] = None  # type: ignore[assignment]  # the import of it, and of what is in it, fails
    from k2quant.kernels.devices import driver

    driver.has_driver = lambda: True
    found = [_command(words) for words in work["commands"]] + [_expression(text) for text in work["expressions"]]
    loaded = [name for name in work["without"] if sys.modules.get(name) is not None]
    assert not loaded, loaded
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    _main()
