"""What makes tests of evaluations shorter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from k2quant.eval.statistics.planning import _Wanted


@pytest.fixture
def by_score() -> Iterator[pytest.MonkeyPatch]:
    """Have the score test say a gate's power, and how many items would do: within 0.005 of the exact test's chance.

    The exact plan is most of a gate's work, and tests/eval/statistics are about it. This is for files that are about
    verdicts; `undo` has it exact after all.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Wanted, "power_at", _Wanted.score_power)
        yield patch
