"""What GGUF says of a tokenizer, and that llama.cpp makes the same ids of a text with it."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kimi_files
from k2quant.checkpoint.files.tokenizer.spelling import spelled, unspelled
from k2quant.errors import CheckpointError, MalformedFile, UnsupportedFormat
from k2quant.exports.gguf.vocabulary import vocabulary
from k2quant.exports.gguf.vocabulary.ranks import merges_of
from k2quant.nano import vocabulary as nano
from tiny import NANO

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    """Return ranks of K2's kind."""
    return kimi_files.merged_ranks()


@pytest.fixture
def kimi(tmp_path: Path, ranks: dict[bytes, int]) -> Path:
    """Write a tokenizer of K2's kind."""
    kimi_files.write_files(tmp_path, ranks)
    return tmp_path


@pytest.fixture
def deepseek(tmp_path: Path, ranks: dict[bytes, int]) -> Path:
    """Write a tokenizer of DeepSeek-V3's kind."""
    (tmp_path / "tokenizer.json").write_text(json.dumps(kimi_files.deepseek_tokenizer(ranks)))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(SETTINGS))
    return tmp_path


SETTINGS = {"add_bos_token": True, "bos_token": {"content": kimi_files.DEEPSEEK_NAMED[0]}, "chat_template": "{{ 1 }}"}


def said(folder: Path, rows: int, **config: Any) -> dict[str, Any]:
    """Return the values of a tokenizer's keys, for a model with so many rows."""
    return {
        key.name: key.value for key in vocabulary(folder, NANO | {"vocab_size": rows, "eos_token_id": None} | config)
    }


