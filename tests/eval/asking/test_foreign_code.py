"""Models that transformers loads by code of the checkpoint, where that code does not run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from k2quant.errors import CheckpointError
from k2quant.eval.asking import models
from k2quant.eval.asking.request import Request
from k2quant.nano import architecture, writing

CODE = """
{first}
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

class Config(DeepseekV3Config):
    model_type = "kimi_k2"

class Model(DeepseekV3ForCausalLM):
    config_class = Config

    def forward(self, *inputs, **options):
        {body}
        return super().forward(*inputs, **options)
"""


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A nano-K2 with random weights. Not to be changed by a test."""
    folder = tmp_path_factory.mktemp("model") / "nano"
    torch.manual_seed(3)
    with writing.claimed(folder):
        writing.write(folder, architecture.build(), {})
    return folder


def _with_code(nano: Path, folder: Path, *, first: str = "", body: str = "pass", **changed: object) -> Path:
    shutil.copytree(nano, folder)
    (folder / "modeling_kimi.py").write_text(CODE.format(first=first, body=body))
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "modeling_kimi.Config", "AutoModelForCausalLM": "modeling_kimi.Model"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "kimi_k2", "auto_map": classes} | changed))
    return folder


def _load(folder: Path) -> object:
    request = Request(model=str(folder), tasks=("x",), backend="hf", trust_remote_code=True)
    model = models.Model(folder=folder, model_hash=None, tokenizer_hash=None, max_length=64)
    return models._transformers(model, request)[0]  # noqa: SLF001  without hashing and asking


@pytest.mark.parametrize(
    ("where", "code", "kind"),
    [
        ("first", "from transformers.utils import is_torch_fx_available_no_more", "ImportError"),
        ("body", "self.config.no_such_setting_of_old", "AttributeError"),
        ("body", "int(no_such_word=1)", "TypeError"),
    ],
)
def test_code_that_does_not_run_points_to_our_own_backend(
    where: str, code: str, kind: str, nano: Path, tmp_path: Path
) -> None:
    """Imports of what is gone, and what fails at the first token only: kind and word of the error, and what to do."""
    folder = _with_code(nano, tmp_path / "model", **{where: code})
    with pytest.raises(CheckpointError, match=rf"found {kind}: .*no_.*`backend=k2quant`"):
        _load(folder)


def test_an_architecture_of_others_gets_no_such_advice(nano: Path, tmp_path: Path) -> None:
    """What k2quant could not run either is not sent there."""
    folder = _with_code(nano, tmp_path / "model", body="self.no_such_thing", hidden_act="gelu")
    with pytest.raises(CheckpointError) as caught:
        _load(folder)
    assert caught.value.remedy is None
    assert "no_such_thing" in str(caught.value)


def test_code_that_runs_is_taken(nano: Path, tmp_path: Path) -> None:
    """A checkpoint whose code works is loaded as before."""
    assert type(_load(_with_code(nano, tmp_path / "model"))).__name__ == "Model"
