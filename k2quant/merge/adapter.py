"""A folder that PEFT wrote: its settings, and its tensors sorted by what they do.

Names in adapter_model.safetensors are `base_model.model.<module>.lora_A.weight` and `lora_B`, with the adapter's name
before `weight` where a whole state dict was saved, and `base_model.model.<module>.<tensor>` for `modules_to_save`.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from k2quant.checkpoint.files.paths import inside, open_regular
from k2quant.checkpoint.files.sources import check_folder
from k2quant.checkpoint.header import ShardHeader, TensorEntry, read_header
from k2quant.checkpoint.panels import PIECE_BYTES
from k2quant.checkpoint.reading import read_into
from k2quant.errors import BadValue, CheckpointError, DtypeMismatch, MalformedFile, MissingTensor, UnsupportedFormat
from k2quant.formats.dtypes import DTYPES, FLOATS, TensorSpec
from k2quant.merge import layouts
from k2quant.merge.settings import Settings, read_settings

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"

_PREFIX = re.compile(r"base_model\.model\.")
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:(?:\.(?P<adapter>[^.]+))?\.weight)?")
_WHOLE = re.compile(r"(?P<module>.+?)(?:\.modules_to_save(?:\.(?P<adapter>[^.]+))?)?\.(?P<suffix>[^.]+)")
_OTHER_PARTS = ("lora_", "trainable_tokens", "original_module", "base_layer")
"""Parts of names that no tensor of a plain LoRA or of a module that is saved whole has."""

_AS_PEFT = "save or convert the adapter as PEFT does: lora_A.weight and lora_B.weight for each module"

_EMBEDDINGS = ("embed_tokens", "lm_head")  # PEFT saves them unasked when the vocabulary was resized


class Pair(NamedTuple):
    """The factors of one module's update."""

    a: TensorEntry
    """`lora_A`."""
    b: TensorEntry
    """`lora_B`."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter as its config and header describe it; `check_values` reads its values."""

    folder: Path
    settings: Settings
    shard: ShardHeader
    """Its one file of tensors."""
    pairs: dict[str, Pair]
    """By the module's name, without `base_model.model.`."""
    whole: dict[str, TensorEntry]
    """Tensors that replace the base's, by their name in the model."""
    follow_links: bool = False
    """Whether links of the folder may lead out of it."""

    def digests(self) -> dict[str, str]:
        """Return a sha256 of each of its files."""
        found = {}
        for name in (CONFIG, WEIGHTS):
            with os.fdopen(open_regular(inside(self.folder, name, follow_links=self.follow_links)), "rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
        return found


def open_adapter(folder: Path, *, follow_links: bool = False) -> Adapter:
    """Read an adapter's config and header.

    Args:
        folder: as save_pretrained of PEFT wrote it.
        follow_links: whether links of the folder may lead out of it.

    Raises:
        CheckpointError: the folder holds no adapter, one that lies about itself, or none that can be merged.
    """
    try:
        return _open(folder, follow_links=follow_links)
    except OSError as error:
        message = "cannot be read"
        raise CheckpointError(message, file=error.filename or folder, found=error.strerror or str(error)) from error


def _open(folder: Path, *, follow_links: bool) -> Adapter:
    check_folder(folder)
    here = partial(inside, folder, follow_links=follow_links)
    for name in (CONFIG, WEIGHTS):
        if not here(name).exists():
            raise _missing(folder, name)
    settings = read_settings(here(CONFIG))
    shard = _by_path(read_header(here(WEIGHTS)))
    factors: dict[str, dict[str, TensorEntry]] = {}
    whole: dict[str, TensorEntry] = {}
    for entry in shard.tensors.values():
        _check_dtype(entry)
        name = _PREFIX.sub("", entry.name, count=1) if _PREFIX.match(entry.name) else entry.name
        if match := _FACTOR.fullmatch(name):
            _add(factors.setdefault(match["module"], {}), match["side"], entry)
        else:
            _add(whole, _whole_name(name, entry, settings, shard), entry)
    pairs = {module: _pair(sides) for module, sides in factors.items()}
    adapter = Adapter(folder, settings, shard, pairs, whole, follow_links)
    _check_saved(adapter)
    return adapter


def _by_path(shard: ShardHeader) -> ShardHeader:
    """Name the file of each tensor by its path: every adapter's has the same name, and errors say which is meant."""
    path = str(shard.path)
    return shard._replace(tensors={name: entry._replace(file=path) for name, entry in shard.tensors.items()})


def _missing(folder: Path, name: str) -> CheckpointError:
    if name == WEIGHTS and (folder / _PICKLE).exists():
        return UnsupportedFormat(
            "pickled weights are never loaded",
            file=folder / _PICKLE,
            expected=WEIGHTS,
            remedy="save the adapter with PEFT's save_pretrained(safe_serialization=True)",
        )
    files = sorted(path.name for path in folder.iterdir())[:5]
    return CheckpointError(
        "no adapter here", file=folder, expected=f"{CONFIG} and {WEIGHTS}", found=", ".join(files) or "an empty folder"
    )


def _check_dtype(entry: TensorEntry) -> None:
    if entry.dtype not in FLOATS:
        raise DtypeMismatch(tensor=entry.name, file=entry.file, expected=" or ".join(FLOATS), found=entry.dtype)


def _add(tensors: dict[str, TensorEntry], key: str, entry: TensorEntry) -> None:
    if key in tensors:
        raise MalformedFile(
            f"stands twice, also as `{tensors[key].name}`",
            tensor=entry.name,
            file=entry.file,
            remedy="save one adapter to a folder",
        )
    tensors[key] = entry


def _pair(sides: dict[str, TensorEntry]) -> Pair:
    if len(sides) == 2:
        return Pair(sides["A"], sides["B"])
    (side, entry) = next(iter(sides.items()))
    other = "B" if side == "A" else "A"
    raise MissingTensor(f"has no lora_{other} beside it", tensor=entry.name, file=entry.file)


def _whole_name(name: str, entry: TensorEntry, settings: Settings, shard: ShardHeader) -> str:
    """Return the name in the model of a tensor that replaces the base's."""
    match = _WHOLE.fullmatch(name)
    if match is None or any(part.startswith(_OTHER_PARTS) for part in name.split(".")):
        raise _foreign("not part of a plain LoRA adapter", name, entry, shard)
    module = match["module"]
    if not any(_is_in(module, saved) for saved in (*settings.saved, *_EMBEDDINGS)):
        raise _foreign("neither a factor nor of a module that modules_to_save names", name, entry, shard)
    return f"{module}.{match['suffix']}"


def _foreign(message: str, name: str, entry: TensorEntry, shard: ShardHeader) -> UnsupportedFormat:
    """Refuse a tensor, with whose layout it is where its name tells, or that of another of the file."""
    layout = next(filter(None, map(layouts.unread, (name, *shard.tensors))), None)
    remedy = _AS_PEFT if layout else None
    return UnsupportedFormat(message, tensor=entry.name, file=entry.file, found=layout, remedy=remedy)


def _is_in(module: str, saved: str) -> bool:
    return f".{saved}." in f".{module}."


def _check_saved(adapter: Adapter) -> None:
    for saved in adapter.settings.saved:
        if not any(_is_in(name.rpartition(".")[0], saved) for name in adapter.whole):
            raise MissingTensor(
                "modules_to_save names a module of which there is no tensor",
                file=adapter.shard.path,
                expected=repr(saved)[:200],
                remedy="the adapter was not saved whole",
            )
    if not adapter.pairs and not adapter.whole:
        raise MissingTensor("has no tensors", file=adapter.shard.path)


def check_values(adapter: Adapter) -> None:
    """Read the whole adapter, a piece at a time.

    Raises:
        BadValue: it holds a NaN or an infinity.
        CheckpointError: it cannot be read.
    """
    import numpy as np

    from k2quant.formats.transcode import Scratch

    scratch = Scratch()
    for entry in adapter.shard.tensors.values():
        step = PIECE_BYTES // DTYPES[entry.dtype].nbytes
        count = entry.nbytes // DTYPES[entry.dtype].nbytes
        for start in range(0, count, step):
            values = scratch.take("values", TensorSpec(entry.dtype, (min(step, count - start),)))
            read_into(adapter.shard, entry.start + start * DTYPES[entry.dtype].nbytes, values.data.cast("B"))
            bad = values & 0x7F80 == 0x7F80 if entry.dtype == "BF16" else ~np.isfinite(values)
            if bad.any():
                place = np.unravel_index(start + int(bad.argmax()), entry.shape)
                raise BadValue(
                    f"NaN or infinity at {tuple(map(int, place))}",
                    tensor=entry.name,
                    file=adapter.shard.path,
                    remedy="the training diverged, or the file is damaged",
                )
