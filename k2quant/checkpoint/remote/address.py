"""Addresses of checkpoints that are no local folder, as people write them: `hf://org/name@rev`, `s3://bucket/prefix`."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from k2quant.errors import UsageError

HUB = "hf"
"""The scheme of a Hugging Face hub."""

_OURS = (HUB, "s3", "gs", "file", "memory")  # those that are tested; fsspec may know more
_ALIASES = {"s3a": "s3", "gcs": "gs"}
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://", re.ASCII)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
_REVISION = re.compile(r"[\w.+-]+(/[\w.+-]+)*", re.ASCII)
_HUB_PAGE = re.compile(
    r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
    r"(?:/(?:tree|blob|resolve)/(?P<rev>[^/?#\s]+))?(?:[/?#].*)?",
    re.ASCII | re.IGNORECASE,
)
_LONGEST = 1024  # characters; S3 takes keys of as many bytes


@dataclass(frozen=True, slots=True)
class Address:
    """Where a checkpoint lies, or is to lie, that is no local folder."""

    scheme: str
    """`hf`, `s3`, `gs`, `memory`, or another that fsspec knows."""
    path: str
    """`org/name` on a hub; bucket and prefix, without a slash at the end."""
    revision: str | None = None
    """Of a hub: branch, tag or commit; None is its default branch."""

    def __str__(self) -> str:
        """Return it as people write it."""
        return f"{self.scheme}://{self.path}" + (f"@{self.revision}" if self.revision else "")

    @property
    def name(self) -> str:
        """The last part, for titles."""
        return self.path.rpartition("/")[2] or self.path

    def child(self, name: str) -> str:
        """Return the address of a file below it, for messages."""
        return f"{self}/{name}"


def is_address(text: object) -> bool:
    """Tell whether something is an address, right or wrong: text that begins with `scheme://`. A path never is one."""
    return isinstance(text, str) and _SCHEME.match(text) is not None


def parse(text: str) -> Address:
    """Read an address.

    Raises:
        UsageError: the scheme is unknown; it has a user or password, a query, no name, or `..` in it. What may be
            secret in it is not repeated.
    """
    match = _SCHEME.match(text)
    if match is None:
        raise UsageError(f"{_shown(text)} is no address; expected hf://org/name, s3://bucket/prefix or the like")
    written, rest = match[1].lower(), text[match.end() :]
    scheme = _ALIASES.get(written, written)
    _refuse_secrets(scheme, rest)
    if page := _HUB_PAGE.fullmatch(text):
        at = f"@{page['rev']}" if page["rev"] and page["rev"] != "main" else ""
        raise UsageError(f"{_shown(text)} is a page of the hub; its address here is hf://{page['id']}{at}")
    _check_scheme(scheme)
    path, revision = _of_hub(rest) if scheme == HUB else (_of_store(scheme, rest), None)
    return Address(scheme, path, revision)


def spot(text: str | os.PathLike[str] | Address) -> Path | Address:
    """Return what somebody named: a local folder, also by `file://`, or an address.

    Raises:
        UsageError: it begins like an address, and is none; see `parse`.
    """
    if isinstance(text, Address):
        return text
    if not isinstance(text, str) or not is_address(text):
        return Path(text)
    address = parse(text)
    return Path(address.path) if address.scheme == "file" else address


def _refuse_secrets(scheme: str, rest: str) -> None:
    """Refuse what stands where others have a password, a token or a signature, without repeating any of it."""
    first, slash, _ = rest.partition("/")
    if "@" in first and (scheme != HUB or slash or ":" in first):
        raise UsageError(
            f"an address with a user or a token in it ({scheme}://...@...); leave that out: {_login(scheme)}"
        )
    if "?" in rest or "#" in rest:
        raise UsageError(
            f"an address with a query in it ({scheme}://...?...); leave out what stands from ? or # on: "
            f"{_login(scheme)}"
        )


def _login(scheme: str) -> str:
    if scheme == HUB:
        return "the hub's own login is used, `hf auth login` or HF_TOKEN"
    if scheme in {"s3", "gs"}:
        return "credentials come from where the tools of the cloud have them, such as their environment and profiles"
    return "credentials come from where the tools of that service have them"


def _check_scheme(scheme: str) -> None:
    if scheme in _OURS:
        return
    if scheme in {"http", "https"}:
        raise UsageError(
            f"{scheme}:// is no place of checkpoints: a web server cannot list its files; expected hf://org/name for a "
            "hub (HF_ENDPOINT says which), s3://bucket/prefix, or a local folder"
        )
    from fsspec.registry import known_implementations, registry

    local = {"local", "dir", "reference", "simplecache", "filecache", "blockcache", "zip", "tar", "libarchive", "data"}
    if scheme in local or (scheme not in known_implementations and scheme not in registry):
        raise UsageError(f"unknown scheme {scheme}://; expected {', '.join(f'{each}://' for each in _OURS)}")


def _of_hub(rest: str) -> tuple[str, str | None]:
    """Return the id of a repository and its revision."""
    found, at, revision = rest.partition("@")
    found = found.rstrip("/")
    if found.startswith(("datasets/", "spaces/", "buckets/")) or (at and not _REVISION.fullmatch(revision)):
        wrong = f"hf://{_shown(rest)} names no revision of a model"
    elif not _HUB_ID.fullmatch(found) or ".." in found or ".." in revision:
        wrong = f"hf://{_shown(rest)} names no model on a hub"
    else:
        return found, revision or None
    raise UsageError(f"{wrong}; expected hf://org/name or hf://org/name@revision")


def _of_store(scheme: str, rest: str) -> str:
    """Return bucket and prefix."""
    root = "/" if scheme == "file" else ""
    path = rest.rstrip("/").removeprefix(root)
    if scheme == "file" and not rest.startswith("/"):
        raise UsageError(f"file://{_shown(rest)} names no folder; expected file:///path")
    parts = path.split("/")
    if not path or not path.isprintable() or len(path) > _LONGEST or any(part in {"", ".", ".."} for part in parts):
        raise UsageError(f"{scheme}://{_shown(rest)} names no folder; expected {scheme}://{root}bucket/prefix")
    return root + path


def _shown(text: str) -> str:
    return ascii(text[:200])[1:-1]
