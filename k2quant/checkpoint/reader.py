"""A checkpoint as its index and headers describe it; no weight is read here.

The index is the authority: a tensor that it lacks is missing, whatever the shards hold.
"""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from k2quant.checkpoint.files.paths import inside, read_limited
from k2quant.checkpoint.files.sources import check_folder
from k2quant.checkpoint.files.strict_json import parse_object
from k2quant.checkpoint.header import ShardHeader, TensorEntry, read_header
from k2quant.errors import CheckpointError, MalformedFile, MissingTensor, ShapeMismatch, UnsupportedFormat
from k2quant.formats.configs import modelopt
from k2quant.formats.dtypes import FLOATS
from k2quant.ground import names
from k2quant.ground.saying.showing import brief
from k2quant.ground.units import counted

_log = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONFIG = "config.json"
REPORT = "k2quant_report.json"
INCOMPLETE = "INCOMPLETE"
"""A file that stands in the destination as long as it is not finished, and says so to whoever looks."""

_INDEX_LIMIT = 512_000_000  # K2.5 has 208,550 tensors, some 100 bytes each
_CONFIG_LIMIT = 16_000_000
_EXPERTS_LIMIT = 2**16  # K2 has 384; more are an attempt to keep the reader busy


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder with a safetensors checkpoint."""

    folder: Path
    shards: dict[str, ShardHeader]
    """The shards that the index names, by file name, in natural order."""
    tensors: dict[str, TensorEntry]
    """The tensors that the index names, by shard and position; fused experts stand here one by one."""
    unlisted: tuple[str, ...]
    """Tensors that lie in a shard where the index does not look for them. Nobody reads them."""
    config: dict[str, Any] | None
    """What config.json holds, or None where there is none. Where ModelOpt says in a file of its own alone how weights
    are quantised, that stands here too."""
    follow_links: bool = False
    """Whether links of the folder may lead out of it; all that reads the folder later asks the same."""

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)

    def path(self, name: str) -> Path:
        """Return the path of a file of the folder.

        Raises:
            UnsafePath: the name, or a link that may not be followed, leads out of it.
        """
        return inside(self.folder, name, follow_links=self.follow_links)

    @property
    def stale(self) -> tuple[str, ...]:
        """Those of `unlisted` that are old copies: the index looks for the same tensor in another place."""
        return tuple(name for name in self.unlisted if name in self.tensors or _first_part(name) in self.tensors)

    def config_bytes(self) -> bytes:
        """Return what stands in config.json, which is there.

        Raises:
            MalformedFile: it has grown beyond all measure since it was read, or is no regular file any more.
            UnsafePath: it has become a link out of the folder.
            OSError: it cannot be read.
        """
        return read_limited(self.path(CONFIG), _CONFIG_LIMIT)

    def fingerprint(self) -> dict[str, Any]:
        """Return what identifies this source: sizes, times and header digests of its shards, and its config."""
        return {
            "shards": {
                name: {"size": shard.size, "mtime_ns": shard.mtime_ns, "header_sha256": shard.sha256}
                for name, shard in self.shards.items()
            },
            "config_sha256": hashlib.sha256(self.config_bytes()).hexdigest() if self.config else None,
            "tensors_sha256": hashlib.sha256(
                "\n".join(f"{entry.file} {name}" for name, entry in self.tensors.items()).encode()
            ).hexdigest(),
        }


def open_checkpoint(folder: Path, *, follow_links: bool = False) -> Checkpoint:
    """Read a checkpoint's index, headers and config.

    Args:
        folder: of the checkpoint.
        follow_links: whether its links may lead out of it. Then whoever made the folder chooses which files are read,
            and copied along; index and shards are checked as ever, and names in the index never lead out.

    Raises:
        CheckpointError: the folder holds no checkpoint, or one that lies about itself.
    """
    begun = time.monotonic()
    try:
        found = _open(folder, follow_links=follow_links)
    except OSError as error:
        message = "cannot be read"
        raise CheckpointError(message, file=error.filename or folder, found=error.strerror or str(error)) from error
    what = counted(len(found.shards), "shard"), counted(len(found.tensors), "tensor")
    _log.info("%s: %s, %s; headers read in %.2f s", folder, *what, time.monotonic() - begun)
    return found


def _open(folder: Path, *, follow_links: bool) -> Checkpoint:
    check_folder(folder)
    if (folder / INCOMPLETE).exists():
        raise CheckpointError(
            "not finished: still being written, or its writer was stopped",
            file=folder,
            remedy="run the command that wrote it again: a conversion resumes, a save begins anew",
        )
    here = partial(inside, folder, follow_links=follow_links)
    weight_map = _weight_map(folder, here)
    shards = {name: read_header(here(name)) for name in sorted(set(weight_map.values()), key=_natural)}
    missing = next((name for name, file in weight_map.items() if name not in shards[file].tensors), None)
    if missing is not None:
        raise MissingTensor(
            "the index names a tensor that its shard lacks", tensor=missing, file=folder / weight_map[missing]
        )
    listed: list[TensorEntry] = []
    unlisted: list[str] = []
    for file, shard in shards.items():
        for entry in sorted(shard.tensors.values(), key=lambda entry: (entry.start, entry.stop)):
            if weight_map.get(entry.name) == file:
                listed.append(entry)
            else:
                unlisted.append(entry.name)
    tensors = _unfused(listed)
    config = _read_config(here(CONFIG))
    if config is not None and any(name.endswith(modelopt.MARK) for name in tensors):
        config = modelopt.completed(config, _read_config(here(modelopt.COMPANION)) or {})
    return Checkpoint(folder, shards, tensors, tuple(unlisted), config, follow_links)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts `model-2-of-61` before `model-10-of-61`."""
    return [(int(part) if part.isdecimal() else 0, part) for part in re.split(r"(\d{1,18})", name)]


