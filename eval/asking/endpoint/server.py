"""A model behind an OpenAI-style server: where it is, and whether it can do what a task needs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from k2quant.errors import EvaluationError, HarnessFault, K2QuantError
from k2quant.eval.asking.endpoint.client import Client
from k2quant.eval.asking.endpoint.headers import hidden, read_headers
from k2quant.eval.asking.request import Request
from k2quant.ground.saying.faults import shortened

_PROBE_SECONDS = 600  # a server may load its model with the first request
_PROBE_RETRIES = 2  # of a wrong address people want to hear at once


def client_of(request: Request, remark: Callable[[str], None] | None = None) -> Client:
    """Return what talks to the server of a request.

    Args:
        request: with a `base_url`, to which the path of what is asked is added where it lacks it.
        remark: called with why the server keeps everybody waiting.

    Raises:
        UsageError: a variable of the environment that holds a header is not set, or holds what no header can.
    """
    base, end = (request.base_url or "").rstrip("/"), "/chat/completions" if request.chat else "/completions"
    given = {"concurrency": request.batch_size, **request.model_args}
    url = base if base.endswith(end) else base + end
    return Client(url=url, headers=read_headers(request.headers), remark=remark, **given)


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """Where a model is served."""

    client: Client
    """What talks to it; its URL is that of completions, such as `http://localhost:8000/v1/completions`."""
    model: str
    """What the server calls the model."""
    chat: bool
    """Whether it is asked by messages, which its own chat template makes a prompt of."""

    @property
    def url(self) -> str:
        """Where requests are posted."""
        return self.client.url

    @contextlib.contextmanager
    def blamed(self) -> Iterator[None]:
        """Name the server in whatever lm-eval stumbles over while it talks to it.

        Raises:
            HarnessFault: the server does not answer, or not as such a server should.
        """
        try:
            yield
        except K2QuantError:
            raise
        except Exception as error:
            words = hidden(
                f"{type(error).__name__}: {error}", self.client.headers
            )  # before it is cut: half a key is one
            found = shortened(words)
            raise HarnessFault("the server gave no usable answer", file=self.url, found=found) from error

    def check_writes(self) -> None:
        """Have the server write one token, so that what is wrong with it shows before a long run.

        Raises:
            HarnessFault: it cannot.
        """
        prompt: dict[str, Any] = {"messages": [{"role": "user", "content": "1"}]} if self.chat else {"prompt": "1"}
        choice = self._post({**prompt, "max_tokens": 1})
        with self.blamed():
            text = choice["message"].get("content", "") if self.chat else choice["text"]
            if text is not None and not isinstance(text, str):
                raise HarnessFault("an answer that is no text", file=self.url, found=type(text).__name__)

    def check_scores(self, tokens: Sequence[int], tasks: Sequence[str]) -> None:
        """Have the server score a text that it is given; without that, multiple choice would be scored as chance.

        Args:
            tokens: of any text, at least two.
            tasks: that need it, for the message.

        Raises:
            HarnessFault: it does not give back the log-probabilities of a prompt.
        """
        request = {"prompt": list(tokens), "max_tokens": 1, "echo": True, "logprobs": 1}
        try:
            given = self._post(request)["logprobs"]["token_logprobs"]
            self.check_echo(len(tokens), given)
            scores = given[1:-1]
            complete = all(type(score) in {float, int} for score in scores)
            shown = hidden(f"log-probabilities {scores}", self.client.headers)[:200]
            found = None if complete and any(scores) else shown
        except EvaluationError as error:
            found = f"{error.message}: {error.found}"
        except (LookupError, TypeError):
            found = "none in its answer"
        if found is not None:
            raise HarnessFault(
                f"the server does not echo log-probabilities (for {', '.join(tasks)})",
                file=self.url,
                found=found,
                remedy="leave these tasks out, or use a server that echoes them, such as vLLM",
            )

    def check_echo(self, asked: int, scores: Sequence[Any]) -> None:
        """Refuse log-probabilities that are not one for each token asked and one for the token that was written.

        lm-eval drops the last and adds up those behind the context, however many there are.

        Raises:
            HarnessFault: there are more or fewer.
        """
        if len(scores) != asked + 1:
            raise HarnessFault(
                "the server scored another text than it was given",
                file=self.url,
                expected=f"{asked + 1} log-probabilities",
                found=len(scores),
            )

    def _post(self, request: dict[str, Any]) -> dict[str, Any]:
        seconds = min(_PROBE_SECONDS, self.client.timeout)
        client = replace(self.client, timeout=seconds, retries=min(_PROBE_RETRIES, self.client.retries))
        return self.only_choice(client.post({"model": self.model, "temperature": 0, "seed": 1234, **request}))

    def only_choice(self, answer: dict[str, Any]) -> dict[str, Any]:
        """Return the one choice of an answer.

        Raises:
            HarnessFault: there is none, or more than was asked for.
        """
        choices = answer.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            found = hidden(str(answer), self.client.headers)[:200]
            raise HarnessFault("no answer of an OpenAI-style server", file=self.url, found=found)
        if len(choices) > 1:
            raise HarnessFault("more answers than requests", file=self.url, expected="1 choice", found=len(choices))
        choice: dict[str, Any] = choices[0]
        return choice
