"""Answers of a checkpoint: greedy decoding with the KV cache, and each word as it comes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from transformers import GenerationConfig, TextStreamer
from transformers.utils import logging

from k2quant.errors import CheckpointError, UsageError
from k2quant.ground.release import THINK_CLOSES, THINK_OPENS
from k2quant.ground.saying.showing import as_html, brief
from k2quant.ground.units import check_prompt, counted
from k2quant.model.causal_lm import K2ForCausalLM
from k2quant.model.generation.chats import ChatPrompt, parts
from k2quant.model.generation.tokenizers import blamed


class Generation(NamedTuple):
    """What came of a prompt."""

    text: str
    """Without the prompt and special tokens; of a chat with its reasoning and the markers around it."""
    prompt_tokens: int
    new_tokens: int
    prompt_seconds: float
    """Until the first new token."""
    seconds: float
    """For all new tokens after the first."""
    finished: bool
    """Whether the model ended; if not, the limit on new tokens did."""
    reasoning: str | None = None
    """Of a chat: what the model thought before it answered; None where it did not."""
    answer: str | None = None
    """Of a chat: the text without reasoning, empty where that was cut; None of a plain text."""

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)

    def _repr_html_(self) -> str:
        """Return it as a small table, for notebooks."""
        return as_html(self)

    @property
    def rate(self) -> float:
        """New tokens a second, the first left out; 0 where there is only one."""
        return (self.new_tokens - 1) / self.seconds if self.new_tokens > 1 and self.seconds else 0.0


def generate(
    model: K2ForCausalLM,
    tokenizer: Any,
    prompt: str | ChatPrompt,
    *,
    max_new_tokens: int = 64,
    show: Callable[[str], None] | None = None,
) -> Generation:
    """Continue a prompt, or answer a chat, greedily.

    Args:
        model: from `load_model`.
        tokenizer: from `load_tokenizer`.
        prompt: the text to continue, as it is; or a chat's, from `chat_prompt`, which also says where an answer ends.
        max_new_tokens: where to stop, unless the model ends before.
        show: called with each piece of text as soon as it is certain.

    Raises:
        UsageError: the prompt is empty, or the number makes no sense.
        CheckpointError: the tokenizer belongs to another model, or cannot read or write these characters.
    """
    if type(max_new_tokens) is not int or max_new_tokens < 1:
        raise UsageError(f"max_new_tokens: expected at least 1 token, found {max_new_tokens!r}")
    chat = prompt if isinstance(prompt, ChatPrompt) else None
    ids = _tokens(model, tokenizer, prompt)
    room = model.config.max_position_embeddings
    if ids.shape[1] + max_new_tokens > room:
        raise UsageError(
            f"the prompt has {counted(ids.shape[1], 'token')}, and {max_new_tokens:,} are to come; the model has room "
            f"for {counted(room, 'token')}"
        )
    folder = model.checkpoint.folder
    hidden = _hidden(tokenizer) if chat else None
    streamer = _Streamer(tokenizer, show, folder, hidden)
    settings = _greedy(model, max_new_tokens, chat.ends if chat else ())
    begun = time.perf_counter()
    device = model.device if model.device.type != "meta" else model.assembly.device  # where its first weights lie
    with _short_of_memory():
        output = cast("Any", model).generate(
            input_ids=ids.to(device),
            attention_mask=torch.ones_like(ids, device=device),
            generation_config=settings,
            streamer=streamer,
        )
    ended = time.perf_counter()
    new = output[0, ids.shape[1] :]
    first = streamer.first or ended
    with blamed(folder, "its tokenizer cannot write the answer"):
        text = _text(tokenizer, new.tolist(), hidden)
    found = Generation(text, ids.shape[1], len(new), first - begun, ended - first, _ended(new, settings))
    return found if chat is None else found._replace(**parts(text, thinks=chat.thinks)._asdict())


def _ended(new: torch.Tensor, settings: GenerationConfig) -> bool:
    """Tell whether the last of the new tokens is one that ends an answer."""
    ends = settings.eos_token_id
    return int(new[-1]) in (ends if isinstance(ends, list) else [ends])


def _hidden(tokenizer: Any) -> frozenset[int]:
    """Return the special tokens that no answer of a chat shows: all but those around reasoning."""
    shown = set(tokenizer.convert_tokens_to_ids([THINK_OPENS, THINK_CLOSES]))
    return frozenset(tokenizer.all_special_ids) - shown


def _text(tokenizer: Any, ids: list[int], hidden: frozenset[int] | None) -> str:
    """Return the text of tokens without special ones, those of `hidden` if it is given."""
    if hidden is None:
        return str(tokenizer.decode(ids, skip_special_tokens=True))
    return str(tokenizer.decode([one for one in ids if one not in hidden], skip_special_tokens=False))


@contextlib.contextmanager
def _short_of_memory() -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch has no error of its own for a CPU
        if "alloc" not in str(error) and "memory" not in str(error):
            raise
        raise UsageError("not enough memory for a text of this length") from error


def _tokens(model: K2ForCausalLM, tokenizer: Any, prompt: str | ChatPrompt) -> torch.Tensor:
    """Return a prompt's tokens, int64 `[1, T]`; a template writes all its special tokens itself."""
    folder = model.checkpoint.folder
    options: dict[str, Any] = {"return_tensors": "pt", "return_offsets_mapping": bool(tokenizer.is_fast)}
    if isinstance(prompt, ChatPrompt):
        prompt, options["add_special_tokens"] = prompt.text, False
    check_prompt(prompt)
    with blamed(folder, "its tokenizer cannot read the prompt"):
        encoded = tokenizer(prompt, **options)
        ids: torch.Tensor = encoded["input_ids"].to(torch.int64)
    _check_read(prompt, encoded.get("offset_mapping"), folder)
    if not ids.numel():
        raise UsageError("the prompt has no tokens")
    if int(ids.max()) >= model.config.vocab_size:
        raise CheckpointError(
            "its tokenizer belongs to another model",
            file=folder,
            expected=f"tokens below {model.config.vocab_size}",
            found=int(ids.max()),
        )
    return ids


