"""A tokenizer with a token for each character, and what reads data with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from k2quant.calib.inputs import Samples, read_samples
from k2quant.model.generation import open_tokenizer
from k2quant.nano import vocabulary

TEMPLATES = Path(__file__).parents[2] / "k2quant" / "data" / "templates"


@pytest.fixture(scope="session")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Nano's tokenizer: [BOS], the characters, [EOS]; its chat template drops reasoning as K2-Thinking's does."""
    folder = tmp_path_factory.mktemp("letters")
    for name, content in vocabulary.files().items():
        (folder / name).write_bytes(content)
    tokenizer = open_tokenizer(folder)
    tokenizer.chat_template = (TEMPLATES / "thinking.jinja").read_text()
    return tokenizer


Read = Callable[..., Samples]


@pytest.fixture
def read(letters: Any) -> Read:
    """Return what reads data with that tokenizer, into rows of 32 tokens of which there is no lack."""

    def samples(data: Any, **options: Any) -> Samples:
        known: dict[str, Any] = {"samples": 1000, "length": 32, "vocabulary": len(letters)}
        return read_samples(data, letters, **known | options)

    return samples
