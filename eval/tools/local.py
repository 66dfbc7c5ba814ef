"""A checkpoint that answers requests with tools: its own chat template, our kernels, K2's own words for calls."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from k2quant.errors import CheckpointError, UsageError
from k2quant.eval.tools.calling import THINKING, UNPARSED, Answer, of_text
from k2quant.eval.tools.requests import Asked
from k2quant.ground.saying.faults import said
from k2quant.ground.saying.progress import Progress

_TAKEN = {"messages", "tools", "tool_choice", "parallel_tool_calls"}
"""Keys of a request that a model without a server can follow; the last two as long as they ask for nothing special."""


def check_requests(requests: Iterable[Asked]) -> None:
    """Refuse what only a server can do.

    Raises:
        UsageError: a request asks for it.
    """
    for request in requests:
        strange = sorted(request.body.keys() - _TAKEN)
        if request.body.get("tool_choice", "auto") != "auto":
            strange = ["tool_choice"]
        if request.body.get("parallel_tool_calls", True) is not True:
            strange = ["parallel_tool_calls"]
        if strange:
            raise UsageError(
                f"{request.place}: asks for {', '.join(strange)[:200]}, which takes a server (`backend=api`)"
            )


class Checkpoint:
    """A loaded checkpoint."""

    def __init__(
        self,
        folder: Path,
        *,
        device: str,
        dtype: str,
        trust_remote_code: bool,
        follow_links: bool,
        progress: Progress | None,
    ) -> None:
        """Load it.

        Args:
            folder: of the checkpoint.
            device: as torch calls it.
            dtype: of activations.
            trust_remote_code: whether its tokenizer's own code may run.
            follow_links: whether its links may lead out of it.
            progress: called with the bytes that are loaded and all bytes.

        Raises:
            CheckpointError: it cannot be loaded, or does not know tools.
        """
        from k2quant.model import load_model
        from k2quant.model.generation import load_tokenizer, silence

        silence()
        self._tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code, follow_links=follow_links)
        _check_template(self._tokenizer, folder)
        self._folder = folder
        self._model: Any = load_model(folder, device=device, dtype=dtype, follow_links=follow_links, progress=progress)

    def answer(self, request: Asked, sampling: Mapping[str, Any], seed: int) -> Answer:
        """Return what it answers.

        Args:
            request: what it is asked.
            sampling: temperature, top_p and max_tokens.
            seed: of what is drawn.

        Raises:
            CheckpointError: its template does not take the request.
        """
        import torch

        prompt = self._prompt(request)
        ids = torch.tensor([self._tokenizer(prompt, add_special_tokens=False)["input_ids"]], dtype=torch.int64)
        room = self._model.config.max_position_embeddings - ids.shape[1]
        if room < 1:
            return Answer(fault=f"its prompt has {ids.shape[1]:,} tokens, and the model has no room for more")
        limit = min(room, sampling["max_tokens"])
        torch.manual_seed(seed)
        device = self._model.device if self._model.device.type != "meta" else self._model.assembly.device
        output = self._model.generate(
            input_ids=ids.to(device),
            attention_mask=torch.ones_like(ids, device=device),
            generation_config=self._drawing(sampling, limit),
        )
        new = output[0, ids.shape[1] :].tolist()
        ends = self._ends()
        ended = bool(new) and new[-1] in ends
        text = self._tokenizer.decode(new[:-1] if ended else new, skip_special_tokens=False)
        opened = THINKING.start if THINKING.begins(prompt) else None  # some templates begin the reasoning themselves
        return of_text((opened or "") + text, cut=len(new) >= limit and not ended)

    def _prompt(self, request: Asked) -> str:
        try:
            prompt: str = self._tokenizer.apply_chat_template(
                list(request.body["messages"]),
                tools=request.body.get("tools"),
                add_generation_prompt=True,
                tokenize=False,
            )
        except Exception as error:  # whatever a template raises
            found = f"{request.place}: {said(error)}"
            raise CheckpointError(
                "its chat template does not take a request", file=self._folder, found=found
            ) from error
        return prompt

    def _drawing(self, sampling: Mapping[str, Any], limit: int) -> Any:
        from transformers import GenerationConfig

        own = self._model.generation_config
        ends = sorted(self._ends())
        pad = own.pad_token_id if own.pad_token_id is not None else (ends or [0])[0]
        drawn: dict[str, Any] = {"do_sample": False}
        if sampling["temperature"]:
            drawn = {"do_sample": True, "temperature": float(sampling["temperature"]), "top_k": 0}
            drawn |= {"top_p": float(sampling["top_p"])} if "top_p" in sampling else {}
        return GenerationConfig(
            max_new_tokens=limit, eos_token_id=ends or None, pad_token_id=pad, use_cache=True, **drawn
        )

    def _ends(self) -> set[int]:
        end = self._model.generation_config.eos_token_id
        return set(end if isinstance(end, list) else [] if end is None else [end])


def _check_template(tokenizer: Any, folder: Path) -> None:
    """Refuse a checkpoint whose template passes tools over, or which has other words for calls than K2."""
    template = tokenizer.chat_template
    remedy = "serve it with an engine that reads its calls, and ask that (`backend=api`)"
    if not template:
        expected = "chat_template.jinja, or chat_template in tokenizer_config.json"
        remedy = "take it from the model's release; a base model has none, and calls no tools"
        raise CheckpointError("has no chat template", file=folder, expected=expected, remedy=remedy)
    if "tools" not in str(template):
        raise CheckpointError("its chat template takes no tools", file=folder, remedy=remedy)
    if UNPARSED not in tokenizer.get_vocab():
        raise CheckpointError(f"its tokenizer has no {UNPARSED}, K2's word for a call", file=folder, remedy=remedy)
