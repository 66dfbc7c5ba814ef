"""Numbers that a job may hold, and how to refuse others."""

from __future__ import annotations

from k2quant.errors import UsageError
from k2quant.qat.config import shown

_MOST = 2**31  # of whole numbers, unless a key has its own limit


def whole(name: str, value: object, least: int, most: int = _MOST) -> None:
    """Refuse what is no whole number between two, both included.

    Raises:
        UsageError: so it is; the message begins with the name.
    """
    if type(value) is not int or not least <= value <= most:
        raise UsageError(f"{name}: expected a whole number from {least} to {most}, found {shown(value)}")


def number(
    name: str, value: object, *, above: float | None = None, least: float | None = None, most: float = 1e6
) -> None:
    """Refuse what is no number above one or from another on, up to `most`.

    Raises:
        UsageError: so it is; the message begins with the name.
    """
    fits = isinstance(value, int | float) and not isinstance(value, bool)
    if not fits or not (above is None or value > above) or not (least is None or value >= least) or not value <= most:  # type: ignore[operator]
        span = f"above {above:g}, at most" if above is not None else f"from {least or 0:g} to"
        raise UsageError(f"{name}: expected a number {span} {most:.15g}, found {shown(value)}")
