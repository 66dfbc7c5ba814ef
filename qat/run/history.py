"""What a training run records as it goes: a line of JSON for each step and each evaluation."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from k2quant.checkpoint.files import json_kinds as kinds
from k2quant.checkpoint.files.paths import open_regular, read_limited, write_whole
from k2quant.checkpoint.files.strict_json import parse_object
from k2quant.errors import BadValue, MalformedFile

HISTORY = "history.jsonl"
"""Name of the history in the folder of a run."""

_LIMIT = 2**30  # bytes of a history: four million steps
_END = 2**16  # bytes
_LARGEST = 1e100  # of any number here; a picture can still be drawn of it
_REMEDY = "put the file back, or begin anew with `restart=True`; k2quant qat export works without it"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One step of the optimizer."""

    step: int
    """From 1."""
    loss: float
    """What was minimised, nats a token."""
    cross_entropy: float
    """Of the tokens learnt, nats a token; the same as `loss` without a teacher."""
    divergence: float | None = None
    """KL(teacher || student), nats a token; None without a teacher."""
    rate: float
    """The learning rate."""
    norm: float
    """Norm of the gradient before it was clipped."""
    bits: int | None
    """Width of the codes; None while nothing is fake-quantised."""
    tokens: int
    """Learnt in this step."""
    seconds: float
    """That the step took."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """How many of the held-out answers are wholly right: what a loss does not say."""

    count: int
    """All of them."""
    right: int
    """Of the model as it is quantised now, or would be exported."""
    unrounded: int
    """Of the same master weights in BF16."""
    start_rounded: int | None = None
    """Of the start point after plain rounding; None where an earlier version measured it, which counted none."""
    start: int | None = None
    """Of the start point in BF16; None likewise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Cross-entropy of a held-out text, nats a token, always of the same rows."""

    step: int
    """After so many steps; 0 before the first."""
    loss: float
    """Of the model as it is quantised now, or, where it is not yet, as it would be exported."""
    standard_error: float | None = None
    """Of `loss`, over rows."""
    unrounded: float | None = None
    """Of the same master weights in BF16 without fake quantisation."""
    start_rounded: float | None = None
    """Of the start point after plain rounding (post-training quantisation); the same at every evaluation."""
    start: float | None = None
    """Of the start point in BF16; the same at every evaluation."""
    gap_error: float | None = None
    """Standard error of `start_rounded - start`, row by row. The rows are the same, so it is far smaller than that of
    either; None: `standard_error` has to stand in for it."""
    answers: Answers | None = None
    """None where the rows hold no answers, or an earlier version wrote this."""


class Records(NamedTuple):
    """A history, each part in the order of its steps."""

    steps: tuple[StepRecord, ...]
    evaluations: tuple[Evaluation, ...]


Record = StepRecord | Evaluation

_Kind = Callable[[object], Any]


def _or_none(kind: _Kind) -> _Kind:
    return lambda value: None if value is None else kind(value)


_count, _size = partial(kinds.whole, least=1, limit=2**53), partial(kinds.whole, limit=2**53)
_real, _positive = partial(kinds.number, low=-_LARGEST), partial(kinds.number, high=_LARGEST)
_time = partial(kinds.number, high=1e12)


def _answers(value: object) -> Answers:
    facts = kinds.mapping(value)
    if facts.keys() != set(Answers.__slots__):
        raise ValueError(f"answers with the keys {', '.join(sorted(facts))}")
    count = _count(facts["count"])
    part = partial(kinds.whole, limit=count + 1)
    return Answers(
        count=count,
        right=part(facts["right"]),
        unrounded=part(facts["unrounded"]),
        start_rounded=_or_none(part)(facts["start_rounded"]),
        start=_or_none(part)(facts["start"]),
    )


_ADDED = {"answers"}
"""Fields that histories of earlier versions lack."""

_FIELDS: dict[str, tuple[type[Record], dict[str, _Kind]]] = {
    "step": (
        StepRecord,
        {
            "step": _count,
            "loss": _real,
            "cross_entropy": _real,
            "divergence": _or_none(_real),
            "rate": _positive,
            "norm": _positive,
            "bits": _or_none(partial(kinds.whole, least=1, limit=33)),
            "tokens": _size,
            "seconds": _time,
        },
    ),
    "evaluation": (
        Evaluation,
        {
            "step": _size,
            "loss": _real,
            "standard_error": _or_none(_positive),
            "unrounded": _or_none(_real),
            "start_rounded": _or_none(_real),
            "start": _or_none(_real),
            "gap_error": _or_none(_positive),
            "answers": _or_none(_answers),
        },
    ),
}


class History:
    """The history of a run that goes on."""

    def __init__(self, path: Path) -> None:
        """Take a history up, or begin one.

        Args:
            path: of the file, which need not exist; a torn last line is cut off.

        Raises:
            MalformedFile: something else is wrong with it.
        """
        self._path = path
        self._order = _Order()
        if path.exists():
            records, good = _read(path)
            self._order = _Order(records)
            os.truncate(path, good)

    def append(self, record: Record) -> None:
        """Add a line and flush it to the disk.

        Raises:
            BadValue: a value is none that a history holds, such as NaN or a step that is there; nothing is written.
        """
        line = _line(record)
        try:
            _record(parse_object(line, file=self._path))
            self._order.take(record)
        except (ValueError, TypeError, MalformedFile) as error:
            raise BadValue(f"step {record.step} cannot be recorded", file=self._path, found=str(error)[:200]) from error
        with self._path.open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def rewind(self, step: int) -> None:
        """Cut off what lies behind a step: a run that resumes from a checkpoint does it again.

        Args:
            step: the checkpoint's; its own records stay.

        Raises:
            MalformedFile: the history is damaged.
        """
        records = [record for record in (_read(self._path)[0] if self._path.exists() else ()) if record.step <= step]
        write_whole(self._path, b"".join(map(_line, records)))
        self._order = _Order(records)


class _Order:
    """Steps and evaluations, each in the order of their steps."""

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self._last: dict[type, int] = {}
        for record in records:
            self.take(record)

    def take(self, record: Record) -> None:
        """Note the next record, or raise ValueError."""
        before = self._last.get(type(record), -1)
        if record.step <= before:
            raise ValueError(f"step {record.step} behind step {before}")
        self._last[type(record)] = record.step


def read_history(path: Path) -> Records:
    """Read a history, trusting nothing in it; a torn last line is passed over.

    Raises:
        MalformedFile: a line is damaged or out of order, or the file cannot be read.
    """
    try:
        records, _ = _read(path)
    except OSError as error:
        raise MalformedFile("cannot be read", file=path, found=error.strerror or str(error)) from error
    return _sorted(records)


def _sorted(found: Iterable[Record]) -> Records:
    records = list(found)
    return Records(
        tuple(record for record in records if isinstance(record, StepRecord)),
        tuple(record for record in records if isinstance(record, Evaluation)),
    )


def read_end(path: Path) -> Records:
    """Return the last records of a history, some hundred of them, however long it is; a torn last line is passed over.

    Raises:
        MalformedFile: a line of the end is damaged or out of order, or the file cannot be read.
    """
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(size - _END, 0))
            data = file.read(_END)
    except OSError as error:
        raise MalformedFile("cannot be read", file=path, found=error.strerror or str(error)) from error
    begin = data.find(b"\n") + 1 if size > _END else 0
    return _sorted(_parsed(data[begin : data.rfind(b"\n") + 1], path))


def kept_history(path: Path, step: int, evaluated: Sequence[int]) -> Records:
    """Return what a run recorded up to a checkpoint; nothing is written.

    Args:
        path: of the history.
        step: the checkpoint's, from 1.
        evaluated: steps after which held-out rows were measured, up to this one.

    Raises:
        MalformedFile: it is damaged, or lacks a step or an evaluation, which nothing would ever bring back.
    """
    try:
        whole = read_history(path)
    except MalformedFile as error:
        raise MalformedFile(f"a damaged history: {error}", remedy=_REMEDY) from error
    steps = tuple(record for record in whole.steps if record.step <= step)
    evaluations = tuple(record for record in whole.evaluations if record.step <= step)
    lacking = [
        *(f"step {number}" for number in _lacking(range(1, step + 1), steps)),
        *(f"the evaluation after step {number}" for number in _lacking(evaluated, evaluations)),
    ]
    if lacking:
        raise MalformedFile(
            f"lacks what was recorded before the checkpoint of step {step}",
            file=path,
            expected=lacking[0],
            found=f"{len(steps)} of {step} steps and {len(evaluations)} of {len(evaluated)} evaluations",
            remedy=_REMEDY,
        )
    return Records(steps, evaluations)


def _lacking(wanted: Iterable[int], records: Iterable[Record]) -> Iterator[int]:
    held = {record.step for record in records}
    return (number for number in wanted if number not in held)


def _read(path: Path) -> tuple[list[Record], int]:
    """Return the records and where the last whole line ends."""
    data = read_limited(path, _LIMIT)
    good = data.rfind(b"\n") + 1
    return list(_parsed(data[:good], path)), good


def _parsed(data: bytes, path: Path) -> Iterator[Record]:
    order = _Order()
    for number, line in enumerate(data.split(b"\n")[:-1], 1):
        place = f"{path}, line {number}"
        values = parse_object(line, file=place)
        try:
            record = _record(values)
            order.take(record)
        except (ValueError, TypeError) as error:
            raise MalformedFile("not what a history holds", file=place, found=str(error)[:200]) from error
        yield record


def _record(values: dict[str, Any]) -> Record:
    kind, fields = _FIELDS.get(str(values.get("kind")), (None, {}))
    if kind is None or values.keys() | _ADDED & fields.keys() != {"kind", *fields}:
        raise ValueError(f"keys {', '.join(sorted(values))} of kind {values.get('kind')!r}")
    return kind(**{name: checked(values[name]) for name, checked in fields.items() if name in values})


def _line(record: Record) -> bytes:
    name = next(name for name, (kind, _) in _FIELDS.items() if type(record) is kind)
    return json.dumps({"kind": name, **asdict(record)}, separators=(",", ":"), default=str).encode() + b"\n"
