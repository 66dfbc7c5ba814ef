"""A fast tokenizer with K2's special tokens, and templates of the same behaviour as those that K2's releases have."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from k2quant.checkpoint.writing.in_memory import write_checkpoint
from k2quant.data.examples import examples_of
from k2quant.data.learning import Census, Learning
from k2quant.nano import architecture, writing
from tiny import NANO

SPECIAL = (
    *("[BOS]", "[EOS]", "[PAD]", "<|im_end|>", "<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>"),
    *("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>", "<|tool_call_end|>"),
    *("<|tool_call_argument_begin|>", "<think>", "</think>"),
)
TEXT = (
    "the answer is 42, see functions.weather:0 and {'city': 'Beijing'}",
    "你好世界 北京 👍🏽 naïve",
    "line\n\nline\n",
)

Taught = Callable[..., list[str]]


@cache
def _core() -> str:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=list(SPECIAL)
    )
    core.train_from_iterator(TEXT * 4, trainer)
    return core.to_str()


@pytest.fixture(scope="session")
def kimi() -> Callable[[str], Any]:
    """Return a maker of tokenizers with a template of this folder, or with one that is given as text."""

    def make(template: str) -> Any:
        path = Path(__file__).parent / "templates" / f"{template}.jinja"
        made = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(_core()),
            **dict(zip(("bos_token", "eos_token", "pad_token"), SPECIAL, strict=False)),
        )
        made.chat_template = template if "{" in template else path.read_text()
        return made

    return make


@pytest.fixture(scope="session")
def taught(kimi: Callable[[str], Any]) -> Taught:
    """Return what shows the examples of a row: what is learnt stands in «», from the first of it on."""

    def show(template: str, row: dict[str, Any], *, census: Census | None = None, **learning: Any) -> list[str]:
        found = examples_of(row, "a.jsonl, line 1", kimi(template), Learning(**learning), census)
        marked = ("".join(f"«{text}»" if learnt else text for text, learnt in one.segments) for one in found)
        header = "<|im_system|>system<|im_middle|>You are Kimi, an AI assistant created by Moonshot AI.<|im_end|>"
        return [one.replace(header, "", 1) for one in marked]

    return show


@pytest.fixture(scope="module")
def thinker(kimi: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model whose template is like K2-Thinking's. Not to be changed by a test."""
    folder = tmp_path_factory.mktemp("thinker")
    config = NANO | {"num_hidden_layers": 2, "vocab_size": 400, "max_position_embeddings": 1024}
    torch.manual_seed(0)
    write_checkpoint(folder / "model", writing._shards(architecture.build(config)), config)  # noqa: SLF001
    kimi("thinking").save_pretrained(folder / "model")
    return folder
