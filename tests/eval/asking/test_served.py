"""A served model answers as the local one does, item for item; servers that cannot are refused, not scored."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from lm_eval.models.api_models import JsonChatStr
from lm_eval.models.openai_completions import LocalCompletionsAPI

from k2quant.cli import main
from k2quant.errors import HarnessFault, UsageError
from k2quant.eval.asking.endpoint.client import Client
from k2quant.eval.asking.endpoint.server import Server
from k2quant.eval.asking.harness import served_model
from k2quant.eval.asking.request import Request
from k2quant.eval.asking.running import run
from k2quant.eval.runs.folder import JOURNAL, MANIFEST
from k2quant.nano import architecture, writing
from k2quant.nano.benchmark import write_tasks


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A nano-K2 with random weights, named after the architecture that transformers knows.

    transformers does not know `kimi_k2`; everything else in the folder is as it was.
    """
    folder = tmp_path_factory.mktemp("model") / "nano"
    torch.manual_seed(7)
    with writing.claimed(folder):
        writing.write(folder, architecture.build(), {})
    config = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "deepseek_v3"}))
    (folder / "chat_template.jinja").write_text("{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}")
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nano-K2's own tasks, nine items each."""
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder, 3)
    return folder


@pytest.fixture(scope="module")
def url(nano: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where transformers' own server serves the model, on the loopback address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve = "from transformers.cli.transformers import main; main()"
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("wb") as out:
        server = subprocess.Popen([sys.executable, "-c", serve, "serve", str(nano), *options], stdout=out, stderr=out)
    try:
        for _ in range(600):
            assert server.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait()


def served(nano: Path, tasks: Path, url: str) -> Request:
    """Return nano's tasks, asked of a server."""
    options: dict[str, Any] = {"backend": "api", "base_url": url, "served_from": nano}
    return Request(model=str(nano), tasks=("nano",), include=(tasks,), batch_size=3, max_new_tokens=12, **options)


def test_a_served_model_answers_as_the_local_one(nano: Path, tasks: Path, url: str, tmp_path: Path) -> None:
    """Through lm-eval's API backend, transformers' own loading and our kernels: samples equal byte for byte."""
    request = served(nano, tasks, url)
    local = replace(request, backend="hf", base_url=None, served_from=None, dtype="float32")
    run(request, tmp_path / "api")
    run(local, tmp_path / "hf")
    run(replace(local, backend="k2quant"), tmp_path / "k2quant")
    manifests = {name: json.loads((tmp_path / name / MANIFEST).read_bytes()) for name in ("api", "hf", "k2quant")}
    assert len({manifest["model_hash"] for manifest in manifests.values()}) == 1
    assert len({manifest["tokenizer_hash"] for manifest in manifests.values()}) == 1
    answers = set()
    for name, task in manifests["api"]["tasks"].items():
        assert task["documents"] == 9
        data = {backend: (tmp_path / backend / task["file"]).read_bytes() for backend in manifests}
        assert data["api"] == data["hf"] == data["k2quant"]
        assert [manifest["tasks"][name]["metrics"] for manifest in manifests.values()] == [task["metrics"]] * 3
        cut = {manifest["tasks"][name]["truncated"] for manifest in manifests.values()}
        assert len(cut) == 1
        answers |= {json.loads(line)["resps"][0][0] for line in data["api"].splitlines()}
    assert len(answers) > 20  # the comparison is of something


def test_a_model_that_is_served_for_chat_answers_as_the_local_one(
    nano: Path, tasks: Path, url: str, tmp_path: Path
) -> None:
    """Messages through transformers' own server, and prompts through the same template here: equal texts."""
    request = replace(served(nano, tasks, url), tasks=("nano_add",), chat=True, model_args={"concurrency": 2})
    run(request, tmp_path / "api")
    local: dict[str, Any] = {
        "backend": "k2quant",
        "dtype": "float32",
        "chat": False,
        "chat_template": True,
        "model_args": {},
    }
    run(replace(request, base_url=None, served_from=None, **local), tmp_path / "k2quant")
    answers = {
        side: {
            (path.name, row["doc_id"]): row["resps"]
            for path in (tmp_path / side).glob("samples_*")
            for row in map(json.loads, path.read_bytes().splitlines())
        }
        for side in ("api", "k2quant")
    }
    assert len(answers["api"]) == 9
    assert answers["api"] == answers["k2quant"]


def test_a_server_without_echo_cannot_do_multiple_choice(nano: Path, tasks: Path, url: str, tmp_path: Path) -> None:
    """A mixed list ends before anything is asked, with the names of the tasks that need scores."""
    request = replace(served(nano, tasks, url), tasks=("nano", "nano_choice"))
    with pytest.raises(HarnessFault, match=r"echo log-probabilities \(for nano_choice\)") as caught:
        run(request, tmp_path / "run")
    assert url in str(caught.value)
    assert not (tmp_path / "run" / JOURNAL).exists()


def test_chat_messages_cannot_be_scored(nano: Path, tasks: Path, url: str, tmp_path: Path) -> None:
    """Said with the name of the task; without a tokenizer, scoring is refused as well."""
    request = replace(served(nano, tasks, url), tasks=("nano_choice",))
    with pytest.raises(UsageError, match="nano_choice"):
        run(replace(request, chat=True), tmp_path / "chat")
    with pytest.raises(UsageError, match="`tokenizer=` or `served_from=`"):
        run(replace(request, served_from=None), tmp_path / "plain")


Answer = Callable[[dict[str, Any]], tuple[int, bytes]]


@pytest.fixture
def stub() -> Iterator[Callable[[Answer], str]]:
    """A server that answers each POST as it is told."""
    servers: list[ThreadingHTTPServer] = []

    def start(answer: Answer) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status, content = answer(body)
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                with contextlib.suppress(ConnectionError):  # the client may have given up on its other requests
                    self.end_headers()
                    self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}/v1"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def choices(*, text: str = "x", reason: str = "stop", logprobs: Any = None) -> bytes:
    """Return the body of an answer."""
    choice = {"index": 0, "text": text, "finish_reason": reason, "logprobs": logprobs}
    return json.dumps({"choices": [choice]}).encode()


