"""Which parts of a conversation are learnt: each turn of the assistant as the template writes it, its end included.

A turn is what follows the header that the template writes as its prompt. What the template adds of its own, an empty
think block before it or blanks behind its last token, is not the assistant's and is not learnt. Where the template has
`{% generation %}` marks, they say it instead.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from k2quant.errors import MalformedFile
from k2quant.qat.data.learning import Census, Learning
from k2quant.qat.data.rendering import Span, Template
from k2quant.qat.data.turns import REASONING, Conversation, bare, lifted, reasoned

Segment = tuple[str, bool]
"""Text, and whether it is learnt."""

_EMPTY = re.compile(r"(\s*<think>)?(\s*)</think>(\s*)")
_OPEN = "<think>"


def examples_of_chat(
    talk: Conversation, template: Template, learning: Learning, census: Census
) -> Iterator[tuple[Segment, ...]]:
    """Yield the examples of a conversation, each as segments; none where nothing of it is learnt.

    Args:
        talk: the conversation.
        template: that writes it.
        learning: what of it is learnt.
        census: is told what was found.

    Raises:
        MalformedFile: the template cannot render it, passes over its tools or calls, or writes it so that nobody can
            say which parts are the turns.
    """
    template.check(talk.where)
    census.chats += 1
    census.tools += bool(talk.tools)
    census.tool_calls += any("tool_calls" in message for message in talk.messages)
    census.reasoning += any(reasoned(message) for message in talk.messages)
    census.weightless += talk.weightless
    if learning.turns == "last":
        last = max(place for place, message in enumerate(talk.messages) if message["role"] == "assistant")
        talk = replace(talk, learnt=tuple(own and place == last for place, own in enumerate(talk.learnt)))
    if talk.last < 0:
        census.left_out += 1
        return
    talk, renamed = template.fitted(talk.upto(talk.last))
    census.renamed += renamed
    if template.names_reasoning(talk.tools):
        talk = replace(talk, messages=tuple(map(lifted, talk.messages, _places(talk))))
    stripped, losing = _lossless(talk, template)
    if lost := [place for place in losing if talk.learnt[place]]:
        census.losing += 1
        census.first_losing = census.first_losing or talk.place(lost[0])
    if learning.reasoning == "split":
        marker = _Marker(talk, template, census, apart=True)
    else:
        if learning.reasoning == "skip":
            kept = tuple(own and place not in losing for place, own in enumerate(stripped.learnt))
            stripped = replace(stripped, learnt=kept)
        marker = _Marker(stripped, template, census, apart=False)
    if stripped.last < 0 and not marker.apart:
        census.left_out += 1
        return
    yield from marker.examples()


def _places(talk: Conversation) -> list[str]:
    return [talk.place(number) for number in range(len(talk.messages))]


def _lossless(talk: Conversation, template: Template) -> tuple[Conversation, list[int]]:
    """Return a conversation without the reasoning that makes no difference to what is written, and where it stood."""
    places = [place for place, message in enumerate(talk.messages) if reasoned(message)]
    if not places:
        return talk, []
    text = template.written(talk)
    losing = [place for place in places if template.written(talk, _bared(talk, {place})) == text]
    return replace(talk, messages=_bared(talk, set(losing))), losing


def _bared(talk: Conversation, places: set[int]) -> tuple[dict[str, Any], ...]:
    return tuple(bare(message) if place in places else message for place, message in enumerate(talk.messages))


@dataclass(frozen=True, slots=True)
class _Marker:
    """Takes one conversation apart."""

    talk: Conversation
    template: Template
    census: Census
    apart: bool
    """Whether a turn before which the template writes anything anew begins an example of its own, as it would be asked
    for, and its reasoning is put where the template leaves its place empty."""

    def examples(self) -> Iterator[tuple[Segment, ...]]:
        """Yield the examples."""
        if not self.apart and (spans := self.template.marks(self.talk)) is not None:
            yield from _example(self._marked(spans))
            return
        seen = ""
        segments: list[Segment] = []
        for place, message in enumerate(self.talk.messages):
            if message["role"] != "assistant":
                continue
            prompt = self.template.written(self.talk, self.talk.messages[:place], prompt=True)
            if not prompt.startswith(seen):
                if not self.apart:
                    raise self._changed(place)
                yield from _example(segments)
                seen, segments = "", []
            turn = self._turn(place, prompt)
            segments += [(prompt[len(seen) :], False), *turn]
            seen = prompt + "".join(text for text, _ in turn)
        yield from _example(segments)

    def _changed(self, place: int) -> MalformedFile:
        return MalformedFile(
            "the chat template does not write the messages one after another",
            file=self.talk.where,
            expected=f"message {place + 1} to follow what stands before it",
            found="that it changes what stands before it",
            remedy="learn each turn as it is asked for with `data: reasoning: split`, or the last alone with "
            "`data: turns: last`",
        )

    def _turn(self, place: int, prompt: str) -> list[Segment]:
        """Return the segments of a turn of the assistant's, which follows a prompt."""
        messages = self.talk.messages[: place + 1]
        text = self.template.written(self.talk, messages)
        if not text.startswith(prompt):
            if not self.apart:
                raise self._changed(place)
            # A template that blanks what was thought before may do so with this turn. The turn itself stays.
            messages = (*map(bare, messages[:-1]), messages[-1])
            prompt = self.template.written(self.talk, messages[:-1], prompt=True)
            text = self.template.written(self.talk, messages)
            if not text.startswith(prompt):
                raise MalformedFile(
                    "the chat template does not write a turn behind its own prompt for it", file=self.talk.place(place)
                )
        turn = text[len(prompt) :]
        learnt = self.talk.learnt[place]
        spans = self._spans(messages, len(prompt)) if learnt else None
        if self.apart and learnt and reasoned(messages[-1]):
            alone = (*messages[:-1], bare(messages[-1]))
            if self.template.written(self.talk, alone) == text:
                turn, spans = self._filled(place, turn, spans, prompt)
        if not learnt:
            return [(turn, False)]
        return _cut(turn, spans) if spans is not None else self._own(turn, messages[-1], prompt)

    def _spans(self, messages: Sequence[dict[str, Any]], start: int) -> list[Span] | None:
        """Return the template's own marks from a place on, as spans of what stands there."""
        found = self.template.marks(self.talk, messages)
        return found and [(max(begin - start, 0), end - start) for begin, end in found if end > start]

    def _filled(self, place: int, turn: str, spans: list[Span] | None, prompt: str) -> tuple[str, list[Span] | None]:
        """Return a turn with its reasoning in the think block that the template left empty."""
        reasoning = next(
            (self.talk.messages[place][name] for name in REASONING if name in self.talk.messages[place]), ""
        )
        empty = _empty(turn, prompt)
        if not empty or not reasoning:
            raise MalformedFile(
                "the chat template has no place for the reasoning",
                file=self.talk.place(place),
                expected="<think></think>, for `data: reasoning: split` to fill",
                found=turn[:40],
                remedy="learn without it with `data: reasoning: drop`",
            )
        begin, end = empty.span(2)
        at = begin + (end - begin) // 2  # blanks on both sides stay where they are
        size = len(reasoning)
        moved = spans and [(s + size * (s > at), e + size * (e >= at)) for s, e in spans]
        return turn[:at] + reasoning + turn[at:], moved

    def _own(self, turn: str, message: dict[str, Any], prompt: str) -> list[Segment]:
        """Return what of a turn is the assistant's, and what the template added."""
        before = 0
        empty = _empty(turn, prompt)
        if empty and not reasoned(message) and not _EMPTY.match(message["content"]):
            blanks = len(message["content"]) - len(message["content"].lstrip())
            before = empty.end() - min(blanks, len(empty[3]))
            self.census.unthinking += 1
        end = len(turn)
        shorter = turn.rstrip()
        if shorter.endswith(self.template.ends):
            end = len(shorter)
        return [(turn[:before], False), (turn[before:end], True), (turn[end:], False)]

    def _marked(self, spans: list[Span]) -> list[Segment]:
        """Return the whole conversation as the template marks it, but for turns that are not learnt."""
        turns = [
            learnt
            for message, learnt in zip(self.talk.messages, self.talk.learnt, strict=True)
            if message["role"] == "assistant"
        ]
        if not all(turns):
            if len(spans) != len(turns):
                raise MalformedFile(
                    "the chat template's marks of what is generated fit no turns",
                    file=self.talk.where,
                    expected=f"{len(turns)}, a pair for each turn of the assistant",
                    found=len(spans),
                )
            spans = [span for span, learnt in zip(spans, turns, strict=True) if learnt]
        return _cut(self.template.written(self.talk), spans)


def _empty(turn: str, prompt: str) -> re.Match[str] | None:
    """Return the empty think block with which a turn begins, be it that the prompt has opened it."""
    found = _EMPTY.match(turn)
    return found if found and (found[1] or prompt.rstrip().endswith(_OPEN)) else None


def _cut(text: str, spans: Sequence[Span]) -> list[Segment]:
    """Return a text in segments, those in the spans learnt."""
    found: list[Segment] = []
    seen = 0
    for start, end in spans:
        found += [(text[seen:start], False), (text[start:end], True)]
        seen = end
    return [*found, (text[seen:], False)]


def _example(segments: Sequence[Segment]) -> Iterator[tuple[Segment, ...]]:
    """Yield an example up to the last segment that is learnt, if there is one; neighbours of a kind are one text."""
    joined: list[Segment] = []
    for text, learnt in segments:
        if joined and text and joined[-1][1] == learnt:
            joined[-1] = (joined[-1][0] + text, learnt)
        elif text:
            joined.append((text, learnt))
    if joined and not joined[-1][1]:
        joined.pop()
    if joined:
        yield tuple(joined)
