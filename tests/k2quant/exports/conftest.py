"""What tests of all exports share: the small K2 in formats that conftest.py above has not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from k2quant.conversion.convert import convert


@pytest.fixture(scope="session")
def fp4(k2_bf16: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The small K2 in both kinds of FP4, and in NVFP4 with a scale of the inputs by compressed-tensors' names."""
    home = tmp_path_factory.mktemp("fp4")
    made = {name: convert(k2_bf16, home / name, to=name).folder for name in ("mxfp4", "nvfp4")}
    more: dict[str, Any] = {"layout": "compressed-tensors", "activation_scales": "one"}
    return made | {"nvfp4 divided": convert(k2_bf16, home / "divided", to="nvfp4", **more).folder}
