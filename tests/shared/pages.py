"""The Markdown pages of the repository, and the blocks of code in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from places import ROOT

PAGES = tuple(
    sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")]),
)
"""What people read: the pages at the root, in docs/ and in examples/."""

_FENCE = re.compile(r"^( *)```(.*)$")
_SEPARATORS = {";", "&&", "||", "|", "&", ">", ">>", "<", "2>", "(", ")"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One block of code."""

    page: Path
    line: int
    """Of its first fence, from 1."""
    language: str
    text: str
    note: str
    """What a comment says in the line above it: `<!-- not run: it needs a real K2 -->`; empty without one."""

    @property
    def place(self) -> str:
        """Page and line."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def shell(self) -> str:
        """Return what a shell would get: the block, or of a session what stands behind its prompts."""
        if self.language == "console":
            return "\n".join(line[2:] for line in self.text.splitlines() if line.startswith("$ "))
        return self.text


def blocks(page: Path) -> list[Block]:
    """Return the blocks of a page, in its order.

    Raises:
        ValueError: a block is never closed.
    """
    found: list[Block] = []
    lines = page.read_text().splitlines()
    opened: tuple[int, str, str] | None = None
    for number, line in enumerate(lines, 1):
        fence = _FENCE.match(line)
        if fence is None:
            continue
        if opened is None:
            opened = (number, fence[1], fence[2].strip())
            continue
        begun, indent, language = opened
        text = "\n".join(inner.removeprefix(indent) for inner in lines[begun : number - 1])
        above = lines[begun - 2].strip() if begun > 1 else ""
        note = above.removeprefix("<!--").removesuffix("-->").strip() if above.startswith("<!--") else ""
        found.append(Block(page=page, line=begun, language=language, text=text, note=note))
        opened = None
    if opened is not None:
        msg = f"{page}:{opened[0]}: the block has no end"
        raise ValueError(msg)
    return found


def commands(shell: str) -> Iterator[list[str]]:
    """Yield the simple commands of shell code as words: without variables set before them, pipes and redirections."""
    for line in shell.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        skipped = False
        for token in [*lexer, ";"]:
            if token not in _SEPARATORS:
                words += [] if skipped else [token]
                skipped = False
                continue
            skipped = token in {">", ">>", "<", "2>"}  # the next word is a file
            if words and not skipped:
                while words and re.fullmatch(r"\w+=.*", words[0]):
                    words = words[1:]
                yield words
                words = []
