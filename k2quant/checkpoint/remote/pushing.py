"""Upload a finished output to a hub: its large files first, where nobody sees them, then all of it in one commit.

A commit that a kill never let happen leaves the repository as it was, so nothing on the hub looks finished that is not;
contents that were uploaded before are known by their digests and not sent again. huggingface_hub carries all of it: its
login, its transfers (Xet where that is installed, else the hub's own large files), its retries.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from k2quant.checkpoint.cards import CARD, LIMIT, is_ours
from k2quant.checkpoint.files.digests import file_digest
from k2quant.checkpoint.files.paths import inside
from k2quant.checkpoint.files.sources import check_folder
from k2quant.checkpoint.reader import INCOMPLETE, REPORT, open_checkpoint
from k2quant.checkpoint.remote.address import HUB, Address, is_address, parse
from k2quant.checkpoint.remote.retrying import retried, status_of
from k2quant.checkpoint.remote.secrets import clean, guard
from k2quant.checkpoint.writing.destination import Destination
from k2quant.errors import CheckpointError, OutputError, UsageError
from k2quant.ground import pool
from k2quant.ground.saying.showing import brief
from k2quant.ground.version import __version__

_ABREAST = 4  # files on their way at a time; each of them goes in parts
_COMMIT = re.compile(r"[0-9a-f]{40}")
_LOGIN = "log in with `hf auth login`, or set HF_TOKEN, with a token that may write"
_MOVED = 412  # status: the parent of a commit is not the branch's commit any more
_AGAIN = "run the same command again: what is there is not sent again"

Progress = Callable[[int, int], None]


class Pushing(NamedTuple):
    """What would be uploaded, known before anything is."""

    address: Address
    """Where to, with its branch."""
    files: Mapping[str, int]
    """Bytes of each file, by its path below the folder."""
    there: tuple[str, ...]
    """Those that the branch holds already, as they are."""
    kept: bool
    """Whether the hub's card stays, for somebody wrote it."""
    others: tuple[str, ...]
    """Files below the folder that the report does not know: they are not uploaded."""
    abroad: tuple[str, ...]
    """Files of the branch that are none of this output; they stay."""

    @property
    def missing(self) -> dict[str, int]:
        """Those of the files that are still to be uploaded."""
        return {name: size for name, size in self.files.items() if name not in self.there}

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)


class Pushed(NamedTuple):
    """What an upload came to."""

    address: Address
    """Where it is, at its commit."""
    url: str
    files: int
    size: int
    """Bytes of all of them."""
    sent: int
    """Bytes of the files that were not there, or were others there."""

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)


def push(
    folder: str | Path,
    address: str | Address,
    *,
    private: bool = False,
    message: str | None = None,
    seen: Callable[[Pushing], None] | None = None,
    progress: Progress | None = None,
) -> Pushed:
    """Upload a finished output to a hub, in one commit; the repository and the branch are made if need be.

    Args:
        folder: that a conversion or a merge wrote.
        address: `hf://user/name`, or `hf://user/name@branch`.
        private: whether a repository that is made is private.
        message: of the commit.
        seen: is told what will be uploaded before anything is.
        progress: is told the bytes done and all bytes as files arrive.

    Raises:
        CheckpointError: the folder is not finished, not k2quant's, or not whole.
        OutputError: the hub refuses, or cannot be reached; the same call goes on.
        UsageError: the address is none of a branch on a hub.
    """
    here, there = Path(folder), branch_of(address)
    report = finished(here)
    with _quiet(), _kindly(there):
        hub = _Hub(there)
        commit = hub.prepared(private=private)
        plan = _planned(here, report, hub)
        if seen is not None:
            seen(plan)
        if not plan.missing:
            return _done(plan, hub, commit, 0)
        operations = _uploaded(here, report, plan, hub, progress)
        text = message or f"Upload {here.resolve().name}, written by k2quant {report.get('version', __version__)}"
        made = hub.committed(operations, text, parent=commit)
        _check(plan, operations, hub.listed())
        sent = 0 if made == commit else sum(plan.missing.values())  # small files that are there make no commit
        return _done(plan, hub, made, sent)


def branch_of(address: str | Address) -> Address:
    """Return the branch that an address means.

    Raises:
        UsageError: it lies on no hub, or names a commit, which cannot be written to.
    """
    if isinstance(address, str) and not is_address(address):
        raise UsageError(f"{address} is no address on a hub; expected hf://user/name or hf://user/name@branch")
    found = parse(address) if isinstance(address, str) else address
    if found.scheme != HUB:
        raise UsageError(f"{found} is no repository on a hub; expected hf://user/name or hf://user/name@branch")
    if found.revision is not None and _COMMIT.fullmatch(found.revision):
        raise UsageError(f"{found} is a commit, and stays as it is; expected a branch: hf://{found.path}@branch")
    return Address(found.scheme, found.path, found.revision or "main")


