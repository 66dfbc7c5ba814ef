"""Which parts of a conversation are learnt, with templates of K2's kinds, and with transformers' own mask as oracle."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k2quant.data import marking
from k2quant.data.examples import examples_of
from k2quant.data.learning import Census, Learning
from k2quant.data.tokens import Reader
from k2quant.errors import CheckpointError, MalformedFile
from k2quant.model.generation import open_tokenizer
from kimi_files import merged_ranks, write_files

Row = dict[str, Any]
Taught = Callable[..., list[str]]

USER, ASKED = {"role": "user", "content": "q"}, "<|im_user|>user<|im_middle|>q<|im_end|>"
HEAD, MIDDLE, END = "<|im_assistant|>assistant<|im_middle|>", "<|im_middle|>", "<|im_end|>"
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
DECLARED = (
    '<|im_system|>tool_declare<|im_middle|>[{"type":"function","function":{"name":"weather","parameters":'
    '{"type":"object","properties":{}}}}]<|im_end|>'
)


def call(arguments: object = '{"city": "北京"}', name: str = "weather", **more: object) -> dict[str, Any]:
    """Return a call in OpenAI's form."""
    return {"id": "functions.weather:0", "type": "function", "function": {"name": name, "arguments": arguments}, **more}


def calling(*calls: dict[str, Any], **more: object) -> dict[str, Any]:
    """Return a turn of the assistant's that calls tools and says nothing."""
    return {"role": "assistant", "content": None, "tool_calls": list(calls or [call()]), **more}


def written(*calls: tuple[str, str]) -> str:
    """Return calls, of id and arguments, as K2's templates write them."""
    inner = "".join(
        f"<|tool_call_begin|>{name}<|tool_call_argument_begin|>{given}<|tool_call_end|>" for name, given in calls
    )
    return f"<|tool_calls_section_begin|>{inner}<|tool_calls_section_end|>"


def result(**more: object) -> dict[str, Any]:
    """Return the result of a call."""
    return {"role": "tool", "content": "sunny", **more}


def answer(content: str = "a", **more: object) -> dict[str, Any]:
    """Return a turn of the assistant's that answers."""
    return {"role": "assistant", "content": content, **more}


SUNNY = "<|im_system|>tool<|im_middle|>## Return of functions.weather:0\nsunny<|im_end|>"
CALLED = written(("functions.weather:0", '{"city": "北京"}'))


