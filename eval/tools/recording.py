"""What a run of tool calls leaves: answers with their calls, samples as the gate reads them, the manifest at last."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from k2quant.checkpoint.files.paths import write_whole
from k2quant.eval.runs.folder import seal
from k2quant.eval.runs.identity import digest
from k2quant.eval.tools.calling import Answer
from k2quant.eval.tools.requests import Asked
from k2quant.eval.tools.scoring import PARTS, WHOLE, Checked, Expected, expectation_digest, right_in

ANSWERS = "answers.jsonl"
"""Every answer, with its request: what another run takes as its reference."""
_METRIC = "right"


class Row(NamedTuple):
    """One answer, looked at."""

    asked: Asked
    repeat: int
    answer: Answer
    checked: Checked
    expects: tuple[str, ...] | None
    """The functions that a right answer calls; None where nobody knows."""

    @property
    def right(self) -> dict[str, bool]:
        """By task whether it is right; nothing where nobody knows."""
        return {} if self.expects is None else right_in(self.answer, self.expects, valid=self.checked.valid)


def write(
    folder: Path,
    identity: Mapping[str, Any],
    rows: Sequence[Row],
    expected: Expected,
    repeats: int,
    begun: float,
    settings: Mapping[str, Any],
) -> Path:
    """Write answers, samples and manifest, in this order, and take away what only an unfinished run needs.

    Args:
        folder: of the run.
        identity: all that the answers depend on.
        rows: all answers, those of one request together, in the order of the requests.
        expected: what is right.
        repeats: answers to each request.
        begun: when, in seconds of the epoch.
        settings: what was found out on the way.

    Returns:
        the manifest's path.
    """
    calls = _write_answers(folder, rows)
    shared = {**identity["tasks"][WHOLE], "expected": expectation_digest(expected)}
    tasks = {}
    places = {key: number for number, key in enumerate(dict.fromkeys(row.asked.digest for row in rows))}
    for name in (WHOLE, *PARTS):
        samples = [row for row in rows if name in row.right]
        if samples:
            part = {"part_of": WHOLE} if name != WHOLE else {}
            tasks[name] = {**_write_task(folder, name, samples, places, repeats), **shared, **part}
    return seal(folder, identity, settings, begun, {"calls": calls, "tasks": tasks, "groups": {}})


def _write_answers(folder: Path, rows: Iterable[Row]) -> dict[str, Any]:
    """Write all answers; return what the manifest says of them."""
    rows = list(rows)
    data = b"".join(_line(_answer_row(row)) for row in rows)
    write_whole(folder / ANSWERS, data)
    answers = [row.answer for row in rows]
    return {
        "file": ANSWERS,
        "sha256": hashlib.sha256(data).hexdigest(),
        "answers": len(rows),
        "made": sum(answer.called for answer in answers),
        "valid": sum(row.checked.valid is True for row in rows),
        "cut": sum(answer.cut for answer in answers),
        "cut_in_thought": sum(answer.cut_in_thought for answer in answers),
        "failed": sum(answer.fault is not None for answer in answers),
        "unparsed": sum(answer.unparsed for answer in answers),
        "unchecked": sum(row.checked.unchecked for row in rows),
        "without_reference": sum(row.expects is None for row in rows),
    }


def _answer_row(row: Row) -> dict[str, Any]:
    request = {**row.asked.body, **row.asked.sampling}
    if row.asked.expects is not None:
        request["expect"] = list(row.asked.expects)
    return {"request": request, "repeat": row.repeat, "answer": row.answer.as_dict(), "valid": row.checked.valid}


def _write_task(
    folder: Path, name: str, rows: Sequence[Row], places: Mapping[str, int], repeats: int
) -> dict[str, Any]:
    """Write samples in the form of lm-eval's; return what the manifest says of them."""
    thinks = any(row.answer.reasoning for row in rows)
    samples = [_sample(name, row, places[row.asked.digest], repeats, thinks=thinks) for row in rows]
    data = b"".join(map(_line, samples))
    file = f"samples_{name}.jsonl"
    write_whole(folder / file, data)
    entry: dict[str, Any] = {
        "file": file,
        "sha256": hashlib.sha256(data).hexdigest(),
        "rows": len(samples),
        "documents": len({row.asked.digest for row in rows}),
        "truncated": sum(row.answer.cut for row in rows),
        "metrics": {f"{_METRIC},none": _mean([sample[_METRIC] for sample in samples], repeats)},
    }
    if repeats > 1:
        entry["repeats"] = repeats
    if thinks:
        entry["cut_in_thought"] = sum(row.answer.cut_in_thought for row in rows)
    return entry


def _sample(name: str, row: Row, place: int, repeats: int, *, thinks: bool) -> dict[str, Any]:
    answer = row.answer.as_dict()
    thought = answer.pop("reasoning")
    expects = list(row.expects or ())
    sample: dict[str, Any] = {
        "doc_id": place,
        "doc": {"request": row.asked.digest},
        "target": ", ".join(expects) or "no call",
        "arguments": {"gen_args_0": {"arg_0": row.asked.shown, "arg_1": {}}},
        "resps": [["" if row.answer.fault else json.dumps(answer, ensure_ascii=False)]],
        "filtered_resps": [row.checked.shown],
        "filter": "none",
        "metrics": [_METRIC],
        "doc_hash": row.asked.digest,
        "prompt_hash": row.asked.digest,
        "target_hash": digest(expects),
        _METRIC: float(row.right[name]),
        "request_hash": row.asked.digest,
    }
    if repeats > 1:
        sample["repeat"] = row.repeat
    if thinks:
        sample["cut_in_thought"] = row.answer.cut_in_thought
    if thinks and name == WHOLE:  # once is enough
        sample["reasoning"] = thought
    return sample


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"


def _mean(right: Sequence[float], repeats: int) -> dict[str, float | None]:
    """Return an accuracy with its standard error: that of items, each the mean of its answers; none of a single item.

    Of items that were asked once that is lm-eval's own.
    """
    shares = [fmean(right[begin : begin + repeats]) for begin in range(0, len(right), repeats)]
    return {"value": fmean(shares), "stderr": stdev(shares) / math.sqrt(len(shares)) if len(shares) > 1 else None}
