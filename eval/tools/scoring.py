"""What is right of an answer with calls, and what that is in items of a gate.

A request's right answer is known by the functions that it calls, none or some: its file says so, or a reference run did
it. Three parts are looked at. `call`: a call was made exactly where one is due. `name`: where one is due, the same
functions were called. `arguments`: where one is due, there are calls and all of them are valid by their schemas. The
whole is right where all parts that apply are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from k2quant.eval.runs.identity import digest
from k2quant.eval.tools.calling import Answer
from k2quant.eval.tools.checking import UNCHECKED
from k2quant.eval.tools.requests import Asked

WHOLE = "tools"
PARTS = ("tools_call", "tools_name", "tools_arguments")
RULE = 1
"""Of this file; another number where other answers would be right."""

Fault = Callable[[Mapping[str, Any], str], str | None]
Expected = Mapping[str, tuple[str, ...]]
"""By a request's digest, the functions that a right answer calls."""


class Checked(NamedTuple):
    """One answer, looked at without asking what was expected."""

    valid: bool | None
    """Whether all its calls are valid by their schemas; None where it made none."""
    unchecked: bool
    """Whether a schema was at fault, so that nobody knows."""
    shown: str
    """The answer in a line, for people."""


def checked(asked: Asked, answer: Answer, fault: Fault) -> Checked:
    """Check an answer's calls against the schemas of their functions.

    Args:
        asked: the request.
        answer: what came back.
        fault: says what is wrong with a call's arguments by a schema.
    """
    findings: list[str | None] = []
    for call in answer.calls:
        last = findings[-1] if findings else None
        lost = last is not None and last.startswith(UNCHECKED)  # of thousands of calls each would take ten seconds
        findings.append(last if lost else _finding(asked, call.name, call.arguments, fault))
    valid = (bool(findings) and not any(findings)) if answer.called else None
    unchecked = any(found is not None and found.startswith(UNCHECKED) for found in findings)
    return Checked(valid, unchecked, _shown(answer, findings))


def right_in(answer: Answer, expects: tuple[str, ...], *, valid: bool | None) -> dict[str, bool]:
    """Return whether an answer is right, as a whole and in each part that applies to its request.

    Args:
        answer: what came back.
        expects: the functions that a right answer calls.
        valid: whether all its calls are valid; None where it made none.
    """
    parts = {PARTS[0]: answer.decided and answer.called == bool(expects)}
    if expects:
        parts |= {PARTS[1]: answer.names == frozenset(expects), PARTS[2]: valid is True}
    return {WHOLE: all(parts.values()), **parts}


def _finding(asked: Asked, name: str, arguments: str, fault: Fault) -> str | None:
    if name not in asked.tools:
        return "no such function"
    return fault(asked.tools[name], arguments)


def _shown(answer: Answer, findings: Iterable[str | None]) -> str:
    if answer.fault is not None:
        return f"no answer: {answer.fault}"
    parts = [
        (f"{why}: " if why else "") + f"{call.name}({call.arguments:.200})"
        for call, why in zip(answer.calls, findings, strict=True)
    ]
    if parts:
        return "; ".join(parts)
    how = "a call that the server could not read" if answer.called else "cut at the limit" if answer.cut else "no call"
    return f"{how}: {answer.text:.200}" if answer.text else how


def expected_of(requests: Iterable[Asked], answers: Mapping[str, Answer] | None) -> dict[str, tuple[str, ...]]:
    """Return what is expected of each request of which that can be known.

    Args:
        requests: all of them.
        answers: of a reference by the requests' digests; a request whose answer there was cut, could not be read or
            is none, is left out. None to take what the requests say.
    """
    if answers is None:
        return {one.digest: one.expects for one in requests if one.expects is not None}
    known = {one.digest: answers[one.digest] for one in requests}
    return {
        key: tuple(sorted(answer.names))
        for key, answer in known.items()
        if answer.decided and answer.called == bool(answer.calls)
    }


def expectation_digest(expected: Expected) -> str:
    """Return the SHA-256 of what is expected: runs are comparable where it is the same."""
    return digest([RULE, {key: list(names) for key, names in expected.items()}])
