"""What an engine takes beside our own options: `model_args`, checked by name before anything is read.

What an option of ours says already is refused here, so that nothing is said twice.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

from k2quant.errors import UsageError

SERVER: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "concurrency": ("a number of requests, 1 to 4096", lambda value: type(value) is int and 1 <= value <= 4096),
    "timeout": (
        "seconds above 0",
        lambda value: type(value) in {int, float} and math.isfinite(value) and 0 < value <= 10**7,
    ),
    "retries": ("a number of tries, 0 to 1000", lambda value: type(value) is int and 0 <= value <= 1000),
}
"""What our client takes for `api`, and what each may be. No answer depends on them."""

TRANSFORMERS = ("attn_implementation", "experts_implementation", "max_memory", "offload_folder")
"""What `from_pretrained` takes that changes how a model computes, or where it lies, and not which model it is."""

_NAMED = {
    "pretrained": "the argument MODEL",
    "model": "the argument MODEL",
    "dtype": "`dtype=`",
    "torch_dtype": "`dtype=`",
    "device": "`device=`; which GPUs vLLM takes is said by CUDA_VISIBLE_DEVICES",
    "device_map": "`device=`, such as `device=auto`",
    "trust_remote_code": "`trust_remote_code=True`",
    "batch_size": "`batch_size=`",
    "max_batch_size": "max_num_seqs",
    "max_gen_toks": "`max_new_tokens=`",
    "max_length": "`max_length=`",
    "base_url": "`base_url=`",
    "num_concurrent": "concurrency",
    "max_retries": "retries",
    "seed": "`seed=`, from which every draw follows",
    "think_end_token": "`think_end=`",
    "enable_thinking": 'chat_template_args, such as {"enable_thinking": true}',
    "tokenizer": "`tokenizer=` for a server; other engines take that of MODEL",
    "tokenizer_revision": "a folder of that revision as MODEL",
    "revision": "a folder of that revision as MODEL",
    "lora_local_path": "a merged checkpoint as MODEL: `k2quant merge` makes one, and its bytes are hashed",
    "header": "`headers=`",
    "auth_token": "`headers=`, or OPENAI_API_KEY",
    "api_key": "`headers=`, or OPENAI_API_KEY",
    "hf_token": "HF_TOKEN in the environment: what stands here is written into the run",
}
"""What is said otherwise, by the names that lm-eval, transformers and vLLM have for it."""


def check_arguments(backend: str, given: Mapping[str, Any], *, max_length: int | None) -> None:
    """Refuse arguments that an engine does not take, or that an option of ours says already.

    Args:
        backend: the engine.
        given: its arguments, as JSON has values.
        max_length: what the option says of it.

    Raises:
        UsageError: there is such an argument.
    """
    if given and backend == "k2quant":
        raise UsageError("`model_args=` go with hf, vllm and api; our own engine takes none")
    for name, value in given.items():
        if name in _NAMED:
            raise UsageError(f"`model_args=`: {name} is said by {_NAMED[name]}")
        _check_value(name, value)
        if backend == "api":
            _check_name(name, SERVER)
            expected, fits = SERVER[name]
            if not fits(value):
                raise UsageError(f"`model_args=`: {name} is {expected}, found {value!r:.100}")
        elif backend == "hf":
            _check_name(name, TRANSFORMERS)
    if "max_model_len" in given:
        _check_room(given["max_model_len"], max_length)


def _check_value(name: str, value: Any) -> None:
    try:
        if not name.isidentifier():
            raise ValueError  # noqa: TRY301  said in one place
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        expected = "a name, and a value as JSON has them"
        raise UsageError(f"`model_args=`: expected {expected}, found {name[:100]!r}") from error


def _check_name(name: str, known: Mapping[str, Any] | tuple[str, ...]) -> None:
    if name not in known:
        close = get_close_matches(name[:100], list(known), 1)
        advice = f"did you mean {close[0]}?" if close else f"expected {', '.join(known)}"
        raise UsageError(f"`model_args=`: unknown {name[:100]}; {advice}")


def _check_room(found: Any, max_length: int | None) -> None:
    if type(found) is not int or found < 2:
        raise UsageError(f"`model_args=`: max_model_len is a number of tokens, at least 2, found {found!r:.100}")
    if max_length is not None:
        raise UsageError("`model_args=`: max_model_len is what `max_length=` says; give one of them")


def longest(given: Mapping[str, Any], max_length: int | None) -> int | None:
    """Return the most tokens of prompt and answer that were asked for, by whatever name; None where none was."""
    found: int | None = given.get("max_model_len", max_length)
    return found


def answers_depend_on(backend: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of an engine's arguments belongs to a run's identity: a resumed run may change the rest.

    Args:
        backend: the engine.
        given: its arguments. vLLM's length is no part of what is returned: it is that of the model.
    """
    if backend == "api":
        return {}
    return {name: given[name] for name in sorted(given) if name != "max_model_len"}
