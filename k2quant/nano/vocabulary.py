"""The characters of nano-K2: one token each, and the tokenizer files that say so to transformers."""

from __future__ import annotations

import json
from typing import Any

BOS, EOS, PAD = 0, 1, 2
"""Ids of the tokens that begin a text, end it and fill a batch."""

SPECIAL = ("[BOS]", "[EOS]", "[PAD]")
"""Their names, as K2's tokenizer spells them."""

CHARACTERS = "".join(map(chr, range(ord(" "), ord("~") + 1))) + "\n"
"""Printable ASCII and the line break, in the order of their ids."""

SIZE = 128
"""Rows of the embedding: the tokens, filled up to whole FP8 blocks."""

_IDS = {character: len(SPECIAL) + place for place, character in enumerate(CHARACTERS)}


def encode(text: str) -> list[int]:
    """Return the ids of a text's characters, without BOS and EOS.

    Raises:
        KeyError: a character that is no printable ASCII.
    """
    return [_IDS[character] for character in text]


def decode(ids: list[int]) -> str:
    """Return the text of ids; special tokens and unused rows of the embedding give nothing."""
    places = (token - len(SPECIAL) for token in ids)
    return "".join(CHARACTERS[place] for place in places if 0 <= place < len(CHARACTERS))


def files() -> dict[str, bytes]:
    """Return the tokenizer's files by name, as `AutoTokenizer` reads them without any code of ours."""
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[BOS],
        "eos_token": SPECIAL[EOS],
        "pad_token": SPECIAL[PAD],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 131072,
    }
    return {"tokenizer.json": _json(_tokenizer()), "tokenizer_config.json": _json(settings)}


def _tokenizer() -> dict[str, Any]:
    """Return what tokenizer.json holds: a BPE without merges, which leaves every character alone."""
    added = [
        {
            "id": place,
            "content": name,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for place, name in enumerate(SPECIAL)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": {  # every text that it learns from begins with BOS
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": SPECIAL[BOS], "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {SPECIAL[BOS]: {"id": SPECIAL[BOS], "ids": [BOS], "tokens": [SPECIAL[BOS]]}},
        },
        "decoder": {"type": "Fuse"},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {name: place for place, name in enumerate(SPECIAL)} | _IDS,
            "merges": [],
        },
    }


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
