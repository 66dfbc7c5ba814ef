"""Keywords of other libraries are answered with ours."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

import k2quant
from k2quant.ground.saying.arguments import hinting


@pytest.mark.parametrize(
    ("function", "given", "said"),
    [
        ("load_model", {"torch_dtype": "bfloat16"}, "load_model() has no argument 'torch_dtype': it is `dtype` here"),
        ("load_model", {"device_map": "auto"}, "it is `device` here, and takes the same"),
        ("load_model", {"load_in_4bit": True}, "the checkpoint says how its weights are stored"),
        ("load_model", {"trust_remote_code": True}, "no code of the checkpoint is run"),
        ("load_model", {"devise": "cpu"}, "has no argument 'devise', did you mean 'device'?"),
        ("convert", {"format": "int4"}, "the format to write is `to`"),
        ("convert", {"dtype": "bf16"}, "the format to write is `to`, such as to='bf16'"),
        ("convert", {"overwrite": True}, "is `restart=True`"),
        ("convert", {"xyz": 1}, "has no argument 'xyz'; it has source, destination, to, "),
        ("merge", {"shardsize": 1}, "did you mean 'shard_size'?"),
        ("quantize", {"bits": 4}, "the format is `to`: int4 or fp8"),
    ],
)
def test_a_keyword_that_is_none_is_a_helpful_type_error(function: str, given: dict[str, Any], said: str) -> None:
    """Before anything is read: what it is called here, what was likely meant, or all there are."""
    with pytest.raises(TypeError) as caught:
        getattr(k2quant, function)("nowhere", "out", **given)
    assert said in str(caught.value)


def test_the_format_may_stand_without_its_name(k2_source: Path, tmp_path: Path) -> None:
    """`convert(source, destination, "int4")` works, as people write it."""
    assert k2quant.convert(k2_source, tmp_path / "out", "int4").report["options"]["to"] == "int4"


def test_functions_keep_their_signatures_and_words() -> None:
    """What help and editors show is the function itself; a call that is right, or lacks something, is as ever."""

    @hinting({})
    def work(first: int, *, second: int = 0) -> int:
        """Add."""
        return first + second

    assert (work.__doc__, str(inspect.signature(work))) == ("Add.", "(first: 'int', *, second: 'int' = 0) -> 'int'")
    assert work(1, second=2) == 3
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'first'"):
        work()  # type: ignore[call-arg]
    assert "recipe" in inspect.signature(k2quant.convert).parameters