@pytest.mark.parametrize(
    ("status", "content", "said"),
    [
        (404, b"no such page", "404"),
        (500, b"", "500"),
        (401, b'{"error": "bad key"}', "bad key"),
        (200, b"<html>", "OpenAI-style"),
        (200, b"[]", "OpenAI-style"),
        (200, b'{"choices": []}', "OpenAI-style"),
        (200, b'{"choices": [{"index": 0}]}', "KeyError"),
    ],
)
def test_broken_servers_are_faults(
    tasks: Path, stub: Callable[[Answer], str], tmp_path: Path, status: int, content: bytes, said: str
) -> None:
    """Whatever a server says instead of an answer ends the run with its address; nothing is scored."""
    url = stub(lambda _: (status, content))
    request = Request(model="m", tasks=("nano_add",), include=(tasks,), backend="api", base_url=url)
    request = replace(request, model_args={"retries": 0})
    with pytest.raises(HarnessFault, match=said) as caught:
        run(request, tmp_path / "run")
    assert url in str(caught.value)
    assert not (tmp_path / "run" / MANIFEST).exists()


def test_no_server_is_a_fault(tasks: Path, tmp_path: Path) -> None:
    """A refused connection names the address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    request = Request(model="m", tasks=("nano_add",), include=(tasks,), backend="api", base_url=url)
    request = replace(request, model_args={"retries": 0})
    with pytest.raises(HarnessFault, match="ClientConnectorError"):
        run(request, tmp_path / "run")


def test_a_server_that_stops_does_not_lose_what_it_said(
    tasks: Path, stub: Callable[[Answer], str], tmp_path: Path
) -> None:
    """It answers some requests, then breaks; when it is back, only the rest is asked."""
    state = {"left": 10, "asked": 0}

    def answer(body: dict[str, Any]) -> tuple[int, bytes]:
        if body["max_tokens"] == 1:
            return 200, choices()
        if not state["left"]:
            return 500, b"out of memory"
        state["left"] -= 1
        state["asked"] += 1
        end = "\n and more" if body["prompt"].startswith("A") else ""
        return 200, choices(text=body["prompt"] + end, reason="length")

    url = stub(answer)
    options: dict[str, Any] = {"backend": "api", "base_url": url, "max_new_tokens": 7, "batch_size": 3}
    request = Request(model="m", tasks=("nano_add", "nano_sort"), include=(tasks,), **options)
    request = replace(request, model_args={"retries": 0})
    with pytest.raises(HarnessFault, match="500"):
        run(request, tmp_path / "run")
    state["left"] = 100
    run(request, tmp_path / "run")
    assert state["asked"] <= 18 + 3  # the requests of the chunk that broke may have been answered before
    manifest = json.loads((tmp_path / "run" / MANIFEST).read_bytes())
    assert manifest["model_hash"] is None
    assert manifest["tokenizer_hash"] is None
    rows = [json.loads(line) for line in (tmp_path / "run" / "samples_nano_add.jsonl").read_bytes().splitlines()]
    assert [row["resps"][0][0] for row in rows] == [row["doc"]["question"] for row in rows]  # stop strings go
    assert [manifest["tasks"][name]["truncated"] for name in ("nano_add", "nano_sort")] == [0, 9]


def test_chat_messages_carry_the_question(tasks: Path, stub: Callable[[Answer], str], tmp_path: Path) -> None:
    """With `chat`, each question is one user message; the answer is the assistant's, and a cut one is counted."""

    def answer(body: dict[str, Any]) -> tuple[int, bytes]:
        (message,) = body["messages"]
        assert message["role"] == "user"
        content = {"role": "assistant", "content": f"{message['content']} of {body['max_tokens']}"}
        choice = {"index": 0, "message": content, "finish_reason": "length"}
        return 200, json.dumps({"choices": [choice]}).encode()

    options: dict[str, Any] = {"backend": "api", "base_url": stub(answer), "chat": True, "max_new_tokens": 7}
    run(Request(model="m", tasks=("nano_add",), include=(tasks,), **options), tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "samples_nano_add.jsonl").read_bytes().splitlines()]
    assert [row["resps"][0][0] for row in rows] == [f"{row['doc']['question']} of 7" for row in rows]
    assert json.loads((tmp_path / "run" / MANIFEST).read_bytes())["tasks"]["nano_add"]["truncated"] == 9


