"""Files of samples: what is kept of each answer, what is read again, and which files are refused."""

from __future__ import annotations

import hashlib
import json
import os
import random
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k2quant.errors import MalformedResults
from k2quant.eval.runs.columns import columns_of
from k2quant.eval.runs.samples import read_samples

Rows = Sequence[dict[str, Any]]


def sha(text: object) -> str:
    """Return a hash as lm-eval writes it."""
    return hashlib.sha256(str(text).encode()).hexdigest()


def row(number: int, *, right: bool = True, **changes: Any) -> dict[str, Any]:
    """Return a line of samples: document `number`, answered in words."""
    return {
        "doc_id": number,
        "target": "yes",
        "arguments": {"gen_args_0": {"arg_0": f"ask {number}", "arg_1": {"until": ["\n"]}}},
        "resps": [["yes" if right else "no"]],
        "filtered_resps": ["yes" if right else "no"],
        "filter": "none",
        "metrics": ["exact_match"],
        "doc_hash": sha(number),
        "prompt_hash": sha("ask"),
        "target_hash": sha("yes"),
        "exact_match": float(right),
    } | changes


def written(path: Path, rows: Rows) -> Path:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return where a file of samples goes."""
    return tmp_path / "samples_t.jsonl"


def repeated(answers: Sequence[Sequence[bool]], **changes: Any) -> list[dict[str, Any]]:
    """Return the rows of items that were asked several times: for each item, which of its answers are right."""
    return [
        row(number, right=right, repeat=repeat, **changes)
        for number, item in enumerate(answers)
        for repeat, right in enumerate(item)
    ]


CHAT = [
    {"role": "user", "content": "2+2?\n"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "3+3?"},
]


@pytest.mark.parametrize(
    ("prompt", "shown"),
    [
        (json.dumps(CHAT), "user: 2+2?\n\nassistant: 4\nuser: 3+3?"),
        ('[{"role": "user", "content": "a\\ud83d"}]', "user: a?"),
        ('[{"role": "user"}]', '[{"role": "user"}]'),
        ('[{"role": "user", "content": 1', '[{"role": "user", "content": 1'),
        ('[{"role": "' + "[" * 100_000, "["),
        ("[1]", "[1]"),
    ],
)
def test_chat_messages_are_shown_as_what_was_said(path: Path, prompt: str, shown: str) -> None:
    """lm-eval writes them as JSON within a list; what only begins like them, or says half a character, is shown too."""
    rows = [row(0, arguments={"gen_args_0": {"arg_0": [prompt], "arg_1": {}}})]
    (item,) = read_samples(written(path, rows)).items
    assert item.prompt.startswith(shown)
    item.prompt.encode()


def test_answers_are_read_again_from_their_place(path: Path) -> None:
    """By number, by slice or one after another, whatever the order of the lines; their texts are those of the file."""
    rows = [row(number, right=number % 3 > 0, target=f"target {number}") for number in range(20)]
    random.Random(1).shuffle(rows)  # noqa: S311  an order for a test
    items = read_samples(written(path, rows)).items
    assert [item.doc_id for item in items] == list(range(20))
    assert (items[7].target, items[7].prompt, items[7].answer, items[7].right) == ("target 7", "ask 7", "yes", True)
    assert [item.target for item in items[3:5]] == ["target 3", "target 4"]
    assert items[-1] == items[19]
    with pytest.raises(IndexError):
        items[20]


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_columns_are_those_of_the_items(
    tmp_path_factory: pytest.TempPathFactory, answers: list[tuple[bool, bool]], shuffled: random.Random
) -> None:
    """What is kept while a file is read is what its items, read again, come to."""
    rows = [
        row(number, right=right, repeat=repeat, cut_in_thought=cut)
        for number, (right, cut) in enumerate(answers)
        for repeat in (0, 1)
    ]
    shuffled.shuffle(rows)
    items = read_samples(written(tmp_path_factory.mktemp("run") / "samples.jsonl", rows)).items
    kept, found = items.columns, columns_of(tuple(items))
    assert (kept.repeats, kept.looked) == (found.repeats, found.looked) == (2, True)
    for name in ("doc_id", "document", "key", "output", "right", "cut", "hollow", "choices"):
        assert getattr(kept, name).tolist() == getattr(found, name).tolist(), name


def test_a_large_file_takes_a_hundred_bytes_an_answer(path: Path) -> None:
    """Of 6,000 answers of 3 kB each no text stays: 150 bytes an answer at the peak, where the texts have 18 MB."""
    count, words = 6_000, "word " * 600
    with path.open("w") as file:
        for number in range(count):
            file.write(json.dumps(row(number, arguments=[[f"{number} {words}", {}]])) + "\n")
    read_samples(written(path.with_name("small.jsonl"), [row(0)]))  # what is loaded once
    tracemalloc.start()
    try:
        samples = read_samples(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(samples.items) == count
    assert peak < 150 * count + 300_000  # a line and what is made of it


@pytest.mark.parametrize(
    ("asked", "shown"),
    [
        (['[{"role": "system", "content": "s"}, {"role": "user", "content": "1+1=\\n"}]'], "system: s\nuser: 1+1=\n"),
        ('[{"role": "user", "content": "1+1="}]', "user: 1+1="),
        (["ask"], "ask"),
        ('[{"role": "user"}]', '[{"role": "user"}]'),
        ("[{x", "[{x"),
        ('[{"role": "user", "content": "a"}], "messages": [1', '[{"role": "user", "content": "a"}], "messages": [1'),
        ("[{" * 9999, ("[{" * 9999)[-600:]),
        (r'[{"role": "\ud800", "content": "a"}]', "?: a"),
    ],
)
def test_chat_messages_are_shown_as_words(asked: Any, shown: str, path: Path) -> None:
    """A server's prompt is a list of messages in JSON; people read who said what. Any other text stays as it is."""
    arguments = {"gen_args_0": {"arg_0": asked, "arg_1": {"until": ["\n"]}}}
    items = read_samples(written(path, [row(0, arguments=arguments)])).items
    assert items[0].prompt == shown


