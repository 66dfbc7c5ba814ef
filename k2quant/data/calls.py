"""Tools and their calls, in OpenAI's form."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from k2quant.checkpoint.files.strict_json import parse_object
from k2quant.errors import MalformedFile

Messages = tuple[dict[str, Any], ...]

_ID = re.compile(r"functions\.(.+):\d+", re.DOTALL)


def checked_tools(tools: object, where: str) -> list[dict[str, Any]] | None:
    """Return the tools of a row: a list, or the same as JSON, as tables store it; None where there are none.

    Raises:
        MalformedFile: they are something else.
    """
    text = tools.strip() if isinstance(tools, str) else None
    found = _parsed(text, "tools", where) if text else tools
    if text == "" or found is None or found == []:
        return None
    if not isinstance(found, list):
        raise MalformedFile("tools", file=where, expected="a list of tools", found=type(found).__name__)
    for number, tool in enumerate(found, 1):
        inner = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(inner, Mapping) or not _named(inner):
            raise MalformedFile(
                f"tool {number}", file=where, expected="type function, and function with a name", found=str(tool)[:80]
            )
    return [dict(tool) for tool in found]


def checked_calls(calls: object, role: str, where: str) -> list[dict[str, Any]]:
    """Return the calls of a message; arguments are a mapping, or text that holds one.

    Raises:
        MalformedFile: they are no calls, or the message is not the assistant's.
    """
    if calls == []:
        return []
    if role != "assistant":
        raise MalformedFile("tool_calls in a message that is not the assistant's", file=where, found=f"role {role}")
    if not isinstance(calls, list):
        raise MalformedFile("tool_calls", file=where, expected="a list of calls", found=type(calls).__name__)
    return [_call(call, f"{where}, call {number}") for number, call in enumerate(calls, 1)]


def _call(call: object, where: str) -> dict[str, Any]:
    kept = {key: value for key, value in call.items() if value is not None} if isinstance(call, Mapping) else {}
    inner = kept.get("function")
    if not isinstance(inner, Mapping) or not _named(inner) or kept.get("type", "function") != "function":
        raise MalformedFile("not a call", file=where, expected="function with name and arguments", found=str(call)[:80])
    if not isinstance(kept.get("id", ""), str):
        raise MalformedFile("id is no text", file=where, expected="a string", found=type(kept["id"]).__name__)
    given = inner.get("arguments")
    arguments = "{}" if given is None or given == "" else given  # of a tool that takes none
    if isinstance(arguments, str):
        _check_object(arguments, where)
    elif not isinstance(arguments, Mapping):
        raise MalformedFile("arguments", file=where, expected="an object, or JSON of one", found=type(given).__name__)
    return {**kept, "type": "function", "function": {**inner, "arguments": arguments}}


def _named(inner: Mapping[str, Any]) -> bool:
    return isinstance(inner.get("name"), str) and bool(inner["name"])


def _check_object(text: str, where: str) -> None:
    if not isinstance(_parsed(text, "arguments", where), dict):
        raise MalformedFile("arguments", file=where, expected="JSON of an object", found=text[:50])


def _parsed(text: str, name: str, where: str) -> Any:
    """Parse JSON of any kind with the reader for objects."""
    held = parse_object(f'{{"it": {text}}}'.encode("utf-8", "surrogatepass"), file=f"{where}, {name}")
    if held.keys() != {"it"}:
        raise MalformedFile("not valid JSON", file=f"{where}, {name}", found=text[:50])
    return held["it"]


def has_calls(messages: Iterable[Mapping[str, Any]]) -> bool:
    """Tell whether a tool is called."""
    return any("tool_calls" in message for message in messages)


def mapped(messages: Messages, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Messages:
    """Return the messages with each call changed."""
    return tuple(
        {**message, "tool_calls": [change(call) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in messages
    )


def with_names(messages: Messages, end: str) -> Messages:
    """Return the messages with something behind the name of each function that is called."""
    return mapped(
        messages, lambda call: {**call, "function": {**call["function"], "name": f"{call['function']['name']}{end}"}}
    )


def with_arguments(messages: Messages, *, text: bool) -> Messages:
    """Return the messages with the arguments of calls as mappings, or as text; text stays as it is spelled."""

    def change(call: dict[str, Any]) -> dict[str, Any]:
        found = call["function"]["arguments"]
        if isinstance(found, str) and not text:
            found = json.loads(found)
        elif text and not isinstance(found, str):
            found = json.dumps(found, ensure_ascii=False)
        return {**call, "function": {**call["function"], "arguments": found}}

    return mapped(messages, change)


def with_ids(messages: Messages, where: str) -> Messages:
    """Return the messages with ids as K2's template wants them: functions.NAME:INDEX, the index counting from 0.

    Its template writes a call's id and not its name, so another id would teach calls without a name. The index counts
    the calls of the conversation, as vLLM's `make_tool_call_id` counts them where it makes ids of type kimi_k2. Ids of
    the form stay as they are. Results follow the calls that they name; those that name none answer the open calls in
    their order.

    Raises:
        MalformedFile: a result names no call before it.
    """
    done: list[dict[str, Any]] = []
    new: dict[str, str] = {}
    waiting: list[str] = []
    count = 0
    for number, message in enumerate(messages, 1):
        if "tool_calls" in message:
            waiting, calls = [], []
            for call in message["tool_calls"]:
                name, old = call["function"]["name"], call.get("id", "")
                fits = _ID.fullmatch(old)
                own = old if fits and fits[1] == name else f"functions.{name}:{count}"
                new[old] = own
                waiting.append(own)
                calls.append({**call, "id": own})
                count += 1
            done.append({**message, "tool_calls": calls})
        elif message["role"] == "tool":
            old = message.get("tool_call_id", "")
            answered = new.get(old) if old else next(iter(waiting), None)
            if answered is None:
                raise MalformedFile(
                    "a tool result without a call", file=f"{where}, message {number}", found=old or "no tool_call_id"
                )
            if answered in waiting:
                waiting.remove(answered)
            done.append({**message, "tool_call_id": answered})
        else:
            done.append(message)
    return tuple(done)
