"""The divergence from a teacher, whole or from its likeliest tokens alone, and the file that keeps those."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from k2quant.checkpoint.files.paths import read_limited, write_whole
from k2quant.checkpoint.files.strict_json import parse_object
from k2quant.checkpoint.header import TensorEntry, build_header, read_header
from k2quant.checkpoint.reading import read_into
from k2quant.checkpoint.writing.writer import ShardWriter
from k2quant.data.packing import NO_TARGET
from k2quant.errors import MalformedFile, OutputError, UsageError
from k2quant.formats.dtypes import TensorSpec, as_memory

IDS, LOGS = "ids", "log_probabilities"
_NOTE_LIMIT = 2**16
_ANEW = "delete it, and the teacher is asked again"

Progress = Callable[[int, int], None]
"""Called with the rows that are done and all rows."""


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return the sum over tokens of KL(teacher || student), times temperature^2 (Hinton et al., arXiv 1503.02531).

    Args:
        student: logits `[T, V]`.
        teacher: logits `[T, V]`.
        temperature: divides both.
    """
    ours = functional.log_softmax(student.float() / temperature, -1)
    theirs = functional.log_softmax(teacher.float() / temperature, -1)
    return functional.kl_div(ours, theirs, reduction="sum", log_target=True) * temperature**2


def divergence_of_likeliest(student: Tensor, ids: Tensor, logs: Tensor, temperature: float) -> Tensor:
    """Return the same where of the teacher only its likeliest tokens are known; the rest counts as one token.

    By the log-sum inequality this is at most the whole divergence.

    Args:
        student: logits `[T, V]`.
        ids: the teacher's likeliest tokens, `[T, k]`.
        logs: their log-probabilities at this temperature, `[T, k]`.
        temperature: divides the student's logits.
    """
    ours = functional.log_softmax(student.float() / temperature, -1).gather(1, ids.long())
    known = (logs.exp() * (logs - ours)).sum()
    rest = _rest(logs)
    return (known + (rest.exp() * (rest - _rest(ours))).sum()) * temperature**2


def _rest(logs: Tensor) -> Tensor:
    """Return the logarithm of what log-probabilities `[T, k]` leave over, `[T]`."""
    taken = logs.exp().sum(1).clamp(max=1 - 1e-6)  # float32 sums end a little above 1
    return torch.log1p(-taken)


class Cache:
    """A teacher's likeliest tokens for each token that is learnt, in one file, row after row."""

    def __init__(self, path: Path, targets: Tensor, vocabulary: int) -> None:
        """Open a finished file.

        Args:
            path: of the file.
            targets: of all rows, `[N, L]`, -100 where nothing is learnt.
            vocabulary: tokens that there are.

        Raises:
            CheckpointError: the file is damaged.
        """
        self._shard = read_header(path)
        self._ends = (targets != NO_TARGET).sum(1).cumsum(0).tolist()
        self._vocabulary = vocabulary
        ids, logs = (self._shard.tensors.get(name) for name in (IDS, LOGS))
        fits = ids is not None and logs is not None and (ids.dtype, logs.dtype) == ("I32", "F32")
        if not fits or ids.shape != logs.shape or len(ids.shape) != 2 or ids.shape[0] != self._ends[-1]:  # type: ignore[union-attr]  # `fits` saw them
            raise MalformedFile(f"does not hold {IDS} and {LOGS} of {self._ends[-1]} tokens", file=path, remedy=_ANEW)

    def rows(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return ids and log-probabilities `[T, k]` of the learnt tokens of some rows, in their order.

        Raises:
            MalformedFile: an id is none of a token.
        """
        pieces = [self._row(int(index)) for index in indices]
        ids, logs = torch.cat([ids for ids, _ in pieces]), torch.cat([logs for _, logs in pieces])
        if not ((ids >= 0) & (ids < self._vocabulary)).all():
            raise MalformedFile(
                "the id of no token",
                tensor=IDS,
                file=self._shard.path,
                expected=f"0 to {self._vocabulary - 1}",
                remedy=_ANEW,
            )
        return ids, logs

    def _row(self, index: int) -> tuple[Tensor, Tensor]:
        begin, end = self._ends[index - 1] if index else 0, self._ends[index]
        return self._read(IDS, torch.int32, begin, end), self._read(LOGS, torch.float32, begin, end)

    def _read(self, name: str, dtype: torch.dtype, begin: int, end: int) -> Tensor:
        entry: TensorEntry = self._shard.tensors[name]
        width = entry.shape[1]
        value = torch.empty(end - begin, width, dtype=dtype)
        read_into(self._shard, entry.start + begin * width * dtype.itemsize, as_memory(value))
        return value


def build_cache(
    path: Path,
    targets: Tensor,
    logits: Callable[[int], Tensor],
    *,
    top_k: int,
    temperature: float,
    identity: dict[str, Any],
    progress: Progress | None = None,
) -> None:
    """Compute a teacher's likeliest tokens of every row once, or take what an earlier run of the same identity kept.

    Args:
        path: of the file; a note beside it says what it was made of.
        targets: of all rows, `[N, L]`.
        logits: the teacher's logits `[T, V]` of the learnt tokens of a row.
        top_k: how many are kept.
        temperature: at which.
        identity: what they depend on: teacher and data.
        progress: called after each row.

    Raises:
        OutputError: the disk is full or fails.
        UsageError: the vocabulary has fewer tokens.
    """
    note, wanted = path.with_suffix(".json"), {**identity, "top_k": top_k, "temperature": temperature}
    if path.exists() and note.exists() and parse_object(read_limited(note, _NOTE_LIMIT), file=note) == wanted:
        return
    try:
        note.unlink(missing_ok=True)
        _write(path, targets, logits, top_k, temperature, progress)
        write_whole(note, json.dumps(wanted).encode())
    except OSError as error:
        raise OutputError(
            "the teacher's tokens cannot be kept", file=error.filename or path, found=error.strerror or str(error)
        ) from error


def _write(
    path: Path,
    targets: Tensor,
    logits: Callable[[int], Tensor],
    top_k: int,
    temperature: float,
    progress: Progress | None,
) -> None:
    count = int((targets != NO_TARGET).sum())
    header, spans = build_header({IDS: TensorSpec("I32", (count, top_k)), LOGS: TensorSpec("F32", (count, top_k))})
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = ShardWriter(path, header, max(spans[IDS][1], spans[LOGS][1]))
    try:
        done = 0
        for row in range(len(targets)):
            found = logits(row)
            if found.shape[-1] < top_k:
                raise UsageError(f"distill: top_k {top_k} is more than the {found.shape[-1]} tokens of the teacher")
            logs, ids = functional.log_softmax(found.float() / temperature, -1).topk(top_k, -1)
            for name, value in ((IDS, ids.to(torch.int32)), (LOGS, logs)):
                writer.write(spans[name][0] + done * top_k * 4, as_memory(value.cpu().contiguous()))
            done += len(found)
            if progress:
                progress(row + 1, len(targets))
        writer.finish()
    finally:
        writer.close()
