"""A conversation as a row holds it: messages and tools, checked and brought into the one form that templates get."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from k2quant.data.calls import checked_calls, checked_tools
from k2quant.errors import MalformedFile

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Names that a turn's reasoning goes by. Templates get it by the first, and by the name that it had."""
_BLOCK = re.compile(r"\s*<think>(.*?)</think>", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """The messages of a row."""

    where: str
    """File and line, for error messages."""
    messages: tuple[dict[str, Any], ...]
    """As a chat template gets them."""
    learnt: tuple[bool, ...]
    """Of each message, whether it is the assistant's and has weight."""
    weightless: int
    """Messages of weight 0."""
    tools: list[dict[str, Any]] | None

    @property
    def last(self) -> int:
        """Place of the last message that is learnt; -1 where none is."""
        return max((place for place, learnt in enumerate(self.learnt) if learnt), default=-1)

    def upto(self, place: int) -> Conversation:
        """Return the conversation up to a message, which is its last one."""
        return replace(self, messages=self.messages[: place + 1], learnt=self.learnt[: place + 1])

    def place(self, number: int) -> str:
        """Name a message for people, by its place from 0."""
        return f"{self.where}, message {number + 1}"


def conversation(row: Mapping[str, Any], where: str) -> Conversation:
    """Return the conversation of a row.

    Args:
        row: with `messages`, of `role`, `content` and whatever else the chat template knows, and it may be with
            `tools`, a list of tools in OpenAI's form or the same as JSON.
        where: file and line.

    Raises:
        MalformedFile: a wrong type, no turn of the assistant, or a conversation that it begins.
    """
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        found = "none" if messages == [] else type(messages).__name__
        raise MalformedFile("messages is no conversation", file=where, expected="a list of messages", found=found)
    pairs = [_turn(message, f"{where}, message {number}") for number, message in enumerate(messages, 1)]
    turns = tuple(turn for turn, _ in pairs)
    if turns[0]["role"] == "assistant":
        raise MalformedFile("nothing to answer", file=where, expected="a first message that is not the assistant's")
    if all(turn["role"] != "assistant" for turn in turns):
        raise MalformedFile("nothing to learn", file=where, expected="a message of the role assistant")
    return Conversation(
        where=where,
        messages=turns,
        learnt=tuple(turn["role"] == "assistant" and weight for turn, weight in pairs),
        weightless=sum(not weight for _, weight in pairs),
        tools=checked_tools(row.get("tools"), where),
    )


def text_of(value: object, name: str, where: str, *, empty: bool = False) -> str:
    """Return a value that must be text.

    Raises:
        MalformedFile: it is none, or is empty and must not be.
    """
    if not isinstance(value, str):
        raise MalformedFile(f"{name} is no text", file=where, expected="a string", found=type(value).__name__)
    if not (value or empty):
        raise MalformedFile(f"{name} is empty", file=where, expected="some text")
    return value


def _turn(message: object, where: str) -> tuple[dict[str, Any], bool]:
    """Return a message as templates get it, and whether it has weight."""
    if not isinstance(message, Mapping):
        raise MalformedFile("not a message", file=where, expected="role and content", found=type(message).__name__)
    turn = {key: value for key, value in message.items() if value is not None}
    text_of(turn.get("role"), "role", where)
    weight = _weight(turn.pop("weight", 1), where)
    _check_old(turn, where)
    calls = checked_calls(turn.pop("tool_calls", []), turn["role"], where)
    if calls:
        turn["tool_calls"] = calls
        turn.setdefault("content", "")  # null beside calls, in OpenAI's form
    text_of(turn.get("content"), "content", where, empty=True)
    if turn["role"] == "assistant":
        _name_reasoning(turn, where)
    return turn, weight


def _weight(value: object, where: str) -> bool:
    """Return whether a message of a weight is learnt: OpenAI's form knows 0 and 1."""
    if isinstance(value, bool) or value not in (0, 1):
        raise MalformedFile("the weight of a message", file=where, expected="0 or 1", found=str(value)[:50])
    return bool(value)


def _check_old(turn: Mapping[str, Any], where: str) -> None:
    """Refuse the form of calls before tools, which templates pass over."""
    if "function_call" in turn or turn["role"] == "function":
        raise MalformedFile(
            "a function is called in the old form", file=where, expected="tool_calls, and role tool for results"
        )


def _name_reasoning(turn: dict[str, Any], where: str) -> None:
    """Give reasoning the name by which templates know it."""
    found = [text_of(turn[name], name, where, empty=True) for name in REASONING if name in turn]
    if len(set(found)) > 1:
        raise MalformedFile("reasoning that stands twice and differs", file=where, expected="one of its names")
    if found and not found[0]:
        for name in REASONING:
            turn.pop(name, None)
    elif found:
        turn[REASONING[0]] = found[0]


def reasoned(turn: Mapping[str, Any]) -> bool:
    """Tell whether a turn carries reasoning, by a name of its own or as a think block that begins its content."""
    return bool(_begun(turn)) or any(name in turn for name in REASONING)


def bare(turn: Mapping[str, Any]) -> dict[str, Any]:
    """Return a turn without its reasoning."""
    left = {key: value for key, value in turn.items() if key not in REASONING}
    if block := _begun(left):
        left["content"] = left["content"][block.end() :]
    return left


def rethought(turn: Mapping[str, Any], text: str) -> dict[str, Any]:
    """Return a turn that carries reasoning, with other reasoning in its place."""
    changed = dict(turn) | {name: text for name in REASONING if name in turn}
    if block := _begun(turn):
        changed["content"] = f"<think>{text}</think>{turn['content'][block.end() :]}"
    return changed


def _begun(turn: Mapping[str, Any]) -> re.Match[str] | None:
    """Return the think block with which the content of a turn begins, unless nothing is thought in it."""
    block = _BLOCK.match(turn["content"]) if turn["role"] == "assistant" else None
    return block if block and block[1].strip() else None


def lifted(turn: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a turn whose reasoning has a name of its own, taken out of the think block that begins its content.

    Raises:
        MalformedFile: it has reasoning by both.
    """
    block = _BLOCK.match(turn["content"]) if turn["role"] == "assistant" else None
    if not block:
        return turn
    left = {**turn, "content": turn["content"][block.end() :]}
    if not block[1].strip():
        return left
    if any(name in turn for name in REASONING):
        raise MalformedFile("reasoning that stands twice", file=where, expected="in the content or beside it")
    return {**left, REASONING[0]: block[1]}
