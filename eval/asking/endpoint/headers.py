"""Headers of requests whose values come from the environment, and are written down nowhere."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping

from k2quant.errors import UsageError

KEY = "OPENAI_API_KEY"
"""The variable with the key of a server that asks for one, as OpenAI's own clients have it."""

_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,100}")  # a token of RFC 9110
_OURS = frozenset({"host", "content-length", "content-type", "transfer-encoding", "connection", "content-encoding"})
_SHORTEST = 4  # letters of a value that is hidden: less would hide parts of any sentence


def check_headers(named: Mapping[str, str]) -> None:
    """Refuse headers that cannot be, without a look at the environment.

    Args:
        named: for each header, the variable of the environment that holds its value.

    Raises:
        UsageError: a name is none, or one that each request has already.
    """
    for name, variable in named.items():
        if not _NAME.fullmatch(name) or name.lower() in _OURS:
            raise UsageError(f"headers: {name[:100]!r} is no header to be set; try Authorization=MY_KEY")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", variable):
            raise UsageError(
                f"headers: {name} needs the name of a variable of the environment that holds its value, never the "
                "value itself; try Authorization=MY_KEY"
            )


def read_headers(named: Mapping[str, str]) -> dict[str, str]:
    """Return headers with their values from the environment.

    Args:
        named: for each header, the variable that holds its value. Without an `Authorization` among them, a key in
            OPENAI_API_KEY becomes one.

    Raises:
        UsageError: a variable is not set, or holds what no header can.
    """
    check_headers(named)
    found = {name: _value(variable, os.environ.get(variable, "")) for name, variable in named.items()}
    if os.environ.get(KEY) and not any(name.lower() == "authorization" for name in found):
        found["Authorization"] = f"Bearer {_value(KEY, os.environ[KEY])}"
    return found


def _value(variable: str, value: str) -> str:
    value = value.strip()
    if not value:
        raise UsageError(f"headers: {variable} is not set in the environment, or empty")
    if not value.isascii() or not value.isprintable():
        raise UsageError(f"headers: {variable} holds what no header can: only printable ASCII")
    return value


def hidden(text: str, headers: Mapping[str, str]) -> str:
    """Return a text without the values of headers: some servers repeat a key that they refuse."""
    secrets = {part for value in headers.values() for part in (value, value.split(" ")[-1])}
    secrets |= {json.dumps(secret)[1:-1] for secret in secrets}
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) >= _SHORTEST:
            text = text.replace(secret, "***")
    return text
