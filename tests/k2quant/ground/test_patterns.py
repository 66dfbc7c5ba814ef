"""Patterns of --ignore that are found nowhere."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import pytest

import k2quant
from k2quant.errors import UsageError
from k2quant.ground.patterns import check_found, may_take_for_ever

NOWHERE = {
    "a typo": (r"kv_b_porj", r"nearest names are `model\.layers\.\d+\.self_attn\.kv_b_proj`"),
    "a typo in a path": (r"mlp\.shared_expert\.", r"nearest names are `model\.layers\.\d\.mlp\.shared_experts\."),
    "a layer too far": (r"layers\.61\.self_attn\.o_proj", r"nearest names are `model\.layers\.2\.self_attn\.o_proj`"),
    "copied from an ignore list": (r"re:.*self_attn.*", r"`re:` belongs to the ignore list of a config"),
    "a full name": (r"model\.layers\.0\.self_attn\.o_proj\.weight$", r"without their last part, such as `\.weight`"),
    "a partner's name": (r"o_proj.weight_packed", r"without their last part"),
    "no name at all": ("#" * 5000, "nearest names are"),
}


@pytest.mark.parametrize("kind", NOWHERE)
def test_a_pattern_that_is_found_in_no_name_is_an_error(k2_source: Path, tmp_path: Path, kind: str) -> None:
    """A pattern that matches nothing would quantise what it was meant to spare: the nearest names are said instead."""
    pattern, said = NOWHERE[kind]
    with pytest.raises(UsageError, match=rf"`ignore=` .* is found in no name; .*{said}") as caught:
        k2quant.convert(k2_source, tmp_path / "out", to="int4", ignore=("o_proj", pattern))
    assert len(str(caught.value)) < 1000
    assert not (tmp_path / "out").exists()


def test_a_pattern_that_spares_what_is_quantised_already_says_so(k2_thinking: Path, tmp_path: Path) -> None:
    """What is out of scope is copied, INT4 as INT4: whoever wanted BF16 there is told that it is none, and how."""
    done = k2quant.convert(k2_thinking, tmp_path / "out", to="int4", ignore=(r"layers\.1\.",))
    (said,) = done.report["remarks"]
    assert re.search(r"`ignore=` spares `model\.layers\.1\.mlp\.experts\..*\(48 such\).*bf16 first", said)
    assert not k2quant.convert(k2_thinking, tmp_path / "fp8", to="fp8", ignore=(r"layers\.1\.",)).report["remarks"]


def test_what_is_out_of_scope_and_stays_quantised_is_said(k2_source: Path, tmp_path: Path) -> None:
    """FP8 attention of a source stays FP8 where only the experts were asked for: nobody need find that out later."""
    (said,) = k2quant.convert(k2_source, tmp_path / "out", to="fp8", scope="experts").report["remarks"]
    assert re.search(r"is out of scope and stays quantised as in the source \(\d+ such\).*convert to bf16 first", said)
    assert not k2quant.convert(k2_source, tmp_path / "all", to="fp8").report["remarks"]


@pytest.mark.parametrize("pattern", ["lm_head", r"mlp\.gate$", r"layers\.0\.", "norm", "embed"])
def test_a_pattern_of_what_no_scope_takes_is_found(k2_source: Path, tmp_path: Path, pattern: str) -> None:
    """Whoever spares what is spared anyway has named something that is there: no error."""
    assert k2quant.convert(k2_source, tmp_path / "out", to="int4", ignore=(pattern,)).report["options"]["ignore"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a" * 500, False),
        ("a" * 501, True),
        (r"(ab)", False),
        (r"(ab)*", True),
        (r"(ab){2}", True),
        (r"re:.*a.*b.*", False),
        (r"re:.*a.+b.*c{2}", True),
        (r"\*\*\+\{\*", False),
        (r"\\+\\+\\+\\+", True),
        (r"[*+{][]*+]\)+", False),
        (".?" * 40, True),
        ("}?" * 40, True),
        ("(?:.|.)" * 40, True),
        ("((.?)?)?" * 10, True),
        ("(?x)(a+) +b", True),
        ("(?ix:(a+)\t*b)", True),
        ("(?#[)" + ".?" * 40 + "]", True),
        ("a|" * 40 + "a", False),
        (r"layers\.([0-9]|[1-5][0-9]|60)\.mlp\.experts?\.\d+\.(?:gate|up|down)_proj$", False),
        (r"re:.*self_attn.*?(q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj).*", False),
    ],
)
def test_patterns_of_a_file_that_might_never_end_are_told(pattern: str, expected: bool) -> None:  # noqa: FBT001  a parameter of the test
    """A long one, one that repeats a group or more than three letters, or has many ways through; escapes are none."""
    assert may_take_for_ever(pattern) is expected


def advice(pattern: str, *bases: str) -> list[str]:
    """Return the names that a pattern which is found nowhere is answered with."""
    with pytest.raises(UsageError) as caught:
        check_found([re.compile(pattern)], bases, "ignore")
    return re.findall(r"`([^`]*)`", str(caught.value))


def test_advice_looks_at_the_first_thousand_kinds_of_names() -> None:
    """However many names there are: the thousandth is found, the next is not."""
    bases = ["".join(letters) for letters in product("abcdefghij", repeat=3)][:999]
    assert advice("zzyzxx", *bases, "zzyzx", "qwerty") == ["zzyzx"]
    assert "qwerty" not in advice("qwertyy", *bases, "zzyzx", "qwerty")


def test_advice_names_two_names_at_most() -> None:
    """The two that are most like a strange word, or, where no word is, those that are most like the whole."""
    assert advice("gate_projx", "a.gate_pr", "b.gate_proj", "c.gate_pro", "d.norm") == ["b.gate_proj", "c.gate_pro"]
    assert advice("gate_projx", "gate_proj.gate_pro", "c.gate_pr") == ["gate_proj.gate_pro"]  # both words are its own
    assert advice("norms", "a.norm", "b.bias", "c.0.gate") == ["a.norm"]
    assert advice("norm.layer", "layer.norm", "layer.bias", "zzzz") == ["layer.norm", "layer.bias"]
    assert advice("layers.7", "layers.6.gate", "layers.12.gate") == ["layers.12.gate"]  # numbers are no strange words


def test_advice_looks_at_the_first_four_strange_words() -> None:
    """A name of many words that nothing has costs no more."""
    assert advice("qqqq.wwww.zzzz.gat", "gate", "qwzx") == ["gate"]
    assert advice("qqqq.wwww.zzzz.xxxx.gat", "gate", "qwzx") == ["qwzx", "gate"]  # by the whole


def test_a_pattern_is_shown_with_its_first_letters() -> None:
    """Two hundred of them, the quote among them."""
    with pytest.raises(UsageError) as caught:
        check_found([re.compile("#" * 500)], ["lm_head"], "`ignore=`")
    assert str(caught.value).startswith(f"`ignore=` '{'#' * 199} is found in no name")
