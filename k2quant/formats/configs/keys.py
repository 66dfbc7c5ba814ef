"""Keys of a quantization block: what may stand under each, and what becomes of it in an output.

Nothing that stands there is dropped without a word. A key is rewritten, for it follows from the tensors; or carried
along where it is still true of the output; or named, where it is left out or refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from k2quant.errors import UnsupportedFormat

FILE = "config.json"

_SHOWN = 200  # characters of a value in a message

Fate = Literal["written", "codes", "meaning", "loading", "beyond"]
"""`written`: k2quant acts on it, and writes what the output's tensors say. `codes`: it tells of the codes as they are,
and goes along where every quantised weight is copied. `meaning`: likewise, and where codes are converted it is refused,
for it may say what they mean. `loading`: for whoever loads these weights; it goes along while `quant_method` stays.
`beyond`: of activations or of the KV cache; it goes along where the output's block can say it, and is named where it is
left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One key that k2quant knows."""

    fate: Fate
    expected: str
    """What may stand there, in words."""
    fits: Callable[[Any], bool]
    """Tells whether it does; it is not asked about what is empty."""

    def check(self, name: str, value: object) -> None:
        """Refuse a value that is not understood.

        Raises:
            UnsupportedFormat: it is such a one.
        """
        if not empty(value) and not self.fits(value):
            raise UnsupportedFormat(name, file=FILE, expected=self.expected, found=shown(value))


class Recast(NamedTuple):
    """What a conversion does to weights, as far as it decides which keys are still true."""

    copied: bool
    """Whether every weight that is quantised, before or afterwards, keeps its codes and scales under a block that still
    describes them: copied byte for byte, or with scales widened to float32 of which no block says the dtype."""
    scaled: bool
    """Whether every weight that a config would say static activations of has their scale."""


UNKNOWN = Key(fate="meaning", expected="anything", fits=lambda _: True)
"""A key that k2quant does not know."""


def empty(value: object) -> bool:
    """Tell whether a value says nothing: null, false, or an empty text, list or object."""
    return value is None or value is False or (isinstance(value, str | list | dict) and not value)


def shown(value: object) -> str:
    """Return a value as a message shows it."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def is_flag(value: object) -> bool:
    """Tell true and false from all else."""
    return isinstance(value, bool)


def is_number(value: object) -> bool:
    """Tell numbers from all else."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_text(value: object) -> bool:
    """Tell text from all else."""
    return isinstance(value, str)


def is_texts(value: object) -> bool:
    """Tell lists of text from all else."""
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def is_object(value: object) -> bool:
    """Tell objects from all else."""
    return isinstance(value, dict)


ROTATIONS = Key(
    fate="codes",
    expected="none: the weights are rotated, and only the rotations give them back",
    fits=lambda value: is_object(value) and all(map(empty, value.values())),
)
"""`transform_config`, under whatever method it stands (SpinQuant, QuIP)."""


def check_keys(block: Mapping[str, Any], keys: Mapping[str, Key], *, inside: str = "") -> None:
    """Refuse values of known keys that are not understood.

    Args:
        block: an object of a config.
        keys: those that are known in it.
        inside: where it stands, for the message.

    Raises:
        UnsupportedFormat: there is one.
    """
    for name, value in block.items():
        keys.get(name, UNKNOWN).check(f"{inside}{name}", value)


def carry(
    fresh: Mapping[str, Any], source: Mapping[str, Any], keys: Mapping[str, Key], recast: Recast
) -> dict[str, Any]:
    """Return a new block with whatever of the source's is still true of it, keys in the source's order.

    Args:
        fresh: what k2quant writes by itself.
        source: the source's block, of the same `quant_method`.
        keys: those that are known in it.
        recast: what becomes of the weights.
    """
    kept = {
        name: fresh.get(name, value)
        for name, value in source.items()
        if name in fresh or recast.copied or keys.get(name, UNKNOWN).fate in {"loading", "beyond"}
    }
    written = {name for name, key in keys.items() if key.fate == "written"} - fresh.keys()
    return {name: value for name, value in {**kept, **fresh}.items() if name not in written}


def uncarried(source: Mapping[str, Any], keys: Mapping[str, Key]) -> list[str]:
    """Return the keys of a block that may say what its codes mean, in a way that k2quant does not know."""
    return [name for name, value in source.items() if keys.get(name, UNKNOWN).fate == "meaning" and not empty(value)]
