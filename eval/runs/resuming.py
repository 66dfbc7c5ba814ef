"""A model of lm-eval's that answers from a journal what stands there, and writes there what it is asked."""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol

from k2quant.errors import HarnessFault
from k2quant.eval.runs.identity import digest, seed_of
from k2quant.eval.runs.journal import Journal

Progress = Callable[[int, int], None]
"""Called with the requests that are answered and all requests."""


class Reader(Protocol):
    """What becomes of answers before lm-eval sees them; the journal has them as the model wrote them."""

    def look(self, texts: Iterable[str]) -> None:
        """See all answers of a run, before the first is read."""

    def read(self, request: Any, text: str, cut: bool | None) -> tuple[str, bool | None]:  # noqa: FBT001  as it is told
        """Return an answer, and whether that was cut.

        Args:
            request: of lm-eval.
            text: all that the model wrote.
            cut: whether it ended at the limit on new tokens; None: not known.
        """


_SCORED_AT_ONCE = 64  # batches of log-likelihoods in a chunk: seconds of work, and few batches cut at a chunk's end
_ALL_THE_SAME = 3  # so many requests with one log-probability are no coincidence
_ROUNDING = 1e-3  # nats that a sum of logarithms may lie above 0


class _Asked(NamedTuple):
    """One request as the model gets it."""

    place: int
    """Among lm-eval's requests."""
    repeat: int
    request: Any
    """A copy, with a seed of its own where it is drawn."""


