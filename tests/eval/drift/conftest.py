"""A nano-K2 with fresh weights, which no training has to make."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from k2quant.nano import architecture, writing


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A nano-K2 with fresh weights, in a folder where others may lie beside it."""
    folder = tmp_path_factory.mktemp("drift") / "base"
    folder.mkdir()
    torch.manual_seed(0)
    writing.write(folder, architecture.build(), {})
    return folder
