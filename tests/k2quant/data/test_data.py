"""Training data of QAT: what a line may hold, which tokens are learnt, how rows are packed and in what order taken."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from k2quant.data import sources as data
from k2quant.data.learning import Learning
from k2quant.data.packing import NO_TARGET, Document, Rows, batch, order, pack, share, split
from k2quant.data.sources import DataSource, load_rows
from k2quant.errors import CheckpointError, MalformedFile, MissingExtra, UnsafePath, UsageError
from k2quant.nano import architecture, vocabulary
from k2quant.nano.batches import mixture, tokens_of

CHATTY = (
    "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }}[E]{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)
FORGETFUL = (  # only the last message keeps its thoughts, as in templates of models that think
    "{% for m in messages %}<{{ m['role'][0] }}>"
    "{% if loop.last or '|' not in m['content'] %}{{ m['content'] }}{% else %}{{ m['content'].split('|')[1] }}"
    "{% endif %}[E]{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)

ORDERS = ([8, 4, 1, 6], [9, 0, 3, 9], [8, 9, 0, 7])
"""Rows of steps 0 and 2 of seed 7, and of step 0 of the largest seed: four of ten."""


def tokenizer(*, begins: bool = False, ends: bool = False, merges: tuple[tuple[str, str], ...] = ()) -> Any:
    """Return a tokenizer of single letters and merges: [B] 0, [E] 1, [P] 2, then letters; unknown ones are dropped."""
    letters = "abcdefghijklmnopqrstuvwxyz<>| .\n"
    names = ["[B]", "[E]", "[P]", *letters, *("".join(pair) for pair in merges)]
    core = Tokenizer(models.BPE(vocab={name: place for place, name in enumerate(names)}, merges=list(merges)))
    core.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    core.decoder = decoders.Fuse()
    frame = ["[B]"] * begins + ["$A"] + ["[E]"] * ends
    core.post_processor = processors.TemplateProcessing(single=frame, special_tokens=[("[B]", 0), ("[E]", 1)])
    special = {"bos_token": "[B]", "eos_token": "[E]", "pad_token": "[P]"}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=core, **special)
    wrapped.chat_template = CHATTY
    return wrapped


@pytest.fixture(scope="module")
def letters() -> Any:
    """A tokenizer that adds nothing to a text."""
    return tokenizer()


def write(path: Path, *examples: object) -> DataSource:
    """Write examples to a file, one a line, and return it as a source."""
    path.write_text("".join(json.dumps(example) + "\n" for example in examples))
    return DataSource(path=str(path))


def load(source: DataSource, spell: Any, *, length: int = 64, vocabulary_size: int = 60) -> Rows:
    """Read a source with a tokenizer."""
    return load_rows(source, spell, length=length, vocabulary=vocabulary_size)


def taught(rows: Rows, spell: Any, row: int = 0) -> str:
    """Return the text of a row's targets; a dot for each token after which nothing is learnt, up to the last target."""
    shown = "".join("." if token == NO_TARGET else spell.decode([token]) for token in rows.targets[row].tolist())
    return shown.rstrip(".")


