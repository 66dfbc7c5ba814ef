"""Texts with prompts: what is scored of them, how long ones are cut, and which rows are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from k2quant.errors import MalformedFile, UsageError
from k2quant.model.passes.texts import read_text
from k2quant.nano import vocabulary


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> object:
    """Nano-K2's: a character is a token, and every text begins with BOS."""
    folder = tmp_path_factory.mktemp("tokenizer")
    for name, data in vocabulary.files().items():
        (folder / name).write_bytes(data)
    return AutoTokenizer.from_pretrained(folder)


def _rows(folder: Path, *rows: object) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _pair(prompt: str, completion: str) -> dict[str, str]:
    return {"prompt": prompt, "completion": completion, "family": "of no matter"}


def _letters(text: str) -> list[int]:
    return [0, *vocabulary.encode(text)]


def test_completions_alone_are_scored(tmp_path: Path, tokenizer: object) -> None:
    """A row is a chunk: its prompt is context, each token of its completion a prediction; of a text all are."""
    path = _rows(
        tmp_path, _pair("Rabc=", "cba"), _pair("S21=", "12xyz"[:4]), {"text": "plain ab"}, _pair("", "longer one")
    )
    text = read_text(path, tokenizer)
    assert [batch.tolist() for batch in text.batches] == [
        [_letters("Rabc=cba"), _letters("S21=12xy"), _letters("plain ab")],
        [_letters("longer one")],
    ]
    assert [scored.sum(1).tolist() for scored in text.scored] == [[3, 4, 8], [10]]
    assert text.scored[0][0].tolist() == [False] * 5 + [True] * 3
    assert (text.chunks, text.predictions, text.completions) == (4, 25, True)


def test_plain_texts_are_scored_whole(tmp_path: Path, tokenizer: object) -> None:
    """Whatever the name of a file without prompts, every token but the first is predicted."""
    (tmp_path / "text.json").write_text('{"prompt": "a", "completion": "b"}')
    text = read_text(tmp_path / "text.json", tokenizer)
    assert (text.predictions, text.completions) == (34, False)
    assert not read_text(_rows(tmp_path, {"text": "abc"}), tokenizer).completions


def test_what_is_scored_is_a_part_of_the_hash(tmp_path: Path, tokenizer: object) -> None:
    """The same tokens with another prompt are another text; without one they are the plain text."""
    (tmp_path / "plain").write_text("abcdef")
    plain = read_text(tmp_path / "plain", tokenizer).hash
    hashes = [read_text(_rows(tmp_path, _pair("abcdef"[:end], "abcdef"[end:])), tokenizer).hash for end in (0, 2, 3)]
    assert hashes[0] == plain
    assert len(set(hashes)) == 3


def test_long_rows_keep_their_completions(tmp_path: Path, tokenizer: object) -> None:
    """The beginning of a prompt goes first, but for half a chunk of it; the end of a completion goes then."""
    path = _rows(tmp_path, _pair("abcdefghij", "123"), _pair("abcdefghij", "1234567890"), _pair("ab", "1234567890"))
    text = read_text(path, tokenizer, context=9)
    assert [batch.tolist() for batch in text.batches] == [
        [_letters("fghij123"), _letters("ghij1234"), _letters("ab123456")]
    ]
    assert text.scored[0].sum(1).tolist() == [3, 4, 6]


def test_what_cannot_fit_into_a_chunk_never_becomes_tokens(tmp_path: Path, tokenizer: Any) -> None:
    """A prompt of millions of letters keeps its end, a completion its beginning; the tokenizer gets 64 a token."""
    seen: list[int] = []

    def counting(parts: Any, **options: Any) -> Any:
        seen.extend(map(len, [parts] if isinstance(parts, str) else parts))
        return tokenizer(parts, **options)

    counting.bos_token_id = tokenizer.bos_token_id  # type: ignore[attr-defined]
    path = _rows(tmp_path, _pair("a" * 10**6 + "bcdefgh", "1234" + "5" * 10**6))
    text = read_text(path, counting, context=9)
    assert [batch.tolist() for batch in text.batches] == [[_letters("efgh1234")]]
    assert max(seen) == 9 * 64


def test_rows_are_read_whole_and_no_more_than_asked_for(tmp_path: Path, tokenizer: object) -> None:
    """The limit counts prompts; what lies behind it is not even parsed."""
    path = _rows(tmp_path, *[_pair("abcd=", "abc")] * 4)
    assert read_text(path, tokenizer, limit_tokens=26).chunks == 3
    assert read_text(path, tokenizer, limit_tokens=3).chunks == 1
    path.write_text(path.read_text() * 10 + "no row")
    assert read_text(path, tokenizer, limit_tokens=3).chunks == 1


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            '{"prompt": "a", "answer": "b"}',
            r"line 2: not a text, expected .*completion.*, found prompt \(str\), answer",
        ),
        ('{"prompt": 3, "completion": "b"}', r"found prompt \(int\)"),
        ('{"messages": []}', r"found messages \(list\)"),
        ("{}", "found no keys"),
        ('{"prompt": "a", "completion": ""}', "line 2: an empty completion"),
        ('["a", "b"]', "line 2: not a JSON object"),
        ("plain words", "line 2: not valid JSON"),
        ('{"text": "a", "text": "b"}', "duplicate key"),
        ('{"text": "\\ud800"}', "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_what_is_no_row_is_refused(row: str, reason: str, tmp_path: Path, tokenizer: object) -> None:
    """File and line are named, and what a row is."""
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"text": "abcdef"}}\n{row}\n')
    with pytest.raises(MalformedFile, match=reason):
        read_text(path, tokenizer)


def test_rows_with_nothing_to_predict_are_refused(tmp_path: Path, tokenizer: object) -> None:
    """An empty file, and completions of which the tokenizer makes no token."""
    with pytest.raises(UsageError, match="found 0"):
        read_text(_rows(tmp_path), tokenizer)
    with pytest.raises(UsageError, match="completions of at least 3 tokens, found 0"):
        read_text(_rows(tmp_path, _pair("abc", "üü"), _pair("abc", "村")), tokenizer)
