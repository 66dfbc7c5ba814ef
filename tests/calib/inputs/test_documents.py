"""Files as documents, and which of more than are needed are read."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from k2quant.calib.inputs import texts
from k2quant.calib.inputs.arranging import arranged, pieces
from k2quant.calib.inputs.choosing import Pool, held_out_rows
from k2quant.calib.inputs.documents import Raw, documents, hash_of
from k2quant.data.packing import NO_TARGET, Document, pack
from k2quant.data.sources import DataSource
from k2quant.errors import MalformedFile


def untold(_done: int, _total: int) -> None:
    """Take progress."""


def raw(number: int, letters: int) -> Raw:
    """Return a document with a hash of its own."""
    row = {"text": f"{number}"}
    return Raw(where=f"{number}", row=row, hash=hash_of(row), letters=letters)


class TestTexts:
    """Plain text."""

    def test_a_file_is_cut_at_the_first_blank_line_after_4000_characters(self, tmp_path: Path) -> None:
        """So documents are long enough that most of their tokens have something before them."""
        (tmp_path / "a.txt").write_text("".join(f"{n:>999}\n\n" for n in range(10)))
        found = list(texts.cut(tmp_path / "a.txt"))
        assert [(line, len(text)) for line, text in found] == [(1, 4004), (9, 4004), (17, 2002)]

    def test_without_blank_lines_it_is_cut_at_a_line(self, tmp_path: Path) -> None:
        """After 16,000 characters any line ends a document."""
        (tmp_path / "a.txt").write_text("".join(f"{n:>999}\n" for n in range(20)))
        assert [len(text) for _, text in texts.cut(tmp_path / "a.txt")] == [16_000, 4_000]

    @given(text=st.text(alphabet="ab \n", max_size=200))
    def test_nothing_is_lost_by_cutting(self, text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
        """The documents side by side are the file, and lines are counted right."""
        file = tmp_path_factory.mktemp("text") / "a.txt"
        file.write_text(text)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(texts, "_LEAST", 10)
            patch.setattr(texts, "_MOST", 30)
            found = list(texts.cut(file))
        assert "".join(part for _, part in found) == text
        assert all(text.split("\n")[line - 1 :][0] == part.split("\n")[0] for line, part in found if part)

    def test_a_file_of_a_folder_is_one_document(self, tmp_path: Path) -> None:
        """However long it is; rows of JSON Lines beside it are documents of their own."""
        (tmp_path / "a.txt").write_text("word " * 5000)
        (tmp_path / "b.md").write_text("# Heading\n\nText")
        (tmp_path / "c.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
        told: list[tuple[int, int]] = []
        found = list(documents(DataSource(path=str(tmp_path)), lambda done, total: told.append((done, total))))
        assert [one.where.rpartition("/")[2] for one in found] == [
            *("a.txt, line 1", "b.md, line 1", "c.jsonl, line 1", "c.jsonl, line 2")
        ]
        total = sum(path.stat().st_size for path in tmp_path.iterdir())
        assert told[-1] == (total, total)
        assert [done for done, _ in told] == sorted(done for done, _ in told)

    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            (b"a\nb\0", r"a\.txt, line 2: no plain text, expected UTF-8, found a character of code 0"),
            (b"a\n\xff", r"a\.txt, line 2: no plain text, expected UTF-8, found byte 0xff"),
            ("a".encode("utf-16"), "UTF-8"),
        ],
    )
    def test_what_is_no_text_is_refused(self, content: bytes, expected: str, tmp_path: Path) -> None:
        """File and line are named."""
        (tmp_path / "a.txt").write_bytes(content)
        with pytest.raises(MalformedFile, match=expected):
            list(documents(DataSource(path=str(tmp_path / "a.txt")), untold))

    def test_a_mark_of_byte_order_is_no_text(self, tmp_path: Path) -> None:
        """Editors put it there."""
        (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
        (found,) = documents(DataSource(path=str(tmp_path / "a.txt")), untold)
        assert found.row == {"text": "one"}

    def test_a_file_too_long_to_be_one_document_is_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The message says that it can be cut."""
        monkeypatch.setattr(texts, "_LIMIT", 100)
        (tmp_path / "a.txt").write_text("word\n" * 30)
        with pytest.raises(MalformedFile, match=r"line 21: too long, .*give the file by itself"):
            list(documents(DataSource(path=str(tmp_path)), untold))
        assert len(list(documents(DataSource(path=str(tmp_path / "a.txt")), untold))) == 1


class TestHashes:
    """By what a document is known."""

    def test_it_is_the_sha256_of_the_text_with_single_blanks(self) -> None:
        """Written out, so that those of old folders of statistics stay comparable."""
        expected = "8ab63e29a4ba14e4e1688f9c15e5af90895421358c945b0431f85d66977bd3d2"
        rows: list[dict[str, Any]] = [{"text": " one\n\ttwo "}, {"prompt": "one ", "completion": "two"}]
        assert {hash_of(row) for row in rows} == {expected}

    @given(st.integers(1, 200).map(lambda count: [(n, 1 + n % 7) for n in range(count)]), st.integers(1, 300))
    def test_a_pool_keeps_the_smallest_that_are_enough(self, sizes: list[tuple[int, int]], enough: int) -> None:
        """It keeps what sorting all documents and taking the first that are enough would."""
        pool = Pool(letters=enough)
        for size in sizes:
            pool.add(raw(*size))
        ranked = sorted((raw(*size) for size in sizes), key=lambda one: one.hash)
        wanted = [one for place, one in enumerate(ranked) if sum(r.letters for r in ranked[:place]) < enough]
        assert pool.documents() == wanted


def document(count: int) -> Document:
    """Return a document of so many tokens, all of which count."""
    return Document(tokens=np.arange(count, dtype=np.int32), learnt=np.ones(count, np.bool_), divisible=True)


class TestRows:
    """How documents fill rows."""

    @given(st.lists(st.integers(1, 30), max_size=60))
    def test_packed_in_order_they_stand_in_the_rows_that_were_meant(self, sizes: list[int]) -> None:
        """Each document once; two rows side by side hold more than one, so more than half of all places are full."""
        order = arranged(sizes, 30)
        assert sorted(order) == list(range(len(sizes)))
        rows = pack([document(sizes[n] + 1) for n in order], length=30, padding=0)
        assert rows.documents == len(sizes)
        full = np.count_nonzero(rows.targets.numpy() != NO_TARGET, axis=1)
        assert all(one + other > 30 for one, other in pairwise(full.tolist()))

    def test_few_places_are_left_empty(self) -> None:
        """Of 2,000 documents of any size up to a row, rows are full to 94 %; in their own order to 75 %."""
        sizes = np.random.default_rng(0).integers(1, 2048, 2000).tolist()
        rows = [
            len(pack((document(sizes[n] + 1) for n in order), length=2048, padding=0).tokens)
            for order in (range(2000), arranged(sizes, 2048))
        ]
        assert [round(sum(sizes) / (count * 2048), 2) for count in rows] == [0.75, 0.94]

    @given(st.integers(1, 100), st.integers(2, 30))
    def test_pieces_are_what_packing_cuts(self, count: int, length: int) -> None:
        """A document in pieces makes the rows that it makes whole."""
        whole = pack([document(count)], length=length, padding=0)
        cut = pack(pieces(document(count), length), length=length, padding=0)
        assert whole.digest == cut.digest


def test_small_parts_have_an_eighth_of_the_rows() -> None:
    """A tenth beside eight tenths; at least one row."""
    assert [held_out_rows(count) for count in (1, 8, 20, 512)] == [1, 1, 2, 64]
