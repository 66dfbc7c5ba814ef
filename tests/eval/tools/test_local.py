"""A checkpoint of our own that is asked: its template gets the tools, and the calls in its words are read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kimi_files
from k2quant.checkpoint.writing.in_memory import write_checkpoint
from k2quant.errors import CheckpointError, UsageError
from k2quant.eval import read_run, run_tools
from k2quant.eval.runs.folder import MANIFEST
from k2quant.eval.tools.calling import Answer, Call, of_chat, of_text, read_answer
from k2quant.eval.tools.local import Checkpoint
from k2quant.eval.tools.requests import request_of
from k2quant.eval.tools.settings import ToolsRequest
from k2quant.model.causal_lm import K2ForCausalLM
from k2quant.nano import architecture, writing
from tiny import NANO

WORDS = {
    10: "<|tool_calls_section_begin|>",
    12: "<|tool_call_end|>",
    13: "<|tool_call_argument_begin|>",
    14: "<|tool_calls_section_end|>",
}
TEMPLATE = (
    "{%- if tools -%}<|im_user|>tool_declare<|im_middle|>{{ tools | tojson }}<|im_end|>{%- endif -%}"
    + kimi_files.TEMPLATE
)


def section(*calls: tuple[str, str]) -> str:
    """Return calls in K2's words."""
    inner = "".join(
        f"<|tool_call_begin|>functions.{name}:{number}<|tool_call_argument_begin|>{arguments}<|tool_call_end|>"
        for number, (name, arguments) in enumerate(calls)
    )
    return f"<|tool_calls_section_begin|>{inner}<|tool_calls_section_end|>"


def calls(answer: Answer) -> list[tuple[str, str]]:
    """Return names and arguments."""
    return [(call.name, call.arguments) for call in answer.calls]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Hello.", ([], "Hello.", "stop")),
        (f"Let me see.{section(('f', '{}'))}", ([("f", "{}")], "Let me see.", "tool_calls")),
        (section(("f", '{"a": 1}'), ("g.h", "[]")), ([("f", '{"a": 1}'), ("g.h", "[]")], "", "tool_calls")),
        (section(("f", "{}")).replace("functions.", " ").replace(":0", ":0 "), ([("f", "{}")], "", "tool_calls")),
        (section(("f:x", "{}")), ([("f:x", "{}")], "", "tool_calls")),
        (section(("f", '{"a": ')).split("<|tool_call_end|>")[0], ([("f", '{"a":')], "", "tool_calls")),
        ("<|tool_call_begin|>functions.f:0", ([("f", "")], "", "tool_calls")),
        ("<|tool_calls_section_begin|><|tool_calls_section_end|>", ([], "", "stop")),
        (f"I could {section(('f', '{}'))}</think>No.", ([], "No.", "stop")),
        (f"Hm.</think>{section(('f', '{}'))}", ([("f", "{}")], "", "tool_calls")),
    ],
)
def test_calls_in_words(text: str, found: tuple[list[tuple[str, str]], str, str]) -> None:
    """Sections, calls and arguments are read however they are spelled or cut; in reasoning they are none."""
    answer = of_text(text, cut=False)
    assert (calls(answer), answer.text, answer.finish) == found


def test_a_cut_answer() -> None:
    """It has what calls it has; one that never leaves its reasoning has none."""
    assert calls(of_text(section(("f", "{}")).removesuffix(WORDS[14]), cut=True)) == [("f", "{}")]
    thought = of_text("<think>Hm, hm", cut=True)
    assert (thought.cut_in_thought, thought.decided, thought.reasoning) == (True, False, "Hm, hm")
    ended = of_text("<think>No call is due.", cut=False)
    assert (ended.cut, ended.cut_in_thought, ended.decided) == (False, True, False)  # by itself, and without an answer
    assert calls(of_text(f"<think>Hm{section(('f', '{}'))}", cut=False)) == [("f", "{}")]


