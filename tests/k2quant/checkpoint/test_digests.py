"""Digests that are noted: taken of a file that is still the same, and of no other, whatever else was done to it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from k2quant.checkpoint.files import digests
from k2quant.checkpoint.files.digests import file_digest, note
from k2quant.conversion.convert import convert
from k2quant.eval.runs.identity import model_hash


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, and files that need not stand for two seconds."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "SETTLED", 0)
    return tmp_path / "cache" / "k2quant" / "digests"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file in a folder, hashed and noted."""
    path = tmp_path / "model" / "model.safetensors"
    path.parent.mkdir()
    path.write_bytes(bytes(range(200)))
    assert file_digest(path) == (of(path), False)
    assert file_digest(path) == (of(path), True)
    return path


def of(path: Path) -> str:
    """Return the digest of what a file holds."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def in_place(path: Path) -> None:
    """Change a byte, and set the times back."""
    before = path.stat()
    with path.open("r+b") as file:
        file.write(b"x")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replaced(path: Path) -> None:
    """Put another file of the same size and times in its place."""
    other = path.with_name("other")
    other.write_bytes(bytes(200))
    shutil.copystat(path, other)
    other.replace(path)


def restored(path: Path) -> None:
    """Put a copy with the times of the original in its place, as a backup does: the same content, unproven."""
    shutil.copy2(path, path.with_name("copy"))
    path.with_name("copy").replace(path)


def longer(path: Path) -> None:
    """Write more behind it."""
    with path.open("ab") as file:
        file.write(b"x")


@pytest.mark.parametrize("change", [in_place, replaced, restored, longer])
def test_a_file_that_was_touched_is_read_again(file: Path, change: Callable[[Path], None]) -> None:
    """Whatever its times say now: that of the last change cannot be set back."""
    change(file)
    assert file_digest(file) == (of(file), False)


def test_a_file_that_is_unchanged_is_not_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bytes count as done at once; also when its folder has another name now; `reread` reads it."""
    monkeypatch.setattr(digests, "_BLOCK", 0)  # whoever reads finds nothing
    counts: list[int] = []
    assert file_digest(file, add=counts.append)[1]
    assert counts == [200]
    moved = file.parent.rename(file.parent.with_name("renamed")) / file.name
    assert file_digest(moved) == (of(moved), True)
    assert file_digest(moved, reread=True) == (hashlib.sha256().hexdigest(), False)


def test_a_copy_is_read_once(file: Path) -> None:
    """A copy with all times has an inode and a time of change of its own."""
    copy = shutil.copytree(file.parent, file.parent.with_name("copy")) / file.name
    assert [file_digest(copy), file_digest(copy)] == [(of(file), False), (of(file), True)]


def test_a_file_that_was_just_written_is_not_noted(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within one tick of the clock another change would leave no trace; nor is one noted that comes from the future."""
    monkeypatch.setattr(digests, "SETTLED", 2_000_000_000)
    longer(file)
    assert [file_digest(file)[1] for _ in range(2)] == [False, False]
    monkeypatch.setattr(digests, "SETTLED", 0)
    os.utime(file, (time.time() + 3600,) * 2)
    assert [file_digest(file)[1] for _ in range(2)] == [False, False]


def test_a_file_that_changes_while_it_is_read_is_not_noted(file: Path) -> None:
    """Of such a file the digest is of neither what it was nor what it is."""
    longer(file)
    assert not file_digest(file, add=lambda count: in_place(file) if count > 1 else None)[1]
    assert file_digest(file) == (of(file), False)


FORGED = {
    "no JSON": "{",
    "no digest": "{}",
    "no hex": json.dumps({"file": None, "sha256": "Z" * 64}),
    "too long": " " * 5000,
    "a list": "[]",
}


@pytest.mark.parametrize("text", FORGED.values(), ids=FORGED)
def test_a_note_that_is_damaged_is_no_note(file: Path, cache: Path, text: str) -> None:
    """The file is read, and noted anew."""
    (entry,) = cache.iterdir()
    entry.write_text(text.replace("null", json.dumps(json.loads(entry.read_text())["file"])))
    assert [file_digest(file)[1] for _ in range(2)] == [False, True]


def test_a_note_that_others_may_write_is_no_note(file: Path, cache: Path) -> None:
    """Nor is a link to one."""
    (entry,) = cache.iterdir()
    entry.chmod(0o666)
    assert not file_digest(file)[1]
    assert file_digest(file)[1]
    other = entry.rename(cache / "other")
    other.chmod(0o666)
    entry.symlink_to(other)
    assert not file_digest(file)[1]


@pytest.mark.parametrize("place", ["/dev/null/no", "/proc/no"])
def test_a_cache_that_cannot_be_written_costs_a_second_reading(
    file: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing else."""
    monkeypatch.setenv("XDG_CACHE_HOME", place)
    assert [file_digest(file) for _ in range(2)] == [(of(file), False)] * 2


def test_a_relative_cache_is_that_of_the_home(tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the standard has it."""
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    note(file.stat(), "0" * 64)
    assert len(list((tmp_path / "home/.cache/k2quant/digests").iterdir())) == 1
    assert file_digest(file) == ("0" * 64, True)


def test_a_model_has_one_hash_however_it_was_found(k2_bf16: Path, tmp_path: Path) -> None:
    """What a conversion wrote with digests is not read; the hash is that of the bytes, whatever its report says."""
    convert(k2_bf16, tmp_path / "int4", "int4", sha256=True)
    read: list[int] = []
    taken = model_hash(tmp_path / "int4", progress=lambda done, _: read.append(done))
    report = tmp_path / "int4" / "k2quant_report.json"
    report.write_text(report.read_text().replace('"sha256": "', '"sha256": "0'))
    shard = min((tmp_path / "int4").glob("*.safetensors"))
    assert file_digest(shard)[1]
    assert taken == model_hash(tmp_path / "int4") == model_hash(tmp_path / "int4", reread=True)
    in_place(shard)
    assert model_hash(tmp_path / "int4") != taken


@pytest.mark.parametrize("home", ["here", ".", "~nobody-has-this-name"])
def test_without_a_home_nothing_is_noted(home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where `~` is no place of the user's own, the file is read each time, and no folder appears where one stands."""
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", home)
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"x")
    assert [file_digest(path), file_digest(path)] == [(of(path), False)] * 2
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]
