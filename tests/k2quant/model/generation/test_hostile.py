"""A tiktoken.model and a tokenizer_config.json that lie: refused by name, each with its own message."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from k2quant.errors import CheckpointError, MalformedFile
from k2quant.model.generation import open_tokenizer

Settings = dict[str, Any]


def line(token: bytes, rank: int | str) -> bytes:
    """Return a line of a tiktoken.model."""
    return base64.b64encode(token) + f" {rank}".encode()


LINES: dict[str, tuple[Callable[[list[bytes]], list[bytes]], str]] = {
    "no base64": (lambda lines: [*lines, b"a$b= 496"], "line 497 is no token"),
    "a pointer of git-lfs": (
        lambda _: [b"version https://git-lfs.github.com/spec/v1", b"size 5"],
        "a git-lfs pointer, not the file itself",
    ),
    "no rank": (lambda lines: [*lines, b"AAAA"], "line 497 is no token"),
    "a rank below 0": (lambda lines: [*lines, line(b"\0\0\0", -1)], "line 497 is no token"),
    "a rank of many digits": (lambda lines: [*lines, line(b"\0\0\0", "9" * 5000)], "line 497 is no token"),
    "a third word": (lambda lines: [*lines, line(b"\0\0\0", "496 1")], "line 497 is no token"),
    "a gap": (lambda lines: [*lines, line(b"\0\0\0", 497)], "line 497: a rank that leaves a gap.* 0 to 496"),
    "a token twice": (lambda lines: [*lines, line(b"a", 496)], "line 497: a token stands twice"),
    "a rank twice": (lambda lines: [*lines, line(b"\0\0\0", 3)], "line 497: a rank stands twice"),
    "an empty token": (lambda lines: [*lines, line(b"", 496)], "line 497: the length of a token.* 1 to 1024"),
    "an endless token": (lambda lines: [*lines, line(b"\0" * 1025, 496)], "line 497: the length of a token"),
    "a byte that is missing": (lambda lines: [line(b"\0\0\0", 64), *lines[:64], *lines[65:]], "not every byte .*b'a'"),
    "nothing": (lambda _: [], "not every byte is a token.* 0 of them"),
    "endless lines": (lambda _: [b"A"] * (2**20 + 2), "more tokens than any vocabulary"),
    "too many bytes": (lambda lines: [*lines, b"A" * 2**24], "too large"),
}


@pytest.mark.parametrize("case", LINES)
def test_ranks_that_lie_are_refused(case: str, kimi: Path) -> None:
    """Each way in which a tiktoken.model can be wrong has its message, with the line; nothing grows beyond bounds."""
    path = kimi / "tiktoken.model"
    change, said = LINES[case]
    path.write_bytes(b"\n".join(change(path.read_bytes().splitlines())))
    with pytest.raises(MalformedFile, match=f"tiktoken.model: .*{said}") as caught:
        open_tokenizer(kimi)
    assert len(str(caught.value)) < 1000


def test_ranks_may_stand_in_any_order(kimi: Path) -> None:
    """Lines in another order, with blank ones between them or ends of Windows, mean the same."""
    path, text = kimi / "tiktoken.model", "the quick 中文"
    wanted = open_tokenizer(kimi).encode(text)
    path.write_bytes(b"\r\n\r\n".join(reversed(path.read_bytes().splitlines())))
    assert open_tokenizer(kimi).encode(text) == wanted


def token(place: int, **changes: Any) -> Callable[[Settings], None]:
    """Change what the file says of a special token."""
    return lambda settings: settings["added_tokens_decoder"].setdefault(str(place), {}).update(changes)


SETTINGS: dict[str, tuple[Callable[[Settings], Any], str]] = {
    "an id among the ranks": (token(5, content="x"), "special token '5' where ids from 496 to 751"),
    "an id beyond": (token(752, content="x"), "special token '752'"),
    "an id twice": (lambda s: s["added_tokens_decoder"].update({"0496": {"content": "x"}}), "special token '0496'"),
    "an id of digits that are none": (lambda s: s["added_tokens_decoder"].update({"٤٩٦": {}}), "special token"),
    "a token twice": (token(500, content="[BOS]"), "special token 500, '.BOS.', is empty or stands twice"),
    "an empty token": (token(500, content=""), "special token 500"),
    "a token of the ranks": (token(500, content="a"), "special token 500"),
    "a reserved name": (token(500, content="<|reserved_token_501|>"), "special token 501"),
    "a token that strips": (token(500, lstrip=True), "special token 500: lstrip"),
    "no content": (token(600), "no 'content'"),
    "a token that is a number": (token(500, content=5), "5 where text stands"),
    "tokens in a list": (lambda s: s.update(added_tokens_decoder=[1]), "where an object stands"),
    "a task without its token": (lambda s: s.update({"eos_token": "</s>"}), "eos_token '</s>', which is none"),
    "a task for a number": (lambda s: s.update(pad_token=3), "3 where text stands"),
    "no token named": (lambda s: s.update(added_tokens_decoder={}), "bos_token '.BOS.', which is none"),
    "extra tokens that are unknown": (lambda s: s.update(additional_special_tokens=["<x>"]), "'<x>', which is none"),
    "extra tokens in an object": (lambda s: s.update(extra_special_tokens={"a": "b"}), "where a list stands"),
    "a length of nothing": (lambda s: s.update(model_max_length=0), "where a number from 1"),
    "a template that is a number": (lambda s: s.update(chat_template=3), "3 where text stands"),
    "templates without a name": (lambda s: s.update(chat_template=[{"template": "x"}]), "no 'name'"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_lie_are_refused(case: str, kimi: Path) -> None:
    """Each way in which the special tokens can be wrong is told, of which file, and with what to do."""
    path = kimi / "tokenizer_config.json"
    change, said = SETTINGS[case]
    settings = json.loads(path.read_text())
    change(settings)
    path.write_text(json.dumps(settings))
    with pytest.raises(MalformedFile, match=rf"tokenizer_config.json: .*{said}.*; take tokenizer_config.json and"):
        open_tokenizer(kimi)


def test_a_special_token_that_looks_like_bytes_is_refused(kimi: Path) -> None:
    """The letters by which transformers spells a token's bytes are no special token beside it: ids would be two."""
    path = kimi / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings["added_tokens_decoder"]["500"]["content"] = "Ġ"  # how a blank is spelled
    settings["additional_special_tokens"] = []
    path.write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="spelled as another token"):
        open_tokenizer(kimi)


def test_the_second_file_is_asked_for(kimi: Path) -> None:
    """Ranks alone do not say which ids are [BOS] and [EOS]."""
    (kimi / "tokenizer_config.json").unlink()
    with pytest.raises(MalformedFile, match=r"tokenizer_config.json: is not there; take tokenizer_config.json from"):
        open_tokenizer(kimi)


def test_its_files_stay_in_the_folder(kimi: Path, tmp_path: Path) -> None:
    """A link out of the folder and a pipe are refused, wherever they stand; a template that is no text, too."""
    (kimi / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(MalformedFile, match="no text in UTF-8"):
        open_tokenizer(kimi)
    (kimi / "chat_template.jinja").unlink()
    (kimi / "tiktoken.model").rename(tmp_path / "outside")
    (kimi / "tiktoken.model").symlink_to(tmp_path / "outside")
    with pytest.raises(CheckpointError, match="leaves the folder"):
        open_tokenizer(kimi)
    (kimi / "tiktoken.model").unlink()
    os.mkfifo(kimi / "tiktoken.model")
    with pytest.raises(CheckpointError, match="not a regular file"):
        open_tokenizer(kimi)
