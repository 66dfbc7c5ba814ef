"""What a killed evaluation keeps: finished chunks of requests, one a line, and a model that answers from them.

lm-eval's own cache is not used: its key holds no identity of the model, so two models on one path score the same.
"""

from __future__ import annotations

import copy
import json
import math
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from k2quant.checkpoint.files.paths import read_limited
from k2quant.checkpoint.files.strict_json import parse_object
from k2quant.errors import HarnessFault, MalformedFile
from k2quant.eval.runs.identity import digest

Progress = Callable[[int, int], None]
"""Called with the requests that are answered and all requests."""

_LIMIT = 2**34  # bytes of a journal
_SCORED_AT_ONCE = 64  # batches of log-likelihoods in a chunk: seconds of work, and few batches cut at a chunk's end
_ALL_THE_SAME = 3  # so many requests with one log-probability are no coincidence
_ROUNDING = 1e-3  # nats that a sum of logarithms may lie above 0


class Journal:
    """Answers on the disk, by the digest of what was asked.

    A line is a crc32 and a JSON object. The first that is torn or wrong ends the journal; what follows was never
    answered for certain.
    """

    def __init__(self, path: Path) -> None:
        """Read what is there and cut off a torn end.

        Args:
            path: of the journal, which need not exist.
        """
        self._path = path
        self._answers: dict[str, list[Any]] = {}
        good = 0
        for line in _lines(path):
            record = _record(line, path)
            if record is None:
                break
            self._answers[record["chunk"]] = record["answers"]
            good += len(line)
        if path.exists():
            os.truncate(path, good)

    def __len__(self) -> int:
        """How many chunks are answered."""
        return len(self._answers)

    def get(self, chunk: str) -> list[Any] | None:
        """Return the answers to a chunk, or None."""
        return self._answers.get(chunk)

    def add(self, chunk: str, answers: list[Any]) -> None:
        """Append the answers to a chunk and flush them to the disk."""
        body = json.dumps({"chunk": chunk, "answers": answers}, separators=(",", ":")).encode()
        with self._path.open("ab") as file:
            file.write(b"%08x %s\n" % (zlib.crc32(body), body))
            file.flush()
            os.fsync(file.fileno())
        self._answers[chunk] = answers


def _lines(path: Path) -> list[bytes]:
    return read_limited(path, _LIMIT).splitlines(keepends=True) if path.exists() else []


def _record(line: bytes, path: Path) -> dict[str, Any] | None:
    crc, _, body = line.partition(b" ")
    try:
        if not line.endswith(b"\n") or int(crc, 16) != zlib.crc32(body[:-1]):
            return None
        record = parse_object(body, file=path)
    except (ValueError, MalformedFile):
        return None
    return record if isinstance(record.get("chunk"), str) and isinstance(record.get("answers"), list) else None


