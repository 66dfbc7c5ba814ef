"""Small checkpoints under other names and configs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from k2quant.checkpoint.reader import open_checkpoint
from k2quant.checkpoint.reading import read_tensor
from k2quant.checkpoint.writing.in_memory import Shard, write_checkpoint
from k2quant.formats.dtypes import TensorSpec, as_array


def respelled(
    source: Path,
    folder: Path,
    rename: Callable[[str], str] = str,
    *,
    more: Shard | None = None,
    **config: Any,
) -> Path:
    """Write a checkpoint again with other names, and with changes to its config.

    Args:
        source: a small checkpoint.
        folder: where the other one goes.
        rename: the new name of each tensor.
        more: tensors to add.
        config: keys to change.
    """
    read = open_checkpoint(source)
    shard: Shard = {}
    for name, entry in read.tensors.items():
        spec = TensorSpec(entry.dtype, entry.shape)
        shard[rename(name)] = (entry.dtype, as_array(np.frombuffer(read_tensor(read, entry), np.uint8), spec))
    write_checkpoint(folder, {"model.safetensors": shard | (more or {})}, {**(read.config or {}), **config})
    return folder
