"""Every error that k2quant raises on purpose, in one tree.

K2QuantError
├── UsageError           the request itself makes no sense                        (exit 2)
├── CheckpointError      what was read is not a checkpoint that k2quant can trust (exit 1)
│   ├── UnsafePath           a path or link that leaves the folder
│   ├── MalformedFile        a header, index or config that lies or does not parse
│   ├── MissingTensor        a weight or a partner that the index does not have
│   ├── ShapeMismatch        a shape that contradicts another tensor or the format
│   ├── DtypeMismatch        a dtype that the format does not allow
│   ├── UnsupportedFormat    a real format, but not one of ours
│   └── BadValue             NaN, infinity, a negative scale, an overflow
├── OutputError          what stands at the destination, or the disk under it     (exit 1)
│   ├── DestinationInUse     another process writes there
│   ├── DestinationForeign   the folder holds something that is not ours
│   └── DestinationStale     ours, but of other options or another source
├── EvaluationError      results of an evaluation that cannot be used             (exit 1)
│   ├── MalformedResults     a results or samples file is truncated, mixed up or lies
│   ├── Incomparable         two runs that asked different things, or are the same one
│   └── HarnessFault         the evaluation itself broke: a server without log-probabilities, empty answers
├── ClusterError         the machines that share the work are lost, or do not fit (exit 1)
├── MissingExtra         a command whose optional part is not installed           (exit 1)
└── CheckFailed          a check said no                                          (exit 3)
    └── Inconclusive         a gate could tell neither way                            (exit 4)

Beside it stands CheckpointWarning: what a checkpoint says of itself is not so, and stops nothing.
"""

from __future__ import annotations

from typing import ClassVar

_NAME_SHOWN = 500  # characters of a tensor's name in a message


class K2QuantError(Exception):
    """Base of all errors of k2quant; `exit_code` is what the command line ends with."""

    exit_code: ClassVar[int] = 1

    def __str__(self) -> str:
        """Return the message as one line that a terminal can show, whatever was found in a file or a command."""
        return printable(super().__str__())


class UsageError(K2QuantError):
    """The request itself makes no sense, whatever the files hold."""

    exit_code: ClassVar[int] = 2


class _Finding(K2QuantError):
    """An error that says where, what was expected, what was found and what to do, in one sentence."""

    def __init__(
        self,
        message: str = "",
        *,
        tensor: str | None = None,
        file: object = None,
        expected: object = None,
        found: object = None,
        remedy: str | None = None,
    ) -> None:
        """Keep the parts as attributes and glue them to one sentence.

        Args:
            message: what went wrong, where `expected` and `found` alone would not say it.
            tensor: the tensor's name in the checkpoint.
            file: the file's path or name.
            expected: what would have been right.
            found: what stands there.
            remedy: what the user can do about it.
        """
        self.tensor, self.file, self.expected, self.found, self.remedy = tensor, file, expected, found, remedy
        self.message = message
        super().__init__(self._sentence())

    def _sentence(self) -> str:
        places = [f"`{_shortened(self.tensor)}`"] if self.tensor else []
        places += [str(self.file)] if self.file is not None else []
        where = " in ".join(places)
        facts = [self.message] if self.message else []
        if self.expected is not None:
            facts.append(f"expected {self.expected}")
        if self.found is not None:
            facts.append(f"found {self.found}")
        sentence = ": ".join(part for part in (where, ", ".join(facts)) if part)
        return f"{sentence}; {self.remedy}" if self.remedy else sentence


def _shortened(name: str) -> str:
    return name if len(name) <= _NAME_SHOWN else f"{name[:_NAME_SHOWN]}..."


def printable(text: str) -> str:
    """Escape what would break a line or reach the terminal as a code; names come from files that may be hostile."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class CheckpointError(_Finding):
    """What was read is not a checkpoint that k2quant can trust."""


class UnsafePath(CheckpointError):
    """A path or link leads out of the folder that was named."""


class MalformedFile(CheckpointError):
    """A header, index, config, journal or report lies or does not parse."""


class MissingTensor(CheckpointError):
    """The index lacks a weight, or a partner that a weight needs."""


class ShapeMismatch(CheckpointError):
    """A shape contradicts another tensor or the format."""


class DtypeMismatch(CheckpointError):
    """A dtype that the format does not allow."""


class UnsupportedFormat(CheckpointError):
    """A real format, but none that k2quant reads or writes."""


class BadValue(CheckpointError):
    """A value that no conversion can carry: NaN, infinity, a negative scale, an overflow."""


class OutputError(_Finding):
    """The destination, or the disk under it, cannot take the output."""


class DestinationInUse(OutputError):
    """Another process writes to the destination."""


class DestinationForeign(OutputError):
    """The destination holds something that k2quant did not write."""


class DestinationStale(OutputError):
    """The destination is ours, but of other options or another source."""


class EvaluationError(_Finding):
    """The results of an evaluation cannot be used."""


class MalformedResults(EvaluationError):
    """A results or samples file is truncated, mixed up, or does not hold what such a file holds."""


class Incomparable(EvaluationError):
    """Two runs did not ask the same things, or are the same run twice."""


class HarnessFault(EvaluationError):
    """The evaluation itself broke, so that its numbers say nothing about the model."""


class ClusterError(_Finding):
    """The machines that share the work are not there, were lost, or do not fit together."""


class MissingExtra(_Finding):
    """A command needs an optional part that is not installed."""


class CheckFailed(_Finding):
    """A check that the user asked for said no."""

    exit_code: ClassVar[int] = 3


class Inconclusive(CheckFailed):
    """A gate could tell neither that the candidate is good enough nor that it is not."""

    exit_code: ClassVar[int] = 4


class CheckpointWarning(UserWarning):
    """A checkpoint is not in all what its config says, and is read all the same."""
