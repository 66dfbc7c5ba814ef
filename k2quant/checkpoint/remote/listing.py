"""What a hub says of a repository: its commit and files, or why it says nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from k2quant.checkpoint.files.json_kinds import mapping, text, values, whole
from k2quant.checkpoint.files.strict_json import parse_object
from k2quant.checkpoint.remote.address import Address
from k2quant.checkpoint.remote.place import RemoteFile, check_names
from k2quant.checkpoint.remote.ranges import CONNECT_SECONDS, READ_SECONDS, Answer, Client
from k2quant.checkpoint.remote.retrying import AGAIN, Pace, Transient, retried, retry_after
from k2quant.checkpoint.remote.secrets import clean
from k2quant.errors import CheckpointError, MalformedFile, UsageError

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LIMIT = 64_000_000  # bytes of a listing; K2's has some 30,000


class Listing(NamedTuple):
    """A repository at one commit."""

    commit: str
    files: Mapping[str, RemoteFile]
    snapshot: Path | None
    """Its folder in the hub's cache, where that alone was asked, for there is no network."""


def listed(address: Address, session: Callable[[], Client], headers: Callable[[], Mapping[str, str]]) -> Listing:
    """Ask a hub for a repository's commit and files; offline, ask its cache.

    Raises:
        CheckpointError: there is none, it may not be read, or the hub cannot be reached or says what cannot be.
        UsageError: the environment names a hub or a proxy by what is no address.
    """
    try:
        from huggingface_hub import constants
    except ValueError:  # it takes HF_ENDPOINT apart when it is loaded
        raise UsageError("HF_ENDPOINT is no address; expected one such as https://huggingface.co") from None

    if constants.HF_HUB_OFFLINE:
        return _offline(address)
    at = "" if address.revision is None else f"/revision/{quote(address.revision, safe='')}"
    url = f"{constants.ENDPOINT}/api/models/{address.path}{at}"
    try:
        data = retried(str(address), lambda: _asked(url, address, session(), headers()))
    except Exception as error:
        if not of_a_client(error):
            raise
        raise as_error(error, str(address), address) from None
    return _read(data, address)


def _asked(url: str, address: Address, client: Client, headers: Mapping[str, str]) -> bytes:
    timeout = (CONNECT_SECONDS, READ_SECONDS, READ_SECONDS, READ_SECONDS)
    with client.stream("GET", url, params={"blobs": "true"}, headers=dict(headers), timeout=timeout) as answer:
        if answer.status_code in AGAIN:
            raise Transient(f"status {answer.status_code}", after=retry_after(answer.headers))
        if answer.status_code != 200:
            raise refused(answer, str(address), address)
        data, pace = bytearray(), Pace()
        for chunk in answer.iter_bytes():
            data += chunk
            if pace.is_slow(len(chunk)):
                raise Transient("a list of files that comes too slowly")
            if len(data) > _LIMIT:
                raise MalformedFile("its list of files is too long", file=address, expected=f"at most {_LIMIT:,} bytes")
    return bytes(data)


def _read(data: bytes, address: Address) -> Listing:
    """Return what a hub's answer says.

    Raises:
        MalformedFile: it is not what a hub answers.
        UnsafePath: a name leads out of the repository.
    """
    found = parse_object(data, file=address)
    try:
        commit = _hexadecimal(found["sha"], _COMMIT, "a commit")
        files = {file.name: file for file in map(_file, values(found["siblings"]))}
    except (KeyError, TypeError, ValueError) as error:
        said = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise MalformedFile(
            "not what a hub answers", file=address, found=said, remedy="is HF_ENDPOINT the address of a hub?"
        ) from error
    check_names(address, files)
    return Listing(commit, files, None)


def _file(entry: object) -> RemoteFile:
    facts = mapping(entry)
    name, lfs = text(facts["rfilename"]), facts.get("lfs")
    if lfs is None:
        blob = text(facts["blobId"])
        return RemoteFile(name, whole(facts["size"]), None, blob, blob if _COMMIT.fullmatch(blob) else None)
    digest = _hexadecimal(mapping(lfs)["sha256"], _SHA256, "a sha256")
    return RemoteFile(name, whole(lfs["size"]), digest, digest)


