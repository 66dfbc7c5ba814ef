"""A checkpoint as its index and headers describe it; no weight is read here.

The index is the authority: a tensor that it lacks is missing, whatever the shards hold.
"""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from k2quant.checkpoint.files import kinds
from k2quant.checkpoint.files.paths import inside, read_limited
from k2quant.checkpoint.files.sources import check_folder
from k2quant.checkpoint.files.strict_json import parse_object
from k2quant.checkpoint.header import ShardHeader, TensorEntry, read_header, read_remote_header
from k2quant.checkpoint.remote.address import Address, spot
from k2quant.errors import CheckpointError, MalformedFile, MissingTensor, ShapeMismatch, UnsupportedFormat
from k2quant.formats.configs import modelopt
from k2quant.formats.dtypes import FLOATS
from k2quant.ground import names, pool
from k2quant.ground.saying.showing import brief
from k2quant.ground.units import counted

if TYPE_CHECKING:
    from k2quant.checkpoint.supply.supply import Supply

_log = logging.getLogger(__name__)

INDEX, SINGLE, CONFIG, REPORT, INCOMPLETE = kinds.INDEX, kinds.SINGLE, kinds.CONFIG, kinds.REPORT, kinds.INCOMPLETE

_INDEX_LIMIT = 512_000_000  # K2.5 has 208,550 tensors, some 100 bytes each
_CONFIG_LIMIT = 16_000_000
_HEADERS_ABREAST = 16  # shards of a place whose headers are read at a time: each takes two round trips
_EXPERTS_LIMIT = 2**16  # K2 has 384; more are an attempt to keep the reader busy


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder with a safetensors checkpoint, here or at an address."""

    folder: Path
    """Of a checkpoint at an address, a local folder that holds all of its files but shards."""
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
    supply: Supply | None = None
    """Who has the bytes of shards that are not here; None for a local folder."""
    rate: float | None = None
    """Bytes a second at which the headers came over a network, several at a time; None where they were all here. Small
    requests wait more than they carry, so that weights may come faster."""

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
    def place(self) -> Path | Address:
        """Where the checkpoint lies, for messages and reports: its folder, or its address with the commit of a hub."""
        return self.folder if self.supply is None else self.supply.place.address

    def named(self, file: str) -> Path | str:
        """Return how messages name a file of it."""
        return self.folder / file if self.supply is None else self.supply.place.address.child(file)

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
        """Return what identifies this source: sizes, times and header digests of its shards, and its config.

        Of a checkpoint at an address: what its place says of versions, in place of times.
        """
        return {
            **({} if self.supply is None else {"address": str(self.place)}),
            "shards": {
                name: {"size": shard.size, **_when(shard), "header_sha256": shard.sha256}
                for name, shard in self.shards.items()
            },
            "config_sha256": hashlib.sha256(self.config_bytes()).hexdigest() if self.config else None,
            "tensors_sha256": hashlib.sha256(
                "\n".join(f"{entry.file} {name}" for name, entry in self.tensors.items()).encode()
            ).hexdigest(),
        }

    def stamps(self, names: Iterable[str]) -> dict[str, list[int | str]]:
        """Return for files beside the weights what changes with each: its size, and its time or version.

        Raises:
            OSError: one cannot be looked at.
        """
        if self.supply is not None:
            files = self.supply.place.files
            return {name: [files[name].size, files[name].version] for name in names}
        found = {name: (self.folder / name).stat() for name in names}
        return {name: [status.st_size, status.st_mtime_ns] for name, status in found.items()}


def _when(shard: ShardHeader) -> dict[str, Any]:
    return {"mtime_ns": shard.mtime_ns} if shard.version is None else {"version": shard.version}


def open_checkpoint(folder: Path | Address | str, *, follow_links: bool = False) -> Checkpoint:
    """Read a checkpoint's index, headers and config.

    Args:
        folder: of the checkpoint, or its address: `hf://org/name@revision`, `s3://bucket/prefix`. Of what lies at an
            address all files but the shards are fetched, into the hub's cache or the user's; shards are read by range.
        follow_links: whether its links may lead out of it. Then whoever made the folder chooses which files are read,
            and copied along; index and shards are checked as ever, and names in the index never lead out.

    Raises:
        CheckpointError: the folder holds no checkpoint, or one that lies about itself.
        UsageError: an address that is none.
    """
    begun = time.monotonic()
    place = spot(folder) if isinstance(folder, str) else folder
    try:
        found = _open(_remote(place) if isinstance(place, Address) else _Files(place, follow_links))
    except OSError as error:
        message = "cannot be read"
        raise CheckpointError(message, file=error.filename or place, found=error.strerror or str(error)) from error
    what = counted(len(found.shards), "shard"), counted(len(found.tensors), "tensor")
    _log.info("%s: %s, %s; headers read in %.2f s", found.place, *what, time.monotonic() - begun)
    return found


class _Files(NamedTuple):
    """What is read of a checkpoint to open it: files of a folder, and shards that may be elsewhere."""

    folder: Path
    follow_links: bool
    supply: Supply | None = None
    local: Callable[[str], Path | None] = lambda _: None
    """Where a place's shard lies here already."""

    def path(self, name: str) -> Path:
        return inside(self.folder, name, follow_links=self.follow_links)

    def shown(self, name: str | None = None) -> object:
        """Return how messages name the checkpoint, or a file of it."""
        if self.supply is None:
            return self.folder if name is None else self.folder / name
        address = self.supply.place.address
        return address if name is None else address.child(name)

    def has(self, shard: str) -> bool:
        path = self.path(shard)
        return path.exists() if self.supply is None else shard in self.supply.place.files

    def headers(self, shards: Iterable[str]) -> dict[str, ShardHeader]:
        """Return headers by file name, in order; over a network several are read at a time."""
        names = list(shards)
        if self.supply is None:
            return {name: read_header(self.path(name)) for name in names}
        found: dict[str, ShardHeader] = {}

        def work(name: str) -> None:
            found[name] = self._header(name)

        pool.run(iter(names), work, workers=max(min(_HEADERS_ABREAST, len(names)), 1))
        return {name: found[name] for name in names}

    def _header(self, name: str) -> ShardHeader:
        if self.supply is None:
            return read_header(self.path(name))
        path, here = self.path(name), self.local(name)
        if here is not None:
            return read_header(here)._replace(version=self.supply.place.files[name].version)
        return read_remote_header(self.supply.place, name, path, self.supply)


