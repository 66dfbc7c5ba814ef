"""What tests of all exports share: the small K2 in formats that conftest.py above has not."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path
from typing import Any

import pytest

from k2quant.checkpoint.reader import open_checkpoint
from k2quant.conversion.convert import convert


@pytest.fixture(scope="session")
def fp4(k2_bf16: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The small K2 in both kinds of FP4; in NVFP4 with a scale of the inputs, and with ones for scales of wholes."""
    home = tmp_path_factory.mktemp("fp4")
    made = {name: convert(k2_bf16, home / name, to=name).folder for name in ("mxfp4", "nvfp4")}
    more: dict[str, Any] = {"layout": "compressed-tensors", "activation_scales": "one"}
    made["nvfp4 divided"] = convert(k2_bf16, home / "divided", to="nvfp4", **more).folder
    made["nvfp4 of ones"] = Path(shutil.copytree(made["nvfp4"], home / "ones"))
    source = open_checkpoint(made["nvfp4 of ones"])
    for name, entry in source.tensors.items():
        if name.endswith("weight_scale_2"):
            with source.path(entry.file).open("r+b") as file:
                file.seek(entry.start)
                file.write(struct.pack("<f", 1.0))
    return made
