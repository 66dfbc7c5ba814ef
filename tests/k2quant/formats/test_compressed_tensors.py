"""The block of compressed-tensors: which group names its modules, which packing is read, and what is ignored."""

from __future__ import annotations

import re
from typing import Any

import pytest

from k2quant.errors import MalformedFile, UnsupportedFormat
from k2quant.formats.configs.compressed_tensors import block, ignore_list, scheme, schemes
from k2quant.formats.format import Format
from k2quant.formats.int4 import Int4

EXPERT = "model.layers.1.mlp.experts.{}.up_proj"
KNOWN = {"pack-quantized": "INT4", "int-quantized": "INT8"}


class Other(Int4):
    """A format that is packed otherwise."""

    __slots__ = ()
    packing = "int-quantized"


def test_the_largest_group_is_every_linear_and_the_others_name_their_modules() -> None:
    """Sorted, wherever the largest stands; with two packings each group says its own."""
    few, many = [EXPERT.format(2), EXPERT.format(1)], [EXPERT.format(n) for n in (3, 4, 5)]
    orders: list[list[tuple[Format, list[str]]]] = [[(Int4(), few), (Other(), many)], [(Int4(), many), (Other(), few)]]
    for groups in orders:
        found = block(groups, [])
        made = found["config_groups"]
        targets = [made[f"group_{number}"]["targets"] for number in (0, 1)]
        assert targets[0 if groups[0][1] is few else 1] == sorted(few)
        assert targets[1 if groups[0][1] is few else 0] == ["Linear"]
        assert [made[f"group_{number}"]["format"] for number in (0, 1)] == ["pack-quantized", "int-quantized"]
        assert found["format"] == "mixed-precision"


def test_groups_of_one_packing_say_it_once() -> None:
    """In the block, and not in each group; the first of two equal ones is every linear."""
    found = block([(Int4(), [EXPERT.format(0)]), (Int4(group=64), [EXPERT.format(1)])], [])
    assert found["format"] == "pack-quantized"
    assert all("format" not in group for group in found["config_groups"].values())
    assert found["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert found["config_groups"]["group_1"]["weights"]["group_size"] == 64


def test_a_scheme_without_a_group_size_has_a_scale_for_each_row() -> None:
    """That is its strategy; what nothing here uses is said to be so."""
    found = scheme(group_size=None, num_bits=8, symmetric=True, type="int")
    assert (found["strategy"], found["group_size"], found["num_bits"], found["symmetric"]) == ("channel", None, 8, True)
    assert (found["dynamic"], found["actorder"], found["block_structure"]) == (False, None, None)
    assert scheme(group_size=32, num_bits=4, symmetric=False, type="int")["strategy"] == "group"


WEIGHTS: dict[str, Any] = {"num_bits": 4}


def test_each_group_of_a_mixed_block_has_its_packing() -> None:
    """Of a plain block all have the block's, and one that says otherwise is refused; without any it is packed."""
    groups = {
        "a": {"weights": WEIGHTS, "format": "int-quantized"},
        "b": {"weights": WEIGHTS, "format": "pack-quantized"},
    }
    mixed = {"format": "mixed-precision", "config_groups": groups}
    assert [packing for packing, _ in schemes(mixed, KNOWN)] == ["int-quantized", "pack-quantized"]
    for plain in ({"format": "pack-quantized"}, {}):
        alike = {name: {"weights": WEIGHTS} | ({"format": "pack-quantized"} if name == "b" else {}) for name in groups}
        assert list(schemes(plain | {"config_groups": alike}, KNOWN)) == [("pack-quantized", WEIGHTS)] * 2
        with pytest.raises(UnsupportedFormat, match="the format of a config group"):
            list(schemes(plain | {"config_groups": groups}, KNOWN))


@pytest.mark.parametrize("packing", ["naive-quantized", None, 5, ["pack-quantized"]])
def test_codes_that_are_packed_otherwise_are_refused(packing: Any) -> None:
    """In the block, and in a group of a mixed one; the message names what is read."""
    groups = {"a": {"weights": WEIGHTS, "format": packing}}
    for content in (
        {"format": packing, "config_groups": groups},
        {"format": "mixed-precision", "config_groups": groups},
    ):
        with pytest.raises(UnsupportedFormat, match=r"pack-quantized \(INT4\) or int-quantized \(INT8\)"):
            list(schemes(content, KNOWN))


@pytest.mark.parametrize("groups", [None, [], {}, "all"])
def test_a_block_without_groups_is_malformed(groups: Any) -> None:
    """Nothing says what is quantised."""
    with pytest.raises(MalformedFile, match="no config_groups"):
        list(schemes({"config_groups": groups}, KNOWN))


@pytest.mark.parametrize("group", [None, [], {}, {"weights": None}, {"weights": 4}])
def test_a_group_without_weights_is_malformed(group: Any) -> None:
    """It says nothing, even beside one that does."""
    with pytest.raises(MalformedFile, match="no weights"):
        list(schemes({"config_groups": {"a": {"weights": WEIGHTS}, "b": group}}, KNOWN))


def covered(ignored: list[str], base: str) -> bool:
    """Tell whether a list covers a module, as compressed-tensors reads it."""
    return any(
        re.match(entry.removeprefix("re:"), base) if entry.startswith("re:") else entry == base for entry in ignored
    )


def test_what_is_kept_is_ignored_and_what_is_quantised_is_not() -> None:
    """By a pattern of the release where it is right for these names, else by its name; embeddings are no Linear."""
    attention, dense = "model.layers.0.self_attn.o_proj", "model.layers.0.mlp.up_proj"
    kept = ["model.embed_tokens", attention, "lm_head", "model.odd_one"]
    found = ignore_list([EXPERT.format(0), dense], kept)
    assert found == ["re:.*self_attn.*", "re:.*lm_head.*", "model.odd_one"]
    assert all(covered(found, base) for base in kept[1:])
    assert not any(covered(found, base) for base in (EXPERT.format(0), dense))


def test_a_pattern_that_would_cover_a_quantised_matrix_is_left_out() -> None:
    """Where some of the attention is quantised, the rest stands by name."""
    kept = ["model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.q_proj"]
    assert ignore_list(["model.layers.1.self_attn.o_proj"], kept) == kept
