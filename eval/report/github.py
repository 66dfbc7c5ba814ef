"""What a GitHub workflow shows of a verdict: the job summary, and annotations.

GitHub drops a summary above 1 MiB whole, and annotations beyond ten of a kind in a step without a word.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from k2quant.errors import OutputError
from k2quant.eval.drift.findings import Blame, Fidelity
from k2quant.eval.gating.verdict import Verdict
from k2quant.eval.report.markdown import markdown
from k2quant.eval.report.wording import drop, headline, items, margin
from k2quant.report.words import plain

SUMMARY = "GITHUB_STEP_SUMMARY"
"""The variable that names the file of the job summary."""

_LIMIT = 1_000_000  # bytes of a summary; GitHub's limit is 1 MiB
_SEPARATOR = "\n\n"
_ANNOTATIONS = 10
_MESSAGE = 1000  # letters; GitHub shows fewer
_FLIPS = 1000


def job_summary(
    verdict: Verdict, *, fidelity: Fidelity | None = None, blame: Blame | None = None, limit: int = _LIMIT
) -> str:
    """Return Markdown of at most `limit` bytes: verdict first, flips cut first."""
    return markdown(verdict, fidelity=fidelity, blame=blame, flips=_FLIPS, limit=limit)


def github_annotations(verdict: Verdict) -> list[str]:
    """Return workflow commands, at most ten: the verdict, the tasks that fail, the warnings.

    A PASS without warnings has none.
    """
    found = list(_annotations(verdict))
    more = len(found) - _ANNOTATIONS + 1
    if more > 1:
        found[_ANNOTATIONS - 1 :] = [_command("warning", "Accuracy gate", f"{more:,} more stand in the report")]
    return found


def publish_to_github(
    verdict: Verdict,
    environment: Mapping[str, str],
    *,
    fidelity: Fidelity | None = None,
    blame: Blame | None = None,
) -> list[str]:
    """Append the job summary to the file that GitHub names, where it names one, and return the annotations.

    Args:
        verdict: what to publish.
        environment: `os.environ`, of which `GITHUB_STEP_SUMMARY` is read.
        fidelity: what else was measured.
        blame: where the damage comes from.

    Returns:
        lines for standard output or standard error, where GitHub looks for them.

    Raises:
        OutputError: the summary cannot be written.
    """
    if environment.get(SUMMARY):
        path = Path(environment[SUMMARY])
        try:
            with path.open("ab") as file:
                left = _LIMIT - file.tell() - len(_SEPARATOR)  # what else the step has written counts too
                file.write(f"{job_summary(verdict, fidelity=fidelity, blame=blame, limit=left)}{_SEPARATOR}".encode())
        except OSError as error:
            raise OutputError("cannot be written", file=path, found=error.strerror or str(error)) from error
    return github_annotations(verdict)


def _annotations(verdict: Verdict) -> Iterator[str]:
    if verdict.same_model or verdict.decision != "PASS":
        failed = verdict.decision == "FAIL" and not verdict.same_model
        yield _command("error" if failed else "warning", f"Accuracy gate: {headline(verdict)}", verdict.reason)
    if not verdict.same_model:
        for task in sorted(verdict.tasks, key=lambda task: -task.drop):
            if task.decision == "FAIL":
                facts = f"drop {drop(task)}, margin {margin(task.margin)}, {items(task.n)}"
                yield _command("error", f"Accuracy of {task.name}", facts)
    for warning in verdict.warnings:
        yield _command("warning", "Accuracy gate", warning)


def _command(kind: str, title: str, message: str) -> str:
    """Return a workflow command; what would end it, or begin another, is escaped as GitHub wants it."""
    lines = "\n".join(plain(line, _MESSAGE) for line in message[:_MESSAGE].split("\n"))
    name = _escaped(plain(title)).replace(":", "%3A").replace(",", "%2C")
    return f"::{kind} title={name}::{_escaped(lines)}"


def _escaped(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
