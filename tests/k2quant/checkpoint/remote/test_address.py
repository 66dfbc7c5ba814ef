"""Addresses as people write them, and what is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from k2quant.checkpoint.remote.address import Address, is_address, parse, spot
from k2quant.errors import UsageError


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("hf://org/name", Address("hf", "org/name")),
        ("hf://org/name@refs/pr/1", Address("hf", "org/name", "refs/pr/1")),
        ("hf://gpt2@main", Address("hf", "gpt2", "main")),
        ("s3://bucket/a/b/", Address("s3", "bucket/a/b")),
        ("S3A://bucket", Address("s3", "bucket")),
        ("gcs://bucket/a", Address("gs", "bucket/a")),
        ("memory://a/b", Address("memory", "a/b")),
        ("file:///a/b", Address("file", "/a/b")),
    ],
)
def test_an_address_is_read_and_said(text: str, address: Address) -> None:
    """What is said of it is read as the same address again."""
    assert parse(text) == address
    assert parse(str(address)) == address


def test_folders_are_paths() -> None:
    """A folder by its `file://` is that folder; a path is a path, whatever it looks like; Windows has no say."""
    assert spot("file:///a/b") == Path("/a/b")
    assert spot("a/b") == Path("a/b")
    assert spot(Path("hf://org/name")) == Path("hf:/org/name")
    assert spot(Address("s3", "a")) == Address("s3", "a")
    assert not is_address(Path("s3://a"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("hf://org/name/deeper", "names no model on a hub"),
        ("hf://datasets/org/name", "names no revision of a model"),
        ("hf://org/name@a b", "names no revision"),
        ("hf://", "expected hf://org/name"),
        ("s3://bucket/../other", "expected s3://bucket/prefix"),
        ("s3://bucket//a", "expected s3://bucket/prefix"),
        ("s3://bucket/a\nb", r"bucket/a\nb"),
        ("file://a/b", "expected file:///path"),
        ("ftq://a/b", "unknown scheme ftq://"),
        ("zip://a/b", "unknown scheme zip://"),
        ("https://example.org/model", "no place of checkpoints"),
        ("https://huggingface.co/org/name/tree/v1", "its address here is hf://org/name@v1"),
        ("http://hf.co/org/name", "its address here is hf://org/name"),
        ("no address", "no address"),
    ],
)
def test_what_is_no_address_is_refused_with_what_would_be(text: str, said: str) -> None:
    """A message on one line, with a form that is taken."""
    with pytest.raises(UsageError) as caught:
        parse(text)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "hf://hf_sesame@org/name",
        "hf://user:sesame@org/name",
        "hf://user:sesame@name",
        "s3://key:sesame@bucket/a",
        "https://user:sesame@huggingface.co/org/name",
        "s3://bucket/a?X-Amz-Signature=sesame",
        "https://huggingface.co/org/name?token=sesame",
        "gs://bucket/a#sesame",
    ],
)
def test_what_may_be_secret_is_refused_and_not_repeated(text: str) -> None:
    """Neither the message nor the error behind it holds the word."""
    with pytest.raises(UsageError) as caught:
        parse(text)
    assert "sesame" not in str(caught.value)
    assert caught.value.__cause__ is None