def finished(folder: Path) -> dict[str, Any]:
    """Return the report of a folder that is finished and whole, as far as sizes and headers tell.

    Raises:
        CheckpointError: it is not.
    """
    check_folder(folder)
    report = Destination(folder, report=REPORT, incomplete=INCOMPLETE).finished_report()
    if (folder / INCOMPLETE).exists():
        raise CheckpointError("not finished", file=folder, remedy="run the command that writes it again: it resumes")
    if report is None or not isinstance(report.get("files"), dict):
        raise CheckpointError(
            f"holds no {REPORT}, so nobody knows whether it is whole",
            file=folder,
            remedy="upload what `k2quant convert` or `k2quant merge` wrote; `hf upload` takes any folder",
        )
    for name, facts in report["files"].items():
        if name == CARD:
            continue
        path = inside(folder, name)
        size = path.stat().st_size if path.is_file() else None
        wanted = facts.get("size") if isinstance(facts, dict) else None
        if size is None or size != wanted:
            raise CheckpointError(
                "not as the report has it",
                file=path,
                expected=f"{wanted} bytes",
                found="no file" if size is None else f"{size} bytes",
                remedy="write it anew with `restart=True`",
            )
    open_checkpoint(folder)
    return report


def _planned(folder: Path, report: Mapping[str, Any], hub: _Hub) -> Pushing:
    wanted = [name for name in report["files"] if name != CARD]
    wanted += [name for name in (REPORT, CARD) if (folder / name).is_file()]
    files = {name: (folder / name).stat().st_size for name in wanted}
    remote = hub.listed()
    kept = CARD in files and CARD in remote and _is_theirs(folder, hub)
    there = [name for name in files if (name == CARD and kept) or _is_there(folder, report, name, remote.get(name))]
    found = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    others = [str(path) for path in found if str(path) not in files and not any(p.startswith(".") for p in path.parts)]
    abroad = [name for name in remote if name not in files and not name.startswith(".")]
    return Pushing(hub.address, files, tuple(there), kept, tuple(others), tuple(sorted(abroad)))


def _is_theirs(folder: Path, hub: _Hub) -> bool:
    """Tell whether the hub's card is somebody's own, and the folder's is only ours."""
    if not is_ours((folder / CARD).read_bytes()):
        return False
    found = hub.read(CARD)
    return found is not None and not is_ours(found)


def _is_there(folder: Path, report: Mapping[str, Any], name: str, remote: _Remote | None) -> bool:
    """Tell whether the branch holds a large file as it is here; small ones are compared when they are committed."""
    path = folder / name
    if remote is None or remote.sha256 is None or remote.size != path.stat().st_size:
        return False
    known = report["files"].get(name, {}).get("sha256") if name != CARD else None
    return (known or file_digest(path)[0]) == remote.sha256


def _uploaded(
    folder: Path, report: Mapping[str, Any], plan: Pushing, hub: _Hub, progress: Progress | None
) -> list[Any]:
    """Upload contents, and return what a commit needs to name them."""
    from huggingface_hub import CommitOperationAdd

    total, done, lock = sum(plan.missing.values()), 0, threading.Lock()
    operations = {name: CommitOperationAdd(name, str(folder / name)) for name in plan.missing}

    def work(name: str) -> None:
        nonlocal done
        hub.preupload(operations[name])
        _check_digest(folder / name, report["files"].get(name, {}), operations[name])
        with lock:
            done += plan.missing[name]
            if progress is not None:
                progress(done, total)

    pool.run(iter(operations), work, workers=min(_ABREAST, len(operations)))
    return list(operations.values())


def _check_digest(path: Path, facts: Mapping[str, Any], operation: Any) -> None:
    """Refuse a file that is no longer what its report says."""
    wanted = facts.get("sha256") if path.name != CARD else None
    if wanted is not None and operation.upload_info.sha256.hex() != wanted:
        raise CheckpointError(
            "changed since it was written",
            file=path,
            expected=f"sha256 {wanted}",
            found=operation.upload_info.sha256.hex(),
            remedy="write it anew with `restart=True`",
        )


def _check(plan: Pushing, operations: list[Any], remote: Mapping[str, _Remote]) -> None:
    """Refuse what the hub lists after a commit, if it is not what was sent."""
    digests = {operation.path_in_repo: operation.upload_info.sha256.hex() for operation in operations}
    for name, size in plan.files.items():
        found = remote.get(name)
        if name == CARD and plan.kept:
            continue
        if found is None or found.size != size or found.sha256 not in {None, digests.get(name, found.sha256)}:
            raise OutputError(
                "the hub does not list it as it was uploaded", file=plan.address.child(name), remedy=_AGAIN
            )


def _done(plan: Pushing, hub: _Hub, commit: str, sent: int) -> Pushed:
    at = Address(HUB, plan.address.path, commit)
    sizes = plan.files.values()
    return Pushed(at, hub.url(commit), len(plan.files), sum(sizes), sent)


class _Remote(NamedTuple):
    """A file on the hub."""

    size: int
    sha256: str | None
    """None: the hub keeps it as a small file."""


