"""What people write and read: bytes, seconds, one word of a few, and the text that a model continues."""

from __future__ import annotations

import re

from k2quant.errors import UsageError


def one_of(what: str, value: object, choices: tuple[str, ...]) -> None:
    """Refuse a word that is none of the choices.

    Raises:
        UsageError: it is none.
    """
    if value not in choices:
        raise UsageError(f"unknown {what} {value!r}; expected {', '.join(choices)}")


def check_prompt(prompt: str) -> None:
    """Refuse a prompt that no tokenizer need look at.

    Raises:
        UsageError: it is empty, or holds what came from bytes that are no UTF-8.
    """
    if not prompt:
        raise UsageError("the prompt is empty")
    if any(0xD800 <= ord(character) < 0xE000 for character in prompt):
        raise UsageError("the prompt holds bytes that are no text; expected UTF-8")


def counted(count: int, one: str, many: str | None = None) -> str:
    """Return how many there are of what: `1 shard`, `1,024 shards`."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def size(count: float) -> str:
    """Return bytes as people read them, in powers of 1000: `594.2 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def enough(count: float) -> str:
    """Return bytes as people read them, and never fewer: who asks for what it says has that many."""
    unit = next(unit for unit in (1, 10**3, 10**6, 10**9, 10**12) if abs(count) < 999.5 * unit or unit == 10**12)
    step = unit // (100 if unit == 10**12 else 10) or 1
    return size(-(-count // step) * step)


def duration(seconds: float) -> str:
    """Return seconds as people read them: `3.2 s`, `4 min 10 s`, `2 h 05 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    return f"{minutes // 60} h {minutes % 60:02} min"


def moment(seconds: float) -> str:
    """Return a time since the epoch as people read it, in UTC: `2026-01-31 12:00:00 UTC`."""
    from datetime import UTC, datetime

    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"
    except (OverflowError, ValueError, OSError):  # a file system may say anything
        return f"{seconds:.0f} s after 1970"


def parse_rate(text: str) -> float:
    """Read a rate such as `10Gbit`, `10Gbit/s`, `800Mbps` or `1.2GB/s` in bytes a second; units are powers of 1000.

    Raises:
        UsageError: it is none, or zero.
    """
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,6})?)\s*([kmgt]?)(bit|b)(?:/s|ps)?", text.strip(), re.IGNORECASE)
    if match is None or not float(match[1]):
        raise UsageError(f"{text!r} is no rate; try 10Gbit or 1.2GB/s")
    bits = match[3].lower() == "bit" or text.strip().endswith("bps")
    unit: int = 1000 ** " kmgt".index(match[2].lower() or " ")
    return float(match[1]) * unit / (8 if bits else 1)


def parse_size(text: str) -> int:
    """Read a size such as `5GB`, `512MB` or `1000000` in bytes; units are powers of 1000, `GiB` and `MiB` of 1024.

    Raises:
        UsageError: it is none, or zero.
    """
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,6})?)\s*([kmgt]?)(i?)b?", text.strip().lower())
    if match is None:
        raise UsageError(f"{text!r} is no size; try 5GB")
    number, unit, binary = match.groups()
    size = int(float(number) * (1024 if binary else 1000) ** " kmgt".index(unit or " "))
    if size <= 0:
        raise UsageError(f"{text!r} is no size; try 5GB")
    return size
