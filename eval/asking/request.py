"""What is to be asked of which model, and whether that makes sense."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from k2quant.errors import UsageError
from k2quant.eval.asking.endpoint.headers import check_headers
from k2quant.eval.asking.engines import check_arguments
from k2quant.ground.units import one_of

Backend = Literal["k2quant", "hf", "vllm", "api"]
BACKENDS: tuple[Backend, ...] = ("k2quant", "hf", "vllm", "api")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is to be asked of which model, and how."""

    model: str
    """Folder of a checkpoint; for `hf` and `vllm` also a name on the hub; for `api` what the server calls it."""
    tasks: tuple[str, ...]
    """Tasks, groups or tags of lm-eval, or presets of ours."""
    backend: Backend = "k2quant"
    """`k2quant`: packed weights on our kernels; `hf`: what transformers loads; `vllm`; or `api`: a server."""
    limit: int | None = None
    """How many documents of each task; None for all."""
    shots: int | None = None
    """Examples before each question; None for each task's own number."""
    batch_size: int = 8
    """Texts that the model is given at once; for `api`, requests under way at the same time, unless `model_args` have
    a `concurrency`."""
    max_new_tokens: int | None = None
    """The most tokens of an answer; None for each task's own number, or 1,024."""
    max_length: int | None = None
    """The most tokens of prompt and answer; None for what the model's config allows."""
    think_end: str | None = None
    """What ends a model's reasoning, such as `</think>`; empty for a model that does not reason, None for what the
    checkpoint's chat template says."""
    temperature: float | None = None
    """At which answers are drawn, 0 for greedy ones; None for what each task says, mostly greedy."""
    top_p: float | None = None
    """The share of likeliest tokens that are drawn from; None for all."""
    seed: int = 0
    """From which every draw follows."""
    repeats: int = 1
    """How often each question is asked; one that is scored, never written, is asked once."""
    device: str = "cpu"
    """As torch calls it; `auto` to spread the model."""
    dtype: str = "bfloat16"
    """Of activations and of what is not quantised."""
    include: tuple[Path, ...] = ()
    """Folders with task YAML of your own, or of somebody you trust: such a file can run any code."""
    data: Mapping[str, Path] = field(default_factory=dict)
    """By task or group, local files instead of the hub's."""
    base_url: str | None = None
    """Of a server, such as `http://localhost:8000/v1`."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Of each request to a server: by the header, the variable of the environment that holds its value, which is
    written down nowhere. A key in OPENAI_API_KEY needs none."""
    model_args: Mapping[str, Any] = field(default_factory=dict)
    """What the engine takes besides: vLLM's own arguments; a few of transformers'; `concurrency`, `timeout` in seconds
    and `retries` for a server."""
    chat: bool = False
    """Whether a server is asked by chat messages."""
    tokenizer: Path | None = None
    """Of a served model, for tasks that score text; None for that of `served_from`."""
    served_from: Path | None = None
    """The checkpoint that a server serves, so that the run has a model hash."""
    chat_template: bool = False
    """Whether prompts go through the tokenizer's chat template."""
    follow_links: bool = False
    """Whether links of the model's folder, and of the tokenizer's, may lead out of it."""
    reread: bool = False
    """Whether to hash every byte of the model, also of files that stand unchanged since they were hashed."""
    trust_remote_code: bool = False
    """Whether the checkpoint's own code may run: its tokenizer's, and for `hf` and `vllm` its model's."""
    unsafe_code: bool = False
    """Whether tasks may run the code that the model writes."""


_COUNTS = {"limit": "document", "batch_size": "text", "max_new_tokens": "token", "max_length": "token"}
"""What is counted, with its unit."""


def check(request: Request) -> None:
    """Refuse options that make no sense, or do not go together; nothing is read.

    Raises:
        UsageError: so it is.
    """
    one_of("backend", request.backend, BACKENDS)
    check_counts(request, _COUNTS)
    if not request.tasks:
        raise UsageError("no tasks were named")
    check_headers(request.headers)
    check_arguments(request.backend, request.model_args, max_length=request.max_length)
    served = {name: getattr(request, name) for name in ("base_url", "tokenizer", "served_from", "headers")}
    if request.backend == "api":
        if not request.base_url:
            raise UsageError("the api backend needs the server's URL, such as `base_url=http://localhost:8000/v1`")
        _check_url(request.base_url)
        if request.chat_template:
            raise UsageError("a server applies its own chat template; ask for it with `chat=True`")
    elif request.chat or any(served.values()):
        raise UsageError(
            "a server's options (`base_url=`, `chat=`, `tokenizer=`, `served_from=`, `headers=`) go with `backend=api`"
        )


def check_counts(request: object, counts: Mapping[str, str]) -> None:
    """Refuse what is no number of things, or none of them; what is None was not said.

    Args:
        request: whose fields are looked at.
        counts: their names, each with the unit.

    Raises:
        UsageError: so it is.
    """
    for name, unit in counts.items():
        value = getattr(request, name)
        if value is not None and (type(value) is not int or value < 1):
            raise UsageError(f"{name}: expected at least 1 {unit}, found {value!r}")


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise UsageError(f"base_url: expected such as http://localhost:8000/v1, found {url!r}")
    if parts.query or parts.fragment:
        raise UsageError("base_url: expected such as http://localhost:8000/v1, without ? and #; a key goes in a header")
    if parts.username or parts.password:
        raise UsageError("base_url: a name or password in it would stand in the results; give a key in OPENAI_API_KEY")
