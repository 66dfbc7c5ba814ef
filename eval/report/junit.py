"""The verdict as JUnit XML, which every CI reads.

The exit code decides all the same: GitLab shows this file, but fails no job by it.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterator

from k2quant.eval.gating.verdict import Comparison, Decision, Verdict
from k2quant.eval.report.wording import NOISE, TOOL, drop, items, margin, title
from k2quant.report.words import plain

_LONGEST = 2000  # letters of a message


def junit(verdict: Verdict) -> str:
    """Return XML: a test case for each task and one for the gate itself.

    FAIL is a `failure`, INCONCLUSIVE is `skipped`, and so is everything of an A/A run. The case of the gate carries the
    verdict and the numbers of all items together. A task that cannot tell by itself does not hold up the gate.
    """
    cases = [(verdict.pooled, verdict.decision, verdict.reason)]
    cases += [(task, task.decision, f"{task.decision}: drop {drop(task)}") for task in verdict.tasks]
    decisions = [None if verdict.same_model else decision for _, decision, _ in cases]
    counts = {
        "tests": str(len(cases)),
        "failures": str(decisions.count("FAIL")),
        "errors": "0",
        "skipped": str(decisions.count("INCONCLUSIVE") + decisions.count(None)),
    }
    root = ET.Element("testsuites", {"name": TOOL, **counts})
    suite = ET.SubElement(root, "testsuite", {"name": "accuracy", **counts, "time": "0"})
    for (comparison, _, message), decision in zip(cases, decisions, strict=True):
        suite.append(_case(verdict, comparison, decision, plain(message, _LONGEST)))
    ET.indent(root)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{ET.tostring(root, encoding="unicode")}\n'


def _case(verdict: Verdict, comparison: Comparison, decision: Decision | None, message: str) -> ET.Element:
    case = ET.Element("testcase", {"classname": "accuracy", "name": title(comparison, verdict), "time": "0"})
    properties = ET.SubElement(case, "properties")
    for name, value in _numbers(comparison):
        ET.SubElement(properties, "property", {"name": name, "value": value})
    if decision == "FAIL":
        ET.SubElement(case, "failure", {"message": message, "type": "regression"}).text = _facts(comparison)
    elif decision != "PASS":
        ET.SubElement(case, "skipped", {"message": message if decision else f"{NOISE}: drop {drop(comparison)}"})
    return case


def _numbers(comparison: Comparison) -> Iterator[tuple[str, str]]:
    """Yield the numbers of a case: shares from 0 to 1, all digits."""
    names = ("n", "base_right", "candidate_right", "lost", "gained", "base_accuracy", "candidate_accuracy", "drop")
    for name in names:
        yield name, repr(getattr(comparison, name))
    low, high = comparison.interval
    yield from (("drop_low", repr(low)), ("drop_high", repr(high)))
    for name in ("margin", "p_good", "p_bad", "p_worse", "power"):
        yield name, repr(getattr(comparison, name))
    yield "method", comparison.method
    answers = ("base_answers", "candidate_answers") if comparison.repeated else ()
    early = ("base_cut", "candidate_cut", "base_truncated", "candidate_truncated")
    for name in (*answers, *(name for name in early if getattr(comparison, name) is not None)):
        yield name, repr(getattr(comparison, name))


def _facts(comparison: Comparison) -> str:
    return (
        f"drop {drop(comparison)}, margin {margin(comparison.margin)}, {items(comparison.n)}, "
        f"lost {comparison.lost:,}, gained {comparison.gained:,}"
    )
