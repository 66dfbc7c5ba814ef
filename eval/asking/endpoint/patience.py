"""What a server may get over by itself, and how long to wait before it is asked again.

Statuses as RFC 9110 (408, 500, 502, 503, 504), RFC 8470 (425) and RFC 6585 (429) have them; the rest says that the
request is wrong, and asking again would not mend it.
"""

from __future__ import annotations

from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Statuses after which the same request may succeed."""

LONGEST_ASKED = 600.0
"""Seconds that a server may ask to be left alone; when it asks for more, the run is better resumed later."""

_LONGEST = 60.0  # seconds between two tries of our own accord
_SPREAD = 0.25  # of a wait, added by chance, so that requests that failed together do not come back together


def wait(tries: int, *, first: float, asked: float | None, chance: float) -> float:
    """Return how many seconds to wait before the next try: doubled after each, and never less than the server asks.

    Args:
        tries: that have failed, at least 1.
        first: seconds after the first of them.
        asked: seconds that the server asks for, if it does.
        chance: 0 to 1, what spreads requests that failed together.
    """
    own = min(first * 2.0 ** min(tries - 1, 30), _LONGEST)
    return max(own, asked or 0.0) * (1 + _SPREAD * chance)


def asked_for(retry_after: str | None, now: datetime) -> float | None:
    """Return the seconds that a `Retry-After` header asks for (RFC 9110, 10.2.3), None where it asks for nothing.

    Args:
        retry_after: the header: seconds or a date. What is neither says nothing.
        now: with a time zone.
    """
    text = (retry_after or "").strip()
    if text.isascii() and text.isdigit():
        return float(text[:12])
    try:
        until = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return None
    if until.tzinfo is None:  # "-0000" says that nobody knows; HTTP's dates are in GMT
        until = until.replace(tzinfo=UTC)
    return max((until - now).total_seconds(), 0.0)
