"""Where reasoning ends and an answer begins: in texts, in checkpoints, and token by token while a model writes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance

from k2quant.errors import CheckpointError, UnsafePath, UsageError
from k2quant.eval.asking.harness.rounds import wrong_without_answer
from k2quant.eval.asking.harness.writing import BehindReasoning, Draws
from k2quant.eval.asking.request import Request
from k2quant.eval.asking.thinking import END, Answer, Thinking, decide, ended, thinks
from k2quant.eval.asking.thoughts import Thoughts, Unstopped

ALWAYS = Thinking(end=END, always=True)
OPENED = Thinking(end=END, always=False)
SPARING = Thinking(end=END, always=True, spares=True)
HIDDEN = Thinking(end=END, always=False, spares=True)
TEMPLATE = "{%- for m in messages -%}<think></think>{{ m.content }}{%- endfor -%}"


@pytest.mark.parametrize(
    ("thinking", "prompt", "text", "cut", "expected"),
    [
        (ALWAYS, "2+2=", "<think>4, say</think>\n\n4", False, Answer("4, say", "4")),
        (ALWAYS, "2+2=", "4, say</think>4", False, Answer("4, say", "4")),
        (ALWAYS, "2+2=", "a</think>b</think>c", False, Answer("a", "b</think>c")),
        (ALWAYS, "2+2=", "a<think>b</think>c", False, Answer("a<think>b", "c")),
        (ALWAYS, "2+2=", "hm, hm", True, Answer("hm, hm", None)),
        (ALWAYS, "2+2=", "hm, hm", False, Answer("hm, hm", None)),
        (ALWAYS, "2+2=", "hm</think> \n", True, Answer("hm", None)),
        (ALWAYS, "2+2=", "", False, Answer("", None)),
        (ALWAYS, "<think></think>", "4", False, Answer(None, "4")),
        (ALWAYS, "<think>\n\n</think>\n\n", " 4", True, Answer(None, " 4")),
        (ALWAYS, "<think></think>", "it ends with </think>.", False, Answer(None, "it ends with </think>.")),
        (ALWAYS, "<think></think>", "<think>more</think>4", False, Answer("more", "4")),
        (ALWAYS, "<think></think>", "<think>more", False, Answer("more", None)),
        (ALWAYS, "A: <think></think>3\nB:", "hm</think>4", False, Answer("hm", "4")),
        (OPENED, "2+2=", "4", True, Answer(None, "4")),
        (OPENED, "2+2=", "<think>hm", False, Answer("hm", None)),
        (OPENED, "2+2=<think>\n", "hm", False, Answer("hm", None)),
        (OPENED, "2+2=<think>\n", "hm</think>4", False, Answer("hm", "4")),
        (OPENED, "2+2=", "hm</think>4", False, Answer("hm", "4")),
        (SPARING, "", "4", False, Answer(None, "4")),
        (SPARING, "", "hm", True, Answer("hm", None)),
        (SPARING, "", "<think>hm", False, Answer("hm", None)),
        (HIDDEN, "", "4", True, Answer(None, "4")),
        (HIDDEN, "", "hm</think>4", True, Answer("hm", "4")),
        (Thinking(end="Answer:", always=True), "2+2=", "hm. Answer: 4", False, Answer("hm.", "4")),
        (Thinking(end="Answer:", always=True), "2+2=", "hm", False, Answer("hm", None)),
        (Thinking(end="◁/think▷", always=True), "x", "◁think▷hm◁/think▷4", False, Answer("hm", "4")),
    ],
)
def test_reasoning_and_answer_are_taken_apart(
    thinking: Thinking, prompt: str, text: str, *, cut: bool, expected: Answer
) -> None:
    """The first marker ends the reasoning; without one there is no answer, unless nothing had begun it."""
    assert thinking.split(prompt, text, cut=cut) == expected


@given(st.text("ab <>/think", max_size=30), st.text("ab \n", max_size=20))
def test_what_follows_the_marker_is_the_answer(thought: str, answer: str) -> None:
    """Whatever was thought: the answer is what follows the first marker, without its leading white space."""
    thought = thought.replace(END, "")
    found = ALWAYS.split("q", thought + END + answer, cut=False)
    assert found.text == (answer.lstrip() or None)
    assert found.reasoning is not None
    assert found.reasoning in thought


def test_an_answer_ends_at_its_first_stop_string() -> None:
    """As lm-eval has it: each stop in turn, empty ones stop nothing, and one or none may be given."""
    assert ended("a. b\nc", ["\n", ". "]) == "a"
    assert ended("a. b", "b") == "a. "
    assert ended("ab", ["", None]) == ended("ab", None) == "ab"


PIECES = st.lists(
    st.sampled_from(["a", "b", "ab", " ", "\n", "\n\n", "é", "<think>", "</th", "ink>", "</think>\n\na"]), max_size=25
)


@settings(deadline=None, max_examples=300)
@given(
    PIECES,
    st.sampled_from([ALWAYS, OPENED, Thinking(end="ab", always=True)]),
    st.sampled_from(["q", "<think></think>", "<think>"]),
    st.lists(st.sampled_from(["a", "\n\n", "ba", "é", "k", "b\n"]), min_size=1, max_size=2, unique=True),
)
def test_stop_strings_act_behind_the_reasoning_only(
    pieces: list[str], thinking: Thinking, prompt: str, stops: list[str]
) -> None:
    """A row is done with the first token that completes a stop string in its answer, however text falls into tokens."""
    tokenizer = SimpleNamespace(decode=lambda ids: "".join(pieces[number] for number in ids))
    begin = 3
    watching = BehindReasoning(tokenizer, stops, thinking, [prompt], begin)
    expected = False
    for count in range(1, len(pieces) + 1):
        text = "".join(pieces[:count])
        start = thinking.start or ""
        undecided = not thinking.begins(prompt) and bool(start) and start.startswith(text.lstrip())
        if not undecided:
            inside = thinking.begins(prompt) or thinking.opens(text)
            answer = text.partition(thinking.end)[2].lstrip() if inside else text
            expected = expected or any(stop in answer for stop in stops)
        ids = torch.tensor([[0] * begin + list(range(count))])
        assert watching(ids, None).tolist() == [expected]


def test_rows_of_a_batch_end_on_their_own() -> None:
    """One still reasons while the other has answered."""
    words = ["x", ".", END]
    tokenizer = SimpleNamespace(decode=lambda ids: "".join(words[number] for number in ids))
    watching = BehindReasoning(tokenizer, ["."], ALWAYS, ["q", "q"], 0)
    columns = torch.tensor([[0, 1, 1, 2, 0, 1], [2, 1, 0, 0, 0, 0]])
    done = [watching(columns[:, :count], None).tolist() for count in range(1, 7)]
    assert done == [[False, False], [False, True], [False, True], [False, True], [False, True], [True, True]]


def test_draws_follow_the_probabilities() -> None:
    """Of 20,000 draws at temperature 2 each token gets its share within 5 standard errors; the rest is out of reach."""
    logits = torch.tensor([[2.0, 0.0, -1.0, 1.0]])
    many = logits.expand(20_000, -1)
    seeds = list(range(20_000))
    for narrowing, kept in (({"temperature": 2.0}, [0, 1, 2, 3]), ({"temperature": 2.0, "top_p": 0.7}, [0, 3])):
        drawn = Draws(narrowing, seeds)(torch.zeros(20_000, 1, dtype=torch.long), many).argmax(-1)
        shares = torch.zeros(4).double()
        shares[kept] = torch.softmax(logits[0, kept].double() / 2, -1)
        found = torch.bincount(drawn, minlength=4) / 20_000
        assert (found[shares == 0] == 0).all()
        assert ((found - shares).abs() <= 5 * (shares * (1 - shares) / 20_000).sqrt()).all()


def test_a_draw_depends_on_its_seed_alone() -> None:
    """Neither on the other rows of its batch nor on their number; another seed draws otherwise."""
    logits = torch.randn(1, 500, generator=torch.Generator().manual_seed(1))
    ids = torch.zeros(8, 1, dtype=torch.long)

    def drawn(seeds: list[int]) -> list[list[int]]:
        draws = Draws({"temperature": 1.0}, seeds)
        steps = [draws(ids[: len(seeds)], logits.expand(len(seeds), -1)).argmax(-1) for _ in range(6)]
        return torch.stack(steps, 1).tolist()

    (alone,) = drawn([7])
    assert drawn([3, 7, 7, 12])[1:3] == [alone, alone]
    assert drawn([8]) != [alone]


def folder_with(folder: Path, **files: Any) -> Path:
    """Write files, JSON or text, by their names with two underscores for the dot."""
    folder.mkdir()
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def test_a_checkpoint_says_itself_that_it_reasons(tmp_path: Path) -> None:
    """By its chat template, wherever that stands; its name says nothing."""
    assert thinks(folder_with(tmp_path / "a", chat_template__jinja=TEMPLATE))
    assert thinks(folder_with(tmp_path / "b", tokenizer_config__json={"chat_template": TEMPLATE}))
    named = [{"name": "default", "template": "x"}, {"name": "tool_use", "template": TEMPLATE}]
    assert thinks(folder_with(tmp_path / "c", tokenizer_config__json={"chat_template": named}))
    assert thinks(folder_with(tmp_path / "d", chat_template__json={"chat_template": TEMPLATE}))
    assert not thinks(folder_with(tmp_path / "Kimi-K2-Thinking", tokenizer_config__json={"chat_template": "hello"}))
    for odd in (None, 5, [5, {"template": 5}]):
        assert not thinks(folder_with(tmp_path / f"odd{odd}"[:4], tokenizer_config__json={"chat_template": odd}))
        (tmp_path / f"odd{odd}"[:4] / "tokenizer_config.json").unlink()
        (tmp_path / f"odd{odd}"[:4]).rmdir()


def test_files_that_say_it_are_not_trusted(tmp_path: Path) -> None:
    """A config that is no JSON is named; a link out of the folder is not followed, unless that is allowed."""
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        thinks(folder_with(tmp_path / "a", tokenizer_config__json="{"))
    outside = tmp_path / "template"
    outside.write_text(TEMPLATE)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "chat_template.jinja").symlink_to(outside)
    with pytest.raises(UnsafePath):
        thinks(tmp_path / "b")
    assert thinks(tmp_path / "b", follow_links=True)


def test_who_decides_where_reasoning_ends(tmp_path: Path) -> None:
    """The user before the checkpoint; prompts outside of its chat template need not begin any; '' switches it off."""
    k2 = folder_with(tmp_path / "k2", chat_template__jinja=TEMPLATE)
    plain = folder_with(tmp_path / "plain")
    ask = Request(model="m", tasks=("t",))
    chat = replace(ask, backend="api", chat=True)
    assert decide(replace(ask, chat_template=True), k2) == ALWAYS
    assert decide(ask, k2) == OPENED
    assert decide(ask, plain) is None
    assert decide(replace(ask, think_end="X"), plain) == Thinking(end="X", always=True)
    for request in (replace(ask, chat_template=True, think_end=""), replace(chat, think_end="")):
        assert decide(request, k2) is None
    assert decide(chat, k2) == SPARING
    assert decide(chat, None) == decide(chat, plain) == HIDDEN
    with pytest.raises(UsageError, match="white space"):
        decide(replace(ask, think_end=" \n"), plain)
    assert decide(replace(chat, think_end="X"), None) == Thinking(end="X", always=True)


def test_a_model_without_a_chat_template_is_not_asked_through_one(tmp_path: Path) -> None:
    """Said before it is loaded, and not by transformers in the middle; a tokenizer's code may bring a template."""
    plain = folder_with(tmp_path / "plain")
    ask = Request(model="m", tasks=("t",), chat_template=True)
    for think_end in (None, "", END):
        with pytest.raises(CheckpointError, match="has no chat template"):
            decide(replace(ask, think_end=think_end), plain)
    assert decide(replace(ask, trust_remote_code=True), plain) is None
    assert decide(replace(ask, chat_template=False), plain) is None
    assert decide(ask, folder_with(tmp_path / "other", chat_template__jinja="{{ messages }}")) is None


