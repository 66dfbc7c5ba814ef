"""What of a conversation is to be learnt, and what was found in the conversations that were read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from k2quant.ground.units import counted

Turns = Literal["all", "last"]
Reasoning = Literal["refuse", "drop", "skip", "split"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Learning:
    """What of a conversation is learnt; the keys of `data` in a job."""

    turns: Turns = "all"
    """Of the assistant: all, or the last alone."""
    reasoning: Reasoning = "refuse"
    """What becomes of reasoning of a learnt turn that the chat template does not write."""


@dataclass(slots=True, kw_only=True)
class Census:
    """What the rows that were read hold; each is a number of rows, unless it says otherwise."""

    rows: int = 0
    """All of them."""
    chats: int = 0
    """With `messages`."""
    tools: int = 0
    """With tools that may be called."""
    tool_calls: int = 0
    """In which a tool is called."""
    renamed: int = 0
    """Whose calls got ids as K2's template wants them; see `calls.with_ids`."""
    reasoning: int = 0
    """With reasoning in a turn of the assistant."""
    losing: int = 0
    """In which the chat template, given the whole conversation, does not write the reasoning of a learnt turn."""
    first_losing: str = ""
    """The first of these turns, by file, line and message."""
    unthinking: int = 0
    """Turns that are learnt behind an empty think block of the template's, which is not learnt."""
    weightless: int = 0
    """Messages of weight 0."""
    left_out: int = 0
    """Of which nothing is learnt: their turns have weight 0, or lost their reasoning and were skipped."""

    def notes(self) -> Iterator[str]:
        """Yield what the user should know of it, and does not see elsewhere."""
        if self.losing:
            yield (
                "given a whole conversation, the chat template drops reasoning that is to be learnt: "
                f"{counted(self.losing, 'row')}; `data: reasoning:` says what becomes of it"
            )
        if self.left_out:
            yield f"left out, since no turn of theirs is to be learnt: {counted(self.left_out, 'row')}"
        if self.renamed:
            yield (
                "tool calls got ids of the form functions.NAME:INDEX, since the chat template writes the id and not "
                f"the name: {counted(self.renamed, 'row')}"
            )
        if self.unthinking:
            yield (
                "without reasoning, behind an empty think block of the chat template's, which is not learnt: "
                f"{counted(self.unthinking, 'turn')}"
            )
