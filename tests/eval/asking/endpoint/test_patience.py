"""How long a client waits, proved without waiting."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k2quant.eval.asking.endpoint.patience import PASSING, asked_for, wait

NOW = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)


def test_waits_double_up_to_a_minute() -> None:
    """1, 2, 4 seconds and so on; nine tries take three minutes."""
    waits = [wait(tries, first=1.0, asked=None, chance=0.0) for tries in range(1, 10)]
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60]


@given(
    tries=st.integers(1, 10**6),
    first=st.floats(0.001, 100),
    asked=st.none() | st.floats(0, 600),
    chance=st.floats(0, 1),
)
def test_a_wait_is_never_shorter_than_asked_and_never_long(
    tries: int, first: float, asked: float | None, chance: float
) -> None:
    """At least what the server asks for, and at most a quarter more than that or a minute."""
    found = wait(tries, first=first, asked=asked, chance=chance)
    assert (asked or 0.0) <= found <= max(60.0, asked or 0.0) * 1.25


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("", None),
        ("7", 7.0),
        (" 120 ", 120.0),
        ("9" * 400, float("9" * 12)),
        ("-5", None),
        ("1.5", None),
        ("soon", None),
        (format_datetime(NOW + timedelta(seconds=90), usegmt=True), 90.0),
        (format_datetime(NOW - timedelta(days=1), usegmt=True), 0.0),
        ("Sun, 01 Mar 2026 13:00:30 +0100", 30.0),
        ("Sun, 01 Mar 2026 12:00:30 -0000", 30.0),
        ("Sun, 99 Foo 2026 12:00:00 GMT", None),
    ],
)
def test_what_a_server_asks_for(header: str | None, seconds: float | None) -> None:
    """Seconds or a date, as RFC 9110 has them; anything else asks for nothing."""
    assert asked_for(header, NOW) == seconds


@given(st.text(max_size=60))
def test_no_header_breaks_the_reading(header: str) -> None:
    """Whatever stands there is a number of seconds or nothing."""
    found = asked_for(header, NOW)
    assert found is None or found >= 0


def test_what_passes() -> None:
    """Statuses that say that the request itself is wrong are none of them."""
    assert {408, 425, 429, 500, 502, 503, 504} == PASSING
