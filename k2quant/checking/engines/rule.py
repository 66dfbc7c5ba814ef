"""A rule of an engine: what its loader requires, where that was read, and what a checkpoint has of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from k2quant.checking.engines.subject import Subject
from k2quant.errors import CheckpointError

Result = Literal["fail", "cannot tell", "pass"]
"""What a rule comes to. `cannot tell`: it depends on what no file says, such as a kernel that is chosen at start."""

Test = Callable[[Subject], "Outcome"]
"""Looks at a checkpoint by its headers, its config and the names of its files."""


class Outcome(NamedTuple):
    """What a rule comes to, and why."""

    result: Result
    text: str


class Rule(NamedTuple):
    """Something that an engine requires of a checkpoint."""

    name: str
    """One or two words, the same for what several engines require."""
    why: str
    """What the engine does, in words."""
    source: str
    """The file of the engine that it was read from, with its version or commit."""
    test: Test


class Finding(NamedTuple):
    """What one rule of an engine came to."""

    rule: str
    result: Result
    text: str
    """What was found; of a failure with the tensor or key, what was expected, and what to do."""
    why: str
    source: str


def passed(text: str) -> Outcome:
    """Say that nothing stands against a rule."""
    return Outcome("pass", text)


def unknown(text: str) -> Outcome:
    """Say what a rule depends on."""
    return Outcome("cannot tell", text)


def failed(
    message: str = "",
    *,
    tensor: str | None = None,
    file: object = None,
    expected: object = None,
    found: object = None,
    remedy: str | None = None,
) -> Outcome:
    """Say what is against a rule, in the words of an error."""
    error = CheckpointError(
        message, tensor=tensor, file=file, expected=expected, found=found, remedy=remedy
    )  # for its sentence: nothing is raised
    return Outcome("fail", str(error))


def looked_at(rule: Rule, subject: Subject) -> Finding:
    """Return what a rule comes to."""
    try:
        outcome = rule.test(subject)
    except CheckpointError as error:  # of a config that is sound JSON and says nonsense
        outcome = Outcome("fail", str(error))
    return Finding(rule.name, *outcome, rule.why, rule.source)
