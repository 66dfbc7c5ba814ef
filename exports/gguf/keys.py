"""What GGUF's metadata says of the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from k2quant.exports.gguf.key import Key


def keys(config: Mapping[str, Any], *, name: str, file_type: int) -> tuple[Key, ...]:  # noqa: ARG001  to come
    """Return the keys of a model."""
    return (
        Key("general.architecture", "deepseek2", "string"),
        Key("general.name", name, "string"),
        Key("general.file_type", file_type, "uint32"),
    )
