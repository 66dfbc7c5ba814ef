"""Activations between two layers: kept in memory up to a budget, in files beyond it.

A file holds the bytes of one batch and nothing else: its size follows from the batch, and its checksum is kept beside
the number of the last whole stage.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from k2quant.checkpoint.files.checksum import crc32
from k2quant.checkpoint.files.locks import locked_file
from k2quant.checkpoint.files.paths import (
    as_output_error,
    check_inside,
    open_regular,
    read_limited,
    replacing,
    write_all,
    write_whole,
)
from k2quant.checkpoint.files.strict_json import parse_object
from k2quant.errors import DestinationForeign, DestinationStale, MalformedFile
from k2quant.formats.dtypes import as_memory

_STATE, _LOCK = "k2quant_stream.json", "k2quant_stream.lock"
_STATE_LIMIT = 2**26
_OWN = re.compile(r"([0-9]{4,}-[0-9]{6,}\.bin|k2quant_stream\.json)(\.partial)?|k2quant_stream\.lock(\.soft)?")


class Activations:
    """The hidden states of every batch, as they come out of one stage and go into the next.

    With `lasting`, each stage is written as a whole before the next begins, so that a later run goes on from there.
    """

    def __init__(
        self,
        folder: Path,
        shapes: list[tuple[int, ...]],
        dtype: torch.dtype,
        *,
        budget: int,
        identity: dict[str, Any],
        lasting: bool,
    ) -> None:
        """Take a folder, which `held` has locked.

        Args:
            folder: for files.
            shapes: of each batch's activations.
            dtype: of all.
            budget: bytes to keep in memory.
            identity: what the run is about; a folder of another run is refused.
            lasting: whether a later run may go on from here.

        Raises:
            DestinationStale: the folder belongs to a run of something else.
            MalformedFile: its note of what is done is damaged.
        """
        self._folder, self._shapes, self._dtype = folder, shapes, dtype
        self._budget, self._lasting, self._identity = budget, lasting, identity
        self._kept: dict[tuple[int, int], Tensor] = {}
        self._sums: dict[tuple[int, int], int] = {}
        self._held = 0
        self.finished = self._resume() if lasting else -1
        """The last stage that is whole, -1 for none."""

    def _resume(self) -> int:
        path = self._folder / _STATE
        if not path.exists():
            self._note(-1)
            return -1
        found = parse_object(read_limited(path, _STATE_LIMIT), file=path)
        if found.get("identity") != self._identity:
            raise DestinationStale(
                "a pass over other batches, another checkpoint or other options",
                file=self._folder,
                remedy="name another folder, or remove it",
            )
        stage, sums = found.get("finished"), found.get("crc32")
        whole = isinstance(sums, list) and len(sums) in {0, len(self._shapes)} and all(type(s) is int for s in sums)
        if type(stage) is not int or stage < -1 or not whole or (stage >= 0 and not sums):
            raise MalformedFile("says what no pass leaves behind", file=path, remedy="remove the folder")
        self._sums = {(stage, batch): crc for batch, crc in enumerate(sums or [])}
        return stage

    def _note(self, stage: int) -> None:
        sums = [self._sums[stage, batch] for batch in range(len(self._shapes))] if stage >= 0 else []
        record = {"tool": "k2quant", "identity": self._identity, "finished": stage, "crc32": sums}
        write_whole(self._folder / _STATE, json.dumps(record).encode() + b"\n")

    def put(self, stage: int, batch: int, value: Tensor) -> None:
        """Keep what a stage gave for a batch.

        Raises:
            OutputError: the disk is full or fails.
        """
        value = value.detach().to("cpu").contiguous()
        self._forget(stage, batch)
        fits = self._held + value.nbytes <= self._budget
        if fits:
            self._kept[stage, batch] = value
            self._held += value.nbytes
        if self._lasting or not fits:
            data = as_memory(value)
            self._sums[stage, batch] = crc32(data)
            with as_output_error(self._folder), replacing(self._path(stage, batch)) as descriptor:
                write_all(descriptor, data, 0)

    def get(self, stage: int, batch: int) -> Tensor:
        """Return what a stage gave for a batch, on the CPU.

        Raises:
            MalformedFile: its file is not what was written.
        """
        kept = self._kept.get((stage, batch))
        return self._read(stage, batch) if kept is None else kept

    def _read(self, stage: int, batch: int) -> Tensor:
        path, value = self._path(stage, batch), torch.empty(self._shapes[batch], dtype=self._dtype)
        data, begun = as_memory(value), 0
        check_inside(self._folder, path)
        try:
            with os.fdopen(open_regular(path), "rb", buffering=0) as file:
                whole = os.fstat(file.fileno()).st_size == len(data)
                while whole and begun < len(data):
                    count = file.readinto(data[begun:])
                    whole, begun = bool(count), begun + (count or 0)
        except OSError as error:
            raise MalformedFile("an activation that cannot be read", file=path, found=error.strerror) from error
        if not whole or crc32(data) != self._sums.get((stage, batch)):
            raise MalformedFile("not the activation that was written", file=path, remedy="remove the folder")
        return value

    def finish(self, stage: int) -> None:
        """Note that a stage is whole; what went into it is not needed any more.

        Raises:
            OutputError: the disk is full or fails.
        """
        self.finished = stage
        if self._lasting:
            with as_output_error(self._folder):
                self._note(stage)
        for batch in range(len(self._shapes)):
            self._forget(stage - 1, batch)

    def _forget(self, stage: int, batch: int) -> None:
        kept = self._kept.pop((stage, batch), None)
        self._held -= kept.nbytes if kept is not None else 0
        self._sums.pop((stage, batch), None)
        self._path(stage, batch).unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove what is ours, the note of what is done last: the pass is through."""
        self._kept.clear()
        ours = [path for path in self._folder.iterdir() if _OWN.fullmatch(path.name)]
        for path in sorted(ours, key=lambda path: (path.name == _LOCK, path.name == _STATE)):
            path.unlink(missing_ok=True)

    def _path(self, stage: int, batch: int) -> Path:
        return self._folder / f"{stage:04}-{batch:06}.bin"


@contextlib.contextmanager
def held(folder: Path, *, soft_lock: bool = False) -> Iterator[None]:
    """Make a folder if need be and keep others out of it; an empty one is removed in the end.

    Args:
        folder: the folder.
        soft_lock: whether a file may be the lock where the file system has no others.

    Raises:
        DestinationInUse: another pass works in it.
        DestinationForeign: it holds something else, or is no folder.
        OutputError: it cannot be made.
    """
    with as_output_error(folder):
        if (folder.exists() or folder.is_symlink()) and not folder.is_dir():
            raise DestinationForeign("not a folder", file=folder, remedy="name another one")
        folder.mkdir(parents=True, exist_ok=True)
        inside = {path.name for path in folder.iterdir()}
        if _STATE not in inside and not all(map(_OWN.fullmatch, inside)):
            raise DestinationForeign("not empty, and no pass of k2quant", file=folder, remedy="name another one")
        with locked_file(folder / _LOCK, soft=soft_lock):
            yield
    with contextlib.suppress(OSError):
        folder.rmdir()