class TestWhatIsLearnt:
    """Turns of the assistant, and nothing else."""

    def test_tools_calls_and_results(self, taught: Taught) -> None:
        """Tools reach the template; a call is learnt with the token that ends its turn, its result is not."""
        row = {"messages": [USER, calling(), result(tool_call_id="functions.weather:0"), answer()], "tools": [TOOL]}
        assert taught("instruct", row) == [f"{DECLARED}{ASKED}{HEAD}«{CALLED}{END}»{SUNNY}{HEAD}«a{END}»"]

    def test_turns_that_follow_one_another(self, taught: Taught) -> None:
        """Several turns of the assistant's between results are learnt each, and no header among them."""
        row = {"messages": [USER, calling(), result(), calling(), result(), answer("b"), answer("c")]}
        [shown] = taught("instruct", row)
        body = f"{HEAD}«{CALLED}{END}»{SUNNY}"
        assert shown == f"{ASKED}{body}{body}{HEAD}«b{END}»{HEAD}«c{END}»"

    def test_what_follows_the_last_turn_is_left_away(self, taught: Taught) -> None:
        """A question without an answer teaches nothing."""
        assert taught("instruct", {"messages": [USER, answer(), USER]}) == [f"{ASKED}{HEAD}«a{END}»"]

    def test_the_last_turn_alone(self, taught: Taught) -> None:
        """With `turns: last` the turns before it are read and not learnt."""
        row = {"messages": [USER, answer("a"), USER, answer("b")]}
        assert taught("instruct", row, turns="last") == [f"{ASKED}{HEAD}a{END}{ASKED}{HEAD}«b{END}»"]

    def test_a_turn_of_weight_0_is_not_learnt(self, taught: Taught) -> None:
        """As in OpenAI's form; a last one without weight is left away, and a row of such is left out and counted."""
        census = Census()
        messages = [USER, answer("a", weight=0), USER, answer("b", weight=1), USER, answer("c", weight=0.0)]
        shown = taught("instruct", {"messages": messages}, census=census)
        assert shown == [f"{ASKED}{HEAD}a{END}{ASKED}{HEAD}«b{END}»"]
        assert taught("instruct", {"messages": messages}, census=census, turns="last") == []
        assert taught("instruct", {"messages": messages[:2]}, census=census) == []
        assert (census.rows, census.weightless, census.left_out) == (3, 5, 2)
        assert any("no turn of theirs is to be learnt: 2 rows" in note for note in census.notes())

    def test_blanks_behind_a_turn_are_the_templates(self, taught: Taught) -> None:
        """A line break that the template puts behind the turn's last token is not learnt."""
        [shown] = taught(
            "{% for m in messages %}{{ '<|im_user|>' ~ m.content ~ '<|im_end|>\n' }}{% endfor %}"
            "{{ '<|im_user|>' if add_generation_prompt }}",
            {"messages": [USER, answer(), USER, answer("b")]},
        )
        assert shown == f"<|im_user|>q{END}\n<|im_user|>«a{END}»\n<|im_user|>q{END}\n<|im_user|>«b{END}»"

    def test_a_named_system_message_stays_the_first(self, taught: Taught) -> None:
        """The template's own system message stands only where the row has none."""
        row = {"messages": [{"role": "system", "content": "s"}, USER, answer()]}
        assert taught("thinking", row) == [
            f"<|im_system|>system<|im_middle|>s{END}{ASKED}{HEAD}<think></think>«a{END}»"
        ]

    def test_marks_of_the_template_decide(self, taught: Taught) -> None:
        """Where it says itself what is generated, that is learnt, and of turns without weight nothing."""
        messages = [USER, answer(reasoning="r"), USER, answer("b", weight=0), USER, answer("c")]
        [shown] = taught("marked", {"messages": messages})
        assert shown == f"{ASKED}{HEAD}«<think>r</think>a{END}»{ASKED}{HEAD}b{END}{ASKED}{HEAD}«c{END}»"
        body = "{% generation %}{{ m.content }}{% endgeneration %}{% generation %}.{% endgeneration %}"
        twice = (
            f"{{% for m in messages %}}{{% if m.role == 'user' %}}{{{{ m.content }}}}{{% else %}}{body}{{% endif %}}"
        )
        twice += "{% endfor %}"
        assert taught(twice, {"messages": [USER, answer()]}) == ["q«a.»"]
        with pytest.raises(MalformedFile, match=r"marks of what is generated fit no turns, expected 2.*found 4"):
            taught(twice, {"messages": messages[:2] + messages[4:]}, turns="last")

    def test_marks_of_another_text_are_not_taken(self, kimi: Callable[[str], Any]) -> None:
        """A tokenizer's own code may write something else than its template; then turns are found by their prompts."""
        spell = kimi("marked")
        write = spell.apply_chat_template
        spell.apply_chat_template = lambda *arguments, **options: ".." + write(*arguments, **options)
        [example] = examples_of({"messages": [USER, answer()]}, "here", spell)
        assert example.segments[1:] == ((f"a{END}", True),)
        assert example.segments[0][0].startswith("..<|im_system|>")


