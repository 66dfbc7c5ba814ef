"""Damage of known place in a checkpoint of nano-K2: what `blame.py` plants and `k2quant eval blame` must find."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch

from k2quant.checkpoint.header import TensorEntry
from k2quant.checkpoint.reader import Checkpoint, open_checkpoint
from k2quant.checkpoint.reading import read_tensor
from k2quant.checkpoint.writing.in_memory import Shard, write_checkpoint
from k2quant.formats.dtypes import TensorSpec, as_array
from k2quant.kernels.codecs import reference
from k2quant.model.modules import PROJECTIONS

GROUP = 32
"""Weights that share a scale."""
OTHERS = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
"""Files that belong to a checkpoint besides its weights."""


class Planted(NamedTuple):
    """What was done, and where."""

    kind: str
    """The tensor class."""
    layer: int
    weights: tuple[str, ...]
    """The weights."""


class Tensors:
    """All tensors of a small checkpoint, to be changed and written."""

    def __init__(self, folder: Path) -> None:
        """Read them."""
        self.folder, source = folder, open_checkpoint(folder)
        self.config: dict[str, Any] = source.config or {}
        self.file = {name: entry.file for name, entry in source.tensors.items()}
        self.dtype = {name: entry.dtype for name, entry in source.tensors.items()}
        self.array = {name: read_array(source, entry) for name, entry in source.tensors.items()}

    def write(self, folder: Path) -> Path:
        """Write them, and the other files of the folder they came from."""
        shards: dict[str, Shard] = {}
        for name, array in self.array.items():
            shards.setdefault(self.file[name], {})[name] = (self.dtype[name], array)
        write_checkpoint(folder, shards, self.config)
        for name in OTHERS:
            shutil.copy(self.folder / name, folder / name)
        return folder

    def values(self, base: str) -> torch.Tensor:
        """Return a weight as float32 `[N, K]`, whatever its format."""
        if f"{base}.weight" in self.array:
            bits = torch.from_numpy(self.array[f"{base}.weight"].astype(np.int16, copy=False).view(np.int16).copy())
            return bits.view(torch.bfloat16).float()
        packed = torch.from_numpy(self.array[f"{base}.weight_packed"].copy())
        return reference.int4_to_bf16(packed, self.scale(base), GROUP).float()

    def put(self, base: str, values: torch.Tensor) -> None:
        """Store a weight in the format that it has; INT4 rounds it to nearest."""
        if f"{base}.weight" in self.array:
            self.array[f"{base}.weight"] = bits_of(values.bfloat16())
            return
        packed, scale, _ = reference.bf16_to_int4(values.bfloat16(), "moonshot", recover=False)
        self.array[f"{base}.weight_packed"] = packed.numpy()
        self.array[f"{base}.weight_scale"] = bits_of(scale.bfloat16())

    def expand(self) -> None:
        """Turn every INT4 weight into BF16: the same values, rounded once."""
        for name in [name for name in self.array if name.endswith(".weight_packed")]:
            base = name.removesuffix(".weight_packed")
            self.array[f"{base}.weight"], self.dtype[f"{base}.weight"] = bits_of(self.values(base).bfloat16()), "BF16"
            self.file[f"{base}.weight"] = self.file[name]
            for suffix in ("weight_packed", "weight_scale", "weight_shape"):
                del self.array[f"{base}.{suffix}"]
        self.config.pop("quantization_config", None)

    def widen(self) -> None:
        """Store every BF16 tensor as F32: the same values in other bytes."""
        for name, dtype in self.dtype.items():
            if dtype == "BF16":
                self.array[name] = (self.array[name].astype(np.uint32) << 16).view(np.float32)
                self.dtype[name] = "F32"

    def shard_anew(self) -> None:
        """Put every tensor into another file."""
        self.file = {name: f"model-{number % 5}.safetensors" for number, name in enumerate(self.array)}

    def scale(self, base: str) -> torch.Tensor:
        """Return the scales of an INT4 weight, BF16 `[N, K / 32]`."""
        return torch.from_numpy(self.array[f"{base}.weight_scale"].view(np.int16).copy()).view(torch.bfloat16)


def read_array(source: Checkpoint, entry: TensorEntry) -> Any:
    """Return one tensor as a numpy array; BF16 as bit patterns."""
    data = np.frombuffer(read_tensor(source, entry), np.uint8)
    return as_array(data, TensorSpec(entry.dtype, entry.shape)).copy()


def bits_of(tensor: torch.Tensor) -> Any:
    """Return a BF16 tensor's bit patterns, uint16."""
    return tensor.contiguous().view(torch.int16).numpy().view(np.uint16).copy()


Expert = Callable[[int], int]
"""Draws an expert of a layer, one that the text visits."""


def layers(tensors: Tensors) -> range:
    """Return the layers that have experts."""
    return range(tensors.config["first_k_dense_replace"], tensors.config["num_hidden_layers"])