class Resuming:
    """A model of lm-eval's that answers from a journal what stands there and writes there what it is asked.

    Requests are put in an order and cut into chunks that depend on nothing but the requests, so that each batch is made
    of the same texts whether a run was stopped or not, and floating point gives the same bits. A model that takes all
    requests at once and tells each answer as it comes (`stream_until`, of servers) has a chunk for each answer.
    """

    def __init__(
        self,
        model: Any,
        journal: Journal,
        *,
        batch_size: int,
        repeats: int = 1,
        seed: int = 0,
        reader: Reader | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Stand in for a model.

        Args:
            model: an `LM` of lm-eval; what is not a request goes to it.
            journal: where answers are kept.
            batch_size: how many texts the model is asked at once.
            repeats: how often each question is asked; so often are answers to it asked for.
            seed: of all draws.
            reader: what becomes of answers before lm-eval sees them; None for nothing.
            progress: called when requests are answered.
        """
        self._model, self._journal, self._progress = model, journal, progress
        self._batch_size, self._repeats, self._seed, self._reader = batch_size, repeats, seed, reader
        self._done = self._total = 0
        self._ahead: list[list[Any]] = []
        self._before: str | None = None
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
        answers = self._scores("loglikelihood", requests, self._batch_size * _SCORED_AT_ONCE)
        found = [(float(score), bool(greedy)) for score, greedy in answers]
        _check_scores(requests, [score for score, _ in found])
        return found

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """Return the log-probability of each text.

        Raises:
            HarnessFault: one is no number or above 0, or those of a task are all the same.
        """
        found = [float(score) for score in self._scores("loglikelihood_rolling", requests, self._batch_size)]
        _check_scores(requests, found)
        return found

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Return what the model writes after each context: with the first call the first repeat, and so on.

        All repeats are asked with the first call, so that no server waits for the slowest answer of each.

        Raises:
            HarnessFault: another call asks other questions.
        """
        asked = digest([request.args for request in requests])
        if not self._ahead:
            self._before, self._ahead = asked, self._written(requests)
            if self._reader:
                self._reader.look(text for answers in self._ahead for text, _ in answers)
        elif asked != self._before:
            raise HarnessFault(
                "lm-eval asks other questions when it repeats them", found="a task that draws its shots?"
            )
        texts = []
        for request, (text, cut) in zip(requests, self._ahead.pop(0), strict=True):
            said, short = self._reader.read(request, text, cut) if self._reader else (text, cut)
            before = self.cut.get(request.task_name, 0)
            self.cut[request.task_name] = None if short is None or before is None else before + bool(short)
            texts.append(said)
        return texts

    def _scores(self, kind: str, requests: list[Any], size: int) -> list[Any]:
        asked = [_Asked(place, 0, request) for place, request in enumerate(requests)]
        answers: list[Any] = [None] * len(requests)
        for chunk, found in self._chunks(kind, asked, size):
            for one, answer in zip(chunk, found, strict=True):
                answers[one.place] = answer
        return answers

    def _written(self, requests: list[Any]) -> list[list[Any]]:
        """Return what was written to each request, with whether it was cut, for each repeat."""
        asked = list(self._drawn(requests))
        answers: list[list[Any]] = [[None] * len(requests) for _ in range(self._repeats)]
        stream = getattr(self._model, "stream_until", None)
        kind, size = "generate_until", self._batch_size
        for chunk, found in self._streamed(kind, asked, stream) if stream else self._chunks(kind, asked, size):
            for one, answer in zip(chunk, found, strict=True):
                answers[one.repeat][one.place] = answer
        return answers

    def _drawn(self, requests: list[Any]) -> Iterator[_Asked]:
        """Yield each request so often as it is repeated, with a seed where it is drawn.

        The seed follows from what is asked, not from where it stands: two models that are asked the same draw alike.
        """
        before: Counter[str] = Counter()  # a task that samples asks the same more than once, and wants other answers
        for place, request in enumerate(requests):
            content = digest(request.args)
            for repeat in range(self._repeats):
                copied = copy.copy(request)
                if _draws(request.args[1]):
                    seed = seed_of(self._seed, content, repeat, before[content])
                    context, settings, *rest = request.args
                    copied.arguments = (context, {**settings, "seed": seed}, *rest)
                yield _Asked(place, repeat, copied)
            before[content] += 1

    def _chunks(self, kind: str, asked: list[_Asked], size: int) -> Iterator[tuple[list[_Asked], list[Any]]]:
        """Yield chunks with their answers."""
        before: Counter[str] = Counter()
        for chunk in _cut(kind, asked, size):
            key = _key(kind, chunk, before)
            found = self._journal.get(key)
            if found is None or len(found) != len(chunk):
                found = self._ask(kind, [one.request for one in chunk], key)
            self._tell(len(chunk))
            yield chunk, found

    def _ask(self, kind: str, requests: list[Any], key: str) -> list[Any]:
        asked = [_own(request) for request in requests]
        answers = list(getattr(self._model, kind)(asked))
        if kind == "generate_until":
            answers = list(zip(answers, self._model.were_cut(asked, answers), strict=True))
        self._journal.add(key, answers)
        return answers

    def _streamed(self, kind: str, asked: list[_Asked], stream: Any) -> Iterator[tuple[list[_Asked], list[Any]]]:
        """Yield chunks of one answer: those that are known first, then the rest as they come.

        Raises:
            HarnessFault: the model leaves a request without an answer.
        """
        before: Counter[str] = Counter()
        known: list[tuple[list[_Asked], list[Any]]] = []
        missing: list[tuple[str, list[_Asked]]] = []
        for chunk in _cut(kind, asked, 1):
            key = _key(kind, chunk, before)
            found = self._journal.get(key)
            if found is not None and len(found) == 1:
                known.append((chunk, found))
                self._tell(1)
            else:
                missing.append((key, chunk))

        def each(place: int, text: str, cut: bool | None) -> None:  # noqa: FBT001  the servers' signature
            key, chunk = missing[place]
            self._journal.add(key, [[text, cut]])
            known.append((chunk, [[text, cut]]))
            self._tell(1)

        if missing:
            stream([_own(chunk[0].request) for _, chunk in missing], each)
        if len(known) != len(asked):
            raise HarnessFault("answers are missing", expected=len(asked), found=len(known), remedy="run it again")
        yield from known

    def _tell(self, count: int) -> None:
        self._done += count
        if self._progress:
            self._progress(self._done, max(self._total, self._done))


def _own(request: Any) -> Any:
    """Return a copy of a request that a model may change: some of lm-eval's add stop strings to it."""
    copied = copy.copy(request)
    copied.arguments = copy.deepcopy(request.arguments)
    return copied


def _draws(settings: Any) -> bool:
    """Tell whether settings of generation ask for a draw, as lm-eval reads them."""
    drawn = settings.get("do_sample")
    return bool(settings.get("temperature")) if drawn is None else bool(drawn)


def _key(kind: str, chunk: list[_Asked], before: Counter[str]) -> str:
    """Return what a chunk's answers are kept under; the same chunk a second time has another one."""
    content = digest([kind, [one.request.args for one in chunk]])
    key = digest([content, before[content]]) if before[content] else content
    before[content] += 1
    return key


def _cut(kind: str, asked: list[_Asked], size: int) -> Iterator[list[_Asked]]:
    """Yield chunks of requests, the longest first, so that texts of a batch are of like length."""

    def order(one: _Asked) -> tuple[Any, ...]:
        context, *rest = one.request.args
        settings = json.dumps([_unseeded(part) for part in rest], sort_keys=True, default=str)
        group = settings if kind == "generate_until" else ""
        return group, -len(context), context, settings, one.place, one.repeat

    ordered = sorted(((order(one), one) for one in asked), key=lambda pair: pair[0])
    begin = 0
    while begin < len(ordered):
        end = begin + 1
        group = ordered[begin][0][0]
        while end < min(begin + size, len(ordered)) and ordered[end][0][0] == group:
            end += 1
        yield [one for _, one in ordered[begin:end]]
        begin = end


def _unseeded(part: Any) -> Any:
    return {key: value for key, value in part.items() if key != "seed"} if isinstance(part, dict) else part


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
