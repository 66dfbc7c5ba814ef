"""Models behind an OpenAI-style server as lm-eval asks them, with the answers counted that the server cut."""

from __future__ import annotations

from typing import Any

from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

from k2quant.errors import HarnessFault
from k2quant.eval.asking.harness.faults import check_room
from k2quant.eval.asking.server import Server


class _Told:
    """What both kinds of server share: tell which answers the server says it cut, and strip stop strings."""

    server: Server

    def generate_until(self, requests: list[Any]) -> list[str]:
        with self.server.blamed():
            texts = super().generate_until(requests)  # type: ignore[misc]
        return [_ended(text, request.args[1].get("until")) for text, request in zip(texts, requests, strict=True)]

    def parse_generations(self, outputs: Any, **kwargs: Any) -> list[Any]:
        texts = super().parse_generations(outputs, **kwargs)  # type: ignore[misc]
        outputs = outputs if isinstance(outputs, list) else [outputs]
        reasons = [choice.get("finish_reason") for output in outputs for choice in output["choices"]]
        return [self._told(text, reason) for text, reason in zip(texts, reasons, strict=True)]

    def _told(self, text: Any, reason: object) -> str:
        text = "" if text is None else text  # all tokens went into reasoning; lm-eval writes the same
        if not isinstance(text, str):
            raise HarnessFault("an answer that is no text", file=self.server.url, found=type(text).__name__)
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # half a character fits in no file
        return _Cut(text) if reason == "length" else text

    def were_cut(self, requests: list[Any], answers: list[str]) -> list[bool]:  # noqa: ARG002  others look at the requests
        return [isinstance(answer, _Cut) for answer in answers]


class _Cut(str):
    """A text that the server says it cut at the limit."""

    __slots__ = ()


def _ended(text: str, until: Any) -> str:
    """Cut a text before its first stop string, which some servers leave in; keep it known as cut where it has none."""
    found = text
    for stop in [until] if isinstance(until, str) else until or []:
        found = found.split(stop)[0] if stop else found
    return text if found == text else found


class _Completions(_Told, LocalCompletionsAPI):  # type: ignore[misc]  # lm-eval has no types
    def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        check_room(requests, self.max_length)
        scores: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, **kwargs)
        return scores

    def parse_logprobs(self, outputs: Any, tokens: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        outputs = outputs if isinstance(outputs, list) else [outputs]
        choices = [choice for output in outputs for choice in output["choices"]]
        for asked, choice in zip(tokens, choices, strict=True):
            self.server.check_echo(len(asked), choice["logprobs"]["token_logprobs"])
        scores: list[tuple[float, bool]] = super().parse_logprobs(outputs, tokens, **kwargs)
        return scores

    def loglikelihood(self, requests: list[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        """Score continuations by tokens: the server then adds no BOS token of its own, which would shift them."""
        self.tokenized_requests = True
        try:
            with self.server.blamed():
                scores: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True, **kwargs)
        finally:
            self.tokenized_requests = False
        return scores

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        self.tokenized_requests = True
        try:
            with self.server.blamed():
                scores: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=True)
        finally:
            self.tokenized_requests = False
        return scores


class _Chat(_Told, LocalChatCompletion):  # type: ignore[misc]  # lm-eval has no types
    pass


def served_model(server: Server, tokenizer: Any | None, *, at_once: int, max_length: int) -> Any:
    """Return lm-eval's model behind an OpenAI-style server.

    Texts to continue are sent as text, so that the server's own tokenizer gives them their BOS token; texts to score
    are sent as tokens of `tokenizer`, because places of log-probabilities must be known.

    Args:
        server: where it is and what it is called there.
        tokenizer: of the model; needed for scoring only.
        at_once: requests under way at the same time.
        max_length: the most tokens of a text that is scored.
    """
    kind = _Chat if server.chat else _Completions
    lm = kind(
        model=server.model,
        base_url=server.url,
        tokenizer_backend=None,
        tokenized_requests=False,
        num_concurrent=at_once,
        batch_size=1,
        max_length=max_length,
        eos_string="",
        timeout=server.timeout,
    )
    lm.server = server
    if tokenizer is not None:
        lm.tokenizer, lm.tokenizer_backend, lm.add_bos_token = tokenizer, "huggingface", True
    return lm