def _weight_map(folder: Path, here: Callable[[str], Path]) -> dict[str, str]:
    """Return which shard holds which tensor, from the index or, without one, from a single shard's header."""
    index = here(INDEX)
    if index.exists():
        content = parse_object(read_limited(index, _INDEX_LIMIT), file=index)
        weight_map = content.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise MalformedFile("has no weight_map", file=index)
        wrong = next((name for name, file in weight_map.items() if not isinstance(file, str)), None)
        if wrong is not None:
            raise MalformedFile("the file of a tensor is no string", tensor=repr(wrong)[:200], file=index)
        stray = next((file for file in weight_map.values() if not file.endswith(".safetensors")), None)
        if stray is not None:
            raise UnsupportedFormat(
                "the index names a file that is not safetensors", file=index, found=repr(stray)[:200], remedy=_NO_PICKLE
            )
        absent = next((file for file in set(weight_map.values()) if not here(file).exists()), None)
        if absent is not None:
            raise MissingTensor("the index names a file that is not there", file=folder / absent)
        return weight_map
    single = here(SINGLE)
    if single.exists():
        return dict.fromkeys(read_header(single).tensors, SINGLE)
    raise _nothing_to_read(folder)


_NO_PICKLE = "pickled weights are never loaded: convert them to safetensors with the tool that wrote them"


def _nothing_to_read(folder: Path) -> CheckpointError:
    files = sorted(path.name for path in folder.iterdir())
    pickles = [name for name in files if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl"))]
    if pickles:
        return UnsupportedFormat("only pickled weights here", file=folder, found=pickles[0], remedy=_NO_PICKLE)
    revision = next(folder.glob("snapshots/*/"), None)  # the hub cache's own folder of a model
    return CheckpointError(
        "no checkpoint here",
        file=folder,
        expected=f"{INDEX} or {SINGLE}",
        found=", ".join(files[:5]) or "an empty folder",
        remedy=f"name the folder of a revision: {revision}" if revision is not None else None,
    )


def _read_config(path: Path) -> dict[str, Any] | None:
    return parse_object(read_limited(path, _CONFIG_LIMIT), file=path) if path.exists() else None


def _unfused(entries: list[TensorEntry]) -> dict[str, TensorEntry]:
    """Return the tensors by name, with each fused experts tensor taken apart into its experts' projections."""
    tensors: dict[str, TensorEntry] = {}
    for entry in entries:
        fused = names.fused_experts(entry.name)
        for part in _experts(entry, fused) if fused else (entry,):
            if part.name in tensors:
                raise MalformedFile("stands twice, alone and in a fused tensor", tensor=part.name, file=entry.file)
            tensors[part.name] = part
    return tensors


def _first_part(name: str) -> str | None:
    """Return the first projection that a fused experts tensor holds."""
    fused = names.fused_experts(name)
    return f"{fused.prefix}0.{fused.projections[0]}.weight" if fused else None


def _experts(entry: TensorEntry, fused: names.FusedExperts) -> list[TensorEntry]:
    if entry.dtype not in FLOATS:
        raise UnsupportedFormat(
            "fused experts can be read from BF16, F16 and F32 only",
            tensor=entry.name,
            file=entry.file,
            found=entry.dtype,
        )
    pieces = len(fused.projections)
    if len(entry.shape) != 3 or not entry.nbytes or entry.shape[1] % pieces or entry.shape[0] > _EXPERTS_LIMIT:
        raise ShapeMismatch(
            "fused experts",
            tensor=entry.name,
            file=entry.file,
            expected="[E, 2I, H] for gate_up_proj, [E, H, I] for down_proj",
            found=entry.shape,
        )
    experts, rows, width = entry.shape
    step = entry.nbytes // (experts * pieces)
    return [
        TensorEntry(
            f"{fused.prefix}{expert}.{projection}.weight",
            entry.dtype,
            (rows // pieces, width),
            entry.file,
            entry.start + (expert * pieces + piece) * step,
            entry.start + (expert * pieces + piece + 1) * step,
        )
        for expert in range(experts)
        for piece, projection in enumerate(fused.projections)
    ]
