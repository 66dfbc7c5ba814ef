"""Reasoning kept from lm-eval: stop strings, filters and metrics see the answer behind it, people can read both."""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from k2quant.eval.asking.thinking import Answer, Thinking, ended


class Thoughts:
    """Takes what a model wrote apart, and remembers which answers never left their reasoning."""

    def __init__(self, thinking: Thinking) -> None:
        """Remember nothing yet.

        Args:
            thinking: how to tell reasoning from answer.
        """
        self.thinking = thinking
        self._found: dict[tuple[str, int], list[Answer]] = defaultdict(list)
        self.cut: Counter[str] = Counter()
        """By task, how many rows have no answer outside of reasoning."""
        self.rows: Counter[str] = Counter()
        """By task, how many rows there are."""

    def look(self, texts: Iterable[str]) -> None:
        """See all answers of a run: where a server's model is not known, one marker shows that it reasons."""
        thinking = self.thinking
        if thinking.spares and not thinking.always and any(thinking.end in text for text in texts):
            self.thinking = replace(thinking, always=True)

    def read(self, request: Any, text: str, cut: bool | None) -> tuple[str, bool | None]:  # noqa: FBT001  a `Reader`
        """Return the answer without its reasoning, up to its first stop string, and whether that was cut.

        Args:
            request: of lm-eval.
            text: all that the model wrote.
            cut: whether it ended at the limit on new tokens; None: not known.
        """
        answer = self.thinking.split(self.thinking.prompt(request), text, cut=cut)
        said = ended(answer.text or "", request.args[1].get("until"))
        self._found[request.task_name, request.doc_id].append(answer)
        return said, False if cut and said != answer.text and answer.text is not None else cut

    def begin(self) -> None:
        """Forget the answers of the repeat before; counts stay."""
        self._found.clear()

    def lost(self, task: str, doc_id: int) -> bool:
        """Tell whether a document has answers, and none of them outside of reasoning."""
        found = self._found.get((task, doc_id))
        return bool(found) and all(answer.text is None for answer in found or ())

    def note(self, task: str, row: dict[str, Any]) -> None:
        """Write into a sample what became of the reasoning; a task that is not written has none."""
        if found := self._found.get((task, row["doc_id"])):
            row["cut_in_thought"] = self.lost(task, row["doc_id"])
            row["reasoning"] = "\n\n".join(answer.reasoning for answer in found if answer.reasoning is not None)

    def count(self, task: str, rows: list[dict[str, Any]]) -> None:
        """Count rows of one filter."""
        noted = [row["cut_in_thought"] for row in rows if "cut_in_thought" in row]
        if noted:
            self.cut[task] += sum(noted)
            self.rows[task] += len(noted)


class Unstopped:
    """A model that is not told the stop strings which it would find in its reasoning."""

    def __init__(self, model: Any, thinking: Thinking) -> None:
        """Stand before a model.

        Args:
            model: an `LM` of lm-eval that stops wherever a stop string stands.
            thinking: how to tell reasoning from answer.
        """
        self._model, self._thinking = model, thinking
        if hasattr(model, "stream_until"):
            self.stream_until = self._stream

    def __getattr__(self, name: str) -> Any:
        """Whatever else is asked of a model."""
        return getattr(self._model, name)

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Return all that the model writes."""
        texts: list[str] = self._model.generate_until([self._open(request) for request in requests])
        return texts

    def were_cut(self, requests: list[Any], answers: list[str]) -> list[bool | None]:
        """Return which answers ended at the limit: no stop string did, whatever stands in the reasoning."""
        cut: list[bool | None] = self._model.were_cut([self._open(request) for request in requests], answers)
        return cut

    def _stream(self, requests: list[Any], each: Callable[[int, str, bool | None], None]) -> None:
        self._model.stream_until([self._open(request) for request in requests], each)

    def _open(self, request: Any) -> Any:
        if not self._thinking.may_begin(self._thinking.prompt(request)):
            return request
        context, settings, *rest = request.args
        opened = copy.copy(request)
        opened.arguments = (context, {**settings, "until": []}, *rest)
        return opened
