"""Checkpoints of a training: whole or not there, in safetensors and JSON alone, the same for any number of processes.

`RUN/checkpoints/step-00000100/` holds `weights.safetensors` (what is trained, float32 masters as they are),
`optimizer.safetensors`, `watch.safetensors` (what monitors have counted) and `state.json`. It is written under another
name and renamed when all of it is on the disk; only then are older ones deleted.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from k2quant.checkpoint.files.paths import PARTIAL, open_regular, read_limited, sync_folder, write_whole
from k2quant.checkpoint.files.strict_json import parse_object
from k2quant.checkpoint.header import build_header, read_header
from k2quant.checkpoint.reading import read_into
from k2quant.checkpoint.writing.writer import ShardWriter
from k2quant.errors import BadValue, CheckpointError, MalformedFile, OutputError
from k2quant.formats.dtypes import TensorSpec, as_memory, torch_dtype
from k2quant.qat.run.naming import STATE, found, path_of, step_of

FILES = "files"
"""Key of `state.json`: the files beside it with the sha256 of each; parts that had nothing to keep have none."""
STEP = "step"
TRAINING = "training"
"""Key of `state.json`: the digest of what is trained."""
_STATE_LIMIT = 2**26
_DTYPES = {torch_dtype(name): name for name in ("BF16", "F16", "F32", "F8_E4M3", "BOOL", "I8", "U8", "I32", "I64")}
"""What state is kept in, by torch's type."""

Tensors = Mapping[str, Tensor]


def save(
    folder: Path,
    step: int,
    parts: Mapping[str, Iterable[tuple[str, Tensor]]],
    state: Mapping[str, Any],
    *,
    gather: Callable[[Tensor], Tensor],
    writes: bool = True,
) -> None:
    """Save a checkpoint.

    Args:
        folder: of all checkpoints.
        step: that it was saved after.
        parts: file names without suffix, each with its tensors.
        state: what JSON holds of the rest.
        gather: makes a tensor whole; called by every process in the same order.
        writes: whether this process writes; the others only help to gather.

    Raises:
        OutputError: the disk is full or fails; what was saved before stands.
    """
    partial = path_of(folder, step).with_name(path_of(folder, step).name + PARTIAL)
    try:
        if writes:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        files = {}
        for name, tensors in parts.items():
            if held := dict(tensors):
                digest = _write(partial / f"{name}.safetensors", held, gather, writes=writes)
                files[f"{name}.safetensors"] = digest
        if writes:
            content = {**state, STEP: step, FILES: files}
            write_whole(partial / STATE, json.dumps(content, indent=1, allow_nan=False).encode())
            _rename(partial, path_of(folder, step))
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OutputError(
            "a checkpoint cannot be saved",
            file=error.filename or partial,
            found=error.strerror or str(error),
            remedy="what was saved before stands; when that is mended, run the same command again: it resumes",
        ) from error


def prune(folder: Path, keep: int) -> None:
    """Delete all but the last checkpoints, and what an interrupted save left."""
    for path in found(folder)[:-keep]:
        (path / STATE).unlink()  # first, so that no half of it is taken for a checkpoint
        shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(f"*{PARTIAL}"):
        shutil.rmtree(path, ignore_errors=True)


def read_state(path: Path, training: str | None = None) -> dict[str, Any]:
    """Return what a checkpoint's JSON holds, after comparing every file beside it with its digest.

    Args:
        path: of the checkpoint.
        training: digest of the training that it must be of; None: of whichever.

    Raises:
        MalformedFile: it is damaged, or a file beside it is, or it is of another step or training.
    """
    state = parse_object(read_limited(path / STATE, _STATE_LIMIT), file=path / STATE)
    for key, wanted in ((STEP, step_of(path)), (TRAINING, training or state.get(TRAINING))):
        if state.get(key) != wanted:
            raise MalformedFile(f"is of another {key}", file=path / STATE, expected=wanted)
    files = state.get(FILES)
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files):
        raise MalformedFile("does not say which files lie beside it", file=path / STATE)
    for name, digest in files.items():
        _check_digest(path / Path(name).name, digest)
    return state


def _check_digest(path: Path, digest: object) -> None:
    if not path.is_file():
        raise MalformedFile("is gone", file=path)
    with os.fdopen(open_regular(path), "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != digest:
            raise MalformedFile("its bytes are not those that were saved", file=path)


@contextlib.contextmanager
def resuming(path: Path) -> Iterator[None]:
    """Say what to do if a checkpoint turns out to be damaged while the block reads it.

    Raises:
        MalformedFile: it is.
    """
    try:
        yield
    except CheckpointError as error:
        remedy = f"delete {path} to go on from the checkpoint before it, or begin anew with `restart=True`"
        raise MalformedFile(f"a damaged checkpoint: {error}", remedy=remedy) from error


def read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of one file, each read when its turn comes.

    Raises:
        CheckpointError: the file is damaged.
    """
    if not path.exists():  # there was nothing to keep
        return
    shard = read_header(path)
    for entry in shard.tensors.values():
        if entry.dtype not in _DTYPES.values():
            raise MalformedFile(f"a dtype that no checkpoint has, {entry.dtype}", tensor=entry.name, file=path)
        value = torch.empty(entry.shape, dtype=torch_dtype(entry.dtype))
        read_into(shard, entry.start, as_memory(value))
        yield entry.name, value


def _rename(partial: Path, path: Path) -> None:
    if path.exists():  # saved again after a resume: the same bits
        shutil.rmtree(path)
    partial.rename(path)
    sync_folder(path.parent)


def _write(path: Path, tensors: Tensors, gather: Callable[[Tensor], Tensor], *, writes: bool) -> str:
    """Write a file; return its sha256."""
    specs = {name: TensorSpec(_DTYPES[value.dtype], tuple(value.shape)) for name, value in tensors.items()}
    header, spans = build_header(specs)
    writer = ShardWriter(path, header, len(header) + sum(spec.nbytes for spec in specs.values())) if writes else None
    try:
        for name, (start, _) in spans.items():
            value = gather(tensors[name])
            if writer is not None:
                if not value.isfinite().all():
                    raise BadValue(
                        "not finite, so nothing is saved", tensor=name, file=path, remedy="the last checkpoint stands"
                    )
                writer.write(start, as_memory(value.cpu().contiguous()))
        digest = writer.sha256() if writer is not None else ""
        if writer is not None:
            writer.finish()
        return digest
    finally:
        if writer is not None:
            writer.close()
