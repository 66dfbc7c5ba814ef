"""Answers that are there: the results of K2-Vendor-Verifier, judged like answers to requests of our own."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from k2quant.errors import Incomparable, MalformedResults
from k2quant.eval import gate, read_run, run_tools
from k2quant.eval.gating.policy import Policy
from k2quant.eval.runs.folder import MANIFEST
from k2quant.eval.tools.settings import ToolsRequest
from k2quant.eval.tools.taking import take

pytestmark = pytest.mark.usefixtures("by_score")

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "search",
            "parameters": {
                "type": "object",
                "properties": {"queries": {"type": "array", "items": {"type": "string"}}},
                "required": ["queries"],
            },
        },
    }
]
CALL = [
    {"id": "functions.search:0", "type": "function", "function": {"name": "search", "arguments": '{"queries": []}'}}
]

Manner = Callable[[int], dict[str, Any]]


def official(number: int) -> dict[str, Any]:
    """Call where the number is even."""
    return {"tool_calls": CALL} if number % 2 == 0 else {"content": "An answer."}


def row(number: int, model: str, message: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Return a line of results as the verifier writes it."""
    request = {
        "model": model,
        "messages": [
            {"role": "_input", "content": "You are a helper."},
            {"role": "user", "content": f"Question {number}"},
        ],
        "max_tokens": 16000,
        "temperature": 0.6,
        "stream": True,
        "user": "somebody",
        "tools": TOOLS,
    }
    finish = "tool_calls" if message.get("tool_calls") else "stop"
    choice = {"index": 0, "message": {"role": "assistant", "content": "", **message}, "finish_reason": finish}
    return {
        "data_index": number + 1,
        "request": request,
        "response": {"id": "a", "object": "chat.completion", "model": model, "choices": [choice], "usage": None},
        "status": "success",
        "finish_reason": finish,
        "tool_calls_valid": True,
        "last_run_at": "2025-11-15T11:45:49.909071",
        "duration_ms": 1040,
        "hash": "4d2fda3ce7cd196a0e86995432ce66d4",
        **changes,
    }


def write(path: Path, model: str, manner: Manner, *, times: int = 1) -> Path:
    """Write results of forty requests, each so many times."""
    rows = [row(number, model, manner(number)) for number in range(40) for _ in range(times)]
    path.write_text("".join(json.dumps(each, ensure_ascii=False) + "\n" for each in rows))
    return path


def judged(path: Path, reference: Path, folder: Path) -> Path:
    """Judge answers by a reference; return the run."""
    return run_tools(ToolsRequest(model=str(path), backend="answers", reference=reference), folder).parent


def test_results_of_the_verifier(tmp_path: Path) -> None:
    """A vendor that calls less often than the official one fails against the official one's second run."""
    reference = write(tmp_path / "official.jsonl", "kimi", official)
    again = write(tmp_path / "again.jsonl", "kimi", lambda n: official(n if n != 4 else 1))
    vendor = write(tmp_path / "vendor.jsonl", "vendor/kimi", lambda n: official(n if n > 25 else 1))
    base, candidate = (judged(path, reference, tmp_path / path.stem) for path in (again, vendor))
    assert read_run(candidate).model == "vendor/kimi"
    assert [task.right for task in read_run(base).tasks.values()] == [39, 39, 19, 19]
    verdict = gate(base, candidate, policy=Policy(margin=0.05))
    assert verdict.decision == "FAIL"
    assert (verdict.pooled.n, verdict.pooled.lost, verdict.pooled.gained) == (40, 12, 0)


def test_an_answer_and_one_that_failed(tmp_path: Path) -> None:
    """A request that failed is a wrong answer, and as a reference none; what else the verifier notes is passed over."""
    error = {"error_type": "BadRequestError", "error_message": "Error code: 400", "error": "Error code: 400"}
    good = row(0, "m", official(0), extra_body={"top_k": 1})
    failed = row(1, "m", {}, status="failed", response=error, finish_reason=None, tool_calls_valid=None)
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(good) + "\n" + json.dumps(failed) + "\n")
    answers = list(take(path).answers.values())
    assert [(answer.names, answer.fault) for answer in answers] == [
        (frozenset({"search"}), None),
        (frozenset(), "failed: Error code: 400"),
    ]
    itself = run_tools(ToolsRequest(model=str(path), backend="answers"), tmp_path / "run").parent
    assert [item.right for item in read_run(itself).tasks["tools"].items] == [True]
    calls = json.loads((itself / MANIFEST).read_bytes())["calls"]
    assert (calls["failed"], calls["without_reference"]) == (1, 1)