def edit(path: Path, **changes: Any) -> None:
    """Change the keys of an object in a file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


class TestOfK2:
    """tiktoken.model with tokenizer_config.json."""

    def test_tokens_and_types(self, kimi: Path, ranks: dict[bytes, int]) -> None:
        """A token is spelled as GPT-2 did; special ones are never shown, others of the file found in any text."""
        first = len(ranks)
        found = said(kimi, first + 260)
        tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
        assert [unspelled(word) for word in tokens[:first]] == sorted(ranks, key=ranks.__getitem__)
        assert set(types[:first]) == {NORMAL}
        assert (tokens[first + 2], types[first + 2]) == ("<|im_end|>", CONTROL)
        assert (tokens[first + 5], types[first + 5]) == (f"<|reserved_token_{first + 5}|>", CONTROL)
        assert (tokens[first + 11], types[first + 11]) == ("<|tool_call_begin|>", USER_DEFINED)
        assert (tokens[first + 256 :], types[first + 256 :]) == (
            [f"[PAD{first + n}]" for n in range(256, 260)],
            [UNUSED] * 4,
        )
        assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("gpt2", "kimi-k2")

    def test_tasks_and_template(self, kimi: Path, ranks: dict[bytes, int]) -> None:
        """Tokens with a task are those of the file; what generation_config.json ends answers with ends them here."""
        first = len(ranks)
        (kimi / "generation_config.json").write_text(json.dumps({"eos_token_id": [first + 2, first + 1]}))
        found = said(kimi, first + 256)
        tasks = {name: value for name, value in found.items() if name.endswith("_token_id")}
        wanted = {"bos": 0, "eos": 1, "eot": 2, "padding": 255, "unknown": 254}
        assert tasks == {f"tokenizer.ggml.{name}_token_id": first + place for name, place in wanted.items()}
        assert found["tokenizer.ggml.add_bos_token"] is False
        assert found["tokenizer.chat_template"] == kimi_files.TEMPLATE

    def test_config_ends_answers_where_nothing_else_does(self, kimi: Path, ranks: dict[bytes, int]) -> None:
        """config.json's end of an answer counts without a generation_config.json, of K2.5 inside `text_config`."""
        rows, end = len(ranks) + 256, len(ranks) + 2
        assert said(kimi, rows, eos_token_id=end)["tokenizer.ggml.eot_token_id"] == end
        inside = {"text_config": NANO | {"vocab_size": rows, "eos_token_id": end}}
        assert ("tokenizer.ggml.eot_token_id", end) in {
            (k.name, k.value) for k in vocabulary(kimi, inside) if k.kind == "uint32"
        }

    def test_four_ends_are_too_many(self, kimi: Path, ranks: dict[bytes, int]) -> None:
        """llama.cpp has names for three tokens that end an answer, and one more is not dropped in silence."""
        first = len(ranks)
        said(kimi, first + 256, eos_token_id=[first + 2, first + 3])
        with pytest.raises(UnsupportedFormat, match="end an answer"):
            said(kimi, first + 256, eos_token_id=[first + 2, first + 3, first + 4])

    @pytest.mark.parametrize("end", ["1", [1, "2"], 1.0, True, 10**6, -1])
    def test_ends_are_tokens(self, kimi: Path, ranks: dict[bytes, int], end: object) -> None:
        """What ends an answer is the id of a token."""
        with pytest.raises(MalformedFile):
            said(kimi, len(ranks) + 256, eos_token_id=end)

    def test_reserved_tokens_without_a_row_are_left_out(self, kimi: Path, ranks: dict[bytes, int]) -> None:
        """Rows may end before the reserved tokens, but not before one that the file names."""
        edit(kimi / "tokenizer_config.json", unk_token=None, pad_token=None)
        content = json.loads((kimi / "tokenizer_config.json").read_text())
        content["added_tokens_decoder"] = {
            key: value for key, value in content["added_tokens_decoder"].items() if int(key) < len(ranks) + 18
        }
        (kimi / "tokenizer_config.json").write_text(json.dumps(content))
        assert len(said(kimi, len(ranks) + 18)["tokenizer.ggml.tokens"]) == len(ranks) + 18
        with pytest.raises(MalformedFile, match="no row"):
            said(kimi, len(ranks) + 17)

    def test_templates_by_name(self, kimi: Path, ranks: dict[bytes, int]) -> None:
        """Of several templates each has its key; a name that no key can have is refused."""
        edit(
            kimi / "tokenizer_config.json",
            chat_template=[{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}],
        )
        found = said(kimi, len(ranks) + 256)
        assert [found[f"tokenizer.chat_template{name}"] for name in ("", ".tool_use", "s")] == ["a", "b", ["tool_use"]]
        edit(kimi / "tokenizer_config.json", chat_template=[{"name": "to ol", "template": "b"}])
        with pytest.raises(UnsupportedFormat, match="template"):
            said(kimi, len(ranks) + 256)

    def test_code_that_splits_otherwise_is_refused(self, kimi: Path, ranks: dict[bytes, int]) -> None:
        """Ids would be others than the tokenizer's own."""
        (kimi / "tokenization_kimi.py").write_text(kimi_files.code([r"\p{L}+"]))
        with pytest.raises(UnsupportedFormat, match="pattern"):
            said(kimi, len(ranks) + 256)

    def test_a_special_token_spelled_as_another(self, kimi: Path, ranks: dict[bytes, int]) -> None:
        """llama.cpp stops at two tokens of one spelling, so they are refused here."""
        content = json.loads((kimi / "tokenizer_config.json").read_text())
        content["added_tokens_decoder"][str(len(ranks) + 30)] = {"content": spelled(b"\xff"), "special": True}
        (kimi / "tokenizer_config.json").write_text(json.dumps(content))
        with pytest.raises(UnsupportedFormat, match="alike"):
            said(kimi, len(ranks) + 256)

    def test_no_torch(self, kimi: Path, ranks: dict[bytes, int]) -> None:
        """Neither torch nor transformers, nor any package for tokenizers, is loaded for a vocabulary."""
        code = (
            "import sys; from pathlib import Path; from k2quant.exports.gguf.vocabulary import vocabulary; "
            f"vocabulary(Path({str(kimi)!r}), {NANO | {'vocab_size': len(ranks) + 256, 'eos_token_id': None}!r}); "
            "print(sorted({'torch', 'transformers', 'tokenizers', 'tiktoken', 'gguf'} & set(sys.modules)))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]"


@given(st.lists(st.binary(min_size=2, max_size=5), max_size=12), st.binary(max_size=24))
def test_merges_give_what_ranks_give(more: list[bytes], text: bytes) -> None:
    """Merged pair by pair in the order of the merges, a text falls into the tokens that ranks make of it."""
    ranks = {bytes([value]): value for value in range(256)}
    for token in more:  # each with what it is made of, as training has it
        for length in range(2, len(token) + 1):
            ranks.setdefault(token[:length], len(ranks))
    merges = {tuple(map(unspelled, merge.split(" "))): place for place, merge in enumerate(merges_of(ranks))}
    assert len(merges) == len(ranks) - 256
    assert _merged(text, lambda a, b: merges.get((a, b))) == _merged(text, lambda a, b: ranks.get(a + b))


def _merged(text: bytes, cost: Any) -> list[bytes]:
    parts = [bytes([value]) for value in text]
    while True:
        costs = [(found, place) for place, pair in enumerate(pairwise(parts)) if (found := cost(*pair)) is not None]
        if not costs:
            return parts
        _, place = min(costs)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]


