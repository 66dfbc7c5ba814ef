"""Tokenizers of K2's and DeepSeek-V3's kind, made here of a text of many scripts, and small models that have them."""

from __future__ import annotations

import base64
import json
import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from k2quant.checkpoint.files.tokenizer.spelling import spelled
from k2quant.checkpoint.files.tokenizer.splitting import PATTERN
from k2quant.checkpoint.writing.in_memory import write_checkpoint
from k2quant.exports.gguf.vocabulary.fast import PRES
from k2quant.exports.gguf.vocabulary.ranks import merges_of
from k2quant.model.passes.texts import SAMPLE
from k2quant.nano import architecture, vocabulary, writing
from tiny import NANO

TEXT = (
    "The quick brown fox doesn't jump; they'll say it's 12345 and 678.\n\n  if x == 1:\n\treturn [x, y]\r\n"
    "Kimi 中文字符你好世界 北京市English混合 Ünïcode ÉTÉ naïve straße ǅungla привет мир 日本語のテキスト 👍🏽 ½ ٣٤ "
)
MERGES = 240
NAMED = {
    0: "[BOS]",
    1: "[EOS]",
    2: "<|im_end|>",
    3: "<|im_user|>",
    4: "<|im_assistant|>",
    11: "<|tool_call_begin|>",
    17: "<|im_middle|>",
    254: "[UNK]",
    255: "[PAD]",
}
"""Special tokens by their place behind the last rank, as in K2's tokenizer_config.json."""
TEMPLATE = (
    "{%- for message in messages -%}<|im_{{ message['role'] }}|>{{ message['role'] }}<|im_middle|>"
    "{{ message['content'] }}<|im_end|>{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|>{%- endif -%}"
)


def merged_ranks() -> dict[bytes, int]:
    """Return the 256 bytes and the pairs that are merged first, each with its rank."""
    text = TEXT + SAMPLE.read_text()
    words = [[bytes([byte]) for byte in word.encode()] for word in re.findall(r" ?\w+|\s+|[^\w\s]+", text)]
    ranks = {bytes([byte]): rank for rank, byte in enumerate([*range(33, 256), *range(33)])}
    for _ in range(MERGES):
        pairs = Counter(a + b for word in words for a, b in pairwise(word))
        best = max(pairs.keys() - ranks, key=lambda pair: (pairs[pair], pair))
        ranks[best] = len(ranks)
        words = [joined(word, best) for word in words]
    return ranks


def joined(word: list[bytes], pair: bytes) -> list[bytes]:
    """Merge a pair wherever it stands."""
    done: list[bytes] = []
    for part in word:
        if done and done[-1] + part == pair and len(done[-1]) < len(pair):
            done[-1] = pair
        else:
            done.append(part)
    return done


def settings(first: int) -> dict[str, Any]:
    """Return a tokenizer_config.json as K2's is, for special tokens from an id on."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {
        "added_tokens_decoder": {
            str(first + place): {"content": word, "special": not word.startswith("<|tool"), **flags}
            for place, word in NAMED.items()
        },
        "additional_special_tokens": ["<|im_end|>", "<|im_user|>", "<|im_assistant|>", "<|im_middle|>"],
        "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
        "bos_token": "[BOS]",
        "chat_template": TEMPLATE,
        "eos_token": "[EOS]",
        "extra_special_tokens": {},
        "model_max_length": 1000000000000000019884624838656,
        "pad_token": "[PAD]",
        "tokenizer_class": "TikTokenTokenizer",
        "unk_token": "[UNK]",
    }


def code(parts: Sequence[str] = PATTERN, *, more: str = "") -> str:
    """Return code as K2's tokenization_kimi.py is laid out, which fails where it is run."""
    lines = "".join(f'            r"""{part}""",  # an alternative\n' for part in parts)
    return (
        'import tiktoken\n\nVOCAB_FILES_NAMES = {"vocab_file": "tiktoken.model"}\nraise RuntimeError\n\n\n'
        f'class TikTokenTokenizer:\n    pat_str = "|".join(\n        [\n{lines}        ]\n    )\n\n'
        f"    def __init__(self):\n        self.model = tiktoken.Encoding(pat_str=self.pat_str)\n{more}"
    )


