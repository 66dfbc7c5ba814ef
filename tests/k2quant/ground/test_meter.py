"""How far a job is: its rate and time left, a line now and then, a bar that fits."""

from __future__ import annotations

import pytest

from k2quant.ground.saying.meter import BYTES, FIRST, LEAST, MOST, STEPS, Cadence, Meter, bar, each, plain
from k2quant.ground.saying.width import cells_of


class Clock:
    """Stands still until it is set."""

    now = 100.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now


def told(*steps: tuple[float, int], total: int = 1000, what: str = "K2 to int4") -> Meter:
    """Return a meter of bytes that was told so much at such times after its beginning."""
    clock = Clock()
    meter = Meter(what, BYTES, clock)
    for seconds, done in steps:
        clock.now = 100 + seconds
        meter.tell(done, total)
    return meter


@pytest.mark.parametrize("room", [15, 29, 39, 59, 79, 200])
@pytest.mark.parametrize("what", ["K2 to int4", "月之暗面的模型" * 9, "a-folder-with-a-very-long-name" * 5])
def test_a_bar_is_never_longer_than_its_line(room: int, what: str) -> None:
    """Whatever the width and the name, the line fits and says the share."""
    line = bar(told((0, 0), (10, 350), what=what), room)
    assert cells_of(line) <= room
    assert "35%" in line


def test_a_line_says_what_how_far_how_fast_and_how_long() -> None:
    """What a log shows of a job."""
    meter = told((0, 0), (100, 35 * 10**9), total=100 * 10**9)
    assert plain(meter) == "k2quant: K2 to int4: 35% (35.0 GB of 100.0 GB), 350.0 MB/s, 3 min 06 s left"


def test_the_rate_begins_with_the_first_step() -> None:
    """What comes before it, loading or shards that a resumed run finds done, is no part of the rate."""
    clock = Clock()
    meter = Meter("training", STEPS, clock)
    clock.now += 1000
    meter.tell(50, 100)
    assert meter.facts() == ["50%", "50 of 100 steps"]
    clock.now += 10
    meter.tell(60, 100, "loss 2.000")
    assert meter.facts() == ["60%", "60 of 100 steps", "1.0 steps/s", "loss 2.000", "40 s left"]


def test_the_rate_is_the_latest() -> None:
    """A job that became slow half way shows the new rate, not the mean of both."""
    meter = told(*((second, 10 * second) for second in range(40)), *((40 + 2 * n, 390 + 2 * n) for n in range(99)))
    assert "1 B/s" in meter.facts()


def test_another_part_of_a_job_begins_anew() -> None:
    """Its name, its time and its rate are its own; a count that goes back begins anew too."""
    clock = Clock()
    meter = Meter("reading", BYTES, clock)
    meter.tell(10, 100)
    clock.now += 10
    meter.begin("training")
    clock.now += 1
    assert plain(meter) == "k2quant: training: 1.0 s so far"
    meter.tell(50, 100)
    clock.now += 10
    meter.tell(10, 100)
    assert plain(meter) == "k2quant: training: 10% (10 B of 100 B)"


def test_a_meter_that_was_told_nothing_says_for_how_long() -> None:
    """So does one of nothing at all; more than all is all."""
    clock = Clock()
    meter = Meter("reading\x1b", BYTES, clock)
    clock.now += 30
    assert plain(meter) == "k2quant: reading\\x1b: 30.0 s so far"
    meter.tell(0, 0)
    assert plain(meter) == "k2quant: reading\\x1b: 30.0 s so far"
    meter.tell(12, 10)
    assert plain(meter) == "k2quant: reading\\x1b: 100% (10 B of 10 B)"


def test_lines_come_now_and_then() -> None:
    """None of a short job; then one for each 5%, but never within five seconds, and one after thirty in any case."""
    cadence = Cadence(0.0)
    assert not cadence.due(FIRST - 1, 0.9)
    assert cadence.due(FIRST, 0.9)
    assert not cadence.due(FIRST + LEAST - 1, 0.99)
    assert not cadence.due(FIRST + LEAST, 0.94)
    assert cadence.due(FIRST + LEAST, 0.96)
    assert not cadence.due(FIRST + LEAST + MOST - 1, 0.96)
    assert cadence.due(FIRST + LEAST + MOST, 0.96)


def test_what_takes_its_time_one_by_one_says_how_long() -> None:
    """A rate of less than one a second is said as the time of one."""
    measure = each("pass", "passes")
    assert measure.amount(1, 1000) == "1 of 1,000 passes"
    assert measure.rate is not None
    assert [measure.rate(rate) for rate in (2.0, 0.1, 1 / 130)] == [
        "2.0 passes/s",
        "10.0 s a pass",
        "2 min 10 s a pass",
    ]
