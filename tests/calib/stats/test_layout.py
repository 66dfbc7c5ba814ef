"""Where the statistics of a matrix stand, and what a layer's file holds, byte by byte."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from k2quant.calib.stats.layout import Place, inputs, place_of, stats_bytes
from k2quant.calib.stats.model import Model
from k2quant.calib.stats.writing import Measured, write_layer
from k2quant.errors import MalformedFile
from k2quant.ground.release import INSTRUCT_CONFIG

EXPERTS = "model.layers.3.mlp.experts"


@pytest.mark.parametrize(
    ("base", "place"),
    [
        ("model.layers.3.self_attn.q_a_proj", Place(3, "model.layers.3.self_attn.q_a_proj", None)),
        ("model.layers.3.self_attn.kv_a_proj_with_mqa", Place(3, "model.layers.3.self_attn.q_a_proj", None)),
        ("model.layers.3.self_attn.q_proj", Place(3, "model.layers.3.self_attn.q_a_proj", None)),
        ("model.layers.3.self_attn.o_proj", Place(3, "model.layers.3.self_attn.o_proj", None)),
        ("model.layers.0.mlp.up_proj", Place(0, "model.layers.0.mlp.gate_proj", None)),
        (
            "model.layers.3.mlp.shared_experts.down_proj",
            Place(3, "model.layers.3.mlp.shared_experts.down_proj", None),
        ),
        (f"{EXPERTS}.17.up_proj", Place(3, f"{EXPERTS}.gate_proj", 17)),
        (f"{EXPERTS}.17.down_proj", Place(3, f"{EXPERTS}.down_proj", 17)),
        ("model.layers.3.mlp.gate", None),
        ("lm_head", None),
    ],
)
def test_each_matrix_has_the_input_of_its_first_consumer(base: str, place: Place | None) -> None:
    """Gate and up share one input, q_a and kv_a another; an expert has its row; a router and the head have none."""
    assert place_of(base) == place


def test_gate_and_up_of_an_expert_have_a_prior() -> None:
    """It is the input of all tokens of the layer; a down_proj, and what every token passes, have none."""
    found = {
        name: place.prior
        for name in (f"{EXPERTS}.17.gate_proj", f"{EXPERTS}.17.down_proj", "model.layers.3.mlp.shared_experts.up_proj")
        if (place := place_of(name)) is not None
    }
    assert list(found.values()) == [EXPERTS, None, None]


def test_a_layer_of_k2_has_nine_inputs() -> None:
    """Four of attention, two of the shared expert, three of the routed ones; a dense layer has two for its MLP."""
    model = Model.of(INSTRUCT_CONFIG)
    widths = {one.name.removeprefix("model.layers.1."): (one.experts, one.width) for one in inputs(model, 1)}
    assert widths == {
        "self_attn.q_a_proj": (None, 7168),
        "self_attn.q_b_proj": (None, 1536),
        "self_attn.kv_b_proj": (None, 512),
        "self_attn.o_proj": (None, 8192),
        "mlp.shared_experts.gate_proj": (None, 7168),
        "mlp.shared_experts.down_proj": (None, 2048),
        "mlp.experts": (None, 7168),
        "mlp.experts.gate_proj": (384, 7168),
        "mlp.experts.down_proj": (384, 2048),
    }
    assert [one.name for one in inputs(model, 0)][-2:] == [
        "model.layers.0.mlp.gate_proj",
        "model.layers.0.mlp.down_proj",
    ]


def test_a_model_without_compressed_queries_has_no_input_of_q_b() -> None:
    """`q_lora_rank` is null there: q_proj and kv_a share an input, and nothing else is made of it."""
    model = Model.of(INSTRUCT_CONFIG | {"q_lora_rank": None, "n_shared_experts": 0})
    last = [one.name.rpartition("layers.1.")[2] for one in inputs(model, 1)]
    assert last[:3] == ["self_attn.q_a_proj", "self_attn.kv_b_proj", "self_attn.o_proj"]
    assert not any("shared" in name for name in last)


def test_statistics_of_k2_take_three_and_a_half_gigabytes() -> None:
    """For 60 layers, 2 parts, 384 experts and 2 moments, 7168 + 2048 floats each: 3.4 GB; with Hessians 10.4 TB."""
    model = Model.of(INSTRUCT_CONFIG)
    moments = 60 * 2 * 384 * 2 * (7168 + 2048) * 4
    assert moments < stats_bytes(model, hessians=False) < 1.02 * moments
    matrices = 60 * 2 * 384 * (7168**2 + 2048**2) * 4
    assert matrices < stats_bytes(model, hessians=True) < 1.02 * matrices


def test_the_size_foretold_is_the_size_written(standing: Any) -> None:
    """Never less; to a thirtieth with Hessians. Without, half of so small a model's files is JSON, which is a guess."""
    for hessians in (False, True):
        manifest = standing.manifest(hessians=hessians)
        folder = standing.write(f"size {hessians}", manifest)
        found = sum(path.stat().st_size for path in folder.glob("layer-*"))
        assert found <= stats_bytes(manifest.model, hessians=hessians) < found * (1.03 if hessians else 1.35)


