"""Conversions that ask for no data write the bytes that they wrote before codes could be solved."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

import k2quant

WRITTEN = [
    ({"to": "int4"}, "6601a67fd27d42ff"),
    ({"to": "int4", "scope": "projections"}, "e1ed84fda87f9c48"),
    ({"to": "int4", "grid": "compressed-tensors"}, "063799300b504dbc"),
    ({"to": "int4", "method": "mse"}, "1cabb454868840fe"),
    ({"to": "bf16"}, "79cb7b9522d503db"),
]
"""Options, and the first digits of the sha256 of all shards, headers too: as they were before there was GPTQ."""


@pytest.mark.parametrize(("options", "digest"), WRITTEN)
def test_shards_are_byte_for_byte_what_they_were(
    k2_source: Path, tmp_path: Path, options: dict[str, Any], digest: str
) -> None:
    """Of one checkpoint, from a fixed seed: new methods changed nothing for whoever does not ask for them."""
    place = k2quant.convert(k2_source, tmp_path / "out", **options).folder
    found = hashlib.sha256()
    for shard in sorted(place.glob("*.safetensors")):
        found.update(shard.read_bytes())
    assert found.hexdigest()[:16] == digest
