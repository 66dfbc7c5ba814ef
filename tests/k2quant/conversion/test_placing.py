"""Where weights go in an output: shards, bytes, and the index."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import cast

import pytest

from k2quant.checkpoint.header import TensorEntry
from k2quant.checkpoint.weights import StoredWeight
from k2quant.conversion.placing import as_json, index_of, output_specs, place
from k2quant.conversion.recipes.recipe import Recipe
from k2quant.errors import ShapeMismatch
from k2quant.formats.bf16 import Bf16
from k2quant.formats.dtypes import TensorSpec
from k2quant.formats.format import Format
from k2quant.formats.int4 import Int4


def weight(base: str, shape: tuple[int, ...], file: str = "one.safetensors") -> StoredWeight:
    """Return a BF16 weight of a source."""
    count = 2
    for length in shape:
        count *= length
    entry = TensorEntry(f"{base}.weight", "BF16", shape, file, 100, 100 + count)
    return StoredWeight(base, Bf16(), shape, {"weight": entry})


def vector(name: str, file: str = "one.safetensors") -> StoredWeight:
    """Return a tensor that is no weight and has no suffix."""
    return StoredWeight("", None, (4,), {name: TensorEntry(name, "F32", (4,), file, 8, 24)})


def all_become(target: Format | None) -> Recipe:
    """Return a recipe that gives every weight one format; tensors that are none are copied."""
    return cast("Recipe", SimpleNamespace(format_of=lambda found: target if found.format else None))


def test_what_is_copied_keeps_dtype_and_shape() -> None:
    """Without a format, the tensors are those of the source."""
    assert output_specs(vector("inv_freq"), None) == {"inv_freq": TensorSpec("F32", (4,))}


@pytest.mark.parametrize("shape", [(64,), (2, 32, 64), (0, 64)])
def test_only_a_matrix_can_be_quantised(shape: tuple[int, ...]) -> None:
    """A vector, a stack and an empty matrix are refused by name; BF16 takes them as they are."""
    with pytest.raises(ShapeMismatch, match=r"only a matrix.*v\.weight|v\.weight.*only a matrix"):
        output_specs(weight("v", shape), Int4())
    assert output_specs(weight("v", shape), Bf16()) == {"weight": TensorSpec("BF16", shape)}


def test_shards_of_the_source_are_kept() -> None:
    """Without a size, each weight stays in its shard, and shards in their order."""
    weights = [weight("a", (2, 32), "two.safetensors"), weight("b", (2, 32)), weight("c", (2, 32), "two.safetensors")]
    shards = place(weights, all_become(Int4()), None)
    assert [(shard.file, [job.name for job in shard.jobs]) for shard in shards] == [
        ("two.safetensors", ["a", "c"]),
        ("one.safetensors", ["b"]),
    ]
    assert shards[1].size == len(shards[1].header) + 2 * 16 + 2 * 2 + 8  # words, scales, shape
    assert shards[0].bytes_read == 2 * 128
    job = shards[1].jobs[0]
    assert (job.written, job.output_main.name) == (Int4(), "b.weight_packed")


def test_shards_are_filled_in_order_up_to_their_size() -> None:
    """As many as fit to the byte, a larger one alone, none is moved ahead; they are numbered from one."""
    weights = [weight(name, (1, 32 * size)) for name, size in zip("abcdef", (1, 1, 3, 1, 1, 1), strict=True)]
    shards = place(weights, all_become(Bf16()), 128)
    assert [(shard.file, [job.name for job in shard.jobs]) for shard in shards] == [
        ("model-00001-of-00004.safetensors", ["a", "b"]),
        ("model-00002-of-00004.safetensors", ["c"]),
        ("model-00003-of-00004.safetensors", ["d", "e"]),
        ("model-00004-of-00004.safetensors", ["f"]),
    ]


def test_each_tensor_has_its_bytes_behind_the_header() -> None:
    """A tensor without a suffix keeps its name; places are those that the header names."""
    (shard,) = place([vector("inv_freq"), weight("a", (1, 32))], all_become(None), None)
    header = json.loads(shard.header[8:])
    for job in shard.jobs:
        for entry in job.outputs.values():
            assert header[entry.name]["data_offsets"] == [at - len(shard.header) for at in (entry.start, entry.stop)]
            assert (entry.file, entry.dtype, list(entry.shape)) == (
                shard.file,
                header[entry.name]["dtype"],
                header[entry.name]["shape"],
            )
    assert [job.output_main.name for job in shard.jobs] == ["inv_freq", "a.weight"]
    assert (shard.jobs[0].written, shard.jobs[1].written) == (None, Bf16())
    assert shard.size == len(shard.header) + 16 + 64


def test_the_index_names_every_tensor_in_order_with_the_bytes_of_all() -> None:
    """Sorted by name, whatever shard they lie in."""
    shards = place([weight("b", (1, 32)), weight("a", (1, 32), "two.safetensors")], all_become(None), None)
    assert index_of(shards) == (
        b'{\n  "metadata": {\n    "total_size": 128\n  },\n  "weight_map": {\n'
        b'    "a.weight": "two.safetensors",\n    "b.weight": "one.safetensors"\n  }\n}\n'
    )


def test_files_of_json_are_as_releases_have_them() -> None:
    """Two spaces, names as they are written, a newline at the end."""
    assert as_json({"é": [1]}) == '{\n  "é": [\n    1\n  ]\n}\n'.encode()
