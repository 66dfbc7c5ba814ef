"""Kimi K3 as it is released, in MXFP4: to every format, by its names."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import k2quant
from k2quant.checkpoint.reader import open_checkpoint
from k2quant.checkpoint.weights import group_tensors
from rewritten import tensors_of

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def experts_of(folder: Path) -> dict[str, str]:
    """Return the format of each routed expert's matrix, by base."""
    weights = group_tensors(open_checkpoint(folder).tensors).weights
    return {w.base: w.format.name for w in weights if ".experts." in w.base and w.format is not None}


def test_release_of_k3_is_read(k3: Path) -> None:
    """MXFP4 experts by K3's names, its config word for word in `text_config`: no problem, and every expert is known."""
    found = k2quant.inspect(k3)
    assert found.problems == []
    assert set(experts_of(k3).values()) == {"mxfp4"}
    assert len(experts_of(k3)) == 18
    assert not [said for said in found.remarks if "ignore" not in said and "none that K2 has" not in said]


@pytest.mark.parametrize("to", ["bf16", "fp8", "int4", "nvfp4"])
def test_k3_becomes_every_format(k3: Path, tmp_path: Path, to: Any) -> None:
    """The experts change their format and nothing else does, to the byte; `verify` finds every weight in its budget."""
    done = k2quant.convert(k3, tmp_path / "out", to=to, scope=None if to == "bf16" else "experts").folder
    assert set(experts_of(done).values()) == {to}
    before, after = tensors_of(open_checkpoint(k3)), tensors_of(open_checkpoint(done))
    kept = [name for name in before if ".block_sparse_moe.experts." not in name]
    assert all(before[n][0] == after[n][0] and np.array_equal(before[n][1], after[n][1]) for n in kept)
    assert k2quant.verify(k3, done).passed
    config = json.loads((done / "config.json").read_text())
    assert config["model_type"] == "kimi_k3"
    assert ("quantization_config" in config["text_config"]) == (to != "bf16")


def test_experts_of_k3_mean_code_times_power_of_two(k3: Path, tmp_path: Path) -> None:
    """MXFP4 -> BF16 is E2M1 times 2^(byte - 127), even column in the low nibble: written out here once more."""
    done = tensors_of(open_checkpoint(k2quant.convert(k3, tmp_path / "out", to="bf16").folder))
    source = tensors_of(open_checkpoint(k3))
    for base in experts_of(k3):
        codes, scale = source[f"{base}.weight_packed"][1], source[f"{base}.weight_scale"][1]
        both = np.stack([codes & 15, codes >> 4], -1).reshape(codes.shape[0], -1)
        expected = E2M1[both] * np.repeat(np.exp2(scale.astype(np.float32) - 127), 32, 1)
        found = (done[f"{base}.weight"][1].astype(np.uint32) << 16).view(np.float32)
        assert np.array_equal(found, expected)


def test_k3_goes_to_nvfp4_without_loss(k3: Path, tmp_path: Path) -> None:
    """MXFP4 -> NVFP4 keeps codes and values: BF16 of both is equal, and w1 and w3 of an expert share a tensor scale."""
    made = k2quant.convert(k3, tmp_path / "nvfp4", to="nvfp4").folder
    plain = tensors_of(open_checkpoint(k2quant.convert(k3, tmp_path / "a", to="bf16").folder))
    again = tensors_of(open_checkpoint(k2quant.convert(made, tmp_path / "b", to="bf16").folder))
    for base in experts_of(k3):
        one, other = ((found[f"{base}.weight"][1].astype(np.uint32) << 16).view(np.float32) for found in (plain, again))
        assert np.array_equal(one, other)
    tensors = tensors_of(open_checkpoint(made))
    for base in (base for base in experts_of(k3) if base.endswith("w1")):
        one, other = (tensors[f"{base.removesuffix('w1')}{part}.weight_scale_2"][1] for part in ("w1", "w3"))
        assert one == other


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
def test_config_of_nvfp4_k3_ignores_what_is_kept_and_nothing_else(k3: Path, tmp_path: Path, layout: Any) -> None:
    """Every matrix that stays BF16 is in the list of the layout, none of NVFP4 is; also those that K3's own forgets."""
    done = k2quant.convert(k3, tmp_path / "out", to="nvfp4", layout=layout).folder
    block = json.loads((done / "config.json").read_text())["text_config"]["quantization_config"]
    weights = group_tensors(open_checkpoint(done).tensors).weights
    taken = set(experts_of(done))
    assert taken == set(experts_of(k3))
    kept = [w.base for w in weights if len(w.shape) == 2 and w.base not in taken and "embed" not in w.base]
    assert kept
    assert len(block["ignore"]) < 20  # patterns, not a name for each layer
    assert not [base for base in taken if is_ignored(base, block["ignore"], layout)]
    assert not [base for base in kept if not is_ignored(base, block["ignore"], layout)]


def is_ignored(base: str, ignored: list[str], layout: str) -> bool:
    """Tell whether a list means a module, as compressed-tensors or as vLLM's ModelOpt loader reads it."""
    if layout == "compressed-tensors":
        return any(re.match(each[3:], base) if each.startswith("re:") else each == base for each in ignored)
    patterns = [each.replace(".", r"\.").replace("*", ".*") for each in ignored]
    return any(re.fullmatch(pattern, base) for pattern in patterns) or any(each in base for each in ignored)
