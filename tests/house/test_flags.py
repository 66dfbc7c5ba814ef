"""No message below the command line names a flag: it names arguments, and the command line says its flags."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from graph import the_house

_FLAG = re.compile(r"(?<![\w-])--[a-z][a-z_-]+")
_FACES = ("cli/", "qat/launch.py")
"""What has flags of its own."""

_COMMANDS = re.compile(r"(?:`|<pre>|<code>|^)(?:k2quant|lm_eval|hf|tensorboard|accelerate|python)\b[^`<]*")
_STYLES = re.compile(r"var\(--[a-z-]+|--[a-z-]+:")
"""Properties of style sheets."""

_PIECES = {"--revision", "--shard-size"}
"""Pieces of commands that are put together: of the hub's own tool, of that which a page shows."""


def flags_in(text: str) -> list[str]:
    """Return the flags that a text names, whole commands to type and style sheets aside."""
    return [flag for flag in _FLAG.findall(_STYLES.sub("", _COMMANDS.sub("", text))) if flag not in _PIECES]


def texts(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield the strings of a module that are no docstrings, with their lines; of an f-string, its pieces as one."""
    alone = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    inside = {part for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield (
                node.lineno,
                "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values),
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in alone | inside:
            yield node.lineno, node.value


def test_no_message_below_the_command_line_names_a_flag() -> None:
    """Whoever calls Python has no flags: `restart=True` it is, and cli/parts/flags.py makes --restart of it."""
    house = the_house()
    found = [
        f"{house.place(name, line)}: {', '.join(flags)}"
        for name, tree in house.trees.items()
        if not house.shown(name).startswith(tuple(f"k2quant/{face}" for face in _FACES) + _FACES)
        for line, text in texts(tree)
        if (flags := flags_in(text))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        ("write it anew with --restart, or not", ["--restart"]),
        ("(--tasks)", ["--tasks"]),
        ("use `hf download {}{} --local-dir {}`, then name it", []),
        ("<pre>k2quant verify --checksums {}</pre>", []),
        ("lm_eval --log_samples", []),
        ("body{background:var(--page)} :root{--page:#fff}", []),
        ("a -- b --- c", []),
        ("`restart=True`", []),
    ],
)
def test_what_counts_as_a_flag(text: str, flags: list[str]) -> None:
    """Two dashes and a word do, but in a command that is to be typed, or in a style sheet."""
    assert flags_in(text) == flags
