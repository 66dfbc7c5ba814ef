"""Data as people have it, as three parts of rows that share no document."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from k2quant.calib.inputs import Part, Samples, read_samples, reading
from k2quant.errors import CheckpointError, MalformedFile, MissingExtra, UnsafePath, UsageError
from k2quant.nano import vocabulary

Read = Callable[..., Samples]


def write(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """Write JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(count: int, *, begun: int = 0) -> list[dict[str, Any]]:
    """Return rows of text, no two the same."""
    return [{"text": f"text number {number} of many"} for number in range(begun, begun + count)]


def letters_of(seed: int, count: int) -> str:
    """Return some letters without an order."""
    return "".join(np.random.default_rng(seed).choice(list("abcdefgh"), count))


def documents(part: Part) -> list[str]:
    """Return what stands in a part: the text of each stretch that begins at position 0."""
    found: list[list[int]] = []
    for row in range(len(part.tokens)):
        for token, position, real in zip(
            part.tokens[row].tolist(), part.positions[row].tolist(), part.real[row].tolist(), strict=True
        ):
            if position == 0 and real:
                found.append([])
            if real:
                assert position == len(found[-1])
                found[-1].append(token)
    return [vocabulary.decode(one) for one in found]


def all_hashes(samples: Samples) -> Sequence[frozenset[str]]:
    """Return the documents of each part."""
    return [frozenset(part.hashes) for part in samples.parts.values()]


class TestParts:
    """Which document goes where."""

    def test_no_document_is_in_two_parts_and_a_tenth_is_in_each_small_one(self, read: Read, tmp_path: Path) -> None:
        """Of 1,000 documents about 100 judge and about 100 are kept, and all are somewhere once."""
        found = all_hashes(read(write(tmp_path / "a.jsonl", texts(1000))))
        assert len(frozenset.union(*found)) == sum(map(len, found)) == 1000
        assert [abs(len(one) - wanted) < 35 for one, wanted in zip(found, (800, 100, 100), strict=True)] == [True] * 3

    def test_the_order_of_the_data_plays_no_part(self, read: Read, tmp_path: Path) -> None:
        """Lines in another order give the same rows, those of more than are needed too."""
        rows = texts(300)
        before = read(write(tmp_path / "a.jsonl", rows), samples=40)
        rows.sort(key=lambda row: row["text"][::-1])
        after = read(write(tmp_path / "b.jsonl", rows), samples=40)
        assert len(before.train.tokens) == 40
        assert [one.digest for one in before.parts.values()] == [one.digest for one in after.parts.values()]
        assert all_hashes(before) == all_hashes(after)

    def test_a_document_stays_where_it_is_when_others_come(self, read: Read, tmp_path: Path) -> None:
        """The part of each of 200 documents is the same beside 200 others."""
        few = all_hashes(read(write(tmp_path / "a.jsonl", texts(200))))
        many = all_hashes(read(write(tmp_path / "b.jsonl", texts(400))))
        assert all(some <= more for some, more in zip(few, many, strict=True))

    def test_data_of_their_own_takes_the_place_of_the_tenth(self, read: Read, tmp_path: Path) -> None:
        """What `validation` and `test` name is all theirs, and `data` is all measured then."""
        places = [write(tmp_path / f"{n}.jsonl", texts(30, begun=100 * n)) for n in range(3)]
        found = read(places[0], validation=places[1], test=places[2])
        assert [len(one) for one in all_hashes(found)] == [30, 30, 30]
        assert documents(found.validation)[0].startswith("text number 1")

    def test_the_other_tenth_stays(self, read: Read, tmp_path: Path) -> None:
        """With `validation` alone, the documents that would judge are measured, and those of the test are kept."""
        data, judge = write(tmp_path / "a.jsonl", texts(300)), write(tmp_path / "b.jsonl", texts(9, begun=1000))
        whole, found = read(data), read(data, validation=judge)
        assert found.test.hashes == whole.test.hashes
        assert frozenset(found.train.hashes) == frozenset(whole.train.hashes + whole.validation.hashes)

    def test_parts_are_cut_in_proportion(self, read: Read, tmp_path: Path) -> None:
        """`samples` rows are measured, and at most an eighth of them judges, as much is kept."""
        found = read(write(tmp_path / "a.jsonl", texts(1000)), samples=80)
        assert [len(part.tokens) for part in found.parts.values()] == [80, 10, 10]
        assert not list(found.notes())

    @pytest.mark.parametrize(("count", "said"), [(1, "1 document"), (3, "3 documents")], ids=["one", "three"])
    def test_a_part_without_documents_is_an_error(self, read: Read, count: int, said: str, tmp_path: Path) -> None:
        """The message has the number of documents, the part, and two ways out."""
        rows = [{"text": word * 9} for word in ("ab", "cd", "ef")][:count]
        expected = rf"a\.jsonl: of its {said} none .* the part (validation|test), .* give more documents, or "
        with pytest.raises(UsageError, match=expected):
            read(write(tmp_path / "a.jsonl", rows))

    def test_a_file_without_tokens_is_an_error(self, read: Read, tmp_path: Path) -> None:
        """A file that was given for a part is named."""
        (tmp_path / "b.txt").write_text("\n\n")
        with pytest.raises(UsageError, match=r"b\.txt: expected documents with at least 2 tokens, found none"):
            read(write(tmp_path / "a.jsonl", texts(100)), test=tmp_path / "b.txt")


