"""Write small checkpoints, and what `k2quant export mlx` makes of them, for `mlx_oracles.py` to look at.

Usage: python benchmarks/suites/exports/mlx_sources.py FOLDER [CHECKPOINT]

CHECKPOINT is a K2 to take in place of the small one with weights by chance, such as one that `k2quant nano` trained.
FOLDER then holds, for each of INT4, MXFP4 and NVFP4: the checkpoint, its export, and its values as BF16.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from k2quant.checkpoint.reader import CONFIG, open_checkpoint
from k2quant.checkpoint.reading import read_tensor
from k2quant.checkpoint.writing.in_memory import Shard, write_checkpoint
from k2quant.conversion.convert import convert
from k2quant.exports import export_mlx
from k2quant.formats.dtypes import TensorSpec, as_array
from k2quant.formats.known import FormatName
from k2quant.nano.demo import write_k2

FORMATS: tuple[FormatName, ...] = ("int4", "mxfp4", "nvfp4")


def as_k25(source: Path, folder: Path) -> Path:
    """Write a checkpoint with the names of K2.5, and its config, without a vision tower."""
    import numpy as np

    opened = open_checkpoint(source)
    shards: dict[str, Shard] = {}
    for name, entry in opened.tensors.items():
        data = np.frombuffer(read_tensor(opened, entry), np.uint8)
        array = as_array(data, TensorSpec(entry.dtype, entry.shape))
        shards.setdefault(entry.file, {})[f"language_model.{name}"] = (entry.dtype, array)
    text = json.loads((source / CONFIG).read_text())
    config = {"architectures": ["KimiK25ForConditionalGeneration"], "model_type": "kimi_k25", "text_config": text}
    write_checkpoint(folder, shards, config)
    return folder


def main() -> None:
    """Write everything."""
    there = Path(sys.argv[1])
    shutil.rmtree(there, ignore_errors=True)
    there.mkdir(parents=True)
    if len(sys.argv) > 2:
        source = Path(sys.argv[2])
    else:
        source = there / "source"
        write_k2(source)
    for name in FORMATS:
        convert(source, there / name, to=name)
    as_k25(there / "int4", there / "k25")
    for other in (*FORMATS, "k25"):
        export_mlx(there / other, there / f"{other}-mlx")
        convert(there / other, there / f"{other}-bf16", to="bf16")


if __name__ == "__main__":
    main()
