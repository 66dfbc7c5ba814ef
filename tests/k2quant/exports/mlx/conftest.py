"""What tests of exports for mlx-lm share: what mlx-lm itself made of the small K2, and shards read without k2quant."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

_GOLDEN = Path(__file__).parents[3] / "data" / "golden_mlx.json"

_CALLED = {"BF16": "bfloat16", "F32": "float32", "F16": "float16", "U32": "uint32", "U8": "uint8"}


class Seen(NamedTuple):
    """A tensor of a shard."""

    dtype: str
    """As mlx calls it."""
    shape: tuple[int, ...]
    data: bytes

    @property
    def facts(self) -> list[Any]:
        """What the golden file has of a parameter."""
        return [self.dtype, list(self.shape), f"{zlib.crc32(self.data):08x}"]


Reader = Callable[[Path], dict[str, Seen]]


@pytest.fixture(scope="session")
def golden() -> dict[str, Any]:
    """What `make mlx-oracles` wrote down."""
    content: dict[str, Any] = json.loads(_GOLDEN.read_text())
    return content


@pytest.fixture(scope="session")
def seen() -> Reader:
    """Read the shards of a folder that mlx-lm would read, `model*.safetensors`."""

    def read(folder: Path) -> dict[str, Seen]:
        found = {}
        for path in folder.glob("model*.safetensors"):
            raw = path.read_bytes()
            start = 8 + int.from_bytes(raw[:8], "little")
            header = json.loads(raw[8:start])
            header.pop("__metadata__")
            for name, entry in header.items():
                first, last = (start + at for at in entry["data_offsets"])
                found[name] = Seen(_CALLED[entry["dtype"]], tuple(entry["shape"]), raw[first:last])
        return found

    return read
