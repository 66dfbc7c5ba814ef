"""Task data from local files: read row by row, with neither the network nor a cache of `datasets` in between."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from k2quant.checkpoint.files.paths import read_limited
from k2quant.checkpoint.files.strict_json import parse_object, without_mark
from k2quant.errors import MalformedFile, UsageError

_LIMIT = 2**32  # bytes of a data file
_ENDINGS = (".jsonl", ".json")

Files = Mapping[str, tuple[Path, ...]]
"""By split, such as `test`, the files that hold it."""


def find_files(place: Path, splits: tuple[str, ...], *, names: tuple[str, ...]) -> dict[str, tuple[Path, ...]]:
    """Find the file of each split of a task.

    Args:
        place: a file, which then holds the split that is asked; or a folder with `test.jsonl`, `gsm8k_test.jsonl` or
            the like for each split, or `date_understanding.json` for the split that is asked.
        splits: of the task, the one that is asked first.
        names: of the task and of its part of a dataset, most telling first.

    Returns:
        a file for each split; those that the task only may draw its shots from are left out where there is none.

    Raises:
        UsageError: there is no file for the first split, or more than one.
    """
    if place.is_file():
        return {splits[0]: (place,)}
    if not place.is_dir():
        raise UsageError(f"{place}: no such file or folder")
    files = {split: found for split in splits if (found := _of_split(place, split, names))}
    if splits[0] not in files:
        files[splits[0]] = _named(place, names)
    for split, found in files.items():
        if len(found) != 1:
            said = ", ".join(path.name for path in found) or "none"
            raise UsageError(
                f"{place}: expected one file for the split {split!r}, such as {split}.jsonl or "
                f"{names[0]}_{split}.jsonl; found {said}"
            )
    return files


def _of_split(folder: Path, split: str, names: tuple[str, ...]) -> tuple[Path, ...]:
    exact = [f"{name}_{split}" for name in names] + [split]
    for stem in exact:
        found = _named(folder, (stem,))
        if found:
            return found
    return tuple(sorted(path for path in folder.iterdir() if path.stem.endswith(f"_{split}") and _readable(path)))


def _named(folder: Path, stems: tuple[str, ...]) -> tuple[Path, ...]:
    for stem in stems:
        found = tuple(path for path in (folder / f"{stem}{ending}" for ending in _ENDINGS) if path.is_file())
        if found:
            return found
    return ()


def _readable(path: Path) -> bool:
    return path.suffix in _ENDINGS and path.is_file()


def local_files(dataset_path: object, dataset_kwargs: object) -> tuple[Files, str | None] | None:
    """Return the files and the field of a task YAML that names local JSON files; None where it names anything else.

    Args:
        dataset_path: of the YAML; `json` is what this is about.
        dataset_kwargs: of the YAML, with `data_files` and, where rows lie deeper in a file, `field`.
    """
    if dataset_path != "json" or not isinstance(dataset_kwargs, Mapping):
        return None
    if not dataset_kwargs.keys() <= {"data_files", "field"}:
        return None
    named = dataset_kwargs.get("data_files")
    by_split = named if isinstance(named, Mapping) else {"train": named}
    files: dict[str, tuple[Path, ...]] = {}
    for split, value in by_split.items():
        paths = tuple(Path(str(path)) for path in (value if isinstance(value, list) else [value]))
        if not paths or not all(_readable(path) for path in paths):
            return None
        files[str(split)] = paths
    field = dataset_kwargs.get("field")
    return files, None if field is None else str(field)


def loader(files: Files, field: str | None = None) -> Callable[..., Any]:
    """Return what lm-eval calls to get a dataset: it reads these files, whatever it is called with.

    Args:
        files: by split.
        field: the key under which a JSON file keeps its rows; without it, the only list that there is.
    """

    def load(**_: Any) -> Any:
        from datasets import Dataset, DatasetDict  # type: ignore[import-untyped]

        splits = DatasetDict()
        for split, paths in files.items():
            rows = [row for path in paths for row in read_rows(path, field)]
            keys = list(dict.fromkeys(key for row in rows for key in row))
            try:
                splits[split] = Dataset.from_dict({key: [row.get(key) for row in rows] for key in keys})
            except (ValueError, TypeError, OverflowError) as error:  # pyarrow's errors are ValueErrors
                where = ", ".join(str(path) for path in paths)
                raise MalformedFile("rows of different types", file=where, found=str(error)[:200]) from error
        return splits

    return load


def read_rows(path: Path, field: str | None = None) -> list[dict[str, Any]]:
    """Return the rows of a JSON Lines file, or of a JSON file that keeps them in a list.

    Raises:
        MalformedFile: it does not parse, or has no rows.
    """
    data = without_mark(read_limited(path, _LIMIT), file=path)
    if path.suffix == ".jsonl":
        rows = [parse_object(line, file=f"{path}, line {number}") for number, line in _numbered(data)]
    else:
        rows = _listed(data, path, field)
    if not rows:
        raise MalformedFile("no rows", file=path)
    return rows


def _numbered(data: bytes) -> list[tuple[int, bytes]]:
    return [(number, line) for number, line in enumerate(data.split(b"\n"), 1) if line.strip()]


def _listed(data: bytes, path: Path, field: str | None) -> list[dict[str, Any]]:
    if data.lstrip()[:1] == b"[":
        data, field = b'{"rows":' + data + b"}", "rows"
    lines = _numbered(data)
    if field is None and len(lines) > 1 and _is_object(lines[0][1]):  # JSON Lines by another name
        return [parse_object(line, file=f"{path}, line {number}") for number, line in lines]
    whole = parse_object(data, file=path)
    lists = [key for key, value in whole.items() if isinstance(value, list)]
    if field is None and len(lists) == 1:
        field = lists[0]
    rows = whole.get(field) if field is not None else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        found = ", ".join(whole)[:100]
        raise MalformedFile("no list of rows", file=path, expected=f"a list under {field or 'one key'}", found=found)
    return rows


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False
