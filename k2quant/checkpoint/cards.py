"""README.md, a checkpoint's model card: whose it is, and where the source's own goes.

The card is a file that people edit. So one of ours ends in a line with a digest of all that stands above it: while the
two agree it may be written anew, and thrown away; once they do not, or there is no such line, it is somebody's own.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

CARD = "README.md"
"""What hubs show of a model: https://huggingface.co/docs/hub/model-cards."""

LIMIT = 4_000_000
"""Largest card in bytes that is looked at; people write far shorter ones."""

_SEAL = re.compile(rb"<!-- k2quant wrote this card: ([0-9a-f]{64}); edited, it is yours and stays as it is -->\n")
_SOURCE = "README.source{}.md"


def sealed(text: str) -> bytes:
    """Return a card as it is written: the text and a line by which `is_ours` knows it."""
    data = text.rstrip("\n").encode() + b"\n\n"
    digest = hashlib.sha256(data).hexdigest()
    line = f"<!-- k2quant wrote this card: {digest}; edited, it is yours and stays as it is -->\n"
    return data + line.encode()


def is_ours(data: bytes) -> bool:
    """Tell whether a card is one that k2quant wrote and nobody has edited."""
    begin = data.rfind(b"<!-- k2quant wrote")
    found = _SEAL.fullmatch(data[begin:]) if begin >= 0 else None
    return found is not None and hashlib.sha256(data[:begin]).hexdigest().encode() == found[1]


def placed(names: Iterable[str]) -> dict[str, str]:
    """Return where files of a source go in an output that has a card of its own, in their order.

    All stay what they are called but the card: it becomes `README.source.md`, or, where the source was itself made by
    k2quant and so has one, `README.source-2.md`, and so on.
    """
    taken = list(names)
    number, own = 1, _SOURCE.format("")
    while own in taken:
        number += 1
        own = _SOURCE.format(f"-{number}")
    return {name: own if name == CARD else name for name in taken}
