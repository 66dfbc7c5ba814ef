"""Texts of libraries and servers, without what nobody but their sender may read."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

HIDDEN = "[hidden]"
"""What stands where a secret stood."""

_RULES: tuple[tuple[re.Pattern[str], str], ...] = (
    # What follows ? in an address is a signature more often than not; what stands before @ is a user and a password.
    (re.compile(r"\b([a-z][a-z0-9+.-]*://)[^\s/?#@'\"<>]+@", re.IGNORECASE), rf"\1{HIDDEN}@"),
    (re.compile(r"\b([a-z][a-z0-9+.-]*://[^\s?#'\"<>]*)[?#][^\s'\"<>]*", re.IGNORECASE), rf"\1?{HIDDEN}"),
    (
        re.compile(r"(?<![^\s'\"<(=])[^\s/:@'\"<>(=]+:[^\s/@'\"<>]+@(?=[\w\[])"),
        f"{HIDDEN}@",
    ),  # the same without a scheme
    (re.compile(r"\b((?:(?:bearer|basic)\s+)+)[\w.~+/=-]+", re.IGNORECASE), rf"\1{HIDDEN}"),
    (re.compile(r"\b(hf|api_org)_[A-Za-z0-9]{6,}"), HIDDEN),
    (re.compile(r"\b(AKIA|ASIA|AROA|AIDA)[A-Z0-9]{8,}"), HIDDEN),
    (re.compile(r"\bya29\.[\w.-]+"), HIDDEN),
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(-----END [A-Z ]*PRIVATE KEY-----|$)", re.DOTALL), HIDDEN),
    (
        re.compile(
            r"((?:x-amz-[\w-]+|x-goog-[\w-]+|aws_?\w*|signature|sig|authorization|password|passwd|secret\w*|\w*token"
            r"|access_?key\w*|private_?key\w*|credential\w*)[\"']?\s*[=:]\s*[\"']?)[^\s\"'&,;}]+",
            re.IGNORECASE,
        ),
        rf"\1{HIDDEN}",
    ),
)
_VARIABLE = re.compile(r"TOKEN|SECRET|PASSWORD|ACCESS_KEY|CREDENTIAL|PASSPHRASE", re.IGNORECASE)
_FILES = {"AWS_SHARED_CREDENTIALS_FILE": "~/.aws/credentials", "AWS_CONFIG_FILE": "~/.aws/config"}
_SETTING = re.compile(
    r"^[ \t]*aws_(?:secret_access_key|session_token|security_token)[ \t]*=[ \t]*(\S+)", re.MULTILINE | re.IGNORECASE
)
_LONGEST = 2**20  # characters of such a file
_SHORTEST = 6  # a shorter value of a variable would take ordinary words with it


def clean(text: str) -> str:
    """Return a text without tokens, keys, signatures and passwords.

    What looks like one is hidden, and so is each value of an environment variable that is named like one, and each
    secret of the files where Amazon's tools keep them.
    """
    for value in _kept():
        text = text.replace(value, HIDDEN)
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and _VARIABLE.search(name) and not os.path.lexists(value):  # a file's name is none
            text = text.replace(value, HIDDEN)
    for rule, kept in _RULES:
        text = rule.sub(kept, text)
    return text


def _kept() -> Iterator[str]:
    """Yield the secrets of Amazon's files (AWS CLI, Configuration and credential file settings)."""
    for variable, usual in _FILES.items():
        path = Path(os.path.expanduser(os.environ.get(variable) or usual))  # noqa: PTH111  it never raises
        with contextlib.suppress(OSError):
            if path.is_file():
                with path.open(encoding="utf-8", errors="replace") as file:
                    found = _SETTING.findall(file.read(_LONGEST))
                yield from (value for value in found if len(value) >= _SHORTEST)


def guard(library: str) -> None:
    """Have what a library logs by its own handlers cleaned from now on: it shows addresses with their signatures."""
    for handler in logging.getLogger(library).handlers:
        if not any(isinstance(each, _Cleaned) for each in handler.filters):
            handler.addFilter(_Cleaned())


class _Cleaned(logging.Filter):
    """Lets records through without secrets."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Clean a record's text, in place."""
        record.msg, record.args = clean(record.getMessage()), ()
        return True