class TestTheSame:
    """Documents that stand twice."""

    def test_within_the_data_the_second_is_left_out_and_counted(self, read: Read, tmp_path: Path) -> None:
        """Other blanks, or a text in two halves, make no other document."""
        rows = texts(100)
        again: list[dict[str, Any]] = [
            {"text": "text  number\n 7 of many "},
            {"prompt": "text number 8 ", "completion": "of many"},
            rows[9],
        ]
        once, twice = read(write(tmp_path / "a.jsonl", rows)), read(write(tmp_path / "b.jsonl", rows + again))
        assert (once.duplicates, twice.duplicates) == (0, 3)
        assert all_hashes(once) == all_hashes(twice)
        assert "left out, since the data has them already: 3 documents" in list(twice.notes())

    def test_in_the_data_of_two_parts_they_are_refused(self, read: Read, tmp_path: Path) -> None:
        """Both places are named, also where blanks differ and where the document would not be read."""
        data = write(tmp_path / "a.jsonl", texts(100))
        other = write(tmp_path / "b.jsonl", [{"text": "another one"}, {"text": "text number  61 of many"}])
        with pytest.raises(
            MalformedFile, match=r"b\.jsonl, line 2: .*train and validation: .*a\.jsonl, line 62; take it"
        ):
            read(data, validation=other, samples=1)
        with pytest.raises(MalformedFile, match=r"validation and test"):
            read(write(tmp_path / "c.jsonl", texts(9, begun=500)), validation=other, test=other)

    def test_chats_are_the_same_whatever_stands_beside_them(self, read: Read, tmp_path: Path) -> None:
        """Of a chat messages and tools count, keys in any order, nulls as if they were not there."""
        talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        same = [{"content": "a", "role": "user", "name": None}, {"role": "assistant", "content": " b"}]
        other = [*talk[:1], {"role": "assistant", "content": "c"}]
        rows: list[dict[str, Any]] = [{"messages": talk, "id": 1}, {"id": 2, "messages": same}, {"messages": other}]
        assert read(write(tmp_path / "a.jsonl", texts(60) + rows)).duplicates == 1

    def test_a_passage_tells_texts_that_are_cut_otherwise(self, read: Read, tmp_path: Path) -> None:
        """A paragraph of 100 characters in the text files of two parts is found, wherever their documents begin."""
        passages = [letters_of(n, 150) for n in range(300)]
        (tmp_path / "a.txt").write_text("\n\n".join(passages))
        (tmp_path / "b.txt").write_text("\n\n".join(["A heading", *passages[200:]]))
        with pytest.raises(MalformedFile, match=r"stands in the data of two parts, train and validation"):
            read(tmp_path / "a.txt", validation=tmp_path / "b.txt")


