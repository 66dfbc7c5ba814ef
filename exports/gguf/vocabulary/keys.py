"""The keys of a tokenizer: which file it is read from, which tokens end an answer, and the chat template."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from k2quant.checkpoint.files.kinds import CONFIG
from k2quant.checkpoint.files.paths import read_limited
from k2quant.checkpoint.files.strict_json import parse_object
from k2quant.checkpoint.files.tokenizer.words import FAST, SETTINGS, is_kimi
from k2quant.conversion.metadata.promises import language_config
from k2quant.errors import CheckpointError, MalformedFile
from k2quant.exports.gguf.key import Key
from k2quant.exports.gguf.vocabulary import fast, ranks
from k2quant.exports.gguf.vocabulary.tokens import templates
from k2quant.exports.shapes import sizes_of

_GENERATION = "generation_config.json"
_GENERATION_LIMIT = 2**20
"""Bytes of it."""


def vocabulary(folder: Path, config: Mapping[str, Any]) -> tuple[Key, ...]:
    """Return the keys of a tokenizer: of a tiktoken.model of K2's kind, or of a tokenizer.json.

    Args:
        folder: in which its files lie.
        config: what config.json holds, which says how many rows the embedding has.

    Raises:
        CheckpointError: there is no tokenizer, its files lie, or llama.cpp has none that does the same.
    """
    rows = sizes_of(config).vocab_size
    if is_kimi(folder):
        tokens, template = ranks.read(folder, rows)
    elif (folder / FAST).exists():
        tokens, template = fast.read(folder)
    else:
        raise CheckpointError(
            "has no tokenizer that GGUF has a place for",
            file=folder,
            expected=f"tiktoken.model with {SETTINGS}, or {FAST}",
            remedy="take its files from the model's release",
        )
    tokens = tokens.ending(_ends(folder, config))
    return (*tokens.keys(rows), *templates(folder / SETTINGS, template))


def _ends(folder: Path, config: Mapping[str, Any]) -> list[int]:
    """Return the ids that end an answer, as generation_config.json has them, or config.json where it is silent."""
    path = folder / _GENERATION
    settings = parse_object(read_limited(path, _GENERATION_LIMIT), file=path) if path.exists() else {}
    file, found = path, settings.get("eos_token_id")
    if found is None:
        file, found = folder / CONFIG, language_config(config).get("eos_token_id", config.get("eos_token_id"))
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(place) is int for place in ids):
        raise MalformedFile("eos_token_id", file=file, expected="a token's id, or several", found=repr(found)[:100])
    return ids
