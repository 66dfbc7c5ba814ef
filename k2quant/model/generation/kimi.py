"""K2's tokenizer, read from tiktoken.model without code of the checkpoint; ids equal those of the code that ships.

That code, tokenization_kimi.py, hands text to tiktoken with the pattern of `splitting` and lets special tokens in it
count, in pieces that tiktoken can bear. Whatever else it does is transformers' own class for tokenizers in Python, as
here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AddedToken, PreTrainedTokenizer

from k2quant.checkpoint.files.tokenizer.ranks import TIKTOKEN, read_ranks
from k2quant.checkpoint.files.tokenizer.spelling import spelled, unspelled
from k2quant.checkpoint.files.tokenizer.splitting import PATTERN, check_code
from k2quant.checkpoint.files.tokenizer.words import Words, read_words, settings_of
from k2quant.errors import CheckpointError, MissingExtra
from k2quant.ground.extras import install, lacking

MOST = 400_000
"""Characters that its code hands to tiktoken at once."""
LONGEST_RUN = 25_000
"""Characters, all blank or none of them, that it hands over in a row."""

_RUNS = re.compile(r"\s+|\S+")
_AS_CODE = "tools_ts_str"
"""What templates from K2.5 on call the tools that code of the checkpoint has written as TypeScript."""


def open_kimi(folder: Path) -> KimiTokenizer:
    """Return the tokenizer of a folder for which `words.is_kimi` holds, and whose files have been checked to lie in it.

    Raises:
        MissingExtra: tiktoken is not installed.
        CheckpointError: one of its files lies, or its code splits text in another way than K2's.
    """
    path = folder / TIKTOKEN
    _check_installed(path)
    check_code(folder, settings_of(folder))
    ranks = read_ranks(path)
    return KimiTokenizer(folder, ranks, read_words(folder, ranks))


def _check_installed(path: Path) -> None:
    if lacking("tokenizer"):
        raise MissingExtra("is read with tiktoken, which is not installed", file=path, remedy=install("tokenizer"))


class KimiTokenizer(PreTrainedTokenizer):
    """K2's tokenizer, as transformers' class for tokenizers in Python."""

    def __init__(self, folder: Path, ranks: dict[bytes, int], words: Words) -> None:
        """Put it together.

        Args:
            folder: of the checkpoint, for its name.
            ranks: of tokens, all 256 bytes among them.
            words: its special tokens.
        """
        from tiktoken import Encoding

        self._model = Encoding(
            TIKTOKEN,
            pat_str="|".join(PATTERN),
            mergeable_ranks=ranks,
            special_tokens=words.ids,
            explicit_n_vocab=len(ranks) + len(words.ids),
        )
        self._spelled = {rank: spelled(token) for token, rank in ranks.items()}
        self._spelled |= {place: token for token, place in words.ids.items()}
        self._places = {token: place for place, token in self._spelled.items()}
        self._special = frozenset(words.ids)
        if len(self._places) < len(self._spelled):  # so one has the letters by which a rank's bytes are spelled
            raise CheckpointError("a special token is spelled as another token", file=folder)
        added = {
            place: AddedToken(self._spelled[place], normalized=False, special=special)
            for place, special in words.special.items()
        }
        super().__init__(  # type: ignore[no-untyped-call]
            added_tokens_decoder=added,
            extra_special_tokens=words.extra,
            chat_template=words.template,
            model_max_length=words.longest,
            name_or_path=str(folder),
            **words.named,
        )

    @property
    def vocab_size(self) -> int:
        """Tokens, special ones included."""
        return len(self._spelled)

    def get_vocab(self) -> dict[str, int]:
        """Return the id of each token as it is spelled."""
        return dict(self._places)

    def encode(self, text: str, *, allow_special_tokens: bool = True, **options: Any) -> list[int]:
        """Return a text's ids; special tokens in it count as such, unless they are not allowed.

        With other options it is transformers' method, which looks for the special tokens that have a name first.
        """
        if options:
            ids: list[int] = super().encode(text, **options)
            return ids
        return self._ids(text, special=allow_special_tokens)

    def apply_chat_template(self, conversation: Any, tools: Any = None, **options: Any) -> Any:  # type: ignore[override]
        """Render a chat; tools are written with their keys in order, as K2's code does.

        Raises:
            CheckpointError: there are tools, and the template wants them from code of the checkpoint.
        """
        if tools and _AS_CODE in str(self.get_chat_template(options.get("chat_template"), tools)):
            raise CheckpointError(
                "its chat template takes tools as code of the checkpoint writes them",
                file=self.name_or_path,
                remedy="if you trust that code, say `trust_remote_code=True`",
            )
        return super().apply_chat_template(conversation, tools=_ordered(tools), **options)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Return the text of tokens; bytes that are no UTF-8 become replacement characters."""
        return b"".join(self._bytes(token) for token in tokens).decode("utf-8", "replace")

    def _bytes(self, token: str) -> bytes:
        return token.encode() if token in self._special else unspelled(token)

    def _ids(self, text: str, *, special: bool = True) -> list[int]:
        options: dict[str, Any] = {"allowed_special": "all"} if special else {"disallowed_special": ()}
        return [place for piece in pieces(text) for place in self._model.encode(piece, **options)]

    def _tokenize(self, text: str, **_options: Any) -> list[str]:
        return [self._spelled[place] for place in self._ids(text)]

    def _convert_token_to_id(self, token: str) -> int | None:
        place: int | None = self._places.get(token, self.unk_token_id)
        return place

    def _convert_id_to_token(self, index: int) -> str:
        return self._spelled[index]


def pieces(text: str, most: int = MOST, longest_run: int = LONGEST_RUN) -> Iterator[str]:
    """Cut a text as K2's code does: every `most` characters, and within a run of blanks, or of others, that is long.

    Args:
        text: any.
        most: characters of a piece.
        longest_run: characters in a row that are all blank, or none of them, in a piece.
    """
    for begin in range(0, len(text), most):
        part, start = text[begin : begin + most], 0
        for run in _RUNS.finditer(part):
            for cut in range(run.start() + longest_run, run.end(), longest_run):
                yield part[start:cut]
                start = cut
        yield part[start:]


def _ordered(value: Any) -> Any:
    """Return a value with the keys of all its objects in order."""
    if isinstance(value, dict):
        return {key: _ordered(entry) for key, entry in sorted(value.items())}
    return [_ordered(entry) for entry in value] if isinstance(value, list) else value