def request_of(prompt: Any, until: Any = ("\n",), number: int = 0) -> Instance:
    """Return a request of lm-eval."""
    return Instance("generate_until", {}, (prompt, {"until": list(until), "max_gen_toks": 5}), 0, ("t", number, 1))


def test_a_task_that_begins_the_answer_leaves_no_reasoning(tmp_path: Path) -> None:
    """Where it stands in the prompt, behind a chat template; a server is sent it as a message."""
    k2 = folder_with(tmp_path / "k2", chat_template__jinja=TEMPLATE)
    ask = Request(model="m", tasks=("t",), chat_template=True)
    for request in (ask, replace(ask, think_end=END)):
        thinking = decide(request, k2, ["t"])
        assert thinking is not None
        assert not thinking.may_begin(thinking.prompt(request_of("q")))
        assert Thoughts(thinking).read(request_of("q: <think></think>def f():"), "4\nmore", False) == ("4", False)
        other = Instance("generate_until", {}, ("q", {}), 0, ("another", 0, 1))
        assert thinking.may_begin(thinking.prompt(other))
    assert decide(replace(ask, backend="api", chat_template=False, chat=True), k2, ["t"]) == SPARING


def test_a_stopped_answer_was_not_cut() -> None:
    """A model that is not told its stop strings runs on to the limit; what counts is whether the answer did."""
    thoughts = Thoughts(ALWAYS)
    assert thoughts.read(request_of("q"), "hm\n</think>4\nmore", True) == ("4", False)
    assert thoughts.read(request_of("q"), "hm\n</think>4", True) == ("4", True)
    assert thoughts.read(request_of("q"), "hm\nmore", True) == ("", True)
    assert thoughts.read(request_of("q"), "hm</think>4\n", None) == ("4", None)
    assert thoughts.read(request_of("<think></think>"), "4\nmore", True) == ("4", False)


