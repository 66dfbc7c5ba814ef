"""What engines fuse, by the names of a checkpoint."""

from __future__ import annotations

import pytest

from k2quant.ground.engines import fused, scaled_together, splits

EXPERTS, SHARED, DENSE, QKV = (
    "layers.3.mlp.experts",
    "layers.3.mlp.shared_experts.gate_up_proj",
    "layers.3.mlp.gate_up_proj",
    "layers.3.self_attn.fused_qkv_a_proj",
)
K3 = "layers.3.block_sparse_moe."
KDA = "layers.3.self_attn.in_proj_qkvgfab"


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("mlp.experts.0.gate_proj", EXPERTS),
        ("mlp.experts.383.up_proj", EXPERTS),
        ("mlp.experts.7.down_proj", EXPERTS),
        ("mlp.shared_experts.gate_proj", SHARED),
        ("mlp.shared_experts.up_proj", SHARED),
        ("mlp.shared_experts.down_proj", None),
        ("mlp.gate_proj", DENSE),
        ("mlp.up_proj", DENSE),
        ("mlp.down_proj", None),
        ("mlp.gate", None),
        ("self_attn.q_a_proj", QKV),
        ("self_attn.kv_a_proj_with_mqa", QKV),
        ("self_attn.q_b_proj", None),
        ("self_attn.kv_b_proj", None),
        ("self_attn.o_proj", None),
        ("self_attn.q_proj", KDA),
        ("self_attn.k_proj", KDA),
        ("self_attn.f_a_proj", KDA),
        ("self_attn.f_b_proj", None),
        ("block_sparse_moe.experts.0.w1", f"{K3}experts"),
        ("block_sparse_moe.experts.895.w2", f"{K3}experts"),
        ("block_sparse_moe.experts.7.gate_proj", None),
        ("mlp.experts.7.w1", None),
        ("block_sparse_moe.shared_experts.gate_proj", f"{K3}shared_experts.gate_up_proj"),
        ("block_sparse_moe.shared_experts.down_proj", None),
        ("block_sparse_moe.routed_expert_up_proj", None),
        ("block_sparse_moe.gate", None),
        ("input_layernorm", None),
    ],
)
@pytest.mark.parametrize("prefix", ["model.", "language_model.model.", "model.language_model.", "language_model."])
def test_each_weight_belongs_to_one_module_of_engines(prefix: str, name: str, module: str | None) -> None:
    """Experts with experts, gate with up, q_a with kv_a, KDA's inputs, however the layer is spelled; no other."""
    found = fused(f"{prefix}layers.3.{name}")
    assert (found and found.name) == module
    assert fused(name) is None


def test_splits_are_found_once_for_each_module_with_its_first_members() -> None:
    """A module is split where two members differ; layers do not mix, and members of one format are no split."""
    stored = [
        ("model.embed_tokens", "bf16"),  # stands alone
        ("model.layers.3.self_attn.q_a_proj", "bf16"),
        ("model.layers.3.mlp.experts.0.up_proj", "int4"),
        ("model.layers.3.mlp.experts.1.up_proj", "bf16"),
        ("model.layers.3.mlp.experts.2.up_proj", "fp8"),
        ("model.layers.4.mlp.experts.0.up_proj", "bf16"),
        ("model.layers.4.mlp.gate_proj", "int4"),
        ("model.layers.4.mlp.up_proj", "int4"),
        ("language_model.layers.3.self_attn.kv_a_proj_with_mqa", "fp8"),
    ]
    assert [(split.fused.name, split.first[1], split.other[1]) for split in splits(stored)] == [
        (EXPERTS, "int4", "bf16"),
        (QKV, "bf16", "fp8"),
    ]
    assert "`model.layers.3.mlp.experts.0.up_proj` is int4 and `model.layers.3.mlp.experts.1.up_proj` is bf16" in str(
        splits(stored)[0]
    )


@pytest.mark.parametrize(
    ("members", "key"),
    [
        (("mlp.experts.7.gate_proj", "mlp.experts.7.up_proj"), "layers.3.mlp.experts.7.gate_up_proj"),
        (("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"), SHARED),
        (("mlp.gate_proj", "mlp.up_proj"), DENSE),
        (("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"), QKV),
        (("block_sparse_moe.experts.7.w1", "block_sparse_moe.experts.7.w3"), "layers.3.block_sparse_moe.experts.7.w13"),
        (
            ("block_sparse_moe.shared_experts.gate_proj", "block_sparse_moe.shared_experts.up_proj"),
            "layers.3.block_sparse_moe.shared_experts.gate_up_proj",
        ),
    ],
)
@pytest.mark.parametrize("prefix", ["model.", "language_model.model.", "model.language_model.", "language_model."])
def test_what_engines_lay_into_one_matrix_shares_one_key(prefix: str, members: tuple[str, ...], key: str) -> None:
    """Gate with up, w1 with w3 and q_a with kv_a have one key, by layer and expert, however the layer is spelled."""
    assert {scaled_together(f"{prefix}layers.3.{member}") for member in members} == {key}
    assert {scaled_together(member) for member in members} == {None}


@pytest.mark.parametrize(
    "name",
    [
        "mlp.experts.7.down_proj",
        "mlp.shared_experts.down_proj",
        "mlp.down_proj",
        "mlp.gate",
        "block_sparse_moe.experts.7.w2",
        "block_sparse_moe.shared_experts.down_proj",
        "block_sparse_moe.routed_expert_up_proj",
        "block_sparse_moe.gate",
        "self_attn.q_b_proj",
        "self_attn.kv_b_proj",
        "self_attn.o_proj",
        "mlp.experts.7.gate_proj.weight",
    ],
)
def test_what_stands_alone_has_no_key(name: str) -> None:
    """Down, the router, what follows q_a and kv_a, and names with their suffix share a tensor scale with nothing."""
    assert scaled_together(f"model.layers.3.{name}") is None


def test_no_two_experts_share_a_scale() -> None:
    """Each expert of each layer has a key of its own."""
    bases = [f"model.layers.{layer}.mlp.experts.{expert}.up_proj" for layer in range(3) for expert in range(12)]
    assert len({scaled_together(base) for base in bases}) == 36
