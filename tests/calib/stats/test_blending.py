"""How much a column matters: what own tokens and a prior come to, by numbers made by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from k2quant.calib.stats import blending
from k2quant.calib.stats.blending import LEAST_HELD_OUT, PRIOR_TOKENS, held_out
from k2quant.calib.stats.moments import Moments

E = "model.layers.1.mlp.experts"


def moments(*squares: float, tokens: int, mean: tuple[float, ...] | None = None) -> Moments:
    """Return moments of these mean squares."""
    means = np.array(mean if mean is not None else (0,) * len(squares), np.float32)
    return Moments(np.array(squares, np.float32), tokens, float(tokens), 10.0, means)


def importance(own: Moments, prior: Moments | None) -> list[float]:
    """Return blended mean squares as numbers."""
    found: list[float] = blending.importance(own, prior).tolist()
    return found


def test_as_many_tokens_as_the_prior_has_weigh_as_much() -> None:
    """With 32 tokens of its own an expert's columns lie in the middle between its own and the layer's."""
    assert PRIOR_TOKENS == 32
    own, layer = moments(1, 0, 8, tokens=32, mean=(1, 0, -2)), moments(3, 4, 0, tokens=999, mean=(0, 2, 0))
    assert importance(own, layer) == [2, 2, 4]
    assert blending.mean(own, layer).tolist() == [0.5, 1, -1]
    assert {blending.importance(own, layer).dtype, blending.mean(own, layer).dtype} == {np.dtype(np.float32)}


def test_three_times_as_many_weigh_three_times_as_much() -> None:
    """(96 * 1 + 32 * 5) / 128 is 2."""
    own, layer = moments(1, 4, tokens=96, mean=(1, 2)), moments(5, 0, tokens=1, mean=(-1, 0))
    assert importance(own, layer) == [2, 3]
    assert blending.mean(own, layer).tolist() == [0.5, 1.5]


def test_an_expert_without_tokens_has_the_layers() -> None:
    """What gate and up of other experts see is the best guess."""
    layer = moments(3, 4, tokens=9, mean=(1, -1))
    assert importance(moments(0, 0, tokens=0), layer) == [3, 4]
    assert blending.mean(moments(0, 0, tokens=0), layer).tolist() == [1, -1]


def test_the_prior_of_down_is_flat_at_its_own_mean() -> None:
    """A column of one expert's intermediate says nothing of the same column of another's."""
    own = moments(1, 3, tokens=32, mean=(1, -1))
    assert importance(own, None) == [1.5, 2.5]
    assert blending.mean(own, None).tolist() == [0.5, -0.5]


def test_a_down_without_tokens_has_ones() -> None:
    """Which is plain squared error."""
    assert importance(moments(0, 0, tokens=0), None) == [1, 1]
    assert blending.mean(moments(0, 0, tokens=0), None).tolist() == [0, 0]


@given(
    st.integers(0, 10**7),
    st.lists(st.tuples(st.floats(0, 2**90, width=32), st.floats(-1, 1, width=32)), min_size=2, max_size=6),
    st.booleans(),
)
def test_a_blend_lies_between_what_it_is_made_of(tokens: int, found: list[tuple[float, float]], flat: bool) -> None:  # noqa: FBT001
    """Whatever the counts; and the variance that it leaves is negative by no more than rounding."""
    squares = [square for square, _ in found]
    means = tuple(float(np.sqrt(square)) * part for square, part in found)
    own = moments(*squares, tokens=tokens, mean=means)
    layer = moments(*squares[::-1], tokens=5, mean=means[::-1])
    other = np.full_like(own.mean_square, own.mean_square.mean(dtype=np.float64) if tokens else 1)
    other = other if flat else layer.mean_square
    low, high = np.minimum(own.mean_square, other), np.maximum(own.mean_square, other)
    blend, mean = (f(own, None if flat else layer).astype(np.float64) for f in (blending.importance, blending.mean))
    assert (blend >= low * (1 - 1e-6)).all()
    assert (blend <= high * (1 + 1e-6)).all()
    assert (mean**2 <= blend * (1 + 1e-5) + 1e-35).all()


@pytest.mark.parametrize(("tokens", "few"), [(LEAST_HELD_OUT, False), (LEAST_HELD_OUT - 1, True), (0, True)])
def test_below_64_held_out_tokens_a_matrix_is_judged_on_the_blend(tokens: int, *, few: bool) -> None:
    """And the count says so; from 64 on its own tokens alone judge it."""
    assert LEAST_HELD_OUT == 64
    own = moments(*((2, 6) if tokens else (0, 0)), tokens=tokens)
    prior = moments(1, 1, tokens=5, mean=(0.5, -1))
    found = held_out(own, prior, routed=True)
    assert (found.tokens, found.blended) == (tokens, few)
    assert found.values.tolist() == (importance(own, prior) if few else own.mean_square.tolist())
    assert found.mean.tolist() == (blending.mean(own, prior) if few else own.mean).tolist()


def test_what_every_token_passes_has_no_prior() -> None:
    """Few tokens are said to be few, and blended with nothing."""
    found = held_out(moments(2, 6, tokens=3), None, routed=False)
    assert (found.values.tolist(), found.blended) == ([2, 6], True)


@pytest.fixture(scope="module")
def stats(standing: Any) -> Any:
    """Return statistics of 600 tokens, 60 of them held out besides."""
    return standing.stats("blending", empty=3)


class TestOfAFolder:
    """The same through `Stats`, whose layer 1 has four experts, the last of them without a token."""

    def test_gate_and_up_are_drawn_to_the_layer(self, stats: Any) -> None:
        """By the train part; both have one vector."""
        own, layer = stats.moments(f"{E}.0.up_proj"), stats.layer_moments(f"{E}.0.up_proj")
        assert layer.tokens == 600
        assert 0 < own.tokens < 600
        assert stats.importance(f"{E}.0.up_proj").tolist() == importance(own, layer)
        assert stats.mean(f"{E}.0.up_proj").tolist() == blending.mean(own, layer).tolist()
        assert stats.importance(f"{E}.0.gate_proj").tolist() == stats.importance(f"{E}.0.up_proj").tolist()
        assert stats.importance(f"{E}.3.gate_proj").tolist() == layer.mean_square.tolist()

    def test_down_is_drawn_to_its_own_mean(self, stats: Any) -> None:
        """No layer has moments for it."""
        own = stats.moments(f"{E}.0.down_proj")
        assert stats.layer_moments(f"{E}.0.down_proj") is None
        assert stats.importance(f"{E}.0.down_proj").tolist() == importance(own, None)
        assert stats.mean(f"{E}.0.down_proj").tolist() == blending.mean(own, None).tolist()
        assert stats.importance(f"{E}.3.down_proj").tolist() == [1] * 32

    def test_attention_is_drawn_to_nothing(self, stats: Any) -> None:
        """kv_a has the input of q_a."""
        own = stats.moments("model.layers.0.self_attn.q_a_proj")
        assert stats.importance("model.layers.0.self_attn.kv_a_proj_with_mqa").tolist() == own.mean_square.tolist()
        assert stats.mean("model.layers.0.self_attn.kv_a_proj_with_mqa").tolist() == own.mean.tolist()

    def test_the_judge_is_the_validation_part(self, stats: Any) -> None:
        """Its 60 tokens are too few for an expert, and for attention; the layer's own of that part are the prior."""
        found = stats.held_out(f"{E}.0.gate_proj")
        own, layer = (f(f"{E}.0.gate_proj", "validation") for f in (stats.moments, stats.layer_moments))
        assert layer.tokens == 60
        assert (found.tokens, found.blended) == (own.tokens, True)
        assert found.values.tolist() == importance(own, layer)
        assert found.mean.tolist() == blending.mean(own, layer).tolist()
        attention = "model.layers.1.self_attn.o_proj"
        assert stats.held_out(attention).values.tolist() == stats.moments(attention, "validation").mean_square.tolist()

    @pytest.mark.parametrize(
        "base", ["lm_head", "model.layers.1.mlp.gate", "model.layers.9.self_attn.o_proj", f"{E}.4.up_proj"]
    )
    def test_what_was_not_measured_is_none(self, stats: Any, base: str) -> None:
        """The head, a router, a layer or an expert that the model has not."""
        found = [stats.moments(base), stats.importance(base), stats.held_out(base), stats.layer_moments(base)]
        assert found == [None] * 4
        assert stats.mean(base) is None
        assert stats.hessian(base) is None

    def test_the_load_is_what_coverage_counts(self, stats: Any) -> None:
        """Tokens and weights of a layer's experts; None for a dense layer."""
        tokens, weight = stats.load(1, "train")
        assert (tokens.sum(), tokens[3]) == (2 * 600, 0)
        assert weight.tolist() == (tokens * 0.25).tolist()
        assert stats.load(0) is None
        assert stats.load(2) is None

    def test_nobody_can_change_what_was_read(self, stats: Any) -> None:
        """Arrays are read-only, for they are shared."""
        with pytest.raises(ValueError, match="read-only"):
            stats.moments("model.layers.0.self_attn.o_proj").mean_square[0] = 1
