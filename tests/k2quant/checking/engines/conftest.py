"""Checkpoints of the suite that engines take, as headers alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from k2quant.conversion.convert import convert
from kimi_files import TEMPLATE, code
from rewritten import Hollow, hollow

RANKS = b"IQ== 0\nIg== 1\n"
"""A tiktoken.model of two tokens: the names of files are all that a check looks at."""


@pytest.fixture(scope="session")
def made(
    k2_source: Path, k2_bf16: Path, k2_thinking: Path, k25: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Hollow]:
    """The suite's checkpoints by format, with tokenizer, code and chat template as K2 has them."""
    out = tmp_path_factory.mktemp("formats")
    folders = {"fp8": k2_source, "bf16": k2_bf16, "int4": k2_thinking, "k25": k25}
    asked: dict[str, dict[str, Any]] = {
        "nvfp4": {"to": "nvfp4", "activation_scales": "one"},
        "mxfp4": {"to": "mxfp4"},
        "blocks": {"to": "fp8", "layout": "compressed-tensors"},
        "groups": {"to": "nvfp4", "layout": "compressed-tensors", "activation_scales": "one"},
    }
    for name, options in asked.items():
        folders[name] = convert(k2_bf16, out / name, **options).folder
    read = {name: _furnished(hollow(folder)) for name, folder in folders.items()}
    return lambda name: deepcopy(read[name])


def _furnished(found: Hollow) -> Hollow:
    found.config["auto_map"] = {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}
    settings = {"auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]}, "chat_template": TEMPLATE}
    found.files = {
        "configuration_deepseek.py": b"",
        "tiktoken.model": RANKS,
        "tokenization_kimi.py": code().encode(),
        "tokenizer_config.json": json.dumps(settings).encode(),
    }
    return found
