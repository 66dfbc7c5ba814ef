"""Runs of tool calls: what is right of an answer, that a run resumes, and that the gate decides on two of them.

A scripted server stands in for a model: nano-K2 calls no tools.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from k2quant.cli import main
from k2quant.errors import HarnessFault, Incomparable, MalformedFile, MalformedResults, UsageError
from k2quant.eval import gate, read_run, run_tools
from k2quant.eval.gating.policy import Policy
from k2quant.eval.runs.folder import JOURNAL, MANIFEST
from k2quant.eval.runs.journal import Journal
from k2quant.eval.tools.calling import Answer, Call
from k2quant.eval.tools.checking import UNCHECKED
from k2quant.eval.tools.requests import request_of
from k2quant.eval.tools.scoring import checked
from k2quant.eval.tools.settings import ToolsRequest

pytestmark = pytest.mark.usefixtures("by_score")

Reply = dict[str, Any]
Manner = Callable[[dict[str, Any], int], Reply]
"""What a server answers to a body, given how often it was asked before."""

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string"}, "days": {"type": "integer", "minimum": 1}},
            "required": ["place"],
            "additionalProperties": False,
        },
    },
}
OTHER = {"type": "function", "function": {"name": "current_time"}}


def asking(number: int, *, due: bool, said: bool = True) -> dict[str, Any]:
    """Return a request; a call of get_weather is due, or none, and it may say so."""
    text = f"Weather of place {number}?" if due else f"Why is number {number} a number?"
    body: dict[str, Any] = {"messages": [{"role": "user", "content": text}], "tools": [TOOL, OTHER]}
    return body | ({"expect": ["get_weather"] if due else []} if said else {})


def call(name: str = "get_weather", arguments: str = '{"place": "Oslo"}', finish: str = "tool_calls") -> Reply:
    """Return a chat completion with one call."""
    made = {"id": f"functions.{name}:0", "type": "function", "function": {"name": name, "arguments": arguments}}
    message = {"role": "assistant", "content": None, "tool_calls": [made]}
    return {"choices": [{"index": 0, "message": message, "finish_reason": finish}]}


def text(content: str | None = "Because.", finish: str = "stop", **more: Any) -> Reply:
    """Return a chat completion without a call."""
    message = {"role": "assistant", "content": content, **more}
    return {"choices": [{"index": 0, "message": message, "finish_reason": finish}]}


def good(body: dict[str, Any], _: int = 0) -> Reply:
    """Answer as one should."""
    return call() if body["messages"][-1]["content"].startswith("Weather") else text()


def number_of(body: dict[str, Any]) -> int:
    """Return the number that stands in a request."""
    return int("".join(filter(str.isdigit, body["messages"][-1]["content"])))


@pytest.fixture
def serve() -> Iterator[Callable[[Manner], tuple[str, list[dict[str, Any]]]]]:
    """Start servers that answer as they are told; each gives its URL and the bodies that it has been sent."""
    servers: list[ThreadingHTTPServer] = []

    def start(manner: Manner) -> tuple[str, list[dict[str, Any]]]:
        bodies: list[dict[str, Any]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                before = sum(one["messages"] == body["messages"] for one in bodies)
                bodies.append(body)
                status, answer = 200, manner(body, before)
                if "status" in answer:
                    status = answer["status"]
                content = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                with contextlib.suppress(ConnectionError):  # the client may have gone
                    self.end_headers()
                    self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}/v1", bodies

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def requests_file(tmp_path: Path) -> Path:
    """Forty requests, a call is due in every other one."""
    path = tmp_path / "requests.jsonl"
    path.write_text("".join(json.dumps(asking(number, due=number % 2 == 0)) + "\n" for number in range(40)))
    return path


Serve = Callable[[Any], tuple[str, list[dict[str, Any]]]]


def asked(url: str, requests: Path, **more: Any) -> ToolsRequest:
    """Return what is asked of a served model."""
    return ToolsRequest(model="some-model", backend="api", base_url=url, requests=str(requests), **more)


def manifest_of(folder: Path) -> dict[str, Any]:
    """Return a run's manifest."""
    read: dict[str, Any] = json.loads((folder / MANIFEST).read_bytes())
    return read


