"""Activations between two layers: kept in memory up to a budget, in files beyond it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from k2quant.checkpoint.paths import read_limited, replacing, write_whole
from k2quant.checkpoint.strict_json import parse_object
from k2quant.errors import DestinationForeign, DestinationStale, MalformedFile

_STATE = "k2quant_stream.json"
_STATE_LIMIT = 2**26


class Activations:
    """The hidden states of every batch, as they come out of one stage and go into the next.

    With `lasting`, each stage is written as a whole before the next begins, so that a later run goes on from there.
    """

    def __init__(self, folder: Path, *, budget: int, identity: dict[str, Any], lasting: bool) -> None:
        """Take a folder.

        Args:
            folder: for files; made if need be.
            budget: bytes to keep in memory.
            identity: what the run is about; a folder of another run is refused.
            lasting: whether a later run may go on from here.

        Raises:
            DestinationForeign: the folder holds something else.
            DestinationStale: it belongs to a run of something else.
        """
        self._folder, self._budget, self._lasting, self._identity = folder, budget, lasting, identity
        self._kept: dict[tuple[int, int], Tensor] = {}
        self._held = 0
        folder.mkdir(parents=True, exist_ok=True)
        self.finished = self._resume() if lasting else -1
        """The last stage that is whole, -1 for none."""

    def _resume(self) -> int:
        state = self._folder / _STATE
        if not state.exists():
            if any(self._folder.iterdir()):
                raise DestinationForeign("not empty, and no pass of k2quant", file=self._folder, remedy="name another")
            self._note(-1)
            return -1
        found = parse_object(read_limited(state, _STATE_LIMIT), file=state)
        if found.get("identity") != self._identity:
            raise DestinationStale(
                "a pass over other batches, another checkpoint or other options",
                file=self._folder,
                remedy="name another folder, or remove it",
            )
        stage = found.get("finished")
        if type(stage) is not int or stage < -1:
            raise MalformedFile("the last stage is no number", file=state, found=repr(stage)[:200])
        return stage

    def _note(self, stage: int) -> None:
        record = {"tool": "k2quant", "identity": self._identity, "finished": stage}
        write_whole(self._folder / _STATE, json.dumps(record).encode() + b"\n")

    def put(self, stage: int, batch: int, value: Tensor) -> None:
        """Keep what a stage gave for a batch."""
        value = value.detach().to("cpu").contiguous()
        self._forget(stage, batch)
        if self._held + value.nbytes <= self._budget:
            self._kept[stage, batch] = value
            self._held += value.nbytes
            if not self._lasting:
                return
        with replacing(self._path(stage, batch)) as descriptor, os.fdopen(os.dup(descriptor), "wb") as file:
            np.lib.format.write_array(file, value.view(_BITS[value.dtype]).numpy(), allow_pickle=False)

    def get(self, stage: int, batch: int, dtype: torch.dtype) -> Tensor:
        """Return what a stage gave for a batch, on the CPU.

        Raises:
            MalformedFile: its file is not what was written.
        """
        kept = self._kept.get((stage, batch))
        if kept is not None:
            return kept
        path = self._path(stage, batch)
        try:
            values = np.load(path, allow_pickle=False)
            return torch.from_numpy(values).view(dtype)
        except (OSError, ValueError, RuntimeError, TypeError) as error:
            raise MalformedFile(
                "an activation that cannot be read", file=path, found=str(error)[:200], remedy="remove the folder"
            ) from error

    def finish(self, stage: int, batches: int) -> None:
        """Note that a stage is whole; what went into it is not needed any more."""
        self.finished = stage
        if self._lasting:
            self._note(stage)
        for batch in range(batches):
            self._forget(stage - 1, batch)

    def _forget(self, stage: int, batch: int) -> None:
        kept = self._kept.pop((stage, batch), None)
        self._held -= kept.nbytes if kept is not None else 0
        self._path(stage, batch).unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove everything: the pass is through."""
        self._kept.clear()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, stage: int, batch: int) -> Path:
        return self._folder / f"{stage:04}-{batch:06}.npy"


_BITS = {torch.bfloat16: torch.uint16, torch.float16: torch.uint16, torch.float32: torch.float32}