class TestShapes:
    """What an example teaches."""

    def test_every_token_of_a_text_is_learnt(self, tmp_path: Path, letters: Any) -> None:
        """All but the first token are targets, the end-of-text token among them."""
        rows = load(write(tmp_path / "a.jsonl", {"text": "cab", "id": 7}), letters)
        assert letters.decode(rows.tokens[0, :3]) == "cab"
        assert taught(rows, letters) == "ab[E]"
        assert (rows.documents, rows.learnt, rows.cut, rows.dropped, rows.unread) == (1, 3, 0, 0, "")

    def test_only_the_completion_is_learnt(self, tmp_path: Path, letters: Any) -> None:
        """The prompt's tokens are no targets; the completion's are, and the end-of-text token."""
        rows = load(write(tmp_path / "a.jsonl", {"prompt": "cab", "completion": "de"}), letters)
        assert taught(rows, letters) == "..de[E]"

    def test_an_empty_completion_teaches_to_end(self, tmp_path: Path, letters: Any) -> None:
        """After the prompt comes the end-of-text token, and it is learnt."""
        rows = load(write(tmp_path / "a.jsonl", {"prompt": "cab", "completion": ""}), letters)
        assert taught(rows, letters) == "..[E]"

    def test_only_the_turns_of_the_assistant_are_learnt(self, tmp_path: Path, letters: Any) -> None:
        """A turn is what the template writes for it after its opening, its end token included."""
        turns = [("system", "x"), ("user", "b"), ("assistant", "cd"), ("user", "e"), ("assistant", "f"), ("user", "g")]
        messages = [{"role": role, "content": content} for role, content in turns]
        rows = load(write(tmp_path / "a.jsonl", {"messages": messages}), letters)
        shown = "<s>x[E]<u>b[E]<a>cd[E]<u>e[E]<a>"
        assert letters.decode(rows.tokens[0]).startswith(f"{shown}f")
        unlearnt = "." * (len("<s>xE<u>bE<a>") - 1)
        assert taught(rows, letters) == f"{unlearnt}cd[E]{'.' * len('<u>eE<a>')}f[E]"

    @pytest.mark.parametrize("begins", [False, True])
    @pytest.mark.parametrize("ends", [False, True])
    def test_special_tokens_frame_a_document_once(self, tmp_path: Path, *, begins: bool, ends: bool) -> None:
        """What the tokenizer puts before a text stands in front, and one end-of-text token stands behind."""
        spell = tokenizer(begins=begins, ends=ends)
        source = write(tmp_path / "a.jsonl", {"text": "ab"}, {"prompt": "c", "completion": "d"})
        rows = load(source, spell)
        front = "[B]" * begins
        assert spell.decode(rows.tokens[0]).startswith(f"{front}ab{front}cd[P]")
        assert taught(rows, spell) == ("ab[E].d[E]" if begins else "b[E]d[E]")

    def test_prompt_and_completion_do_not_melt(self, tmp_path: Path) -> None:
        """No token spans the two, for there is none such when the model is asked the prompt."""
        spell = tokenizer(merges=(("a", "b"),))
        rows = load(write(tmp_path / "a.jsonl", {"prompt": "ca", "completion": "bab"}), spell)
        assert [spell.decode([token]) for token in rows.tokens[0, :4].tolist()] == ["c", "a", "b", "ab"]

    def test_a_template_that_changes_the_past_is_refused(self, tmp_path: Path) -> None:
        """Where an earlier turn is written otherwise later on, nobody can say which tokens were its."""
        spell = tokenizer()
        spell.chat_template = FORGETFUL
        roles = ["user", "assistant", "user", "assistant"]
        contents = ["a", "x|b", "c", "d"]
        messages = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=True)]
        load(write(tmp_path / "a.jsonl", {"messages": messages[:2]}), spell)
        source = write(tmp_path / "b.jsonl", {"text": "a"}, {"messages": messages})
        with pytest.raises(MalformedFile, match=r"b\.jsonl, line 2: the chat template.*message 4 to follow"):
            load(source, spell)

    def test_messages_need_a_template(self, tmp_path: Path) -> None:
        """A tokenizer without one ends in an error that names the line."""
        spell = tokenizer()
        spell.chat_template = None
        chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
        with pytest.raises(CheckpointError, match=r"line 1: .*no chat template"):
            load(write(tmp_path / "a.jsonl", chat), spell)

    def test_what_a_template_refuses_is_named(self, tmp_path: Path) -> None:
        """A template's own error comes with file and line."""
        spell = tokenizer()
        spell.chat_template = "{{ raise_exception('roles must alternate') }}"
        chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
        with pytest.raises(MalformedFile, match=r"line 1: the chat template cannot render it.*roles must alternate"):
            load(write(tmp_path / "a.jsonl", chat), spell)

    @pytest.mark.parametrize("unknown", [None, "?"])
    def test_characters_that_no_token_stands_for_are_told(self, tmp_path: Path, unknown: str | None) -> None:
        """What the tokenizer drops in silence, or has one token for all of, is listed, each character once."""
        spell = tokenizer(begins=True)
        if unknown:
            spell.backend_tokenizer.model = models.WordLevel({"[B]": 0, "[E]": 1, "a": 3, "?": 4}, unk_token=unknown)
            spell.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
            spell.add_special_tokens({"unk_token": unknown})
        source = write(tmp_path / "a.jsonl", {"text": "aéa"}, {"prompt": "éa", "completion": "a €"})
        assert load(source, spell).unread == "é€"

    def test_tokens_beyond_the_model_are_refused(self, tmp_path: Path, letters: Any) -> None:
        """An id that the embedding does not have is found before it can be looked up."""
        source = write(tmp_path / "a.jsonl", {"text": "ab"}, {"text": "az"})
        with pytest.raises(MalformedFile, match=r"line 2: .*expected ids below 28, found 28; is this"):
            load(source, letters, vocabulary_size=28)

    def test_an_end_of_text_token_is_needed(self, tmp_path: Path) -> None:
        """Without one, a text could not end."""
        spell = tokenizer()
        spell.eos_token = None
        with pytest.raises(CheckpointError, match=r"line 1: the tokenizer names no end-of-text token"):
            load(write(tmp_path / "a.jsonl", {"text": "ab"}), spell)

    def test_a_tokenizer_that_breaks_is_an_error(self, tmp_path: Path) -> None:
        """Whatever it raises, compiled code's panic included, ends in one sentence with the place."""

        class Panic(BaseException):
            """As that of compiled code, no Exception."""

        class Broken:
            """A tokenizer that can read nothing."""

            def __call__(self, *_: object, **__: object) -> None:
                raise Panic("index\nout of bounds")

        with pytest.raises(CheckpointError, match=r"line 1, and what follows: .*found Panic: index out of bounds"):
            load(write(tmp_path / "a.jsonl", {"text": "ab"}), Broken())

    def test_nano_k2_reads_the_same_as_in_its_own_training(self, tmp_path: Path) -> None:
        """Its items as prompt and completion give the tokens and targets that it learnt from."""
        for name, content in vocabulary.files().items():
            (tmp_path / name).write_bytes(content)
        spell = AutoTokenizer.from_pretrained(tmp_path)
        items = list(islice(mixture(3), 200))
        examples = ({"prompt": item.question, "completion": item.answer} for item in items)
        rows = load(write(tmp_path / "a.jsonl", *examples), spell, length=80, vocabulary_size=vocabulary.SIZE)
        assert documents_of(rows) == [tokens_of(item) for item in items]
        assert rows.documents == len(items)


