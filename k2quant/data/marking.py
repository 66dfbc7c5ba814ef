"""Which parts of a conversation are learnt: each turn of the assistant as the template writes it, its end included.

A turn is what follows the header that the template writes as its prompt. What the template adds of its own, an empty
think block before it or blanks behind its last token, is not the assistant's and is not learnt. Where the template has
`{% generation %}` marks, they say it instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from k2quant.data import thinking
from k2quant.data.learning import Census, Learning
from k2quant.data.rendering import Span, Template
from k2quant.data.turns import Conversation, bare, lifted, reasoned
from k2quant.errors import MalformedFile

Segment = tuple[str, bool]
"""Text, and whether it is learnt."""


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
        CheckpointError: there is no chat template, or several and none is the default.
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
    stripped, losing = thinking.lossless(talk, template)
    if lost := sorted(place for place in losing if talk.learnt[place]):
        census.losing += 1
        census.first_losing = census.first_losing or talk.place(lost[0])
    if learning.reasoning == "skip":
        kept = tuple(own and place not in losing for place, own in enumerate(talk.learnt))
        stripped = replace(stripped, learnt=kept)
    apart = learning.reasoning == "split"
    marker = _Marker(talk if apart else stripped, template, census, apart=apart)
    found = [] if stripped.last < 0 else list(marker.examples())
    census.left_out += not found
    yield from found


def _places(talk: Conversation) -> list[str]:
    return [talk.place(number) for number in range(len(talk.messages))]


@dataclass(frozen=True, slots=True)
class _Turn:
    """A turn that is learnt, as it stands behind its prompt."""

    segments: list[Segment]
    unthinking: bool = False
    """Whether it stands behind an empty think block."""

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.segments)


@dataclass(frozen=True, slots=True)
class _Near:
    """A turn that is learnt, written right behind what stands before the first of them."""

    turn: _Turn
    between: str
    """What follows it, up to and with the prompt for the next turn."""


@dataclass(slots=True)
class _Marker:
    """Takes one conversation apart."""

    talk: Conversation
    template: Template
    census: Census
    apart: bool
    """Whether a turn before which the template writes anything anew begins an example of its own, as it would be asked
    for, and its reasoning is put where the template leaves its place empty."""
    near: dict[int, _Near | None] = field(default_factory=dict)
    """By place; None where it cannot be written so."""
    local: bool = True
    """Whether the template has written turns behind the opening as it writes them in their place."""

    def examples(self) -> Iterator[tuple[Segment, ...]]:
        """Yield the examples."""
        if not self.apart and (spans := self.template.marks(self.talk)) is not None:
            yield from _example(self._marked(spans))
            return
        places = [place for place, learnt in enumerate(self.talk.learnt) if learnt]
        seen = ""
        segments: list[Segment] = []
        at = 0
        while at < len(places):
            prompt = self._prompt(places[at])
            if not prompt.startswith(seen):
                if not self.apart:
                    raise self._changed(places[at])
                yield from _example(segments)
                seen, segments = "", []
            segments.append((prompt[len(seen) :], False))
            end, prompt = self._furthest(places, at, prompt)
            for place in places[at:end]:
                if near := self._near(places, place):
                    segments += [*self._counted(near.turn), (near.between, False)]
            segments += self._counted(turn := self._turn(places[end], self.talk.messages[: places[end]], prompt))
            seen = prompt + turn.text
            at = end + 1
        yield from _example(segments)

    def _counted(self, turn: _Turn) -> list[Segment]:
        self.census.unthinking += turn.unthinking
        return turn.segments

    def _prompt(self, place: int) -> str:
        """Return what a model is asked for a turn."""
        return self.template.written(self.talk, self.talk.messages[:place], prompt=True)

    def _furthest(self, places: Sequence[int], at: int, prompt: str) -> tuple[int, str]:
        """Return the last of the turns that stand behind one another from one on, and its prompt.

        Turn by turn the template would be asked for all that stands before, which of hundreds of turns takes minutes.
        So each is written behind the opening of the conversation, and what they come to is compared with what the
        template writes of them all: where that is the same, they stand so.
        """
        found = at, prompt
        low, high = at + 1, len(places) - 1
        end = high
        while self.local and low <= high:
            whole = self._joined(places, at, end, prompt)
            if whole is not None and self._prompt(places[end]) == whole:
                found, low = (end, whole), end + 1
            elif end == at + 1:
                self.local = self.apart  # else what is not so at once never will be
                break
            else:
                high = end - 1
            end = (low + high + 1) // 2 if found[0] > at else low
        return found

    def _joined(self, places: Sequence[int], first: int, end: int, prompt: str) -> str | None:
        """Return the prompt of a turn as those before it would make it; None where one of them cannot be written."""
        parts = [prompt]
        for place in places[first:end]:
            near = self._near(places, place)
            if near is None:
                return None
            parts += [near.turn.text, near.between]
        return "".join(parts)

    def _near(self, places: Sequence[int], place: int) -> _Near | None:
        if place not in self.near:
            self.near[place] = self._write_near(places, place)
        return self.near[place]

    def _write_near(self, places: Sequence[int], place: int) -> _Near | None:
        opening, messages = self.talk.messages[: places[0]], self.talk.messages
        after = next(other for other in places if other > place)
        try:
            prompt = self._prompt(places[0])
            turn = self._turn(place, opening, prompt)
            text = self.template.written(self.talk, [*opening, *messages[place:after]], prompt=True)
        except MalformedFile:
            return None
        begun = prompt + turn.text
        return _Near(turn, text[len(begun) :]) if text.startswith(begun) else None

    def _changed(self, place: int) -> MalformedFile:
        return MalformedFile(
            "the chat template does not write the messages one after another",
            file=self.talk.where,
            expected=f"message {place + 1} to follow what stands before it",
            found="that it changes what stands before it",
            remedy="learn each turn as it is asked for with `data: reasoning: split`, or the last alone with "
            "`data: turns: last`",
        )

    def _turn(self, place: int, before: Sequence[dict[str, Any]], prompt: str) -> _Turn:
        """Return a turn as it is written behind messages, and behind the prompt that they make."""
        message = self.talk.messages[place]
        text = self.template.written(self.talk, [*before, message])
        if not text.startswith(prompt):
            if not self.apart:
                raise self._changed(place)
            # A template that blanks what was thought before may do so with this turn. The turn itself stays.
            before = [bare(one) for one in before]
            prompt = self.template.written(self.talk, before, prompt=True)
            text = self.template.written(self.talk, [*before, message])
            if not text.startswith(prompt):
                raise MalformedFile(
                    "the chat template does not write a turn behind its own prompt for it", file=self.talk.place(place)
                )
        turn = text[len(prompt) :]
        spans = self._spans([*before, message], len(prompt))
        if self.apart and reasoned(message):
            asked = self.template.written(self.talk, [*before, thinking.asking(place, message)])
            if thinking.thought(place) not in asked:
                turn, spans = self._filled(place, turn, spans, prompt)
        return _Turn(_cut(turn, spans)) if spans is not None else self._own(turn, message, prompt)

    def _spans(self, messages: Sequence[dict[str, Any]], start: int) -> list[Span] | None:
        """Return the template's own marks from a place on, as spans of what stands there."""
        found = self.template.marks(self.talk, messages)
        return found and [(max(begin - start, 0), end - start) for begin, end in found if end > start]

    def _filled(self, place: int, turn: str, spans: list[Span] | None, prompt: str) -> tuple[str, list[Span] | None]:
        """Return a turn with its reasoning in the think block that the template left empty, and marks with it."""
        reasoning, at = thinking.place_of(self.talk, place, turn, prompt)
        size = len(reasoning)
        moved = spans and [(s + size * (s > at), e + size * (e >= at)) for s, e in spans]
        return turn[:at] + reasoning + turn[at:], moved

    def _own(self, turn: str, message: dict[str, Any], prompt: str) -> _Turn:
        """Return what of a turn is the assistant's, and what the template added."""
        before = thinking.empty_block(turn, message, prompt)
        end = len(turn)
        shorter = turn.rstrip()
        if shorter.endswith(self.template.ends):
            end = len(shorter)
        return _Turn([(turn[:before], False), (turn[before:end], True), (turn[end:], False)], unthinking=before > 0)

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