def echoed(scores: Callable[[list[int]], Sequence[float]]) -> Answer:
    """Return a server that echoes log-probabilities, as vLLM does."""

    def answer(body: dict[str, Any]) -> tuple[int, bytes]:
        if not body.get("echo"):
            return 200, choices()
        tokens = body["prompt"] if isinstance(body["prompt"][0], int) else body["prompt"][0]
        values = [None, *scores(tokens)[1:], -1.0]
        top = [None, *({"x": value} for value in values[1:])]
        return 200, choices(logprobs={"token_logprobs": values, "top_logprobs": top})

    return answer


def test_scores_of_a_server_are_those_of_the_tokens(
    nano: Path, tasks: Path, stub: Callable[[Answer], str], tmp_path: Path
) -> None:
    """A server that echoes is sent tokens with one BOS, and each choice gets the sum over its own tokens."""
    seen: list[list[int]] = []

    def scores(tokens: list[int]) -> list[float]:
        seen.append(tokens)
        return [-(2.0 ** -(token % 13)) for token in tokens]

    request = replace(served(nano, tasks, stub(echoed(scores))), tasks=("nano_choice",), limit=4, batch_size=1)
    run(request, tmp_path / "run")
    from k2quant.model.generation import load_tokenizer

    tokenizer = load_tokenizer(nano)
    rows = [json.loads(line) for line in (tmp_path / "run" / "samples_nano_choice.jsonl").read_bytes().splitlines()]
    assert len(rows) == 4
    for row in rows:
        for asked, answer in zip(row["arguments"].values(), row["resps"], strict=True):
            tokens = tokenizer.encode(asked["arg_0"] + asked["arg_1"])
            own = tokens[len(tokenizer.encode(asked["arg_0"])) :]
            assert tokens in seen
            assert float(answer[0][0]) == sum(-(2.0 ** -(token % 13)) for token in own)
    bos = tokenizer.bos_token_id
    assert all(tokens[0] == bos and tokens.count(bos) == 1 for tokens in seen)


