"""Steps of many units, the steepest first: as good as trying everything, up to the one step that found no room."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k2quant.calib.budget.choosing import Step, hull, ranked, until, within
from k2quant.formats.known import LADDER, FormatName

Curve = tuple[dict[FormatName, int], dict[FormatName, float]]


@st.composite
def curves(draw: st.DrawFn) -> Curve:
    """Draw bytes and errors of one unit; errors need not fall."""
    more = [draw(st.integers(1, 20)) for _ in LADDER]
    nbytes = {name: sum(more[: place + 1]) for place, name in enumerate(LADDER)}
    return nbytes, {name: draw(st.integers(0, 12)) / 4 for name in LADDER}


many = st.lists(curves(), min_size=1, max_size=4)


def steps_of(units: list[Curve]) -> list[Step]:
    """Return the steps of units that are called 0, 1 and so on."""
    return ranked(hull(str(number), *unit) for number, unit in enumerate(units))


def error_of(units: list[Curve], taken: list[Step]) -> float:
    """Return the sum of errors once steps are taken."""
    return sum(errors[LADDER[0]] for _, errors in units) - sum(step.removed for step in taken)


def best_of(units: list[Curve], room: int) -> float:
    """Return the least sum of errors with so many bytes more than the least, by trying all choices."""
    least = sum(nbytes[LADDER[0]] for nbytes, _ in units)
    return min(
        sum(errors[name] for (_, errors), name in zip(units, choice, strict=True))
        for choice in product(LADDER, repeat=len(units))
        if sum(nbytes[name] for (nbytes, _), name in zip(units, choice, strict=True)) - least <= room
    )


@given(curves())
def test_steps_are_steeper_first_and_remove_errors(unit: Curve) -> None:
    """Each step of a unit removes some error, and less a byte than the one before it."""
    found = hull("one", *unit)
    assert all(step.removed > 0 and step.nbytes > 0 for step in found)
    assert all(one.rate > other.rate for one, other in pairwise(found))


@settings(deadline=None)
@given(many, st.integers(0, 120))
def test_what_is_taken_is_the_best_up_to_one_step(units: list[Curve], room: int) -> None:
    """No choice of the same size is better by what the first step without room removes; if none is, by nothing."""
    steps = steps_of(units)
    taken = within(steps, room)
    assert sum(step.nbytes for step in taken) <= room
    refused = next((step.removed for step in steps if step not in taken), 0.0)
    assert error_of(units, taken) - best_of(units, room) <= max(refused - 1e-9, 1e-9)


@settings(deadline=None)
@given(many, st.data())
def test_where_the_budget_is_that_of_whole_steps_nothing_is_better(units: list[Curve], data: st.DataObject) -> None:
    """With room for just the first steps these are taken, and brute force finds nothing better."""
    steps = steps_of(units)
    first = steps[: data.draw(st.integers(0, len(steps)))]
    taken = within(steps, sum(step.nbytes for step in first))
    assert taken == first
    assert error_of(units, taken) == pytest.approx(best_of(units, sum(step.nbytes for step in first)))


@given(many)
def test_a_unit_goes_up_step_by_step(units: list[Curve]) -> None:
    """In the ranking, and so in every choice, no step stands before its own predecessor."""
    steps = steps_of(units)
    for number, unit in enumerate(units):
        assert [step for step in steps if step.unit == str(number)] == hull(str(number), *unit)


def test_equal_steps_go_by_name() -> None:
    """Whatever order the units come in."""
    one = hull("a", {"int4": 1, "fp8": 2, "bf16": 4}, {"int4": 1.0, "fp8": 0.5, "bf16": 0.0})
    other = [Step("b", step.to, step.nbytes, step.removed) for step in one]
    assert ranked([other, one]) == ranked([one, other])
    assert [step.unit for step in ranked([other, one])] == ["a", "b", "a", "b"]


def test_a_step_without_room_stops_its_unit_alone() -> None:
    """A cheaper unit behind it is raised all the same, and the unit itself not by a later step."""
    large = [Step("large", "fp8", 10, 100.0), Step("large", "bf16", 1, 5.0)]
    small = [Step("small", "fp8", 2, 1.0)]
    assert within(ranked([large, small]), 5) == small


def test_steps_are_taken_until_enough_is_gone() -> None:
    """And no further; where all of them are not enough, all are."""
    steps = [Step("a", "fp8", 1, 3.0), Step("b", "fp8", 1, 2.0)]
    assert until(steps, -1.0) == until(steps, 0.0) == []
    assert until(steps, 3.0) == steps[:1]
    assert until(steps, 3.5) == steps
    assert until(steps, 5.5) == steps
