"""Kimi K3: converted by its names, not run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import k2quant
from k2quant.checkpoint.reader import open_checkpoint
from k2quant.checkpoint.weights import StoredWeight, group_tensors
from k2quant.checkpoint.writing.in_memory import write_checkpoint
from k2quant.conversion.metadata.promises import broken_promises, inventory
from k2quant.errors import UnsupportedFormat
from k2quant.ground import names
from k2quant.model import load_model
from rewritten import respelled, tensors_of

EXPERT = "language_model.model.layers.1.block_sparse_moe.experts.2."


def weights_of(folder: Path) -> list[StoredWeight]:
    """Return the weights of a checkpoint."""
    return group_tensors(open_checkpoint(folder).tensors).weights


def quantised(folder: Path) -> set[str]:
    """Return the bases that are stored quantised."""
    return {weight.base for weight in weights_of(folder) if weight.format is not None and weight.format.quantised}


def block_of(folder: Path) -> dict[str, Any]:
    """Return the quantization block of a checkpoint, which stands in `text_config`."""
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    found: dict[str, Any] = config["text_config"]["quantization_config"]
    return found


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("language_model.model.layers.1.block_sparse_moe.experts.0.w1.weight_packed", "routed experts"),
        ("language_model.model.layers.1.block_sparse_moe.shared_experts.up_proj.weight", "shared experts"),
        ("language_model.model.layers.1.block_sparse_moe.gate.weight", "router"),
        ("language_model.model.layers.1.block_sparse_moe.gate.e_score_correction_bias", "router"),
        ("language_model.model.layers.1.block_sparse_moe.routed_expert_up_proj.weight", "other"),
        ("language_model.model.layers.1.block_sparse_moe.routed_expert_norm.weight", "norm"),
        ("language_model.model.layers.0.mlp.up_proj.weight", "dense mlp"),
        ("language_model.model.layers.0.self_attn.q_conv1d.weight", "attention"),
        ("language_model.model.layers.0.self_attention_res_proj.weight", "other"),
        ("vision_tower.encoder.blocks.0.wqkv.weight", "vision"),
    ],
)
def test_names_of_k3_have_their_class(name: str, kind: str) -> None:
    """K3's own names are sorted as K2's are, so that tables and recipes know them."""
    assert names.tensor_class(name) == kind


def test_experts_of_k3_are_projections_with_a_number() -> None:
    """w1, w2 and w3 are what scopes take; a mixture of K2's and K3's names is neither's."""
    assert all(names.is_routed_expert(f"{EXPERT}{part}") for part in ("w1", "w2", "w3"))
    assert [names.projection(f"{EXPERT}{part}") for part in ("w1", "w2", "w3")] == ["gate_proj", "down_proj", "up_proj"]
    assert names.expert(f"{EXPERT}w3") == 2
    assert names.is_projection(f"{EXPERT.partition('experts')[0]}shared_experts.down_proj")
    assert not names.is_routed_expert(f"{EXPERT.partition('experts')[0]}shared_experts.down_proj")
    for other in ("w4", "up_proj", "w1.weight"):
        assert not names.is_projection(f"{EXPERT}{other}")
    for other in ("gate", "routed_expert_up_proj", "routed_expert_down_proj", "up_proj"):
        assert not names.is_projection(f"{EXPERT.partition('experts')[0]}{other}")
    assert not names.is_projection("model.layers.1.mlp.experts.2.w1")


def test_place_of_an_expert_is_spelled_as_its_model_does() -> None:
    """The two spellings of one projection, each read back as the same projection."""
    for part in ("gate_proj", "up_proj", "down_proj"):
        for of_k3 in (False, True):
            base = "model.layers.4." + names.place_of_expert(9, part, of_k3=of_k3)
            assert (names.expert(base), names.projection(base), names.is_of_k3(base)) == (9, part, of_k3)


# --- what the config promises ---------------------------------------------------------------------------------------


def test_a_whole_k3_keeps_its_promises(k3_bf16: Path) -> None:
    """K3 counts its experts under `num_experts`; nothing is missed where nothing is missing."""
    found = inventory(weights_of(k3_bf16))
    assert (len(found.prefixes), found.dense, found.of_k3) == (3, frozenset({0}), True)
    assert {layer: len(experts) for layer, experts in found.experts.items()} == {1: 3, 2: 3}
    assert broken_promises(open_checkpoint(k3_bf16).config, found) == []


