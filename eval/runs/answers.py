"""One answer of a model: to which item, and whether it is right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Key(NamedTuple):
    """What makes an item of two runs the same item: the document and every word of the prompt and of the target."""

    doc_hash: str
    prompt_hash: str
    """Of the rendered prompts: all requests of the item where k2quant ran it, the first one's context where not."""
    target_hash: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One question, and what a model made of it; of one that was asked several times, one of the answers."""

    key: Key
    doc_id: int
    """Its place in the task's data."""
    right: bool
    prompt: str
    """The end of the prompt, for people."""
    target: str
    """The right answer, for people."""
    answer: str
    """What the task's filter made of the model's output; of a multiple choice, the number of the likeliest one."""
    output_digest: str
    """SHA-256 of the raw responses, log-probabilities included: equal where two runs gave the same to the last bit."""
    choices: int | None
    """Of a multiple choice, how many there are; None where the model wrote its answer."""
    hollow: bool
    """Whether the output says nothing: an empty text, or log-probabilities that are all the same."""
    repeat: int = 0
    """Which of the answers to this question it is, from 0."""
    cut_in_thought: bool | None = None
    """Whether the answer never left its reasoning, and so is wrong; None where nobody looked."""