@given(st.lists(st.sampled_from([*WORDS.values(), "<|tool_call_begin|>", "functions.", ":0", "{", "</think>", "a"])))
def test_any_words_are_read(parts: list[str]) -> None:
    """No text raises, and what was read lies in a file as it is."""
    answer = of_text("".join(parts), cut=False)
    assert read_answer(json.loads(json.dumps(answer.as_dict()))) == answer


@pytest.mark.parametrize("body", [None, [], {}, {"choices": []}, {"choices": [{}]}, {"choices": [{"message": 1}]}])
def test_no_chat_completion(body: Any) -> None:
    """What is no answer is an error, and no wrong answer."""
    with pytest.raises(ValueError, match="no message of a choice"):
        of_chat(body)


@pytest.mark.parametrize(
    ("message", "found"),
    [
        ({"content": "Hm.</think>No."}, ("Hm.", "No.")),
        ({"content": "<think>Hm"}, ("Hm", "")),
        ({"content": "Hm.</think>It writes </think>."}, ("Hm.", "It writes </think>.")),
        ({"content": "No.", "reasoning": "Hm"}, ("Hm", "No.")),
        ({"content": None, "reasoning_content": "Hm"}, ("Hm", "")),
        ({"content": "No."}, ("", "No.")),
    ],
)
def test_reasoning_of_a_server(message: dict[str, Any], found: tuple[str, str]) -> None:
    """It stands beside the answer, or before it where the server does not take it apart."""
    answer = of_chat({"choices": [{"message": message, "finish_reason": "length"}]})
    assert (answer.reasoning, answer.text) == found
    assert answer.cut_in_thought == (not found[1])


def test_half_a_character_fits_in_a_file() -> None:
    """A server may cut a character in two; the answer is kept all the same."""
    message = {"content": "a\ud83d", "tool_calls": [{"function": {"name": "f", "arguments": {"a": "\ud83d"}}}]}
    answer = of_chat({"choices": [{"message": message}]})
    assert json.dumps(answer.as_dict(), ensure_ascii=False).encode()
    assert answer.text == "a\ufffd"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny K2 with a tokenizer and a template of K2's kind."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    ranks = kimi_files.merged_ranks()
    size = len(ranks) + 256
    config = NANO | {"num_hidden_layers": 2, "vocab_size": size, "eos_token_id": len(ranks) + 2}
    torch.manual_seed(0)
    write_checkpoint(folder, writing._shards(architecture.build(config)), config)  # noqa: SLF001  nano writes its own
    kimi_files.write_files(folder, ranks)
    settings = kimi_files.settings(len(ranks))
    for place, word in WORDS.items():
        entry = settings["added_tokens_decoder"][str(len(ranks) + 11)]
        settings["added_tokens_decoder"][str(len(ranks) + place)] = entry | {"content": word}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    return folder


@pytest.fixture
def requests_file(tmp_path: Path) -> Path:
    """Three requests: a call is due, none, and one of another function."""
    tools = [{"type": "function", "function": {"name": name}} for name in ("fly", "land")]
    rows = [
        {"messages": [{"role": "user", "content": text}], "tools": tools, "expect": expect}
        for text, expect in (("Fly", ["fly"]), ("Hello", []), ("Land", ["land"]))
    ]
    path = tmp_path / "requests.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def says(reply: Callable[[str], str], prompts: list[str], tokenizer: Any) -> Callable[..., torch.Tensor]:
    """Return a `generate` that answers a prompt, and notes it."""

    def generate(_: Any, *, input_ids: torch.Tensor, generation_config: Any, **__: Any) -> torch.Tensor:
        prompts.append(tokenizer.decode(input_ids[0].tolist()))
        new = tokenizer.encode(reply(prompts[-1]) + "<|im_end|>")[: generation_config.max_new_tokens]
        return torch.cat([input_ids, torch.tensor([new])], dim=1)

    return generate


