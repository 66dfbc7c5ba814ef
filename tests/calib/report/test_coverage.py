"""Coverage: what counts of tokens say of the experts, against counts made by hand and rules that hold for all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import inf, log

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from k2quant.calib.coverage import THIN, THINNEST, Coverage, LayerLoad, PartCoverage, needed
from k2quant.calib.stats.layout import Part

HIDDEN, INNER, TOP_K = 64, 16, 2

COUNTS = st.lists(st.integers(0, 10**7), min_size=TOP_K, max_size=40)


def load(tokens: Sequence[int], layer: int = 1) -> LayerLoad:
    """Return the load of a layer whose experts saw so many tokens, each with a weight of a half."""
    counts = np.array(tokens, np.int64)
    return LayerLoad(layer, counts, counts / 4, TOP_K)


def part(*layers: Sequence[int], name: Part = "train") -> PartCoverage:
    """Return the coverage of layers 1, 2 and so on."""
    loads = tuple(load(tokens, layer) for layer, tokens in enumerate(layers, 1))
    return PartCoverage(part=name, layers=loads, hidden=HIDDEN, inner=INNER)


def test_a_layer_by_hand() -> None:
    """Mean, shares, thin experts and the worst one follow from the counts."""
    found = load([0, 4, 9, 100, 87])
    assert (found.seen, found.mean, found.worst, found.empty) == (100.0, 40.0, 0, (0,))
    assert found.shares.tolist() == [0.0, 0.1, 0.225, 2.5, 2.175]
    assert (found.thin(THIN), found.thin(THINNEST)) == (1, 1)  # a tenth is not below a tenth
    assert load([3, 1, 99, 97]).thin(THIN) == 2


def test_tokens_needed_by_hand() -> None:
    """An expert that saw 8 of 100 tokens sees 64 of 800: 700 more; one that saw 64 needs none."""
    assert load([8, 92, 100]).needed(64) == 700
    assert load([64, 92, 100]).needed(64) == 0
    assert load([63, 92, 99]).needed(64) == 3  # 127 * 64 / 63 is 129.02


def test_an_expert_without_a_token_needs_at_least_so_many() -> None:
    """None of 100 tokens means a share of at most 3 in 100, so at least 2,134 tokens for 64, and no figure beyond."""
    found = part([0, 100, 100])
    assert found.needed(64) == 2134 - 100
    assert "at least 2,034 tokens more" in needed(found)
    assert found.as_json()["needed_is_lower_bound"] is True


def test_most_experts_need_less_than_all() -> None:
    """Of 40 experts the two with the fewest tokens are left out for 95 %, and what the next one needs is told."""
    found = part([2, *[8] * 9, *[32] * 10], [32] * 20)
    seen = found.layers[0].seen
    assert found.seen == seen
    assert found.needed_by(1.0, HIDDEN) == seen * 64 / 2 - seen
    assert found.needed_by(0.95, HIDDEN) == seen * 64 / 8 - seen
    assert found.needed_by(0.75, HIDDEN) == seen * 64 / 32 - seen
    assert found.needed_by(0.95, 8) == 0
    assert part([0, 0, 9, 9]).needed_by(0.95, HIDDEN) == 9 * 64 // 3 - 9


@pytest.mark.parametrize(
    ("tokens", "entropy"),
    [([5, 5, 5, 5], 1.0), ([10, 0, 0], 0.0), ([8, 8, 0, 0], 0.5), ([0, 0], 1.0), ([7], 1.0)],
    ids=["even", "one has all", "half of them", "no load", "one expert"],
)
def test_entropy_by_hand(tokens: list[int], entropy: float) -> None:
    """It is 1 for an even load, 0 where one expert has all, and log 2 over log 4 where two of four share it."""
    assert load(tokens).entropy == pytest.approx(entropy)


def test_tiers_add_up() -> None:
    """None, below d/4, below d, below 4d, and the rest: by the width of the input, each expert once."""
    found = part([0, 1, 15, 16, 63, 64], [255, 256, 10**6])
    assert found.tiers(HIDDEN) == (1, 2, 2, 2, 2)
    assert found.tiers(INNER) == (1, 1, 1, 2, 4)


def test_parts_sum_up_layers() -> None:
    """The whole counts all layers, and names the layer of the worst expert and the one with the most uneven load."""
    found = part([50, 50, 100], [20, 90, 90], [1, 1, 198])
    assert (found.experts, found.empty, found.thin(), found.median) == (9, 0, 2, 50.0)
    assert found.worst is not None
    assert found.uneven is not None
    assert (found.worst.layer, found.uneven.layer) == (3, 3)
    assert found.needed(HIDDEN) == 100 * 64 - 100
    assert needed(part([64, 64])) == "each expert has at least 64 tokens, as many as its input has columns"


def test_a_model_without_experts_has_nothing_to_say() -> None:
    """No layer has experts: every figure is there, and no line is."""
    empty = part()
    assert (empty.seen, empty.median, empty.needed(HIDDEN), empty.worst, empty.tiers(HIDDEN)) == (
        *(0.0, 0.0, 0, None),
        (0, 0, 0, 0, 0),
    )
    assert Coverage(train=empty, validation=empty).lines() == []


def test_as_json_is_json() -> None:
    """Everything is a plain value, and layers keep their experts' counts in order."""
    found = Coverage(train=part([8, 92, 100]), validation=part([0, 10, 10], name="validation"))
    read = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert read["train"]["layers"][0]["tokens"] == [8, 92, 100]
    assert read["train"]["layers"][0]["sum_p2"] == [2.0, 23.0, 25.0]
    assert read["train"]["tokens_needed"] == {"gate_up": 700, "down": 100}
    assert read["validation"]["empty"] == 1
    assert read["train"]["width"] == {"gate_up": HIDDEN, "down": INNER}