class TestReasoning:
    """Reasoning that a template does not write, over a whole file."""

    ROWS = (
        {"text": "ab"},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning": "c"}]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    )

    def test_it_is_refused_unless_the_job_says_what_then(self, tmp_path: Path, kimi: Any) -> None:
        """The whole file is read first, so that the message says how many rows there are; and what to choose."""
        source, spell = write(tmp_path / "a.jsonl", *self.ROWS), kimi("thinking")
        with pytest.raises(MalformedFile) as caught:
            load_rows(source, spell, length=256, vocabulary=400)
        assert "a.jsonl, line 2, message 2" in str(caught.value)
        assert "found 1 of 3 rows" in str(caught.value)
        assert "`data: reasoning:` split" in str(caught.value)

    @pytest.mark.parametrize(("rule", "learnt"), [("drop", 3), ("skip", 2), ("split", 3)])
    def test_each_rule_gives_rows_of_its_own(self, tmp_path: Path, kimi: Any, rule: Any, learnt: int) -> None:
        """They differ in what is learnt, so that a run that was begun with one does not go on with another."""
        source, spell = write(tmp_path / "a.jsonl", *self.ROWS), kimi("thinking")
        found = {
            name: load_rows(source, spell, length=256, vocabulary=400, learning=Learning(reasoning=name))
            for name in ("drop", "skip", "split")
        }
        assert len({rows.digest for rows in found.values()}) == 3
        assert found[rule].documents == learnt
        first, rest = split(found[rule], 0)
        assert first.census == rest.census == found[rule].census
        assert (first.census.rows, first.census.chats, first.census.reasoning, first.census.losing) == (3, 2, 1, 1)
        assert first.census.left_out == (rule == "skip")


HOSTILE: dict[str, tuple[bytes, str]] = {
    "none of the shapes": (b'{"txt": "a"}', "line 1: not one example, expected text.*found txt"),
    "no keys": (b"{}", "line 1: not one example.*found no keys"),
    "null": (b'{"text": null}', "line 1: text is no text, expected a string, found null"),
    "half of it null": (b'{"prompt": "b", "completion": null}', r"line 1: not.*found prompt, completion \(null\)$"),
    "two shapes": (b'{"text": "a", "prompt": "b", "completion": "c"}', "line 1: not one example.*text, prompt, compl"),
    "half a shape": (b'{"prompt": "b"}', "line 1: not one example"),
    "a number": (b'{"text": 3}', "line 1: text is no text, expected a string, found int"),
    "an empty text": (b'{"text": ""}', "line 1: text is empty"),
    "an empty prompt": (b'{"prompt": "", "completion": "a"}', "line 1: prompt is empty"),
    "a list": (b'["a"]', "line 1: not a JSON object"),
    "torn": (b'{"text": "a', "line 1: not valid JSON"),
    "torn after blank lines": (b'{"text": "a"}\n\n  \r\n{"te', "line 4: not valid JSON"),
    "a key twice": (b'{"text": "a", "text": "b"}', "line 1: not valid JSON.*duplicate key"),
    "half a surrogate pair": (b'{"text": "a\\ud83d"}', "line 1: not valid JSON.*surrogate"),
    "a pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "a git-lfs pointer, not the file",
    ),
    "Latin-1": (b'{"text": "ab"}\n{"text": "\xe9"}', "line 2: not valid JSON.*UTF-8"),
    "UTF-16": ('{"text": "a"}'.encode("utf-16"), "line 1: the encoding, expected UTF-8, found UTF-16"),
    "deep": (b'{"text": ' + b"[" * 100_000, "line 1: not valid JSON"),
    "an empty file": (b"", "no examples"),
    "blank lines": (b"\n \n", "no examples"),
    "messages that are text": (b'{"messages": "a"}', "line 1: messages is no conversation.*found str"),
    "no messages": (b'{"messages": []}', "line 1: messages is no conversation.*found none"),
    "a message that is text": (b'{"messages": ["a"]}', "line 1, message 1: not a message"),
    "no role": (b'{"messages": [{"content": "a"}]}', "line 1, message 1: role is no text.*found NoneType"),
    "parts": (b'{"messages": [{"role": "user", "content": [{}]}]}', "message 1: content is no text.*found list"),
    "no assistant": (b'{"messages": [{"role": "user", "content": "a"}]}', "line 1: nothing to learn.*assistant"),
    "assistant first": (b'{"messages": [{"role": "assistant", "content": "a"}]}', "line 1: nothing to answer"),
}


