"""What a model answered to a request with tools: its calls, its text, and how it ended; from a server or from text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from k2quant.eval.asking.thinking import END, Thinking
from k2quant.ground.saying.showing import brief

LONGEST = 2**20
"""Characters kept of a text or of a call's arguments; K2's longest answer has some 400,000."""
UNPARSED = "<|tool_call_begin|>"
"""Begins a call in K2's own text; a server that leaves it in an answer did not read the calls."""

THINKING = Thinking(end=END, always=False)
"""How reasoning is told from an answer, where the server did not."""

# https://github.com/MoonshotAI/Kimi-K2/blob/main/docs/tool_call_guidance.md, "Manually Parsing Tool Calls"
_SECTION = "<|tool_calls_section_begin|>"
_ARGUMENTS = "<|tool_call_argument_begin|>"
_END = "<|tool_call_end|>"
_SECTION_END = "<|tool_calls_section_end|>"
_CALLS = "tool_calls"  # a finish_reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call of a function."""

    name: str
    """Of the function; empty where the answer has none."""
    arguments: str
    """As the model wrote them: JSON, if all is well."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came back for a request."""

    calls: tuple[Call, ...] = ()
    text: str = ""
    """What stands beside the calls."""
    reasoning: str = ""
    """What the model wrote before it answered, where that is known."""
    finish: str | None = None
    """Why it ended, as the server said: `stop`, `tool_calls`, `length`."""
    fault: str | None = None
    """Why there is no answer; None where there is one."""

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)

    @property
    def called(self) -> bool:
        """Whether a call was made, be it one that the server could not read: it then says `tool_calls` and has none."""
        return bool(self.calls) or self.finish == _CALLS

    @property
    def cut(self) -> bool:
        """Whether it ended only because it was as long as allowed."""
        return self.finish == "length"

    @property
    def decided(self) -> bool:
        """Whether it says anything about calling: it is there, and did not end before it came to a call."""
        return self.fault is None and (self.called or not (self.cut or self.cut_in_thought))

    @property
    def cut_in_thought(self) -> bool:
        """Whether it never left its reasoning, be it that it was cut there or ended by itself."""
        return bool(self.reasoning) and not self.called and not self.text

    @property
    def unparsed(self) -> bool:
        """Whether calls stand in its text, in K2's own words, which the server should have read."""
        return not self.calls and UNPARSED in self.text + self.reasoning

    @property
    def names(self) -> frozenset[str]:
        """The functions that it calls."""
        return frozenset(call.name for call in self.calls)

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        calls = [{"name": call.name, "arguments": call.arguments} for call in self.calls]
        return {
            "finish_reason": self.finish,
            "tool_calls": calls,
            "content": self.text,
            "reasoning": self.reasoning,
            "fault": self.fault,
        }


def read_answer(kept: Any) -> Answer:
    """Return an answer from what `as_dict` gave.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(kept, Mapping) or not isinstance(kept.get("tool_calls"), list):
        raise ValueError(f"no answer: {kept!r:.100}")  # noqa: TRY004  whoever reads asks for one error
    calls = tuple(_kept_call(call) for call in kept["tool_calls"])
    finish, fault = (_text_or_none(kept.get(key)) for key in ("finish_reason", "fault"))
    return Answer(
        calls=calls,
        text=_text(kept.get("content")),
        reasoning=_text(kept.get("reasoning")),
        finish=finish,
        fault=fault,
    )


def _kept_call(call: Any) -> Call:
    if not isinstance(call, Mapping):
        raise ValueError(f"no call: {call!r:.100}")  # noqa: TRY004  whoever reads asks for one error
    return Call(name=_text(call.get("name")), arguments=_text(call.get("arguments")))


def of_chat(body: Any) -> Answer:
    """Return what a chat completion says; a call that lacks its parts is one all the same, and no valid one.

    Args:
        body: as a server of the OpenAI form sends it, https://platform.openai.com/docs/api-reference/chat/object.

    Raises:
        ValueError: it is none.
    """
    choices = body.get("choices") if isinstance(body, Mapping) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, Mapping) else None
    if not isinstance(choice, Mapping) or not isinstance(message, Mapping):
        raise ValueError(f"no message of a choice: {body!r:.200}")  # noqa: TRY004  the same
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        raise ValueError(f"tool_calls is no list: {calls!r:.100}")  # noqa: TRY004  whoever reads asks for one error
    reasoning = _text(message.get("reasoning_content") or message.get("reasoning"))
    text = _text(message.get("content"))
    if not reasoning:
        reasoning, text = _apart(text)
    finish = _text_or_none(choice.get("finish_reason"))
    return Answer(calls=tuple(map(_call, calls)), text=text, reasoning=reasoning, finish=finish)


def _apart(text: str) -> tuple[str, str]:
    """Return reasoning and what follows it, of a text of a model that marks where it ends."""
    found = THINKING.split("", text, cut=None)
    return found.reasoning or "", found.text or ""


def _call(call: Any) -> Call:
    function = call.get("function") if isinstance(call, Mapping) else None
    function = function if isinstance(function, Mapping) else {}
    arguments = function.get("arguments")
    if isinstance(arguments, Mapping):  # some servers have read them already
        arguments = json.dumps(arguments, ensure_ascii=False)
    return Call(name=_text(function.get("name")), arguments=_text(arguments))


def of_text(text: str, *, cut: bool) -> Answer:
    """Return what K2 wrote, with its calls read as its own server reads them.

    Args:
        text: with the tokens that mark calls.
        cut: whether it ended at the limit on new tokens.
    """
    thought, rest = _apart(text)
    if not rest and UNPARSED in thought and END not in text:
        thought, rest = "", text  # some begin their calls without an end of the reasoning
    begin = min((place for mark in (_SECTION, UNPARSED) if (place := rest.find(mark)) >= 0), default=len(rest))
    calls = tuple(_calls(rest[begin:]))
    finish = "length" if cut else _CALLS if calls else "stop"
    return Answer(calls=calls, text=_text(rest[:begin].strip()), reasoning=_text(thought), finish=finish)


def _calls(section: str) -> Iterator[Call]:
    for part in section.partition(_SECTION_END)[0].split(UNPARSED)[1:]:
        name, _, arguments = part.partition(_END)[0].partition(_ARGUMENTS)
        yield Call(name=_function(name.strip()), arguments=_text(arguments.strip()))


def _function(name: str) -> str:
    """Return the function of `functions.get_weather:0`."""
    head, colon, number = name.rpartition(":")
    return _text((head if colon and number.isdigit() else name).removeprefix("functions."))


def _text(value: Any) -> str:
    """Return a text that any file can hold; what is none is empty."""
    if not isinstance(value, str):
        return ""
    return value[:LONGEST].encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _text_or_none(value: Any) -> str | None:
    return _text(value)[:200] if isinstance(value, str) else None
