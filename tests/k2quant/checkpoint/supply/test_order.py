"""Pieces are fetched in the order of need, and each file's all, once, in the order of its hash."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from k2quant.checkpoint.supply.order import PIECE_BYTES, Step, Use, foreign_bytes, owners, steps

MB = 2**20


def walk(ranges: list[tuple[int, int]], size: int, *, hashed: bool = True) -> list[Step]:
    """Return the steps for ranges of one file."""
    return steps([("f", start, stop) for start, stop in ranges], {"f": size}, ["f"] if hashed else [])


@given(
    st.lists(st.tuples(st.integers(0, 60 * MB), st.integers(9, 20 * MB)), max_size=12),
    st.integers(1, 90 * MB),
)
def test_every_piece_is_hashed_once_in_order_and_needed_bytes_are_counted(
    found: list[tuple[int, int]], size: int
) -> None:
    """Whatever is read, in whatever order."""
    ranges = [(start, min(start + length, size)) for start, length in found if start + 8 < size]
    ranges = [(start, stop) for start, stop in ranges if stop - start > 8]
    made = walk(ranges, size)
    assert [step.number for step in made if step.hashed] == list(range(-(-size // PIECE_BYTES)))
    assert sum(step.needed for step in made) == sum(stop - start for start, stop in ranges)
    twice = Counter(step.number for step in made)
    assert set(twice.values()) <= {1, 2}
    first = {step.number: at for at, step in reversed(list(enumerate(made))) if step.needed}
    needed = list(dict.fromkeys(piece for a, b in ranges for piece in range(a // PIECE_BYTES, -(-b // PIECE_BYTES))))
    assert all(first[one] < first[two] for one, two in pairwise(needed))


def test_weights_behind_their_scales_are_hashed_as_they_come() -> None:
    """FP8: small scales, then weights. Nothing comes twice."""
    size = 100 * MB
    scales, weights = [(i * MB, (i + 1) * MB) for i in range(8)], [(8 * MB + i * 11 * MB,) for i in range(8)]
    ranges = [
        each for (start,), scale in zip(weights, scales, strict=True) for each in ((start, start + 11 * MB), scale)
    ]
    made = walk(ranges, size)
    assert len(made) == len({step.number for step in made}) + 1  # the piece of the scales, which came after its turn


def test_scales_behind_their_weights_come_twice_and_weights_do_not() -> None:
    """INT4: weights, then scales, which are needed long before it is their turn."""
    weights = [(i * 8 * MB, (i + 1) * 8 * MB) for i in range(16)]
    scales = [(128 * MB + i * MB, 128 * MB + (i + 1) * MB) for i in range(16)]
    made = walk([each for pair in zip(weights, scales, strict=True) for each in pair], 144 * MB)
    twice = Counter(step.number for step in made)
    assert {number for number, count in twice.items() if count == 2} <= {16, 17}
    assert [step.number for step in made if step.needed][:3] == [0, 16, 1]


def test_where_no_digest_is_known_only_what_is_needed_comes() -> None:
    """A bucket tells none: what nobody reads stays there."""
    assert [step.number for step in walk([(20 * MB, 30 * MB)], 100 * MB, hashed=False)] == [2, 3]


def test_one_number_for_a_matrix_does_not_keep_a_piece() -> None:
    """It may be read with every panel: nobody knows when it is read for the last time."""
    assert walk([(0, 4), (8 * MB, 9 * MB)], 9 * MB) == [Step("f", 0, 0, hashed=True), Step("f", 1, MB, hashed=True)]


def test_a_shard_is_proven_by_the_output_that_reads_most_of_it() -> None:
    """What others read of it is foreign to them."""
    uses = [Use("a", (("one", 0, 100), ("two", 0, 10))), Use("b", (("two", 10, 100), ("one", 100, 101)))]
    assert owners(uses) == {"one": "a", "two": "b"}
    assert foreign_bytes(uses, owners(uses)) == 11
