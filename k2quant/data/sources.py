"""Training data: local files in JSON Lines or a dataset of the `datasets` library, read into rows of tokens."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from k2quant.checkpoint.files.paths import check_inside, open_regular
from k2quant.checkpoint.files.strict_json import parse_object, without_mark
from k2quant.data.examples import BESIDE, KEYS, TOOLS, Example, examples_of
from k2quant.data.learning import Census, Learning
from k2quant.data.packing import Rows, pack
from k2quant.data.places import ENDING, no_data
from k2quant.data.tokens import Reader
from k2quant.errors import MalformedFile, MissingExtra, UsageError
from k2quant.ground.extras import install
from k2quant.ground.saying.faults import said

Progress = Callable[[int, int], None]
"""Called with the bytes that are read and all bytes, or with the rows of a dataset."""

_LINE = 2**26
"""Bytes of a line."""
_OFTEN = 1000
"""Rows of a dataset after which progress is told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSource:
    """Where training data is read from."""

    path: str
    """A file in JSON Lines, a folder with `*.jsonl`, read in the order of their names, or a dataset, `org/name`. What
    exists on the disk is never looked up on a hub."""
    split: str = "train"
    """Of a dataset."""
    config: str | None = None
    """Of a dataset that has several."""


def load_rows(
    source: DataSource,
    tokenizer: Any,
    *,
    length: int,
    vocabulary: int,
    learning: Learning | None = None,
    progress: Progress | None = None,
) -> Rows:
    """Read examples, tokenise them and pack them into rows.

    Args:
        source: one example a line: `text`, of which every token is learnt; `prompt` and `completion`, of which the
            completion and the end-of-text token are; or `messages`, of which the assistant's turns are.
        tokenizer: of transformers.
        length: tokens of a row, at least 2.
        vocabulary: rows of the model's embedding; token ids lie below.
        learning: what of a conversation is learnt; None: the defaults.
        progress: called while reading.

    Raises:
        UsageError: there is no such file, folder or dataset name, or `length` is below 2.
        UnsafePath: a file of the folder is a link out of it.
        MalformedFile: a file, a line or a dataset is not what it should be, there is nothing to learn in all of it, or
            the chat template does not write reasoning that is to be learnt, and `learning` does not say what then.
        CheckpointError: the tokenizer cannot read the examples, or lacks the end-of-text token or the chat template
            that they need.
        MissingExtra: the source is a dataset, and `datasets` is not installed.
    """
    reader = Reader(tokenizer=tokenizer, vocabulary=vocabulary)
    learning, census = learning or Learning(), Census()
    examples = read_examples(source, tokenizer, learning, census, progress=progress)
    rows = pack(reader.documents(examples), length=length, padding=reader.padding)
    if learning.reasoning == "refuse" and census.losing:
        raise _losing(source, census)
    if not rows.learnt:
        remedy = "what there is to learn lies beyond the end of a row, or the tokenizer gives it no token"
        raise MalformedFile("nothing to learn in any example", file=source.path, remedy=remedy)
    return replace(rows, unread=reader.unread(), census=census)


def _losing(source: DataSource, census: Census) -> MalformedFile:
    """Return what is wrong with conversations whose reasoning the chat template does not write."""
    return MalformedFile(
        f"the chat template does not write the reasoning of turns that are to be learnt, as in {census.first_losing}",
        file=source.path,
        found=f"{census.losing:,} of {census.rows:,} rows",
        remedy="say in the job what then, `data: reasoning:` split (each turn as it is asked for, with its reasoning), "
        "drop (the turn without it) or skip (not that turn)",
    )


def _untold(_done: int, _total: int) -> None:
    """Tell nobody of any progress."""


def read_examples(
    source: DataSource, tokenizer: Any, learning: Learning, census: Census, *, progress: Progress | None = None
) -> Iterator[Example]:
    """Yield the examples of a source.

    Args:
        source: files or a dataset.
        tokenizer: of transformers; its chat template renders `messages`.
        learning: what of a conversation is learnt.
        census: is told what was found.
        progress: called while reading.

    Raises:
        UsageError, UnsafePath, MalformedFile, CheckpointError, MissingExtra: as `load_rows` does.
    """
    for where, row in rows_of(source, progress=progress):
        yield from examples_of(row, where, tokenizer, learning, census)


def rows_of(source: DataSource, *, progress: Progress | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each row of a source as it stands there, with its place: file and line, or number in a dataset.

    Raises:
        UsageError, UnsafePath, MalformedFile, MissingExtra: as `load_rows` does.
    """
    tell = progress or _untold
    yield from _of_files(_files(source), tell) if os.path.lexists(source.path) else _of_dataset(source, tell)


def _files(source: DataSource) -> list[Path]:
    place = Path(source.path)
    try:
        if not place.is_dir():
            return [place]
        files = sorted(path for path in place.iterdir() if path.suffix == ENDING and not path.name.startswith("."))
    except OSError as error:
        raise MalformedFile("cannot be read", file=place, found=error.strerror) from error
    if not files:
        raise UsageError(f"{place}: expected files *{ENDING} in the folder, found none")
    for file in files:
        check_inside(place, file)
    return files


def _of_files(files: list[Path], progress: Progress) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each example of the files with its place."""
    done = 0
    total = sum(_size(file) for file in files)
    for file in files:
        empty = True
        for number, line in _lines(file):
            done += len(line)
            if line.strip():
                empty = False
                where = f"{file}, line {number}"
                yield where, parse_object(line, file=where)
            progress(min(done, total), total)
        if empty:
            raise MalformedFile("no examples", file=file, expected="one in each line")


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise MalformedFile("cannot be read", file=file, found=error.strerror) from error


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file, from 1; one at a time is in memory."""
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            number = 0
            while line := file.readline(_LINE + 1):
                number += 1
                if len(line) > _LINE:
                    raise MalformedFile("too long", file=f"{path}, line {number}", expected=f"at most {_LINE} bytes")
                yield number, without_mark(line, file=f"{path}, line 1") if number == 1 else line
    except OSError as error:
        raise MalformedFile("cannot be read", file=path, found=error.strerror) from error


def _of_dataset(source: DataSource, progress: Progress) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each row of a dataset with its place, only with the columns that an example may have."""
    if why := no_data(source.path):
        raise UsageError(f"{source.path!r}: {why}")
    try:
        import datasets  # type: ignore[import-untyped]
    except ImportError as error:
        raise MissingExtra(
            f"{source.path} does not exist here, and to read it as a dataset, `datasets` must be installed",
            found=said(error),
            remedy=install("qat"),
        ) from error
    try:
        table = datasets.load_dataset(source.path, name=source.config, split=source.split)
        table = table.select_columns([name for name in table.column_names if name in {*KEYS, TOOLS, *BESIDE}])
        total = len(table)
        for number, row in enumerate(table, 1):
            yield f"{source.path}, {source.split}, row {number}", _unfilled(row)
            if number % _OFTEN == 0 or number == total:
                progress(number, total)
    except Exception as error:  # of the network, of the hub, of the files that came from there
        raise MalformedFile(
            "cannot be loaded as a dataset",
            file=source.path,
            found=said(error),
            remedy="is it a file that is missing here, or a dataset or split that does not exist?",
        ) from error


def _unfilled(value: Any) -> Any:
    """Return a row without the nulls that a table puts where another row has a key, at any depth.

    A key whose value holds nothing but such nulls goes too.
    """
    if isinstance(value, list):
        return [_unfilled(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    kept = {key: _unfilled(inner) for key, inner in value.items() if inner is not None}
    return {key: inner for key, inner in kept.items() if inner != {} or value[key] == {}}