def test_log_probabilities_that_are_all_zero_are_no_scores(
    nano: Path, tasks: Path, stub: Callable[[Answer], str], tmp_path: Path
) -> None:
    """A server that echoes zeros is found out before anything is scored."""
    request = replace(served(nano, tasks, stub(echoed(lambda tokens: [0.0] * len(tokens)))), tasks=("nano_choice",))
    with pytest.raises(HarnessFault, match="echo log-probabilities"):
        run(request, tmp_path / "run")


@pytest.mark.parametrize("content", [None, ""])
def test_an_answer_without_text_may_be_a_cut_one(
    tasks: Path, stub: Callable[[Answer], str], tmp_path: Path, content: str | None
) -> None:
    """A reasoning model that spends every token on reasoning says nothing; the server says that it was cut."""

    def answer(body: dict[str, Any]) -> tuple[int, bytes]:
        message = {"role": "assistant", "content": content, "reasoning_content": "hm"}
        reason = "stop" if body["max_tokens"] == 1 else "length"
        return 200, json.dumps({"choices": [{"index": 0, "message": message, "finish_reason": reason}]}).encode()

    options: dict[str, Any] = {"backend": "api", "base_url": stub(answer), "chat": True, "max_new_tokens": 7}
    run(Request(model="m", tasks=("nano_add",), include=(tasks,), **options), tmp_path / "run")
    assert json.loads((tmp_path / "run" / MANIFEST).read_bytes())["tasks"]["nano_add"]["truncated"] == 9


def test_half_a_character_of_a_server_fits_in_a_file(
    tasks: Path, stub: Callable[[Answer], str], tmp_path: Path
) -> None:
    """JSON can hold half of a surrogate pair, UTF-8 cannot: such a half becomes U+FFFD."""
    body = b'{"choices": [{"index": 0, "text": "\\ud83d x", "finish_reason": "stop"}]}'
    url = stub(lambda _: (200, body))
    run(Request(model="m", tasks=("nano_add",), include=(tasks,), backend="api", base_url=url), tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "samples_nano_add.jsonl").read_bytes().splitlines()]
    assert {row["resps"][0][0] for row in rows} == {"\ufffd x"}


@pytest.mark.parametrize("reason", ["stop", "length"])
def test_an_answer_that_is_no_text_is_a_fault(
    tasks: Path, stub: Callable[[Answer], str], tmp_path: Path, reason: str
) -> None:
    """A number is not taken for one, cut or not; the server is named."""

    def answer(body: dict[str, Any]) -> tuple[int, bytes]:
        text: Any = "x" if body["max_tokens"] == 1 else 5
        return 200, choices(text=text, reason=reason)

    url = stub(answer)
    request = Request(model="m", tasks=("nano_add",), include=(tasks,), backend="api", base_url=url)
    with pytest.raises(HarnessFault, match="no text") as caught:
        run(request, tmp_path / "run")
    assert url in str(caught.value)


@pytest.mark.parametrize("more", [-1, 1])
def test_scores_of_another_text_are_a_fault(
    nano: Path, tasks: Path, stub: Callable[[Answer], str], tmp_path: Path, more: int
) -> None:
    """lm-eval adds up what lies behind the context: one log-probability more or less and it adds up others."""
    echo = echoed(lambda tokens: [-(2.0 ** -(token % 13)) for token in tokens])
    asked: list[bool] = []

    def answer(body: dict[str, Any]) -> tuple[int, bytes]:
        status, content = echo(body)
        asked.append(bool(body.get("echo")))
        if sum(asked) < 2 or not body.get("echo"):  # the first is asked before the run, and is right
            return status, content
        found = json.loads(content)
        scores = found["choices"][0]["logprobs"]
        for key, filling in (("token_logprobs", -1.0), ("top_logprobs", {"x": -1.0})):
            scores[key] = scores[key][:more] if more < 0 else [*scores[key], filling]
        return status, json.dumps(found).encode()

    url = stub(answer)
    request = replace(served(nano, tasks, url), tasks=("nano_choice",), batch_size=1)
    with pytest.raises(HarnessFault, match="another text") as caught:
        run(request, tmp_path / "run")
    assert url in str(caught.value)


