"""Chats: what a template makes of a turn, where an answer ends, and what of it is reasoning."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from k2quant.cli import main
from k2quant.errors import CheckpointError, UsageError
from k2quant.model import load_model
from k2quant.model.generation import chat_prompt, generate, open_tokenizer
from k2quant.model.generation.chats import Parts, Telling, parts
from k2quant.nano import architecture, writing
from kimi_files import TEMPLATE, settings, write_files

THINKING = TEMPLATE.replace(
    "{{ message['content'] }}", "{% if message.role == 'assistant' %}<think></think>{% endif %}{{ message['content'] }}"
)
OPENED = TEMPLATE.replace("assistant<|im_middle|>{%- endif -%}", "assistant<|im_middle|><think>{%- endif -%}")


@pytest.fixture
def talking(kimi: Path, ranks: dict[bytes, int]) -> Callable[[str | None], Any]:
    """Return what opens the made tokenizer with a chat template."""

    def opened(template: str | None) -> Any:
        (kimi / "tokenizer_config.json").write_text(json.dumps(settings(len(ranks)) | {"chat_template": template}))
        return open_tokenizer(kimi)

    return opened


def test_a_turn_is_what_the_template_makes_of_it(talking: Callable[[str], Any]) -> None:
    """With a system's turn and without, the same as by transformers' own call, and K2's end of a turn ends it."""
    tokenizer = talking(TEMPLATE)
    alone = chat_prompt(tokenizer, "Hi")
    assert alone.text == "<|im_user|>user<|im_middle|>Hi<|im_end|><|im_assistant|>assistant<|im_middle|>"
    assert alone.ends == (tokenizer.convert_tokens_to_ids("<|im_end|>"),)
    assert not alone.thinks
    both = chat_prompt(tokenizer, "Hi", system="Be brief.")
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert both.text == tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert "Be brief." in both.text


def test_a_template_in_a_file_of_its_own_counts(kimi: Path, talking: Callable[[str], Any]) -> None:
    """chat_template.jinja goes before tokenizer_config.json, as in transformers."""
    (kimi / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    assert chat_prompt(talking(TEMPLATE), "Hi").text == "[Hi]"


@pytest.mark.parametrize(("template", "thinks"), [(THINKING, True), (OPENED, True), (TEMPLATE, False)])
def test_whether_an_answer_begins_in_reasoning_is_known_from_the_template(
    *, template: str, thinks: bool, talking: Callable[[str], Any]
) -> None:
    """It writes reasoning before each answer, as K2-Thinking's, or opens it in the prompt, as K2.5's."""
    assert chat_prompt(talking(template), "Hi").thinks == thinks


def test_a_prompt_that_closes_reasoning_has_none(talking: Callable[[str], Any]) -> None:
    """K2.5 asked not to think: the template writes an empty block itself."""
    closed = THINKING.replace(
        "assistant<|im_middle|>{%- endif -%}", "assistant<|im_middle|><think></think>{%- endif -%}"
    )
    assert not chat_prompt(talking(closed), "Hi").thinks


def test_an_end_that_is_no_special_token_is_none(talking: Callable[[str], Any]) -> None:
    """Then only the model's own end counts; and so where the template refuses to write an answer."""
    assert chat_prompt(talking("{% for m in messages %}{{ m.content }}\n{% endfor %}"), "Hi").ends == ()
    refusing = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ raise_exception('no') }}{% endif %}x{% endfor %}"
    )
    assert chat_prompt(talking(refusing), "Hi").ends == ()


def test_no_template_is_named_with_what_to_do(talking: Callable[[None], Any]) -> None:
    """The folder, what was looked for, and what helps."""
    with pytest.raises(CheckpointError, match=r"kimi: has no chat template, expected chat_template\.jinja.*release"):
        chat_prompt(talking(None), "Hi")


