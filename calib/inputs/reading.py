"""`read_samples`: data as people have it, as three parts of rows."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np

from k2quant.calib.inputs.arranging import arranged, pieces
from k2quant.calib.inputs.choosing import Parts, Pool, check_rows, held_out_rows
from k2quant.calib.inputs.documents import Progress, Raw, documents
from k2quant.calib.inputs.samples import PARTS, Part, Samples
from k2quant.data import packing
from k2quant.data.examples import examples_of
from k2quant.data.learning import Census, Learning
from k2quant.data.packing import Document
from k2quant.data.sources import DataSource
from k2quant.data.tokens import Reader
from k2quant.errors import MalformedFile, UsageError
from k2quant.ground.units import counted, one_of

Reasoning = Literal["split", "drop"]

_LETTERS = 64
"""Characters that are kept for each token that is wanted; a real token has about four."""
_BEGINNING = 8
"""Characters of a long text that are read first for each token that is wanted: a tokenizer takes some 100 bytes for a
token, so what nobody asks for of a text of 60 MB would take gigabytes."""


def read_samples(
    data: str | os.PathLike[str],
    tokenizer: Any,
    *,
    samples: int,
    length: int,
    vocabulary: int,
    validation: str | os.PathLike[str] | None = None,
    test: str | os.PathLike[str] | None = None,
    split: str = "train",
    config_name: str | None = None,
    reasoning: Reasoning = "split",
    progress: Progress | None = None,
) -> Samples:
    """Read data, part it by document, and pack it into rows of tokens.

    A document is a row of JSON Lines or of a dataset, a file of plain text in a folder, or a piece of a single file of
    plain text, which is cut at the first blank line after 4,000 characters. The last token of one is not read, nor is
    it when a model answers. One that is longer than a row goes on in the next. All of it counts: prompts too, and of a
    chat whatever the template writes up to the end of the last turn of the assistant.

    A document goes to `validation` or to `test`, a tenth of them each, by its hash: see `documents.hash_of`. What
    stands beside it, or before it, plays no part. Of more than are needed those of the smallest hashes are read, which
    is a sample of all the data, and the same one in whatever order that stands.

    Args:
        data: a file in JSON Lines, `*.jsonl`, or of plain text, `*.txt`, `*.text`, `*.md` or `*.raw`; a folder of such
            files; or a dataset, `org/name`.
        tokenizer: of transformers; its chat template renders `messages`.
        samples: rows of `train`, at most. `validation` and `test` get at most an eighth of that each.
        length: tokens of a row, at least 2.
        vocabulary: rows of the model's embedding; token ids lie below.
        validation: data of its own in place of a tenth of `data`; of a dataset, the split of that name.
        test: likewise.
        split: of `data`, where that is a dataset.
        config_name: of datasets that have several.
        reasoning: what becomes of reasoning in earlier turns of a chat that the template does not write there:
            `split`, each such turn is read once more as it is asked for, with its reasoning; or `drop`.
        progress: called while reading, for each data anew.

    Raises:
        UsageError: there is no such file, folder or dataset, an option makes no sense, or a part gets no document.
        UnsafePath: a file of a folder is a link out of it.
        MalformedFile: a file, a line or a dataset is not what it should be, or a document stands in two parts' data.
        CheckpointError: the tokenizer cannot read it, or lacks the end-of-text token or the chat template.
        MissingExtra: a source is a dataset, and `datasets` is not installed.
    """
    check_rows(samples, length)
    one_of("`reasoning=`", reasoning, get_args(Reasoning))
    sources = {"train": DataSource(path=os.fspath(data), split=split, config=config_name)}
    for part, place in (("validation", validation), ("test", test)):
        if place is not None:
            sources[part] = DataSource(path=os.fspath(place), split=part, config=config_name)
    rows = {part: samples if part == "train" else held_out_rows(samples) for part in PARTS}
    parts = _parted(sources, {part: count * length for part, count in rows.items()}, progress)
    maker = _Packing(tokenizer, vocabulary, length, reasoning)
    made = {part: maker.part(parts.pools[part].documents(), rows[part]) for part in PARTS}
    for part in PARTS:
        if not made[part].hashes:
            raise _empty(part, parts, sources)
    return Samples(
        **made,
        wanted=samples,
        duplicates=parts.duplicates,
        reasoning=reasoning,
        census=maker.census,
        unread=maker.reader.unread(),
    )


def _parted(sources: dict[str, DataSource], tokens: dict[str, int], progress: Progress | None) -> Parts:
    pools = {part: Pool(letters=count * _LETTERS) for part, count in tokens.items()}
    parts = Parts(pools=pools, given=frozenset(sources) - {"train"})
    for part, source in sources.items():
        for document in documents(source, progress or _untold):
            parts.add(document, part)
    return parts


def _untold(_done: int, _total: int) -> None:
    """Tell nobody of any progress."""


class _Packing:
    """Makes rows of documents."""

    def __init__(self, tokenizer: Any, vocabulary: int, length: int, reasoning: Reasoning) -> None:
        self.census = Census()
        self.reader = Reader(tokenizer=tokenizer, vocabulary=vocabulary)
        self._length = length
        self._learning = Learning(reasoning=reasoning)

    def part(self, raw: list[Raw], count: int) -> Part:
        """Return the first rows that documents fill, and the hashes of those that stand in them."""
        found: list[tuple[Document, str]] = []
        filled = 0
        for document in raw:
            read = self._tokens(document, count * self._length)
            own = [piece for one in read for piece in pieces(one, self._length)]
            found += [(piece, document.hash) for piece in own]
            filled += sum(len(piece.tokens) - 1 for piece in own)
            if filled >= count * self._length:  # a row holds no more than its length, so these are enough
                break
        order = arranged([len(piece.tokens) - 1 for piece, _ in found], self._length)
        rows = packing.pack((found[n][0] for n in order), length=self._length, padding=self.reader.padding)
        if len(rows.tokens) > count:
            rows, _ = packing.split(rows, len(rows.tokens) - count)
        return Part.of(rows, tuple(dict.fromkeys(found[n][1] for n in order[: rows.documents])))

    def _tokens(self, raw: Raw, places: int) -> list[Document]:
        """Return what a document is in tokens; of a text that is longer than `places`, the first that fill them."""
        text, letters = raw.row.get("text"), _BEGINNING * (places + self._length)
        while isinstance(text, str) and len(text) > letters:
            for document in self._whole(replace(raw, row={**raw.row, "text": text[:letters]})):
                if len(document.tokens) > places + self._length:  # so these are far from where the text is cut
                    first = slice(places + 1)
                    return [replace(document, tokens=document.tokens[first], learnt=document.learnt[first])]
            letters *= 4
        return list(self._whole(raw))

    def _whole(self, raw: Raw) -> Iterator[Document]:
        """Yield what a document is in tokens, all of which count; a chat may be several."""
        with _in_arguments():
            examples = examples_of(raw.row, raw.where, self.reader.tokenizer, self._learning, self.census)
            for document in self.reader.documents(examples):
                yield replace(document, learnt=np.ones(len(document.tokens), np.bool_), divisible=True)


@contextlib.contextmanager
def _in_arguments() -> Iterator[None]:
    """Have errors speak of this function's arguments in place of the keys of a training's job."""
    try:
        yield
    except MalformedFile as error:
        if not error.remedy or "`data: " not in error.remedy:
            raise
        remedy = "leave it out with `reasoning=drop`"
        expected = None if "`data: " in str(error.expected) else error.expected
        raise MalformedFile(
            error.message, file=error.file, expected=expected, found=error.found, remedy=remedy
        ) from error


def _empty(part: str, parts: Parts, sources: dict[str, DataSource]) -> UsageError:
    """Return what to do about a part without tokens."""
    found = parts.found.get(part, 0)
    if part in sources and (part != "train" or found or not any(parts.found.values())):
        return UsageError(f"{sources[part].path}: expected documents with at least 2 tokens, found none")
    whole = sum(count for name, count in parts.found.items() if name not in sources or name == "train")
    more = "give more documents" if part == "train" else f"give more documents, or `{part}=` a file of its own"
    return UsageError(
        f"{sources['train'].path}: of its {counted(whole, 'document')} none with 2 tokens is for the part {part}, "
        f"which gets them by their hash; {more}"
    )
