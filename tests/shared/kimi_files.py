"""A tokenizer of K2's kind, made here: byte pairs merged on a text of many scripts, and K2's special tokens."""

from __future__ import annotations

import base64
import json
import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from k2quant.checkpoint.files.tokenizer.splitting import PATTERN
from k2quant.model.passes.texts import SAMPLE

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
