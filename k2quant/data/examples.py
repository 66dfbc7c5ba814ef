"""Examples to learn from: what a line may hold, as text, each piece marked whether it is to be learnt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from k2quant.data.learning import Census, Learning
from k2quant.data.marking import Segment, examples_of_chat
from k2quant.data.rendering import Template
from k2quant.data.turns import conversation, text_of
from k2quant.errors import MalformedFile

KEYS = ("text", "prompt", "completion", "messages")
"""Of an example; one that is null is ignored, as a missing key is in a table."""
TOOLS = "tools"
"""Beside `messages`."""
BESIDE = {
    "functions": "give `tools`, in OpenAI's form",
    "documents": "put their text into a message",
    "chat_template_kwargs": "put what it would change into the model's chat template",
}
"""Keys beside `messages` that change what a model is asked, and cannot be followed, each with what to do: passed over,
they would teach answers to another question. Other keys are ignored, a request's own such as `parallel_tool_calls`
among them."""

_SHAPES = "text; prompt and completion; or messages"


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One example as text; a document of its own."""

    where: str
    """File and line, for error messages."""
    segments: tuple[Segment, ...]
    """Pieces of text, each with whether it is to be learnt; each is tokenised by itself."""
    framed: bool = False
    """Whether the tokenizer adds its own special tokens before the first, and the end-of-text token follows the last.
    A chat template writes its own."""
    divisible: bool = False
    """Whether one longer than a row goes on in the next."""


def examples_of(
    row: Mapping[str, Any], where: str, tokenizer: Any, learning: Learning | None = None, census: Census | None = None
) -> Iterator[Example]:
    """Yield the examples that a row holds: one, or of a conversation several or none, as `learning` says.

    Args:
        row: with `text`, with `prompt` and `completion`, or with `messages`: dicts of `role`, `content` and whatever
            else the chat template knows, and `tools` beside them.
        where: file and line.
        tokenizer: of transformers; its chat template renders `messages`.
        learning: what of a conversation is learnt; None: the defaults.
        census: is told what was found.

    Raises:
        MalformedFile: none of the three or more than one, a wrong type, an empty text or prompt, no turn of the
            assistant, a key that cannot be followed, or the chat template cannot render the messages turn by turn.
        CheckpointError: there is no chat template.
    """
    census = Census() if census is None else census
    census.rows += 1
    found = tuple(key for key in KEYS if row.get(key) is not None)
    chat = found == ("messages",)
    refused = BESIDE if chat else {TOOLS: "give it beside `messages`"}
    for key, remedy in refused.items():
        if row.get(key):
            raise MalformedFile(f"{key}, which cannot be followed", file=where, remedy=remedy)
    if chat:
        talk = conversation(row, where)
        for segments in examples_of_chat(talk, Template(tokenizer), learning or Learning(), census):
            yield Example(where=where, segments=segments)
        return
    if found not in {("text",), ("prompt", "completion")}:
        raise _no_example(row, where)
    # An empty completion is one, as an empty answer is: the model is to end at once.
    texts = [text_of(row[key], key, where, empty=key == "completion") for key in found]
    learnt = [True] if len(texts) == 1 else [False, True]
    yield Example(where=where, segments=tuple(zip(texts, learnt, strict=True)), framed=True, divisible=len(texts) == 1)


def _no_example(row: Mapping[str, Any], where: str) -> MalformedFile:
    """Return what is wrong with a row that holds none of the shapes, or more than one."""
    if [key for key in KEYS if key in row] == ["text"]:  # so it is null
        return MalformedFile("text is no text", file=where, expected="a string", found="null")
    names = [f"{key} (null)" if key in KEYS and row[key] is None else str(key) for key in row]
    shapes = [name for key, name in zip(row, names, strict=True) if key in KEYS]
    return MalformedFile(
        "not one example", file=where, expected=_SHAPES, found=", ".join(shapes or names)[:100] or "no keys"
    )
