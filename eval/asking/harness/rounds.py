"""Questions asked several times: lm-eval scores each repeat on its own, and here they are put together."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from lm_eval.evaluator_utils import EvalAcc, aggregate_groups

from k2quant.eval.asking.harness.tasks import Tasks
from k2quant.eval.asking.thoughts import Thoughts


@contextlib.contextmanager
def wrong_without_answer(tasks: Mapping[str, Any], thoughts: Thoughts | None) -> Iterator[None]:
    """Have every metric of a document be wrong, while the block runs, whose answers never left their reasoning.

    Such an answer is an empty text for lm-eval, and some metrics like that: IFEval's "no commas" is kept.

    Args:
        tasks: of lm-eval, by name.
        thoughts: tells which documents these are; None where there is no reasoning.
    """
    if thoughts is None:
        yield
        return
    thoughts.begin()
    with contextlib.ExitStack() as stack:
        for name, task in tasks.items():
            stack.enter_context(_watched(name, task, thoughts))
        yield


@contextlib.contextmanager
def _watched(name: str, task: Any, thoughts: Thoughts) -> Iterator[None]:
    """Note which document lm-eval is at, and answer for its metrics."""
    documents, process = task.doc_iterator, task.process_results
    at = [0]

    def doc_iterator(*args: Any, **kwargs: Any) -> Iterator[Any]:
        for number, document in documents(*args, **kwargs):
            at[0] = number
            yield number, document

    def process_results(document: Any, results: Any) -> Any:
        metrics = process(document, results)
        if not thoughts.lost(name, at[0]):
            return metrics
        better = task.higher_is_better() or {}
        return {key: value if better.get(key) is False else _wrong(value) for key, value in metrics.items()}

    task.doc_iterator, task.process_results = doc_iterator, process_results
    try:
        yield
    finally:
        task.doc_iterator, task.process_results = documents, process


def _wrong(value: Any) -> Any:
    """Return a metric's value for a wrong answer; what is no number, such as a pair of texts, stays."""
    if isinstance(value, list):
        return [_wrong(part) for part in value]
    return type(value)(0) if isinstance(value, bool | int | float | np.generic) else value


def together(rounds: list[dict[str, Any]], tasks: Tasks) -> dict[str, Any]:
    """Put the results of all repeats together.

    Args:
        rounds: of lm-eval, samples included; the first has all tasks, the others those whose answers are written.
        tasks: which they are.

    Returns:
        The first one's, with samples that say which repeat they are, one repeat of a document behind another, and with
        metrics that are means.
    """
    first = rounds[0]
    samples = {
        name: _interleaved([found["samples"][name] for found in rounds if name in found["samples"]])
        for name in first["samples"]
    }
    metrics = {name: dict(first["results"][name]) for name in tasks.by_name}
    for name in rounds[1]["results"]:
        metrics[name] |= _means([found["results"][name] for found in rounds], samples[name])
    whole = EvalAcc(metrics=metrics, groups=tasks.loaded.get("groups") or {})
    results, groups = aggregate_groups(whole).collect()
    return {**first, "results": results, **({"groups": groups} if groups else {}), "samples": samples}


def _interleaved(repeats: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    if len(repeats) == 1:
        return repeats[0]
    return [{**row, "repeat": repeat} for rows in zip(*repeats, strict=True) for repeat, row in enumerate(rows)]


def _means(repeats: list[dict[str, Any]], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a task's metrics as means over repeats, with the standard errors of means of items.

    The answers to one item are no independent items: its mean is one value.
    """
    found: dict[str, Any] = {}
    for key, value in repeats[0].items():
        metric, comma, behind = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        mean = statistics.fmean(float(repeat[key]) for repeat in repeats)
        found[key] = mean
        found[f"{metric}_stderr,{behind}"] = _error(metric, behind, mean, rows)
    return found


def _error(metric: str, behind: str, mean: float, rows: list[dict[str, Any]]) -> float | str:
    """Return the standard error of a metric that is a mean of items, lm-eval's `N/A` of any other."""
    by_item: dict[int, list[float]] = defaultdict(list)
    for row in rows:
        if row["filter"] == behind:
            value = row.get(metric)
            if not isinstance(value, bool | int | float):
                return "N/A"
            by_item[row["doc_id"]].append(float(value))
    means = [statistics.fmean(values) for values in by_item.values()]
    if len(means) < 2 or not math.isclose(statistics.fmean(means), mean, rel_tol=1e-9, abs_tol=1e-9):
        return "N/A"
    return statistics.stdev(means) / math.sqrt(len(means))
