"""Files beside the weights: a tokenizer, its code, a chat template."""

from __future__ import annotations

from collections.abc import Collection

from k2quant.checking.engines.rule import Outcome, Test, failed, passed, unknown
from k2quant.checking.engines.subject import Subject
from k2quant.checkpoint.files.paths import read_limited
from k2quant.checkpoint.files.strict_json import parse_object
from k2quant.errors import CheckpointError

_SETTINGS = "tokenizer_config.json"
_RANKS = "tiktoken.model"
_WHOLE = "tokenizer.json"
_LIMIT = 16_000_000  # bytes; K2's tokenizer_config.json has 4,000
_RELEASE = "copy the tokenizer's files from the model's release"


def tokenizer(found: Subject) -> Outcome:
    """Look whether a tokenizer is there, and the code that it names."""
    if not found.files & {_SETTINGS, _WHOLE, _RANKS}:
        return failed("no tokenizer", file=found.checkpoint.place, remedy=_RELEASE)
    if _SETTINGS not in found.files:
        return failed("is missing", file=_SETTINGS, remedy=_RELEASE)
    settings = _settings(found)
    code = _named_code(settings, "AutoTokenizer")
    missing = [name for name in code if name not in found.files]
    if missing:
        return failed("is missing, and tokenizer_config.json names it", file=missing[0], remedy=_RELEASE)
    if code and _RANKS not in found.files and _WHOLE not in found.files:
        return failed("is missing, which the tokenizer's code reads", file=_RANKS, remedy=_RELEASE)
    if not code and _WHOLE not in found.files:
        return failed(
            "is missing, and tokenizer_config.json names no code that reads another file", file=_WHOLE, remedy=_RELEASE
        )
    return passed("its files, and code of its own, which the server must be told to trust" if code else "its files")


def template(found: Subject) -> Outcome:
    """Look whether there is a chat template; without one an engine answers prompts and no chats."""
    named = any(name.startswith("chat_template") for name in found.files)
    if named or (_SETTINGS in found.files and _settings(found).get("chat_template")):
        return passed("a chat template")
    return unknown("no chat template: prompts are answered, chats only with a template that the server is given")


def configuration(known: Collection[str], *, code_runs: bool = True) -> Test:
    """Return a test of `model_type`: one that the engine knows, or with code that the folder has.

    Args:
        known: values that need no code of the checkpoint's.
        code_runs: whether code that is there can be relied on.
    """

    def test(found: Subject) -> Outcome:
        said = found.config.get("model_type")
        if said in known:
            return passed(f"model_type {said} needs no code of its own")
        code = _named_code(found.config, "AutoConfig")
        missing = [name for name in code if name not in found.files]
        if not code or missing:
            return failed(
                "model_type",
                file="config.json",
                expected=f"{' or '.join(sorted(known))}, or auto_map with its code beside it",
                found=f"{said!r:.200}, and {f'no {missing[0]}' if missing else 'no auto_map'}",
                remedy="copy the code from the model's release, or take deepseek_v3, whose sizes and parts are K2's",
            )
        if code_runs:
            return passed(f"model_type {said!r:.200} has its code, which the server must be told to trust")
        return unknown(f"model_type {said!r:.200} has its own code, which may not run with this version")

    return test


def _settings(found: Subject) -> dict[str, object]:
    path = found.checkpoint.path(_SETTINGS)
    try:
        return parse_object(read_limited(path, _LIMIT), file=found.checkpoint.named(_SETTINGS))
    except OSError as error:
        raise CheckpointError("cannot be read", file=path, found=error.strerror) from error


def _named_code(settings: dict[str, object], kind: str) -> list[str]:
    """Return the files of code that an `auto_map` names for a kind, such as `tokenization_kimi.py`."""
    table = settings.get("auto_map")
    said = table.get(kind) if isinstance(table, dict) else None
    listed = said if isinstance(said, list) else [said]
    return [f"{each.partition('.')[0]}.py" for each in listed if isinstance(each, str) and "--" not in each]