@pytest.mark.parametrize("text", ["", "\udce9"])
def test_texts_that_are_none_are_refused(text: str, talking: Callable[[str], Any]) -> None:
    """In the user's turn and in the system's."""
    tokenizer = talking(TEMPLATE)
    with pytest.raises(UsageError, match="prompt"):
        chat_prompt(tokenizer, text)
    with pytest.raises(UsageError, match="prompt"):
        chat_prompt(tokenizer, "Hi", system=text)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ raise_exception.__globals__['__builtins__']['open']('/etc/passwd').read() }}",
        "{% include '/etc/passwd' %}",
        "{% import '/etc/passwd' as x %}",
        "{% extends '/etc/passwd' %}",
        "{{ open('/etc/passwd').read() }}",
        "{% for a in range(10000000) %}x{% endfor %}",
        "{{ messages.append(1) }}",
        "{{ 1 / 0 }}",
        "{% for",
        "{{ raise_exception('only tools here') }}",
    ],
)
def test_a_hostile_template_reaches_nothing(template: str, talking: Callable[[str], Any]) -> None:
    """No object of Python, no file, no long range: an error that names the folder, and nothing of a file in it."""
    with pytest.raises(CheckpointError, match="kimi: its chat template cannot be rendered, found") as caught:
        chat_prompt(talking(template), "Hi")
    assert "root:" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "thinks", "expected"),
    [
        ("42", False, Parts(None, "42")),
        ("<think>17 + 25</think>42", False, Parts("17 + 25", "42")),
        ("17 + 25</think>\n\n42", True, Parts("17 + 25", "42")),
        ("17 + 25</think>42", False, Parts("17 + 25", "42")),
        ("17 + ", True, Parts("17 +", "")),
        ("<think>17 + ", False, Parts("17 +", "")),
        ("a</think>b</think>c", True, Parts("a", "b</think>c")),
        ("</think>42", True, Parts("", "42")),
    ],
)
def test_reasoning_and_answer(*, text: str, thinks: bool, expected: Parts) -> None:
    """The first marker parts them; what never leaves its reasoning has no answer."""
    assert parts(text, thinks=thinks) == expected


@given(
    words=st.lists(st.sampled_from(["<think>", "</think>", "</th", "<", "ink>", "a", " ", "\n"])),
    thinks=st.booleans(),
    data=st.data(),
)
def test_pieces_are_told_whole_and_in_order(*, words: list[str], thinks: bool, data: st.DataObject) -> None:
    """However a text is cut, what is shown is the text; reasoning comes first, up to the first marker."""
    text = "".join(words)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)))))
    shown: list[tuple[str, bool]] = []
    tell = Telling(lambda piece, reasoning: shown.append((piece, reasoning)), thinks=thinks)
    for first, last in zip([0, *cuts], [*cuts, len(text)], strict=True):
        tell(text[first:last])
    tell.end()
    assert "".join(piece for piece, _ in shown) == text
    flags = [reasoning for _, reasoning in shown]
    assert flags == sorted(flags, reverse=True)
    thought = "".join(piece for piece, reasoning in shown if reasoning)
    if thinks or text.lstrip().startswith("<think>"):
        assert thought == (text.partition("</think>")[0] + "</think>" if "</think>" in text else text)
    else:
        assert not thought