class TestRows:
    """How documents stand in rows."""

    def test_every_token_counts_but_padding_and_the_last(self, read: Read, tmp_path: Path) -> None:
        """Prompts count as completions do; the end of a text is not read, since no model reads it either."""
        rows = [{"prompt": f"ask {n}, ", "completion": f"answer {n}"} for n in range(100)]
        found = read(write(tmp_path / "a.jsonl", rows))
        said = sorted(text for part in found.parts.values() for text in documents(part))
        assert said == sorted(f"ask {n}, answer {n}" for n in range(100))
        assert found.train.count == int(found.train.real.sum()) < found.train.tokens.numel()

    def test_documents_of_a_row_do_not_see_one_another(self, read: Read, tmp_path: Path) -> None:
        """Each begins at position 0, and padding does; ids and positions are whole numbers of 64 bits."""
        part = read(write(tmp_path / "a.jsonl", [{"text": f"n{n}"} for n in range(100)])).train
        assert (part.tokens.dtype, part.positions.dtype, part.real.dtype) == (torch.int64, torch.int64, torch.bool)
        ended = torch.nonzero(~part.real)
        first = {row: int(column) for row, column in reversed(ended.tolist())}
        assert first
        assert all(part.positions[row, column] == 0 for row, column in first.items())
        assert len(documents(part)) == len(part.hashes) > len(part.tokens)

    def test_one_that_is_longer_than_a_row_goes_on_in_the_next(self, read: Read, tmp_path: Path) -> None:
        """No token of it is lost, a chat's neither; its hash stands once."""
        long = letters_of(0, 100)
        talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": long}]
        data = write(tmp_path / "a.jsonl", [{"text": long}, {"messages": talk}])
        beside = [write(tmp_path / f"{n}.jsonl", texts(2, begun=10 * n)) for n in range(2)]
        found = read(data, validation=beside[0], test=beside[1]).train
        said = documents(found)
        assert {long[:31], long[31:63], long[63:95], long[95:]} <= set(said)  # [BOS] takes a place
        assert max(len(one) for one in said) == 32
        assert "".join(said).count("g") == 2 * long.count("g")  # the template writes none
        assert len(found.hashes) == 2

    def test_of_a_long_text_no_more_is_tokenised_than_can_be_needed(
        self, letters: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """A text of megabytes takes the memory of the rows that are wanted, which are those that all of it gives."""
        data = write(tmp_path / "long.jsonl", [{"text": letters_of(0, 60_000)}])
        judge, kept = (write(tmp_path / f"{part}.jsonl", [{"text": part}]) for part in ("judge", "kept"))
        seen: list[int] = []

        class Counting:
            """Tokenises, and keeps how long texts were."""

            def __call__(self, given: list[str], **options: Any) -> Any:
                seen.extend(map(len, given))
                return letters(given, **options)

            def __getattr__(self, name: str) -> Any:
                return getattr(letters, name)

        def digest() -> str:
            options: dict[str, Any] = {"samples": 3, "length": 32, "vocabulary": len(letters)}
            return read_samples(data, Counting(), validation=judge, test=kept, **options).train.digest

        short = digest()
        assert max(seen) == 8 * 4 * 32
        monkeypatch.setattr(reading, "_BEGINNING", 10**6)
        assert short == digest()
        assert max(seen) == 60_000

    def test_less_than_was_asked_for_is_told(self, read: Read, tmp_path: Path) -> None:
        """The note has the tokens that were found, and the rows that were wanted."""
        found = read(write(tmp_path / "a.jsonl", texts(100)))
        note = next(found.notes())
        assert note.startswith(f"the data has {found.train.count:,} tokens to measure in ")
        assert "asks for 1,000 rows of 32" in note

    def test_a_digest_tells_of_every_token(self, read: Read, tmp_path: Path) -> None:
        """Another letter in one document is another digest of its part, and of no other."""
        rows = texts(100)
        before = read(write(tmp_path / "a.jsonl", rows))
        kept = [{"text": text} for text in documents(before.test)]
        other = write(tmp_path / "b.jsonl", [*kept[:-1], {"text": kept[-1]["text"] + "!"}])
        same = write(tmp_path / "c.jsonl", kept)
        data = write(tmp_path / "d.jsonl", texts(30, begun=200))
        judge = write(tmp_path / "e.jsonl", texts(30, begun=300))
        ours, theirs = (read(data, validation=judge, test=file) for file in (same, other))
        assert ours.test.digest != theirs.test.digest
        assert (ours.train.digest, ours.validation.digest) == (theirs.train.digest, theirs.validation.digest)

    def test_characters_that_the_tokenizer_passes_over_are_told(self, read: Read, tmp_path: Path) -> None:
        """A note shows them."""
        found = read(write(tmp_path / "a.jsonl", [{"text": f"caf\u00e9 {n}"} for n in range(60)]))
        assert "the tokenizer does not know these characters: 'é'" in list(found.notes())


class TestChats:
    """Conversations, by the checkpoint's chat template."""

    @pytest.fixture
    def beside(self, tmp_path: Path) -> dict[str, Path]:
        """Data for the parts that nothing is asked of."""
        return {
            name: write(tmp_path / f"{name}.jsonl", texts(3, begun=n * 10))
            for n, name in enumerate(("validation", "test"))
        }

    @pytest.fixture
    def thoughtful(self, tmp_path: Path) -> Path:
        """A conversation of two turns, both thought about."""
        turns = [("2+2", "TWO", "4"), ("3+3", "THREE", "6")]
        messages = [
            message
            for asked, thought, said in turns
            for message in (
                {"role": "user", "content": asked},
                {"role": "assistant", "content": said, "reasoning_content": thought},
            )
        ]
        return write(tmp_path / "talk.jsonl", [{"messages": messages}])

    def test_all_that_the_template_writes_counts(self, read: Read, beside: Any, tmp_path: Path) -> None:
        """System, tools, questions and answers, up to what ends the last answer."""
        tool = {"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}
        talk = [
            *({"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}),
            {"role": "assistant", "content": "Hello"},
        ]
        data = write(tmp_path / "a.jsonl", [{"messages": talk, "tools": [tool]}])
        (said,) = documents(read(data, **beside, length=2000).train)
        assert "Be kind." in said
        assert "find" in said
        assert said.endswith("Hi<|im_end|><|im_assistant|>assistant<|im_middle|><think></think>Hello<|im_end|")

    def test_reasoning_that_the_template_drops_is_read_where_it_was_asked_for(
        self, read: Read, beside: Any, thoughtful: Path
    ) -> None:
        """Each turn is read once more with its reasoning; the conversation is one document, and a note says so."""
        found = read(thoughtful, **beside, length=2000)
        first, second = documents(found.train)
        assert "<think>TWO</think>4" in first
        assert "<think>THREE</think>6" in second
        assert "TWO" not in second
        assert len(found.train.hashes) == 1
        assert any("drops reasoning: 1 conversation; each such turn is read as it" in note for note in found.notes())

    def test_or_it_is_left_out(self, read: Read, beside: Any, thoughtful: Path) -> None:
        """With `reasoning=drop` the conversation is read once, as the template writes it."""
        found = read(thoughtful, **beside, length=2000, reasoning="drop")
        (said,) = documents(found.train)
        assert "TWO" not in said
        assert "THREE" not in said
        assert any("1 conversation; it is left out" in note for note in found.notes())

    def test_a_template_without_a_place_for_it_is_told_with_the_way_out(
        self, read: Read, beside: Any, thoughtful: Path, letters: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The message names the argument of this function, and no key of a training's job."""
        plain = (
            "{% for one in messages %}<|{{ one.role }}|>{{ one.content }}{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}"
        )
        monkeypatch.setattr(letters, "chat_template", plain)
        with pytest.raises(MalformedFile, match=r"no place for the reasoning.*`reasoning=drop`") as caught:
            read(thoughtful, **beside)
        assert "`data: " not in str(caught.value)
        assert read(thoughtful, **beside, reasoning="drop").train.count

    def test_without_a_template_they_are_refused(
        self, read: Read, beside: Any, thoughtful: Path, letters: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As a training refuses them."""
        monkeypatch.setattr(letters, "chat_template", None)
        with pytest.raises(CheckpointError, match="no chat template"):
            read(thoughtful, **beside)

    def test_weightless_ones_are_counted(self, read: Read, beside: Any, tmp_path: Path) -> None:
        """A conversation whose turns all have weight 0 is no document, and a note has their number."""
        talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]
        found = read(write(tmp_path / "a.jsonl", [*texts(20, begun=90), {"messages": talk}]), **beside)
        assert len(found.train.hashes) == 20
        assert "left out, since no turn of theirs has weight: 1 conversation" in list(found.notes())


class TestBadData:
    """What cannot be read."""

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({"samples": 0}, r"`samples=`: expected at least 1, found 0"),
            ({"samples": True}, r"`samples=`: expected at least 1, found True"),
            ({"length": 1}, r"`length=`: expected at least 2, found 1"),
            ({"reasoning": "skip"}, r"unknown `reasoning=` 'skip'; expected split, drop"),
            ({"validation": "nowhere.jsonl"}, r"'nowhere.jsonl': no such file"),
        ],
    )
    def test_options_that_make_no_sense(self, read: Read, options: Any, expected: str, tmp_path: Path) -> None:
        """Each is named."""
        with pytest.raises(UsageError, match=expected):
            read(write(tmp_path / "a.jsonl", texts(50)), **options)

    def test_a_file_whose_ending_says_nothing(self, read: Read, tmp_path: Path) -> None:
        """An array of JSON would be read as prose, so endings decide, and a table of others is named."""
        (tmp_path / "a.json").write_text("[]")
        with pytest.raises(UsageError, match=r"a\.json: expected a file of rows, \*\.jsonl, or of plain text, \*\.txt"):
            read(tmp_path / "a.json")

    def test_a_folder_with_nothing_to_read(self, read: Read, tmp_path: Path) -> None:
        """So is an empty folder; hidden files do not count."""
        (tmp_path / ".a.jsonl").write_text("")
        with pytest.raises(UsageError, match="in the folder, found none"):
            read(tmp_path)

    def test_a_link_out_of_the_folder(self, read: Read, tmp_path: Path) -> None:
        """As for a training."""
        write(tmp_path / "a.jsonl", texts(3))
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "b.jsonl").symlink_to(tmp_path / "a.jsonl")
        with pytest.raises(UnsafePath):
            read(tmp_path / "data")

    @pytest.mark.parametrize(
        "line",
        [
            "{",
            '{"text": 1}',
            '{"prompt": "a"}',
            '{"messages": "a"}',
            '{"text": ""}',
            pytest.param('{"messages": ' + 700 * "[" + 700 * "]" + "}", id="deeper than Python goes"),
        ],
    )
    def test_a_line_that_is_no_example(self, read: Read, line: str, tmp_path: Path) -> None:
        """File and line are named."""
        (tmp_path / "a.jsonl").write_text(f"{line}\n{json.dumps(texts(1)[0])}\n")
        beside = [write(tmp_path / f"{n}.jsonl", texts(3, begun=10 * n)) for n in (1, 2)]
        with pytest.raises(MalformedFile, match=r"a\.jsonl, line 1"):
            read(tmp_path / "a.jsonl", validation=beside[0], test=beside[1])

    def test_another_models_tokenizer(self, read: Read, tmp_path: Path) -> None:
        """An id beyond the model's vocabulary is refused."""
        with pytest.raises(MalformedFile, match="a token that the model does not have"):
            read(write(tmp_path / "a.jsonl", texts(50)), vocabulary=10)


class TestDatasets:
    """What comes from the `datasets` library."""

    def test_data_and_judge_are_splits(self, read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
        """`data` is the split that is asked for; what judges and what is kept are those of these names."""
        calls: list[tuple[str, str, str | None]] = []

        class Table(list[dict[str, Any]]):
            column_names = ("text", "url")

            def select_columns(self, names: list[str]) -> Table:
                return Table({name: row[name] for name in names} for row in self)

        def load(path: str, *, name: str | None, split: str) -> Table:
            calls.append((path, split, name))
            return Table({"text": f"{split} {n}", "url": n} for n in range(4))

        monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load))
        found = read("org/name", validation="org/name", test="org/other", split="large", config_name="en")
        assert calls == [
            *(("org/name", "large", "en"), ("org/name", "validation", "en")),
            ("org/other", "test", "en"),
        ]
        assert sorted(documents(found.train)) == [f"large {n}" for n in range(4)]

    def test_the_missing_library_is_named(self, read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
        """With what installs it."""
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(MissingExtra, match="org/name does not exist here"):
            read("org/name")
