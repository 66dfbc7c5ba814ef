"""tokenizer_config.json beside a tiktoken.model: the special tokens, what they are for, and the chat template."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from k2quant.checkpoint.files import json_kinds as kinds
from k2quant.checkpoint.files.paths import read_limited
from k2quant.checkpoint.files.strict_json import parse_object
from k2quant.checkpoint.files.tokenizer.ranks import TIKTOKEN
from k2quant.errors import MalformedFile

SETTINGS = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
FAST = "tokenizer.json"

RESERVED = 256
"""Special tokens behind the last rank. Code of some releases has 258: ids that no K2 has a row for."""

_CLASS = "TikTokenTokenizer"
_LIMIT = 2**24  # bytes of a file
_NAMED = {"bos_token": "[BOS]", "eos_token": "[EOS]", "unk_token": None, "pad_token": None}
"""Tokens with a task, and which they are where the file is silent."""
_EXTRA = (
    "<|im_end|>",
    "<|im_user|>",
    "<|im_assistant|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "[EOT]",
    "<|im_system|>",
    "<|im_middle|>",
)
"""Tokens that no text shows, where the file is silent."""
_STRIPPING = ("lstrip", "rstrip", "single_word")


class Words(NamedTuple):
    """The special tokens of a tokenizer."""

    ids: dict[str, int]
    """All of them, the reserved ones too."""
    special: dict[int, bool]
    """For those that the file names, whether it calls them special."""
    named: dict[str, str]
    """By task, such as `eos_token`."""
    extra: list[str]
    """Those without a task that no text shows."""
    template: str | dict[str, str] | None
    """Of chats: text, texts by name, or None."""
    longest: int | None
    """`model_max_length`."""


def settings_of(folder: Path) -> dict[str, Any]:
    """Return what tokenizer_config.json says; nothing where there is none.

    Raises:
        CheckpointError: it is no JSON object, or a link out of the folder.
    """
    path = folder / SETTINGS
    return parse_object(read_limited(path, _LIMIT), file=path) if path.exists() else {}


def is_kimi(folder: Path) -> bool:
    """Tell whether a folder's tokenizer is a tiktoken.model of K2's kind."""
    if not (folder / TIKTOKEN).exists():
        return False
    named = settings_of(folder).get("tokenizer_class")
    return named == _CLASS or (named is None and not (folder / FAST).exists())


def read_words(folder: Path, ranks: Collection[bytes]) -> Words:
    """Read the special tokens that stand behind the ranks.

    Args:
        folder: of the checkpoint.
        ranks: the tokens of tiktoken.model.

    Raises:
        CheckpointError: the file is not there or lies: an id that is no special token's, a token that stands twice or
            is one of the ranks', one that strips blanks, a task without its token.
    """
    path = folder / SETTINGS
    if not path.exists():
        remedy = f"take {SETTINGS} from the model's release: it names the special tokens"
        raise MalformedFile("is not there", file=path, remedy=remedy)
    settings = settings_of(folder)
    try:
        special = _special(settings, ranks)
        ids = _ids(special, ranks)
        return Words(
            ids=ids,
            special={place: kinds.mapping(token).get("special") is True for place, token in special.items()},
            named=_named(settings, ids),
            extra=_extra(settings, ids),
            template=template_of(folder, settings),
            longest=_longest(settings),
        )
    except (KeyError, TypeError, ValueError) as error:
        said = f"no {error}" if isinstance(error, KeyError) else str(error)
        remedy = f"take {SETTINGS} and tiktoken.model from one release of the model"
        raise MalformedFile("not what K2's tokenizer reads", file=path, found=said[:300], remedy=remedy) from error


def _special(settings: Mapping[str, Any], ranks: Collection[bytes]) -> dict[int, dict[str, Any]]:
    """Return what the file says of tokens, by id."""
    found = {}
    for key, value in kinds.mapping(settings.get("added_tokens_decoder") or {}).items():
        token = kinds.mapping(value)
        place = int(key) if re.fullmatch("0|[1-9][0-9]{0,8}", key) else -1
        if not len(ranks) <= place < len(ranks) + RESERVED:
            last = len(ranks) + RESERVED - 1
            raise ValueError(f"special token {key[:50]!r} where ids from {len(ranks)} to {last} stand")
        if stripping := [name for name in _STRIPPING if token.get(name)]:
            raise ValueError(f"special token {key}: {stripping[0]}, which tiktoken does not know")
        found[place] = token
    return found


def _ids(special: Mapping[int, Mapping[str, Any]], ranks: Collection[bytes]) -> dict[str, int]:
    """Return the id of each special token; those that the file does not name are reserved."""
    ids: dict[str, int] = {}
    for place in range(len(ranks), len(ranks) + RESERVED):
        content = kinds.text(special[place]["content"]) if place in special else f"<|reserved_token_{place}|>"
        if not content or content in ids or content.encode() in ranks:
            raise ValueError(f"special token {place}, {content[:100]!r}, is empty or stands twice")
        ids[content] = place
    return ids


def _named(settings: Mapping[str, Any], ids: Mapping[str, int]) -> dict[str, str]:
    found = {}
    for task, usual in _NAMED.items():
        value = settings.get(task, usual)
        if value is not None:
            found[task] = _known(value, task, ids)
    return found


def _extra(settings: Mapping[str, Any], ids: Mapping[str, int]) -> list[str]:
    older = settings.get("additional_special_tokens")  # the name before transformers 5
    named = settings.get("extra_special_tokens") or older
    if named is None:
        return [token for token in _EXTRA if token in ids]
    return [_known(value, "extra_special_tokens", ids) for value in kinds.values(named)]


def _known(value: object, task: str, ids: Mapping[str, int]) -> str:
    """Return a token as the file writes it, text or an object with its `content`."""
    token = kinds.text(value["content"] if isinstance(value, dict) else value)
    if token not in ids:
        raise ValueError(f"{task} {token[:100]!r}, which is none of its special tokens")
    return token


def template_of(folder: Path, settings: Mapping[str, Any]) -> str | dict[str, str] | None:
    """Return the chat template, or templates by name; its own file goes before the settings, as in transformers.

    Raises:
        CheckpointError: its file is no text, or a link out of the folder.
        KeyError, TypeError: what the settings hold is no template.
    """
    path = folder / TEMPLATE
    if path.exists():
        try:
            return read_limited(path, _LIMIT).decode("utf-8")
        except UnicodeDecodeError as error:
            raise MalformedFile("no text in UTF-8", file=path) from error
    value = settings.get("chat_template")
    if isinstance(value, list):
        return {kinds.text(kinds.mapping(entry)["name"]): kinds.text(entry["template"]) for entry in value}
    return None if value is None else kinds.text(value)


def _longest(settings: Mapping[str, Any]) -> int | None:
    value = settings.get("model_max_length")
    return None if value is None else int(kinds.number(value, low=1, high=1e40))