def test_log_probabilities_above_zero_are_a_fault(
    nano: Path, tasks: Path, stub: Callable[[Answer], str], tmp_path: Path
) -> None:
    """No event is likelier than certain; a server that says so gives something else."""
    request = served(nano, tasks, stub(echoed(lambda tokens: [1.0 + token for token in tokens])))
    with pytest.raises(HarnessFault, match="above 0"):
        run(replace(request, tasks=("nano_choice",)), tmp_path / "run")


def test_whole_numbers_are_log_probabilities_too(
    nano: Path, tasks: Path, stub: Callable[[Answer], str], tmp_path: Path
) -> None:
    """JSON of other languages writes -1.0 as -1."""
    request = served(nano, tasks, stub(echoed(lambda tokens: [-1 - token % 7 for token in tokens])))
    run(replace(request, tasks=("nano_choice",)), tmp_path / "run")
    assert (tmp_path / "run" / MANIFEST).exists()


def asked(*settings: dict[str, Any], context: Any = "2+2=") -> list[Any]:
    """Return requests of lm-eval's kind, as far as models look at them."""
    return [SimpleNamespace(args=(context, {"until": ["\n"], "max_gen_toks": 5} | each)) for each in settings]


def model(url: str, *, chat: bool = False, marker: str = "</think>", **options: Any) -> Any:
    """Return lm-eval's model on a server that is not asked anything before."""
    client = Client(url=url, **{"retries": 2, "first_wait": 0.01, **options})
    return served_model(Server(client=client, model="m", chat=chat), None, max_length=64, marker=marker)


def said(message: dict[str, Any], reason: str = "stop") -> bytes:
    """Return the body of a chat answer."""
    return json.dumps({"choices": [{"index": 0, "message": message, "finish_reason": reason}]}).encode()


@pytest.mark.parametrize("chat", [False, True])
def test_answers_stream_in_as_they_are_written(stub: Callable[[Answer], str], *, chat: bool) -> None:
    """As many requests are under way as the client may have, over all of them, and a slow one holds up nobody."""
    together, lock = threading.Barrier(5), threading.Lock()
    now: list[int] = [0, 0]

    def answer(body: dict[str, Any]) -> tuple[int, bytes]:
        with lock:
            now[0] += 1
            now[1] = max(now)
        number = body["top_k"]
        if number < 5:
            together.wait(20)
        time.sleep(1.0 if number == 0 else 0.01)
        with lock:
            now[0] -= 1
        reason = "length" if number % 2 else "stop"
        text = f"{number}\nmore" if number % 3 == 0 else f"{number}"
        return 200, said({"content": text}, reason) if chat else choices(text=text, reason=reason)

    came: list[tuple[int, str, bool]] = []
    context: Any = JsonChatStr('[{"role": "user", "content": "2+2="}]') if chat else "2+2="
    requests = asked(*({"top_k": number} for number in range(30)), context=context)
    model(stub(answer), chat=chat, concurrency=5).stream_until(requests, lambda *found: came.append(found))
    assert now[1] == 5
    assert came[-1][0] == 0
    assert sorted(came) == [(n, str(n), n % 2 == 1 and n % 3 != 0) for n in range(30)]


def test_settings_of_sampling_reach_the_server(stub: Callable[[Answer], str]) -> None:
    """Temperature, top_p and a seed for each request, limit and stop strings; greedy unless something else is said."""
    seen: list[dict[str, Any]] = []

    def answer(body: dict[str, Any]) -> tuple[int, bytes]:
        seen.append(body)
        return 200, choices()

    drawn = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "seed": 2**62, "until": ["", "Q:"]}
    requests = asked({"do_sample": False}, drawn, {"until": []})
    kept = copy.deepcopy(requests)
    model(stub(answer), concurrency=1).stream_until(requests, lambda *_: None)
    common = {"model": "m", "prompt": "2+2=", "max_tokens": 5}
    assert seen == [
        common | {"temperature": 0, "seed": 1234, "stop": ["\n"]},
        common | {"temperature": 0.6, "top_p": 0.95, "seed": 2**62, "stop": ["Q:"]},
        common | {"temperature": 0, "seed": 1234},
    ]
    assert requests == kept  # a request is asked again with the same settings