class Resuming:
    """A model of lm-eval's that answers from a journal what stands there and writes there what it is asked.

    Requests are put in an order and cut into chunks that depend on nothing but the requests, so that each batch is made
    of the same texts whether a run was stopped or not, and floating point gives the same bits.
    """

    def __init__(self, model: Any, journal: Journal, *, batch_size: int, progress: Progress | None = None) -> None:
        """Stand in for a model.

        Args:
            model: an `LM` of lm-eval; what is not a request goes to it.
            journal: where answers are kept.
            batch_size: how many texts the model is asked at once.
            progress: called when requests are answered.
        """
        self._model, self._journal, self._progress = model, journal, progress
        self._batch_size = batch_size
        self._done = self._total = 0
        self.cut: dict[str, int | None] = {}
        """By task, how many answers ended only because they were as long as allowed; None where nobody knows."""

    def __getattr__(self, name: str) -> Any:
        """Whatever else lm-eval asks of a model."""
        return getattr(self._model, name)

    def expect(self, total: int) -> None:
        """Say how many requests there will be."""
        self._total = total

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Return log-probability and greediness of each continuation.

        Raises:
            HarnessFault: a log-probability is no number or above 0, or those of a task are all the same.
        """
        answers = self._answers("loglikelihood", requests, self._batch_size * _SCORED_AT_ONCE)
        found = [(float(score), bool(greedy)) for score, greedy in answers]
        _check_scores(requests, [score for score, _ in found])
        return found

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """Return the log-probability of each text.

        Raises:
            HarnessFault: one is no number or above 0, or those of a task are all the same.
        """
        found = [float(score) for score in self._answers("loglikelihood_rolling", requests, self._batch_size)]
        _check_scores(requests, found)
        return found

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Return what the model writes after each context."""
        answers = self._answers("generate_until", requests, self._batch_size)
        for request, (_, cut) in zip(requests, answers, strict=True):
            before = self.cut.get(request.task_name, 0)
            self.cut[request.task_name] = None if cut is None or before is None else before + bool(cut)
        return [text for text, _ in answers]

    def _answers(self, kind: str, requests: list[Any], size: int) -> list[Any]:
        answers: list[Any] = [None] * len(requests)
        before: Counter[str] = Counter()  # a task that samples asks the same more than once, and wants other answers
        for places in _chunks(kind, requests, size):
            chunk = [requests[place] for place in places]
            content = digest([kind, [request.args for request in chunk]])
            key = digest([content, before[content]]) if before[content] else content
            before[content] += 1
            found = self._journal.get(key)
            if found is None or len(found) != len(chunk):
                found = self._ask(kind, chunk, key)
            for place, answer in zip(places, found, strict=True):
                answers[place] = answer
            self._done += len(chunk)
            if self._progress:
                self._progress(self._done, max(self._total, self._done))
        return answers

    def _ask(self, kind: str, chunk: list[Any], key: str) -> list[Any]:
        import torch

        torch.manual_seed(int(key[:15], 16))  # a task that samples draws the same, resumed or not
        asked = [copy.copy(request) for request in chunk]
        for request in asked:
            request.arguments = copy.deepcopy(request.arguments)  # some models of lm-eval add stop strings to it
        answers = list(getattr(self._model, kind)(asked))
        if kind == "generate_until":
            answers = list(zip(answers, self._model.were_cut(asked, answers), strict=True))
        self._journal.add(key, answers)
        return answers


def _chunks(kind: str, requests: list[Any], size: int) -> Iterator[list[int]]:
    """Yield places of requests, the longest first, so that texts of a batch are of like length."""

    def order(place: int) -> tuple[Any, ...]:
        context, *rest = requests[place].args
        settings = json.dumps(rest, sort_keys=True, default=str)
        group = settings if kind == "generate_until" else ""
        return group, -len(context), context, settings, place

    places = sorted(range(len(requests)), key=order)
    begin = 0
    while begin < len(places):
        end = begin + 1
        group = order(places[begin])[0]
        while end < min(begin + size, len(places)) and order(places[end])[0] == group:
            end += 1
        yield places[begin:end]
        begin = end


def _check_scores(requests: list[Any], scores: list[float]) -> None:
    by_task: dict[str, set[float]] = {}
    for request, score in zip(requests, scores, strict=True):
        if math.isnan(score):
            raise HarnessFault("a log-probability is no number", found=f"NaN in task {request.task_name}")
        if score > _ROUNDING:
            raise HarnessFault("a log-probability above 0", found=f"{score} in task {request.task_name}")
        by_task.setdefault(request.task_name, set()).add(score)
    counts = Counter(request.task_name for request in requests)
    for task, values in by_task.items():
        if len(values) == 1 and counts[task] >= _ALL_THE_SAME:
            raise HarnessFault(
                f"all {counts[task]} log-probabilities of task {task} are {values.pop()}",
                remedy="the server or model does not score text; every choice would tie and accuracy would be chance",
            )
