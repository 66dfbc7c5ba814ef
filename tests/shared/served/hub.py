"""A hub on this machine's loopback address that speaks Hugging Face's protocol, up and down, with faults on request.

    with hub() as server:
        server.repo("org/name", folder)  # or {"config.json": "{}", ...}
        server.fault("drop", file="*-00002-*.safetensors", after=1000)
        server.here(monkeypatch)  # this process's huggingface_hub asks this server from now on
        ...
        subprocess.run(..., env=os.environ | server.environment())
        assert all(seen.token is None for seen in server.seen if seen.host != "hub")

Large files come from another host (127.0.0.2) by a signed address, as from the real hub's storage; 127.0.0.3 is a host
that has no business here (fault "elsewhere").
"""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from served.answering import Server
from served.faults import KINDS, Fault, Link, Seen
from served.repos import LARGE_SIZE, Blob, Repo, blob_of
from served.routes import Routes, quoted

if TYPE_CHECKING:
    import pytest

HOSTS = {"hub": "127.0.0.1", "cdn": "127.0.0.2", "other": "127.0.0.3"}


class Hub:
    """The server's state; everything may be changed while it runs.

    Attributes:
        token: The one token that it knows; None if anybody may do anything.
        read_only: Whether that token may only read.
        user: Whose token it is.
        page: Entries in one page of a listing.
        large: Bytes from which a file is uploaded as a large one.
        part_size: Bytes in one part of an upload.
        quota: Bytes of the largest file that it takes.
        link: The line to it, shared by all connections (`link.rate`, bytes a second).
        latency: Seconds before each answer.
        seen: All requests in their order.
    """

    def __init__(self, folder: Path) -> None:
        """A hub without repositories; uploads and the client's home lie in `folder`."""
        self.folder = folder
        self.token: str | None = None
        self.read_only = False
        self.user = "somebody"
        self.page = 1000
        self.large = LARGE_SIZE
        self.part_size = 5 * 1000**2
        self.quota = 10**15
        self.link = Link()
        self.latency = 0.0
        self.seen: list[Seen] = []
        self.faults: list[Fault] = []
        self.repos: dict[str, Repo] = {}
        self.contents: dict[str, Blob] = {}
        self.large_files: dict[str, Blob] = {}
        self.parts: dict[tuple[str, int], Path] = {}
        self.routes = Routes(self)
        self.servers: dict[str, Server] = {}
        self._signatures = 0
        self._expired = 0
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        """What HF_ENDPOINT is to be."""
        return self.servers["hub"].url

    @property
    def home(self) -> Path:
        """What HF_HOME is to be."""
        return self.folder / "home"

    # Repositories

    def repo(
        self, name: str, files: Path | Mapping[str, bytes | str | Path], *, private: bool = False, gated: bool = False
    ) -> str:
        """Make a repository with these files (or a folder's); the id of its commit."""
        self.repos[name] = Repo(name, private=private, gated=gated)
        return self.commit(name, files, "initial commit")

    def commit(
        self,
        name: str,
        files: Path | Mapping[str, bytes | str | Path | None],
        title: str = "a commit",
        branch: str = "main",
    ) -> str:
        """Change files of a repository (None deletes one); the new commit's id. The branch moves to it."""
        if isinstance(files, Path):
            found = sorted(path for path in files.rglob("*") if path.is_file())
            files = {path.relative_to(files).as_posix(): path for path in found}
        repo = self.repos[name]
        now = repo.at(branch) or repo.at("main")
        state = dict(now.files) if now else {}
        for path, content in files.items():
            if content is None:
                del state[path]
                continue
            state[path] = blob = blob_of(path, content)
            self.contents[blob.sha256] = blob
            if blob.large:
                self.large_files[blob.sha256] = blob
        return repo.commit(state, title, branch=branch).oid

    def files(self, name: str, revision: str = "main") -> dict[str, Blob]:
        """The files of a repository as they are now."""
        commit = self.repos[name].at(revision)
        if commit is None:
            raise KeyError(revision)
        return dict(commit.files)

    # Faults

    def fault(self, kind: str, **how: Any) -> Fault:
        """From now on this goes wrong; see `served.faults.Fault`."""
        if kind not in KINDS:
            raise ValueError(f"{kind!r} is none of {', '.join(KINDS)}")
        self.faults.append(Fault(kind, **how))
        return self.faults[-1]

    def expire(self) -> None:
        """No signed address that was given out so far is good any more."""
        self._expired = self._signatures

    def noted(self, seen: Seen) -> Fault | None:
        """Note a request; the fault that is its lot."""
        with self._lock:
            self.seen.append(seen)
            fault = next((fault for fault in self.faults if fault.meets(seen)), None)
            seen.fault = fault.kind if fault else None
            return fault

    def signed(self, host: str, path: str, file: str) -> str:
        """An address on a storage host, good until `expire`."""
        with self._lock:
            self._signatures += 1
            number = self._signatures
        secret = f"{number}-{self.secret}"
        return (
            f"{self.servers[host].url}/{path}?file={quoted(file)}&Signature={secret}&X-Amz-Security-Token={self.secret}"
        )

    @property
    def secret(self) -> str:
        """Part of each signed address; nobody may keep it."""
        return "signed-for-one-hour"

    def valid(self, signature: str) -> bool:
        """Whether a signed address is good."""
        number, _, secret = signature.partition("-")
        return secret == self.secret and number.isdigit() and int(number) > self._expired

    def elsewhere(self, seen: Seen) -> str:
        """The address on the host without business here of the file that `seen` asks for."""
        for repo in self.repos.values():
            for commit in reversed(repo.commits.values()):
                if seen.file in commit.files:
                    return self.signed("other", f"blobs/{commit.files[seen.file].sha256}", seen.file)
        return f"{self.servers['other'].url}/nothing"

    # What clients are told

    def environment(self, token: str | None = None) -> dict[str, str]:
        """Variables with which another process takes this server for the hub."""
        told = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(self.home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": ",".join(HOSTS.values()),
            "no_proxy": ",".join(HOSTS.values()),
        }
        return told | ({"HF_TOKEN": token} if token else {})

    def here(self, monkeypatch: pytest.MonkeyPatch, token: str | None = None) -> None:
        """This process's huggingface_hub asks this server until the test ends.

        It reads its environment once, when it is imported; what it read is so replaced.
        """
        from huggingface_hub import constants, hf_api
        from huggingface_hub.utils import _http

        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in self.environment(token).items():
            monkeypatch.setenv(name, value)
        read: dict[str, object] = {
            "ENDPOINT": self.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HOME": str(self.home),
            "HF_HUB_CACHE": str(self.home / "hub"),
            "HF_TOKEN_PATH": str(self.home / "token"),
            "HF_STORED_TOKENS_PATH": str(self.home / "stored_tokens"),
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_OFFLINE": False,
        }
        for constant, what in read.items():
            monkeypatch.setattr(constants, constant, what)
        monkeypatch.setattr(hf_api.api, "endpoint", self.url)
        monkeypatch.setattr(_http, "_HUB_ORIGINS", frozenset({("http", *self.servers["hub"].server_address[:2])}))
        _http.close_session()


@contextmanager
def hub(folder: Path | None = None) -> Iterator[Hub]:
    """A running hub; what it keeps lies in `folder`, or in one of its own that goes with it."""
    own = None if folder else Path(tempfile.mkdtemp(prefix="hub-"))
    made = Hub(folder or own or Path())
    made.home.mkdir(parents=True, exist_ok=True)
    threads = []
    for host, address in HOSTS.items():
        server = made.servers[host] = Server(made, host, address)
        threads.append(threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True))
        threads[-1].start()
    try:
        yield made
    finally:
        for server in made.servers.values():
            server.shutdown()
            server.server_close()
        for thread in threads:
            thread.join()
        if own:
            shutil.rmtree(own, ignore_errors=True)
