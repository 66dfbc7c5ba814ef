"""The search for guilty groups, on made-up damages whose truth is known."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k2quant.errors import UsageError
from k2quant.eval.statistics.group_testing import Findings, clear, explained, search, student

LAYERS, EXPERTS = 4, 8
KEYS = [("attention", layer, -1, f"{layer}.{part}") for layer in range(LAYERS) for part in "abc"]
KEYS += [("experts", layer, expert, f"{layer}.{expert}") for layer in range(LAYERS) for expert in range(EXPERTS)]
KEYS += [("router", layer, -1, f"{layer}.r") for layer in range(LAYERS)]
SIZES = [100] * len(KEYS)
CHUNKS = 64


class World:
    """Damages of each part in each chunk, with noise that is drawn anew for each group that is put back."""

    def __init__(self, harm: dict[int, float], *, noise: float = 0.0, even: float = 0.0, seed: int = 0) -> None:
        """Give each part `even` of damage, and some parts more; chunks differ in how much they show."""
        self._random = np.random.default_rng(seed)
        self._noise, self.passes = noise, 0
        weights = self._random.gamma(2, 0.5, (CHUNKS, len(KEYS)))
        self._harm = weights * np.array([even + harm.get(part, 0) for part in range(len(KEYS))])

    def measure(self, restored: frozenset[int]) -> Any:
        """Return what is left, which adds up."""
        self.passes += 1
        left = [part for part in range(len(KEYS)) if part not in restored]
        noise = self._noise * self._random.standard_normal(CHUNKS)
        return self.bent(self._harm[:, left].sum(1)) + noise

    def bent(self, damage: Any) -> Any:
        """Return damage as it is; others overlap."""
        return damage


class Overlapping(World):
    """Damages that saturate: two together do less than the sum of both."""

    def bent(self, damage: Any) -> Any:
        """Saturate."""
        return 1 - np.exp(-damage)


def found(world: World, *, passes: int = 60) -> Findings:
    """Search a world."""
    return search(KEYS, SIZES, world.measure, passes=passes)


@settings(max_examples=40, deadline=None)
@given(part=st.integers(0, len(KEYS) - 1), seed=st.integers(0, 1000), noise=st.sampled_from([0.0, 0.05, 0.2]))
def test_one_guilty_part_is_found_wherever_it_is(part: int, seed: int, noise: float) -> None:
    """Behind noise and a little even damage too: its class first, then the part itself, in a few passes."""
    world = World({part: 1.0}, noise=noise, even=0.001, seed=seed)
    findings = found(world)
    assert KEYS[min(findings.classes[0].parts)][0] == KEYS[part][0]
    assert findings.suspects[0].parts == {part}
    assert findings.suspects[0].share > 0.7
    assert findings.together is not None
    assert findings.together.share > 0.7
    assert world.passes <= 24


def test_one_of_all_projections_of_a_whole_model_is_found_in_some_dozen_passes() -> None:
    """61 layers with 384 experts, 69,000 weights: the passes grow with the logarithm."""
    keys = [("attention", layer, -1, f"{layer}.{part}") for layer in range(61) for part in "abcde"]
    keys += [("experts", la, ex, f"{la}.{ex}.{part}") for la in range(1, 61) for ex in range(384) for part in "dgu"]
    guilty = keys.index(("experts", 37, 201, "37.201.g"))
    random, seen = np.random.default_rng(0), []
    weights = random.gamma(2, 0.5, CHUNKS)

    def measure(restored: frozenset[int]) -> Any:
        seen.append(restored)
        rest = 0.3 * (1 - len(restored) / len(keys))
        return (guilty not in restored) * weights + rest + 0.02 * random.standard_normal(CHUNKS)

    findings = search(keys, [1] * len(keys), measure, passes=100)
    assert findings.suspects[0].parts == {guilty}
    assert len(seen) < 45


def test_two_guilty_parts_are_both_found() -> None:
    """Of one class, in layers far apart."""
    parts = {KEYS.index(("experts", 0, 2, "0.2")), KEYS.index(("experts", 3, 5, "3.5"))}
    findings = found(World(dict.fromkeys(parts, 1.0), noise=0.05, even=0.001))
    assert {frozenset(one.parts) for one in findings.suspects} == {frozenset({part}) for part in parts}


def test_damage_that_overlaps_sums_to_less_than_its_shares_say() -> None:
    """Two saturating damages: each alone explains less than half, both together all."""
    parts = {0, KEYS.index(("experts", 3, 5, "3.5"))}
    findings = found(Overlapping(dict.fromkeys(parts, 2.0)))
    assert {min(one.parts) for one in findings.suspects} == parts
    assert all(one.share < 0.45 for one in findings.suspects)
    assert findings.together is not None
    assert findings.together.share == pytest.approx(1)


def test_damage_spread_evenly_is_not_chased_to_single_parts() -> None:
    """Where size predicts all, whole classes are named, and few passes are spent."""
    world = World({}, even=1.0)
    findings = found(world)
    assert [len(one.parts) for one in findings.suspects] == [32, 12, 4]
    assert [one.share for one in findings.suspects] == pytest.approx([32 / 48, 12 / 48, 4 / 48], abs=0.03)
    assert world.passes < 25


@pytest.mark.parametrize("passes", [6, 8, 12])
def test_the_limit_on_passes_is_kept(passes: int) -> None:
    """With few passes the search ends at a larger group that holds the guilty part, and confirms that."""
    part = KEYS.index(("experts", 3, 5, "3.5"))
    world = World({part: 1.0})
    findings = found(world, passes=passes)
    assert world.passes <= passes
    assert part in findings.suspects[0].parts
    assert findings.together is not None


def _chance(random: np.random.Generator, level: Any, restored: frozenset[int]) -> Any:
    del restored
    return level + 0.5 * random.standard_normal(CHUNKS)


def test_chance_is_hardly_ever_blamed() -> None:
    """Damage that no part has: of 1,000 worlds of noise alone, at most 1% name anything."""
    blamed = 0
    for seed in range(1000):
        random = np.random.default_rng(seed)
        level = random.gamma(2, 0.5, CHUNKS)
        findings = search(KEYS, SIZES, functools.partial(_chance, random, level), passes=20, seed=seed)
        blamed += bool(findings.classes or findings.suspects)
    assert blamed <= 10


def test_intervals_hold_the_true_share() -> None:
    """Although the search chose the groups: in 300 worlds, about 95% of the intervals have the truth inside."""
    part, held, count = KEYS.index(("experts", 1, 1, "1.1")), 0, 0
    for seed in range(300):
        findings = found(World({part: 1.0}, noise=0.3, even=0.01, seed=seed), passes=25)
        for one in findings.suspects:
            truth = (0.01 * len(one.parts) + (part in one.parts)) / (0.01 * len(KEYS) + 1)
            held += one.interval[0] <= truth <= one.interval[1]
            count += 1
    assert count >= 300
    assert 0.91 <= held / count <= 0.98


def test_the_same_search_twice_gives_the_same() -> None:
    """Chunks are chosen and resampled from a seed."""
    first, second = (found(World({7: 1.0}, noise=0.1, even=0.01)) for _ in range(2))
    assert first == second


def test_nonsense_is_refused() -> None:
    """Fewer passes than classes need, and too few chunks."""
    with pytest.raises(UsageError, match="at least 5"):
        found(World({}), passes=4)
    with pytest.raises(UsageError, match="16 chunks"):
        search(KEYS, SIZES, lambda _: np.ones(15), passes=50)


def test_student_and_a_plain_t_test() -> None:
    """Quantiles as tables have them, and what they decide."""
    table = {(0.975, 7): 2.365, (0.975, 31): 2.040, (0.99, 31): 2.453, (0.95, 15): 1.753}
    for (share, freedom), value in table.items():
        assert student(share, freedom) == pytest.approx(value, rel=0.01)
    assert clear(np.array([1.0, 2, 3, 2, 1, 2, 3, 2]), 0.01)
    assert not clear(np.array([1.0, -2, 3, -2, 1, -2, 3, -1]), 0.01)
    assert not clear(np.zeros(8), 0.01)
    assert clear(np.ones(8), 0.01)


def test_a_group_that_explains_all_has_no_interval_to_speak_of() -> None:
    """Nothing is left in any chunk: the share is 1 whatever is resampled; half left is 0.5."""
    whole = np.arange(1.0, 33)
    assert explained(whole, np.zeros(32)) == (1, (1, 1))
    share, (low, high) = explained(whole, whole / 2)
    assert (share, low, high) == pytest.approx((0.5, 0.5, 0.5))