class TestCalls:
    """Calls and results as templates want them."""

    @pytest.mark.parametrize("arguments", ['{"city":"北京"}', {"city": "北京"}])
    def test_text_stays_as_it_is_spelled_where_the_template_takes_it(self, taught: Taught, arguments: object) -> None:
        """K2's templates write text as it stands, and an object as JSON with blanks."""
        [shown] = taught("thinking", {"messages": [USER, calling(call(arguments))]})
        spelled = arguments if isinstance(arguments, str) else '{"city": "北京"}'
        assert f"<|tool_call_argument_begin|>{spelled}<|tool_call_end|>" in shown

    def test_objects_for_a_template_that_takes_no_text(self, taught: Taught) -> None:
        """JSON of JSON would be learnt as text in quotes."""
        [shown] = taught("last", {"messages": [USER, calling(call('{"city":"北京"}'))]})
        assert '<tool_call>{"name": "weather", "arguments": {"city": "北京"}}</tool_call>' in shown

    def test_text_for_a_template_that_takes_no_objects(self, taught: Taught) -> None:
        """One that joins arguments to text gets them as text."""
        template = (
            "{% for m in messages %}{{ m.role ~ ':' ~ m.content }}{% for c in m.tool_calls or [] %}"
            "{{ c.function.name + c.function.arguments }}{% endfor %}{% endfor %}"
            "{{ 'assistant:' if add_generation_prompt }}"
        )
        for arguments in ('{"a":1}', {"a": 1}):
            [shown] = taught(template, {"messages": [USER, calling(call(arguments))]})
            spelled = arguments if isinstance(arguments, str) else '{"a": 1}'
            assert shown == f"user:qassistant:«weather{spelled}»"

    def test_a_call_without_arguments_has_none(self, taught: Taught) -> None:
        """Null and nothing mean an empty object."""
        for arguments in (None, ""):
            [shown] = taught("instruct", {"messages": [USER, calling(call(arguments))]})
            assert written(("functions.weather:0", "{}")) in shown

    def test_ids_become_those_that_k2_reads(self, taught: Taught) -> None:
        """Where the template writes an id and no name, another form of ids would teach calls without a name."""
        calls = [call(id="call_x"), call(id="call_y", name="time"), call(id="functions.weather:7")]
        messages = [
            USER,
            calling(*calls),
            result(tool_call_id="call_y"),
            result(),
            result(tool_call_id="functions.weather:7"),
            calling(call(id="call_x")),
            result(tool_call_id="call_x"),
        ]
        census = Census()
        [shown] = taught("instruct", {"messages": [*messages, answer()]}, census=census)
        given = '{"city": "北京"}'
        names = ["functions.weather:0", "functions.time:1", "functions.weather:7", "functions.weather:3"]
        assert written(*((name, given) for name in names[:3])) in shown
        assert written((names[3], given)) in shown
        returned = [part.split("\n")[0] for part in shown.split("## Return of ")[1:]]
        assert returned == [names[1], names[0], names[2], names[3]]
        assert census.renamed == 1
        assert any("functions.NAME:INDEX" in note for note in census.notes())
        with pytest.raises(MalformedFile, match="message 3: a tool result without a call, found call_z"):
            taught("instruct", {"messages": [*messages[:2], result(tool_call_id="call_z"), answer()]})

    def test_results_without_ids_answer_the_open_calls(self, taught: Taught) -> None:
        """One after another, of the last turn alone; an id of the form that has another name is rewritten."""
        three = [call(id=""), call(id="functions.time:5"), call(id="x")]
        messages = [USER, calling(*three), result(), result(), calling(call(id="y")), result(), answer()]
        [shown] = taught("instruct", {"messages": messages})
        returned = [part.split("\n")[0] for part in shown.split("## Return of ")[1:]]
        assert returned == [f"functions.weather:{index}" for index in (0, 1, 3)]

    def test_ids_stay_where_names_are_written(self, taught: Taught) -> None:
        """A template that writes names needs no ids of a form."""
        census = Census()
        taught("last", {"messages": [USER, calling(call(id="call_x"))]}, census=census)
        assert (census.tool_calls, census.renamed) == (1, 0)

    def test_a_template_that_passes_over_them_is_refused(self, taught: Taught) -> None:
        """Tools or calls that are never written would teach answers to another question."""
        plain = "{% for m in messages %}{{ m.role ~ m.content }}{% endfor %}{{ 'assistant' if add_generation_prompt }}"
        with pytest.raises(MalformedFile, match="line 1: the chat template does not write tools; leave `tools` out"):
            taught(plain, {"messages": [USER, answer()], "tools": [TOOL]})
        with pytest.raises(MalformedFile, match="line 1: the chat template does not write tool calls"):
            taught(plain, {"messages": [USER, calling()]})
        assert taught(plain, {"messages": [USER, answer()], "tools": []}) == ["userqassistant«a»"]

    def test_tools_as_json(self, taught: Taught) -> None:
        """As tables store them."""
        row = {"messages": [USER, answer()]}
        for template in ("instruct", "marked"):
            assert taught(template, {**row, "tools": json.dumps([TOOL])}) == taught(template, {**row, "tools": [TOOL]})
            assert taught(template, {**row, "tools": " "}) == taught(template, row)


THOUGHT = {"reasoning_content": "r"}


