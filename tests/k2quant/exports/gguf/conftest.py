"""What tests of GGUF share: small sources, which have no tokenizer, and files as gguf's own reader sees them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from k2quant.checkpoint.panels import panel_shape, read_values
from k2quant.checkpoint.reader import open_checkpoint
from k2quant.checkpoint.weights import group_tensors
from k2quant.exports.gguf import plan
from k2quant.formats.transcode import Scratch
from k2quant.ground import names
from k2quant.kernels.codecs.cpu import CODECS
from k2quant.kernels.codecs.values import U16


class Seen(NamedTuple):
    """A tensor as gguf reads it."""

    type: str
    shape: tuple[int, ...]
    """Rows before columns."""
    values: NDArray[np.float32]
    data: bytes


Reader = Callable[..., dict[str, Seen]]


@pytest.fixture(autouse=True)
def wordless(monkeypatch: pytest.MonkeyPatch) -> None:
    """The small sources have no tokenizer; what becomes of one is tested by itself."""
    monkeypatch.setattr(plan, "vocabulary", lambda *_: ())


@pytest.fixture
def seen() -> Reader:
    """Read files with gguf's own code."""

    def read(*paths: Path) -> dict[str, Seen]:
        found = {}
        for path in paths:
            for tensor in gguf.GGUFReader(path).tensors:
                shape = tuple(int(length) for length in reversed(tensor.shape))
                values = gguf.quants.dequantize(np.asarray(tensor.data), tensor.tensor_type)
                found[tensor.name] = Seen(tensor.tensor_type.name, shape, values.reshape(shape), tensor.data.tobytes())
        return found

    return read


@pytest.fixture
def fields() -> Callable[[Path], dict[str, Any]]:
    """Read a file's keys with gguf's own code."""
    return lambda path: {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


@pytest.fixture(scope="session")
def values() -> Callable[[Path], dict[str, U16]]:
    """Read a checkpoint's weights as BF16 bits, by the names that a language model alone has."""

    def read(folder: Path) -> dict[str, U16]:
        source = open_checkpoint(folder)
        found = {}
        for weight in group_tensors(source.tensors).weights:
            name = names.in_language_model(weight.base)
            if weight.format is not None and name is not None:
                rows, _ = panel_shape(weight.shape)
                bits = read_values(source, weight, 0, rows, codecs=CODECS, scratch=Scratch()).values
                found[name] = bits.reshape(weight.shape).copy()
        return found

    return read
