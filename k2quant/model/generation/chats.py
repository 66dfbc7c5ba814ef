"""Chats: a prompt made by the checkpoint's own template, where a turn ends, and what of an answer is reasoning.

A template is code of the checkpoint, which transformers renders in jinja's sandbox: it can open no file and reach no
Python object, and a range has 100,000 steps at most. What it writes may still be long, and take long.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from k2quant.errors import CheckpointError
from k2quant.ground.release import THINK_CLOSES as CLOSES
from k2quant.ground.release import THINK_OPENS as OPENS
from k2quant.ground.units import check_prompt
from k2quant.model.generation.tokenizers import blamed

_ANSWER = "k2quantanswer"
"""Stands for an answer when a template is asked what it writes around one."""


class ChatPrompt(NamedTuple):
    """What a model is to continue, and how to read what it writes."""

    text: str
    """As the template writes it, special tokens included."""
    ends: tuple[int, ...]
    """The tokens with which the template ends an answer; empty where it does so without a special one."""
    thinks: bool
    """Whether the answer begins in its reasoning: the template opens it, or writes it before each answer."""


class Parts(NamedTuple):
    """An answer in two."""

    reasoning: str | None
    """What stands before `</think>`, without `<think>`; None where there was none."""
    answer: str
    """What follows; empty where the reasoning was cut."""


def chat_prompt(tokenizer: Any, text: str, *, system: str | None = None) -> ChatPrompt:
    """Make a prompt of a user's turn by the tokenizer's chat template.

    Args:
        tokenizer: from `load_tokenizer`.
        text: what the user says.
        system: the system's turn before it; None leaves it to the template, and K2's writes one of its own.

    Raises:
        UsageError: a text is empty.
        CheckpointError: there is no template, or it cannot be rendered or refuses such turns.
    """
    folder = Path(tokenizer.name_or_path)
    if not tokenizer.chat_template:
        raise CheckpointError(
            "has no chat template",
            file=folder,
            expected="chat_template.jinja, or chat_template in tokenizer_config.json",
            remedy="take it from the model's release; a base model has none, and continues a text without `chat=`",
        )
    for own in (text,) if system is None else (text, system):
        check_prompt(own)
    turns = [{"role": "system", "content": system}] if system is not None else []
    turns.append({"role": "user", "content": text})
    with blamed(folder, "its chat template cannot be rendered"):
        prompt = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    before, behind = _around(tokenizer, turns)
    open_ = prompt.rstrip().endswith(OPENS)
    closed = prompt.rstrip().endswith(CLOSES)
    return ChatPrompt(prompt, _ends(tokenizer, behind), open_ or (CLOSES in before and not closed))


def _around(tokenizer: Any, turns: list[dict[str, str]]) -> tuple[str, str]:
    """Return what a template writes before an answer, from the turn before on, and behind it."""
    answered = [*turns, {"role": "assistant", "content": _ANSWER}]
    try:
        text = str(tokenizer.apply_chat_template(answered, tokenize=False, add_generation_prompt=False))
    except Exception:  # noqa: BLE001  a template may refuse what nobody asked it for; then it says nothing of ends
        return "", ""
    before, found, behind = text.rpartition(_ANSWER)
    return (before.rpartition(turns[-1]["content"])[2], behind) if found else ("", "")


def _ends(tokenizer: Any, behind: str) -> tuple[int, ...]:
    """Return the special token that stands first behind an answer."""
    words = [word for word in tokenizer.get_added_vocab() if behind.lstrip().startswith(word)]
    return tuple(int(tokenizer.get_added_vocab()[word]) for word in [max(words, key=len)]) if words else ()


def parts(text: str, *, thinks: bool) -> Parts:
    """Take reasoning and answer apart.

    Args:
        text: all that a model wrote.
        thinks: whether it began in its reasoning.
    """
    before, marker, after = text.partition(CLOSES)
    begins = before.lstrip().startswith(OPENS)
    if not (marker or begins or thinks):
        return Parts(None, text)
    return Parts(before.lstrip().removeprefix(OPENS).strip(), after.lstrip())


class Telling:
    """Hands an answer on as it comes, and says of each piece whether it is reasoning, the markers included."""

    def __init__(self, show: Callable[[str, bool], None], *, thinks: bool) -> None:
        """Hand on.

        Args:
            show: called with a piece, and whether it is reasoning.
            thinks: whether the answer begins in its reasoning.
        """
        self._show, self._thinks = show, thinks
        self._begun = thinks
        self._held = ""

    def __call__(self, piece: str) -> None:
        """Take a piece; what may be the beginning of a marker waits for the next."""
        self._held += piece
        if not self._begun and not self._begin():
            return
        if self._thinks and CLOSES in self._held:
            before, marker, self._held = self._held.partition(CLOSES)
            self._show(before + marker, True)
            self._thinks = False
        kept = _beginning(self._held, CLOSES) if self._thinks else 0
        self._give(len(self._held) - kept)

    def _begin(self) -> bool:
        """Look whether reasoning begins; tell whether that is known."""
        start = self._held.lstrip()
        if start != OPENS and OPENS.startswith(start):
            return False
        self._begun, self._thinks = True, start.startswith(OPENS)
        return True

    def _give(self, count: int) -> None:
        if count:
            self._show(self._held[:count], self._thinks)
        self._held = self._held[count:]

    def end(self) -> None:
        """Hand on what is left."""
        self._give(len(self._held))


def _beginning(text: str, marker: str) -> int:
    """Return how many characters at a text's end may be the beginning of a marker."""
    return next((size for size in range(min(len(marker) - 1, len(text)), 0, -1) if text.endswith(marker[:size])), 0)
