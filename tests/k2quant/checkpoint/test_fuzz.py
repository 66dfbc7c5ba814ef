"""Thousands of damaged checkpoints: each ends in a clean error or in a right result.

K2QUANT_FUZZ sets how many (by hand: 4000 and more), K2QUANT_SEED which. A failure names its case;
`K2QUANT_FUZZ_CASE=17` runs that one alone.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
import shutil
import signal
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors import deserialize

import k2quant
from k2quant.checkpoint.reader import CONFIG, INCOMPLETE, INDEX, REPORT
from k2quant.formats.dtypes import DTYPES
from k2quant.formats.known import FormatName

CASES = int(os.environ.get("K2QUANT_FUZZ", "2000"))
SEED = int(os.environ.get("K2QUANT_SEED", "20"))
ONLY = os.environ.get("K2QUANT_FUZZ_CASE")
SECONDS = 30.0
"""How long one case may take. It takes about 3 ms; the first of a format compiles codecs, FP4's in 7 s of a core."""
TARGETS: tuple[FormatName, ...] = ("bf16", "fp8", "int4", "nvfp4", "mxfp4")

Entries = list[tuple[str, Any]]
"""A header as pairs, so that a name may stand twice."""


class Model:
    """A checkpoint in memory, in a form in which it is easy to damage."""

    def __init__(self) -> None:
        self.headers: dict[str, Entries] = {}
        self.data: dict[str, bytearray] = {}
        self.index: dict[str, Any] | None = {"metadata": {}, "weight_map": {}}
        self.config: dict[str, Any] | None = {"model_type": "kimi_k2"}

    def add(self, file: str, name: str, dtype: str, array: NDArray[Any]) -> None:
        """Append a tensor to a shard and list it in the index."""
        entries, data = self.headers.setdefault(file, []), self.data.setdefault(file, bytearray())
        start = len(data)
        data += array.tobytes()
        entries.append((name, {"dtype": dtype, "shape": list(array.shape), "data_offsets": [start, len(data)]}))
        if self.index is not None:
            self.index["weight_map"][name] = file

    def entries(self) -> list[tuple[str, int]]:
        """Return shard and position of every entry."""
        return [(file, at) for file, entries in self.headers.items() for at in range(len(entries))]

    def files(self) -> dict[str, bytes]:
        """Return the bytes of every file."""
        result = {}
        for file, entries in self.headers.items():
            raw = ("{" + ",".join(f"{json.dumps(name)}:{json.dumps(entry)}" for name, entry in entries) + "}").encode()
            result[file] = struct.pack("<Q", len(raw)) + raw + bytes(self.data[file])
        if self.index is not None:
            result[INDEX] = json.dumps(self.index).encode()
        if self.config is not None:
            result[CONFIG] = json.dumps(self.config).encode()
        return result


# --- the sound checkpoints that are damaged ---------------------------------------------------------------------------

FIRST, SECOND = "model-1-of-2.safetensors", "model-2-of-2.safetensors"
EXPERTS = "model.layers.1.mlp.experts."


