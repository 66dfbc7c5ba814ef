"""Arguments against the JSON schema of a tool, in a process of its own: a schema from a file may be a trap.

A `pattern` can keep Python's `re` busy for years, and a few lines of `$ref` can mean more work than atoms: whoever asks
waits a little and ends the process. It opens no connection: a reference out of the schema is refused before.
"""

from __future__ import annotations

import json
import re
import resource
import sys
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote

MEMORY = 2**31
"""Bytes of address space that a check may take."""
DEEPEST = 64
"""Levels of a schema, and of arguments."""
LARGEST = 2**18
"""Bytes of a schema as JSON; those of real tools have a few thousand."""

UNCHECKED = "cannot be checked"
"""How a finding begins where nobody knows whether the arguments are right: the schema is at fault."""

_REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")
_SHOWN = 200


def unusable(schema: Any) -> str | None:
    """Say why nothing can be checked against a schema; None where it can."""
    return next(_complaints(schema), None)


def _complaints(schema: Any) -> Iterator[str]:
    """Yield what is wrong with a schema; what comes later may be asked only where nothing came before."""
    import jsonschema

    if not isinstance(schema, Mapping):
        yield "no JSON object"
    if len(json.dumps(schema)) > LARGEST:
        yield f"more than {LARGEST:,} bytes"
    if max(depth for depth, _ in _parts(schema)) > DEEPEST:
        yield f"more than {DEEPEST} levels deep"
    objects = [part for _, part in _parts(schema) if isinstance(part, Mapping)]
    for part in objects:
        yield from _out_of_it(part)
    if not any("$id" in part for part in objects):  # else pointers may count from elsewhere
        for part in objects:
            yield from _nowhere(part, schema)
    kind = _kind(schema)
    if kind is None:
        yield f"of a draft that is not known: {schema['$schema']!r:.100}"
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        yield f"no JSON schema: {error.message[:_SHOWN]} at {error.json_path[:_SHOWN]}"
    if (found := _first_error(schema, {})) and found.startswith(UNCHECKED):
        yield found


def _parts(value: Any) -> Iterator[tuple[int, Any]]:
    """Yield a value and all that stands in it, each with its level, down to one below the deepest that is taken."""
    waiting = [(0, value)]
    while waiting:
        depth, value = waiting.pop()
        yield depth, value
        if depth <= DEEPEST:
            inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
            waiting += [(depth + 1, part) for part in inner]


def _out_of_it(part: Mapping[str, Any]) -> Iterator[str]:
    for key in _REFERENCES:
        place = part.get(key)
        if isinstance(place, str) and not place.startswith("#"):
            yield f"{key} leads out of it: {place:.100}"


def _nowhere(part: Mapping[str, Any], schema: Any) -> Iterator[str]:
    """Yield a pointer, as RFC 6901 has them, that leads to nothing."""
    place = part.get("$ref")
    if not isinstance(place, str) or not place.startswith("#/"):
        return
    found = schema
    for step in place[2:].split("/"):
        name = unquote(step).replace("~1", "/").replace("~0", "~")
        if isinstance(found, list):
            found = found[int(name)] if name.isdecimal() and int(name) < len(found) else None
        else:
            found = found.get(name) if isinstance(found, Mapping) else None
    if found is None:
        yield f"$ref leads nowhere: {place:.100}"


def _kind(schema: Mapping[str, Any]) -> Any:
    """Return the validator of a schema's draft, 2020-12 where it names none; None for one that is not known."""
    import jsonschema

    if "$schema" not in schema:
        return jsonschema.Draft202012Validator
    if not isinstance(schema["$schema"], str):
        return None
    return jsonschema.validators.validator_for(schema, default=None)


def fault(schema: Mapping[str, Any], arguments: str) -> str | None:
    """Say what is wrong with a call's arguments; None where nothing is. `format` is a remark there and checks nothing.

    Args:
        schema: for which `unusable` found nothing.
        arguments: as the model wrote them.
    """
    try:
        value = json.loads(arguments, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        return f"no JSON: {error}"[:_SHOWN]
    if not isinstance(value, dict):
        return f"no JSON object but {type(value).__name__}"
    if any(depth > DEEPEST for depth, _ in _parts(value)):
        return f"more than {DEEPEST} levels deep"
    return _first_error(schema, value)


def _first_error(schema: Mapping[str, Any], value: dict[str, Any]) -> str | None:
    import jsonschema
    import referencing

    try:
        # A registry that holds nothing: the library's own would fetch what a reference names.
        error = next(_kind(schema)(schema, registry=referencing.Registry()).iter_errors(value), None)
    except (RecursionError, MemoryError):
        return f"{UNCHECKED}: the schema never ends, its $ref lead in a circle"
    except (referencing.exceptions.Unresolvable, jsonschema.exceptions.UnknownType, re.error, ValueError) as broken:
        return f"{UNCHECKED}: the schema breaks: {broken}"[:_SHOWN]
    except OverflowError:  # 1e400 by `multipleOf`
        return "a number beyond what computers reckon with"
    return None if error is None else f"{error.message[:_SHOWN]} at {error.json_path[:_SHOWN]}"


def _no_constant(literal: str) -> None:
    raise ValueError(f"{literal} is not JSON")


def main() -> None:
    """Answer each line of stdin, an object with `schema` and perhaps `arguments`, by a line with what is wrong."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            schema = asked["schema"]
            why = fault(schema, asked["arguments"]) if "arguments" in asked else unusable(schema)
        except (RecursionError, MemoryError) as error:
            why = f"{UNCHECKED}: {type(error).__name__}"
        sys.stdout.write(json.dumps(why) + "\n")
        sys.stdout.flush()
