"""Listings of S3, from stores that are none."""

from __future__ import annotations

from itertools import count, repeat
from typing import Any

import pytest

from k2quant.checkpoint.remote.address import parse
from k2quant.checkpoint.remote.pages import objects_below, pages
from k2quant.checkpoint.writing import holding
from k2quant.checkpoint.writing.objects import Objects
from k2quant.errors import CheckpointError, OutputError

MARKERS = {"Next": "From"}


@pytest.mark.parametrize("markers", [repeat(None), repeat(""), repeat("same"), count(1)], ids=repr)
def test_a_listing_without_an_end_is_refused(markers: Any) -> None:
    """It does not say where it goes on, says it again, or never stops."""
    with pytest.raises(CheckpointError, match="s3://b/p: a listing without an end"):
        list(pages(lambda _: {"IsTruncated": True, "Next": next(markers)}, MARKERS, "s3://b/p"))


def test_objects_keep_their_names() -> None:
    """Pages follow each other; a folder's mark is none, and a second slash makes another object, not the same."""
    there = ["docs/", "a", "/a", ""]

    def ask(asked: dict[str, Any]) -> dict[str, Any]:
        assert (asked["Bucket"], asked["Prefix"]) == ("b", "p/q/")
        at = int(asked.get("ContinuationToken", 0))
        page = {"Contents": [{"Key": f"p/q/{there[at]}", "Size": at % 3}]}
        return page | ({"IsTruncated": True, "NextContinuationToken": str(at + 1)} if at < 3 else {})

    assert {name: each["size"] for name, each in objects_below(ask, "b/p/q", "s3://b/p/q").items()} == {"a": 1, "/a": 2}


def test_a_lock_that_nobody_can_see_is_given_up(monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> None:
    """A store that takes it and has none ends in a line."""
    monkeypatch.setattr(holding, "pause", waits.append)
    monkeypatch.setattr(holding, "lock_at", lambda *_: None)
    with (
        pytest.raises(OutputError, match="a lock that was written is not there"),
        holding.held(Objects(parse("memory://locks/out"))),
    ):
        pass
    assert len(waits) == 8
