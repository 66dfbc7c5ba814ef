"""Small FP4 weights as checkpoints have them: sound ones, to be spoilt by whoever wants to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from k2quant.checkpoint.writing.in_memory import Shard, write_checkpoint

SIZE = 64

Sound = Callable[..., Shard]
"""Takes "modelopt", "packed" or "mxfp4", a base, and the value of a scale of the inputs or nothing."""

Written = Callable[..., Path]
"""Takes tensors, a quantization block or nothing, and the folder's name."""


@pytest.fixture
def sound() -> Sound:
    """Return 64 x 64 of FP4: each of the 256 pairs of codes eight times, all in units of 1/8."""

    def make(kind: str, base: str = "model.layers.1.mlp.experts.0.up_proj", inputs: float | None = None) -> Shard:
        codes = np.arange(SIZE * SIZE // 2, dtype=np.uint32).astype(np.uint8).reshape(SIZE, SIZE // 2)
        ones = np.full((SIZE, SIZE // 16), 0x38, np.uint8)
        kinds: dict[str, dict[str, tuple[str, Any]]] = {
            "modelopt": {
                "weight": ("U8", codes),
                "weight_scale": ("F8_E4M3", ones),
                "weight_scale_2": ("F32", np.array(0.125, np.float32)),
            },
            "packed": {
                "weight_packed": ("U8", codes),
                "weight_scale": ("F8_E4M3", ones),
                "weight_global_scale": ("F32", np.array([8], np.float32)),
            },
            "mxfp4": {"weight_packed": ("U8", codes), "weight_scale": ("U8", np.full((SIZE, 2), 124, np.uint8))},
        }
        found = kinds[kind]
        if inputs is not None and kind == "modelopt":
            found["input_scale"] = ("F32", np.array(inputs, np.float32))
        elif inputs is not None:
            found["input_global_scale"] = ("F32", np.array([inputs], np.float32))
        return {f"{base}.{suffix}": part for suffix, part in found.items()}

    return make


@pytest.fixture
def written(tmp_path: Path) -> Written:
    """Write a checkpoint of one shard and return its folder."""

    def write(tensors: Shard, block: dict[str, Any] | None = None, name: str = "source") -> Path:
        config = {"model_type": "kimi_k2"} | ({} if block is None else {"quantization_config": block})
        write_checkpoint(tmp_path / name, {"model.safetensors": tensors}, config)
        return tmp_path / name

    return write