def right_of(folder: Path, task: str = "tools") -> list[bool]:
    """Return for each request whether it is right."""
    return [item.right for item in read_run(folder).tasks[task].items]


def test_a_good_server_is_right_in_all(serve: Serve, requests_file: Path, tmp_path: Path) -> None:
    """Every request counts as a whole and for the call; names and arguments count where a call is due."""
    url, bodies = serve(good)
    run_tools(asked(url, requests_file), tmp_path / "run")
    tasks = read_run(tmp_path / "run").tasks
    assert {name: (task.right, len(task.items)) for name, task in tasks.items()} == {
        "tools": (40, 40),
        "tools_call": (40, 40),
        "tools_name": (20, 20),
        "tools_arguments": (20, 20),
    }
    calls = manifest_of(tmp_path / "run")["calls"]
    assert (calls["answers"], calls["made"], calls["valid"], calls["cut"]) == (40, 20, 20, 0)
    assert {(body["model"], body["temperature"], body["max_tokens"], body["stream"]) for body in bodies} == {
        ("some-model", 0, 4096, False)
    }
    assert not any("expect" in body for body in bodies)


@pytest.mark.parametrize(
    ("reply", "wrong"),
    [
        (call("current_time", "{}"), {"tools", "tools_name"}),
        (call("no_such"), {"tools", "tools_name", "tools_arguments"}),
        (call(arguments='{"place": "Oslo"'), {"tools", "tools_arguments"}),
        (call(arguments='{"place": "Oslo", "days": "two"}'), {"tools", "tools_arguments"}),
        (call(arguments="{}"), {"tools", "tools_arguments"}),
        (call(arguments='["Oslo"]'), {"tools", "tools_arguments"}),
        (call(arguments='{"place": "Oslo", "days": 0}'), {"tools", "tools_arguments"}),
        (call(arguments='{"place": "Oslo", "unit": "K"}'), {"tools", "tools_arguments"}),
        (call(finish="stop"), set()),
        (text("I cannot."), {"tools", "tools_call", "tools_name", "tools_arguments"}),
        (text(None, "tool_calls"), {"tools", "tools_name", "tools_arguments"}),
        (text(None, "length"), {"tools", "tools_call", "tools_name", "tools_arguments"}),
        (call("", "null"), {"tools", "tools_name", "tools_arguments"}),
    ],
    ids=[
        "another function",
        "no such function",
        "no JSON",
        "a wrong type",
        "a lack",
        "no object",
        "too small",
        "too much",
        "finish_reason stop",
        "no call",
        "a call that was not read",
        "cut",
        "a call without parts",
    ],
)
def test_what_is_wrong_of_a_call_that_is_due(
    reply: dict[str, Any], wrong: set[str], serve: Serve, tmp_path: Path
) -> None:
    """The part that is wrong is, and the whole with it; the others stay right."""
    path = tmp_path / "requests.jsonl"
    path.write_text(json.dumps(asking(0, due=True)) + "\n")
    url, _ = serve(lambda *_: reply)
    run_tools(asked(url, path), tmp_path / "run")
    tasks = read_run(tmp_path / "run").tasks
    assert {name for name, task in tasks.items() if not task.right} == wrong
    assert tasks.keys() == {"tools", "tools_call", "tools_name", "tools_arguments"}


@pytest.mark.parametrize(("reply", "right"), [(text(), [True]), (call(), [False]), (text(None, "length"), [False])])
def test_where_no_call_is_due(reply: dict[str, Any], right: list[bool], serve: Serve, tmp_path: Path) -> None:
    """A call is wrong, and so is an answer that was cut before it decided; names and arguments are no items there."""
    path = tmp_path / "requests.jsonl"
    path.write_text(json.dumps(asking(1, due=False)) + "\n")
    url, _ = serve(lambda *_: reply)
    run_tools(asked(url, path), tmp_path / "run")
    assert right_of(tmp_path / "run") == right_of(tmp_path / "run", "tools_call") == right
    assert read_run(tmp_path / "run").tasks.keys() == {"tools", "tools_call"}


