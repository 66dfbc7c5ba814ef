"""Numbers as people read them."""

from __future__ import annotations

import pytest

from k2quant.ground.units import enough, moment, parse_size


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


@pytest.mark.parametrize("count", [0, 1, 999, 1_001, 868_404_736, 868_400_000, 999_440_000, 999_960_000, 5_800_000_001])
def test_what_is_enough_is_never_less(count: int) -> None:
    """Who asks for the memory that a message names has it, and little more."""
    if count:
        assert count <= parse_size(enough(count)) <= max(1.06 * count, count + 100)
    assert enough(868_404_736) == "868.5 MB"
    assert enough(868_400_000) == "868.4 MB"
    assert enough(1_048_000_000_001) == "1.05 TB"
