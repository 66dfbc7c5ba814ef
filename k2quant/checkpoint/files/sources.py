"""What people name where a checkpoint's folder is expected, and what they can do about it."""

from __future__ import annotations

import os
import re
from pathlib import Path

from k2quant.errors import CheckpointError

_HUB = re.compile(r"(?:hf:/+|(?:https?:/+)?(?:www\.)?(?:huggingface\.co|hf\.co)/+)", re.IGNORECASE)
_ID = re.compile(
    r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
    r"(?:@(?P<at>[\w.-]+)|/(?:tree|blob|resolve)/(?P<rev>[^/?#]+)(?:/[^?#]*)?)?/?(?:[?#].*)?",
    re.ASCII,
)
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+:/", re.IGNORECASE)

_OF_FILES = (".safetensors", ".json")  # what no model's name ends with


def no_folder(path: str | os.PathLike[str]) -> str | None:
    """Say why a path is no folder of a checkpoint, and what to do: "what it is; what to do". None where it is one."""
    if os.path.isdir(path):  # noqa: PTH112  it never raises
        return None
    return "; ".join(filter(None, _explained(os.fspath(path))))


def check_folder(path: Path, *, addresses: bool = False) -> None:
    """Refuse a path that is no folder; `addresses`: whether an address may be named in its place.

    Raises:
        CheckpointError: it is a file, a model's name on a hub, an address, or not there.
    """
    if not os.path.isdir(path):  # noqa: PTH112  it never raises
        given = os.fspath(path)
        message, remedy = _explained(given, addresses=addresses)
        named = _ADDRESS.match(given) and not addresses and not os.path.lexists(given)
        raise CheckpointError(message, file=_as_written(given) if named else path, remedy=remedy)


def _as_written(path: str) -> str:
    """Return an address that was read as a path with both its slashes again, and without what may be secret in it."""
    scheme, _, rest = path.partition(":")
    rest = rest.lstrip("/").partition("?")[0]
    first, slash, more = rest.partition("/")
    hidden = "@" in first and (":" in first or scheme.lower() != "hf")
    return f"{scheme}://" + (f"...@{first.rpartition('@')[2]}{slash}{more}" if hidden else rest)


def _explained(path: str, *, addresses: bool = False) -> tuple[str, str | None]:
    """Return what a path is that is no folder, and what to do about it."""
    if os.path.lexists(path):
        folder = Path(path).parent
        if os.path.isfile(path):  # noqa: PTH113  it never raises
            if path.endswith(".gguf"):
                return "a GGUF file, which is written and never read", "name the checkpoint that it was made from"
            return "a file, not a folder", f"name the folder that it lies in: {folder}"
        return "not a folder", None
    address = _HUB.match(path)
    hub_id = _ID.fullmatch(path, address.end() if address else 0)
    if address and hub_id:
        # A path: whoever takes addresses has read it as one before, if it had both slashes.
        return "an address on the Hugging Face hub, not a folder", _remedy(hub_id, addresses=addresses)
    if _ADDRESS.match(path):
        return "an address, not a folder", "copy the checkpoint to a folder here first"
    remedies = []
    name, above = Path(path).name, Path(path).parent
    if above.name and os.path.isdir(above):  # noqa: PTH112  it never raises
        remedies.append(f"{above} is there, but has no {name}")
    if hub_id and not name.endswith(_OF_FILES):
        remedies.append(f"if it is a model on the Hugging Face hub, {_remedy(hub_id, addresses=addresses)}")
    return "no such folder", "; ".join(remedies) or None


def _remedy(hub_id: re.Match[str], *, addresses: bool) -> str:
    revision = hub_id["at"] or hub_id["rev"]
    at = f"@{revision}" if revision and revision != "main" else ""
    return (f"name hf://{hub_id['id']}{at}, or " if addresses else "") + _download(hub_id)


def _download(hub_id: re.Match[str]) -> str:
    revision = hub_id["at"] or hub_id["rev"]
    chosen = f" --revision {revision}" if revision and revision != "main" else ""
    name = hub_id["id"].partition("/")[2]
    return f"download it first: `hf download {hub_id['id']}{chosen} --local-dir {name}`, then name {name}"