def test_reasoning_beside_the_answer(serve: Serve, tmp_path: Path) -> None:
    """It is kept for people, decides nothing, and an answer that never leaves it is counted apart."""
    path = tmp_path / "requests.jsonl"
    path.write_text("".join(json.dumps(asking(number, due=False)) + "\n" for number in (1, 3)))

    def think(body: dict[str, Any], _: int) -> dict[str, Any]:
        if number_of(body) == 1:
            return text(reasoning_content="Hm, get_weather?")
        return text(None, "length", reasoning_content="Hm, hm, hm")

    url, _ = serve(think)
    run_tools(asked(url, path), tmp_path / "run")
    assert right_of(tmp_path / "run") == [True, False]
    manifest = manifest_of(tmp_path / "run")
    assert manifest["calls"]["cut_in_thought"] == manifest["tasks"]["tools"]["cut_in_thought"] == 1
    rows = [json.loads(line) for line in (tmp_path / "run" / "samples_tools.jsonl").read_text().splitlines()]
    assert [row["cut_in_thought"] for row in rows] == [False, True]
    assert rows[0]["reasoning"] == "Hm, get_weather?"


def test_words_for_calls_that_the_server_did_not_read(serve: Serve, requests_file: Path, tmp_path: Path) -> None:
    """They are no call, and are counted, for a parser is missing there."""
    url, _ = serve(lambda *_: text("<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0"))
    run_tools(asked(url, requests_file), tmp_path / "run")
    assert manifest_of(tmp_path / "run")["calls"]["unparsed"] == 40
    assert right_of(tmp_path / "run", "tools_call") == [number % 2 == 1 for number in range(40)]


def test_the_gate_decides(serve: Serve, requests_file: Path, tmp_path: Path) -> None:
    """A model that calls the wrong function fails, in the pool once an item and in its part by name."""
    base, _ = serve(good)
    bad, _ = serve(lambda body, _: call("current_time", "{}") if number_of(body) % 2 == 0 else text())
    run_tools(asked(base, requests_file), tmp_path / "base")
    run_tools(asked(bad, requests_file), tmp_path / "bad")
    verdict = gate(tmp_path / "base", tmp_path / "bad", policy=Policy(margin=0.05))
    assert verdict.decision == "FAIL"
    assert (verdict.pooled.n, verdict.pooled.lost, verdict.pooled.gained) == (40, 20, 0)
    assert {task.name: (task.n, task.lost) for task in verdict.tasks} == {
        "tools": (40, 20),
        "tools_call": (40, 0),
        "tools_name": (20, 20),
        "tools_arguments": (20, 0),
    }
    assert len(verdict.flips) == 20
    assert verdict.flips[0].candidate_answer == "current_time({})"
    assert verdict.flips[0].target == "get_weather"


def test_parts_alone_are_no_pool(serve: Serve, requests_file: Path, tmp_path: Path) -> None:
    """Two parts of the same answers are refused without the whole; one is taken."""
    url, _ = serve(good)
    other, _ = serve(lambda body, _: good(body) if number_of(body) else text())
    run_tools(asked(url, requests_file), tmp_path / "one")
    run_tools(asked(other, requests_file), tmp_path / "two")
    with pytest.raises(UsageError, match="tools_call, tools_name look at the same answers"):
        gate(tmp_path / "one", tmp_path / "two", policy=Policy(tasks={"tools_call": None, "tools_name": None}))
    verdict = gate(tmp_path / "one", tmp_path / "two", policy=Policy(margin=0.4, tasks={"tools_name": None}))
    assert (verdict.pooled.n, verdict.pooled.lost) == (20, 1)


