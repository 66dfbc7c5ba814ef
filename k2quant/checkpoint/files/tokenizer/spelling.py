"""How files of tokenizers spell bytes: a visible character each, as GPT-2 did (openai/gpt-2, src/encoder.py)."""

from __future__ import annotations

from collections.abc import Iterator


def _characters() -> Iterator[str]:
    """Yield the character that stands for each byte: a visible one for itself, the others from 256 on, in order."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    for value in range(256):
        yield chr(value if value in visible else next(others))


_CHARACTERS = tuple(_characters())
_VALUES = {character: value for value, character in enumerate(_CHARACTERS)}


def spelled(token: bytes) -> str:
    """Return how bytes are spelled."""
    return "".join(_CHARACTERS[value] for value in token)


def unspelled(text: str) -> bytes:
    """Return the bytes that a text spells.

    Raises:
        KeyError: a character that stands for no byte.
    """
    return bytes(_VALUES[character] for character in text)