@pytest.mark.parametrize(
    ("message", "reason", "text", "cut"),
    [
        ({"content": "4", "reasoning_content": "hm"}, "stop", "<think>hm</think>4", False),
        ({"content": "4", "reasoning": "hm"}, "length", "<think>hm</think>4", True),
        ({"content": "4", "reasoning_content": None, "reasoning": "hm"}, "stop", "<think>hm</think>4", False),
        ({"content": None, "reasoning_content": "hm"}, "length", "<think>hm", True),
        ({"content": "", "reasoning_content": "hm"}, "stop", "<think>hm", False),
        ({"content": "4", "reasoning_content": ""}, "stop", "4", False),
        ({"content": "hm</think>4"}, "stop", "hm</think>4", False),
        ({"reasoning_content": "hm"}, "length", "<think>hm", True),
    ],
)
def test_reasoning_that_a_server_gives_apart_is_one_text_with_the_answer(
    stub: Callable[[Answer], str], message: dict[str, Any], reason: str, text: str, *, cut: bool
) -> None:
    """With the marker between them, missing where no answer followed; where none is wanted, reasoning is left out."""
    url = stub(lambda _: (200, said(message, reason)))
    requests = asked({}, context=JsonChatStr('[{"role": "user", "content": "2+2="}]'))
    came: list[tuple[int, str, bool]] = []
    model(url, chat=True).stream_until(requests, lambda *found: came.append(found))
    model(url, chat=True, marker="").stream_until(requests, lambda *found: came.append(found))
    assert came == [(0, text, cut), (0, message.get("content") or "", cut)]


@pytest.mark.parametrize(("marker", "text"), [("</thought>", "<thought>hm"), ("ANSWER:", "hm")])
def test_reasoning_is_opened_by_what_belongs_to_its_marker(
    stub: Callable[[Answer], str], marker: str, text: str
) -> None:
    """Of a marker that is no pair's end nothing opens it; then every answer counts as reasoning until the marker."""
    url = stub(lambda _: (200, said({"content": None, "reasoning": "hm"}, "length")))
    came: list[str] = []
    requests = asked({}, context=JsonChatStr('[{"role": "user", "content": "2+2="}]'))
    model(url, chat=True, marker=marker).stream_until(requests, lambda _, found, __: came.append(found))
    assert came == [text]


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (b'{"choices": [{"index": 0, "text": "a"}, {"index": 0, "text": "b"}]}', "more answers than requests"),
        (b'{"choices": [{"index": 0, "text": "a"}, {"index": 1, "text": "b"}]}', "more answers than requests"),
        (b'{"choices": [{"index": 0, "text": ["a"]}]}', "no text"),
        (b'{"choices": ["a"]}', "OpenAI-style"),
        (b'{"choices": {"index": 0}}', "OpenAI-style"),
    ],
)
def test_an_answer_is_one_text(stub: Callable[[Answer], str], body: bytes, found: str) -> None:
    """Two of them, a list or anything else is a fault; none of it is scored."""
    with pytest.raises(HarnessFault, match=found):
        model(stub(lambda _: (200, body))).stream_until(asked({}), lambda *_: None)


def test_whole_texts_are_scored_window_by_window(nano: Path, stub: Callable[[Answer], str]) -> None:
    """As lm-eval's own class does it, one text after the other; here all windows are under way together."""
    from k2quant.model.generation import load_tokenizer

    tokenizer = load_tokenizer(nano)
    url = stub(echoed(lambda tokens: [-(2.0 ** -(token % 13)) for token in tokens]))
    server = Server(client=Client(url=url, concurrency=4), model="m", chat=False)
    lm = served_model(server, tokenizer, max_length=12, marker="")
    requests = [SimpleNamespace(args=(text,)) for text in ("1+2=3 " * 9, "7", "A12+34=46\n" * 5)]
    found = lm.loglikelihood_rolling(requests)
    lm.tokenized_requests = True
    assert found == LocalCompletionsAPI.loglikelihood_rolling(lm, requests)
    assert len({*found}) == 3


def samples(folder: Path) -> dict[str, bytes]:
    """Return the samples of a run."""
    return {path.name: path.read_bytes() for path in folder.glob("samples_*")}


