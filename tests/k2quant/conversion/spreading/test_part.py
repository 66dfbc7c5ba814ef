"""How a plan is divided into parts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k2quant.checkpoint.reader import open_checkpoint
from k2quant.conversion.placing import ShardPlan
from k2quant.conversion.plan import Options, Plan, make_plan
from k2quant.conversion.spreading.part import Part, part_of, share, shares
from k2quant.errors import UsageError


def test_a_part_is_named_by_its_number_and_how_many_there_are() -> None:
    """`2/8` is the second of eight."""
    assert part_of("2/8") == Part(2, 8)
    assert (str(Part(2, 8)), Part(2, 8).said, Part(2, 8).name) == ("2/8", "part 2 of 8", "2-of-8")


@pytest.mark.parametrize(
    "text", ["0/8", "9/8", "1/0", "2", "2/8/1", "-1/8", "1 /8", "1/10001", "²/8", "1/8\n", None, 2]
)
def test_what_is_no_part_is_refused(text: object) -> None:
    """Job arrays that count from 0 hear it at once."""
    with pytest.raises(UsageError, match="K from 1 to N"):
        part_of(text)


@pytest.fixture(scope="module")
def plan(k2_source: Path) -> Plan:
    """A plan whose shards a test replaces."""
    return make_plan(open_checkpoint(k2_source), Options(to="int4"))


def sized(plan: Plan, sizes: list[int]) -> Plan:
    """Return a plan of shards of some sizes, from which nothing is read."""
    return replace(plan, shards=tuple(ShardPlan(f"{n}.safetensors", b"", size, ()) for n, size in enumerate(sizes)))


SIZES = st.lists(st.integers(1, 100), min_size=1, max_size=12)


@given(sizes=SIZES, of=st.integers(1, 14))
def test_every_shard_is_in_one_share(plan: Plan, sizes: list[int], of: int) -> None:
    """The shares, one behind the other, are the shards in their order."""
    found = shares(sized(plan, sizes), of)
    assert len(found) == of
    assert [file for each in found for file in each] == [f"{n}.safetensors" for n in range(len(sizes))]
    assert share(sized(plan, sizes), Part(of, of)) == found[-1]


def best(sizes: tuple[int, ...], of: int) -> int:
    """Return the least that the largest of some runs of neighbours can be, by trying all."""
    if of == 1 or not sizes:
        return sum(sizes)
    return min(max(sum(sizes[:stop]), best(sizes[stop:], of - 1)) for stop in range(len(sizes) + 1))


@given(sizes=st.lists(st.integers(1, 100), min_size=1, max_size=8), of=st.integers(1, 5))
def test_the_largest_share_is_as_small_as_it_can_be(plan: Plan, sizes: list[int], of: int) -> None:
    """No other division into runs of neighbours has a smaller one."""
    found = shares(sized(plan, sizes), of)
    loads = [sum(sizes[int(file.split(".")[0])] for file in each) for each in found]
    assert max(loads) == best(tuple(sizes), of)


def test_equal_shards_are_divided_evenly(plan: Plan) -> None:
    """61 of one size come to 7 or 8 for each of eight, and a short last one leaves nobody idle."""
    assert sorted({len(each) for each in shares(sized(plan, [5] * 61), 8)}) == [7, 8]
    assert [len(each) for each in shares(sized(plan, [3, 3, 3, 1]), 4)] == [1, 1, 1, 1]