def test_a_missing_expert_is_called_by_its_name(k3_bf16: Path, tmp_path: Path) -> None:
    """What is not there is named as K3 would name it."""
    tensors = {n: t for n, t in tensors_of(open_checkpoint(k3_bf16)).items() if not n.startswith(f"{EXPERT}w3")}
    write_checkpoint(tmp_path / "src", {"model.safetensors": tensors}, open_checkpoint(k3_bf16).config)
    (said,) = broken_promises(open_checkpoint(tmp_path / "src").config, inventory(weights_of(tmp_path / "src")))
    assert f"num_experts is 3, but there is no `{EXPERT}w3`" in said


# --- converting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["int4", "fp8"])
def test_experts_of_k3_are_what_the_default_takes(k3_bf16: Path, tmp_path: Path, to: Any) -> None:
    """The experts' scope takes w1, w2 and w3 of every expert and nothing else; all else is the same bytes."""
    done = k2quant.convert(k3_bf16, tmp_path / "out", to=to, scope="experts").folder
    assert quantised(done) == {weight.base for weight in weights_of(k3_bf16) if ".experts." in weight.base}
    before, after = tensors_of(open_checkpoint(k3_bf16)), tensors_of(open_checkpoint(done))
    kept = [name for name in before if ".block_sparse_moe.experts." not in name]
    assert all(before[n][0] == after[n][0] and np.array_equal(before[n][1], after[n][1]) for n in kept)
    assert k2quant.verify(k3_bf16, done).passed


@pytest.mark.parametrize(("to", "scope"), [("int4", "experts"), ("int4", "linear"), ("fp8", "linear")])
def test_the_ignore_list_of_k3_covers_what_is_kept_and_nothing_else(
    k3_bf16: Path, tmp_path: Path, to: Any, scope: Any
) -> None:
    """Every matrix that stays BF16 is ignored, among them what K3's own list forgets; no quantised one is."""
    layout: Any = "compressed-tensors" if to == "fp8" else None
    done = k2quant.convert(k3_bf16, tmp_path / "out", to=to, scope=scope, layout=layout).folder
    ignored = [
        each.removeprefix("re:") if each.startswith("re:") else re.escape(each) for each in block_of(done)["ignore"]
    ]

    def is_ignored(base: str) -> bool:
        return any(re.match(pattern, base) for pattern in ignored)

    taken = quantised(done)
    assert not any(map(is_ignored, taken))
    kept = [w.base for w in weights_of(done) if len(w.shape) == 2 and w.base not in taken and "embed" not in w.base]
    assert all(map(is_ignored, kept))
    assert any(base.endswith("routed_expert_up_proj") for base in kept)
    if scope == "experts":
        assert len(ignored) < 12  # patterns, not a name for each layer


def test_the_inputs_of_kda_stay_together(k3_bf16: Path, tmp_path: Path) -> None:
    """Of KDA's q, k and v, which engines load as one matrix, a scope knows q alone: all of them stay BF16."""
    found = {
        base.rpartition("layers.")[2] for base in quantised(k2quant.convert(k3_bf16, tmp_path / "o", to="fp8").folder)
    }
    attention = {base.removeprefix("1.self_attn.") for base in found if base.startswith("1.self_attn.")}
    assert attention == {"o_proj"}
    assert {base for base in found if base.startswith("2.self_attn.")} == {
        f"2.self_attn.{name}" for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    }
    assert {"1.block_sparse_moe.shared_experts.up_proj", "0.mlp.down_proj"} < found


def test_inspect_knows_k3(k3_bf16: Path) -> None:
    """The type is known, the layers and experts are counted; what no scope takes is said once."""
    found = k2quant.inspect(k3_bf16)
    assert (found.layers, found.experts, found.problems) == (3, 3, [])
    (said,) = found.remarks
    assert "matrices of decoder layers are none that K2 has" in said
    assert {row.tensor_class for row in found.rows} >= {"routed experts", "shared experts", "router"}


# --- running ----------------------------------------------------------------------------------------------------------


def test_k3_is_not_run(k3_bf16: Path) -> None:
    """Loading is refused with the reason: another architecture, and which."""
    with pytest.raises(UnsupportedFormat, match=r"not run here: K3 has another architecture.*KDA.*SiTU"):
        load_model(k3_bf16)


def test_what_calls_itself_k3_and_kimi_linear_alone_are_taken(k3_bf16: Path, tmp_path: Path) -> None:
    """K3's language model may stand alone, as `kimi_linear`, without the wrapper."""
    text = dict((open_checkpoint(k3_bf16).config or {})["text_config"])
    alone = respelled(k3_bf16, tmp_path / "alone", lambda name: name.removeprefix("language_model."))
    (alone / "config.json").write_text(json.dumps(text))
    done = k2quant.convert(alone, tmp_path / "out", to="int4").folder
    assert len(quantised(done)) == 18
    with pytest.raises(UnsupportedFormat, match="another architecture"):
        load_model(alone)
