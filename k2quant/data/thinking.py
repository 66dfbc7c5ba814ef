"""Reasoning that a chat template writes, drops, or has an empty place for."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from k2quant.data.rendering import Template
from k2quant.data.turns import REASONING, Conversation, bare, reasoned, rethought
from k2quant.errors import MalformedFile
from k2quant.ground.release import THINK_OPENS

_EMPTY = re.compile(r"(\s*<think>)?(\s*)</think>(\s*)")


def lossless(talk: Conversation, template: Template) -> tuple[Conversation, set[int]]:
    """Return a conversation without the reasoning that the template does not write, and where that stood.

    Raises:
        MalformedFile: the template cannot render it.
    """
    places = [place for place, message in enumerate(talk.messages) if reasoned(message)]
    if not places:
        return talk, set()
    text = template.written(talk, [asking(place, one) for place, one in enumerate(talk.messages)])
    losing = {place for place in places if thought(place) not in text}
    messages = tuple(bare(one) if place in losing else one for place, one in enumerate(talk.messages))
    return replace(talk, messages=messages), losing


def thought(place: int) -> str:
    """Return what stands for the reasoning of a turn, to see whether it is written."""
    return f"k2quant-thought-{place}-"


def asking(place: int, message: dict[str, Any]) -> dict[str, Any]:
    """Return a message with `thought` in place of its reasoning, if it has any."""
    return rethought(message, thought(place)) if reasoned(message) else message


def place_of(talk: Conversation, place: int, turn: str, prompt: str) -> tuple[str, int]:
    """Return the reasoning of a message, and where in what is written of it there is an empty place for it.

    Args:
        talk: the conversation.
        place: of the message.
        turn: what is written of it behind its prompt.
        prompt: which may have opened the block.

    Raises:
        MalformedFile: there is no such place.
    """
    message = talk.messages[place]
    reasoning = next((message[name] for name in REASONING if name in message), "")
    empty = _block(turn, prompt)
    if not empty or not reasoning:
        raise MalformedFile(
            "the chat template has no place for the reasoning",
            file=talk.place(place),
            expected="<think></think>, for `data: reasoning: split` to fill",
            found=turn[:40],
            remedy="learn without it with `data: reasoning: drop`",
        )
    begin, end = empty.span(2)
    return reasoning, begin + (end - begin) // 2  # blanks on both sides stay where they are


def empty_block(turn: str, message: dict[str, Any], prompt: str) -> int:
    """Return how many characters the empty think block takes that a template put before what a message says.

    Args:
        turn: what is written of the message behind its prompt.
        message: whose own text may begin with blanks, or with such a block: these are its own.
        prompt: which may have opened the block.
    """
    empty = _block(turn, prompt)
    if not empty or reasoned(message) or _EMPTY.match(message["content"]):
        return 0
    blanks = len(message["content"]) - len(message["content"].lstrip())
    return empty.end() - min(blanks, len(empty[3]))


def _block(turn: str, prompt: str) -> re.Match[str] | None:
    """Return the empty think block with which a turn begins, be it that the prompt has opened it."""
    found = _EMPTY.match(turn)
    return found if found and (found[1] or prompt.rstrip().endswith(THINK_OPENS)) else None