def _hexadecimal(value: object, form: re.Pattern[str], what: str) -> str:
    digits = text(value).lower()
    if not form.fullmatch(digits):
        raise ValueError(f"{digits!r:.100} where {what} stands")
    return digits


def _offline(address: Address) -> Listing:
    """Return a model that was downloaded before, as the hub's cache has it.

    A file of the cache is a link to its content, which is named as the hub names its version.

    Raises:
        CheckpointError: it does not lie there.
    """
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(address.path, revision=address.revision, local_files_only=True))
    except (OSError, ValueError):
        raise CheckpointError(
            "not in the hub's cache, and HF_HUB_OFFLINE forbids to ask for it",
            file=address,
            remedy="unset HF_HUB_OFFLINE, or download it where there is a network",
        ) from None
    files = {}
    for path in sorted(each for each in folder.rglob("*") if each.is_file()):
        name, content = path.relative_to(folder).as_posix(), path.resolve().name
        digest = content if _SHA256.fullmatch(content) else None
        files[name] = RemoteFile(name, path.stat().st_size, digest, content)
    return Listing(folder.name, files, folder)


def refused(answer: Answer, what: str, address: Address) -> CheckpointError:
    """Return what an answer means that holds no content."""
    headers: Mapping[str, Any] = answer.headers
    return _refusal(answer.status_code, headers.get("x-error-code"), headers.get("x-error-message"), what, address)


def of_a_client(error: Exception) -> bool:
    """Tell whether an error comes from the way to a hub: the system's, or that of httpx or its successor.

    What is no address, and no name of a host, is refused by a ValueError of Python or by an error of its own of httpx.
    """
    own = {kind.__name__ for kind in type(error).__mro__} & {"HTTPError", "InvalidURL"}
    return isinstance(error, OSError | UnicodeError) or bool(own)


def as_error(error: Exception, what: str, address: Address) -> CheckpointError:
    """Return an error of huggingface_hub as one of ours."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__) is not None and cause not in chain:
        chain.append(cause)
    for each in chain:
        if (answer := getattr(each, "response", None)) is not None:
            return refused(answer, what, address)
    found = next((each.strerror for each in chain if isinstance(each, OSError) and each.strerror), None)
    text = clean(found or " ".join(str(error).split()))[:300]  # cleaned whole: half a secret is not known for one
    return CheckpointError("cannot be read", file=what, found=text or type(error).__name__)


_LOGIN = "`hf auth login`, or HF_TOKEN, says who you are"


def _refusal(status: int, code: str | None, message: str | None, what: str, address: Address) -> CheckpointError:
    from huggingface_hub import constants

    page = f"{clean(constants.ENDPOINT)}/{address.path}"  # which may have a user and a password in it
    found = f"status {status}" + (f", {clean(str(message))[:200]}" if message else "")
    if code == "GatedRepo":
        return CheckpointError(
            "gated: its owner wants a licence accepted first",
            file=what,
            found=found,
            remedy=f"accept it at {page}, then log in: {_LOGIN}",
        )
    if code == "RevisionNotFound":
        return CheckpointError(
            "the hub knows no such revision",
            file=what,
            remedy=f"its branches, tags and commits: {page}/commits; none after @ is the default branch",
        )
    if code == "EntryNotFound":
        return CheckpointError("the hub has no such file", file=what, found=found)
    if code == "RepoNotFound" or status in {401, 404}:
        return CheckpointError(
            "not found on the hub: misspelt, or private",
            file=what,
            found=found,
            remedy=f"look at {page}; for a private one, log in: {_LOGIN}",
        )
    if status == 403:
        remedy = f"the token must be allowed to read it: {_LOGIN}"
        return CheckpointError("the hub forbids to read it", file=what, found=found, remedy=remedy)
    return CheckpointError("the hub refuses", file=what, found=found)