def answered(body: dict[str, Any]) -> tuple[int, bytes]:
    """Answer with what depends on the question."""
    return 200, choices(text=str(sum(body["prompt"].encode()) % 1000))


def test_a_server_that_stumbles_is_asked_to_the_end(tasks: Path, stub: Callable[[Answer], str], tmp_path: Path) -> None:
    """Every third request fails, and the samples are those of a server that never does."""
    turns: dict[str, int] = {}

    def stumbling(body: dict[str, Any]) -> tuple[int, bytes]:
        number = turns[body["prompt"]] = turns.get(body["prompt"], 0) + 1
        if number == 1 and sum(body["prompt"].encode()) % 3 == 0:
            return (500, b"oops") if sum(body["prompt"].encode()) % 2 else (200, b'{"choices": [{"te')
        return answered(body)

    request = Request(model="m", tasks=("nano_add",), include=(tasks,), backend="api", base_url=stub(stumbling))
    run(replace(request, model_args={"concurrency": 4}), tmp_path / "stumbling")
    run(replace(request, base_url=stub(answered)), tmp_path / "whole")
    assert max(turns.values()) == 2
    assert samples(tmp_path / "stumbling") == samples(tmp_path / "whole")


def test_a_run_that_is_killed_resumes_with_other_settings_of_the_client(
    tasks: Path, stub: Callable[[Answer], str], tmp_path: Path
) -> None:
    """Kill -9 while answers come in; then another concurrency, timeout and key: the same samples, little asked twice.

    The key stands in no file of the run, on no screen, and not in what the process was started with.
    """
    seen: list[str] = []

    def answer(body: dict[str, Any]) -> tuple[int, bytes]:
        if body["max_tokens"] > 1:
            seen.append(body["prompt"])
            time.sleep(0.2)
        return answered(body)

    url = stub(answer)
    key = "sk-0123456789-secret"
    command = (
        *("eval", "run", "m", "--backend", "api", "--base-url", url, "--tasks", "nano", "--include", str(tasks)),
        *("--batch-size", "2", "--json", "--header", "X-Api-Key=MY_KEY", "-o", str(tmp_path / "run")),
    )
    assert key not in " ".join(command)
    environment = {**os.environ, "OPENAI_API_KEY": key, "MY_KEY": key}
    killed = subprocess.Popen([sys.executable, "-m", "k2quant", *command], env=environment, stderr=subprocess.PIPE)
    until = time.monotonic() + 300
    while len(seen) < 12 and time.monotonic() < until:
        time.sleep(0.01)
    killed.kill()
    _, errors = killed.communicate()
    first = len(seen)
    assert 12 <= first < 54
    assert (tmp_path / "run" / JOURNAL).exists()
    kept = b"".join(path.read_bytes() for path in (tmp_path / "run").rglob("*"))
    more = ("--model-args", "concurrency=5,timeout=60,retries=3")
    resumed = CliRunner().invoke(main, [*command, *more], env={"OPENAI_API_KEY": key, "MY_KEY": key})
    assert resumed.exit_code == 0, resumed.output
    assert len(seen) <= 54 + 2 + 4  # two were under way; some more had come, and were not yet on a slow disk
    request = Request(model="m", tasks=("nano",), include=(tasks,), backend="api", base_url=stub(answered))
    run(request, tmp_path / "whole")
    assert samples(tmp_path / "run") == samples(tmp_path / "whole")
    kept += b"".join(path.read_bytes() for path in (tmp_path / "run").rglob("*"))
    assert b"nano_add" in kept
    for text in (kept, errors, resumed.stdout_bytes, resumed.stderr_bytes):
        assert b"0123456789" not in text


def test_a_key_that_is_missing_is_named_before_anything_is_asked(
    tasks: Path, stub: Callable[[Answer], str], tmp_path: Path
) -> None:
    """By its variable."""
    request = Request(model="m", tasks=("nano_add",), include=(tasks,), backend="api", base_url=stub(answered))
    with pytest.raises(UsageError, match="NO_SUCH_KEY is not set"):
        run(replace(request, headers={"X-Api-Key": "NO_SUCH_KEY"}), tmp_path / "run")
