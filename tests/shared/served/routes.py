"""What the hub's addresses mean: what huggingface_hub 2.4 asks, answered as the real hub answers it.

Source: the requests in huggingface_hub's hf_api.py, file_download.py, _commit_api.py and lfs.py; the public description
at https://huggingface.co/docs/hub/api; large files by
https://github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md and the hub's own transfer in parts.
"""

from __future__ import annotations

import base64
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote

from served.repos import Blob, Commit, Repo, blob_of, entry

if TYPE_CHECKING:
    from served.answering import Handler
    from served.hub import Hub

_API = {"revision": "info", "tree": "tree", "paths-info": "paths", "refs": "refs", "branch": "branch"}
_FIXED = {"api/whoami-v2": "whoami", "api/validate-yaml": "yaml", "api/repos/create": "create"}


class Routes:
    """The hub's addresses."""

    def __init__(self, hub: Hub) -> None:
        """For this hub's repositories and large files."""
        self.hub = hub

    def kind(self, asked: Handler) -> tuple[str, str]:
        """The kind of a request (`Seen.kind`) and the path of the file that it is for."""
        steps = asked.steps
        if asked.server.host != "hub":
            word = {"blobs": "content", "put": "put"}.get(steps[0], "other")
            return ("head" if asked.command == "HEAD" else word), asked.query.get("file", "")
        if (fixed := _FIXED.get("/".join(steps))) is not None:
            return fixed, ""
        if steps[:2] == ["api", "models"]:
            word = steps[4] if len(steps) > 4 else ""
            return (_API.get(word, word) if word else "info"), ""
        if "resolve" in steps[1:3]:
            at = steps.index("resolve")
            file = "/".join(steps[at + 2 :])
            found = self._file("/".join(steps[:at]), steps[at + 1], file)
            return ("content" if asked.command == "GET" and found and not found.large else "resolve"), file
        if steps[-4:] == ["info", "lfs", "objects", "batch"]:
            return "batch", ""
        return steps[0] if steps[0] in ("complete", "verify") else "other", ""

    def answer(self, asked: Handler) -> None:
        """Any request."""
        if asked.server.host != "hub":
            self._storage(asked)
            return
        answer = getattr(self, f"_{asked.seen.kind}", None)
        if answer is None or asked.seen.kind == "other":
            asked.refuse(404, "NotFound", "no such address")
        elif asked.seen.kind in ("whoami", "yaml", "create", "complete", "verify"):
            answer(asked)
        else:
            self._in_repo(asked, answer)

    def _in_repo(self, asked: Handler, answer: Any) -> None:
        """A request about a repository, if the one who asks may see it."""
        steps = asked.steps
        if steps[:2] == ["api", "models"]:
            name = "/".join(steps[2:4])
        elif asked.seen.kind == "batch":
            name = "/".join(steps[:2]).removesuffix(".git")
        else:
            name = "/".join(steps[: steps.index("resolve")])
        repo = self.hub.repos.get(name)
        known = self._known(asked)
        if repo is None or (repo.private and not known):
            asked.refuse(404 if known else 401, "RepoNotFound", "Repository not found")
        elif repo.gated and asked.seen.kind in ("resolve", "content") and not known:
            asked.refuse(401, "GatedRepo", f"Access to model {name} is restricted. You must be authenticated.")
        else:
            answer(asked, repo)

    def _known(self, asked: Handler) -> bool:
        return self.hub.token is None or asked.seen.token == f"Bearer {self.hub.token}"

    def _may(self, asked: Handler) -> bool:
        """Whether one may write; says so if not."""
        if not self._known(asked):
            asked.refuse(401, "", "Invalid username or password.")
        elif self.hub.read_only:
            asked.refuse(403, "", "Forbidden: you must use a write token to upload to a repository.")
        else:
            return True
        return False

    def _file(self, name: str, revision: str, file: str) -> Blob | None:
        repo = self.hub.repos.get(name)
        commit = repo.at(revision) if repo else None
        return commit.files.get(file) if commit else None

    def _commit_of(self, asked: Handler, repo: Repo, revision: str) -> Commit | None:
        commit = repo.at(revision)
        if commit is None:
            asked.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    # Reading

    def _whoami(self, asked: Handler) -> None:
        if asked.seen.token is None or not self._known(asked):
            asked.refuse(401, "", "Invalid username or password.")
        else:
            asked.say(200, {"name": self.hub.user, "type": "user", "orgs": [], "auth": {"accessToken": {}}})

    def _info(self, asked: Handler, repo: Repo) -> None:
        if commit := self._commit_of(asked, repo, asked.steps[5] if len(asked.steps) > 5 else "main"):
            asked.say(200, repo.info(commit, sizes=asked.query.get("blobs", "").lower() in ("true", "1")))

    def _tree(self, asked: Handler, repo: Repo) -> None:
        if commit := self._commit_of(asked, repo, asked.steps[5]):
            recursive = asked.query.get("recursive", "").lower() in ("true", "1")
            entries = repo.tree(commit, "/".join(asked.steps[6:]), recursive=recursive)
            at, page = int(asked.query.get("cursor", 0)), self.hub.page
            link = {}
            if at + page < len(entries):
                more = f"{self.hub.url}{asked.parts.path}?recursive={recursive}&cursor={at + page}"
                link = {"Link": f'<{more}>; rel="next"'}
            asked.say(200, entries[at : at + page], link)

    def _paths(self, asked: Handler, repo: Repo) -> None:
        wanted = parse_qs(asked.body().decode()).get("paths", [])
        if commit := self._commit_of(asked, repo, asked.steps[5]):
            asked.say(200, [entry(name, commit.files[name]) for name in wanted if name in commit.files])

    def _refs(self, asked: Handler, repo: Repo) -> None:
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid} for name, oid in repo.branches.items()
        ]
        asked.say(200, {"branches": branches, "tags": [], "converts": [], "pullRequests": []})

    def _resolve(self, asked: Handler, repo: Repo) -> None:
        at = asked.steps.index("resolve")
        commit = self._commit_of(asked, repo, asked.steps[at + 1])
        if commit is None:
            return
        blob = commit.files.get(asked.seen.file)
        if blob is None:
            message = "Entry not found"
            told = {"X-Error-Code": "EntryNotFound", "X-Error-Message": message, "X-Repo-Commit": commit.oid}
            asked.say(404, {"error": message}, told)
            return
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{blob.etag}"'}
        if not blob.large:
            asked.serve(blob, headers)
            return
        linked = {"X-Linked-Size": str(blob.size), "X-Linked-Etag": f'"{blob.sha256}"'}
        asked.redirect(self.hub.signed("cdn", f"blobs/{blob.sha256}", asked.seen.file), headers | linked)

    _content = _resolve

    # Writing

    def _yaml(self, asked: Handler) -> None:
        content = json.loads(asked.body())["content"]
        errors = [] if content.startswith("---\n") else [{"message": "empty or missing yaml metadata"}]
        asked.say(200, {"errors": [], "warnings": errors})

    def _create(self, asked: Handler) -> None:
        wanted = json.loads(asked.body())
        if not self._may(asked):
            return
        name = f"{wanted.get('organization') or self.hub.user}/{wanted['name']}"
        url = f"{self.hub.url}/{name}"
        if name in self.hub.repos:
            asked.say(409, {"error": "You already created this model repo", "url": url})
            return
        private = wanted.get("private") or wanted.get("visibility") == "private"
        self.hub.repo(name, {".gitattributes": "*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}, private=private)
        asked.say(200, {"url": url, "name": name, "id": name})

    def _branch(self, asked: Handler, repo: Repo) -> None:
        wanted = json.loads(asked.body() or b"{}")
        if not self._may(asked):
            return
        name = asked.steps[5]
        if name in repo.branches:
            asked.refuse(409, "", f"Reference already exists: {name}")
        elif commit := self._commit_of(asked, repo, wanted.get("startingPoint", "main")):
            repo.branches[name] = commit.oid
            asked.say(201, {})

    def _preupload(self, asked: Handler, repo: Repo) -> None:
        wanted = json.loads(asked.body())["files"]
        if not self._may(asked):
            return
        if commit := self._commit_of(asked, repo, asked.steps[5]):
            told = []
            for file in wanted:
                name, there = file["path"], commit.files.get(file["path"])
                mode = "lfs" if blob_of(name, b"").large or file["size"] >= self.hub.large else "regular"
                told.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": there and there.etag})
            asked.say(200, {"files": told})

    def _batch(self, asked: Handler, _repo: Repo) -> None:
        wanted = json.loads(asked.body())
        if self._may(asked):
            asked.say(
                200,
                {"transfer": "multipart", "objects": [self._upload(of["oid"], of["size"]) for of in wanted["objects"]]},
            )

    def _upload(self, oid: str, size: int) -> dict[str, Any]:
        """How a large file may be sent: not at all, in one piece, or in parts."""
        told: dict[str, Any] = {"oid": oid, "size": size}
        if size > self.hub.quota:
            return told | {"error": {"code": 403, "message": "Storage limit reached"}}
        if oid in self.hub.large_files:
            return told
        part = self.hub.part_size
        verify = {"href": f"{self.hub.url}/verify/{oid}"}
        if size <= part:
            return told | {
                "actions": {"upload": {"href": self.hub.signed("cdn", f"put/{oid}/0", "")}, "verify": verify}
            }
        count = -(-size // part)
        header = {str(n): self.hub.signed("cdn", f"put/{oid}/{n}", "") for n in range(1, count + 1)}
        upload = {"href": f"{self.hub.url}/complete/{oid}", "header": {"chunk_size": str(part), **header}}
        return told | {"actions": {"upload": upload, "verify": verify}}

    def _complete(self, asked: Handler) -> None:
        wanted = json.loads(asked.body())
        oid = asked.steps[1]
        parts = [self.hub.parts.get((oid, part["partNumber"])) for part in wanted["parts"]]
        if any(part is None for part in parts):
            asked.refuse(400, "", "a part is missing")
            return
        whole = self._spool()
        with whole.open("wb") as file:
            for part in parts:
                if part is not None:
                    file.write(part.read_bytes())
        self._keep(asked, oid, whole)

    def _verify(self, asked: Handler) -> None:
        wanted = json.loads(asked.body())
        kept = self.hub.large_files.get(wanted["oid"])
        asked.say(200 if kept and kept.size == wanted["size"] else 404, {})

    def _commit(self, asked: Handler, repo: Repo) -> None:
        lines = [json.loads(line) for line in asked.body().splitlines()]
        if not self._may(asked):
            return
        branch = asked.steps[5]
        now = self._commit_of(asked, repo, branch)
        if now is None:
            return
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, now.oid):
            asked.refuse(412, "", "A commit has happened since. Please refresh and try again.")
            return
        files = dict(now.files)
        for line in lines[1:]:
            of = line["value"]
            if line["key"] == "file":
                files[of["path"]] = Blob(base64.b64decode(of["content"]), large=False)
            elif line["key"] == "lfsFile" and of["oid"] in self.hub.large_files:
                files[of["path"]] = self.hub.large_files[of["oid"]]
            elif line["key"] == "deletedFile":
                files.pop(of["path"], None)
            else:
                asked.refuse(400, "", f"no such large file: {of.get('path')}")
                return
        made = repo.commit(files, header["summary"], branch=branch)
        url = f"{self.hub.url}/{repo.name}/commit/{made.oid}"
        asked.say(200, {"commitUrl": url, "commitOid": made.oid, "pullRequestUrl": None})

    # The storage of large files, on other hosts

    def _storage(self, asked: Handler) -> None:
        if not self.hub.valid(asked.query.get("Signature", "")):
            asked.send(403, b"<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>")
        elif asked.seen.kind == "put":
            self._put(asked)
        elif (blob := self.hub.contents.get(asked.steps[-1])) is not None:
            asked.serve(blob, {"ETag": f'"{blob.etag}"'})
        else:
            asked.send(404, b"")

    def _put(self, asked: Handler) -> None:
        part = self._spool()
        with part.open("wb") as file:
            for piece in asked.pieces():
                file.write(piece)
        oid, number = asked.steps[1], int(asked.steps[2])
        if number:
            self.hub.parts[oid, number] = part
            asked.send(200, b"", {"ETag": f'"part-{number}"'})
        else:
            self._keep(asked, oid, part)

    def _spool(self) -> Path:
        handle = tempfile.NamedTemporaryFile(dir=self.hub.folder, delete=False)  # noqa: SIM115 - the hub's folder goes
        handle.close()
        return Path(handle.name)

    def _keep(self, asked: Handler, oid: str, file: Path) -> None:
        blob = Blob(file, large=True)
        if blob.sha256 != oid:
            asked.send(400, b"<Error><Code>BadDigest</Code></Error>")
            return
        self.hub.large_files[oid] = self.hub.contents[oid] = blob
        asked.say(200, {})


def quoted(text: str) -> str:
    """`text` as a value in an address."""
    return quote(text, safe="")