def test_a_token_that_no_merge_makes_has_no_pair() -> None:
    """`abc` without `ab` and `bc` is made of three parts."""
    ranks = {bytes([value]): value for value in range(256)} | {b"abc": 256, b"xy": 257}
    assert merges_of(ranks) == ["x y"]


class TestOfTokenizerJson:
    """tokenizer.json, as DeepSeek-V3 and nano-K2 have it."""

    def test_deepseek(self, deepseek: Path, ranks: dict[bytes, int]) -> None:
        """DeepSeek-V3's splits have llama.cpp's name, its merges their order, its first token stands before a text."""
        found = said(deepseek, len(ranks) + 10)
        assert found["tokenizer.ggml.pre"] == "deepseek-v3"
        assert found["tokenizer.ggml.merges"] == merges_of(ranks)
        assert found["tokenizer.ggml.tokens"][:3] == list(kimi_files.DEEPSEEK_NAMED)
        types = [CONTROL] * 3 + [NORMAL] * len(ranks) + [USER_DEFINED, USER_DEFINED, CONTROL] + [UNUSED] * 4
        assert found["tokenizer.ggml.token_type"] == types
        assert (found["tokenizer.ggml.bos_token_id"], found["tokenizer.ggml.add_bos_token"]) == (0, True)
        assert found["tokenizer.chat_template"] == "{{ 1 }}"

    def test_pairs_of_either_kind(self, deepseek: Path, ranks: dict[bytes, int]) -> None:
        """Merges are texts with a blank, or lists of two."""
        content = kimi_files.deepseek_tokenizer(ranks)
        content["model"]["merges"] = [merge.split(" ") for merge in content["model"]["merges"]]
        before = said(deepseek, len(ranks) + 10)
        (deepseek / "tokenizer.json").write_text(json.dumps(content))
        assert said(deepseek, len(ranks) + 10) == before

    def test_nano(self, tmp_path: Path) -> None:
        """nano-K2's characters are bytes, and begin with its first token, as its template says."""
        for name, content in nano.files().items():
            (tmp_path / name).write_bytes(content)
        found = said(tmp_path, nano.SIZE, eos_token_id=1)
        tokens = found["tokenizer.ggml.tokens"]
        assert b"".join(map(unspelled, tokens[3 : 3 + len(nano.CHARACTERS)])).decode() == nano.CHARACTERS
        assert found["tokenizer.ggml.token_type"] == [CONTROL] * 3 + [NORMAL] * 96 + [UNUSED] * 29
        assert (found["tokenizer.ggml.merges"], found["tokenizer.ggml.add_bos_token"]) == ([], True)

    @pytest.mark.parametrize(
        ("where", "value", "named"),
        [
            ("model.type", "Unigram", "kind"),
            ("model.byte_fallback", True, "byte_fallback"),
            ("model.unk_token", "<unk>", "unk_token"),
            ("model.continuing_subword_prefix", "##", "continuing_subword_prefix"),
            ("normalizer", {"type": "NFC"}, "normalizer"),
            ("pre_tokenizer", None, "ByteLevel"),
            ("pre_tokenizer", {"type": "Whitespace"}, "splits"),
            ("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": True}, "splits"),
            ("pre_tokenizer.pretokenizers.0.pattern", {"Regex": r"\p{N}"}, "splits"),
            ("pre_tokenizer.pretokenizers.0.behavior", "Removed", "splits"),
            ("pre_tokenizer.pretokenizers.0.invert", True, "splits"),
            ("added_tokens.0.lstrip", True, "lstrip"),
            ("post_processor", {"type": "BertProcessing"}, "around"),
            (
                "post_processor",
                {"type": "TemplateProcessing", "single": [{"Sequence": {}}, {"SpecialToken": {"id": "x"}}]},
                "around",
            ),
        ],
    )
    def test_what_llama_cpp_does_not_do_is_refused(
        self, deepseek: Path, ranks: dict[bytes, int], where: str, value: object, named: str
    ) -> None:
        """An unknown way to split, and all else that changes ids, is refused by its name."""
        self._change(deepseek, where, value)
        with pytest.raises(UnsupportedFormat, match=named):
            said(deepseek, len(ranks) + 10)

    @pytest.mark.parametrize(
        ("where", "value"),
        [
            ("model", []),
            ("model.vocab", {"a": -1}),
            ("model.vocab", {"a": "1"}),
            ("model.merges", ["a"]),
            ("model.merges", ["a b c"]),
            ("model.merges", [["a", " b"]]),
            ("model.merges", [["a"]]),
            ("added_tokens.0.id", 10**9),
            ("added_tokens.0.content", 3),
            ("pre_tokenizer", 7),
            ("post_processor", {"type": "TemplateProcessing", "single": 3}),
            ("post_processor", {"type": "TemplateProcessing", "single": [3]}),
        ],
    )
    def test_lies_are_malformed(self, deepseek: Path, ranks: dict[bytes, int], where: str, value: object) -> None:
        """Whatever else the file holds, the error is one of ours, and names the file."""
        self._change(deepseek, where, value)
        with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
            said(deepseek, len(ranks) + 10)

    def test_tokens_that_only_whole_words_become(self, deepseek: Path, ranks: dict[bytes, int]) -> None:
        """With `ignore_merges` a token is found whole; without a merge that makes it llama.cpp never finds it."""
        self._change(deepseek, "model.ignore_merges", True)
        said(deepseek, len(ranks) + 10)
        content = json.loads((deepseek / "tokenizer.json").read_text())
        content["model"]["merges"].pop()
        (deepseek / "tokenizer.json").write_text(json.dumps(content))
        with pytest.raises(UnsupportedFormat, match="ignore_merges"):
            said(deepseek, len(ranks) + 10)

    def test_the_settings_name_more_tokens(self, deepseek: Path, ranks: dict[bytes, int]) -> None:
        """Tokens of tokenizer_config.json count too, if they do not contradict the others."""
        place = len(ranks) + 7
        edit(deepseek / "tokenizer_config.json", added_tokens_decoder={str(place): {"content": "<x>", "special": True}})
        found = said(deepseek, len(ranks) + 10)
        assert (found["tokenizer.ggml.tokens"][place], found["tokenizer.ggml.token_type"][place]) == ("<x>", CONTROL)
        edit(deepseek / "tokenizer_config.json", added_tokens_decoder={"0": {"content": "<x>", "special": True}})
        with pytest.raises(MalformedFile, match="token 0"):
            said(deepseek, len(ranks) + 10)

    @staticmethod
    def _change(folder: Path, where: str, value: object) -> None:
        """Change what lies at a place of tokenizer.json."""
        content = json.loads((folder / "tokenizer.json").read_text())
        *path, last = where.split(".")
        inner = content
        for step in path:
            inner = inner[int(step)] if isinstance(inner, list) else inner[step]
        inner[int(last) if isinstance(inner, list) else last] = value
        (folder / "tokenizer.json").write_text(json.dumps(content))


def test_without_a_tokenizer(tmp_path: Path) -> None:
    """A folder without one is named, with what is looked for."""
    with pytest.raises(CheckpointError, match=r"tiktoken\.model"):
        said(tmp_path, 100)


def test_ranks_that_lie(kimi: Path, ranks: dict[bytes, int]) -> None:
    """A file of ranks that is none is refused as everywhere."""
    (kimi / "tiktoken.model").write_bytes(base64.b64encode(b"a") + b" 7\n")
    with pytest.raises(MalformedFile, match=r"tiktoken\.model"):
        said(kimi, len(ranks) + 256)
