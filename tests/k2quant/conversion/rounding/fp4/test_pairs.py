"""From every format to every format: what comes out directly is what comes out by way of BF16, or stays as it is."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pytest

import k2quant
from k2quant.checking.comparison import compare
from k2quant.errors import BadValue
from k2quant.formats.known import FORMATS

KINDS: dict[str, dict[str, Any]] = {
    "bf16": {"to": "bf16"},
    "fp8": {"to": "fp8"},
    "int4": {"to": "int4"},
    "mxfp4": {"to": "mxfp4"},
    "nvfp4": {"to": "nvfp4"},
    "nvfp4-ct": {"to": "nvfp4", "layout": "compressed-tensors"},
}
"""What `convert` is asked for, by a name of each format and layout."""

FP4 = ("mxfp4", "nvfp4", "nvfp4-ct")
NVFP4 = FP4[1:]
PAIRS = [
    (a, b)
    for a, b in product(KINDS, KINDS)
    if a != b and (a in FP4 or b in FP4) and not (b in NVFP4 and a in FP4)  # there codes are carried over
]


def shards(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every shard."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


@pytest.fixture(scope="session")
def kinds(small_bf16: Path) -> Mapping[str, Path]:
    """Folders of the small K2 in each format, all made of its BF16. Not to be changed by a test."""
    here = small_bf16.parent
    made = {name: k2quant.convert(small_bf16, here / f"as-{name}", **asked).folder for name, asked in KINDS.items()}
    return made | {"bf16": small_bf16}


def asked_for(kind: str) -> dict[str, Any]:
    """Return what `convert` is asked for; plain rounding, for a search has no BF16 to go by."""
    asked = KINDS[kind]
    return asked | ({"method": "rtn"} if FORMATS[asked["to"]].searches else {})


@pytest.fixture(scope="session")
def pivots(kinds: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """What each of the folders means, in BF16."""
    here = tmp_path_factory.mktemp("pivots")
    return {name: k2quant.convert(folder, here / name, "bf16").folder for name, folder in kinds.items()}


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_directly_as_by_way_of_bf16(
    kinds: Mapping[str, Path], pivots: Mapping[str, Path], tmp_path: Path, source: str, target: str
) -> None:
    """Both ways give the same shards, byte for byte, and the direct one is verified."""
    asked = asked_for(target)
    direct = k2quant.convert(kinds[source], tmp_path / "direct", **asked).folder
    by_way = k2quant.convert(pivots[source], tmp_path / "by-way", **asked).folder
    assert shards(direct) == shards(by_way)
    assert k2quant.verify(kinds[source], direct).passed


def carried(source: Path, folder: Path, kind: str, **more: Any) -> Path:
    """Convert, and see that as BF16 nothing differs, and that the report says of nothing lost."""
    done = k2quant.convert(source, folder, **KINDS[kind], **more)
    found = {each.relation for each in compare(source, done.folder, workers=1)}
    assert found <= {"bit-equal", "codes equal", "values equal"}
    assert all(facts.get("figures", {}).get("changed", 0) == 0 for facts in done.report["tensors"].values())
    assert k2quant.verify(source, done.folder).passed
    return done.folder


def test_codes_of_mxfp4_are_carried_over(kinds: Mapping[str, Path], tmp_path: Path) -> None:
    """To NVFP4 in either layout, from one layout to the other and back every value stays, and at the end every byte."""
    here = carried(kinds["mxfp4"], tmp_path / "modelopt", "nvfp4")
    there = carried(kinds["mxfp4"], tmp_path / "ct", "nvfp4-ct")
    assert shards(carried(here, tmp_path / "there", "nvfp4-ct")) == shards(there)
    assert shards(carried(there, tmp_path / "here", "nvfp4")) == shards(here)


def test_a_tensor_scale_without_another_form_is_refused_by_name_or_rounded(
    kinds: Mapping[str, Path], tmp_path: Path
) -> None:
    """A scale whose mantissa has no inverse keeps its layout, if nobody allows the nearest: not a shard is begun."""
    with pytest.raises(BadValue, match=r"weight_scale_2.*form of compressed-tensors.*`allow_rounding=True`"):
        k2quant.convert(kinds["nvfp4"], tmp_path / "refused", **KINDS["nvfp4-ct"])
    assert not list((tmp_path / "refused").rglob("*.safetensors*"))
    done = k2quant.convert(kinds["nvfp4"], tmp_path / "out", **KINDS["nvfp4-ct"], allow_rounding=True)
    assert k2quant.verify(kinds["nvfp4"], done.folder).passed


@pytest.mark.parametrize("kind", FP4)
def test_a_checkpoint_that_is_cut_anew_keeps_its_tensors(kinds: Mapping[str, Path], tmp_path: Path, kind: str) -> None:
    """In shards of another size every tensor has the bytes that it had, and what is asked for twice is written once."""
    done = k2quant.convert(kinds[kind], tmp_path / "out", shard_size=200_000, **KINDS[kind])
    assert {each.relation for each in compare(kinds[kind], done.folder, workers=1)} == {"bit-equal", "codes equal"}
    assert len(shards(done.folder)) > len(shards(kinds[kind]))
    assert k2quant.convert(kinds[kind], tmp_path / "out", shard_size=200_000, **KINDS[kind]).already_done