def test_a_checkpoint_calls(
    checkpoint: Path, requests_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tools reach its template, calls are read from its words, and the run knows the hash of the model."""
    from k2quant.model.generation import load_tokenizer

    prompts: list[str] = []

    def reply(prompt: str) -> str:
        return "Hello!" if "Hello<" in prompt else section(("fly", "{}"))

    monkeypatch.setattr(K2ForCausalLM, "generate", says(reply, prompts, load_tokenizer(checkpoint)))
    run_tools(ToolsRequest(model=str(checkpoint), requests=str(requests_file)), tmp_path / "run")
    assert len(prompts) == 3
    assert all("tool_declare" in prompt and '"land"' in prompt for prompt in prompts)
    assert prompts[0].endswith("Fly<|im_end|><|im_assistant|>assistant<|im_middle|>")
    run = read_run(tmp_path / "run")
    assert [item.right for item in run.tasks["tools"].items] == [True, True, False]
    assert [item.right for item in run.tasks["tools_call"].items] == [True, True, True]
    assert run.model_hash is not None
    assert run.tokenizer_hash is not None


def test_a_checkpoint_answers_for_itself(checkpoint: Path, requests_file: Path, tmp_path: Path) -> None:
    """With its own random weights it writes nonsense, the same twice, drawn or not; that is kept and judged."""
    request = ToolsRequest(
        model=str(checkpoint), requests=str(requests_file), max_new_tokens=5, temperature=1.0, top_p=0.9
    )
    for name in ("one", "two"):
        run_tools(request, tmp_path / name)
    one, two = ((tmp_path / name / "answers.jsonl").read_bytes() for name in ("one", "two"))
    assert one == two
    assert json.loads((tmp_path / "one" / MANIFEST).read_bytes())["calls"]["answers"] == 3


def test_a_template_without_tools_is_refused(
    checkpoint: Path, requests_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model would never hear of them, and its answers would say nothing."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in checkpoint.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": kimi_files.TEMPLATE}))
    monkeypatch.setattr(K2ForCausalLM, "generate", None)
    with pytest.raises(CheckpointError, match="its chat template takes no tools"):
        run_tools(ToolsRequest(model=str(folder), requests=str(requests_file)), tmp_path / "run")
    without = {name: value for name, value in settings.items() if name != "chat_template"}
    (folder / "tokenizer_config.json").write_text(json.dumps(without))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match="has no chat template"):
        run_tools(ToolsRequest(model=str(folder), requests=str(requests_file)), tmp_path / "run")


@pytest.mark.parametrize("error", [AttributeError("a"), ZeroDivisionError("b"), RecursionError("c"), IndexError("d")])
def test_whatever_a_template_raises_names_the_request(error: Exception) -> None:
    """A template is a program of somebody else's."""

    class Tokenizer:
        def apply_chat_template(self, *_: Any, **__: Any) -> str:
            raise error

    local = object.__new__(Checkpoint)
    local._tokenizer, local._folder = Tokenizer(), Path("model")
    one = request_of({"messages": [{"role": "user", "content": "a"}]}, "requests.jsonl, line 7")
    with pytest.raises(CheckpointError, match=f"does not take a request.*line 7: {type(error).__name__}"):
        local.answer(one, {}, 0)


def test_what_takes_a_server_is_refused(checkpoint: Path, requests_file: Path, tmp_path: Path) -> None:
    """A checkpoint alone cannot be held to a function; that is said by line."""
    row = json.loads(requests_file.read_text().splitlines()[0]) | {"tool_choice": "required"}
    requests_file.write_text(json.dumps(row) + "\n")
    with pytest.raises(UsageError, match=r"line 1: asks for tool_choice, which takes a server"):
        run_tools(ToolsRequest(model=str(checkpoint), requests=str(requests_file)), tmp_path / "run")


def test_kept_answers_are_checked() -> None:
    """What is no answer is not read as one."""
    for kept in (None, {}, {"tool_calls": [1]}):
        with pytest.raises(ValueError, match=r"no (answer|call)"):
            read_answer(kept)
    assert read_answer(Answer(calls=(Call(name="f", arguments="{}"),)).as_dict()).names == {"f"}