def _bf16(dice: np.random.Generator, *shape: int) -> NDArray[np.uint16]:
    return (dice.standard_normal(shape, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def _fp8(model: Model, dice: np.random.Generator, base: str, rows: int, width: int, home: str = FIRST) -> None:
    codes = dice.integers(0, 0x7F, (rows, width), np.uint8) | (dice.integers(0, 2, (rows, width), np.uint8) << 7)
    model.add(FIRST, f"{base}.weight", "F8_E4M3", codes)
    scale = dice.random((-(-rows // 128), -(-width // 128)), np.float32)
    model.add(home, f"{base}.weight_scale_inv", "F32", scale)


def _foreign_fp8(model: Model, dice: np.random.Generator, base: str, suffix: str) -> None:
    """Add block FP8 under a name of the scale, in BF16 or F8_E8M0."""
    model.add(FIRST, f"{base}.weight", "F8_E4M3", dice.integers(0, 0x7F, (32, 64), np.uint8))
    if dice.random() < 0.5:
        model.add(SECOND, f"{base}.{suffix}", "BF16", _bf16(dice, 1, 1) & 0x7FFF)
    else:
        model.add(SECOND, f"{base}.{suffix}", "F8_E8M0", dice.integers(0, 0x7F, (1, 1), np.uint8))


def _int4(model: Model, dice: np.random.Generator, base: str, file: str, group: int = 32) -> None:
    model.add(file, f"{base}.weight_scale", "BF16", _bf16(dice, 32, 64 // group) & 0x7FFF)
    model.add(file, f"{base}.weight_packed", "I32", dice.integers(-(2**31), 2**31, (32, 8), np.int32))
    model.add(file, f"{base}.weight_shape", "I32", np.array([32, 64], np.int32))


def _others(model: Model, dice: np.random.Generator, file: str) -> None:
    model.add(file, "model.norm.weight", "BF16", _bf16(dice, 64))
    model.add(file, "model.layers.1.mlp.gate.e_score_correction_bias", "F32", dice.random(2, np.float32))
    model.add(file, "model.embed_tokens.weight", "BF16", _bf16(dice, 4, 64))


def fp8_model(dice: np.random.Generator) -> Model:
    """Block FP8 with a scale in the other shard and a weight of two blocks, as K2-Instruct has them."""
    model = Model()
    _fp8(model, dice, f"{EXPERTS}0.up_proj", 32, 64)
    _fp8(model, dice, f"{EXPERTS}1.up_proj", 32, 64, SECOND)
    _fp8(model, dice, "model.layers.1.self_attn.kv_a_proj_with_mqa", 160, 64)
    _others(model, dice, SECOND)
    block = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    model.config = {"model_type": "kimi_k2", "torch_dtype": "bfloat16", "quantization_config": block}
    return model


def int4_model(dice: np.random.Generator) -> Model:
    """Packed INT4 experts and a BF16 projection, as K2-Thinking has them."""
    model = Model()
    _int4(model, dice, f"{EXPERTS}0.up_proj", FIRST)
    _int4(model, dice, f"{EXPERTS}1.up_proj", SECOND)
    model.add(FIRST, "model.layers.1.self_attn.o_proj.weight", "BF16", _bf16(dice, 64, 32))
    _others(model, dice, SECOND)
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "group_size": 32, "strategy": "group", "actorder": None}
    block = {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"]}
    groups = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}
    model.config = {"model_type": "kimi_k25", "text_config": {"quantization_config": block | groups}}
    return model


def fused_model(dice: np.random.Generator) -> Model:
    """BF16 with the experts of a layer in two tensors, in one shard without an index."""
    model = Model()
    model.index = None
    file = "model.safetensors"
    model.add(file, "model.layers.1.mlp.experts.gate_up_proj", "BF16", _bf16(dice, 2, 64, 64))
    model.add(file, "model.layers.1.mlp.experts.down_proj", "BF16", _bf16(dice, 2, 64, 32))
    _others(model, dice, file)
    return model


def mixed_model(dice: np.random.Generator) -> Model:
    """Every dtype at once: F32, F16, BF16, FP8 in both layouts and INT4 of another group size."""
    model = Model()
    model.add(FIRST, f"{EXPERTS}0.up_proj.weight", "F32", dice.standard_normal((32, 64), np.float32))
    model.add(FIRST, f"{EXPERTS}1.up_proj.weight", "F16", dice.standard_normal((32, 64)).astype(np.float16))
    _fp8(model, dice, f"{EXPERTS}2.up_proj", 32, 64, SECOND)
    _int4(model, dice, f"{EXPERTS}3.up_proj", SECOND, group=int(dice.choice([2, 16, 32])))
    _foreign_fp8(model, dice, f"{EXPERTS}4.up_proj", "weight_scale_inv")
    _foreign_fp8(model, dice, f"{EXPERTS}5.up_proj", "weight_scale")
    model.add(SECOND, "model.layers.1.self_attn.rotary_emb.inv_freq", "F32", dice.random(8, np.float32))
    _others(model, dice, FIRST)
    return model


def fp4_model(dice: np.random.Generator) -> Model:
    """NVFP4 in both layouts, perhaps with a scale of inputs, beside MXFP4 in both dtypes, without a config's word."""
    model = Model()
    for expert, suffixes in enumerate((("weight", "weight_scale_2"), ("weight_packed", "weight_global_scale"))):
        base = f"{EXPERTS}{expert}.up_proj"
        model.add(FIRST, f"{base}.{suffixes[0]}", "U8", dice.integers(0, 256, (32, 32), np.uint8))
        model.add(SECOND, f"{base}.weight_scale", "F8_E4M3", dice.integers(0, 127, (32, 4), np.uint8))
        number = np.array((1 + dice.random()) * 2.0 ** int(dice.integers(-10, 10)), np.float32)
        model.add(FIRST, f"{base}.{suffixes[1]}", "F32", number.reshape((1,) if expert else ()))
    if dice.random() < 0.25:  # beside one of them alone, which no config can say of an output
        model.add(SECOND, f"{EXPERTS}0.up_proj.input_scale", "F32", np.array(0.25, np.float32))
    for expert, dtype in ((2, "U8"), (3, "F8_E8M0")):
        base, least = f"{EXPERTS}{expert}.up_proj", int(dice.integers(0, 240))
        model.add(FIRST, f"{base}.weight_packed", "U8", dice.integers(0, 256, (32, 32), np.uint8))
        model.add(SECOND, f"{base}.weight_scale", dtype, dice.integers(least, least + 12, (32, 2), np.uint8))
    _others(model, dice, SECOND)
    return model


MODELS = (fp8_model, int4_model, fused_model, mixed_model, fp4_model)


# --- the damage -------------------------------------------------------------------------------------------------------

_NAMES = (
    "model.norm.weight",
    "weight",
    ".weight",
    "a.",
    "",
    "__metadata__",
    "a\nb",
    "\ud800",
    f"{EXPERTS}0.up_proj.weight",
    f"{EXPERTS}0.up_proj.weight_packed",
    f"{EXPERTS}0.up_proj.weight_scale",
    f"{EXPERTS}0.up_proj.weight_scale_inv",
    f"{EXPERTS}0.up_proj.weight_zero_point",
    f"{EXPERTS}0.up_proj.weight_g_idx",
    f"{EXPERTS}1.down_proj.weight",
    f"{EXPERTS}gate_up_proj",
    "model.layers.1.self_attn.q_a_proj.weight",
    "model.layers.2.mlp.gate_proj.bias",
    "x" * 3000,
)
_SUFFIXES = (
    *("weight", "weight_scale_inv", "weight_packed", "weight_scale", "weight_shape", "bias", "qweight"),
    *("weight_scale_2", "weight_global_scale", "input_scale"),
)
_FILES = (
    FIRST,
    SECOND,
    "model.safetensors",
    "absent.safetensors",
    "../model-1-of-2.safetensors",
    "/etc/passwd",
    "./model-1-of-2.safetensors",
    "model.bin",
    INDEX,
    "",
    "..",
    "a\nb.safetensors",
    None,
    3,
    [FIRST],
)
_JSON: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    0.5,
    32,
    128,
    2**31,
    2**63,
    2**64,
    "",
    "int4",
    "fp8",
    "group",
    "\ud800",
    [],
    [1, 128],
    [128, 128],
    [[]],
    {},
    {"a": []},
)

Damage = Callable[[random.Random, Model], None]


def add_tensor(dice: random.Random, model: Model) -> None:
    """Add a sound tensor of any name, dtype and shape, listed in the index: a partner, a second copy, a stranger."""
    names = [name for entries in model.headers.values() for name, _ in entries]
    bases = [name.rpartition(".")[0] for name in names]
    name = dice.choice([*_NAMES, *(f"{base}.{suffix}" for base in bases for suffix in _SUFFIXES)])
    dtype = dice.choice(["BF16", "F16", "F32", "F8_E4M3", "I32", *DTYPES])
    shape = dice.choice([(32, 64), (32, 8), (32, 2), (2, 64, 32), (1, 1), (2,), (64,), (), (0, 64), (64, 0), (2, 3, 4)])
    size = DTYPES[dtype].nbytes * int(np.prod(shape))
    content = np.frombuffer(bytes(size) if dice.random() < 0.5 else dice.randbytes(size), np.uint8)
    file = dice.choice(list(model.headers))
    model.add(file, name, dtype, content)
    model.headers[file][-1][1]["shape"] = list(shape)


def replace_tensor(dice: random.Random, model: Model) -> None:
    """Put another sound tensor, of any dtype and shape, in the place of one."""
    file, at = dice.choice(model.entries())
    name, entry = model.headers[file][at]
    _remove(model, file, at)
    shape = dice.choice([(32, 64), (32, 8), (32, 4), (32, 2), (32, 1), (16, 64), (64,), (), (1, 64), (2, 2), (64, 48)])
    dtype = dice.choice([entry["dtype"], entry["dtype"], "BF16", "F32", "F8_E4M3", "I32", "I64"])
    content = np.frombuffer(dice.randbytes(DTYPES[dtype].nbytes * int(np.prod(shape))), np.uint8)
    model.add(file, name, dtype, content)
    model.headers[file][-1][1]["shape"] = list(shape)


def _remove(model: Model, file: str, at: int) -> None:
    """Take a tensor out of a shard so that the shard stays sound."""
    _, entry = model.headers[file].pop(at)
    start, stop = entry["data_offsets"]
    del model.data[file][start:stop]
    for _, other in model.headers[file]:
        if other["data_offsets"][0] >= stop:
            other["data_offsets"] = [offset - (stop - start) for offset in other["data_offsets"]]


def refactor_shape(dice: random.Random, model: Model) -> None:
    """Claim another shape of the same number of elements."""
    file, at = dice.choice(model.entries())
    entry = model.headers[file][at][1]
    count, shape = int(np.prod(entry["shape"])), []
    for _ in range(dice.randint(0, 3)):
        shape.append(dice.choice([size for size in range(1, count + 1) if count % size == 0] or [0]))
        count //= shape[-1] or 1
    entry["shape"] = [*shape, count] if shape or dice.random() < 0.8 else entry["shape"]


def rename_tensor(dice: random.Random, model: Model) -> None:
    """Give a tensor the base or the suffix of another, in header and index alike."""
    file, at = dice.choice(model.entries())
    old, entry = model.headers[file][at]
    other = dice.choice([name for entries in model.headers.values() for name, _ in entries])
    base, suffix = dice.choice([old, other]).rpartition(".")[0], dice.choice([*_SUFFIXES, old.rpartition(".")[2]])
    name = dice.choice([f"{base}.{suffix}", *_NAMES])
    model.headers[file][at] = (name, entry)
    if model.index is not None:
        del model.index["weight_map"][old]
        model.index["weight_map"][name] = file


def drop_entry(dice: random.Random, model: Model) -> None:
    """Take a tensor out of a header, its bytes stay."""
    file, at = dice.choice(model.entries())
    del model.headers[file][at]


def drop_tensor(dice: random.Random, model: Model) -> None:
    """Take a tensor out of header, data and perhaps the index."""
    file, at = dice.choice(model.entries())
    name, _ = model.headers[file][at]
    _remove(model, file, at)
    if model.index is not None and dice.random() < 0.7:
        model.index["weight_map"].pop(name, None)


def rename_entry(dice: random.Random, model: Model) -> None:
    """Give a tensor another name, perhaps one that is taken, perhaps in the index too."""
    file, at = dice.choice(model.entries())
    name = dice.choice([*_NAMES, *(name for entries in model.headers.values() for name, _ in entries)])
    old, entry = model.headers[file][at]
    model.headers[file][at] = (name, entry)
    if model.index is not None and dice.random() < 0.7:
        model.index["weight_map"].pop(old, None)
        model.index["weight_map"][name] = file


def duplicate_entry(dice: random.Random, model: Model) -> None:
    """Let a tensor stand twice in a header, or in both shards."""
    file, at = dice.choice(model.entries())
    home = dice.choice(list(model.headers))
    name, entry = copy.deepcopy(model.headers[file][at])
    if dice.random() < 0.5:
        start, stop = entry["data_offsets"]
        piece = model.data[file][start:stop]
        entry["data_offsets"] = [len(model.data[home]), len(model.data[home]) + len(piece)]
        model.data[home] += piece
    model.headers[home].insert(dice.randrange(len(model.headers[home]) + 1), (name, entry))


def retype_entry(dice: random.Random, model: Model) -> None:
    """Claim another dtype, perhaps with a shape that fits it."""
    file, at = dice.choice(model.entries())
    entry = model.headers[file][at][1]
    old, new = entry["dtype"], dice.choice([*DTYPES, "F4", "BF17", "", 3, None])
    entry["dtype"] = new
    if dice.random() < 0.7 and old in DTYPES and new in DTYPES and entry["shape"]:
        size = entry["shape"][-1] * DTYPES[old].nbytes
        if size % DTYPES[new].nbytes == 0:
            entry["shape"] = [*entry["shape"][:-1], size // DTYPES[new].nbytes]


def reshape_entry(dice: random.Random, model: Model) -> None:
    """Claim another shape, often one of the same size."""
    file, at = dice.choice(model.entries())
    entry = model.headers[file][at][1]
    shape = entry["shape"]
    choice = dice.randrange(6)
    if choice == 0:
        entry["shape"] = shape[::-1]
    elif choice == 1:
        entry["shape"] = [int(np.prod(shape))]
    elif choice == 2:
        entry["shape"] = [1, *shape]
    elif choice == 3 and shape and shape[0] % 2 == 0:
        entry["shape"] = [shape[0] // 2, *shape[1:-1], shape[-1] * 2] if len(shape) > 1 else [2, shape[0] // 2]
    elif choice == 4 and shape:
        entry["shape"] = [*shape[:-1], dice.choice([0, -1, 1, 31, 2**32, 2**63, 1.0, "1", None, True])]
    else:
        entry["shape"] = dice.choice([[], None, 3, [0], [0, 64], [2**40, 0], [[1]]])


def move_offsets(dice: random.Random, model: Model) -> None:
    """Let a tensor claim other bytes."""
    file, at = dice.choice(model.entries())
    entry = model.headers[file][at][1]
    choice = dice.randrange(4)
    if choice == 0:
        entry["data_offsets"] = [offset + dice.choice([-64, -1, 1, 2, 64]) for offset in entry["data_offsets"]]
    elif choice == 1:
        entry["data_offsets"][dice.randrange(2)] = dice.choice([0, -1, 2**63, 2**64, len(model.data[file]), 0.5, None])
    elif choice == 2:
        entry["data_offsets"] = dice.choice([[], [0], None, "0", entry["data_offsets"][::-1]])
    else:
        other = dice.choice(model.headers[file])[1]
        entry["data_offsets"], other["data_offsets"] = other["data_offsets"], entry["data_offsets"]


def resize_data(dice: random.Random, model: Model) -> None:
    """Cut a shard's data short or add to it."""
    file = dice.choice(list(model.data))
    if dice.random() < 0.5:
        del model.data[file][dice.randrange(len(model.data[file]) + 1) :]
    else:
        model.data[file] += bytes(dice.choice([1, 8, 4096]))


def flip_data(dice: random.Random, model: Model) -> None:
    """Change some bytes of the weights: NaN, infinities and negative scales among them."""
    file = dice.choice([file for file, data in model.data.items() if data] or [""])
    for _ in range(dice.randint(1, 8) if file else 0):
        model.data[file][dice.randrange(len(model.data[file]))] = dice.choice(
            [0x00, 0x7F, 0x80, 0xFF, dice.randrange(256)]
        )


def set_values(dice: random.Random, model: Model) -> None:
    """Fill a tensor with one extreme value."""
    file, at = dice.choice(model.entries())
    offsets = model.headers[file][at][1]["data_offsets"]
    if isinstance(offsets, list) and len(offsets) == 2 and all(type(offset) is int for offset in offsets):
        size = len(model.data[file][offsets[0] : offsets[1]])
        pattern = dice.choice(
            [b"\0\0\0\0", b"\xff\xff\x7f\x7f", b"\x80\x7f\x80\x7f", b"\0\0\0\x80", b"\x01\0\x01\0", b"\xff" * 4]
        )
        model.data[file][offsets[0] : offsets[0] + size] = (pattern * (size // 4 + 1))[:size]


def swap_shards(dice: random.Random, model: Model) -> None:
    """Exchange the content of two shards, or only their data."""
    files = list(model.headers)
    one, other = dice.choice(files), dice.choice(files)
    model.data[one], model.data[other] = model.data[other], model.data[one]
    if dice.random() < 0.7:
        model.headers[one], model.headers[other] = model.headers[other], model.headers[one]


def drop_shard(dice: random.Random, model: Model) -> None:
    """Take a whole shard away."""
    file = dice.choice(list(model.headers))
    if len(model.headers) > 1:
        del model.headers[file], model.data[file]


def edit_index(dice: random.Random, model: Model) -> None:
    """Damage the index: its paths, its names or its form."""
    if model.index is None:
        model.index = {"weight_map": {name: file for file, entries in model.headers.items() for name, _ in entries}}
    weight_map = model.index.get("weight_map")
    choice = dice.randrange(6)
    if choice == 0 or not isinstance(weight_map, dict) or not weight_map:
        model.index = dice.choice([None, {}, {"weight_map": dice.choice(_JSON)}])
    elif choice in {1, 2}:
        weight_map[dice.choice(list(weight_map))] = dice.choice(_FILES)
    elif choice == 3:
        del weight_map[dice.choice(list(weight_map))]
    elif choice == 4:
        weight_map[dice.choice(_NAMES)] = dice.choice([FIRST, SECOND])
    else:
        model.index[dice.choice(["metadata", "extra"])] = dice.choice(_JSON)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every place of a JSON value: the container and the key."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(pairs):
        yield value, key
        yield from _places(inner)


def edit_config(dice: random.Random, model: Model) -> None:
    """Replace, drop or add something in the config."""
    if model.config is None:
        model.config = {}
    if dice.random() < 0.1:
        model.config = None
        return
    places = list(_places(model.config))
    choice = dice.randrange(4)
    if choice == 0 or not places:
        name = dice.choice(["quantization_config", "compression_config", "text_config", "model_type", "dtype", "x"])
        model.config[name] = copy.deepcopy(dice.choice(_JSON))
    else:
        container, key = dice.choice(places)
        if choice == 1 and isinstance(container, dict):
            del container[key]
        else:
            container[key] = copy.deepcopy(dice.choice(_JSON))


SOUND: tuple[Damage, ...] = (
    add_tensor,
    replace_tensor,
    refactor_shape,
    rename_tensor,
    drop_tensor,
    flip_data,
    set_values,
    edit_config,
)
"""Damage that leaves every file readable, so that the checks of the later steps are met."""

BROKEN: tuple[Damage, ...] = (
    drop_entry,
    rename_entry,
    duplicate_entry,
    retype_entry,
    reshape_entry,
    move_offsets,
    resize_data,
    swap_shards,
    drop_shard,
    edit_index,
)


def flip_bytes(dice: random.Random, files: dict[str, bytes]) -> str:
    """Change, remove, repeat or cut off bytes of one file, mostly in the part that is parsed."""
    file = dice.choice(list(files))
    raw = bytearray(files[file])
    parsed = len(raw) if file in {INDEX, CONFIG} else 8 + struct.unpack("<Q", raw[:8])[0]
    for _ in range(dice.randint(1, 4)):
        at = dice.randrange(parsed if dice.random() < 0.8 else len(raw)) if raw else 0
        choice = dice.randrange(5)
        if choice <= 1 and at < len(raw):
            raw[at] = dice.choice(b'0123456789-+.eE"{}[],: \\\x00\xff') if choice else raw[at] ^ 1 << dice.randrange(8)
        elif choice == 2:
            del raw[at : at + dice.randint(1, 5)]
        elif choice == 3:
            raw[at:at] = raw[at : at + dice.randint(1, 40)]
        elif dice.random() < 0.2:
            del raw[at:]
    files[file] = bytes(raw)
    return f"flip_bytes({file})"


def damaged(number: int) -> tuple[dict[str, bytes], list[str]]:
    """Return the files of a case and what was done to them."""
    dice = random.Random(f"{SEED} {number}")  # noqa: S311  not for secrets
    make = MODELS[number // len(TARGETS) % len(MODELS)]
    model = make(np.random.default_rng(number))
    done = [make.__name__]
    for _ in range(dice.choice([0, 1, 1, 1, 2, 3])):
        if not model.entries():
            break
        damage = dice.choice(SOUND if dice.random() < 0.7 else BROKEN)
        done.append(damage.__name__)
        with contextlib.suppress(AttributeError, LookupError, TypeError, ValueError):  # damaged already
            damage(dice, model)
    files = model.files()
    if len(done) == 1 or dice.random() < 0.15:
        done.append(flip_bytes(dice, files))
    return files, done


# --- what must come out -----------------------------------------------------------------------------------------------


def _e4m3(codes: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return what E4M3 codes mean, by the definition of the format; no NaN among them."""
    magnitude = codes.astype(np.int32) & 0x7F
    exponent, mantissa = magnitude >> 3, magnitude & 7
    value = np.where(exponent > 0, (8 + mantissa) * 2.0 ** (exponent - 10), mantissa * 2.0**-9)
    return np.where(codes > 0x7F, -value, value).astype(np.float32)


def _to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def read(folder: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Return dtype, shape and bytes of the tensors that the index names, read with the safetensors library."""
    index = folder / INDEX
    shards: dict[str, Any] = {}
    for path in folder.glob("*.safetensors"):
        with contextlib.suppress(Exception):  # a broken shard that the index does not name
            shards[path.name] = dict(deserialize(path.read_bytes()))  # type: ignore[no-untyped-call]
    if index.exists():
        names = json.loads(index.read_text())["weight_map"]
    else:
        names = dict.fromkeys(shards["model.safetensors"], "model.safetensors")
    found = {name: shards[file][name] for name, file in names.items()}
    return {name: (tensor["dtype"], tensor["shape"], bytes(tensor["data"])) for name, tensor in found.items()}


def as_bf16(tensors: dict[str, tuple[str, list[int], bytes]]) -> dict[str, bytes]:
    """Return what a conversion to BF16 must write, worked out anew without the code under test."""
    result: dict[str, bytes] = {}
    for name, (dtype, shape, data) in tensors.items():
        base, _, suffix = name.rpartition(".")
        if dtype == "F8_E4M3" and suffix == "weight":
            codes = _e4m3(np.frombuffer(data, np.uint8)).reshape(shape)
            suffix = "weight_scale_inv" if f"{base}.weight_scale_inv" in tensors else "weight_scale"
            kind, blocks, raw = tensors[f"{base}.{suffix}"]
            scale = _floats(kind, raw).reshape(blocks)
            height = 128 if blocks[0] == -(-shape[0] // 128) else 1
            spread = scale.repeat(height, 0)[: shape[0]].repeat(128, 1)[:, : shape[1]]
            result[name] = _to_bf16(codes * spread).tobytes()
        elif dtype == "U8" and suffix in {"weight", "weight_packed"}:
            result[f"{base}.weight"] = _fp4(tensors, base, shape, data)
        elif suffix == "weight_packed":
            pairs = np.frombuffer(data, np.uint8)
            codes = np.stack([pairs & 15, pairs >> 4], 1).astype(np.float32).reshape(shape[0], -1) - 8
            kind, groups, raw = tensors[f"{base}.weight_scale"]
            scale = _floats(kind, raw).reshape(groups).repeat(codes.shape[1] // groups[1], 1)
            product = codes * scale
            result[f"{base}.weight"] = _to_bf16(np.where(codes == 0, np.float32(0), product)).tobytes()
        elif suffix in {"gate_up_proj", "down_proj"} and name.startswith(EXPERTS):
            pieces = ("gate_proj", "up_proj") if suffix == "gate_up_proj" else ("down_proj",)
            weights = _rounded(dtype, data).reshape(shape[0], len(pieces), -1)
            for expert, piece in np.ndindex(shape[0], len(pieces)):
                result[f"{base}.{expert}.{pieces[piece]}.weight"] = weights[expert, piece].tobytes()
        elif suffix == "weight":
            result[name] = _rounded(dtype, data).tobytes()
        elif suffix not in _PARTNERS:
            result[name] = data
    return result


_PARTNERS = {
    *("weight_scale", "weight_scale_inv", "weight_shape", "weight_scale_2", "weight_global_scale"),
    *("input_scale", "input_global_scale"),
}


def _fp4(tensors: dict[str, tuple[str, list[int], bytes]], base: str, shape: list[int], data: bytes) -> bytes:
    """Return the BF16 that E2M1 codes mean, with whichever scales stand beside them."""
    pairs = np.frombuffer(data, np.uint8)
    codes = np.stack([pairs & 15, pairs >> 4], 1).reshape(shape[0], -1)
    size = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)[codes & 7]
    value: NDArray[np.float32] = np.where(codes > 7, -size, size)
    kind, blocks, raw = tensors[f"{base}.weight_scale"]
    bits = np.frombuffer(raw, np.uint8)
    scale = _e4m3(bits) if kind == "F8_E4M3" else _floats("F8_E8M0", raw)
    if f"{base}.weight_scale_2" in tensors:
        scale = scale * np.frombuffer(tensors[f"{base}.weight_scale_2"][2], np.float32)
    elif f"{base}.weight_global_scale" in tensors:
        scale = (scale / np.frombuffer(tensors[f"{base}.weight_global_scale"][2], np.float32)).astype(np.float32)
    return _to_bf16(value * scale.reshape(blocks).repeat(codes.shape[1] // blocks[1], 1)).tobytes()


def _floats(dtype: str, data: bytes) -> NDArray[np.float32]:
    if dtype == "BF16":
        return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
    if dtype == "F8_E8M0":
        return np.exp2(np.frombuffer(data, np.uint8).astype(np.float64) - 127).astype(np.float32)
    return np.frombuffer(data, np.float16 if dtype == "F16" else np.float32).astype(np.float32)


def _rounded(dtype: str, data: bytes) -> NDArray[np.uint16]:
    return np.frombuffer(data, np.uint16) if dtype == "BF16" else _to_bf16(_floats(dtype, data))


@contextlib.contextmanager
def in_time(what: str) -> Iterator[None]:
    """Fail a block that hangs."""

    def too_late(_signal: int, _frame: FrameType | None) -> None:
        pytest.fail(f"{what} hangs")

    before = signal.signal(signal.SIGALRM, too_late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def check_result(source: Path, destination: Path, to: FormatName) -> None:
    """Check a conversion that came through: whole, readable by others, and right."""
    assert not (destination / INCOMPLETE).exists()
    assert not list(destination.rglob("*.partial"))
    assert (destination / REPORT).exists()
    assert (destination / CONFIG).exists() == (source / CONFIG).exists()
    if (destination / CONFIG).exists():
        json.loads((destination / CONFIG).read_text())
    for path in destination.glob("*.safetensors"):
        deserialize(path.read_bytes())  # type: ignore[no-untyped-call]
    found = read(destination)
    if to == "bf16":
        assert {name: data for name, (_, _, data) in found.items()} == as_bf16(read(source))
    checked = k2quant.verify(source, destination, workers=1)
    assert checked.passed, checked.failures
    sums = k2quant.verify_checksums(destination, workers=1)
    assert sums.passed, sums.failures


def check_refusal(error: k2quant.K2QuantError, destination: Path) -> None:
    """Check a conversion that was refused: one line, and nothing that looks like a model."""
    assert str(error).strip()
    assert str(error).isprintable()
    left = {path.name for path in destination.rglob("*")}
    assert not left & {CONFIG, INDEX, REPORT}
    assert INCOMPLETE in left or not any(name.endswith(".safetensors") for name in left)


def options(number: int, to: FormatName) -> dict[str, Any]:
    """Return the options of a case: often none, else any that have a meaning."""
    dice = random.Random(f"options {SEED} {number}")  # noqa: S311  not for secrets
    chosen: dict[str, Any] = {}
    if dice.random() < 0.3:
        chosen["shard_size"] = dice.choice([1, 3000, 10**9])
    if to != "bf16" and dice.random() < 0.3:
        chosen["scope"] = dice.choice(["linear", "experts"])
    if to == "int4" and dice.random() < 0.3:
        chosen["grid"] = dice.choice(["moonshot", "compressed-tensors"])
    if to in {"fp8", "nvfp4"} and dice.random() < 0.3:
        chosen["layout"] = dice.choice(["deepseek" if to == "fp8" else "modelopt", "compressed-tensors"])
    if to in {"nvfp4", "mxfp4"}:
        chosen |= {"method": dice.choice(["rtn", "mse"])} if dice.random() < 0.3 else {}
        chosen |= {"allow_rounding": True} if to == "nvfp4" and dice.random() < 0.5 else {}
    return chosen


def run_case(number: int, folder: Path) -> str:
    """Run one case; return how it ended."""
    files, done = damaged(number)
    source, destination = folder / "source", folder / "destination"
    to = TARGETS[number % len(TARGETS)]
    chosen = options(number, to)
    source.mkdir()
    for name, data in files.items():
        (source / name).write_bytes(data)
    try:
        with in_time(f"case {number}"):
            with contextlib.suppress(k2quant.K2QuantError):
                k2quant.inspect(source)
            try:
                k2quant.convert(source, destination, to=to, workers=1, **chosen)
            except k2quant.K2QuantError as error:
                check_refusal(error, destination)
                return type(error).__name__
            check_result(source, destination, to)
            return "converted"
    except BaseException as error:
        error.add_note(f"case {number} of seed {SEED}: to {to} {chosen}, {', '.join(done)}")
        raise
    finally:
        shutil.rmtree(source)
        shutil.rmtree(destination, ignore_errors=True)


def test_damaged_checkpoints(ram: Path) -> None:
    """Every damaged checkpoint ends in a clean error or in a right result: no traceback, no hang, no broken output."""
    outcomes = Counter(run_case(number, ram) for number in ([int(ONLY)] if ONLY else range(CASES)))
    if not ONLY:
        assert outcomes["converted"] > CASES / 10, outcomes
        assert CASES - outcomes["converted"] > CASES / 3, outcomes
        assert len(outcomes) >= 7, outcomes


def test_sound_checkpoints(ram: Path) -> None:
    """The checkpoints that are damaged are sound before, in every format."""
    for number, make in enumerate(MODELS):
        source = ram / f"{number}"
        source.mkdir()
        for name, data in make(np.random.default_rng(2)).files().items():
            (source / name).write_bytes(data)
        for to in (each for each in TARGETS if each != "int4"):  # which has groups of 32 alone
            k2quant.convert(source, ram / f"{number}-{to}", to=to, workers=1)
            check_result(source, ram / f"{number}-{to}", to)
