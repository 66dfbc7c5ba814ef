"""Examples to learn from: what a line may hold, and its tokens, each marked whether it is to be learnt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np

from k2quant.errors import CheckpointError, K2QuantError, MalformedFile
from k2quant.qat.data.packing import Document

KEYS = ("text", "prompt", "completion", "messages")
"""Of an example; others are ignored, and so is one that is null, as a missing key is in a table."""

_SHAPES = "text; prompt and completion; or messages"
_AT_ONCE = 1000
"""Examples that are tokenised at once."""
_LETTERS_AT_ONCE = 2**22
"""Characters after which fewer are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One example as text; a document of its own."""

    where: str
    """File and line, for error messages."""
    segments: tuple[tuple[str, bool], ...]
    """Pieces of text, each with whether it is to be learnt; each is tokenised by itself."""
    framed: bool = False
    """Whether the tokenizer adds its own special tokens before the first, and the end-of-text token follows the last.
    A chat template writes its own."""
    divisible: bool = False
    """Whether one longer than a row goes on in the next."""


def example_of(row: Mapping[str, Any], where: str, tokenizer: Any) -> Example:
    """Return the example that a row holds.

    Args:
        row: with `text`, with `prompt` and `completion`, or with `messages`: dicts of `role`, `content` and whatever
            else the chat template knows.
        where: file and line.
        tokenizer: of transformers; its chat template renders `messages`.

    Raises:
        MalformedFile: none of the three or more than one, a wrong type, an empty text or prompt, no turn of the
            assistant, or the chat template cannot render the messages turn by turn.
        CheckpointError: there is no chat template.
    """
    found = tuple(key for key in KEYS if row.get(key) is not None)
    if found == ("messages",):
        return Example(where=where, segments=tuple(_chat(row["messages"], where, tokenizer)))
    if found not in {("text",), ("prompt", "completion")}:
        raise _no_example(row, where)
    # An empty completion is one, as an empty answer is: the model is to end at once.
    texts = [_text(row[key], key, where, empty=key == "completion") for key in found]
    learnt = [True] if len(texts) == 1 else [False, True]
    segments = tuple(zip(texts, learnt, strict=True))
    return Example(where=where, segments=segments, framed=True, divisible=len(texts) == 1)


def _no_example(row: Mapping[str, Any], where: str) -> MalformedFile:
    """Return what is wrong with a row that holds none of the shapes, or more than one."""
    if [key for key in KEYS if key in row] == ["text"]:  # so it is null
        return MalformedFile("text is no text", file=where, expected="a string", found="null")
    names = [f"{key} (null)" if key in KEYS and row[key] is None else str(key) for key in row]
    shapes = [name for key, name in zip(row, names, strict=True) if key in KEYS]
    return MalformedFile(
        "not one example", file=where, expected=_SHAPES, found=", ".join(shapes or names)[:100] or "no keys"
    )


def _text(value: object, name: str, where: str, *, empty: bool = False) -> str:
    if not isinstance(value, str):
        raise MalformedFile(f"{name} is no text", file=where, expected="a string", found=type(value).__name__)
    if not (value or empty):
        raise MalformedFile(f"{name} is empty", file=where, expected="some text")
    return value


def _chat(messages: object, where: str, tokenizer: Any) -> Iterator[tuple[str, bool]]:
    """Yield what the template writes before each turn of the assistant, and the turn, up to the last of them."""
    turns = _turns(messages, where)
    if not getattr(tokenizer, "chat_template", None):
        remedy = "give prompt and completion, or a model whose tokenizer has one"
        raise CheckpointError("messages, but the tokenizer has no chat template", file=where, remedy=remedy)
    seen = ""
    for place, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        for end, learnt in ((place, False), (place + 1, True)):
            text = _rendered(turns[:end], tokenizer, where, prompt=not learnt)
            if not text.startswith(seen):
                raise MalformedFile(
                    "the chat template does not write the messages one after another",
                    file=where,
                    expected=f"message {place + 1} to follow what stands before it",
                    found="that it changes what stands before it",
                    remedy="give prompt and completion, or only one turn of the assistant",
                )
            yield text[len(seen) :], learnt
            seen = text


def _turns(messages: object, where: str) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        found = "none" if messages == [] else type(messages).__name__
        raise MalformedFile("messages is no conversation", file=where, expected="a list of messages", found=found)
    turns = [_turn(message, f"{where}, message {number}") for number, message in enumerate(messages, 1)]
    if turns[0]["role"] == "assistant":
        raise MalformedFile("nothing to answer", file=where, expected="a first message that is not the assistant's")
    if all(turn["role"] != "assistant" for turn in turns):
        raise MalformedFile("nothing to learn", file=where, expected="a message of the role assistant")
    return turns


def _turn(message: object, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise MalformedFile("not a message", file=where, expected="role and content", found=type(message).__name__)
    turn = {key: value for key, value in message.items() if value is not None}
    _text(turn.get("role"), "role", where)
    _text(turn.get("content"), "content", where, empty=True)
    return turn


def _rendered(turns: list[dict[str, Any]], tokenizer: Any, where: str, *, prompt: bool) -> str:
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt))
    except Exception as error:  # whatever a template raises
        raise MalformedFile("the chat template cannot render it", file=where, found=_said(error)) from error


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
            raise CheckpointError("the tokenizer cannot read it", file=place, found=_said(error)) from error


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


def _said(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
