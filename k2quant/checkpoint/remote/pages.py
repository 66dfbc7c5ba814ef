"""What S3 lists, page by page, from stores that may never come to an end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from k2quant.errors import CheckpointError

_MOST = 1000
"""Pages of a listing. A store puts a thousand entries on one (AWS, ListObjectsV2), a checkpoint has a hundred."""


def pages(
    ask: Callable[[dict[str, Any]], Mapping[str, Any]], markers: Mapping[str, str], what: str
) -> Iterator[Mapping[str, Any]]:
    """Yield the pages of a listing.

    Args:
        ask: asks for a page, given where it begins.
        markers: what says so in a request, by what says it in the answer before.
        what: is listed, for messages.

    Raises:
        CheckpointError: it says that it goes on, but not where, or where it was, or without end.
    """
    after: dict[str, Any] = {}
    for _ in range(_MOST):
        answer = ask(after)
        yield answer
        if not answer.get("IsTruncated"):
            return
        then = {asked: answer.get(said) for said, asked in markers.items()}
        if not any(then.values()) or then == after:
            break
        after = {asked: marker for asked, marker in then.items() if marker}
    raise CheckpointError(
        "a listing without an end", file=what, remedy="look at the store, or at what lies between; is the prefix right?"
    )


def objects_below(
    ask: Callable[[dict[str, Any]], Mapping[str, Any]], root: str, what: str
) -> dict[str, Mapping[str, Any]]:
    """Return what S3 says of all objects below a prefix, by their whole names behind its slash.

    What ends in a slash and holds nothing is a folder's mark, as consoles make them, and left out.

    Args:
        ask: asks for a page: ListObjectsV2.
        root: bucket and prefix.
        what: is listed, for messages.

    Raises:
        CheckpointError: the listing has no end.
    """
    bucket, _, prefix = root.partition("/")
    prefix = f"{prefix}/" if prefix else ""
    found: dict[str, Mapping[str, Any]] = {}
    whole: dict[str, Any] = {"Bucket": bucket, "Prefix": prefix}
    for page in pages(lambda after: ask({**whole, **after}), {"NextContinuationToken": "ContinuationToken"}, what):
        for each in page.get("Contents") or []:
            name, size = str(each["Key"]).removeprefix(prefix), each["Size"]
            if size or not (name.endswith("/") or not name):
                found[name] = {**each, "size": size}
    return found