def write_files(folder: Path, ranks: dict[bytes, int]) -> None:
    """Write the two files of a tokenizer of K2's kind."""
    lines = (b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks.items())
    (folder / "tiktoken.model").write_bytes(b"".join(lines))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings(len(ranks))))


CONFIG: dict[str, Any] = NANO | {"num_hidden_layers": 2, "initializer_range": 0.2}
"""Weights so large that the model has opinions."""
DEEPSEEK_NAMED = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>")  # noqa: RUF001  so they are
"""The first tokens of DeepSeek-V3."""
DEEPSEEK_ADDED = {"<｜User｜>": False, "<｜Assistant｜>": False, "<|EOT|>": True}  # noqa: RUF001
"""Some of those behind all others, and whether they are special."""


CROSSING = (b"oW", b"e\xcc", b"e\xcc\x81")
"""Tokens that show where text is split: K2 makes no `oW` of `helloWorld`, and one word of a letter and its mark."""


def kimi_ranks() -> dict[bytes, int]:
    """Return ranks of K2's kind, with tokens that show where text is split."""
    ranks = merged_ranks()
    return ranks | {token: len(ranks) + place for place, token in enumerate(CROSSING)}


def write_kimi(folder: Path) -> dict[str, Any]:
    """Write a tokenizer of K2's kind; return the config of a small K2 that has it."""
    ranks = kimi_ranks()
    first = len(ranks)
    write_files(folder, ranks)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": first + 2}))
    return CONFIG | {
        "vocab_size": first + 256,
        "bos_token_id": first,
        "eos_token_id": first + 1,
        "pad_token_id": first + 255,
    }


def write_deepseek(folder: Path) -> dict[str, Any]:
    """Write a tokenizer of DeepSeek-V3's kind; return the config of a small K2 that has it."""
    content = deepseek_tokenizer(merged_ranks())
    (folder / "tokenizer.json").write_text(json.dumps(content))
    bos, eos, pad = ({"__type": "AddedToken", "content": word, "normalized": True} for word in DEEPSEEK_NAMED)
    settings = {"add_bos_token": True, "bos_token": bos, "eos_token": eos, "pad_token": pad}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "LlamaTokenizerFast"}))
    rows = len(content["model"]["vocab"]) + len(DEEPSEEK_ADDED) + 5  # some stand for no token
    return CONFIG | {"vocab_size": rows}


def write_nano(folder: Path) -> dict[str, Any]:
    """Write nano-K2's tokenizer; return the config of a small K2 that has it."""
    for name, content in vocabulary.files().items():
        (folder / name).write_bytes(content)
    return CONFIG


def write_model(folder: Path, config: dict[str, Any]) -> None:
    """Write the weights of a small K2, drawn from one seed."""
    torch.manual_seed(0)
    write_checkpoint(folder, writing._shards(architecture.build(config)), config)  # noqa: SLF001  nano writes its own


def deepseek_tokenizer(ranks: dict[bytes, int]) -> dict[str, Any]:
    """Return a tokenizer.json laid out as DeepSeek-V3's, with the merges of other ranks."""
    words = [*DEEPSEEK_NAMED, *(spelled(token) for token in sorted(ranks, key=ranks.__getitem__))]
    special = dict.fromkeys(DEEPSEEK_NAMED, True)
    places = {word: place for place, word in enumerate([*words, *DEEPSEEK_ADDED])}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    splits = next(splits for splits, name in PRES.items() if name == "deepseek-v3")
    expressions = [
        {"type": "Split", "pattern": {"Regex": each}, "behavior": "Isolated", "invert": False} for each in splits
    ]
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": places[word], "content": word, "special": is_special, **flags}
            for word, is_special in (special | DEEPSEEK_ADDED).items()
        ],
        "normalizer": {"type": "Sequence", "normalizers": []},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*expressions, bytes_]},
        "post_processor": {**bytes_, "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
        "decoder": {**bytes_, "add_prefix_space": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {word: places[word] for word in words},
            "merges": merges_of(ranks),
        },
    }