def _remote(address: Address) -> _Files:
    """Fetch what is small of a checkpoint at an address."""
    from k2quant.checkpoint.remote.opening import open_place, small_files
    from k2quant.checkpoint.supply.supply import Supply

    place = open_place(address)
    return _Files(small_files(place), follow_links=False, supply=Supply(place), local=place.local)


def _open(files: _Files) -> Checkpoint:
    folder = files.folder
    check_folder(folder, addresses=True)
    if (folder / INCOMPLETE).exists():
        raise CheckpointError(
            "not finished: still being written, or its writer was stopped",
            file=files.shown(),
            remedy="run the command that wrote it again: a conversion resumes, a save begins anew",
        )
    weight_map = _weight_map(files)
    begun = time.monotonic()
    shards = files.headers(sorted(set(weight_map.values()), key=_natural))
    asked, seconds = sum(shard.bytes_asked for shard in shards.values()), time.monotonic() - begun
    missing = next((name for name, file in weight_map.items() if name not in shards[file].tensors), None)
    if missing is not None:
        raise MissingTensor(
            "the index names a tensor that its shard lacks", tensor=missing, file=files.shown(weight_map[missing])
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
    rate = asked / max(seconds, 1e-6) if asked else None
    config = _read_config(files, CONFIG)
    if config is not None and any(name.endswith(modelopt.MARK) for name in tensors):
        config = modelopt.completed(config, _read_config(files, modelopt.COMPANION) or {})
    return Checkpoint(folder, shards, tensors, tuple(unlisted), config, files.follow_links, files.supply, rate)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts `model-2-of-61` before `model-10-of-61`."""
    return [(int(part) if part.isdecimal() else 0, part) for part in re.split(r"(\d{1,18})", name)]


def _weight_map(files: _Files) -> dict[str, str]:
    """Return which shard holds which tensor, from the index or, without one, from a single shard's header."""
    index, shown = files.path(INDEX), files.shown(INDEX)
    if index.exists():
        content = parse_object(read_limited(index, _INDEX_LIMIT), file=shown)
        weight_map = content.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise MalformedFile("has no weight_map", file=shown)
        wrong = next((name for name, file in weight_map.items() if not isinstance(file, str)), None)
        if wrong is not None:
            raise MalformedFile("the file of a tensor is no string", tensor=repr(wrong)[:200], file=shown)
        stray = next((file for file in weight_map.values() if not file.endswith(".safetensors")), None)
        if stray is not None:
            raise UnsupportedFormat(
                "the index names a file that is not safetensors", file=shown, found=repr(stray)[:200], remedy=_NO_PICKLE
            )
        absent = next((file for file in set(weight_map.values()) if not files.has(file)), None)
        if absent is not None:
            raise MissingTensor("the index names a file that is not there", file=files.shown(absent))
        return weight_map
    if files.has(SINGLE):
        return dict.fromkeys(files.headers([SINGLE])[SINGLE].tensors, SINGLE)
    raise _nothing_to_read(files)


_NO_PICKLE = "pickled weights are never loaded: convert them to safetensors with the tool that wrote them"


def _nothing_to_read(files: _Files) -> CheckpointError:
    folder, supply = files.folder, files.supply
    found = sorted(path.name for path in folder.iterdir()) if supply is None else sorted(supply.place.files)
    pickles = [name for name in found if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl"))]
    if pickles:
        return UnsupportedFormat("only pickled weights here", file=files.shown(), found=pickles[0], remedy=_NO_PICKLE)
    revision = next(folder.glob("snapshots/*/"), None)  # the hub cache's own folder of a model
    return CheckpointError(
        "no checkpoint here",
        file=files.shown(),
        expected=f"{INDEX} or {SINGLE}",
        found=", ".join(found[:5]) or "an empty folder",
        remedy=f"name the folder of a revision: {revision}" if revision is not None else None,
    )


def _read_config(files: _Files, name: str) -> dict[str, Any] | None:
    path = files.path(name)
    return parse_object(read_limited(path, _CONFIG_LIMIT), file=files.shown(name)) if path.exists() else None


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