def test_one_marker_shows_that_a_server_s_model_reasons() -> None:
    """Then what was cut without one is reasoning; without any, a long answer is none."""
    for texts, expected in ((["hm", "hm</think>4"], ""), (["hm", "4"], "hm")):
        thoughts = Thoughts(HIDDEN)
        thoughts.look(iter(texts))
        chat = request_of(SimpleNamespace())
        assert thoughts.read(chat, "hm", True) == (expected, True)
        assert thoughts.read(chat, "hm", False) == ("hm", False)
    thoughts = Thoughts(OPENED)
    thoughts.look(["hm</think>4"])
    assert thoughts.thinking == OPENED


def test_a_document_is_lost_when_all_its_answers_are() -> None:
    """A task that draws several answers of its own has one row for all of them."""
    thoughts = Thoughts(ALWAYS)
    for number, texts in ((0, ["hm", "h</think>4"]), (1, ["a", "b"])):
        for text in texts:
            thoughts.read(request_of("q", number=number), text, False)
    rows: list[dict[str, Any]] = [{"doc_id": 0}, {"doc_id": 1}, {"doc_id": 2}]
    for row in rows:
        thoughts.note("t", row)
    assert [row.get("cut_in_thought") for row in rows] == [False, True, None]
    assert rows[1]["reasoning"] == "a\n\nb"
    thoughts.count("t", rows)
    assert (thoughts.cut["t"], thoughts.rows["t"]) == (1, 2)
    thoughts.begin()
    assert not thoughts.lost("t", 1)


