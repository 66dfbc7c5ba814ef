"""What a weight's format leaves open until all its values were seen, such as one scale for a whole matrix.

Matrices that engines lay into one share what is decided so: they are surveyed together, whichever shards they lie in
and whatever formats they have. Whichever panel comes first begins the survey, and all threads that need it take part.
What it decides depends on the values alone, so a run that goes on after a kill decides it again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple, Protocol, cast

from k2quant.checkpoint.panels import format_of, naming, panel_rows, read_panel
from k2quant.conversion.searching.together import Together
from k2quant.errors import UnsupportedFormat
from k2quant.formats.format import Format, Parts
from k2quant.ground import engines

if TYPE_CHECKING:
    from k2quant.checkpoint.weights import StoredWeight
    from k2quant.conversion.placing import Job, Placed
    from k2quant.conversion.plan import Plan
    from k2quant.formats.transcode import Scratch
    from k2quant.kernels.codecs.figures import Figures
    from k2quant.kernels.codecs.seam import Codecs

_Key = tuple[str, str]
"""The name of a format, and what its members share: the name of a module of engines, or a weight's own."""


class Substitute(Protocol):
    """Values that take the place of the source's: trained weights, or weights with an update added."""

    def replaces(self, weight: StoredWeight) -> bool:
        """Tell whether a weight's values come from here."""

    def survey(self, job: Job, asked: Format, start: int, stop: int) -> object:
        """Return what `asked.survey` says of rows `start` to `stop` of the values that `panel` will write.

        Called before the first panel, for a format that is `surveyed` alone; from several threads at once.
        """

    def panel(self, job: Job, start: int, stop: int) -> tuple[Parts, Figures | None]:
        """Return rows `start` to `stop` of the tensors that are streamed, by suffix.

        A tensor that is no matrix counts as one column. Called from several threads at once. `job.written` is settled
        where a survey decides.
        """


class _Member(NamedTuple):
    """A weight, and the format that was asked for it."""

    job: Job
    asked: Format


class _Panel(NamedTuple):
    """Rows of a member."""

    member: _Member
    start: int
    stop: int


class Surveys:
    """Settles formats, each once; its methods may be called from any thread."""

    def __init__(
        self, plan: Placed, codecs: Codecs, substitute: Substitute | None, scratch: Callable[[], Scratch]
    ) -> None:
        """Find out which weights share what.

        Args:
            plan: what is written.
            codecs: who does the arithmetic.
            substitute: whose values take the place of the source's, if any.
            scratch: gives the buffers of the thread that asks.
        """
        self._source, self._codecs, self._substitute, self._scratch = plan.source, codecs, substitute, scratch
        self._keys: dict[str, _Key] = {}
        self._members: dict[_Key, list[_Member]] = {}
        for member in surveyed(plan, substitute):
            key = _key(member)
            self._keys[member.job.name] = key
            self._members.setdefault(key, []).append(member)
        self._lock = threading.Lock()
        self._settled: dict[str, Format] = {}
        self._begun: dict[_Key, Together[_Panel, object, dict[str, Format]]] = {}

    def settled(self, job: Job) -> Job:
        """Return a job with the format in which it is written; as it is where no survey decides that.

        Raises:
            CheckpointError: a value that no weight can have, or no format can be settled for what was found.
        """
        key = self._keys.get(job.name)
        if key is None:
            return job
        with self._lock:
            if (found := self._settled.get(job.name)) is not None:
                return job._replace(settled=found)
            survey = self._begun.get(key) or self._begin(key)
        formats = survey.result()
        with self._lock:
            self._settled |= formats
            self._begun.pop(key, None)
        return job._replace(settled=formats[job.name])

    def _begin(self, key: _Key) -> Together[_Panel, object, dict[str, Format]]:
        members = self._members[key]
        panels = [_Panel(member, *span) for member in members for span in panel_rows(member.job.weight.shape)]
        begun = self._begun[key] = Together(panels, self._survey, lambda found: _decided(members, list(found)))
        return begun

    def _survey(self, panel: _Panel) -> object:
        """Look at a panel, of the values that will be written."""
        (job, asked), start, stop = panel
        if self._substitute is not None and self._substitute.replaces(job.weight):
            return self._substitute.survey(job, asked, start, stop)
        stored, scratch = format_of(job.weight), self._scratch()
        parts = read_panel(self._source, job.weight, start, stop, scratch)
        with naming(job.weight, start):
            return asked.survey_of(stored, parts, self._codecs, scratch)


def surveyed(plan: Placed, substitute: Substitute | None = None) -> Iterable[_Member]:
    """Yield the weights of a plan whose formats a survey settles: those that get other values than they have."""
    for job in plan.jobs():
        stored, asked = job.weight.format, job.target
        if stored is None:
            continue
        if substitute is not None and substitute.replaces(job.weight):
            asked = cast("Plan", plan).recipe.rounding(asked or stored)  # only a conversion has substitutes
        elif asked is not None and stored.relabels(asked):
            continue
        if asked is not None and asked.surveyed:
            yield _Member(job, asked)


def _key(member: _Member) -> _Key:
    shared = engines.scaled_together(member.job.name) if member.asked.together else None
    return member.asked.name, shared or member.job.name


def _decided(members: list[_Member], found: list[object]) -> dict[str, Format]:
    try:
        return {job.name: asked.settled(found) for job, asked in members}
    except UnsupportedFormat as error:
        if error.tensor is not None:
            raise
        main, said = members[0].job.weight.main, {"expected": error.expected, "found": error.found}
        raise UnsupportedFormat(error.message, tensor=main.name, file=main.file, remedy=error.remedy, **said) from error


def check_shared(plan: Plan, substitute: Substitute | None = None) -> None:
    """Refuse to give some of the matrices that share a scale new values, and to copy others with the scale they have.

    Raises:
        UnsupportedFormat: that would come about, and nobody allowed to split what engines fuse.
    """
    made: dict[_Key, _Member] = {}
    for member in surveyed(plan, substitute):
        if member.asked.together:
            made.setdefault(_key(member), member)
    anew = {member.job.name for member in surveyed(plan, substitute)} if made and not plan.options.allow_split else ()
    for job in plan.jobs() if anew else ():
        written = job.written
        if written is None or not written.together or job.name in anew:
            continue
        if (other := made.get(_key(_Member(job, written)))) is not None:
            raise UnsupportedFormat(
                "engines have one scale for this weight and another that keeps its own",
                tensor=other.job.weight.main.name,
                file=other.job.weight.main.file,
                found=f"{job.name}, which is {written.label} already",
                remedy="convert to bf16 first, then again; or take both with `allow_split=True`",
            )