def _check_read(prompt: str, offsets: torch.Tensor | None, folder: Path) -> None:
    """Refuse a prompt of which a tokenizer passes characters over in silence; blanks are its own business."""
    if offsets is None:
        return
    read = {place for first, last in offsets[0].tolist() for place in range(first, last)}
    blank = {place for place, character in enumerate(prompt) if character.isspace()}
    if len(read | blank) < len(prompt):
        known = f"{len(read)} of {len(prompt)} characters"
        raise CheckpointError("its tokenizer cannot read the prompt", file=folder, found=known)


def _greedy(model: K2ForCausalLM, max_new_tokens: int, more: tuple[int, ...]) -> GenerationConfig:
    """Return greedy decoding that ends where the checkpoint says that it ends, and at more tokens of this model."""
    own = model.generation_config
    end = own.eos_token_id
    if more := tuple(one for one in more if one < model.config.vocab_size):
        ends = end if isinstance(end, list) else [] if end is None else [end]
        end = list(dict.fromkeys([*ends, *more]))
    pad = own.pad_token_id if own.pad_token_id is not None else (end[0] if isinstance(end, list) else end)
    return GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=end, pad_token_id=pad, use_cache=True
    )


class _Streamer(TextStreamer):
    """Hands text over as soon as it is certain, and notes when the first token came."""

    def __init__(
        self, tokenizer: Any, show: Callable[[str], None] | None, folder: Path, hidden: frozenset[int] | None
    ) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=hidden is None)
        self._show, self._folder, self._hidden = show, folder, hidden
        self._calls = 0
        self.first: float | None = None

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, then one token after another."""
        self._calls += 1
        if self._calls == 2:
            self.first = time.perf_counter()
        if self._calls > 1 and self._hidden and int(value.flatten()[0]) in self._hidden:  # one token at a time
            return
        with blamed(self._folder, "its tokenizer cannot write the answer"):
            super().put(value)  # type: ignore[no-untyped-call]

    def end(self) -> None:
        """Hand over what is left."""
        with blamed(self._folder, "its tokenizer cannot write the answer"):
            super().end()  # type: ignore[no-untyped-call]

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:  # noqa: FBT001, FBT002  their signature
        """Hand a piece over."""
        if self._show and (text or stream_end):
            self._show(text)


def silence() -> None:
    """Keep transformers' remarks off the screen: what matters is said by errors of ours."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
