"""Where a model's reasoning ends and its answer begins.

K2-Thinking and later releases write `<think>reasoning</think>answer`. What opens the reasoning may stand in the prompt
(K2.5's chat template ends in `<think>`), in the answer (K2-Thinking's model writes it) or nowhere: vLLM's reader for
these models takes an answer without it for reasoning all the same. So it is what ends it that counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from k2quant.checkpoint.files.paths import inside, read_limited
from k2quant.checkpoint.files.strict_json import parse_object
from k2quant.errors import CheckpointError, UsageError
from k2quant.eval.asking.request import Request
from k2quant.ground.release import THINK_CLOSES

END = THINK_CLOSES
"""What ends the reasoning of K2-Thinking and later, and what stands for it where a server tells reasoning apart."""

_LIMIT = 2**24  # bytes of a chat template, and of a tokenizer's config


class Answer(NamedTuple):
    """What a model wrote, in two."""

    reasoning: str | None
    """What stands before the marker, or all of it where there is none; None where it did not reason."""
    text: str | None
    """What follows; None where nothing does: the answer never left its reasoning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Thinking:
    """How to tell reasoning from answer."""

    end: str
    """The marker: what stands between the two. The first one counts."""
    always: bool
    """Whether every answer begins in its reasoning, unless its prompt has closed it already. If not, only one does
    whose prompt ends, or which itself begins, with what opens reasoning."""
    spares: bool = False
    """Whether what ended by itself, without a marker, was an answer all the same: a server's chat template is out of
    sight and may have closed the reasoning."""
    answered: frozenset[str] = frozenset()
    """Names of tasks that begin the answer themselves, behind all reasoning."""

    @property
    def start(self) -> str | None:
        """What opens reasoning."""
        return opening(self.end)

    def prompt(self, request: Any) -> str:
        """Return what a request of lm-eval lets see of its prompt.

        That is nothing where messages are sent, for what a server makes of them is out of sight; and no more than a
        marker where the task begins the answer itself.
        """
        if request.task_name in self.answered:
            return self.end
        context = request.args[0]
        return context if isinstance(context, str) else ""

    def closed(self, prompt: str) -> bool:
        """Tell whether a prompt ends with a marker, as where a chat template writes an empty block of reasoning."""
        return prompt.rstrip().endswith(self.end.rstrip())

    def begins(self, prompt: str) -> bool:
        """Tell whether an answer to this prompt begins in its reasoning, whatever it looks like."""
        if self.closed(prompt):
            return False
        return self.always or (self.start is not None and prompt.rstrip().endswith(self.start))

    def opens(self, text: str) -> bool:
        """Tell whether an answer opens its reasoning itself."""
        return self.start is not None and text.lstrip().startswith(self.start)

    def may_begin(self, prompt: str) -> bool:
        """Tell whether stop strings would fire in reasoning: whoever stops at them must wait for the marker."""
        return self.begins(prompt) or (self.spares and not prompt)

    def split(self, prompt: str, text: str, *, cut: bool | None) -> Answer:
        """Take reasoning and answer apart.

        Args:
            prompt: what was answered; empty where it is out of sight.
            text: all that the model wrote.
            cut: whether it ended at the limit on new tokens; None: not known.
        """
        reasons = self.begins(prompt) or self.opens(text)
        before, marker, after = text.partition(self.end)
        if marker and (reasons or not self.closed(prompt)):
            # An empty answer is none: lm-eval's IFEval would find that it keeps some instructions.
            return Answer(self._plain(before), after.lstrip() or None)
        if not reasons or (self.spares and cut is not True and not self.opens(text)):
            return Answer(None, text)
        return Answer(self._plain(text), None)

    def _plain(self, reasoning: str) -> str:
        return reasoning.lstrip().removeprefix(self.start or "").strip()


def opening(end: str) -> str | None:
    """Return what opens reasoning: `<think>` for `</think>`; None for a marker that is no pair's end."""
    return end[0] + end[2:] if len(end) > 3 and end[1] == "/" else None


def ended(text: str, until: Any) -> str:
    """Return an answer up to its first stop string.

    Args:
        text: of the answer alone.
        until: one string, several, or None, as lm-eval has them; empty ones stop nothing.
    """
    for stop in [until] if isinstance(until, str) else until or []:
        text = text.split(stop, maxsplit=1)[0] if stop else text
    return text


def decide(request: Request, folder: Path | None, answered: Iterable[str] = ()) -> Thinking | None:
    """Return how reasoning is told from answers in a run, or None where nobody looks for any.

    Args:
        request: what is asked of whom; its `think_end` decides, where it is given.
        folder: of the checkpoint or tokenizer, whose chat template decides else; None where there is none.
        answered: tasks that begin the answer themselves (`gen_prefix`). Chat templates close the reasoning before it;
            a server is sent it as a message and begins an answer of its own.

    Raises:
        UsageError: `think_end` is nothing but white space.
        CheckpointError: a file of the folder cannot be read, or is a link that leaves it; or prompts are to go through
            a chat template that it does not have.
    """
    if request.chat_template and folder is not None and not request.trust_remote_code:  # code may bring one
        _check_template(folder, follow_links=request.follow_links)
    if request.think_end and request.think_end.isspace():
        raise UsageError(f"think_end: expected such as {END}, found white space")
    served = request.backend == "api" and request.chat
    begun = frozenset(answered if request.chat_template else ())
    if request.think_end is not None:
        return Thinking(end=request.think_end, always=True, answered=begun) if request.think_end else None
    known = folder is not None and thinks(folder, follow_links=request.follow_links)
    if served:
        return Thinking(end=END, always=known, spares=True)
    return Thinking(end=END, always=request.chat_template, answered=begun) if known else None


def thinks(folder: Path, *, follow_links: bool = False) -> bool:
    """Tell whether a checkpoint is one of a model that reasons: whether its chat template writes where that ends.

    K2-Thinking's does (`<think></think>` before each answer of the past), K2-Instruct's does not. The folder's name
    plays no part.

    Args:
        folder: of a checkpoint or a tokenizer.
        follow_links: whether its links may lead out of it.

    Raises:
        CheckpointError: a file cannot be read, or is a link that leaves the folder.
    """
    return any(END in template for template in _templates(folder, follow_links=follow_links))


def _check_template(folder: Path, *, follow_links: bool) -> None:
    if not (any(_templates(folder, follow_links=follow_links)) or (folder / "additional_chat_templates").exists()):
        raise CheckpointError(
            "has no chat template",
            file=folder,
            expected="chat_template.jinja, or chat_template in tokenizer_config.json",
            remedy="take it from the model's release; a base model has none, and is asked without `chat_template=`",
        )


def _templates(folder: Path, *, follow_links: bool) -> Iterator[str]:
    """Yield the chat templates of a folder, wherever transformers and the releases keep them."""
    here = partial(inside, folder, follow_links=follow_links)
    if (folder / "chat_template.jinja").exists():
        yield read_limited(here("chat_template.jinja"), _LIMIT).decode("utf-8", "replace")
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (folder / name).exists():
            path = here(name)
            yield from _strings(parse_object(read_limited(path, _LIMIT), file=path).get("chat_template"))


def _strings(found: Any) -> Iterable[str]:
    """Return the templates of a config: one, or a list of objects that name each."""
    parts = found if isinstance(found, list) else [{"template": found}]
    templates = [part.get("template") for part in parts if isinstance(part, dict)]
    return [template for template in templates if isinstance(template, str)]