@pytest.fixture(scope="module")
def answering(ranks: dict[bytes, int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A nano-K2 with K2's kind of tokenizer, whose vocabulary is large enough for it. Not to be changed by a test."""
    folder = tmp_path_factory.mktemp("answering") / "model"
    folder.mkdir()
    torch.manual_seed(1)
    config = architecture.CONFIG | {"vocab_size": len(ranks) + 256, "eos_token_id": len(ranks) + 1}
    writing.write(folder, architecture.build(config), {})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").unlink()
    (folder / "generation_config.json").unlink()
    write_files(folder, ranks)
    return folder


def _script(model: Any, ids: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a model write these tokens, whatever it would write itself."""
    kind, left = type(model), list(ids)
    forward = kind.forward

    def scripted(self: Any, *inputs: Any, **options: Any) -> Any:
        found = forward(self, *inputs, **options)
        found.logits[:, -1, left.pop(0)] = 1e9
        return found

    monkeypatch.setattr(kind, "forward", scripted)


@pytest.fixture
def said(answering: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Return what runs `generate` with a template and an answer, and returns what the command said."""

    def run(template: str, answer: str, *options: str) -> Any:
        folder = Path(shutil.copytree(answering, tmp_path / "model"))
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
        ids = open_tokenizer(folder).encode(answer)
        load = load_model

        def loaded(*inputs: Any, **more: Any) -> Any:
            model = load(*inputs, **more)
            _script(model, ids, monkeypatch)
            return model

        monkeypatch.setattr("k2quant.model.load_model", loaded)
        return CliRunner().invoke(main, ["generate", str(folder), "--max-new-tokens", "40", *options], input="Hi\n")

    return run


def test_a_chat_on_the_command_line(said: Callable[..., Any]) -> None:
    """It ends at the template's end of a turn, which is not the model's own; special tokens are not shown."""
    found = said(TEMPLATE, "forty two<|im_end|>never said", "--chat", "--prompt", "Hi")
    assert (found.exit_code, found.stdout) == (0, "forty two\n")
    assert "cut at" not in found.stderr


def test_reasoning_is_apart_in_json_and_the_prompt_may_come_from_stdin(said: Callable[..., Any]) -> None:
    """`--system` alone means a chat; the first marker parts reasoning from answer."""
    options = ("--system", "Be brief.", "--prompt", "-", "--json")
    found = json.loads(said(OPENED, "17 + 25 is it</think>42<|im_end|>", *options).stdout)
    assert (found["reasoning"], found["answer"], found["finished"]) == ("17 + 25 is it", "42", True)
    assert found["text"] == "17 + 25 is it</think>42"


def test_reasoning_is_dimmed_and_a_cut_is_said(said: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal, the marker among it; the answer is not."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    found = said(
        THINKING, "<think>17 + 25 is it</think>42 and more", "--chat", "--prompt", "Hi", "--max-new-tokens", "9"
    )
    dimmed, plain = found.stdout.rsplit("\x1b[0m", 1)
    assert dimmed.startswith("\x1b[2m")
    assert "\x1b[2m" not in plain
    assert "cut at 9 tokens; --max-new-tokens gives the answer more" in found.stderr


def test_a_plain_prompt_is_taken_as_before(said: Callable[..., Any]) -> None:
    """No template, no reasoning; the JSON says nothing of either."""
    found = json.loads(said(TEMPLATE, "a<|im_end|>b[EOS]", "--prompt", "Hi", "--json").stdout)
    assert "answer" not in found
    assert (found["text"], found["prompt_tokens"]) == ("ab", 2)


def test_a_template_is_asked_for_before_the_weights_are_read(answering: Path, tmp_path: Path) -> None:
    """A checkpoint without one is refused at once, by name and with what to do."""
    folder = Path(shutil.copytree(answering, tmp_path / "model"))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "chat_template"}))
    found = CliRunner().invoke(main, ["generate", str(folder), "--chat", "--prompt", "Hi"])
    assert found.exit_code == 1
    assert "has no chat template" in found.stderr
    assert "without --chat" in found.stderr


def test_python_answers_a_chat(answering: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`generate` of a chat's prompt gives the parts, and shows each piece."""
    tokenizer, model = open_tokenizer(answering), load_model(answering)
    _script(model, tokenizer.encode("<think>so</think> 42<|im_end|>"), monkeypatch)
    shown: list[str] = []
    found = generate(model, tokenizer, chat_prompt(tokenizer, "Hi"), max_new_tokens=20, show=shown.append)
    assert (found.reasoning, found.answer, found.finished) == ("so", "42", True)
    assert "".join(shown) == found.text == "<think>so</think> 42"
