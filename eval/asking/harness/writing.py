"""How a model of transformers writes an answer: where it stops, and how it draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria
from transformers.generation import logits_process

from k2quant.errors import HarnessFault
from k2quant.eval.asking.thinking import Thinking

_MARGIN = 2  # tokens more than a string can have, as lm-eval looks back: a character may be spread over some

NARROWING = {
    "temperature": logits_process.TemperatureLogitsWarper,
    "top_k": logits_process.TopKLogitsWarper,
    "top_p": logits_process.TopPLogitsWarper,
    "min_p": logits_process.MinPLogitsWarper,
    "typical_p": logits_process.TypicalLogitsWarper,
}
"""What narrows a draw, in the order in which transformers applies it."""

_OFF: dict[str, set[Any]] = {
    "temperature": {1.0},
    "top_k": {0, -1, None},
    "top_p": {1.0},
    "min_p": {0.0, None},
    "typical_p": {1.0},
}
"""Values that change nothing, some of which transformers refuses."""


class Numbers(LogitsProcessor):
    """Refuses logits from which any token would be as good as another."""

    def __call__(self, input_ids: Any, scores: Any) -> Any:  # noqa: ARG002  transformers' signature
        """Return the logits as they are.

        Raises:
            HarnessFault: one is NaN.
        """
        if scores.isnan().any():
            raise HarnessFault(
                "the model's logits are no numbers", found="NaN", remedy="is a weight NaN, or `dtype=` too narrow?"
            )
        return scores


class Draws(LogitsProcessor):
    """Makes the largest logit a draw: each row has noise from a generator of its own.

    The logarithm of a probability minus the logarithm of an exponential variable is largest for a token with just that
    probability (Gumbel). So a draw depends on its request's seed alone, not on what stands beside it in a batch, and
    two models with nearly the same logits write nearly the same text.
    """

    def __init__(self, narrowing: Mapping[str, Any], seeds: Sequence[int]) -> None:
        """Set up a draw.

        Args:
            narrowing: what there is of `NARROWING`, in transformers' words.
            seeds: of each row.
        """
        self._warpers = [
            NARROWING[name](narrowing[name] if name == "top_k" else float(narrowing[name]))
            for name in NARROWING
            if name in narrowing and narrowing[name] not in _OFF[name]
        ]
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Return logits `[B, V]` with noise, float64.

        Args:
            input_ids: int64 `[B, T]`.
            scores: of the model, float32 `[B, V]`.
        """
        scores = scores.float()
        for warper in self._warpers:
            scores = warper(input_ids, scores)
        # float64: a float32 variable is 0 once in 2^24, which is once in a hundred tokens of K2's vocabulary.
        noise = torch.empty(scores.shape, dtype=torch.float64)
        for row, generator in zip(noise, self._generators, strict=True):
            row.exponential_(generator=generator)
        return scores.double() - noise.clamp_min_(torch.finfo(torch.float64).tiny).log_().to(scores.device)


class BehindReasoning(StoppingCriteria):
    """Ends each row at a stop string, but not before its reasoning has ended."""

    def __init__(
        self, tokenizer: Any, stops: Sequence[str], thinking: Thinking, prompts: Sequence[str], begin: int
    ) -> None:
        """Watch rows.

        Args:
            tokenizer: of the model.
            stops: none of them empty.
            thinking: how to tell reasoning from answer.
            prompts: of each row.
            begin: where answers begin in each row.
        """
        self._begin = begin
        self._rows = [_Row(tokenizer, stops, thinking, prompt) for prompt in prompts]

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:  # noqa: ARG002  transformers' signature
        """Return which rows are done, bool `[B]`.

        Args:
            input_ids: int64 `[B, T]`, prompts included.
            scores: what transformers gives besides.
        """
        written: Tensor = input_ids[:, self._begin :]
        done = [row.done or row.see(ids) for row, ids in zip(self._rows, written.tolist(), strict=True)]
        return torch.tensor(done, dtype=torch.bool, device=input_ids.device)


class _Row:
    """One answer as it grows: in its reasoning, or behind it."""

    def __init__(self, tokenizer: Any, stops: Sequence[str], thinking: Thinking, prompt: str) -> None:
        self._tokenizer, self._stops, self._thinking = tokenizer, stops, thinking
        self._inside = thinking.begins(prompt)
        self._undecided = not self._inside and thinking.start is not None
        self._from = 0  # the first token that may hold a part of the answer
        self._plain = 0  # from this token on there is answer only, behind its leading white space
        self._ended = ""  # what must be taken off before the answer
        self._said = False
        self.done = False

    def see(self, ids: list[int]) -> bool:
        if self._undecided:
            self._decide(ids)
        if self._inside and not self._leaves(ids):
            return False
        if not self._undecided:
            self.done = any(stop in self._answer(ids) for stop in self._stops)
        return self.done

    def _decide(self, ids: list[int]) -> None:
        """See whether the answer opens its reasoning itself, as soon as enough of it is there."""
        text, start = self._text(ids).lstrip(), self._thinking.start or ""
        self._inside = text.startswith(start)
        self._undecided = not self._inside and start.startswith(text)

    def _leaves(self, ids: list[int]) -> bool:
        end = self._thinking.end
        place = max(0, len(ids) - _most_tokens(end))
        if end not in self._text(ids[place:]):
            return False
        self._inside, self._from, self._plain, self._ended = False, place, len(ids), end
        return True

    def _answer(self, ids: list[int]) -> str:
        """Return the end of the answer, long enough for every stop string."""
        window = len(ids) - max(map(_most_tokens, self._stops), default=0)
        if window >= self._plain and (self._said or not self._ended):
            return self._text(ids[window:])
        text = self._text(ids[self._from :])
        if not self._ended:
            return text
        answer = text.partition(self._ended)[2].lstrip()  # white space before it stops nothing
        if not self._said:
            self._said, self._plain = bool(answer), len(ids)
        return answer

    def _text(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids))


def _most_tokens(text: str) -> int:
    """Return how many tokens a string may take: one a byte."""
    return len(text.encode()) + _MARGIN