class TestReasoning:
    """What is thought before an answer."""

    def test_an_answer_whose_reasoning_is_blanked(self, taught: Taught) -> None:
        """K2-Thinking's template writes none of an answer's, a single one's neither; each rule says what then."""
        row = {"messages": [USER, answer(**THOUGHT)]}
        census = Census()
        dropped = [f"{ASKED}{HEAD}<think></think>«a{END}»"]
        assert taught("thinking", row, census=census) == dropped  # and the whole is refused by `load_rows`
        assert (census.losing, census.first_losing) == (1, "a.jsonl, line 1, message 2")
        assert taught("thinking", row, reasoning="drop") == dropped
        assert taught("thinking", row, reasoning="skip") == []
        assert taught("thinking", row, reasoning="split") == [f"{ASKED}{HEAD}«<think>r</think>a{END}»"]

    def test_reasoning_behind_the_last_answer_stays(self, taught: Taught) -> None:
        """Of a row that ends with calls every turn's is written, and nothing is lost."""
        census = Census()
        messages = [USER, calling(**THOUGHT), result(), calling(**THOUGHT)]
        [shown] = taught("thinking", {"messages": messages}, census=census)
        body = f"{HEAD}«<think>r</think>{CALLED}{END}»"
        assert shown == f"{ASKED}{body}{SUNNY}{body}"
        assert (census.reasoning, census.losing) == (1, 0)

    def test_turns_as_they_are_asked_for(self, taught: Taught) -> None:
        """Split, a loop of calls is one example with its answer, and the next question begins another."""
        messages = [USER, calling(**THOUGHT), result(), answer("a", **THOUGHT), USER, answer("b", reasoning="s")]
        first, second = taught("thinking", {"messages": messages}, reasoning="split")
        loop = f"{HEAD}«<think>r</think>{CALLED}{END}»{SUNNY}{HEAD}«<think>r</think>a{END}»"
        assert first == f"{ASKED}{loop}"
        blank = f"{HEAD}<think></think>{CALLED}{END}{SUNNY}{HEAD}<think></think>a{END}"
        assert second == f"{ASKED}{blank}{ASKED}{HEAD}«<think>s</think>b{END}»"
        last = taught("thinking", {"messages": messages}, reasoning="split", turns="last")
        assert last == [second]
        messages[1]["weight"] = 0
        assert taught("thinking", {"messages": messages}, reasoning="split")[0] == f"{ASKED}{loop}".replace(
            f"«<think>r</think>{CALLED}{END}»", f"<think>r</think>{CALLED}{END}"
        )

    def test_dropped_or_skipped_within_a_conversation(self, taught: Taught) -> None:
        """What the template blanks later is learnt as it is written in the end, or not at all."""
        messages = [USER, calling(**THOUGHT), result(), answer("a"), USER, calling(**THOUGHT)]
        end = f"{ASKED}{HEAD}«<think>r</think>{CALLED}{END}»"
        middle = f"{SUNNY}{HEAD}<think></think>«a{END}»"
        [dropped] = taught("thinking", {"messages": messages}, reasoning="drop")
        assert dropped == f"{ASKED}{HEAD}<think></think>«{CALLED}{END}»{middle}{end}"
        [skipped] = taught("thinking", {"messages": messages}, reasoning="skip")
        assert skipped == f"{ASKED}{HEAD}<think></think>{CALLED}{END}{middle}{end}"

    def test_a_prompt_that_opens_the_block(self, taught: Taught) -> None:
        """K2.5's prompt has the first half of it, which is not learnt; without reasoning neither is the other."""
        row = {"messages": [USER, answer(**THOUGHT)]}
        assert taught("opened", row, reasoning="split") == [f"{ASKED}{HEAD}<think>«r</think>a{END}»"]
        assert taught("opened", row, reasoning="drop") == [f"{ASKED}{HEAD}<think></think>«a{END}»"]

    def test_blanks_of_the_block_stay(self, taught: Taught) -> None:
        """Those that the template writes around no reasoning stand around what is filled in; content keeps its own."""
        template = "{% for m in messages %}{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
        template += "{{ m.content }}<|im_end|>{% endfor %}"
        row = {"messages": [USER, answer("\n a", **THOUGHT)]}
        assert taught(template, row, reasoning="split") == [f"q{END}«<think>\nr\n</think>\n\n\n a{END}»"]
        assert taught(template, row, reasoning="drop") == [f"q{END}<think>\n\n</think>\n\n«\n a{END}»"]

    def test_marks_that_take_in_the_prompt(self, taught: Taught) -> None:
        """What stands in the prompt is not learnt where each turn is learnt as it is asked for."""
        body = "{% generation %}assistant{{ m.content }}{% endgeneration %}"
        template = f"{{% for m in messages %}}{{% if m.role == 'user' %}}q{{% else %}}{body}{{% endif %}}{{% endfor %}}"
        template += "{{ 'assistant' if add_generation_prompt }}"
        assert taught(template, {"messages": [USER, answer("a" * 20)]}, reasoning="split") == [
            f"qassistant«{'a' * 20}»"
        ]
        assert taught(template, {"messages": [USER, answer()]}) == ["q«assistanta»"]

    @pytest.mark.parametrize("opened", [False, True])
    def test_marks_move_with_what_is_filled_in(self, taught: Taught, *, opened: bool) -> None:
        """Where the template marks what is generated and blanks reasoning, the marks take in what is put there."""
        first, begun = ("<think>", "") if opened else ("", "<think>")
        body = f"{first}{{% generation %}}{begun}</think>{{{{ m.content }}}}{{% endgeneration %}}."
        template = f"{{% for m in messages %}}{{% if m.role == 'user' %}}q{{% else %}}{body}{{% endif %}}{{% endfor %}}"
        template += f"{{{{ '{first}' if add_generation_prompt }}}}"
        row = {"messages": [USER, answer(**THOUGHT), USER, answer("b")]}
        found = taught(template, row, reasoning="split")
        assert found == [f"q{first}«{begun}r</think>a»", f"q{first}{begun}</think>a.q{first}«{begun}</think>b»"]

    def test_a_template_without_a_place_for_it(self, taught: Taught) -> None:
        """An instruct model's template has none: nothing can be filled."""
        row = {"messages": [USER, answer(**THOUGHT)]}
        with pytest.raises(MalformedFile, match=r"message 2: the chat template has no place for the reasoning.*drop"):
            taught("instruct", row, reasoning="split")
        half = "{% for m in messages %}{{ ('</think>' if m.role == 'assistant' else '') ~ m.content }}{% endfor %}"
        with pytest.raises(MalformedFile, match="no place for the reasoning"):
            taught(half, row, reasoning="split")  # nothing has opened the block
        assert taught("instruct", row, reasoning="drop") == [f"{ASKED}{HEAD}«a{END}»"]

    def test_a_think_block_in_the_content(self, taught: Taught) -> None:
        """It is the row's own text for a template that knows no reasoning, and reasoning for one that does."""
        row = {"messages": [USER, answer("<think>r</think>a")]}
        census = Census()
        assert taught("instruct", row, census=census) == [f"{ASKED}{HEAD}«<think>r</think>a{END}»"]
        assert (census.reasoning, census.losing) == (1, 0)
        assert taught("thinking", row, reasoning="split") == [f"{ASKED}{HEAD}«<think>r</think>a{END}»"]
        assert taught("thinking", row, reasoning="skip") == []
        empty = {"messages": [USER, answer("<think></think>a")]}
        assert taught("thinking", empty) == [f"{ASKED}{HEAD}<think></think>«a{END}»"]
        assert taught("instruct", empty) == [f"{ASKED}{HEAD}«<think></think>a{END}»"]
        both = {"messages": [USER, answer("<think>s</think>a", **THOUGHT)]}
        with pytest.raises(MalformedFile, match="message 2: reasoning that stands twice"):
            taught("thinking", both)

    @pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
    def test_names_of_reasoning(self, taught: Taught, name: str) -> None:
        """It reaches the template by the name that the template knows."""
        [shown] = taught("thinking", {"messages": [USER, calling(**{name: "r"})]})
        assert shown == f"{ASKED}{HEAD}«<think>r</think>{CALLED}{END}»"
        with pytest.raises(MalformedFile, match="message 2: reasoning that stands twice and differs"):
            taught("thinking", {"messages": [USER, answer(thinking="a", reasoning="b")]})
        assert taught("thinking", {"messages": [USER, answer(**{name: ""})]}) == [
            f"{ASKED}{HEAD}<think></think>«a{END}»"
        ]

    def test_an_empty_block_is_counted(self, taught: Taught) -> None:
        """People who train a thinking model on answers alone are told."""
        census = Census()
        taught("thinking", {"messages": [USER, answer(), USER, answer()]}, census=census)
        assert census.unthinking == 2
        assert any(
            "behind an empty think block of the chat template's, which is not learnt: 2 turns" in note
            for note in census.notes()
        )

    def test_a_template_that_writes_its_last_turn_otherwise(self, taught: Taught) -> None:
        """Where an earlier turn loses even its empty block, the row is refused, or split, and the remedy says so."""
        row = {"messages": [USER, answer("a"), USER, answer("b", **THOUGHT)]}
        with pytest.raises(MalformedFile, match=r"message 4 to follow.*reasoning: split.*turns: last"):
            taught("last", row)
        asked = f"{ASKED}\n"
        last = f"{asked}{HEAD}a{END}\n{asked}{HEAD}«<think>\nr\n</think>\n\nb{END}»"
        assert taught("last", row, turns="last") == [last]
        assert taught("last", row, reasoning="split") == [
            f"{asked}{HEAD}<think>\n\n</think>\n\n«a{END}»",
            last,
        ]