class _Hub:
    """A branch of a repository, through huggingface_hub."""

    def __init__(self, address: Address) -> None:
        """Take the login that there is.

        Raises:
            OutputError: there is none.
        """
        from huggingface_hub import HfApi, get_token

        self.address = address
        self._api: Any = HfApi(library_name="k2quant", library_version=__version__)
        if get_token() is None:
            raise OutputError("nobody is logged in, and only its owner may write there", file=address, remedy=_LOGIN)

    def url(self, commit: str) -> str:
        """The page of the model at a commit."""
        return f"{clean(self._api.endpoint)}/{self.address.path}/tree/{commit}"

    def prepared(self, *, private: bool) -> str:
        """Make repository and branch if need be; return the branch's commit."""
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        path, branch = self.address.path, str(self.address.revision)
        try:
            found = self._call(lambda: self._api.model_info(path))
        except RepositoryNotFoundError:
            self._call(lambda: self._api.create_repo(path, private=private, exist_ok=True))
        else:
            if private and not found.private:
                raise UsageError(f"hf://{path} is there, and public: `private=` makes a new repository so") from None
        try:
            return self._commit(branch)
        except RevisionNotFoundError:
            self._call(lambda: self._api.create_branch(path, branch=branch, exist_ok=True))
            return self._commit(branch)

    def _commit(self, branch: str) -> str:
        found = self._call(lambda: self._api.model_info(self.address.path, revision=branch))
        if not isinstance(found.sha, str) or not _COMMIT.fullmatch(found.sha):
            raise OutputError("the hub names no commit of it", file=self.address)
        return found.sha

    def listed(self) -> dict[str, _Remote]:
        """Return the branch's files."""
        found = self._call(
            lambda: list(
                self._api.list_repo_tree(self.address.path, recursive=True, revision=str(self.address.revision))
            )
        )
        return {each.path: _Remote(each.size, each.lfs and each.lfs.sha256) for each in found if hasattr(each, "size")}

    def read(self, name: str) -> bytes | None:
        """Return a small file of the branch; None where it is none."""
        with TemporaryDirectory() as folder:
            asked = {"revision": str(self.address.revision), "local_dir": folder}
            path = self._call(lambda: self._api.hf_hub_download(self.address.path, name, **asked))
            data = Path(path).read_bytes()
        return data if len(data) <= LIMIT else None

    def preupload(self, operation: Any) -> None:
        """Upload the content of a large file; a small one goes with the commit."""
        self._call(
            lambda: self._api.preupload_lfs_files(
                self.address.path, [operation], revision=str(self.address.revision), free_memory=False
            )
        )

    def committed(self, operations: list[Any], message: str, *, parent: str) -> str:
        """Commit what was uploaded; return the commit's id.

        A commit whose answer was lost is found again: the branch has moved, and what is to be committed is there.
        """
        try:
            made = self._call(
                lambda: self._api.create_commit(
                    self.address.path,
                    operations,
                    commit_message=message,
                    revision=str(self.address.revision),
                    parent_commit=parent,
                )
            )
        except OSError as error:
            if status_of(error) != _MOVED or any(map(self._lacks, operations)):
                raise
            return self._commit(str(self.address.revision))
        return str(made.oid)

    def _lacks(self, operation: Any) -> bool:
        """Tell whether the branch does not hold what an operation would bring; a small file by its size."""
        found, info = self.listed().get(operation.path_in_repo), operation.upload_info
        return found is None or (found.size, found.sha256 or info.sha256.hex()) != (info.size, info.sha256.hex())

    def _call(self, work: Callable[[], Any]) -> Any:
        return retried(str(self.address), work)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep huggingface_hub's bars away while the block runs, for there is one of ours, and secrets out of its log."""
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    guard("huggingface_hub")
    before = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            enable_progress_bars()


@contextlib.contextmanager
def _kindly(address: Address) -> Iterator[None]:
    """Say what the hub refuses, and what to do about it."""
    try:
        yield
    except (CheckpointError, OutputError, UsageError):
        raise
    except Exception as error:
        status, text = status_of(error), clean(" ".join(_innermost(error).split()))[:300]
        if status is None and not isinstance(error, (OSError, ValueError, RuntimeError)):
            raise
        raise OutputError(
            _WHY.get(status or 0, "cannot be uploaded"),
            file=address,
            found=text or type(error).__name__,
            remedy=_remedy(status, text),
        ) from None


_WHY = {
    401: "the hub does not know who you are",
    403: "the hub does not let you write there",
    404: "the hub has no such place for you",
    _MOVED: "the branch moved while this was uploaded",
}


def _remedy(status: int | None, text: str) -> str:
    if re.search(r"(?i)storage|quota|limit reached|payment", text) or status in {402, 413}:
        return f"make room there, or raise the storage of your account; then {_AGAIN}"
    if status in {401, 404}:
        return _LOGIN
    if status == 403:
        return f"take an organisation or name of your own, and {_LOGIN}"
    return _AGAIN


def _innermost(error: BaseException) -> str:
    """Return what the first of a chain of errors says; libraries wrap it in words of their own."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(getattr(error, "server_message", None) or error)