def test_a_layers_file_is_a_safetensors_file_of_these_bytes(tmp_path: Path) -> None:
    """Wide elements first, names in order, little-endian; the record has its size and sha256."""
    one = Measured(np.array([0.5, 2.0], np.float32), 3.0, 3, 1.5, np.array([-0.25, 1.0], np.float32))
    write_layer(tmp_path, 7, {("a", "train"): one}, {"b": {"weight_scale": "00000001", "weight": "000000ff"}})
    header = (
        b'{"__metadata__":{"format":"pt"},'
        b'"a.train.tokens":{"dtype":"I64","shape":[],"data_offsets":[0,8]},'
        b'"a.train.weight":{"dtype":"F64","shape":[],"data_offsets":[8,16]},'
        b'"a.train.largest":{"dtype":"F32","shape":[],"data_offsets":[16,20]},'
        b'"a.train.mean":{"dtype":"F32","shape":[2],"data_offsets":[20,28]},'
        b'"a.train.mean_square":{"dtype":"F32","shape":[2],"data_offsets":[28,36]}}'
    )
    header += b" " * (-len(header) % 8)
    data = struct.pack("<Q", len(header)) + header + struct.pack("<qdfffff", 3, 3.0, 1.5, -0.25, 1.0, 0.5, 2.0)
    assert (tmp_path / "layer-00007.safetensors").read_bytes() == data
    assert json.loads((tmp_path / "layer-00007.json").read_bytes()) == {
        "layer": 7,
        "size": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "hessians": {},
        "digests": {"b": {"weight": "000000ff", "weight_scale": "00000001"}},
    }
    assert load_file(tmp_path / "layer-00007.safetensors")["a.train.mean_square"].tolist() == [0.5, 2.0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_size": None}, "expected hidden_size"),
        ({"hidden_size": 0}, "0 where a count from 1"),
        ({"hidden_size": True}, "True where"),
        ({"num_experts_per_tok": 385}, "385 where"),
        ({"num_hidden_layers": 10**6}, "1000000 where"),
        ({"n_routed_experts": 2**17}, "131072 where"),
        ({"text_config": 3}, "no sizes of a model"),
    ],
)
def test_a_config_whose_sizes_are_none_is_refused(change: dict[str, Any], said: str) -> None:
    """Missing, zero, no number, or more experts and layers than anybody has."""
    with pytest.raises(MalformedFile, match=said):
        Model.of(INSTRUCT_CONFIG | change)


def test_the_config_of_a_language_model_within_another_is_taken() -> None:
    """K2.5 keeps it in `text_config`; what does not change a layer's inputs is left out."""
    model = Model.of({"model_type": "kimi_k25", "text_config": INSTRUCT_CONFIG})
    assert model == Model.of(INSTRUCT_CONFIG | {"torch_dtype": "float32", "max_position_embeddings": 5})
    assert (model.layers, model.first_routed, model.experts, model.top_k) == (61, 1, 384, 8)
    assert (model.values, model.latent, model.dense) == (8192, 512, 18432)
