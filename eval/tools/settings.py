"""What is to be asked of which model for its tool calls, and whether that makes sense."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from k2quant.errors import UsageError
from k2quant.eval.asking.request import Request, check_counts
from k2quant.eval.asking.request import check as check_model
from k2quant.eval.asking.sampling import MOST_REPEATS, check_draws
from k2quant.ground.units import one_of

Backend = Literal["k2quant", "api", "answers"]
BACKENDS: tuple[Backend, ...] = ("k2quant", "api", "answers")
SEED = 0
"""Of what is drawn, where neither a request nor the user says."""
NEW_TOKENS = 4096
"""The most tokens of an answer where neither its request nor the user says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolsRequest:
    """What is to be asked of which model, and how."""

    model: str
    """Folder of a checkpoint; for `api` what the server calls it; for `answers` where answers lie."""
    requests: str | None = None
    """A file in JSON Lines, or `k2-tools`, which ships; None for the latter, or for those of the answers."""
    reference: Path | None = None
    """A run, or results of K2-Vendor-Verifier, whose calls are right; None for what the requests expect, or itself."""
    backend: Backend = "k2quant"
    """`k2quant`: packed weights on our kernels; `api`: a server; `answers`: nobody, the answers are there."""
    repeats: int = 1
    """Answers to each request."""
    limit: int | None = None
    """How many requests; None for all."""
    temperature: float | None = None
    """None for what each request says, or 0: the likeliest token."""
    top_p: float | None = None
    """None for what each request says, or no limit."""
    seed: int | None = None
    """From which the draws of every request follow; None for the seed that each request names, or 0."""
    max_new_tokens: int | None = None
    """The most tokens of an answer; None for what each request says, or 4,096."""
    base_url: str | None = None
    """Of a server, such as `http://localhost:8000/v1`."""
    batch_size: int = 8
    """Requests under way at the same time, of a server."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """By the name of a header for a server, the variable of the environment that has its value."""
    model_args: Mapping[str, Any] = field(default_factory=dict)
    """What a server takes besides: concurrency, timeout, retries."""
    served_from: Path | None = None
    """The checkpoint that a server serves, or that gave the answers, so that the run has a model hash."""
    device: str = "cpu"
    """As torch calls it."""
    dtype: str = "bfloat16"
    """Of activations and of what is not quantised."""
    follow_links: bool = False
    """Whether links of the model's folder may lead out of it."""
    trust_remote_code: bool = False
    """Whether its tokenizer's own code may run."""


_COUNTS = {"repeats": "answer", "limit": "request", "max_new_tokens": "token", "batch_size": "request"}
"""What is counted, with its unit."""


def check(request: ToolsRequest) -> None:
    """Refuse options that make no sense, or do not go together; nothing is read.

    Raises:
        UsageError: so it is.
    """
    one_of("backend", request.backend, BACKENDS)
    check_counts(request, _COUNTS)
    if request.repeats > MOST_REPEATS:
        raise UsageError(
            f"repeats: expected at most {MOST_REPEATS:,} answers to each request, found {request.repeats!r}"
        )
    check_draws(request.temperature, request.top_p, request.seed)
    if request.backend == "answers":
        asked = ("temperature", "top_p", "seed", "max_new_tokens", "base_url", "headers", "model_args")
        if given := [name for name in asked if getattr(request, name) not in (None, {})]:
            raise UsageError(f"answers that are there are not asked for: leave `{given[0]}=` out")
        if request.repeats > 1:
            raise UsageError("answers that are there are as many as they are: leave `repeats=` out")
        return
    check_model(as_model(request))


def as_model(request: ToolsRequest) -> Request:
    """Return who is asked, as `run` names it."""
    served = request.backend == "api"
    return Request(
        model=request.model,
        tasks=("tools",),
        backend="api" if served else "k2quant",
        batch_size=request.batch_size,
        max_new_tokens=request.max_new_tokens,
        device=request.device,
        dtype=request.dtype,
        base_url=request.base_url,
        chat=served,
        headers=request.headers,
        model_args=request.model_args,
        served_from=request.served_from,
        follow_links=request.follow_links,
        trust_remote_code=request.trust_remote_code,
    )
