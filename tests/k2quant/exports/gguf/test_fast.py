"""A tokenizer.json that lies is named, whatever stands in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from k2quant.errors import MalformedFile
from k2quant.exports.gguf.vocabulary import fast


@pytest.mark.parametrize(
    ("vocab", "settings", "said"),
    [
        ({"a": 0, "b": 1}, {"added_tokens_decoder": ["c"]}, r"\['c'\] where an object stands"),
        ({"a": 0, "b": 0}, {}, "token 0 is 'a' and 'b'"),
    ],
    ids=["a list of added tokens", "an id for two"],
)
def test_what_lies_is_named(tmp_path: Path, vocab: dict[str, int], settings: dict[str, Any], said: str) -> None:
    """Words of one id would otherwise be lost, and settings of another kind end in a traceback."""
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": vocab, "merges": []}}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(MalformedFile, match=said):
        fast.read(tmp_path)
