"""An export to GGUF read back by gguf's own code, and compared with the values that the checkpoint has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from k2quant.checkpoint.panels import panel_shape, read_values
from k2quant.checkpoint.reader import Checkpoint, open_checkpoint
from k2quant.checkpoint.reading import read_tensor
from k2quant.checkpoint.weights import StoredWeight
from k2quant.conversion.convert import codecs_of
from k2quant.errors import MissingTensor
from k2quant.exports.gguf.names import ENGINE, HALVES
from k2quant.exports.shapes import KV_B, Sizes
from k2quant.exports.stacks import Stack, stacks_of
from k2quant.formats.dtypes import TensorSpec, as_array
from k2quant.ground.extras import needed


class ReadBack(NamedTuple):
    """What the files of an export hold of their checkpoint."""

    tensors: int
    """All that were compared."""
    other: tuple[str, ...]
    """Names of those that hold another value somewhere."""


def read_back_gguf(source: Path, files: Sequence[Path]) -> ReadBack:
    """Compare an export with its source, one weight in memory at a time.

    Values are compared as BF16 has them, which is what a checkpoint's mean; F32 as it is. What was rounded (Q8_0, a
    fallback) is among the others, and so is NVFP4, of which one part is a scale in a tensor of its own.

    Args:
        source: folder of the checkpoint.
        files: of the export, all of them.

    Raises:
        CheckpointError: the source cannot be read; or a tensor of it is in none of the files.
        MissingExtra: gguf is not installed.
    """
    import numpy as np

    with needed("gguf", "reading GGUF"):
        from gguf import GGUFReader
        from gguf.quants import dequantize
    checkpoint = open_checkpoint(source)
    found = stacks_of(checkpoint, ENGINE)
    tensors = {tensor.name: tensor for file in files for tensor in GGUFReader(file).tensors}
    alike: dict[str, bool] = {}
    for stack in found.stacks:
        for number, weight in enumerate(stack.weights):
            for name, expected in _parts(stack, _values(checkpoint, weight), found.sizes):
                tensor = tensors.get(name)
                if tensor is None:
                    raise MissingTensor("is in none of the files", tensor=name, file=files[0], remedy="export it anew")
                data = np.asarray(tensor.data)
                values = dequantize(data[number] if stack.is_stacked else data, tensor.tensor_type)
                alike[name] = alike.get(name, True) and _equal(values.reshape(expected.shape), expected)
    return ReadBack(len(alike), tuple(name for name, same in alike.items() if not same))


def _parts(stack: Stack, values: Any, sizes: Sizes) -> Iterator[tuple[str, Any]]:
    """Yield what the tensors of a stack must hold of a weight: name and values."""
    place = stack.place
    if place.part != KV_B:
        yield place.name, values
        return
    heads = values.reshape(sizes.num_attention_heads, -1, sizes.kv_lora_rank)
    split = heads[:, : sizes.qk_nope_head_dim].transpose(0, 2, 1), heads[:, sizes.qk_nope_head_dim :]
    for half, part in zip(HALVES, split, strict=True):
        yield f"{place.tensor.rpartition('.')[0]}.{half}.{place.suffix}", part


def _values(checkpoint: Checkpoint, weight: StoredWeight) -> Any:
    """Return the values of a weight in its own shape: float32, or the bits of BF16."""
    import numpy as np

    from k2quant.formats.transcode import Scratch

    entry = weight.main
    if entry.dtype == "F32":
        data = np.frombuffer(read_tensor(checkpoint, entry), np.uint8)
        return as_array(data, TensorSpec(entry.dtype, entry.shape))
    rows, _ = panel_shape(weight.shape)
    panel = read_values(checkpoint, weight, 0, rows, codecs=codecs_of("cpu"), scratch=Scratch())
    return panel.values.reshape(weight.shape)


def _equal(values: Any, expected: Any) -> bool:
    """Tell whether float32 values are those expected, zeros of whatever sign."""
    import numpy as np

    from k2quant.kernels.codecs.values import bf16_to_float, float_to_bf16

    if expected.dtype == np.uint16:
        values, expected = bf16_to_float(float_to_bf16(values)), bf16_to_float(expected)
    return bool(np.array_equal(values, expected))