@pytest.mark.parametrize("change", ["longer", "same length", "gone"])
def test_a_file_that_changed_since_is_not_read_again(change: str, path: Path) -> None:
    """Nobody is shown a text that was not counted."""
    items = read_samples(written(path, [row(0), row(1)])).items
    before = path.stat()
    if change == "gone":
        path.unlink()
    elif change == "longer":
        written(path, [row(0), row(1), row(2)])
    else:  # even with the old time of change
        path.write_text(path.read_text().replace("ask 1", "ash 1"))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(MalformedResults, match="cannot be read" if change == "gone" else "changed since it was read"):
        items[1]


def test_each_answer_of_an_item_counts(path: Path) -> None:
    """Three items of two answers are six, those of an item together; all of them make the accuracy."""
    columns = read_samples(written(path, repeated([(True, False), (True, True), (False, False)])[::-1])).items.columns
    assert (columns.items, columns.repeats) == (3, 2)
    assert columns.counted(columns.right).tolist() == [1, 2, 0]


def test_a_row_without_a_repeat_is_the_first(path: Path) -> None:
    """As lm-eval writes it."""
    columns = read_samples(written(path, [row(0), row(0, repeat=1, right=False)])).items.columns
    assert (columns.items, columns.repeats, columns.looked) == (1, 2, False)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row(0), row(1), row(0)], "document 0 stands twice.*two runs mixed"),
        ([*repeated([(True, True)] * 2), row(1, repeat=1)], "document 1, repeat 1, stands twice"),
        (repeated([(True, True), (True,)]), "asked equally often, expected 2.*found 1 to document 1"),
        ([row(0, repeat=1)], "not every item was asked equally often"),
        ([row(0), row(0, repeat=1, arguments=[["other", {}]])], "repeats of document 0 were asked in other words"),
        ([row(0, repeat=-1)], "no sample of lm-eval.*repeat -1"),
        ([row(0, repeat=True)], "no sample of lm-eval.*repeat True"),
        ([row(0, cut_in_thought="no")], "no sample of lm-eval.*cut_in_thought 'no'"),
        ([row(0, cut_in_thought=1)], "no sample of lm-eval.*cut_in_thought 1"),
    ],
)
def test_repeats_that_do_not_fit_are_refused(rows: Rows, message: str, path: Path) -> None:
    """With the document that does not."""
    with pytest.raises(MalformedResults, match=message):
        read_samples(written(path, rows))


def test_the_line_that_stands_twice_is_named(path: Path) -> None:
    """Counted in the file, lines of other filters and all."""
    rows = [row(0), row(0, filter="other"), row(1), row(2), row(1, filter="other"), row(1)]
    with pytest.raises(MalformedResults, match=r"samples_t\.jsonl, line 6.*document 1 stands twice"):
        read_samples(written(path, rows))


def test_an_answer_cut_in_thought_is_wrong(path: Path) -> None:
    """Whatever its metric says, be it no number: and it is no reason to take another metric, nor an empty output."""
    rows = [
        row(0, cut_in_thought=False),
        row(1, cut_in_thought=True, resps=[[""]]),
        row(2, cut_in_thought=True, exact_match=None),
    ]
    samples = read_samples(written(path, rows))
    columns = samples.items.columns
    assert (samples.metric, columns.looked) == ("exact_match", True)
    assert columns.right.tolist() == [True, False, False]
    assert columns.cut.tolist() == [False, True, True]
    assert not columns.hollow.any()
    assert [item.right for item in samples.items] == [True, False, False]


def test_the_first_metric_that_is_binary_throughout_is_taken(path: Path) -> None:
    """One grade, however late, rules a metric out; if none is left each is named with its first grade."""

    def rows(last: Any) -> Rows:
        scores: Callable[[int], dict[str, Any]] = lambda number: {"f1": float(number < 2) or 0.5, "acc": 1, "em": 0}  # noqa: E731
        return [
            row(
                number,
                metrics=["f1", "acc", "em"],
                **scores(number) | ({"em": last, "acc": last} if number == 3 else {}),
            )
            for number in range(4)
        ]

    samples = read_samples(written(path, rows(1)))
    assert (samples.metric, samples.items.columns.right.tolist()) == ("acc", [True] * 4)
    with pytest.raises(MalformedResults, match=r"no metric says.*f1 0\.5, acc 0\.7, em 0\.7"):
        read_samples(written(path, rows(0.7)))
