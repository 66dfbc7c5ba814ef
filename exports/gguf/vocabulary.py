"""What GGUF's metadata says of the tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from k2quant.exports.gguf.key import Key


def vocabulary(folder: Path, config: Mapping[str, Any]) -> tuple[Key, ...]:  # noqa: ARG001  to come
    """Return the keys of a tokenizer."""
    return ()