HOSTILE: dict[str, tuple[Row, str]] = {
    "tools that are no list": ({"tools": {"a": 1}}, "line 1: tools, expected a list of tools, found dict"),
    "tools that are no JSON": ({"tools": "[{"}, "line 1, tools: not valid JSON"),
    "tools that leave the bracket": ({"tools": '[], "x": 1'}, "line 1, tools: not valid JSON"),
    "a tool without a name": ({"tools": [{"type": "function"}]}, "line 1: tool 1, expected"),
    "tools deep as a well": ({"tools": "[" * 100_000}, "line 1, tools: not valid JSON"),
    "functions": ({"functions": [{"name": "a"}]}, "line 1: functions, which cannot be followed; give `tools`"),
    "documents": ({"documents": ["a"]}, "line 1: documents, which cannot be followed"),
    "settings": ({"chat_template_kwargs": {"thinking": False}}, "line 1: chat_template_kwargs, which cannot"),
    "a weight of a half": (
        {"messages": [USER, answer(weight=0.5)]},
        "message 2: the weight.*expected 0 or 1, found 0.5",
    ),
    "a weight that is true": ({"messages": [USER, answer(weight=True)]}, "message 2: the weight.*found True"),
    "a weight that is text": ({"messages": [USER, answer(weight="0")]}, "message 2: the weight"),
    "the old form": ({"messages": [USER, answer(function_call={"name": "a"})]}, "message 2: a function is called in"),
    "an old result": ({"messages": [USER, {"role": "function", "content": "a"}, answer()]}, "message 2: a function is"),
    "a user who calls": ({"messages": [{**USER, "tool_calls": [call()]}, answer()]}, "message 1: tool_calls in a mess"),
    "calls that are none": (
        {"messages": [USER, answer(tool_calls={"a": 1})]},
        "message 2: tool_calls, expected a list",
    ),
    "a call without a name": ({"messages": [USER, calling(call(name=""))]}, "message 2, call 1: not a call"),
    "a call of another type": ({"messages": [USER, calling(call(type="custom"))]}, "message 2, call 1: not a call"),
    "an id that is a number": ({"messages": [USER, calling(call(id=3))]}, "message 2, call 1: id is no text"),
    "arguments that are a list": ({"messages": [USER, calling(call("[1]"))]}, "call 1: arguments, expected JSON of an"),
    "arguments cut short": ({"messages": [USER, calling(call('{"a": '))]}, "call 1, arguments: not valid JSON"),
    "arguments deep as a well": ({"messages": [USER, calling(call('{"a":' * 50_000))]}, "arguments: not valid JSON"),
    "arguments half a pair": ({"messages": [USER, calling(call('{"a": "\\ud83d"}'))]}, "arguments: not valid JSON"),
    "arguments that are a number": ({"messages": [USER, calling(call(3))]}, "call 1: arguments, expected an object"),
    "nothing said or called": ({"messages": [USER, {"role": "assistant"}]}, "message 2: content is no text"),
    "reasoning that is a list": ({"messages": [USER, answer(reasoning=["a"])]}, "message 2: reasoning is no text"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_bad_row_is_named(taught: Taught, name: str) -> None:
    """Each ends in an error that says where and what."""
    row, said = HOSTILE[name]
    with pytest.raises(MalformedFile, match=said):
        taught("thinking", {"messages": [USER, answer()], **row})


def test_tools_go_with_messages_alone(taught: Taught) -> None:
    """Beside a prompt they would be passed over; keys of a request and keys that are empty are."""
    with pytest.raises(MalformedFile, match="line 1: tools, which cannot be followed; give it beside `messages`"):
        taught("thinking", {"prompt": "a", "completion": "b", "tools": [TOOL]})
    row: Row = {"prompt": "a", "completion": "b", "tools": [], "functions": None, "parallel_tool_calls": True, "id": 3}
    assert taught("thinking", row) == ["a«b»"]


TEXTS = st.text(st.sampled_from("ab 你好👍🏽é\n<>|«»{}"), max_size=12)
"""What people write, with blanks at the ends and letters of many bytes."""


@st.composite
def conversations(draw: st.DrawFn) -> list[Row]:
    """Draw messages: questions, calls with their results, answers; with weights."""
    messages: list[Row] = []
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(TEXTS)})
        for _ in range(draw(st.integers(0, 2))):
            arguments = {"city": draw(TEXTS)}
            given = draw(st.sampled_from([arguments, json.dumps(arguments, ensure_ascii=False)]))
            messages += [calling(call(given, id="x"), content=draw(st.none() | TEXTS)), result(tool_call_id="x")]
        messages.append(answer(draw(TEXTS), weight=draw(st.sampled_from([0, 1, 1]))))
    return messages


