"""What llama.cpp made of exports, as `make gguf-oracle` asked it: the ids of texts are those of our tokenizers."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

import kimi_files
from k2quant.exports.gguf.vocabulary import vocabulary
from k2quant.model.generation import open_tokenizer
from k2quant.nano import vocabulary as nano
from places import ROOT

KEPT = json.loads((ROOT / "tests" / "data" / "golden_llama_cpp.json").read_text())
SPLIT_OTHERWISE = {
    "kimi": {"capitals inside", "marks on letters"},
    "deepseek": set[str](),
    "nano": set[str](),
}
"""Texts of which llama.cpp makes other tokens: its `kimi-k2` takes `helloWorld` for one word, and no mark for a letter.

See `unicode_regex_split_custom_kimi_k2` in its unicode.cpp.
"""


WRITERS = {"kimi": kimi_files.write_kimi, "deepseek": kimi_files.write_deepseek, "nano": kimi_files.write_nano}


@pytest.mark.parametrize("label", SPLIT_OTHERWISE)
def test_ids_are_ours(label: str, tmp_path: Path) -> None:
    """What the export says of a tokenizer is what llama.cpp was told, and its ids of mixed texts are ours.

    Where it splits text otherwise, it makes others, and the text is named above.
    """
    config, kept = WRITERS[label](tmp_path), KEPT["texts"][label]
    told = hashlib.sha256(json.dumps(vocabulary(tmp_path, config)).encode()).hexdigest()
    assert told == kept["vocabulary_sha256"]
    tokenizer = open_tokenizer(tmp_path)
    texts = kept["texts"]
    ours = {name: tokenizer(said["text"], add_special_tokens=False)["input_ids"] for name, said in texts.items()}
    assert {name for name in texts if ours[name] != texts[name]["ids"]} == SPLIT_OTHERWISE[label]
    for name, said in texts.items():
        known = (letter for letter in said["text"] if label != "nano" or letter in nano.CHARACTERS)
        assert said["shown"] == "".join(known), name


@pytest.mark.parametrize("label", ["kimi", "deepseek", "kimi-int4", "nano", "nano-int4"])
def test_a_first_other_token_is_one_of_two_that_are_near(label: str) -> None:
    """Greedy tokens are ours, or the first that is not was nearer to the next best than the arithmetics are apart."""
    kept = KEPT["models"][label]
    if kept["tokens_equal_from_the_first"] < KEPT["steps"]:
        first = kept["first_difference"]
        assert first["two_best_apart"] <= 2 * first["logits_apart_most"] < kept["logits_spread"] / 10
    else:
        assert "first_difference" not in kept