@pytest.mark.parametrize("streams", [False, True])
def test_stop_strings_are_kept_from_those_who_stop_in_reasoning(*, streams: bool) -> None:
    """A server or vLLM is not told them where an answer may reason; a closed or plain prompt keeps them."""
    seen: list[Any] = []
    model = SimpleNamespace(
        generate_until=lambda requests: seen.extend(request.args[1] for request in requests), max_length=5
    )
    if streams:
        model.stream_until = lambda requests, _: model.generate_until(requests)
    chat = SimpleNamespace()  # messages
    for thinking, prompts, told in (
        (ALWAYS, ["q", "<think></think>"], [[], ["\n"]]),
        (OPENED, ["q", "<think>"], [["\n"], []]),
        (HIDDEN, [chat], [[]]),
        (SPARING, [chat], [[]]),
    ):
        seen.clear()
        lm = Unstopped(model, thinking)
        requests = [request_of(prompt) for prompt in prompts]
        if streams:
            lm.stream_until(requests, print)
        else:
            lm.generate_until(requests)
        assert hasattr(lm, "stream_until") is streams
        assert [settings["until"] for settings in seen] == told
        assert all(request.args[1]["until"] == ["\n"] for request in requests)
        assert lm.max_length == 5


def test_every_metric_of_a_lost_answer_is_wrong() -> None:
    """Of whatever kind lm-eval's are: numbers, truth values, IFEval's lists; what less is better of stays as it is."""
    metrics = {"acc": 1, "f": 0.5, "strict": True, "each": [True, np.bool_(True)], "pair": ("a", "b"), "ter": 9.0}
    task = SimpleNamespace(
        doc_iterator=lambda: enumerate("ab"),
        process_results=lambda *_: dict(metrics),
        higher_is_better=lambda: {"ter": False, "acc": True},
    )
    own = task.process_results
    thoughts = Thoughts(ALWAYS)
    with wrong_without_answer({"t": task}, thoughts):
        thoughts.read(request_of("q", number=0), "hm</think>4", False)
        thoughts.read(request_of("q", number=1), "hm", True)
        found = [task.process_results(document, [""]) for _, document in task.doc_iterator()]
    assert found == [
        metrics,
        {"acc": 0, "f": 0.0, "strict": False, "each": [False, False], "pair": ("a", "b"), "ter": 9.0},
    ]
    assert [type(value) for value in found[1].values()] == [type(value) for value in metrics.values()]
    assert task.process_results is own


def test_a_stop_string_in_the_reasoning_ended_nothing() -> None:
    """Whoever tells whether an answer was cut looks for stop strings; it is told those that it was sent."""
    model = SimpleNamespace(
        generate_until=lambda requests: ["hm\nhm" for _ in requests],
        were_cut=lambda requests, answers: [
            not any(stop in answer for stop in request.args[1]["until"])
            for request, answer in zip(requests, answers, strict=True)
        ],
    )
    lm = Unstopped(model, ALWAYS)
    requests = [request_of("q"), request_of("<think></think>")]
    assert lm.were_cut(requests, lm.generate_until(requests)) == [True, False]