class TestOracle:
    """What transformers itself says of a template with marks."""

    @given(messages=conversations(), tools=st.booleans(), marked=st.booleans())
    @settings(max_examples=60, deadline=None)
    def test_the_learnt_tokens_are_those_of_transformers(
        self, kimi: Callable[[str], Any], messages: list[Row], *, tools: bool, marked: bool
    ) -> None:
        """With the marks and, by another way, without them, for they stand where turns begin and end."""
        for message in messages:
            message.pop("weight", None)
        spell = kimi("marked")
        for message in messages:  # as K2 reads them, since transformers rewrites no ids
            for number, one in enumerate(message.get("tool_calls", [])):
                one["id"] = f"functions.weather:{number}"
            if message["role"] == "tool":
                message["tool_call_id"] = "functions.weather:0"
        row: Row = {"messages": messages, "tools": [TOOL] if tools else None}
        truth = spell.apply_chat_template(
            [{**message, "content": message["content"] or ""} for message in messages],
            tools=row["tools"],
            return_assistant_tokens_mask=True,
            return_dict=True,
        )
        if not marked:
            spell.chat_template = spell.chat_template.replace("{%- generation -%}", "{%- if true -%}").replace(
                "{%- endgeneration -%}", "{%- endif -%}"
            )
        [document] = Reader(tokenizer=spell, vocabulary=400).documents(examples_of(row, "here", spell))
        size = len(document.tokens)
        assert document.tokens.tolist() == truth["input_ids"][:size]
        assert document.learnt.astype(int).tolist() == truth["assistant_masks"][:size]
        assert not any(truth["assistant_masks"][size:])

    @given(messages=conversations(), template=st.sampled_from(["instruct", "thinking", "opened", "marked"]))
    @settings(max_examples=80, deadline=None)
    def test_what_is_learnt_is_what_the_assistant_wrote(
        self, kimi: Callable[[str], Any], messages: list[Row], template: str
    ) -> None:
        """Learnt tokens spell the turns with weight and nothing else, and all tokens spell what the template writes."""
        spell = kimi(template)
        found = list(examples_of({"messages": messages}, "here", spell))
        turns = []
        for message in messages:
            if message["role"] == "assistant" and message.get("weight", 1):
                arguments = [one["function"]["arguments"] for one in message.get("tool_calls", [])]
                texts = [one if isinstance(one, str) else json.dumps(one, ensure_ascii=False) for one in arguments]
                turns.append((message["content"] or "", texts))
        if not turns:
            assert not found
            return
        [document] = Reader(tokenizer=spell, vocabulary=400).documents(iter(found))
        runs = spell.decode(document.tokens[document.learnt], clean_up_tokenization_spaces=False).split(END)
        assert len(runs) == len(turns) + 1
        assert runs[-1] == ""
        for run, (content, arguments) in zip(runs, turns, strict=False):
            said, _, called = run.partition("<|tool_calls_section_begin|>")
            assert said == content
            for text in arguments:
                assert f"<|tool_call_argument_begin|>{text}<|tool_call_end|>" in called
        whole = spell.decode(document.tokens, clean_up_tokenization_spaces=False)
        assert whole == "".join(text for text, _ in found[0].segments)

    @given(messages=conversations(), template=st.sampled_from(["instruct", "thinking", "opened"]))
    @settings(max_examples=60, deadline=None)
    def test_a_turn_stands_behind_the_prompt_it_is_asked_by(
        self, kimi: Callable[[str], Any], messages: list[Row], template: str
    ) -> None:
        """Split, with reasoning everywhere: what precedes a turn is what an engine would send, to the letter."""
        spell = kimi(template)
        for place, message in enumerate(messages):
            message.pop("weight", None)
            if message["role"] == "assistant" and template != "instruct":
                message["reasoning_content"] = f"thought {place}"
        fitted = [
            {**message, "content": message["content"] or ""}
            | ({"tool_call_id": "x"} if message["role"] == "tool" else {})
            for message in messages
        ]
        count = 0
        for message in fitted:  # ids as they are rewritten
            if message.get("tool_calls"):
                name = f"functions.weather:{count}"
                message["tool_calls"] = [{**message["tool_calls"][0], "id": name}]
                count += 1
            if message["role"] == "tool":
                message["tool_call_id"] = name
        prompts = [
            spell.apply_chat_template(fitted[:place], tokenize=False, add_generation_prompt=True)
            for place, message in enumerate(fitted)
            if message["role"] == "assistant"
        ]
        census = Census()
        examples = list(examples_of({"messages": messages}, "here", spell, Learning(reasoning="split"), census))
        found = []
        for example in examples:
            seen = ""
            for text, learnt in example.segments:
                if learnt:
                    found.append(seen)
                    if template != "instruct":
                        assert "thought" in text
                seen += text
        assert found == prompts


