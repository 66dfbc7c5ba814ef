"""What a hub keeps: contents by their hashes, commits of files, branches that move."""

from __future__ import annotations

import fnmatch
import hashlib
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

LARGE = ("*.safetensors", "*.bin", "*.model", "*.gguf", "*.npz")
"""Files that the real hub keeps as large files (its `.gitattributes`); others are large from `LARGE_SIZE` bytes on."""

LARGE_SIZE = 10 * 1000**2


@dataclass(frozen=True)
class Blob:
    """The content of one file: bytes, or a file on the disk that nobody changes."""

    content: bytes | Path
    large: bool

    @cached_property
    def size(self) -> int:
        """Bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size

    @cached_property
    def sha256(self) -> str:
        """The digest of the content, in hex."""
        if isinstance(self.content, bytes):
            return hashlib.sha256(self.content).hexdigest()
        with self.content.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        """What git itself holds of a large file: https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md."""
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n"
        return text.encode()

    @cached_property
    def oid(self) -> str:
        """Git's name of what it holds."""
        data = self.pointer if self.large else self.read(0, self.size)
        return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()

    @property
    def etag(self) -> str:
        """What names this content in an answer."""
        return self.sha256 if self.large else self.oid

    def read(self, start: int, end: int) -> bytes:
        """The bytes from `start` to before `end`."""
        if isinstance(self.content, bytes):
            return self.content[start:end]
        with self.content.open("rb") as file:
            file.seek(start)
            return file.read(end - start)


def blob_of(name: str, content: bytes | str | Path) -> Blob:
    """`content` as the hub would keep it under this name; a str is text."""
    data = content.encode() if isinstance(content, str) else content
    size = len(data) if isinstance(data, bytes) else data.stat().st_size
    return Blob(data, size >= LARGE_SIZE or any(fnmatch.fnmatch(name, pattern) for pattern in LARGE))


@dataclass(frozen=True)
class Commit:
    """One state of a repository."""

    oid: str
    files: Mapping[str, Blob]
    title: str


@dataclass
class Repo:
    """One repository: commits by their ids, branches by their names."""

    name: str
    private: bool = False
    gated: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def commit(self, files: Mapping[str, Blob], title: str, *, branch: str = "main") -> Commit:
        """These files and no others, as the newest commit of a branch."""
        with self.lock:
            parent = self.branches.get(branch, "")
            told = "".join(f"{name} {blob.etag}\n" for name, blob in sorted(files.items()))
            words = f"{self.name} {len(self.commits)} {parent} {title}\n{told}"
            oid = hashlib.sha1(words.encode(), usedforsecurity=False).hexdigest()
            self.commits[oid] = Commit(oid, dict(files), title)
            self.branches[branch] = oid
            return self.commits[oid]

    def at(self, revision: str) -> Commit | None:
        """The commit that a branch's name, or a commit's id, means now."""
        return self.commits.get(self.branches.get(revision, revision))

    def info(self, commit: Commit, *, sizes: bool) -> dict[str, Any]:
        """What `api/models/NAME` says."""
        return {
            "id": self.name,
            "modelId": self.name,
            "sha": commit.oid,
            "private": self.private,
            "gated": "manual" if self.gated else False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "siblings": [{"rfilename": name} | (_facts(blob) if sizes else {}) for name, blob in commit.files.items()],
        }

    def tree(self, commit: Commit, folder: str, *, recursive: bool) -> list[dict[str, Any]]:
        """What `api/models/NAME/tree` says of a folder ("" is the root)."""
        inside = f"{folder}/" if folder else ""
        entries: dict[str, dict[str, Any]] = {}
        for name, blob in sorted(commit.files.items()):
            if not name.startswith(inside):
                continue
            parts = name[len(inside) :].split("/")
            for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
                above = inside + "/".join(parts[:depth])
                entries[above] = {"type": "directory", "path": above, "size": 0, "oid": "0" * 40}
            if recursive or len(parts) == 1:
                entries[name] = entry(name, blob)
        return list(entries.values())


def entry(name: str, blob: Blob) -> dict[str, Any]:
    """A file as the listings of a folder and of paths say it."""
    told: dict[str, Any] = {"type": "file", "path": name, "size": blob.size, "oid": blob.oid}
    if blob.large:
        told["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": len(blob.pointer)}
    return told


def _facts(blob: Blob) -> dict[str, Any]:
    told: dict[str, Any] = {"size": blob.size, "blobId": blob.oid}
    if blob.large:
        told["lfs"] = {"sha256": blob.sha256, "size": blob.size, "pointerSize": len(blob.pointer)}
    return told
