"""The first examples of a job as a model will read them, each piece with whether it is learnt: for people to check."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from k2quant.data.learning import Census, Learning
from k2quant.data.packing import Document
from k2quant.data.sources import DataSource, read_examples
from k2quant.data.tokens import Reader
from k2quant.ground.saying.showing import brief
from k2quant.model.generation import load_tokenizer
from k2quant.qat.job import Job

_ANY_TOKEN = 2**31 - 1  # whether the model has it, the plan finds out


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Tokens that stand side by side and are all learnt, or none of them."""

    text: str
    """As the tokenizer decodes them, special tokens by their names."""
    tokens: int
    learnt: bool
    """The first token of an example never is, since nothing stands before it."""
    cut: bool
    """Whether they lie beyond the end of a row, and are lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownExample:
    """An example."""

    where: str
    """File and line, or dataset, split and row."""
    pieces: tuple[Piece, ...]
    divided: bool
    """Whether it is longer than a row and goes on in the next one."""

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)

    @property
    def tokens(self) -> int:
        """All of them."""
        return sum(piece.tokens for piece in self.pieces)

    @property
    def learnt(self) -> int:
        """Tokens that are learnt."""
        return sum(piece.tokens for piece in self.pieces if piece.learnt and not piece.cut)

    @property
    def cut(self) -> int:
        """Tokens that are lost beyond the end of a row."""
        return sum(piece.tokens for piece in self.pieces if piece.cut)


def first_examples(job: Job, count: int) -> list[ShownExample]:
    """Return the first examples of a job's data, or fewer if there are no more.

    Reasoning that the chat template does not write is missing in them, unless the job says `reasoning: split`.

    Args:
        job: from `read_job`; of its model only the tokenizer is read.
        count: of examples.

    Raises:
        CheckpointError: data or tokenizer cannot be used.
    """
    data = job.data
    tokenizer = load_tokenizer(Path(job.model), trust_remote_code=job.trust_remote_code, follow_links=job.follow_links)
    source = DataSource(path=data.path, split=data.split, config=data.config)
    learning = Learning(turns=data.turns, reasoning=data.reasoning)
    examples = list(islice(read_examples(source, tokenizer, learning, Census()), count))
    documents = Reader(tokenizer=tokenizer, vocabulary=_ANY_TOKEN).documents(iter(examples))
    return [
        ShownExample(
            where=example.where,
            pieces=tuple(_pieces(document, tokenizer, data.length)),
            divided=document.divisible and len(document.tokens) - 1 > data.length,
        )
        for example, document in zip(examples, documents, strict=True)
    ]


def _pieces(document: Document, tokenizer: Any, length: int) -> Iterator[Piece]:
    """Yield the pieces of a document; a row holds `length` tokens and, as the last one's target, one more."""
    tokens, learnt = document.tokens, document.learnt.copy()
    learnt[:1] = False
    cut = np.arange(len(tokens)) > (len(tokens) if document.divisible else length)
    ends = np.flatnonzero(np.diff(2 * cut + learnt)) + 1
    for start, end in pairwise([0, *ends.tolist(), len(tokens)]):
        if end > start:
            text = tokenizer.decode(tokens[start:end].tolist(), skip_special_tokens=False)
            yield Piece(text=str(text), tokens=end - start, learnt=bool(learnt[start]), cut=bool(cut[start]))
