"""Pairs as they are typed: what stands there is what comes out, and a slip repeats no secret."""

from __future__ import annotations

import json
from typing import Any

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from k2quant.cli.eval.arguments import headers, model_args


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("tensor_parallel_size=8", {"tensor_parallel_size": 8}),
        ("gpu_memory_utilization=0.9, seed=1e3", {"gpu_memory_utilization": 0.9, "seed": 1000.0}),
        ("a=true,b=False,c=None,d=null", {"a": True, "b": False, "c": None, "d": None}),
        ("--pipeline-parallel-size=2", {"pipeline_parallel_size": 2}),
        ("kv_cache_dtype=fp8,q=a=b,r=", {"kv_cache_dtype": "fp8", "q": "a=b", "r": ""}),
        ('a={"x": [1, 2], "y": "},"},b="1,2"', {"a": {"x": [1, 2], "y": "},"}, "b": "1,2"}),
        ("a=[1,2],b=3", {"a": [1, 2], "b": 3}),
        ("a=NaN,b=007,c=-1,d=1_0", {"a": "NaN", "b": "007", "c": -1, "d": "1_0"}),
    ],
)
def test_values_have_the_type_that_was_meant(text: str, found: dict[str, Any]) -> None:
    """Numbers, true, false, none, JSON; all else is text. Commas within brackets and quotes part nothing."""
    typed = model_args((text,))
    assert typed == found
    assert {name: type(value) for name, value in typed.items()} == {name: type(found[name]) for name in found}


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.from_regex(r"[a-z_]{1,9}", fullmatch=True), _JSON, max_size=4))
def test_json_comes_out_as_it_went_in(values: dict[str, Any]) -> None:
    """Whatever JSON is typed, in one option or in several."""
    pairs = [f"{name}={json.dumps(value)}" for name, value in values.items()]
    assert model_args(tuple(pairs)) == values
    assert model_args((",".join(pairs),) if pairs else ()) == values


@pytest.mark.parametrize("text", ["", "sk-secret", "=sk-secret", "a b=sk-secret", 'a={"sk-secret', "a=1,a=sk-secret"])
def test_a_slip_is_refused_without_its_value(text: str) -> None:
    """No pair, no name, no JSON, or one name twice."""
    with pytest.raises(click.UsageError) as caught:
        model_args((text,))
    assert caught.value.message.startswith("--model-args: ")
    assert "secret" not in caught.value.message


def test_headers_name_variables() -> None:
    """An equals sign parts them."""
    assert headers(("Authorization=MY_KEY", "X-Team=TEAM")) == {"Authorization": "MY_KEY", "X-Team": "TEAM"}


@pytest.mark.parametrize("pair", ["Authorization: Bearer sk-secret", "sk-secret", "X: sk-secret="])
def test_a_header_with_its_value_is_refused(pair: str) -> None:
    """As curl has it: the value would stand in the shell's history, and is not shown once more."""
    with pytest.raises(click.UsageError) as caught:
        headers((pair,))
    assert "secret" not in caught.value.message
    with pytest.raises(click.UsageError, match="twice"):
        headers(("X-Team=A", "x-team=B"))