def test_lines_say_it_in_words() -> None:
    """The lines name the counts, the worst expert with its layer, the lowest entropy and what is missing."""
    lines = Coverage(train=part([8, 92, 100], [0, 0, 200]), validation=part()).lines()
    assert lines[0] == "6 experts in 2 layers: 2 without a token, 2 below 5% and 2 below 10% of the mean"
    assert "median 50, least 0 (expert 0 of layer 2)" in lines[1]
    assert lines[2] == "entropy of the load: lowest 0.000, in layer 2"
    assert lines[3].startswith("for 64 tokens of each expert, as many as its input has columns: at least 2,034 tokens")


@given(COUNTS)
def test_entropy_is_a_share(tokens: list[int]) -> None:
    """It lies from 0 to 1, does not depend on the order of experts, and splitting the load evenly makes it 1."""
    found = load(tokens).entropy
    assert 0.0 <= found <= 1.0
    assert load(sorted(tokens)).entropy == pytest.approx(found)
    assert load([sum(tokens) + 1] * len(tokens)).entropy == pytest.approx(1.0)
    kept = sum(count > 0 for count in tokens)
    assert not kept or found <= log(kept) / log(len(tokens)) + 1e-9


@given(COUNTS, st.integers(1, 10**5), st.integers(1, 10**5))
def test_wider_inputs_need_more(tokens: list[int], one: int, other: int) -> None:
    """What is missing never falls with the width, and that many tokens of the same load are enough."""
    found = load(tokens)
    narrow, wide = sorted((one, other))
    assert found.needed(narrow) <= found.needed(wide)
    worst = tokens[found.worst]
    if worst and (more := found.needed(wide)):
        assert worst * (found.seen + more) / found.seen >= wide * (1 - 1e-12)
        assert worst * (found.seen + more - 1) / found.seen < wide * (1 + 1e-12)


@given(COUNTS, st.integers(0, 10**6))
def test_tokens_for_the_worst_lower_the_need(tokens: list[int], more: int) -> None:
    """An expert that is given tokens, all others as they were, leaves no more to be wished for."""
    before = load(tokens)
    better = list(tokens)
    better[before.worst] += more
    shares = [min(better) / sum(better) if any(better) else inf, min(tokens) / max(sum(tokens), 1)]
    if tokens[before.worst] and shares[0] >= shares[1]:
        assert load(better).needed(HIDDEN) <= before.needed(HIDDEN)


@given(st.lists(COUNTS, max_size=4), st.integers(1, 10**6))
def test_every_expert_is_in_one_tier(layers: list[list[int]], width: int) -> None:
    """The tiers of any width add up to the experts, and thin marks hold each other."""
    found = part(*layers)
    assert sum(found.tiers(width)) == found.experts
    assert found.empty == found.tiers(width)[0]
    assert found.thin(THINNEST) <= found.thin(THIN) <= found.experts
