"""How K2's code splits text, and whether the code beside a tiktoken.model does so; that code is read, never run."""

from __future__ import annotations

import io
import re
import tokenize
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from k2quant.checkpoint.files.kinds import CONFIG
from k2quant.checkpoint.files.paths import inside, read_limited
from k2quant.checkpoint.files.strict_json import parse_object
from k2quant.errors import UnsupportedFormat

_BEFORE = r"[^\r\n\p{L}\p{N}]?"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_BEHIND = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERN = (
    r"[\p{Han}]+",
    f"{_BEFORE}{_UPPER}*{_LOWER}+{_BEHIND}",
    f"{_BEFORE}{_UPPER}+{_LOWER}*{_BEHIND}",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
)
"""How K2 splits text before pairs are merged, alternative by alternative: `pat_str` of its tokenization_kimi.py."""

_LIMIT = 2**18
"""Bytes of a file of code; that of K2 has 13,000."""
_CONFIG_LIMIT = 2**24  # bytes of config.json
_OF_TIKTOKEN = ("tiktoken", "pat_str", r"\p{")
"""Where one of these stands, text is split, or may be."""
_CLASSES = (r"\p{", r"\P{")
"""What a pattern for tiktoken has and no other text."""
_BLANK = {tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT}
_RAW = re.compile(r"""[rR]('''|\"""|'|")(.*)\1""", re.DOTALL)
_SISTER = re.compile(r"^\s*from\s+\.(\w+)\s+import\b", re.MULTILINE)


def code_of(folder: Path) -> list[Path]:
    """Return the files of a folder that are a tokenizer's code by their names."""
    return sorted(folder.glob("tokenization*.py"))


def read_code(path: Path) -> str:
    """Return the text of a file of code.

    Raises:
        MalformedFile: it is larger than code is, or no regular file.
    """
    return read_limited(path, _LIMIT).decode("utf-8", "replace")


def check_code(folder: Path, settings: Mapping[str, Any]) -> None:
    """Refuse a tokenizer whose own code splits text otherwise than K2's, or not visibly as K2's does.

    Args:
        folder: of the tokenizer.
        settings: its tokenizer_config.json.

    Raises:
        UnsupportedFormat: so it is.
        CheckpointError: the settings name a file of code that no file can be.
    """
    waiting = sorted({path.name for path in code_of(folder)} | set(_mapped(folder, settings)))
    seen: set[str] = set()
    while waiting:
        path = inside(folder, waiting.pop(0), follow_links=True)  # what lies in the folder has been checked
        if path.name in seen or not path.exists():
            continue
        seen.add(path.name)
        text = read_code(path)
        if any(word in text for word in _OF_TIKTOKEN) and not _splits_as_k2(text):
            raise UnsupportedFormat(
                "splits text by another pattern than K2's tokenizer",
                file=path,
                expected="the parts of K2's `pat_str` in their order, and no others",
                remedy="if you trust that code, say `trust_remote_code=True`",
            )
        waiting += [f"{name}.py" for name in _SISTER.findall(text)]


def _mapped(folder: Path, settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield the files in which transformers would look for the tokenizer's class."""
    found = settings.get("auto_map")
    if found is None and (folder / CONFIG).exists():
        path = folder / CONFIG
        found = parse_object(read_limited(path, _CONFIG_LIMIT), file=path).get("auto_map")
    named = found.get("AutoTokenizer") if isinstance(found, dict) else found
    for entry in named if isinstance(named, list) else [named]:
        if isinstance(entry, str):  # `module.Class`, behind `repository--` where it was saved from the hub
            yield entry.rpartition("--")[2].partition(".")[0] + ".py"


def _splits_as_k2(text: str) -> bool:
    """Tell whether code joins the parts of K2's pattern, in their order, and has no other pattern."""
    words = _words(text)
    wanted = ["'|'", ".", "join", "(", "[", *(mark for part in PATTERN for mark in (f"r{part}", ",")), "]", ")"]
    starts = [place for place in range(len(words)) if words[place : place + len(wanted)] == wanted]
    if len(starts) != 1:
        return False
    [begin], end = starts, starts[0] + len(wanted)
    others = words[:begin] + words[end:]
    return words[end : end + 1] == ["\n"] and not any(mark in word for word in others for mark in _CLASSES)


def _words(text: str) -> list[str]:
    """Return the tokens of Python code, without comments, however it is laid out; nothing for what is no code.

    A raw string becomes `r` and what is in it; every list ends with a comma, no list in brackets is followed by one.
    """
    try:
        tokens = [token for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type not in _BLANK]
    except (tokenize.TokenError, SyntaxError):
        return []
    words: list[str] = []
    for token in tokens:
        raw = _RAW.fullmatch(token.string) if token.type == tokenize.STRING else None
        if token.string == "]" and words[-1:] != [","]:
            words.append(",")
        elif token.string == ")" and words[-2:] == ["]", ","]:
            words.pop()
        words.append(_plain(token) if raw is None else f"r{raw[2]}")
    return words


def _plain(token: tokenize.TokenInfo) -> str:
    if token.type == tokenize.NEWLINE:
        return "\n"
    return "'|'" if token.type == tokenize.STRING and token.string in {'"|"', "'|'"} else token.string