NUMBERED = (
    "{% for m in messages %}{{ loop.index ~ m.role ~ m.content ~ m.reasoning_content ~ '<|im_end|>' }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name ~ c.function.arguments }}{% endfor %}{% endfor %}"
    "{{ (messages | length + 1) ~ 'assistant' if add_generation_prompt }}"
)
"""A template that writes no turn as it would anywhere else."""


class TestLongConversations:
    """Turns are written near the opening where they come to the same, for time grows with the square otherwise."""

    @given(
        messages=conversations(),
        template=st.sampled_from(["instruct", "thinking", "opened", "marked", "last", NUMBERED]),
        rule=st.sampled_from(["drop", "skip", "split"]),
        thought=st.booleans(),
    )
    @settings(max_examples=150, deadline=None)
    def test_it_changes_nothing(
        self, kimi: Callable[[str], Any], messages: list[Row], template: str, rule: Any, *, thought: bool
    ) -> None:
        """Asking the template turn by turn for all that stands before gives the same examples, or the same refusal."""
        for place, message in enumerate(messages):
            if message["role"] == "assistant" and thought:
                message["reasoning_content"] = f"thought {place}"
        found: list[object] = []
        for patched in (False, True):
            with pytest.MonkeyPatch.context() as patch:
                if patched:
                    patch.setattr(marking._Marker, "_furthest", lambda _self, _places, at, prompt: (at, prompt))  # noqa: SLF001
                try:
                    examples = examples_of({"messages": messages}, "here", kimi(template), Learning(reasoning=rule))
                    found.append([one.segments for one in examples])
                except MalformedFile as error:
                    found.append(str(error))
        assert found[0] == found[1]

    @pytest.mark.parametrize("rule", ["drop", "split"])
    def test_time_grows_with_the_length(self, kimi: Callable[[str], Any], rule: Any) -> None:
        """Of hundreds of calls the template writes a few times the whole, and not once for each turn."""
        spell, letters = kimi("thinking"), 0
        write = spell.apply_chat_template

        def counted(*arguments: Any, **options: Any) -> str:
            nonlocal letters
            text: str = write(*arguments, **options)
            letters += len(text)
            return text

        spell.apply_chat_template = counted
        messages = [USER, *[calling(**THOUGHT), result(content="z" * 1000)] * 100, answer(**THOUGHT)]
        [example] = examples_of({"messages": messages}, "here", spell, Learning(reasoning=rule))
        assert sum(learnt for _, learnt in example.segments) == 101
        assert letters < 20 * sum(len(text) for text, _ in example.segments)


def test_k2s_own_tokenizer(tmp_path: Path) -> None:
    """Read from tiktoken.model: tools with their keys in order, as K2's code writes them, and the same turns."""
    write_files(tmp_path, merged_ranks())
    template = Path(__file__).parent / "templates" / "thinking.jinja"
    (tmp_path / "chat_template.jinja").write_text(template.read_text())
    spell = open_tokenizer(tmp_path)
    row = {"messages": [USER, calling(**THOUGHT), result(), answer("好👍🏽", **THOUGHT)], "tools": [TOOL]}
    examples = list(examples_of(row, "here", spell, Learning(reasoning="split")))
    [document] = Reader(tokenizer=spell, vocabulary=2048).documents(iter(examples))
    assert spell.decode(document.tokens[document.learnt]) == (
        f"<think>r</think>{CALLED}{END}<think>r</think>好👍🏽{END}"
    )
    assert '{"function": {"name": "weather", "parameters": {' in spell.decode(document.tokens)
    spell.chat_template = "{{ tools_ts_str }}"
    with pytest.raises(CheckpointError, match=r"code of the checkpoint writes them.*trust_remote_code"):
        list(examples_of(row, "here", spell))