def wrong_scale(tensors: Tensors, random: Random, expert: Expert) -> Planted:
    """Multiply one group's scale in one row of an expert's down_proj by 16."""
    return _wrong_scales(tensors, random, expert, one_row=True)


def wrong_scales(tensors: Tensors, random: Random, expert: Expert) -> Planted:
    """Multiply one group's scales in all rows of an expert's down_proj by 16."""
    return _wrong_scales(tensors, random, expert, one_row=False)


def _wrong_scales(tensors: Tensors, random: Random, expert: Expert, *, one_row: bool) -> Planted:
    layer = random.choice(layers(tensors))
    base = f"model.layers.{layer}.mlp.experts.{expert(layer)}.down_proj"
    values = tensors.values(base)
    row, group = random.randrange(values.shape[0]), random.randrange(values.shape[1] // GROUP)
    rows = slice(row, row + 1) if one_row else slice(None)
    if f"{base}.weight_scale" in tensors.array:
        scale = tensors.scale(base).float()
        scale[rows, group] *= 16
        tensors.array[f"{base}.weight_scale"] = bits_of(scale.bfloat16())
    else:
        values[rows, group * GROUP : (group + 1) * GROUP] *= 16
        tensors.put(base, values)
    return Planted("routed experts", layer, (base,))


def swapped_nibbles(tensors: Tensors, random: Random, expert: Expert) -> Planted:
    """Swap neighbouring columns in an expert's three projections, as a wrong order of nibbles in a byte does."""
    layer = random.choice(layers(tensors))
    place = f"model.layers.{layer}.mlp.experts.{expert(layer)}"
    for part in PROJECTIONS:
        name = f"{place}.{part}.weight_packed"
        if name in tensors.array:
            words = tensors.array[name].view(np.uint32)
            tensors.array[name] = (((words & 0x0F0F0F0F) << 4) | ((words >> 4) & 0x0F0F0F0F)).view(np.int32)
        else:
            values = tensors.values(f"{place}.{part}")
            tensors.put(f"{place}.{part}", values.view(len(values), -1, 2).flip(-1).reshape(values.shape))
    return Planted("routed experts", layer, tuple(f"{place}.{part}" for part in PROJECTIONS))


def no_bias(tensors: Tensors, random: Random, expert: Expert) -> Planted:  # noqa: ARG001  plants are called alike
    """Set the correction bias of one layer's router to 0."""
    layer = random.choice(layers(tensors))
    name = f"model.layers.{layer}.mlp.gate.e_score_correction_bias"
    tensors.array[name] = np.zeros_like(tensors.array[name])
    return Planted("router", layer, (name,))


def no_shared_expert(tensors: Tensors, random: Random, expert: Expert) -> Planted:  # noqa: ARG001  the same
    """Set one layer's shared expert to 0."""
    layer = random.choice(layers(tensors))
    base = f"model.layers.{layer}.mlp.shared_experts.down_proj"
    for suffix in ("weight", "weight_scale"):
        if f"{base}.{suffix}" in tensors.array:
            tensors.array[f"{base}.{suffix}"] = np.zeros_like(tensors.array[f"{base}.{suffix}"])
    return Planted("shared experts", layer, (base,))


def rolled_kv(tensors: Tensors, random: Random, expert: Expert) -> Planted:  # noqa: ARG001  the same
    """Roll the rows of one layer's kv_b by one."""
    layer = random.randrange(tensors.config["num_hidden_layers"])
    base = f"model.layers.{layer}.self_attn.kv_b_proj"
    for suffix in ("weight", "weight_packed", "weight_scale"):
        if f"{base}.{suffix}" in tensors.array:
            tensors.array[f"{base}.{suffix}"] = np.roll(tensors.array[f"{base}.{suffix}"], 1, axis=0)
    return Planted("attention", layer, (base,))


def two_bits(tensors: Tensors, random: Random, expert: Expert) -> Planted:  # noqa: ARG001  the same
    """Round one tensor class of one layer to nearest in 2 bits."""
    kind, place, lowest = random.choice(
        [
            ("routed experts", "mlp.experts.", 1),
            ("shared experts", "mlp.shared_experts.", 1),
            ("attention", "self_attn.", 0),
        ]
    )
    layer = random.randrange(lowest, tensors.config["num_hidden_layers"])
    inside = [name for name in tensors.array if name.startswith(f"model.layers.{layer}.{place}") and "norm" not in name]
    bases = sorted({name.rpartition(".")[0] for name in inside})
    for base in bases:
        tensors.put(base, reference.fake_quantize_int4(tensors.values(base).bfloat16(), "moonshot", bits=2).float())
    return Planted(kind, layer, tuple(bases))


PLANTS = {
    "one group scale x16": wrong_scale,
    "one group's scales x16": wrong_scales,
    "swapped nibbles": swapped_nibbles,
    "no router bias": no_bias,
    "no shared expert": no_shared_expert,
    "rolled kv_b": rolled_kv,
    "2 bits": two_bits,
}
"""By the name that tables show."""
