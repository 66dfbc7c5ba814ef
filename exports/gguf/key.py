"""One entry of a GGUF file's metadata."""

from __future__ import annotations

from typing import NamedTuple


class Key(NamedTuple):
    """One entry of a GGUF file's metadata."""

    name: str
    """Such as `deepseek2.block_count`."""
    value: object
    """A number, a text, a truth, or a sequence of one kind of them."""
    kind: str
    """The name of a `gguf.GGUFValueType` in lower case, such as `uint32`; `array:string` for a sequence of texts."""
