"""Tokens of examples, each marked whether it is to be learnt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np

from k2quant.data.examples import Example
from k2quant.data.packing import Document
from k2quant.errors import CheckpointError, K2QuantError, MalformedFile
from k2quant.ground.saying.faults import said

_AT_ONCE = 1000
"""Examples that are tokenised at once."""
_LETTERS_AT_ONCE = 2**22
"""Characters after which fewer are."""


@dataclass(kw_only=True)
class Reader:
    """Tokenises examples and remembers their characters."""

    tokenizer: Any
    """Of transformers."""
    vocabulary: int
    """Rows of the model's embedding."""
    _seen: set[str] = field(default_factory=set)

    def documents(self, examples: Iterator[Example]) -> Iterator[Document]:
        """Yield the tokens of each example.

        Raises:
            CheckpointError: the tokenizer cannot read them, or names no end-of-text token.
            MalformedFile: a token is beyond the model's vocabulary.
        """
        for group in _groups(examples):
            self._seen.update(*(text for example in group for text, _ in example.segments))
            yield from self._tokenised(group)

    def unread(self) -> str:
        """Return the characters, other than blanks, that the tokenizer passes over or does not know, each once."""
        seen = sorted(character for character in self._seen if not character.isspace())
        unknown = getattr(self.tokenizer, "unk_token_id", None)
        ids = self._ids(seen, special=False, where="the characters of all examples")
        return "".join(character for character, own in zip(seen, ids, strict=True) if not own or unknown in own)

    @property
    def padding(self) -> int:
        """Id of the token that fills a row: the tokenizer's own where the model has it."""
        named = (getattr(self.tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
        return next((token for token in named if token is not None and 0 <= token < self.vocabulary), 0)

    def _tokenised(self, group: list[Example]) -> Iterator[Document]:
        ids: dict[bool, Iterator[list[int]]] = {}
        for special in (True, False):
            texts = [text for example in group for own, (text, _) in _frames(example) if own is special]
            ids[special] = iter(self._ids(texts, special=special, where=group[0].where))
        for example in group:
            pieces = [(next(ids[special]), learnt) for special, (_, learnt) in _frames(example)]
            yield self._document(example, self._ended(pieces, example.where) if example.framed else pieces)

    def _ended(self, pieces: list[tuple[list[int], bool]], where: str) -> list[tuple[list[int], bool]]:
        """Return the pieces with one end-of-text token, after the last."""
        end = self.tokenizer.eos_token_id
        if end is None:
            raise CheckpointError("the tokenizer names no end-of-text token", file=where, expected="eos_token")
        (first, learnt), *rest = pieces
        if rest and self._closes and first[-1:] == [end]:
            first = first[:-1]
        pieces = [(first, learnt), *rest]
        return pieces if pieces[-1][0][-1:] == [end] else [*pieces, ([end], True)]

    @cached_property
    def _closes(self) -> bool:
        """Whether the tokenizer itself puts the end-of-text token after a text."""
        [framed] = self._ids(["a"], special=True, where="the letter a")
        return framed[-1:] == [self.tokenizer.eos_token_id]

    def _document(self, example: Example, pieces: list[tuple[list[int], bool]]) -> Document:
        tokens = np.fromiter(chain.from_iterable(ids for ids, _ in pieces), np.int64)
        learnt = np.repeat([learnt for _, learnt in pieces], [len(ids) for ids, _ in pieces])
        largest = int(tokens.max(initial=0))
        if largest >= self.vocabulary:
            raise MalformedFile(
                "a token that the model does not have",
                file=example.where,
                expected=f"ids below {self.vocabulary}",
                found=largest,
                remedy="is this the model's own tokenizer?",
            )
        return Document(tokens=tokens.astype(np.int32), learnt=learnt.astype(np.bool_), divisible=example.divisible)

    def _ids(self, texts: list[str], *, special: bool, where: str) -> list[list[int]]:
        if not texts:
            return []
        options = {"add_special_tokens": special, "return_attention_mask": False, "return_token_type_ids": False}
        try:
            return list(self.tokenizer(texts, **options, verbose=False)["input_ids"])
        except (KeyboardInterrupt, SystemExit, K2QuantError):
            raise
        except BaseException as error:  # compiled code of a tokenizer may panic
            place = f"{where}, and what follows"
            raise CheckpointError("the tokenizer cannot read it", file=place, found=said(error)) from error


def _frames(example: Example) -> list[tuple[bool, tuple[str, bool]]]:
    """Return each segment with whether the tokenizer adds its special tokens to it."""
    return [(example.framed and place == 0, segment) for place, segment in enumerate(example.segments)]


def _groups(examples: Iterator[Example]) -> Iterator[list[Example]]:
    """Yield examples in groups that fit into memory."""
    group: list[Example] = []
    letters = 0
    for example in examples:
        group.append(example)
        letters += sum(len(text) for text, _ in example.segments)
        if len(group) == _AT_ONCE or letters >= _LETTERS_AT_ONCE:
            yield group
            group, letters = [], 0
    if group:
        yield group
