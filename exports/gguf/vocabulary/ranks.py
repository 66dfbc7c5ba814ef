"""K2's tokenizer for GGUF: merges out of the ranks of tiktoken.model, and the special tokens behind them.

As llama.cpp's converter has them (conversion/deepseek.py, `set_vocab`), with two differences: a token that
tokenizer_config.json does not call special is found in any text and shown, as the tokenizer itself does it, and ids
that no row stands for are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from k2quant.checkpoint.files.tokenizer.ranks import TIKTOKEN, read_ranks
from k2quant.checkpoint.files.tokenizer.spelling import spelled
from k2quant.checkpoint.files.tokenizer.splitting import check_code
from k2quant.checkpoint.files.tokenizer.words import read_words, settings_of
from k2quant.exports.gguf.vocabulary.tokens import Tokens, tasks_of

PRE = "kimi-k2"
"""What llama.cpp calls K2's way to split text (`unicode_regex_split_custom_kimi_k2`, unicode.cpp)."""


def read(folder: Path, rows: int) -> tuple[Tokens, str | dict[str, str] | None]:
    """Return the tokens of a folder with a tiktoken.model, and its chat template.

    Args:
        folder: of the checkpoint.
        rows: of the embedding. Reserved tokens that no file names and that have no row are left out.

    Raises:
        CheckpointError: one of the files lies, or the tokenizer's code splits text in another way than K2's.
    """
    check_code(folder, settings_of(folder))
    ranks = read_ranks(folder / TIKTOKEN)
    words = read_words(folder, ranks)
    texts = {rank: spelled(token) for token, rank in ranks.items()}
    texts |= {place: word for word, place in words.ids.items() if place < rows or place in words.special}
    tokens = Tokens(
        file=folder / TIKTOKEN,
        pre=PRE,
        texts=texts,
        added={place: words.special.get(place, True) for place in words.ids.values() if place in texts},
        merges=merges_of(ranks),
        tasks=tasks_of({task: words.ids[word] for task, word in words.named.items()}),
        begins=False,
    )
    return tokens, words.template


def merges_of(ranks: Mapping[bytes, int]) -> list[str]:
    """Return the pairs that are merged, in their order.

    A token is made of the two parts that are left of it before it is merged itself. One of which more are left is made
    by no merge, and has no pair.
    """
    tokens = sorted((token for token in ranks if len(token) > 1), key=ranks.__getitem__)
    pairs = ((token, cut) for token in tokens if (cut := _last_cut(ranks, token)) is not None)
    return [f"{spelled(token[:cut])} {spelled(token[cut:])}" for token, cut in pairs]


def _last_cut(ranks: Mapping[bytes, int], token: bytes) -> int | None:
    """Return where a token falls apart in two when all pairs before it are merged; None where it does not."""
    own = ranks[token]
    cuts = list(range(len(token) + 1))
    costs = [ranks.get(token[place : place + 2], own) for place in range(len(token) - 1)]
    while (least := min(costs)) < own:
        place = costs.index(least)
        del cuts[place + 1], costs[place]
        for near in (place - 1, place):
            if 0 <= near < len(costs):
                costs[near] = ranks.get(token[cuts[near] : cuts[near + 2]], own)
    return cuts[1] if len(costs) == 1 else None
