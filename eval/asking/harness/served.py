"""Models behind an OpenAI-style server as lm-eval asks them, with the answers counted that the server cut.

lm-eval's classes say what a request and an answer look like; the requests are sent by our own client, which keeps
many under way over all of a run, asks again where a server may recover, and hands on each answer when it comes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from k2quant.errors import HarnessFault
from k2quant.eval.asking.endpoint.server import Server
from k2quant.eval.asking.harness.faults import check_room
from k2quant.eval.asking.thinking import ended, opening

_REASONING = ("reasoning_content", "reasoning")  # beside `content`: as DeepSeek's API and vLLM name it, older and newer


class _Told:
    """What both kinds of server share: requests under way together, and answers that the server says it cut."""

    server: Server
    marker: str

    def stream_until(self, requests: list[Any], each: Callable[[int, str, bool], None]) -> None:
        """Write answers, and hand on each as it comes, in whatever order that is.

        Args:
            requests: of lm-eval's kind.
            each: called in this thread with the place of a request, its answer, and whether the server says that it
                cut the answer at the limit on new tokens.

        Raises:
            HarnessFault: the server refuses a request, answers with no text, or does not answer.
        """

        def came(place: int, answer: dict[str, Any]) -> None:
            with self.server.blamed():
                text, cut = self._read(self.server.only_choice(answer))
            shorter = ended(text, requests[place].args[1].get("until"))  # some servers leave stop strings in
            each(place, shorter, cut and shorter == text)

        self.server.client.answers((self._asked(*request.args) for request in requests), came)

    def _asked(self, context: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return what is posted to have a text continued, or a message answered."""
        lm: Any = self
        settings = copy.deepcopy(dict(settings))  # lm-eval takes out what it has read
        body: dict[str, Any] = lm._create_payload(  # noqa: SLF001  the form of requests
            lm.create_message([context]),
            generate=True,
            gen_kwargs=settings,
            seed=lm._seed,  # noqa: SLF001
        )
        body["stop"] = [word for word in body["stop"] if word]
        return body if body["stop"] else {name: value for name, value in body.items() if name != "stop"}

    def _read(self, choice: dict[str, Any]) -> tuple[str, bool]:
        """Return the text of a choice, reasoning before it, and whether the server cut it."""
        cut = choice.get("finish_reason") == "length"
        if not self.server.chat:
            return self._whole(choice["text"]), cut
        message = choice["message"]
        content = self._whole(message.get("content"))
        thought = next((message[name] for name in _REASONING if message.get(name)), None)
        if thought is None or not self.marker:
            return content, cut
        # What opens it says that it is reasoning, where the marker never comes.
        thought = (opening(self.marker) or "") + self._whole(thought)
        return (thought + self.marker + content if content else thought), cut  # without a marker: it never ended

    def _whole(self, text: Any) -> str:
        text = "" if text is None else text  # all tokens went into reasoning; lm-eval writes the same
        if not isinstance(text, str):
            raise HarnessFault("an answer that is no text", file=self.server.url, found=type(text).__name__)
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # half a character fits in no file


class _Completions(_Told, LocalCompletionsAPI):  # type: ignore[misc]  # lm-eval has no types
    def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        check_room(requests, self.max_length)
        texts = [context + continuation for _, context, continuation in requests]
        scores: dict[int, tuple[float, bool]] = {}

        def came(place: int, answer: dict[str, Any]) -> None:
            with self.server.blamed():
                choice = self.server.only_choice(answer)
                self.server.check_echo(len(texts[place]), choice["logprobs"]["token_logprobs"])
                answer = {"choices": [{"index": 0, **choice}]}
                (scores[place],) = self.parse_logprobs(answer, ctxlens=[len(requests[place][1])])

        bodies = (self._create_payload(self.create_message([text]), seed=self._seed) for text in texts)
        self.server.client.answers(bodies, came)
        return [scores[place] for place in range(len(requests))]

    def loglikelihood(self, requests: list[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        """Score continuations by tokens: the server then adds no BOS token of its own, which would shift them."""
        self.tokenized_requests = True
        try:
            scores: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True, **kwargs)
        finally:
            self.tokenized_requests = False
        return scores

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """Score whole texts, all of their windows under way together; the windows are lm-eval's own."""
        self.tokenized_requests = True
        try:
            windows = [self._windows(text) for (text,) in (request.args for request in requests)]
            flat = [(None, *window) for parts in windows for window in parts]
            scores = iter(self._loglikelihood_tokens(flat))
        finally:
            self.tokenized_requests = False
        return [sum(next(scores)[0] for _ in parts) for parts in windows]

    def _windows(self, text: str) -> list[tuple[list[int], list[int]]]:
        tokens, first = self.tok_encode(text), self.prefix_token_id
        rolling = get_rolling_token_windows(tokens, first, max_seq_len=self.max_length - 1, context_len=1)
        return [make_disjoint_window(window) for window in rolling]


class _Chat(_Told, LocalChatCompletion):  # type: ignore[misc]  # lm-eval has no types
    pass


def served_model(server: Server, tokenizer: Any | None, *, max_length: int, marker: str) -> Any:
    """Return lm-eval's model behind an OpenAI-style server.

    Texts to continue are sent as text, so that the server's own tokenizer gives them their BOS token; texts to score
    are sent as tokens of `tokenizer`, because places of log-probabilities must be known.

    Args:
        server: where it is and what it is called there.
        tokenizer: of the model; needed for scoring only.
        max_length: the most tokens of a text that is scored.
        marker: what is put between reasoning that a server gives apart and the answer; "" to leave reasoning out.
    """
    kind = _Chat if server.chat else _Completions
    lm = kind(
        model=server.model,
        base_url=server.url,
        tokenizer_backend=None,
        tokenized_requests=False,
        batch_size=1,
        max_length=max_length,
        eos_string="",
    )
    lm.server, lm.marker = server, marker
    if tokenizer is not None:
        lm.tokenizer, lm.tokenizer_backend, lm.add_bos_token = tokenizer, "huggingface", True
    return lm
