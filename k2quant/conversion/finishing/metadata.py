"""What hubs are told of an output, in the YAML at the head of its card.

Keys and values as https://huggingface.co/docs/hub/model-cards has them; the source's card is believed in what is still
true of the output, and only where a value is of the kind that the hub takes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from k2quant.checkpoint.cards import CARD, LIMIT
from k2quant.checkpoint.files.paths import read_limited
from k2quant.checkpoint.files.strict_yaml import parse_mapping
from k2quant.conversion.plan import Plan
from k2quant.errors import CheckpointError, UsageError
from k2quant.formats.known import FORMATS

_HEAD = re.compile(rb"(?:\xef\xbb\xbf)?---\r?\n(.*?)\r?\n---\r?(?:\n|\Z)", re.DOTALL)
_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_WORD = re.compile(r"[A-Za-z0-9][\w.+-]{0,63}", re.ASCII)
_TAG = re.compile(r"[\w][\w .:/+-]{0,79}")
_LINK = re.compile(r"(?:https://[\w.-]+/)?[\w./%+~-]{1,300}", re.ASCII)
_CACHED = re.compile(r"models--(?P<owner>[\w.-]+?)--(?P<name>[\w.-]+)", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_MOST = 50  # entries of a list
_QUANTISED = re.compile(
    r"(?i)(compressed-tensors|modelopt|gptq|awq|gguf|exl2|bitsandbytes|bnb|mlx|quanti[sz]ed|\d-?bit|w\d+a\d+"
    rf"|{'|'.join(FORMATS)})"
)
"""Tags that say how weights are stored: what they say of the source is not true of the output."""


class Home(NamedTuple):
    """Where a source lies on a hub."""

    name: str
    """OWNER/NAME."""
    commit: str | None


def home_of(folder: Path) -> Home | None:
    """Return where a source came from that lies in huggingface_hub's cache; None for any other folder.

    The cache keeps a model's files in `models--OWNER--NAME/snapshots/COMMIT`.
    """
    for here in (folder, folder.resolve()):
        found = _CACHED.fullmatch(here.parent.parent.name) if here.parent.name == "snapshots" else None
        if found is not None and _ID.fullmatch(name := f"{found['owner']}/{found['name']}"):
            return Home(name, here.name if _COMMIT.fullmatch(here.name) else None)
    return None


def said(folder: Path) -> dict[str, Any]:
    """Return what the card of a source tells hubs; nothing where it has none, or one that is no YAML."""
    try:
        found = _HEAD.match(read_limited(folder / CARD, LIMIT))
        return {} if found is None else dict(parse_mapping(found[1], file=folder / CARD))
    except (OSError, CheckpointError, UsageError):
        return {}


def metadata(plan: Plan, home: Home | None, source: Mapping[str, Any]) -> dict[str, Any]:
    """Return what hubs are told of an output.

    Args:
        plan: what was written.
        home: where the source lies on a hub.
        source: what its own card says; see `said`.
    """
    relation = "quantized" if plan.values is None or plan.recipe.quantises else "finetune"
    formats = [name for name, kind in FORMATS.items() if kind.quantised and _writes(plan, name)]
    methods = sorted(method for name in formats if (method := FORMATS[name].method) and method not in formats)
    return of_source(home, source, relation=relation, tags=[*formats, *methods])


def of_source(
    home: Home | None, source: Mapping[str, Any], *, relation: str = "quantized", tags: Iterable[str] = ()
) -> dict[str, Any]:
    """Return what hubs are told of an output of any kind.

    Args:
        home: where the source lies on a hub.
        source: what its own card says; see `said`.
        relation: what the output is to it.
        tags: what weights are stored in.
    """
    told: dict[str, Any] = {}
    for key, taken in _CARRIED.items():
        if (value := taken(source.get(key))) is not None:
            told[key] = value
    told = {"library_name": "transformers", "pipeline_tag": "text-generation"} | told
    base = _ids(source.get("base_model")) if home is None else home.name
    if base is not None:
        told["base_model"] = base
        told["base_model_relation"] = relation
    kept = [tag for tag in told.get("tags", []) if not _QUANTISED.fullmatch(tag)]
    told["tags"] = list(dict.fromkeys([*kept, "k2quant", *tags]))
    return {key: told[key] for key in _ORDER if key in told}


def front(told: Mapping[str, Any]) -> str:
    """Return metadata as the head of a card."""
    text = yaml.safe_dump(dict(told), sort_keys=False, width=1_000_000)
    return f"---\n{text}---\n"


def _writes(plan: Plan, name: str) -> bool:
    return any(job.written is not None and job.written.name == name for job in plan.jobs())


def _matching(pattern: re.Pattern[str]) -> Callable[[object], str | None]:
    return lambda value: value if isinstance(value, str) and pattern.fullmatch(value) else None


def _list_of(pattern: re.Pattern[str]) -> Callable[[object], list[str] | None]:
    def taken(value: object) -> list[str] | None:
        several = value if isinstance(value, list) else [value]
        return [one for one in several if isinstance(one, str) and pattern.fullmatch(one)][:_MOST] or None

    return taken


def _ids(value: object) -> str | list[str] | None:
    found = _list_of(_ID)(value)
    return found[0] if found is not None and len(found) == 1 else found


_CARRIED: dict[str, Callable[[object], Any]] = {
    "language": _list_of(_WORD),
    "license": _matching(_WORD),
    "license_name": _matching(_WORD),
    "license_link": _matching(_LINK),
    "library_name": _matching(_WORD),
    "pipeline_tag": _matching(_WORD),
    "datasets": _list_of(_ID),
    "tags": _list_of(_TAG),
}
"""Keys of a source's card that are true of an output, each with what takes its value or leaves it. What was measured
of the source (`model-index`, `metrics`) is not."""

_ORDER = (
    "license",
    "license_name",
    "license_link",
    "language",
    "library_name",
    "pipeline_tag",
    "base_model",
    "base_model_relation",
    "datasets",
    "tags",
)
