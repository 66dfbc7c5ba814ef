"""The hub that tests run speaks what huggingface_hub speaks: down, by ranges, up, in one piece and in parts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    HfApi,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
)
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils._http import get_session

from served.hub import Hub, hub

LARGE = bytes(range(256)) * 1000
NAME = "org/model"
KNOWN, UNKNOWN = "hf_known", "hf_unknown"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with one model."""
    with hub(tmp_path / "hub") as made:
        made.repo(NAME, {"config.json": "{}", "model.safetensors": LARGE, "deep/er/notes.txt": "hello"})
        made.here(monkeypatch)
        yield made


def test_what_is_there_is_downloaded(server: Hub) -> None:
    """Info, listings page by page, a file by a branch and by a commit, and a whole snapshot."""
    server.page = 2
    api = HfApi()
    info = api.model_info(NAME, files_metadata=True)
    assert info.sha == server.repos[NAME].branches["main"]
    sizes = {file.rfilename: (file.size, file.lfs and file.lfs.sha256) for file in info.siblings or ()}
    assert sizes["model.safetensors"] == (len(LARGE), hashlib.sha256(LARGE).hexdigest())
    assert sizes["config.json"] == (2, None)
    assert {entry.path for entry in api.list_repo_tree(NAME, recursive=True)} == {*sizes, "deep", "deep/er"}
    folder = Path(snapshot_download(NAME))
    assert (folder / "model.safetensors").read_bytes() == LARGE
    assert (folder / "deep/er/notes.txt").read_text() == "hello"
    old = info.sha
    server.commit(NAME, {"config.json": '{"new": 1}'})
    assert Path(hf_hub_download(NAME, "config.json")).read_text() == '{"new": 1}'
    assert Path(hf_hub_download(NAME, "config.json", revision=old)).read_text() == "{}"


def test_large_files_come_from_another_host_by_ranges(server: Hub) -> None:
    """A signed address without the token; it can expire."""
    server.token = KNOWN
    found = get_hf_file_metadata(hf_hub_url(NAME, "model.safetensors"), token=KNOWN)
    assert (found.size, found.etag) == (len(LARGE), hashlib.sha256(LARGE).hexdigest())
    answer = get_session().get(found.location, headers={"Range": "bytes=10-19"})
    assert (answer.status_code, answer.content) == (206, LARGE[10:20])
    assert answer.headers["Content-Range"] == f"bytes 10-19/{len(LARGE)}"
    assert get_session().get(found.location, headers={"Range": f"bytes={len(LARGE)}-"}).status_code == 416
    assert [seen.host for seen in server.seen if seen.token] == ["hub"]
    server.expire()
    assert get_session().get(found.location).status_code == 403


def test_what_is_not_there_is_said_as_the_hub_says_it(server: Hub) -> None:
    """No such repository, revision, file."""
    with pytest.raises(RepositoryNotFoundError):
        HfApi().model_info("org/other")
    with pytest.raises(RevisionNotFoundError):
        HfApi().model_info(NAME, revision="other")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(NAME, "other.json")
    server.token = KNOWN
    server.repos[NAME].private = True
    with pytest.raises(RepositoryNotFoundError):
        HfApi(token=UNKNOWN).model_info(NAME)


@pytest.mark.parametrize("part", [10**6, 50_000])
def test_files_are_uploaded_and_committed(server: Hub, part: int) -> None:
    """In one piece and in parts; large files that are there are not sent twice; one commit holds all."""
    server.token, server.part_size = KNOWN, part
    api = HfApi(token=KNOWN)
    assert api.whoami()["name"] == "somebody"
    api.create_repo("somebody/new", private=True, exist_ok=True)
    api.create_repo("somebody/new", exist_ok=True)
    assert server.repos["somebody/new"].private
    api.create_branch("somebody/new", branch="q", exist_ok=True)
    api.create_branch("somebody/new", branch="q", exist_ok=True)
    data = LARGE[::-1]
    for _ in range(2):
        operations = [
            CommitOperationAdd("model.safetensors", data),
            CommitOperationAdd("README.md", b"---\nlicense: mit\n---\n"),
        ]
        api.preupload_lfs_files("somebody/new", operations, revision="q")
        assert "model.safetensors" not in server.files("somebody/new", "q")
    api.create_commit("somebody/new", operations, commit_message="all", revision="q")
    assert sum(seen.received for seen in server.seen if seen.kind == "put") == len(data)
    files = server.files("somebody/new", "q")
    assert files["model.safetensors"].read(0, len(data)) == data
    assert files["README.md"].large is False
    assert "README.md" not in server.files("somebody/new")
    with pytest.raises(HfHubHTTPError):
        HfApi(token=UNKNOWN).create_repo("somebody/other")


def test_faults_meet_the_requests_they_are_meant_for(server: Hub) -> None:
    """The n-th request of a kind for a file, so many times, and no other."""
    location = get_hf_file_metadata(hf_hub_url(NAME, "model.safetensors")).location
    fault = server.fault("status", file="*.safetensors", nth=2, times=2, status=429, headers={"Retry-After": "0"})
    codes = [get_session().get(location).status_code for _ in range(4)]
    assert codes == [200, 429, 429, 200]
    assert fault.fired == 2
    server.fault("wrong", file="*.safetensors")
    assert get_session().get(location).content != LARGE
    server.fault("bare")
    answer = get_session().get(location, headers={"Range": "bytes=0-9"})
    assert answer.status_code == 206
    assert "Content-Range" not in answer.headers
    server.fault("whole")
    assert get_session().get(location, headers={"Range": "bytes=0-9"}).status_code == 200
    server.fault("shrink", size=100)
    assert len(get_session().get(location).content) == 100
    server.fault("grow", size=len(LARGE) + 5)
    assert get_session().get(location).content == LARGE + bytes(5)
    server.fault("elsewhere")
    assert get_session().get(location, headers={"Authorization": "Bearer x"}).content == LARGE
    assert server.seen[-1].host == "other"
    assert server.seen[-1].token is None
    server.fault("then", then=lambda: server.commit(NAME, {"config.json": "[]"}))
    before = server.repos[NAME].branches["main"]
    get_session().get(location)
    assert server.repos[NAME].branches["main"] != before
