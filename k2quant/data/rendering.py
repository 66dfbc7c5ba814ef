"""A tokenizer's chat template: what it writes of a conversation, and what it makes of calls and reasoning."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from k2quant.data.calls import has_calls, mapped, with_arguments, with_ids, with_names
from k2quant.data.turns import REASONING, Conversation
from k2quant.errors import CheckpointError, K2QuantError, MalformedFile
from k2quant.ground.saying.faults import said

Messages = Sequence[dict[str, Any]]
Span = tuple[int, int]

_MARKER = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_TEXT_OR_NOT = re.compile(r"arguments\b[^%}]{0,40}?\bis\s+(?:not\s+)?string")
_PROBE = "_k2quant"
"""What is put behind names and ids to see whether a template writes them."""


@dataclass(frozen=True)
class Template:
    """The chat template of a tokenizer of transformers."""

    tokenizer: Any

    def check(self, where: str) -> None:
        """Refuse a tokenizer that has none.

        Raises:
            CheckpointError: so it is.
        """
        if not getattr(self.tokenizer, "chat_template", None):
            remedy = "give prompt and completion, or a model whose tokenizer has one"
            raise CheckpointError("messages, but the tokenizer has no chat template", file=where, remedy=remedy)

    def source(self, tools: object) -> str:
        """Return the template's own text; a tokenizer may have one for tools and one for none.

        Raises:
            CheckpointError: there are several, and none is the default.
        """
        try:
            return str(self.tokenizer.get_chat_template(tools=tools))
        except ValueError as error:
            raise CheckpointError("no chat template of the tokenizer's fits", found=said(error)) from error

    def written(self, talk: Conversation, messages: Messages | None = None, *, prompt: bool = False) -> str:
        """Return what it writes of a conversation, or of other messages in its place.

        Args:
            talk: the conversation.
            messages: instead of its own.
            prompt: whether the header of the assistant's next turn follows.

        Raises:
            MalformedFile: it cannot; the message says what it said.
        """
        own = list(talk.messages if messages is None else messages)
        try:
            return str(
                self.tokenizer.apply_chat_template(own, tools=talk.tools, tokenize=False, add_generation_prompt=prompt)
            )
        except K2QuantError:
            raise
        except Exception as error:  # whatever a template raises
            raise MalformedFile("the chat template cannot render it", file=talk.where, found=said(error)) from error

    def marks(self, talk: Conversation, messages: Messages | None = None) -> list[Span] | None:
        """Return what lies between the template's own `{% generation %}` marks, as spans of what it writes.

        None where it has no marks, or where the tokenizer's own code writes something else than the template.

        Raises:
            MalformedFile: the template cannot render it.
            CheckpointError: there are several, and none is the default.
        """
        source = self.source(talk.tools)
        if not _MARKER.search(source):
            return None
        from transformers.utils.chat_template_utils import render_jinja_template

        own = list(talk.messages if messages is None else messages)
        text = self.written(talk, own)
        tools: Any = talk.tools
        try:
            found: Any = render_jinja_template(
                [own],
                tools=tools,
                chat_template=source,
                return_assistant_tokens_mask=True,
                **getattr(self.tokenizer, "special_tokens_map", {}),
            )
        except Exception as error:
            raise MalformedFile("the chat template cannot render it", file=talk.where, found=said(error)) from error
        [whole], [spans] = found
        return [(start, end) for start, end in spans] if whole == text else None

    def fitted(self, talk: Conversation) -> tuple[Conversation, bool]:
        """Return a conversation with its calls as the template wants them, and whether their ids were rewritten.

        Arguments go to it as objects, as transformers asks of data, unless the template asks whether they are text:
        then text stays as it is spelled. Where objects cannot be rendered, text is tried. Ids are rewritten where the
        template writes them and not the names; see `with_ids`.

        Raises:
            MalformedFile: the template does not write the tools or the calls, or cannot render the conversation.
            CheckpointError: there are several, and none is the default.
        """
        if not talk.tools and not has_calls(talk.messages):
            return talk, False
        talk = self._arguments(talk) if has_calls(talk.messages) else talk
        text = self.written(talk)
        if talk.tools and self.written(replace(talk, tools=None)) == text:
            raise MalformedFile(
                "the chat template does not write tools", file=talk.where, remedy="leave `tools` out of the row"
            )
        if not has_calls(talk.messages) or self._tells(talk, with_names(talk.messages, _PROBE), text):
            return talk, False
        other = mapped(talk.messages, lambda call: {**call, "id": f"{call.get('id', '')}{_PROBE}"})
        if not self._tells(talk, other, text):
            raise MalformedFile("the chat template does not write tool calls", file=talk.where)
        messages = with_ids(talk.messages, talk.where)
        return replace(talk, messages=messages), messages != talk.messages

    def _arguments(self, talk: Conversation) -> Conversation:
        objects = replace(talk, messages=with_arguments(talk.messages, text=False))
        texts = replace(talk, messages=with_arguments(talk.messages, text=True))
        if _TEXT_OR_NOT.search(self.source(talk.tools)):
            return talk
        try:
            self.written(objects)
        except MalformedFile:
            self.written(texts)
            return texts
        return objects

    def _tells(self, talk: Conversation, messages: Messages, text: str) -> bool:
        """Tell whether other messages are written in another way than as a text; a refusal counts as one."""
        try:
            return self.written(talk, messages) != text
        except MalformedFile:
            return True

    @cached_property
    def ends(self) -> tuple[str, ...]:
        """The tokens that may end a turn: those that are no text."""
        return tuple(self.tokenizer.get_added_vocab())

    def names_reasoning(self, tools: object) -> bool:
        """Tell whether the template knows reasoning by a name of its own."""
        return REASONING[0] in self.source(tools)
