"""Manifests that say what is not so: refused before a gate believes them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from k2quant.errors import MalformedResults
from k2quant.eval import read_run
from k2quant.eval.runs.folder import MANIFEST, SCHEMA


def run(folder: Path, *, repeats: int = 1, schema: Any = SCHEMA, **tasks: Any) -> Path:
    """Write a run whose tasks all have the same file, of one question asked so many times."""
    row = {
        "doc_id": 0,
        "resps": [["yes"]],
        "filtered_resps": ["yes"],
        "filter": "none",
        "metrics": ["exact_match"],
        **{key: hashlib.sha256(b"").hexdigest() for key in ("doc_hash", "prompt_hash", "target_hash")},
        "exact_match": 1.0,
    }
    data = "".join(json.dumps(row | {"repeat": repeat}) + "\n" for repeat in range(repeats)).encode()
    (folder / "samples.jsonl").write_bytes(data)
    shared = {"file": "samples.jsonl", "sha256": hashlib.sha256(data).hexdigest()}
    entries = {name: shared | said for name, said in tasks.items()}
    (folder / MANIFEST).write_text(json.dumps({"schema": schema, "settings": {}, "tasks": entries}))
    return folder


@pytest.mark.parametrize("whole", ["t", "u", "gone", 5, ["t"], {}, ""])
def test_a_part_of_no_whole_is_refused(whole: Any, tmp_path: Path) -> None:
    """Of itself, of a part, in a circle or of nothing: no item would be left to be pooled, or the wrong ones."""
    with pytest.raises(MalformedResults, match=r"task [tu] is a part of no whole task"):
        read_run(run(tmp_path, t={"part_of": whole}, u={"part_of": "t"}))


def test_a_part_of_a_whole_is_read(tmp_path: Path) -> None:
    """In whatever order they stand."""
    assert list(read_run(run(tmp_path, u={"part_of": "t"}, t={}, v={"part_of": "t"})).tasks) == ["u", "t", "v"]


@pytest.mark.parametrize(("asked", "said"), [(1, 3), (3, 1), (3, 2), (2, "2"), (1, None), (1, [1])])
def test_answers_are_as_many_as_the_manifest_says(asked: int, said: Any, tmp_path: Path) -> None:
    """Nobody drops the answers of a repeat unseen."""
    with pytest.raises(MalformedResults, match=f"not asked as often as the run says, .*found {asked}"):
        read_run(run(tmp_path, repeats=asked, t={"repeats": said}))
    assert read_run(run(tmp_path, repeats=asked, t={"repeats": asked})).tasks["t"].columns.repeats == asked


def test_what_a_file_says_does_not_fill_the_screen(tmp_path: Path) -> None:
    """A version or a name of a metric of a megabyte is shown in part."""
    with pytest.raises(MalformedResults, match="another version") as caught:
        read_run(run(tmp_path, schema="k" * 10**6, t={}))
    assert len(str(caught.value)) < 1000
    path = run(tmp_path, t={}) / "samples.jsonl"
    row = json.loads(path.read_bytes())
    data = json.dumps(row | {"metrics": ["m" * 10**5, *map(str, range(10**4))]}).encode() + b"\n"
    path.write_bytes(data)
    with pytest.raises(MalformedResults, match="no metric says right or wrong") as caught:
        read_run(tmp_path)
    assert len(str(caught.value)) < 3000
