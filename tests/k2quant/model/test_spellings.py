"""Models under other spellings of their layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from k2quant.model import load_model
from rewritten import respelled

IDS = torch.randint(0, 2048, (1, 8), generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("layout", ["k2_thinking", "k2_bf16"])
def test_layers_without_model_in_their_names_are_loaded_and_saved(
    layout: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """A good checkpoint refused: `language_model.layers...` gives the same logits, and is saved under its own names."""
    plain = request.getfixturevalue(layout)

    def rename(name: str) -> str:
        return name.replace("model.", "language_model.", 1) if name.startswith("model.") else f"language_model.{name}"

    other = respelled(plain, tmp_path / "other", rename)
    model = load_model(other)
    assert torch.equal(model(IDS).logits, load_model(plain)(IDS).logits)
    model.save_pretrained(tmp_path / "saved")
    name = "language_model.layers.0.self_attn.o_proj.weight"
    assert name.encode() in (tmp_path / "saved" / "model.safetensors").read_bytes()
