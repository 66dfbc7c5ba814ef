"""The Markdown pages of the repository, and the blocks of code in them."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
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

    @property
    def end(self) -> int:
        """Line of its last fence, from 1."""
        return self.line + len(self.text.splitlines()) + 1

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


# --- running them ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A block of a page that a reader pastes into a shell, and the output that the page shows below it."""

    block: Block
    output: Block | None
    """The `text` block that follows with nothing but a comment between; None without one."""


def steps(page: Path) -> list[Step]:
    """Return the shell blocks of a page that run as they stand: those without a note that begins with `not run`."""
    lines = page.read_text().splitlines()
    every = blocks(page)
    found = []
    for block, after in zip(every, [*every[1:], None], strict=True):
        if block.language == "sh" and not block.note.startswith("not run"):
            between = lines[block.end : after.line - 1] if after else []
            shown = after and after.language == "text" and all(not each or each.startswith("<!--") for each in between)
            found.append(Step(block=block, output=after if shown else None))
    return found


def stage(folder: Path) -> None:
    """Make a folder look like a clone with its environment: the examples, and a `.venv` whose programs are ours."""
    programs = folder / ".venv" / "bin"
    programs.mkdir(parents=True, exist_ok=True)
    for name, words in (("python", f"{sys.executable}"), ("k2quant", f"{sys.executable} -m k2quant")):
        (programs / name).write_text(f'#!/bin/sh\nPYTHONPATH={shlex.quote(str(ROOT))} exec {words} "$@"\n')
        (programs / name).chmod(0o755)
    (programs / "activate").write_text(f"PATH={shlex.quote(str(programs))}:$PATH\n")
    if not (folder / "examples").exists():
        (folder / "examples").symlink_to(ROOT / "examples")


def run_step(step: Step, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a block in a staged folder as bash runs what is pasted; stdout has stderr in it, as on a terminal."""
    activated = f"{folder / '.venv' / 'bin'}:{os.environ['PATH']}"
    environment = os.environ | {"COLUMNS": "84", "NO_COLOR": "1", "PATH": activated}
    return subprocess.run(
        ["/bin/bash", "-c", step.block.text],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def skeleton(text: str) -> list[str]:
    """Return the words of each line without numbers, units and drawing: what stays when the numbers change."""
    units = r"\b(?:[kMGT]?B|h|min|m?s|dB|pp)\b"
    found = []
    for line in text.splitlines():
        words = re.findall(r"[A-Za-z_]{2,}", re.sub(units, " ", re.sub(r"[\d.,]+", " ", line)))
        if words:
            found.append(" ".join(words))
    return found
