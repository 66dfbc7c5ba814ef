"""The codecs of every device, for tests that hold all of them to one rule."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest
import torch

from k2quant.kernels.codecs import cpu
from k2quant.kernels.codecs.reference.seam import torch_codecs
from k2quant.kernels.codecs.seam import Codecs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def on_gpu() -> Codecs:
    """Return the Triton codecs, interpreted where there is no GPU."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton")
    from k2quant.kernels.codecs.gpu.seam import cuda_codecs

    return cuda_codecs(DEVICE)


MAKERS: dict[str, Callable[[], Codecs]] = {
    "cpu": lambda: cpu.CODECS,
    "torch": lambda: torch_codecs(DEVICE),
    "triton": on_gpu,
}
EACH = pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
