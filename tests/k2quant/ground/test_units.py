"""Numbers as people read them."""

from __future__ import annotations

import pytest

from k2quant.ground.units import moment


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.0, "1970-01-01 00:00:00 UTC"),
        (1_700_000_000.9, "2023-11-14 22:13:20 UTC"),
        (1e18, "1000000000000000000 s after 1970"),
        (-1e18, "-1000000000000000000 s after 1970"),
    ],
)
def test_a_time_is_a_date_in_utc(seconds: float, said: str) -> None:
    """Whatever a file system says of a file's age can be said."""
    assert moment(seconds) == said
