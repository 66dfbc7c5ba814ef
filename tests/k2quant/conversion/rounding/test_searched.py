"""Conversions that search better scales than rounding's: which bytes come of it, what is judged by what, who resumes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import k2quant
from conftest import CONFIG, EXPERT, RARE, Making, hessian_of, spiky, write_stats
from k2quant.calib.stats.layout import Input, Part
from k2quant.calib.stats.reading import open_stats
from k2quant.checkpoint import panels
from k2quant.checkpoint.reader import CONFIG as CONFIG_FILE
from k2quant.checkpoint.reader import REPORT, open_checkpoint
from k2quant.checkpoint.reading import read_tensor
from k2quant.errors import CheckpointError, DestinationStale, UsageError
from k2quant.formats.dtypes import as_array
from k2quant.kernels.codecs import cpu
from k2quant.kernels.codecs.values import U16, bf16_to_float


def shards(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every shard."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def stored(folder: Path, name: str) -> NDArray[Any]:
    """Return a tensor of a checkpoint."""
    found = open_checkpoint(folder)
    entry = found.tensors[name]
    return as_array(np.frombuffer(read_tensor(found, entry), np.uint8), entry.spec)
