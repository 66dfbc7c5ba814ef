"""Write a checkpoint that lies in memory: small models, a shard at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from k2quant.checkpoint.files.paths import write_whole
from k2quant.checkpoint.header import build_header
from k2quant.checkpoint.reader import CONFIG, INDEX
from k2quant.checkpoint.writing.writer import ShardWriter
from k2quant.formats.dtypes import TensorSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

Shard = dict[str, tuple[str, "NDArray[Any]"]]
"""Tensors of one shard: name to dtype (as safetensors names it) and array; BF16 and FP8 as bit patterns."""


def write_checkpoint(folder: Path, shards: Mapping[str, Shard], config: Mapping[str, Any] | None) -> None:
    """Write shards, an index and a config; each file is whole or not there, and the config comes last.

    Args:
        folder: where; it is made if need be.
        shards: the tensors of each shard, by its file name.
        config: what config.json holds; None for no config.

    Raises:
        OSError: the disk is full or fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    total = sum(_write_shard(folder / file, tensors) for file, tensors in shards.items())
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_whole(folder / INDEX, json.dumps(index, indent=2).encode())
    if config is not None:
        write_whole(folder / CONFIG, json.dumps(config, indent=2).encode())


def _write_shard(path: Path, tensors: Shard) -> int:
    """Write one shard; return the bytes of its tensors."""
    specs = {name: TensorSpec(dtype, array.shape) for name, (dtype, array) in tensors.items()}
    header, spans = build_header(specs)
    total = sum(spec.nbytes for spec in specs.values())
    writer = ShardWriter(path, header, len(header) + total)
    try:
        for name, (start, _) in spans.items():
            writer.write(start, memoryview(tensors[name][1].tobytes()))
        writer.finish()
    finally:
        writer.close()
    return total