def test_a_reference_says_what_is_right(serve: Serve, tmp_path: Path) -> None:
    """Without `expect` a first run is right itself, the next where it did the same; what that left open is no item."""
    path = tmp_path / "requests.jsonl"
    path.write_text("".join(json.dumps(asking(number, due=number % 2 == 0, said=False)) + "\n" for number in range(20)))

    def first(body: dict[str, Any], _: int) -> dict[str, Any]:
        return text(None, "length") if number_of(body) == 7 else good(body)

    def second(body: dict[str, Any], _: int) -> dict[str, Any]:
        return call() if number_of(body) == 3 else text() if number_of(body) == 4 else good(body)

    said: list[str] = []
    run_tools(asked(serve(first)[0], path), tmp_path / "base", remark=said.append)
    assert right_of(tmp_path / "base") == [True] * 19
    assert manifest_of(tmp_path / "base")["calls"]["without_reference"] == 1
    assert any("takes it as `reference=`" in each for each in said)
    run_tools(asked(serve(second)[0], path, reference=tmp_path / "base"), tmp_path / "next")
    assert [
        number
        for number, right in zip([*range(7), *range(8, 20)], right_of(tmp_path / "next"), strict=True)
        if not right
    ] == [3, 4]
    verdict = gate(tmp_path / "base", tmp_path / "next", policy=Policy(margin=0.2))
    assert (verdict.pooled.lost, verdict.pooled.gained, verdict.pooled.n) == (2, 0, 19)


def test_a_stopped_run_resumes(serve: Serve, requests_file: Path, tmp_path: Path) -> None:
    """What was answered is not asked again, and the samples are those of a run that was never stopped."""

    def breaks(body: dict[str, Any], _: int) -> dict[str, Any]:
        return {"status": 400, "error": "no"} if number_of(body) == 33 else good(body)

    url, bodies = serve(breaks)
    with pytest.raises(HarnessFault, match=r"400 .*under way were .*requests.jsonl, line 34"):
        run_tools(asked(url, requests_file, batch_size=2), tmp_path / "run")
    kept = len((tmp_path / "run" / JOURNAL).read_bytes().splitlines())
    assert 20 < kept < 40
    bodies.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "number_of", lambda _: 0)
        run_tools(asked(url, requests_file, batch_size=2), tmp_path / "run")
    # A request of the first run may reach the server only now: it is one of those that are asked again.
    assert len({body["messages"][0]["content"] for body in bodies}) == 40 - kept
    assert not (tmp_path / "run" / JOURNAL).exists()
    run_tools(asked(serve(good)[0], requests_file), tmp_path / "whole")
    name = "samples_tools.jsonl"
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    said: list[str] = []
    run_tools(asked(url, requests_file, batch_size=2), tmp_path / "run", remark=said.append)
    assert said[-1].endswith("already finished")


def test_repeats_are_of_one_item(serve: Serve, requests_file: Path, tmp_path: Path) -> None:
    """Each request is asked so often, with seeds of its own, and its rows say which repeat they are."""
    url, bodies = serve(lambda body, before: good(body) if before != 1 else text())
    run_tools(asked(url, requests_file, repeats=3, temperature=0.6, limit=2), tmp_path / "run")
    seeds = {number: sorted(body["seed"] for body in bodies if number_of(body) == number) for number in (0, 1)}
    assert len({*seeds[0], *seeds[1]}) == 6  # one seed for all would have them fall to the same side together
    assert all(each == [each[0], each[0] + 1, each[0] + 2] and 0 <= each[0] < 2**30 for each in seeds.values())
    assert {body["temperature"] for body in bodies} == {0.6}
    assert manifest_of(tmp_path / "run")["tasks"]["tools"]["repeats"] == 3
    rows = [json.loads(line) for line in (tmp_path / "run" / "samples_tools.jsonl").read_text().splitlines()]
    metrics = manifest_of(tmp_path / "run")["tasks"]["tools"]["metrics"]["right,none"]
    assert metrics == {"value": pytest.approx(5 / 6), "stderr": pytest.approx(1 / 6)}
    assert [(row["doc_id"], row["repeat"]) for row in rows] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]


