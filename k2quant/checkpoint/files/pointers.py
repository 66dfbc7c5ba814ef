"""Small files that stand where a large one should: what a clone leaves behind when the content did not come along."""

from __future__ import annotations

import re

from k2quant.errors import MalformedFile

POINTER_LIMIT = 1024
"""Most bytes of a pointer; git-lfs takes nothing larger for one."""

_LFS = re.compile(rb"(?:\xef\xbb\xbf)?version https?://(?:git-lfs|hawser)\.github\.com/spec/")
_LFS_SIZE = re.compile(rb"^size (\d{1,19})\s*$", re.MULTILINE)
_ANNEX = re.compile(rb"/annex/objects/[^\s/]+\n?")
_XET = re.compile(rb"# xet version \d")
_LINK = re.compile(rb"(?:\.\.?/)+[^\x00-\x1f]+")  # git ends it with no newline, as no editor does

_FETCH = "fetch the content: `git lfs pull` in the clone, or download it with `hf download`"


def refuse_pointer(path: object, data: bytes) -> None:
    """Refuse a file that only says where the content is.

    Args:
        path: of the file.
        data: the whole file, of at most `POINTER_LIMIT` bytes.

    Raises:
        MalformedFile: it is a pointer of git-lfs, git-annex or git-xet, or a link that a checkout wrote as text.
    """
    if _LFS.match(data) or _XET.match(data):
        kind = "git-lfs" if _LFS.match(data) else "git-xet"
        size = _LFS_SIZE.search(data)
        found = f"{len(data)} bytes that stand for {int(size[1]):,} bytes" if size else None
        raise MalformedFile(f"a {kind} pointer, not the file itself", file=path, found=found, remedy=_FETCH)
    if _ANNEX.fullmatch(data):
        remedy = "fetch the content: `git annex get` in the clone"
        raise MalformedFile("a git-annex pointer, not the file itself", file=path, remedy=remedy)
    if _LINK.fullmatch(data):
        raise MalformedFile(
            "a link that a checkout wrote as text, not the file itself",
            file=path,
            found=data.decode(errors="replace")[:200],
            remedy="put the file that it names in its place, or clone anew with `git config core.symlinks true`",
        )
