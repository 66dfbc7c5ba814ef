"""What an error of somebody else's code said, short enough for a message and with the words that help."""

from __future__ import annotations

_HEAD, _TAIL = 300, 500
"""Characters kept of the beginning and of the end: libraries begin with a paragraph and end with the cause."""


def said(error: BaseException) -> str:
    """Return an error's kind and words in one line; of a long one the beginning and the end."""
    words = shortened(str(error))
    return ": ".join(part for part in (type(error).__name__, words) if part)  # of a KeyError the words are but a key


def shortened(text: str) -> str:
    """Return a text in one line; of a long one the beginning and the end."""
    words = " ".join(text.split())
    if len(words) <= _HEAD + _TAIL:
        return words
    return f"{words[:_HEAD].rstrip()} ... {words[-_TAIL:].lstrip()}"
