"""Small checkpoints written once more: with other tensors in them, the same in other places, other names or configs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from k2quant.checkpoint.header import build_header
from k2quant.checkpoint.reader import INDEX, Checkpoint, open_checkpoint
from k2quant.checkpoint.reading import read_tensor
from k2quant.checkpoint.writing.in_memory import Shard, write_checkpoint
from k2quant.formats.dtypes import TensorSpec, as_array

OVERLAY = "overlay.safetensors"


def tensors_of(checkpoint: Checkpoint) -> Shard:
    """Return all tensors of a small checkpoint; fused experts come one by one."""
    return {
        name: (entry.dtype, as_array(np.frombuffer(read_tensor(checkpoint, entry), np.uint8), _spec(entry)))
        for name, entry in checkpoint.tensors.items()
    }


def _spec(entry: Any) -> TensorSpec:
    return TensorSpec(entry.dtype, entry.shape)


def overlaid(source: Path, folder: Path, stale: Shard, fresh: Shard | None = None, *, last: bool = False) -> Path:
    """Write a checkpoint whose index points some tensors at an overlay shard, while old copies stay in the base shards.

    Args:
        source: the checkpoint that is rewritten.
        folder: where.
        stale: what stays in the base: for each tensor of these names the index looks into the overlay.
        fresh: what the overlay holds, if not the source's tensors of those names; a fused one replaces its experts.
        last: whether the old copies stand at the end of their shard, not at its beginning.
    """
    checkpoint = open_checkpoint(source)
    tensors = tensors_of(checkpoint)
    overlay = fresh or {name: tensors[name] for name in stale}
    gone = set(stale) | set(overlay) | {part for name in overlay for part in _parts(name, tensors)}
    bases: dict[str, Shard] = {file: {} for file in checkpoint.shards}
    home = next(iter(bases))
    shards = {file: {} if last or file != home else dict(stale) for file in bases}
    for name, tensor in tensors.items():
        if name not in gone:
            shards[checkpoint.tensors[name].file][name] = tensor
            bases[checkpoint.tensors[name].file][name] = tensor
    if last:
        shards[home] |= stale
    write_checkpoint(folder, {**shards, OVERLAY: overlay}, checkpoint.config)
    places = {name: file for file, held in {**bases, OVERLAY: overlay}.items() for name in held}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def _parts(fused: str, tensors: Mapping[str, object]) -> set[str]:
    """Return the tensors of single experts that a fused tensor stands for."""
    prefix, _, last = fused.rpartition(".")
    projections = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(last, ())
    ends = tuple(f".{projection}.weight" for projection in projections)
    return {name for name in tensors if ends and name.startswith(f"{prefix}.") and name.endswith(ends)}


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
    shard = {rename(name): tensor for name, tensor in tensors_of(read).items()}
    write_checkpoint(folder, {"model.safetensors": shard | (more or {})}, {**(read.config or {}), **config})
    return folder


@dataclass
class Hollow:
    """A checkpoint without weights, to be changed in one point and written: headers are all that a check reads."""

    tensors: dict[str, tuple[str, tuple[int, ...]]]
    """Dtype and shape of each tensor."""
    config: dict[str, Any]
    files: dict[str, bytes]
    data: dict[str, bytes] = field(default_factory=dict)
    """Bytes of a few tensors; all others are holes that read as zeros."""
    hidden: dict[str, str] = field(default_factory=dict)
    """Tensors in a second shard that the index does not look for there, each with the tensor whose header it has."""
    ranks: int = 1
    """Devices that a check is to spread it over."""
    memory: int | None = 10**12
    """Bytes of each of them."""

    @property
    def block(self) -> dict[str, Any]:
        """The quantization block of the config."""
        home = self.config.get("text_config", self.config)
        found: dict[str, Any] = home["quantization_config"]
        return found

    @property
    def group(self) -> dict[str, Any]:
        """Its first config group."""
        found: dict[str, Any] = next(iter(self.block["config_groups"].values()))
        return found

    def rename(self, old: str, new: str) -> None:
        """Change a part of the names of tensors."""
        self.tensors = {name.replace(old, new): spec for name, spec in self.tensors.items()}

    def remove(self, part: str) -> None:
        """Take out the tensors in whose name a part stands."""
        self.tensors = {name: spec for name, spec in self.tensors.items() if part not in name}

    def write(self, folder: Path) -> Path:
        """Write shards with holes for weights, index, config and files."""
        folder.mkdir()
        _write_holes(folder / "model-1.safetensors", self.tensors, self.data)
        names = dict.fromkeys(self.tensors, "model-1.safetensors")
        if self.hidden:
            extra = {name: self.tensors[like] for name, like in self.hidden.items()}
            _write_holes(folder / "model-2.safetensors", {"model.norm.bias": ("BF16", (4,)), **extra}, {})
            self.tensors["model.norm.bias"] = ("BF16", (4,))
            names["model.norm.bias"] = "model-2.safetensors"
        (folder / INDEX).write_text(json.dumps({"weight_map": names}))
        (folder / "config.json").write_text(json.dumps(self.config))
        for name, content in self.files.items():
            (folder / name).write_bytes(content)
        return folder


def _write_holes(path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]], data: dict[str, bytes]) -> None:
    header, spans = build_header({name: TensorSpec(dtype, shape) for name, (dtype, shape) in tensors.items()})
    with path.open("wb") as file:
        file.write(header)
        file.truncate(max(stop for _, stop in spans.values()))
        for name, content in data.items():
            if name in spans:
                file.seek(spans[name][0])
                file.write(content)


def hollow(folder: Path) -> Hollow:
    """Return a checkpoint without its weights and without what lies beside them."""
    checkpoint = open_checkpoint(folder)
    tensors = {name: (entry.dtype, entry.shape) for name, entry in checkpoint.tensors.items()}
    return Hollow(tensors, dict(checkpoint.config or {}), {})