def test_a_seed_that_a_request_names_goes_as_it_stands(serve: Serve, tmp_path: Path) -> None:
    """Unless the user names one, from which those of all requests follow, the same ones each time."""
    path = tmp_path / "requests.jsonl"
    path.write_text("".join(json.dumps(asking(number, due=True) | {"seed": 5}) + "\n" for number in range(2)))
    url, bodies = serve(good)
    for name, seed in (("own", None), ("seven", 7), ("again", 7), ("eight", 8)):
        run_tools(asked(url, path, seed=seed, temperature=0.6), tmp_path / name)
    own, seven, again, eight = ([body["seed"] for body in bodies[begin : begin + 2]] for begin in (0, 2, 4, 6))
    assert own == [5, 5]
    assert sorted(seven) == sorted(again)
    assert len({*own, *seven, *eight}) == 5


def test_greedy_answers_are_not_repeated(requests_file: Path, tmp_path: Path) -> None:
    """They would be the same; requests that say how warm they are may be."""
    with pytest.raises(UsageError, match="greedy answers are the same each time"):
        run_tools(asked("http://127.0.0.1:9/v1", requests_file, repeats=2), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_server_that_stumbles(
    serve: Serve, requests_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A 500 is asked again, and why is told; a key comes from the environment, reaches the server and no file."""
    monkeypatch.setenv("MY_KEY", "top-secret")
    url, bodies = serve(lambda body, before: {"status": 500} if before == 0 and number_of(body) == 3 else good(body))
    told: list[str] = []
    request = asked(url, requests_file, headers={"X-Key": "MY_KEY"}, model_args={"retries": 2})
    run_tools(request, tmp_path / "run", remark=told.append)
    assert len(bodies) == 41
    assert any("500" in said and "asked again in" in said for said in told)
    assert right_of(tmp_path / "run") == [True] * 40
    assert not any(b"top-secret" in path.read_bytes() for path in (tmp_path / "run").iterdir())


@pytest.mark.parametrize("padding", [0, 150, 190])
def test_a_key_that_a_server_repeats_is_in_no_message(
    padding: int, serve: Serve, requests_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor half of it, where the message is cut."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-0123456789")
    for odd in ({}, {"choices": [{"message": {"tool_calls": "x" * padding + "sk-0123456789"}}]}):
        url, _ = serve(lambda *_, odd=odd: {"a": "x" * padding + "sk-0123456789", **odd})
        with pytest.raises(HarnessFault, match="no answer of a chat") as caught:
            run_tools(asked(url, requests_file), tmp_path / "run")
        assert "sk-" not in str(caught.value)


def test_a_journal_with_something_else_is_asked_again(serve: Serve, requests_file: Path, tmp_path: Path) -> None:
    """A line that is whole and holds no answer is as good as none."""
    refused = [39]
    url, bodies = serve(lambda body, _: {"status": 400} if number_of(body) in refused else good(body))
    with pytest.raises(HarnessFault):
        run_tools(asked(url, requests_file, batch_size=1), tmp_path / "run")
    journal = Journal(tmp_path / "run" / JOURNAL)
    for answer, key in zip([5, {"tool_calls": [5]}, []], list(journal._places), strict=False):  # noqa: SLF001
        journal.add(key, [answer])
    bodies.clear()
    refused.clear()
    run_tools(asked(url, requests_file, batch_size=1), tmp_path / "run")
    assert sorted(number_of(body) for body in bodies) == [0, 1, 2, 39]


def test_an_answer_of_many_calls_is_given_up_with_the_first_that_never_ends() -> None:
    """Ten seconds for each of thousands would be hours; what cannot be checked is no valid answer either way."""
    one = request_of(asking(0, due=True), "requests.jsonl, line 1")
    begun: list[str] = []

    def never(_: object, arguments: str) -> str | None:
        begun.append(arguments)
        return f"{UNCHECKED} within 10 s" if arguments == "trap" else None

    calls = tuple(Call(name="get_weather", arguments=text) for text in ("{}", "trap", *["trap"] * 1000))
    found = checked(one, Answer(calls=calls), never)
    assert begun == ["{}", "trap"]
    assert (found.valid, found.unchecked) == (False, True)


def test_a_request_twice_counts_once(serve: Serve, tmp_path: Path) -> None:
    """It would be the same item twice, and not two; that is said."""
    path = tmp_path / "requests.jsonl"
    path.write_text("".join(json.dumps(asking(number % 3, due=True)) + "\n" for number in range(9)))
    said: list[str] = []
    run_tools(asked(serve(good)[0], path), tmp_path / "run", remark=said.append)
    assert right_of(tmp_path / "run") == [True] * 3
    assert "6 of 9 requests stand there before" in said[0]


def test_sampling_is_a_setting(serve: Serve, requests_file: Path, tmp_path: Path) -> None:
    """Runs of other temperatures are not comparable; of other seeds they are."""
    url, _ = serve(good)
    other, _ = serve(lambda body, _: text() if number_of(body) == 0 else good(body))
    run_tools(asked(url, requests_file, temperature=0.6), tmp_path / "base")
    run_tools(asked(other, requests_file, temperature=0.6, seed=7), tmp_path / "seed")
    run_tools(asked(other, requests_file, temperature=1.0), tmp_path / "warm")
    assert gate(tmp_path / "base", tmp_path / "seed").pooled.lost == 1
    with pytest.raises(Incomparable, match="sampling"):
        gate(tmp_path / "base", tmp_path / "warm")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": []}, "messages: expected a list"),
        ({"messages": [{"role": "wizard", "content": "a"}]}, "unknown role 'wizard'"),
        ({"messages": [{"role": "user", "content": "a"}], "tools": [{"type": "function"}]}, "functions with a name"),
        (asking(0, due=True) | {"expect": ["fly"]}, "'fly' is none of its tools"),
        (asking(0, due=True) | {"n": 4}, "asks for several answers"),
        (asking(0, due=True) | {"temperature": "hot"}, "temperature 'hot'"),
        (asking(0, due=True) | {"temperature": 10**400}, "temperature 1000"),
        (asking(0, due=True) | {"top_p": 1.5}, "top_p 1.5"),
        (asking(0, due=True) | {"seed": 2**64}, "seed 18446744073709551616"),
        (asking(0, due=True) | {"max_tokens": 0}, "max_tokens 0"),
        (asking(0, due=True, said=False), "this one does not"),
    ],
)
def test_a_line_that_is_no_request_is_named(row: dict[str, Any], said: str, tmp_path: Path) -> None:
    """File, line and what is wrong; nothing is asked and no folder is made."""
    path = tmp_path / "requests.jsonl"
    path.write_text("\n".join(json.dumps(each) for each in (asking(2, due=True), row)) + "\n")
    with pytest.raises(MalformedFile, match=said) as caught:
        run_tools(asked("http://127.0.0.1:9/v1", path), tmp_path / "run")
    assert "requests.jsonl, line 2" in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"backend": "api"}, "base_url"),
        ({"base_url": "http://a/v1"}, "backend=api"),
        ({"backend": "answers", "temperature": 1.0}, "leave `temperature=` out"),
        ({"backend": "answers", "base_url": "http://a/v1"}, "leave `base_url=` out"),
        ({"model_args": {"timeout": 3}}, "our own engine takes none"),
        ({"backend": "api", "base_url": "http://a/v1", "model_args": {"timeouts": 3}}, "did you mean timeout"),
        ({"backend": "answers", "repeats": 2}, "repeats"),
        ({"backend": "api", "base_url": "http://a/v1", "repeats": 10**9}, "repeats: expected at most 10,000"),
        ({"backend": "api", "base_url": "http://a/v1", "seed": 2**64}, "seed: expected 0 to"),
        ({"backend": "api", "base_url": "http://a/v1", "temperature": float("nan")}, "temperature: expected 0 to 10"),
        ({"repeats": 0}, "repeats: expected at least 1"),
        ({"top_p": 1.5}, "top_p: expected more than 0 and at most 1"),
        ({"seed": -1}, "seed: expected 0 to"),
        ({"temperature": float("nan")}, "temperature: expected 0 to 10"),
        ({"backend": "vllm"}, "unknown backend"),
        ({"backend": "answers"}, "neither a run of k2quant eval tools nor a file"),
        ({"backend": "api", "base_url": "http://a/v1", "requests": "/no/such"}, "no file of requests"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    """They are named before anything is made."""
    with pytest.raises(UsageError, match=said):
        run_tools(ToolsRequest(model="some-model", **options), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_answers_of_a_run_may_be_judged_again(serve: Serve, requests_file: Path, tmp_path: Path) -> None:
    """By another reference, without asking anybody; a file that was changed, or is gone, is refused."""
    run_tools(asked(serve(good)[0], requests_file), tmp_path / "run")
    run_tools(asked(serve(lambda *_: call())[0], requests_file), tmp_path / "calls")
    again = ToolsRequest(model=str(tmp_path / "run"), backend="answers", reference=tmp_path / "calls")
    run_tools(again, tmp_path / "again")
    assert right_of(tmp_path / "again") == [number % 2 == 0 for number in range(40)]
    assert read_run(tmp_path / "again").model == "some-model"
    answers = tmp_path / "run" / "answers.jsonl"
    answers.write_bytes(answers.read_bytes().replace(b"Oslo", b"Rome"))
    with pytest.raises(MalformedResults, match="changed since the run wrote it"):
        run_tools(again, tmp_path / "third")
    answers.unlink()
    with pytest.raises(MalformedResults, match=r"answers.jsonl: cannot be read, found No such file"):
        run_tools(again, tmp_path / "fourth")


def k2quant(*arguments: object) -> Result:
    """Run the command line in this process."""
    return CliRunner().invoke(main, [*map(str, arguments)])


def test_the_command(serve: Serve, requests_file: Path, tmp_path: Path) -> None:
    """It shows calls made and valid, a row a task, and what is in doubt; as JSON it prints the manifest."""

    def answer(body: dict[str, Any], _: int) -> dict[str, Any]:
        replies = {0: text(None, "length"), 2: call(arguments="{}")}
        return replies.get(number_of(body), good(body))

    url, _ = serve(answer)
    options = ["--backend", "api", "--base-url", url, "--requests", requests_file]
    done = k2quant("eval", "tools", "some-model", *options, "-o", tmp_path / "run")
    assert done.exit_code == 0, done.stderr
    head, _, titles, *rows = done.stdout.splitlines()
    assert head == "40 answers, 19 with calls, 18 of them valid by schema (94.74%)"
    assert titles.split() == ["task", "n", "right", "stderr"]
    assert [row.split()[:3] for row in rows] == [
        ["tools", "40", "0.9500"],
        ["tools_call", "40", "0.9750"],
        ["tools_name", "20", "0.9500"],
        ["tools_arguments", "20", "0.9000"],
    ]
    assert "1 of 40 answers ended at the limit on new tokens; see --max-new-tokens" in done.stderr
    again = k2quant("eval", "tools", "some-model", *options, "-o", tmp_path / "run", "--json")
    assert json.loads(again.stdout)["calls"]["made"] == 19
    assert "already finished" in again.stderr


def test_mistakes_on_the_command_line(tmp_path: Path) -> None:
    """They are said in flags, exit 2."""
    done = k2quant("eval", "tools", "m", "--backend", "answers", "--repeats", 2, "-o", tmp_path / "run")
    assert done.exit_code == 2
    assert "--repeats" in done.stderr
    assert "`" not in done.stderr
    done = k2quant("eval", "tools", "m", "--header", "Authorization: secret", "-o", tmp_path / "run")
    assert done.exit_code == 2
    assert "secret" not in done.stderr


def test_the_list_of_what_ships() -> None:
    """Each request with what is due."""
    done = k2quant("eval", "tools", "--list")
    assert done.exit_code == 0
    assert done.stdout.startswith("k2-tools: 82 requests with 15 tools, a call is due in 53")
    assert len(done.stdout.splitlines()) == 83