def test_requests_that_stand_often_are_repeats(tmp_path: Path) -> None:
    """A file with each request three times holds forty items with three answers each, not a hundred and twenty."""
    path = write(tmp_path / "often.jsonl", "m", official, times=3)
    taken = take(path)
    assert (len(taken.requests), taken.repeats, len(taken.answers)) == (40, 3, 120)
    with path.open("a") as file:
        file.write(json.dumps(row(99, "m", official(0))) + "\n")
    assert (take(path).repeats, len(take(path).answers)) == (1, 41)


def test_runs_by_other_references_are_not_compared(tmp_path: Path) -> None:
    """What is right must be the same on both sides."""
    one = write(tmp_path / "one.jsonl", "m", official)
    two = write(tmp_path / "two.jsonl", "m", lambda number: official(number + 1))
    runs = [judged(one, reference, tmp_path / reference.stem) for reference in (one, two)]
    with pytest.raises(Incomparable, match="expected"):
        gate(*runs)


def test_a_reference_that_lacks_requests(tmp_path: Path) -> None:
    """It is named with how many it lacks; one whose words differ is another request."""
    reference = write(tmp_path / "official.jsonl", "kimi", official)
    lines = reference.read_text().splitlines(keepends=True)
    short = tmp_path / "short.jsonl"
    short.write_text("".join(lines[:38]) + lines[38].replace("Question 38", "Question  38"))
    with pytest.raises(MalformedResults, match="has no answer to 2 of 40 requests"):
        judged(reference, short, tmp_path / "run")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{\n    "model": "m",\n    "success_count": 98,\n    "finish_tool_calls": 30\n}', "holds counts alone"),
        ('{"doc_id": 0, "resps": []}\n', "no results of K2-Vendor-Verifier"),
        ('{"request": {}, "response": {}, "status": "success"}\n', "messages: expected a list"),
        ('{"request": {"prompt": "a"}, "response": {}, "status": "success"}\n', "ask by chat messages"),
        ("[1]\n", "not a JSON object"),
        ("", "holds nothing"),
        (json.dumps(row(0, "m", {}, response={"choices": [{"message": 3}]})) + "\n", "no answer in it"),
        (json.dumps(row(0, "m", {}, response=None)) + "\n", "no answer in it"),
    ],
)
def test_other_files_are_refused(content: str, said: str, tmp_path: Path) -> None:
    """By name: a summary, samples of benchmarks, and what is no JSON Lines."""
    path = tmp_path / "results.jsonl"
    path.write_text(content)
    with pytest.raises(MalformedResults, match=said) as caught:
        take(path)
    assert "results.jsonl" in str(caught.value)


ANY: st.SearchStrategy[Any] = st.sampled_from(
    [None, True, 0, -1, 0.5, "", "a", [], [None], {}, {"a": []}, [{}], [[]], {"function": []}]
)


def spots(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the place of each part of a value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield (*path, key)
        yield from spots(part, (*path, key))


GOOD = row(0, "m", {"tool_calls": CALL, "content": "a", "reasoning": "b"})
GOOD["request"] |= {"n": 1, "seed": 1, "top_p": 1.0, "expect": ["search"], "tool_choice": "auto"}


@given(st.sampled_from(list(spots(GOOD))), ANY)
@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
def test_any_part_may_be_anything(tmp_path: Path, spot: tuple[Any, ...], part: Any) -> None:
    """With whatever in place of a part, a line is read or refused, and what was read can be written."""
    changed = copy.deepcopy(GOOD)
    home: Any = changed
    for key in spot[:-1]:
        home = home[key]
    home[spot[-1]] = part
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(changed) + "\n")
    try:
        taken = take(path)
    except MalformedResults:
        return
    assert json.dumps([answer.as_dict() for answer in taken.answers.values()])
    assert all(request.shown for request in taken.requests)


def test_a_folder_that_is_no_such_run(tmp_path: Path) -> None:
    """A run of benchmarks, or no run, is no reference."""
    with pytest.raises(MalformedResults, match="holds no finished run"):
        take(tmp_path)
    (tmp_path / MANIFEST).write_text(json.dumps({"schema": 1, "tasks": {}}))
    with pytest.raises(MalformedResults, match="a run of benchmarks, not of tool calls"):
        take(tmp_path)