class TestHostileFiles:
    """Files that are not what they should be."""

    @pytest.mark.parametrize("name", HOSTILE)
    def test_a_bad_file_is_named_with_its_line(self, tmp_path: Path, letters: Any, name: str) -> None:
        """Each ends in an error that says where and what."""
        content, said = HOSTILE[name]
        (tmp_path / "bad.jsonl").write_bytes(content)
        with pytest.raises(MalformedFile, match=rf"bad\.jsonl.*{said}|bad\.jsonl: {said}"):
            load(DataSource(path=str(tmp_path / "bad.jsonl")), letters)

    def test_a_line_is_read_up_to_a_limit(self, tmp_path: Path, letters: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """A file without line breaks does not fill the memory; a line of just the limit is read."""
        line = b'{"text": "abc"}\n'
        (tmp_path / "a.jsonl").write_bytes(line * 2)
        source = DataSource(path=str(tmp_path / "a.jsonl"))
        monkeypatch.setattr(data, "_LINE", len(line))
        assert load(source, letters).documents == 2
        monkeypatch.setattr(data, "_LINE", len(line) - 1)
        with pytest.raises(MalformedFile, match=r"line 1: too long"):
            load(source, letters)

    def test_a_byte_order_mark_is_passed_over(self, tmp_path: Path, letters: Any) -> None:
        """A file that an editor began with a byte-order mark gives the rows that it gives without one."""
        line = b'{"text": "abc"}\n'
        (tmp_path / "plain.jsonl").write_bytes(line * 2)
        (tmp_path / "marked.jsonl").write_bytes(b"\xef\xbb\xbf" + line * 2)
        plain, marked = (
            load(DataSource(path=str(tmp_path / f"{name}.jsonl")), letters) for name in ("plain", "marked")
        )
        assert marked.digest == plain.digest

    def test_blank_lines_are_skipped(self, tmp_path: Path, letters: Any) -> None:
        """They are no examples, but count as lines; a last line break may be missing, and lines may end as on DOS."""
        (tmp_path / "a.jsonl").write_bytes(b'\n{"text": "ab"}\r\n\n{"text": "cd"}')
        assert load(DataSource(path=str(tmp_path / "a.jsonl")), letters).documents == 2

    def test_a_folder_is_read_in_the_order_of_names(self, tmp_path: Path, letters: Any) -> None:
        """Files that are no JSON Lines, and hidden ones, are left alone."""
        write(tmp_path / "b.jsonl", {"text": "cc"})
        write(tmp_path / "a.jsonl", {"text": "ab"})
        (tmp_path / "README.md").write_text("no example")
        (tmp_path / ".b.jsonl").write_text("no example")
        assert taught(load(DataSource(path=str(tmp_path)), letters), letters) == "b[E]c[E]"

    def test_a_link_out_of_the_folder_is_refused(self, tmp_path: Path, letters: Any) -> None:
        """What lies elsewhere is not read by the name of a folder."""
        write(tmp_path / "secret.jsonl", {"text": "ab"})
        (tmp_path / "in").mkdir()
        (tmp_path / "in" / "a.jsonl").symlink_to(tmp_path / "secret.jsonl")
        with pytest.raises(UnsafePath, match="leaves the folder") as caught:
            load(DataSource(path=str(tmp_path / "in")), letters)
        assert "follow_links" not in str(caught.value)  # which is about models

    def test_a_folder_without_examples_is_refused(self, tmp_path: Path, letters: Any) -> None:
        """No file is no data; an empty file among others is named."""
        with pytest.raises(UsageError, match=r"expected files \*\.jsonl"):
            load(DataSource(path=str(tmp_path)), letters)
        write(tmp_path / "a.jsonl", {"text": "ab"})
        write(tmp_path / "b.jsonl")
        with pytest.raises(MalformedFile, match=r"b\.jsonl: no examples"):
            load(DataSource(path=str(tmp_path)), letters)

    def test_nothing_to_learn_at_all_is_refused(self, tmp_path: Path, letters: Any) -> None:
        """Examples whose targets all lie beyond the row's end train nothing."""
        source = write(tmp_path / "a.jsonl", {"prompt": "abcdef", "completion": "g"})
        with pytest.raises(MalformedFile, match=r"a\.jsonl: nothing to learn in any example"):
            load(source, letters, length=4)

    @pytest.mark.parametrize("length", [1, 0, -3])
    def test_rows_have_two_tokens_at_least(self, tmp_path: Path, letters: Any, length: int) -> None:
        """Shorter ones are a mistake of the user's."""
        with pytest.raises(UsageError, match="rows of at least 2 tokens"):
            load(write(tmp_path / "a.jsonl", {"text": "ab"}), letters, length=length)

    def test_progress_ends_at_the_whole(self, tmp_path: Path, letters: Any) -> None:
        """It counts bytes, never falls, and ends with all of them."""
        source = write(tmp_path / "a.jsonl", *({"text": "ab"} for _ in range(5)))
        told: list[tuple[int, int]] = []
        load_rows(source, letters, length=8, vocabulary=60, progress=lambda done, total: told.append((done, total)))
        size = (tmp_path / "a.jsonl").stat().st_size
        assert told == sorted(told)
        assert told[-1] == (size, size)


class Table:
    """A dataset as `datasets` gives it."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        """Hold rows."""
        self.rows = rows
        self.column_names = list(rows[0])

    def select_columns(self, names: list[str]) -> Table:
        """Return the table with these columns."""
        return Table([{name: row[name] for name in names} for row in self.rows])

    def __len__(self) -> int:
        """How many rows there are."""
        return len(self.rows)

    def __iter__(self) -> Any:
        """Yield the rows."""
        return iter(self.rows)


class TestDatasets:
    """What comes from the `datasets` library."""

    @pytest.fixture
    def hub(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[dict[str, Any]]], list[Any]]:
        """Have `datasets` give these rows, and return how it is called."""
        calls: list[Any] = []

        def serve(rows: list[dict[str, Any]]) -> list[Any]:
            def load_dataset(*arguments: Any, **options: Any) -> Table:
                calls.append((arguments, options))
                return Table(rows)

            monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
            return calls

        return serve

    def test_a_dataset_is_read_by_name(self, letters: Any, hub: Callable[..., list[Any]]) -> None:
        """Columns that an example does not have are null and ignored; no code of the dataset's is asked for."""
        rows = [{"text": None, "prompt": "a", "completion": "b", "image": 1}]
        calls = hub([*rows, {"text": "cd", "prompt": None, "completion": None, "image": 2}])
        found = load(DataSource(path="org/name", split="test", config="main"), letters)
        assert taught(found, letters) == "b[E]d[E]"
        assert calls == [(("org/name",), {"name": "main", "split": "test"})]

    def test_what_a_table_fills_in_is_no_part_of_a_row(self, kimi: Any, hub: Callable[..., list[Any]]) -> None:
        """Nulls where another row has a key are taken out at any depth; a file's own nulls stay."""
        tool = {
            "type": "function",
            "function": {"name": "f", "parameters": {"properties": {"a": {"type": "string"}, "b": {}}}},
        }
        call = {"id": "functions.f:0", "type": "function", "function": {"name": "f", "arguments": {"a": "b"}}}
        filled_tool = json.loads(json.dumps(tool))
        filled_tool["function"]["parameters"]["properties"] |= {"y": None, "z": {"type": None, "enum": None}}
        filled_call = json.loads(json.dumps(call))
        filled_call["function"]["arguments"]["z"] = None
        spell = kimi("thinking")
        digests = []
        for one, called, more in ((tool, call, {}), (filled_tool, filled_call, dict.fromkeys(["name", "reasoning"]))):
            messages = [
                {"role": "user", "content": "q", **more, **({"tool_calls": None} if more else {})},
                {"role": "assistant", "content": None, "tool_calls": [called], **more},
            ]
            hub([{"messages": messages, "tools": [one], "text": None, "functions": None, "id": 3}])
            digests.append(load(DataSource(path="org/name"), spell, vocabulary_size=400, length=256).digest)
        assert digests[0] == digests[1]

    def test_a_bad_row_is_named(self, letters: Any, hub: Callable[..., list[Any]]) -> None:
        """By dataset, split and number."""
        hub([{"text": "ab"}, {"text": 3}])
        with pytest.raises(MalformedFile, match=r"org/name, train, row 2: text is no text"):
            load(DataSource(path="org/name"), letters)

    def test_what_exists_is_never_looked_up(
        self, tmp_path: Path, letters: Any, hub: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A folder `org/name` is read, or refused, as a folder."""
        calls = hub([{"text": "ab"}])
        monkeypatch.chdir(tmp_path)
        (tmp_path / "org" / "name").mkdir(parents=True)
        with pytest.raises(UsageError, match=r"expected files \*\.jsonl"):
            load(DataSource(path="org/name"), letters)
        write(tmp_path / "org" / "name" / "a.jsonl", {"text": "xy"})
        assert taught(load(DataSource(path="org/name"), letters), letters) == "y[E]"
        assert not calls

    @pytest.mark.parametrize("path", ["missing.jsonl", "org/missing.jsonl", "/no/such/folder", "../up", "name", ""])
    def test_a_missing_file_is_no_dataset(self, letters: Any, hub: Callable[..., list[Any]], path: str) -> None:
        """What looks like a path is never looked up on a hub."""
        calls = hub([{"text": "ab"}])
        with pytest.raises(UsageError, match="no such file or folder"):
            load(DataSource(path=path), letters)
        assert not calls

    def test_the_missing_library_is_named(self, letters: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """The error says what to install."""
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(MissingExtra, match=r"org/name does not exist here.*pip install .k2quant\[qat\]"):
            load(DataSource(path="org/name"), letters)

    def test_a_dataset_that_cannot_be_loaded_is_an_error(self, letters: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whatever the library raises comes as one sentence."""

        def load_dataset(*_: object, **__: object) -> None:
            raise ConnectionError("no route\nto the hub")

        monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
        with pytest.raises(MalformedFile, match=r"org/name: cannot be .*, found ConnectionError: no route to the hub"):
            load(DataSource(path="org/name"), letters)


def documents_of(rows: Rows) -> list[tuple[list[int], list[int]]]:
    """Return tokens and targets of each document, found by positions that begin again; padding is left out."""
    found: list[tuple[list[int], list[int]]] = []
    for row in torch.stack([rows.tokens, rows.positions, rows.targets], dim=-1).tolist():
        for token, position, target in row:
            if position == 0:
                found.append(([], []))
            assert position == len(found[-1][0])
            found[-1][0].append(token)
            found[-1][1].append(target)
    return [document for document in found if any(target != NO_TARGET for target in document[1])]


@st.composite
def documents(draw: st.DrawFn) -> Document:
    """Draw a document; each text is learnt whole, of others any part."""
    size = draw(st.integers(0, 30))
    divisible = draw(st.booleans())
    learnt = [True] * size if divisible else draw(st.lists(st.booleans(), min_size=size, max_size=size))
    tokens = draw(st.lists(st.integers(1, 50), min_size=size, max_size=size))
    return Document(tokens=np.array(tokens, np.int32), learnt=np.array(learnt, np.bool_), divisible=divisible)


def alone(document: Document) -> tuple[list[int], list[int]]:
    """Return a document's tokens and targets, one token at a time."""
    tokens = document.tokens.tolist()
    after = zip(tokens[1:], document.learnt[1:].tolist(), strict=True)
    return tokens[:-1], [token if learnt else NO_TARGET for token, learnt in after]


class TestPacking:
    """Documents in rows."""

    @given(drawn=st.lists(documents(), max_size=12), length=st.integers(2, 12))
    @settings(max_examples=300, deadline=None)
    def test_every_target_stands_once_and_in_order(self, drawn: list[Document], length: int) -> None:
        """Texts come whole, in pieces as long as a row; others up to a row's end; nothing else stands in the rows."""
        rows = pack(drawn, length=length, padding=0)
        expected, cut, dropped = [], 0, 0
        for document in drawn:
            tokens, targets = alone(document)
            starts = range(0, len(tokens), length) if document.divisible else [0]
            pieces = [(tokens[start : start + length], targets[start : start + length]) for start in starts]
            kept = [piece for piece in pieces if any(target != NO_TARGET for target in piece[1])]
            expected += kept
            dropped += not kept
            cut += bool(kept) and not document.divisible and len(tokens) > length
        assert documents_of(rows) == expected
        assert (rows.documents, rows.cut, rows.dropped) == (len(expected), cut, dropped)
        assert rows.learnt == sum(target != NO_TARGET for _, targets in expected for target in targets)
        assert {part.dtype for part in (rows.tokens, rows.positions, rows.targets)} == {torch.int32}
        assert {part.shape[1] for part in (rows.tokens, rows.positions, rows.targets)} == {length}

    @given(drawn=st.lists(documents(), min_size=1, max_size=12), length=st.integers(2, 12))
    @settings(max_examples=100, deadline=None)
    def test_a_row_is_left_only_when_the_next_document_does_not_fit(self, drawn: list[Document], length: int) -> None:
        """What pads a row is shorter than the document that begins the next; padding teaches nothing."""
        rows = pack(drawn, length=length, padding=0)
        free = (rows.tokens == 0).sum(1).tolist()  # no document has the token 0
        for row in range(len(free) - 1):
            ends = [*(rows.positions[row + 1] == 0).nonzero().flatten().tolist(), length]
            assert free[row] < ends[1]
        assert bool((rows.targets[rows.tokens == 0] == NO_TARGET).all())

    def test_a_row_as_it_lies_in_memory(self) -> None:
        """Two documents and padding: tokens, positions and targets written out."""
        drawn = [([5, 6, 7], [False, True, True]), ([8, 9, 4], [False, False, True])]
        given = [Document(tokens=np.array(t, np.int32), learnt=np.array(n), divisible=False) for t, n in drawn]
        rows = pack(given, length=6, padding=2)
        assert rows.tokens.tolist() == [[5, 6, 8, 9, 2, 2]]
        assert rows.positions.tolist() == [[0, 1, 0, 1, 0, 1]]
        assert rows.targets.tolist() == [[6, 7, -100, 4, -100, -100]]

    def test_the_digest_tells_data_apart(self, tmp_path: Path, letters: Any) -> None:
        """The same data give the same; another text, order, division of it, or length of rows gives another."""
        two = [{"text": "abc"}, {"text": "def"}]
        sources: list[tuple[list[Any], int]] = [
            (two, 8),
            (two, 8),
            (two[::-1], 8),
            (two, 9),
            ([{"text": "abcdef"}], 8),
            ([{"text": "abc"}, {"prompt": "de", "completion": "f"}], 8),
        ]
        found = [load(write(tmp_path / "a.jsonl", *own), letters, length=length).digest for own, length in sources]
        assert found[0] == found[1]
        assert len(set(found)) == len(found) - 1

    def test_the_last_rows_are_held_out(self, tmp_path: Path, letters: Any) -> None:
        """Both parts together are all rows, and each counts its own documents and targets."""
        rows = load(write(tmp_path / "a.jsonl", *({"text": "abc"} for _ in range(7))), letters, length=6)
        train, held_out = split(rows, 1)
        assert (len(rows.tokens), len(train.tokens), len(held_out.tokens)) == (4, 3, 1)
        assert torch.equal(torch.cat([train.tokens, held_out.tokens]), rows.tokens)
        assert (train.documents, held_out.documents) == (6, 1)
        assert train.learnt + held_out.learnt == rows.learnt == 21
        assert len({rows.digest, train.digest, held_out.digest}) == 3
        everything, nothing = split(rows, 0)
        assert (everything.digest, len(nothing.tokens), nothing.documents) == (rows.digest, 0, 0)

    @pytest.mark.parametrize("held_out", [4, 5, -1, True])
    def test_something_is_left_to_train_on(self, tmp_path: Path, letters: Any, held_out: int) -> None:
        """Holding all of it out, or less than nothing, is refused."""
        rows = load(write(tmp_path / "a.jsonl", *({"text": "abc"} for _ in range(7))), letters, length=6)
        with pytest.raises(UsageError, match="held_out: expected 0 to 3 of 4 rows"):
            split(rows, held_out)

    def test_a_batch_is_what_a_model_takes(self, tmp_path: Path, letters: Any) -> None:
        """Rows in the order that was asked, as int64."""
        texts = ("ab", "cd", "ef")
        rows = load(write(tmp_path / "a.jsonl", *({"text": text} for text in texts)), letters, length=2)
        taken = batch(rows, torch.tensor([2, 0]))
        assert [letters.decode(row) for row in taken["input_ids"]] == ["ef", "ab"]
        assert taken["position_ids"].tolist() == [[0, 1], [0, 1]]
        assert [letters.decode(row) for row in taken["targets"]] == ["f[E]", "b[E]"]
        assert {part.dtype for part in taken.values()} == {torch.int64}

    def test_a_document_among_others_gives_the_logits_that_it_gives_alone(self, tmp_path: Path) -> None:
        """In transformers' DeepSeek-V3, no token sees another document of its row; positions are its own."""
        torch.manual_seed(0)
        small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "q_lora_rank": 32}
        model = architecture.build(architecture.CONFIG | small).eval()
        examples = [{"text": "abcdefg"}, {"prompt": "hello", "completion": "world"}, {"text": "x"}, {"text": "no more"}]
        rows = load(write(tmp_path / "a.jsonl", *examples), tokenizer(begins=True), length=24, vocabulary_size=128)
        taken = batch(rows, torch.arange(len(rows.tokens)))
        with torch.no_grad():
            inputs = {"input_ids": taken["input_ids"], "position_ids": taken["position_ids"]}
            packed = model(**inputs, use_cache=False).logits
            seen = 0
            for row, start, end in spans(rows):
                own = model(input_ids=taken["input_ids"][row : row + 1, start:end], use_cache=False).logits[0]
                torch.testing.assert_close(packed[row, start:end], own, rtol=1e-4, atol=1e-5)
                seen += start > 0
            mixed = model(input_ids=taken["input_ids"], use_cache=False).logits
        assert seen >= 2
        assert not torch.allclose(mixed, packed, rtol=1e-2, atol=1e-3)  # so the comparison above can tell


def spans(rows: Rows) -> list[tuple[int, int, int]]:
    """Return row, first and last place of each document, and of padding."""
    found = []
    for row, positions in enumerate(rows.positions.tolist()):
        starts = [place for place, position in enumerate(positions) if position == 0]
        found += [(row, *span) for span in zip(starts, [*starts[1:], len(positions)], strict=True)]
    return found


class TestOrder:
    """Which rows a step takes."""

    def test_the_order_is_the_same_everywhere(self) -> None:
        """Rows of two seeds, written out: a resumed job on another machine goes on with the same ones."""
        assert order(0, 10, 4, 7).tolist() == ORDERS[0]
        assert order(2, 10, 4, 7).tolist() == ORDERS[1]
        assert order(0, 10, 4, 2**64 - 1).tolist() == ORDERS[2]

    @given(count=st.integers(1, 20), per_step=st.integers(1, 50), seed=st.integers(0, 2**64 - 1))
    @settings(max_examples=100, deadline=None)
    def test_each_epoch_takes_every_row_once(self, count: int, per_step: int, seed: int) -> None:
        """Steps run across the ends of epochs, and none is skipped or taken twice."""
        taken = torch.cat([order(step, count, per_step, seed) for step in range(2 * count)])
        assert taken.dtype == torch.int64
        assert len(taken) == 2 * count * per_step
        for epoch in taken.split(count):
            assert sorted(epoch.tolist()) == list(range(count))

    def test_epochs_and_seeds_differ(self) -> None:
        """Neither the next epoch nor another seed repeats an order."""
        found = [tuple(order(step, 50, 50, seed).tolist()) for step in range(3) for seed in range(3)]
        assert len(set(found)) == 9

    @given(world=st.integers(1, 8), each=st.integers(1, 5))
    @settings(deadline=None)
    def test_ranks_share_a_step(self, world: int, each: int) -> None:
        """Their parts, side by side, are the step's rows, and all have one size."""
        rows = order(3, 17, world * each, 5)
        parts = [share(rows, rank, world) for rank in range(world)]
        assert torch.equal(torch.cat(parts), rows)
        assert {len(part) for part in parts} == {each}

    def test_an_unequal_share_is_refused(self) -> None:
        """So is a rank that does not exist."""
        with pytest.raises(UsageError, match="a multiple of the 3 processes, found 4"):
            share(torch.arange(4), 0, 3)
        with pytest.raises(UsageError, match="rank: expected 0 to 1, found 2"):
            share(torch.arange(4), 2, 2)

    @pytest.mark.parametrize("arguments", [(-1, 5, 2, 0), (0, 0, 2, 0), (0, 5, 0, 0), (0, 5, 2, -1), (0, 5, 2, 2**64)])
    def test_an_order_of_nothing_is_refused(self, arguments: tuple[int, int, int, int]) -> None:
        """A step below 0, no rows, a step without rows, and a seed out of range are mistakes."""
        with pytest.raises(UsageError, match="expected"):
            order(*arguments)
