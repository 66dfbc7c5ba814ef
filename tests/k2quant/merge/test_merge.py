"""Merging an adapter: the rule against PEFT's own merge, every base and target, resuming, and what is refused."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

import k2quant
from k2quant.checkpoint.panels import read_values
from k2quant.checkpoint.reader import REPORT, open_checkpoint
from k2quant.checkpoint.reading import read_tensor
from k2quant.checkpoint.weights import group_tensors
from k2quant.cli import main
from k2quant.errors import (
    BadValue,
    CheckpointError,
    DestinationStale,
    DtypeMismatch,
    MalformedFile,
    MissingTensor,
    ShapeMismatch,
    UnsafePath,
    UnsupportedFormat,
    UsageError,
)
from k2quant.formats.transcode import Scratch
from k2quant.kernels.codecs.choice import codecs
from k2quant.kernels.codecs.values import bf16_to_float, double_to_bf16
from k2quant.merge.adapter import CONFIG, WEIGHTS

ATTENTION = "model.layers.1.self_attn.q_a_proj"
EXPERT = "model.layers.1.mlp.experts.{}.{}_proj"
Tensors = dict[str, Tensor]


def model_of(intermediate: int, seed: int = 3) -> DeepseekV3ForCausalLM:
    """Return a small K2 in float32 whose weights are BF16 values; with 32 its fused gates are square."""
    torch.manual_seed(seed)
    config = DeepseekV3Config(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=intermediate,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    model = DeepseekV3ForCausalLM(config)
    model.bfloat16().float()
    return model


def trained(model: torch.nn.Module, config: LoraConfig, spread: float = 0.02) -> PeftModel:
    """Wrap a model in an adapter and let all that is trained move."""
    adapted = get_peft_model(model, config)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=spread)
    return adapted


def saved(model: DeepseekV3ForCausalLM, folder: Path) -> Path:
    """Save a model as a BF16 checkpoint, an expert at a time, without changing it."""
    state = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=state)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    return folder


def everything(**changes: Any) -> LoraConfig:
    """Return a config with all that is supported: linears, fused experts, a router, patterns, whole modules."""
    settings: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["q_a_proj", "o_proj", "kv_b_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"],
        "rank_pattern": {"experts.down_proj": 2, r"layers\.0\..*o_proj": 3},
        "alpha_pattern": {"q_a_proj": 5, "experts.gate_up_proj": 9},
        "modules_to_save": ["lm_head", "model.norm"],
    }
    return LoraConfig(**{**settings, **changes})


def bf16_tensors(folder: Path) -> dict[str, NDArray[np.uint16]]:
    """Return every weight of a checkpoint as BF16 bits, decoded, by base."""
    source, found = open_checkpoint(folder), {}
    for weight in group_tensors(source.tensors).weights:
        if weight.format is not None:
            panel = read_values(source, weight, 0, weight.shape[0], codecs=codecs("cpu"), scratch=Scratch())
            found[weight.base] = panel.values.reshape(weight.shape).copy()
    return found


def stored(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Return every tensor of a checkpoint as it is stored."""
    source = open_checkpoint(folder)
    return {name: (entry.dtype, entry.shape, read_tensor(source, entry)) for name, entry in source.tensors.items()}


def config_of(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's config."""
    parsed: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return parsed


def adapter(folder: Path, tensors: Tensors, **config: Any) -> Path:
    """Write an adapter by hand; names are those below `base_model.model.`."""
    folder.mkdir(parents=True)
    save_file({f"base_model.model.{name}": tensor for name, tensor in tensors.items()}, folder / WEIGHTS)
    plain = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "peft_version": "0.21.2"}
    (folder / CONFIG).write_text(json.dumps(plain | config))
    return folder


def pair(module: str, rows: int, width: int, rank: int = 4, spread: float = 0.02) -> Tensors:
    """Return random factors of a module."""
    random = torch.Generator().manual_seed(rows * width)
    return {
        f"{module}.lora_A.weight": torch.randn((rank, width), generator=random),
        f"{module}.lora_B.weight": torch.randn((rows, rank), generator=random) * spread,
    }


def on_k2(spread: float = 0.01) -> Tensors:
    """Return factors for an attention matrix and two experts of the small K2 of `k2_source`."""
    return (
        pair(ATTENTION, 256, 512, spread=spread)
        | pair(EXPERT.format(3, "gate"), 256, 512, spread=spread)
        | pair(EXPERT.format(7, "down"), 512, 256, spread=spread)
    )


# --- the rule -------------------------------------------------------------------------------------------------------


def to_nearest_bf16(value: Fraction) -> int:
    """Round a rational to BF16 bits, half to even, by comparing it with every neighbour; too large is infinity."""
    sign, size = (0x8000, -value) if value < 0 else (0, value)
    low, high = 0, 0x7F80
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if bf16_fraction(middle) <= size else (low, middle)
    below, above = size - bf16_fraction(low), bf16_fraction(high) - size
    nearest = low if below < above or (below == above and low % 2 == 0) else high
    return sign | nearest


def bf16_fraction(bits: int) -> Fraction:
    """Return the number that BF16 bits stand for; infinity counts as the number that would come next."""
    exponent, mantissa = bits >> 7, bits & 127
    return Fraction(2) ** -133 * mantissa if exponent == 0 else Fraction(2) ** (exponent - 134) * (128 + mantissa)


@given(
    st.one_of(
        st.floats(allow_nan=False, allow_infinity=False, width=32),
        st.floats(allow_nan=False, allow_infinity=False),
        st.builds(  # near a tie: where going through float32 would round twice
            lambda bits, off: float(bf16_fraction(bits) + bf16_fraction(bits + 1)) / 2 * (1 + off * 2.0**-50),
            st.integers(0, 0x7F00),
            st.integers(-3, 3),
        ),
    )
)
def test_float64_becomes_bf16_with_one_rounding(value: float) -> None:
    """The bits are those of the exact value rounded half to even, also next to ties, tiny or too large."""
    assert int(double_to_bf16(np.array([value]))[0]) & 0x7FFF == to_nearest_bf16(Fraction(value)) & 0x7FFF
    assert int(double_to_bf16(np.array([value]))[0]) >> 15 == int(math.copysign(1, value) < 0)


def test_the_sum_is_exact_but_for_one_rounding(k2_bf16: Path, tmp_path: Path) -> None:
    """A merged matrix holds bf16(W0 + s * B @ A) of rational arithmetic, weight by weight."""
    tensors = pair(ATTENTION, 256, 512)
    done = k2quant.merge(k2_bf16, adapter(tmp_path / "adapter", tensors), tmp_path / "out", to="bf16")
    base, merged = bf16_tensors(k2_bf16)[ATTENTION], bf16_tensors(done.folder)[ATTENTION]
    a, b = (tensors[f"{ATTENTION}.lora_{side}.weight"].tolist() for side in "AB")
    for row, column in zip(range(0, 256, 5), range(0, 512, 10), strict=False):
        update = 2 * sum(Fraction(b[row][r]) * Fraction(a[r][column]) for r in range(4))
        start = Fraction(float(bf16_to_float(base[row : row + 1, column])[0]))
        assert int(merged[row, column]) == to_nearest_bf16(start + update)


@pytest.mark.parametrize("intermediate", [32, 96], ids=["square", "oblong"])
@pytest.mark.parametrize(
    "config",
    [everything(), everything(use_rslora=True), LoraConfig(r=2, lora_alpha=3, target_modules="all-linear")],
    ids=["lora", "rslora", "all-linear"],
)
def test_equals_pefts_own_merge(tmp_path: Path, intermediate: int, config: LoraConfig) -> None:
    """Linears, fused experts, a router, patterns and whole modules come out as `merge_and_unload` has them.

    PEFT sums in float32, an error of some 2^-24 of the terms, so about one weight in 2^14 may lie on the other side of
    the tie between two BF16 neighbours: 1 in 1,000 may differ, by a BF16 step or by float32's error of a sum near 0.
    """
    model = model_of(intermediate)
    base = saved(model, tmp_path / "base")
    adapted = trained(model, copy.deepcopy(config))
    adapted.save_pretrained(str(tmp_path / "adapter"))
    k2quant.merge(base, tmp_path / "adapter", tmp_path / "out", to="bf16")
    before = load_file(base / "model.safetensors")
    saved(adapted.merge_and_unload(), tmp_path / "oracle")
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "oracle"))
    assert found.keys() == expected.keys()
    touched = {name for name in found if not torch.equal(before[name], expected[name])}
    assert len(touched) >= 18  # six linears, twelve of experts
    for name in found:
        difference = (found[name].double() - expected[name].double()).abs()
        allowed = expected[name].double().abs() * 2**-7 + float(before[name].double().abs().max()) * 2**-22
        assert bool((difference <= allowed).all()), name
        assert float((difference > 0).float().mean()) <= 1e-3, name


def test_experts_one_by_one_equal_fused_ones(tmp_path: Path) -> None:
    """Linears of single experts, as K2's own modeling code has them, give the bits of the same factors fused."""
    model = model_of(96)
    base = saved(model, tmp_path / "base")
    config = LoraConfig(r=2, lora_alpha=2, target_modules=[], target_parameters=["mlp.experts.down_proj"])
    trained(model, config).save_pretrained(str(tmp_path / "fused"))
    name = "model.layers.1.mlp.experts"
    factors = load_file(tmp_path / "fused" / WEIGHTS)
    a, b = (factors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
    single: Tensors = {}
    for expert in range(4):
        single[f"{name}.{expert}.down_proj.lora_A.default.weight"] = a[2 * expert : 2 * expert + 2].clone()
        single[f"{name}.{expert}.down_proj.lora_B.default.weight"] = b[:, expert::4].clone()
    adapter(tmp_path / "single", single, r=2, lora_alpha=2)
    outputs = [
        k2quant.merge(base, tmp_path / kind, tmp_path / f"{kind}-out", to="bf16") for kind in ("fused", "single")
    ]
    assert stored(outputs[0].folder) == stored(outputs[1].folder)


def stacked(name: str, factors: Tensors, shared: str) -> Tensors:
    """Stack the factors of four experts as Tinker does; of a shared side there is one for all."""
    found = {}
    for side in "AB":
        parts = [factors[f"{name}.{expert}.lora_{side}"] for expert in range(4)]
        found[f"{name}.lora_{side}.weight"] = torch.stack(parts[:1] if side == shared else parts)
    return found


@pytest.mark.parametrize("shared", ["none", "A", "B"])
def test_factors_stacked_by_expert_equal_single_ones(shared: str, tmp_path: Path) -> None:
    """`experts.w1`, `w3` and `w2` of [E, r, K] and [E, N, r], one side perhaps for all, are gate, up and down.

    The kind of fault: a good adapter in another layout than PEFT's.
    """
    base, experts = saved(model_of(96), tmp_path / "base"), "model.layers.1.mlp.experts"
    stack: Tensors = {}
    single: Tensors = {}
    random = torch.Generator().manual_seed(2)
    for letter, projection in {"w1": "gate", "w3": "up", "w2": "down"}.items():
        rows, width = (64, 96) if letter == "w2" else (96, 64)
        factors: Tensors = {}
        for expert in range(4):
            drawn = {"A": torch.randn((3, width), generator=random), "B": torch.randn((rows, 3), generator=random)}
            for side, value in drawn.items():
                own = factors.get(f"{experts}.{letter}.0.lora_{side}") if side == shared else None
                factors[f"{experts}.{letter}.{expert}.lora_{side}"] = value if own is None else own
                place = f"{experts}.{expert}.{projection}_proj.lora_{side}.weight"
                single[place] = factors[f"{experts}.{letter}.{expert}.lora_{side}"].clone()
        stack |= stacked(f"{experts}.{letter}", factors, shared)
    outputs = [
        k2quant.merge(base, adapter(tmp_path / kind, tensors, r=3), tmp_path / f"{kind}-out", to="bf16")
        for kind, tensors in (("stacked", stack), ("single", single))
    ]
    assert stored(outputs[0].folder) == stored(outputs[1].folder)
    before, after = bf16_tensors(base), bf16_tensors(outputs[0].folder)
    assert sum(not np.array_equal(before[name], after[name]) for name in before) == 12


@pytest.mark.parametrize("prefix", ["model.", "", "language_model.model."])
def test_unembed_tokens_is_the_head(prefix: str, k2_thinking: Path, tmp_path: Path) -> None:
    """Factors of `unembed_tokens`, with and without their weight's suffix, are those of lm_head."""
    rows, width = bf16_tensors(k2_thinking)["lm_head"].shape
    usual = pair("lm_head", rows, width)
    other = {f"{prefix}unembed_tokens.lora_{side}": usual[f"lm_head.lora_{side}.weight"] for side in "AB"}
    for kind, tensors in (("usual", usual), ("other", other)):
        k2quant.merge(k2_thinking, adapter(tmp_path / kind, tensors), tmp_path / f"{kind}-out", to="bf16")
    assert stored(tmp_path / "usual-out") == stored(tmp_path / "other-out") != stored(k2_thinking)


@pytest.mark.parametrize("intermediate", [32, 96], ids=["square", "oblong"])
def test_factors_of_older_peft_are_read_the_other_way_round(tmp_path: Path, intermediate: int) -> None:
    """PEFT before 0.19 has A of a parameter's rows and B of its columns; the shapes tell, or else its version."""
    base, rows = saved(model_of(intermediate), tmp_path / "base"), 2 * intermediate
    name, random = "model.layers.1.mlp.experts", torch.Generator().manual_seed(1)
    a, b = torch.randn((8, rows), generator=random), torch.randn((64, 8), generator=random) * 0.02
    tensors = {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    adapter(tmp_path / "adapter", tensors, r=2, lora_alpha=2, peft_version="0.18.1")
    done = k2quant.merge(base, tmp_path / "adapter", tmp_path / "out", to="bf16")
    before, after = bf16_tensors(base), bf16_tensors(done.folder)
    update = torch.einsum("ore,eri->eio", b.reshape(64, 2, 4), a.reshape(4, 2, rows)).numpy()
    for expert in range(4):
        for part, which in enumerate(("gate", "up")):
            base_name = EXPERT.format(expert, which)
            real = bf16_to_float(after[base_name]) - bf16_to_float(before[base_name])
            expected = update[expert, part * intermediate : (part + 1) * intermediate]
            assert np.abs(real - expected).max() < 2e-3  # a step of BF16 for the largest weights
    if intermediate == 32:
        adapter(tmp_path / "unknown", tensors, r=2, lora_alpha=2, peft_version=None)
        with pytest.raises(UnsupportedFormat, match="square experts"):
            k2quant.merge(base, tmp_path / "unknown", tmp_path / "more", to="bf16")


# --- bases and targets ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["int4", "fp8"])
@pytest.mark.parametrize("base", ["k2_source", "k2_bf16", "k2_thinking", "k2_mixed"])
def test_a_merge_is_a_bf16_merge_and_a_conversion(
    base: str, to: k2quant.FormatName, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Any base into any format gives the bits of merging into BF16 and converting that, untouched weights included."""
    source = request.getfixturevalue(base)
    update = adapter(tmp_path / "adapter", on_k2())
    through = k2quant.merge(source, update, tmp_path / "bf16", to="bf16").folder
    k2quant.convert(through, tmp_path / "through", to=to)
    k2quant.merge(source, update, tmp_path / "direct", to=to)
    assert stored(tmp_path / "direct") == stored(tmp_path / "through")
    assert config_of(tmp_path / "direct") == config_of(tmp_path / "through")


def test_a_quantised_base_counts_as_its_bf16_values(k2_thinking: Path, tmp_path: Path) -> None:
    """Merging into an INT4 base equals merging into that base converted to BF16."""
    update = adapter(tmp_path / "adapter", on_k2())
    plain = k2quant.convert(k2_thinking, tmp_path / "plain", to="bf16").folder
    first = k2quant.merge(k2_thinking, update, tmp_path / "first", to="bf16").folder
    second = k2quant.merge(plain, update, tmp_path / "second", to="bf16").folder
    assert stored(first) == stored(second)


def test_untouched_weights_of_an_int4_base_are_copied(k2_thinking: Path, tmp_path: Path) -> None:
    """Every tensor that the adapter does not name keeps its bytes."""
    update = adapter(tmp_path / "adapter", on_k2())
    k2quant.merge(k2_thinking, update, tmp_path / "out", to="int4")
    before, after = bf16_tensors(k2_thinking), bf16_tensors(tmp_path / "out")
    changed = {base for base in before if not np.array_equal(before[base], after[base])}
    assert changed == {ATTENTION, EXPERT.format(3, "gate"), EXPERT.format(7, "down")}


def test_the_grid_of_updated_weights_is_the_one_asked_for(k2_thinking: Path, tmp_path: Path) -> None:
    """On an INT4 base `--grid compressed-tensors` rounds what is updated by amax/7.5 on -8..7."""
    update = adapter(tmp_path / "adapter", on_k2())
    plain = k2quant.merge(k2_thinking, update, tmp_path / "plain", to="bf16").folder
    k2quant.merge(k2_thinking, update, tmp_path / "out", to="int4", grid="compressed-tensors")
    base = EXPERT.format(3, "gate")
    rounded = k2quant.quantize(bf16_tensors(plain)[base], "int4", grid="compressed-tensors")
    assert np.array_equal(bf16_tensors(tmp_path / "out")[base], k2quant.dequantize(rounded))


def test_an_adapter_of_the_language_model_fits_k25(k25: Path, tmp_path: Path) -> None:
    """Names of K2.5 have `language_model.` in front; adapters with and without it give the same checkpoint."""
    tensors = pair(ATTENTION, 256, 512)
    outputs = []
    for prefix in ("", "language_model."):
        update = adapter(tmp_path / f"adapter{prefix}", {prefix + name: value for name, value in tensors.items()})
        outputs.append(stored(k2quant.merge(k25, update, tmp_path / f"out{prefix}", to="int4").folder))
    assert outputs[0] == outputs[1]
    assert outputs[0] != stored(k2quant.convert(k25, tmp_path / "plain", to="int4").folder)


def test_whole_tensors_replace_what_is_no_matrix_too(k2_source: Path, tmp_path: Path) -> None:
    """A router saved whole brings its weight, rounded to BF16, and its correction bias, which stays float32."""
    gate = "model.layers.1.mlp.gate"
    weight, bias = torch.randn((16, 512)), torch.randn(16)
    tensors = {f"{gate}.weight": weight, f"{gate}.modules_to_save.default.e_score_correction_bias": bias}
    update = adapter(tmp_path / "adapter", tensors, modules_to_save=["mlp.gate"])
    out = k2quant.merge(k2_source, update, tmp_path / "out", to="int4").folder
    found: Tensors = {}
    for shard in out.glob("*.safetensors"):
        found |= load_file(shard)
    assert torch.equal(found[f"{gate}.weight"], weight.to(torch.bfloat16))
    assert torch.equal(found[f"{gate}.e_score_correction_bias"], bias)


@pytest.mark.parametrize(
    ("stands", "comes"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.bfloat16,) * 2]
)
def test_what_replaces_a_vector_takes_its_dtype(
    k2_bf16: Path, tmp_path: Path, stands: torch.dtype, comes: torch.dtype
) -> None:
    """A correction bias stays float32 or BF16 as it is in the base, whatever the adapter's is."""
    base, name = tmp_path / "base", "model.layers.1.mlp.gate.e_score_correction_bias"
    shutil.copytree(k2_bf16, base)
    for shard in base.glob("*.safetensors"):
        tensors = load_file(shard)
        if name in tensors:
            tensors[name] = tensors[name].to(stands)
            os.chmod(shard, 0o644)  # noqa: PTH101  a copy of our own
            save_file(tensors, shard)
    bias = torch.randn(16, generator=torch.Generator().manual_seed(2)).to(comes)
    update = adapter(tmp_path / "adapter", {name: bias}, modules_to_save=["mlp.gate"])
    found: Tensors = {}
    for shard in k2quant.merge(base, update, tmp_path / "out", to="bf16").folder.glob("*.safetensors"):
        found |= load_file(shard)
    assert found[name].dtype == stands
    assert torch.equal(found[name], bias.to(stands))


# --- what rounding left of the update -------------------------------------------------------------------------------


def figures_of(folder: Path, base: str) -> dict[str, Any]:
    """Return the report's figures of a weight."""
    tensors = json.loads((folder / REPORT).read_text())["tensors"]
    facts = next(facts for name, facts in tensors.items() if name.startswith(f"{base}.weight"))
    figures: dict[str, Any] = facts["figures"]
    return figures


@pytest.mark.parametrize("base", ["k2_bf16", "k2_thinking"])
def test_figures_say_what_became_of_the_update(base: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """D, E and what the report derives from them are those of the decoded checkpoints."""
    source = request.getfixturevalue(base)
    tensors, name = on_k2(0.002), EXPERT.format(3, "gate")
    out = k2quant.merge(source, adapter(tmp_path / "adapter", tensors), tmp_path / "out", to="int4").folder
    without = k2quant.convert(source, tmp_path / "without", to="int4").folder
    a, b = (tensors[f"{name}.lora_{side}.weight"].double().numpy() for side in "AB")
    exact = 2 * (b @ a)
    after, before = (bf16_to_float(bf16_tensors(folder)[name]).astype(float) for folder in (out, without))
    real = after - before
    found = figures_of(out, name)
    assert found["update"] == pytest.approx((exact**2).sum(), rel=1e-12)
    assert found["effective"] == pytest.approx((real**2).sum(), rel=1e-12)
    assert found["inner"] == pytest.approx((exact * real).sum(), rel=1e-9)
    assert found["lost"] == pytest.approx(np.minimum(exact**2, (exact - real) ** 2).sum(), rel=1e-9)
    assert 0 < found["codes_changed"] < exact.size == found["count"]
    assert found["groups"] == exact.size // 32
    steps = k2quant.quantize(bf16_tensors(without)[name], "int4").scale
    largest = np.abs(exact).reshape(256, 16, 32).max(axis=2)
    assert found["groups_below_half_step"] == int((largest < bf16_to_float(steps) / 2).sum())


def test_what_replaces_a_matrix_counts_as_an_update_of_it(k2_bf16: Path, tmp_path: Path) -> None:
    """A matrix of several bands of rows is replaced row by row, and D is what it differs from the base by."""
    weight = torch.randn((256, 512), generator=torch.Generator().manual_seed(1))
    update = adapter(tmp_path / "adapter", {f"{ATTENTION}.weight": weight}, modules_to_save=["q_a_proj"])
    out = k2quant.merge(k2_bf16, update, tmp_path / "out", to="bf16").folder
    assert bf16_tensors(out)[ATTENTION].tobytes() == weight.to(torch.bfloat16).view(torch.uint16).numpy().tobytes()
    exact = weight.double().numpy() - bf16_to_float(bf16_tensors(k2_bf16)[ATTENTION])
    assert figures_of(out, ATTENTION)["update"] == pytest.approx((exact**2).sum(), rel=1e-12)


def test_figures_and_bits_do_not_depend_on_the_threads(k2_source: Path, tmp_path: Path) -> None:
    """One thread and three write the same files and the same figures."""
    update = adapter(tmp_path / "adapter", on_k2())
    runs = [k2quant.merge(k2_source, update, tmp_path / str(n), to="fp8", workers=n) for n in (1, 3)]
    assert stored(runs[0].folder) == stored(runs[1].folder)
    assert runs[0].report["tensors"] == runs[1].report["tensors"]


def test_an_update_of_nothing_changes_nothing(k2_thinking: Path, tmp_path: Path) -> None:
    """Factors of zero leave the INT4 base as it is, and the figures say so without dividing by zero."""
    tensors = {name: value * 0 for name, value in on_k2().items()}
    done = k2quant.merge(k2_thinking, adapter(tmp_path / "adapter", tensors), tmp_path / "out", to="int4")
    assert stored(done.folder) == stored(k2_thinking)
    row = json.loads(CliRunner().invoke(main, arguments(k2_thinking, tmp_path, "--json")).output)["merged"][0]
    assert (row["cosine"], row["ratio"], row["lost"]) == (0, 0, 0)


def arguments(base: Path, folder: Path, *more: str) -> list[str]:
    """Return the command line of a merge to INT4 of `folder`'s adapter."""
    return ["merge", str(base), str(folder / "adapter"), str(folder / "out"), "--to", "int4", *more]


def test_the_command_prints_a_table_and_warns_of_a_lost_update(k2_thinking: Path, tmp_path: Path) -> None:
    """A row for each class on stdout; an update below half a step is called lost on stderr; again, nothing is done."""
    adapter(tmp_path / "adapter", on_k2(0.0001))
    done = CliRunner().invoke(main, arguments(k2_thinking, tmp_path))
    assert done.exit_code == 0
    assert [line.split()[0] for line in done.stdout.splitlines()[:3]] == ["class", "routed", "attention"]
    assert "routed experts: " in done.stderr
    assert "of the update's energy was lost to rounding; in 100% of the groups" in done.stderr
    assert "attention" not in done.stderr
    again = CliRunner().invoke(main, arguments(k2_thinking, tmp_path))
    assert again.exit_code == 0
    assert "already finished" in again.stdout


def test_dry_run_writes_nothing(k2_thinking: Path, tmp_path: Path) -> None:
    """`--dry-run` counts what would be merged, by class, and what it would cost; the destination is not made."""
    adapter(tmp_path / "adapter", on_k2())
    cost = json.loads(CliRunner().invoke(main, arguments(k2_thinking, tmp_path, "--dry-run", "--json")).output)
    assert cost["merged"] == 3
    assert cost["merged_by_class"] == {"routed experts": 2, "attention": 1}
    assert cost["work"]["routed experts"] == {"copied": 94, "merged": 2}
    assert cost["work"]["attention"] == {"copied": 17, "merged": 1}
    assert cost["fits"] is True
    assert not (tmp_path / "out").exists()
    shown = CliRunner().invoke(main, arguments(k2_thinking, tmp_path, "--dry-run")).output
    assert "merged           3" in shown
    assert "attention        17 copied, 1 merged" in shown
    assert "merged_by_class" not in shown


def test_dry_run_tells_what_is_merged_from_what_is_converted(k2_bf16: Path, tmp_path: Path) -> None:
    """A weight that is merged and rounded is counted apart from those that are only rounded."""
    adapter(tmp_path / "adapter", on_k2())
    work = json.loads(CliRunner().invoke(main, arguments(k2_bf16, tmp_path, "--dry-run", "--json")).output)["work"]
    assert work["routed experts"] == {"bf16 -> int4": 94, "merged, bf16 -> int4": 2}


def test_other_commands_read_what_a_merge_wrote(k2_thinking: Path, tmp_path: Path) -> None:
    """Checksums hold, the page can be drawn, and the model loads."""
    adapter(tmp_path / "adapter", on_k2())
    assert CliRunner().invoke(main, arguments(k2_thinking, tmp_path, "--sha256")).exit_code == 0
    assert k2quant.verify_checksums(tmp_path / "out").passed
    assert CliRunner().invoke(main, ["report", str(tmp_path / "out")]).exit_code == 0
    assert k2quant.load_model(tmp_path / "out") is not None


# --- resuming -------------------------------------------------------------------------------------------------------

KILLED_HALFWAY = """
import os, signal, sys, k2quant
from k2quant.checkpoint.writing.destination import Destination
record = Destination.record
def killed(self, facts):
    record(self, facts)
    os.kill(os.getpid(), signal.SIGKILL)
Destination.record = killed
k2quant.merge(*sys.argv[1:4], to="int4", workers=1)
"""


def test_killed_a_merge_resumes_with_the_same_adapter_alone(k2_source: Path, ram: Path) -> None:
    """After a kill the same call writes the bytes and figures of an undisturbed run; another adapter is refused."""
    update, other = adapter(ram / "adapter", on_k2()), adapter(ram / "other", on_k2(), lora_alpha=9)
    whole = k2quant.merge(k2_source, update, ram / "whole", to="int4")
    command = [sys.executable, "-c", KILLED_HALFWAY, str(k2_source), str(update), str(ram / "out")]
    assert subprocess.run(command, check=False, timeout=120).returncode == -9
    assert (ram / "out" / "INCOMPLETE").exists()
    with pytest.raises(DestinationStale, match="other values"):
        k2quant.merge(k2_source, other, ram / "out", to="int4")
    done = k2quant.merge(k2_source, update, ram / "out", to="int4")
    assert done.resumed >= 1
    assert stored(ram / "out") == stored(ram / "whole")
    assert done.report["tensors"] == whole.report["tensors"]
    assert k2quant.merge(k2_source, update, ram / "out", to="int4").already_done
    with pytest.raises(DestinationStale, match="other values"):
        k2quant.merge(k2_source, other, ram / "out", to="int4")


def test_the_report_says_what_was_merged(k2_source: Path, tmp_path: Path) -> None:
    """Name, digests and scaling of the adapter stand in the report."""
    update = adapter(tmp_path / "adapter", on_k2(), use_rslora=True)
    report = k2quant.merge(k2_source, update, tmp_path / "out", to="int4").report
    facts = report["values"]["adapter"]
    assert (facts["name"], facts["r"], facts["lora_alpha"], facts["use_rslora"]) == ("adapter", 4, 8, True)
    assert (facts["updated"], facts["replaced"]) == (3, 0)
    assert {name: len(digest) for name, digest in facts["sha256"].items()} == {CONFIG: 64, WEIGHTS: 64}


def test_the_report_says_which_tensors_are_not_the_bases(k2_source: Path, tmp_path: Path) -> None:
    """What is updated or replaced is marked, measured or not; of a conversion nothing is."""
    norm = {"model.norm.weight": torch.full((512,), 1.5)}
    update = adapter(tmp_path / "adapter", on_k2() | norm, modules_to_save=["norm"])
    tensors = k2quant.merge(k2_source, update, tmp_path / "out", to="int4").report["tensors"]
    marked = {name.rpartition(".weight")[0] for name, facts in tensors.items() if facts.get("substituted")}
    assert marked == {ATTENTION, EXPERT.format(3, "gate"), EXPERT.format(7, "down"), "model.norm"}
    plain = k2quant.convert(k2_source, tmp_path / "plain", to="int4").report
    assert not any("substituted" in facts for facts in plain["tensors"].values())
    assert "origin" not in plain


def test_verify_says_that_a_merge_differs_by_design(k2_thinking: Path, tmp_path: Path) -> None:
    """Against its base a merge fails as before, and the message names the check that passes; a report excuses none."""
    adapter(tmp_path / "adapter", on_k2())
    assert CliRunner().invoke(main, arguments(k2_thinking, tmp_path)).exit_code == 0
    done = CliRunner().invoke(main, ["verify", str(k2_thinking), str(tmp_path / "out")])
    assert done.exit_code == 3
    assert "3 of " in done.stderr
    assert "an adapter was merged into it" in done.stderr
    assert f"k2quant verify --checksums {tmp_path / 'out'}" in done.stderr
    report = json.loads((tmp_path / "out" / REPORT).read_text())
    (tmp_path / "out" / REPORT).write_text(json.dumps(report | {"values": None}))
    plain = CliRunner().invoke(main, ["verify", str(k2_thinking), str(tmp_path / "out")])
    assert plain.exit_code == 3
    assert "by design" not in plain.stderr
    (tmp_path / "out" / REPORT).write_text("{")
    assert "by design" not in CliRunner().invoke(main, ["verify", str(k2_thinking), str(tmp_path / "out")]).stderr


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        ({"peft_type": "LOHA"}, UnsupportedFormat, "another method than LoRA.*'LOHA'"),
        ({"use_dora": True}, UnsupportedFormat, "use_dora"),
        ({"bias": "lora_only"}, UnsupportedFormat, "trained biases"),
        ({"fan_in_fan_out": True}, UnsupportedFormat, "fan_in_fan_out"),
        ({"lora_bias": True}, UnsupportedFormat, "lora_bias"),
        ({"layer_replication": [[0, 1], [0, 1]]}, UnsupportedFormat, "layer_replication"),
        ({"use_qalora": True}, UnsupportedFormat, "use_qalora"),
        ({"alora_invocation_tokens": [1]}, UnsupportedFormat, "alora_invocation_tokens"),
        ({"trainable_token_indices": [1]}, UnsupportedFormat, "trainable_token_indices"),
        ({"init_lora_weights": "pissa"}, UnsupportedFormat, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "pissa_niter_4"}, UnsupportedFormat, "changes the base's weights"),
        ({"init_lora_weights": "olora"}, UnsupportedFormat, "changes the base's weights"),
        ({"init_lora_weights": "corda"}, UnsupportedFormat, "changes the base's weights"),
        ({"init_lora_weights": "loftq"}, UnsupportedFormat, "changes the base's weights"),
        ({"init_lora_weights": ["pissa"]}, UnsupportedFormat, "changes the base's weights"),
        ({"use_tomorrows_variant": True}, UnsupportedFormat, "does not know.*use_tomorrows_variant"),
        ({"alpha_pattern": {"(a+)+b": 1}}, UnsupportedFormat, "for ever"),
        ({"alpha_pattern": {"(": 1}}, MalformedFile, "no regular expression"),
        ({"rank_pattern": {"q_a_proj": 8}}, ShapeMismatch, "the rank of `model.layers.1.self_attn.q_a_proj`"),
        ({"rank_pattern": {"q_a_proj": 0}}, MalformedFile, "not what PEFT writes"),
        ({"r": 0}, MalformedFile, "not what PEFT writes"),
        ({"r": 8}, ShapeMismatch, "expected 8, as the config has it"),
        ({"r": None}, MalformedFile, "not what PEFT writes"),
        ({"lora_alpha": "8"}, MalformedFile, "not what PEFT writes"),
        ({"use_rslora": "yes"}, MalformedFile, "not what PEFT writes"),
        ({"modules_to_save": ["lm_head"]}, MissingTensor, "no tensor"),
        ({"modules_to_save": "lm_head"}, MalformedFile, "not what PEFT writes"),
    ],
)
def test_settings_that_mean_something_else_are_refused(
    config: dict[str, Any], error: type[CheckpointError], words: str, k2_source: Path, tmp_path: Path
) -> None:
    """A method, option or value that is no plain LoRA is named, and nothing is written."""
    update = adapter(tmp_path / "adapter", on_k2(), **config)
    with pytest.raises(error, match=words):
        k2quant.merge(k2_source, update, tmp_path / "out", to="int4")
    assert not (tmp_path / "out").exists()


def stack(a: tuple[int, ...], b: tuple[int, ...], name: str = "w1") -> Tensors:
    """Return factors of all experts of the small K2, of some shapes."""
    module = f"model.layers.1.mlp.experts.{name}"
    return {f"{module}.lora_A.weight": torch.ones(a), f"{module}.lora_B.weight": torch.ones(b)}


def without(name: str) -> Tensors:
    """Return the small K2's factors without one tensor."""
    return {key: value for key, value in on_k2().items() if key != name}


@pytest.mark.parametrize(
    ("tensors", "error", "words"),
    [
        (
            pair("model.layers.9.self_attn.q_a_proj", 256, 512),
            MissingTensor,
            "1 of the adapter's parts match no weight",
        ),
        (pair("vision_tower.encoder.blocks.0.wqkv", 64, 32), MissingTensor, "match no weight"),
        (pair("model.layers.9.mlp.experts", 512, 512), MissingTensor, "match no weight"),
        (without(f"{ATTENTION}.lora_B.weight"), MissingTensor, "has no lora_B"),
        (without(f"{ATTENTION}.lora_A.weight"), MissingTensor, "has no lora_A"),
        (pair(ATTENTION, 512, 256), ShapeMismatch, "does not fit"),
        (pair("model.norm", 512, 512), ShapeMismatch, "does not fit"),
        (pair("model.layers.1.mlp.experts", 100, 100, 64), ShapeMismatch, "fused experts"),
        (pair("model.layers.1.mlp.experts", 512, 256, 63), ShapeMismatch, "for each of 16 experts"),
        (
            {f"{ATTENTION}.lora_A.weight": torch.ones(4), f"{ATTENTION}.lora_B.weight": torch.ones(256, 4)},
            ShapeMismatch,
            "a factor",
        ),
        (on_k2() | {f"{ATTENTION}.lora_B.other.weight": torch.ones(256, 4)}, MalformedFile, "stands twice"),
        (on_k2() | pair(f"language_model.{ATTENTION}", 256, 512), MalformedFile, "a second time"),
        (
            on_k2() | {f"{ATTENTION}.lora_magnitude_vector.weight": torch.ones(256)},
            UnsupportedFormat,
            "not part of a plain",
        ),
        (on_k2() | {f"{ATTENTION}.lora_B.bias": torch.ones(256)}, UnsupportedFormat, "not part of a plain"),
        ({"model.embed_tokens.lora_embedding_A": torch.ones(4, 9)}, UnsupportedFormat, "not part of a plain"),
        (on_k2() | {f"{ATTENTION}.weight": torch.ones(256, 512)}, UnsupportedFormat, "modules_to_save"),
        (on_k2() | {"lm_head.weight": torch.ones(2049, 512)}, ShapeMismatch, "cannot replace"),
        (
            on_k2() | {f"{ATTENTION}.lora_A.weight": torch.ones((4, 512), dtype=torch.int8)},
            DtypeMismatch,
            "BF16 or F16 or F32",
        ),
        (
            on_k2() | {f"{ATTENTION}.lora_A.weight": torch.full((4, 512), math.nan)},
            BadValue,
            r"NaN or infinity at \(0, 0\)",
        ),
        (pair(ATTENTION, 256, 512, 5000), ShapeMismatch, "the rank"),
        (stack((15, 4, 512), (15, 256, 4)), ShapeMismatch, r"stacked by .* lora_A \(16, 4, 512\) and .*\(16, 256, 4\)"),
        (stack((16, 4, 512), (15, 256, 4)), ShapeMismatch, r"stacked by .*\(15, 256, 4\)"),
        (stack((1, 4, 512), (1, 256, 4)), ShapeMismatch, r"stacked by .*1 in one of them for all"),
        (stack((16, 8, 512), (16, 256, 8)), ShapeMismatch, "stacked by"),
        (stack((16, 4, 512), (16, 256, 8)), ShapeMismatch, "stacked by"),
        (stack((16, 512, 4), (16, 4, 256)), ShapeMismatch, "stacked by"),
        (stack((16, 4, 256), (16, 512, 4)), ShapeMismatch, "stacked by"),
        (stack((64, 512), (256, 64)), ShapeMismatch, "stacked by"),
        (stack((), ()), ShapeMismatch, "stacked by"),
        (stack((0,), (0,)), ShapeMismatch, "stacked by"),
        (stack((16, 4, 512), (16, 512, 4), "w13"), ShapeMismatch, "a factor is a matrix, unless it is stacked"),
        (stack((16, 4, 512), (16, 256, 4)) | on_k2(), MalformedFile, "a second time"),
        (
            stack((16, 4, 512), (16, 256, 4)) | stack((16, 4, 512), (16, 256, 4), "gate_proj"),
            MalformedFile,
            "a second time",
        ),
        (pair("lm_head", 2048, 512) | pair("model.unembed_tokens", 2048, 512), MalformedFile, "a second time"),
        (pair("model.unembed_tokens", 2047, 512), ShapeMismatch, "does not fit `lm_head.weight`"),
        ({f"{ATTENTION}.lora_down.weight": torch.ones(4, 512)}, UnsupportedFormat, "kohya.*; save or convert"),
        (
            {f"{ATTENTION}.alpha": torch.ones(1), f"{ATTENTION}.lora_down.weight": torch.ones(4, 512)},
            UnsupportedFormat,
            r"\.alpha`.*neither a factor.*kohya.*; save or convert",
        ),
        (on_k2() | {f"{ATTENTION}.alpha": torch.ones(1)}, UnsupportedFormat, "alpha.*modules_to_save names$"),
        ({f"{ATTENTION}.lora_a.weight": torch.ones(4, 512)}, UnsupportedFormat, "as torchtune writes them"),
        ({f"{ATTENTION}.adapter.linear_in.weight": torch.ones(4, 512)}, UnsupportedFormat, "Megatron"),
        (
            on_k2() | {f"{ATTENTION}.lora_A": torch.ones(4, 512)},
            MalformedFile,
            "stands twice",
        ),
    ],
    ids=str,
)
def test_tensors_that_do_not_fit_are_refused(
    tensors: Tensors, error: type[CheckpointError], words: str, k2_source: Path, tmp_path: Path
) -> None:
    """A tensor without a weight or partner, of a wrong shape or value is named with its path; nothing is written."""
    update = adapter(tmp_path / "adapter", tensors)
    with pytest.raises(error, match=words) as caught:
        k2quant.merge(k2_source, update, tmp_path / "out", to="int4")
    assert str(update / WEIGHTS) in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_links_is_merged_where_links_are_followed(k2_source: Path, tmp_path: Path) -> None:
    """The way out that the refusal of a link names is one for the adapter too, not for the base alone.

    The kind of fault: a remedy that does not help.
    """
    kept = adapter(tmp_path / "kept", on_k2())
    (tmp_path / "adapter").mkdir()
    for name in (CONFIG, WEIGHTS):
        (tmp_path / "adapter" / name).symlink_to(kept / name)
    with pytest.raises(UnsafePath, match="`follow_links=True`"):
        k2quant.merge(k2_source, tmp_path / "adapter", tmp_path / "out", to="int4")
    k2quant.merge(k2_source, tmp_path / "adapter", tmp_path / "out", to="int4", follow_links=True)
    k2quant.merge(k2_source, kept, tmp_path / "expected", to="int4")
    assert stored(tmp_path / "out") == stored(tmp_path / "expected")


def test_folders_that_hold_no_adapter_are_refused(k2_source: Path, tmp_path: Path) -> None:
    """No folder, an empty one, a pickle, a link that leaves it, broken JSON or a cut file: an error with a name."""

    def refused(error: type[Exception], words: str) -> None:
        with pytest.raises(error, match=words):
            k2quant.merge(k2_source, tmp_path / "adapter", tmp_path / "out", to="int4")

    refused(CheckpointError, "no such folder")
    (tmp_path / "adapter").mkdir()
    refused(CheckpointError, "no adapter here")
    shutil.rmtree(tmp_path / "adapter")
    update = adapter(tmp_path / "adapter", on_k2())
    (update / WEIGHTS).rename(update / "adapter_model.bin")
    refused(UnsupportedFormat, "pickled weights are never loaded")
    (update / WEIGHTS).symlink_to(k2_source / "model-1-of-3.safetensors")
    refused(CheckpointError, "leaves the folder.*`follow_links=True`")
    (update / WEIGHTS).unlink()
    data = (update / "adapter_model.bin").read_bytes()
    (update / WEIGHTS).write_bytes(data[:-1])
    refused(MalformedFile, "offsets|does not end")
    (update / WEIGHTS).write_bytes(data)
    (update / CONFIG).write_text("{")
    refused(MalformedFile, "not valid JSON")
    (update / CONFIG).write_text('{"peft_type": "LORA"}')
    refused(MalformedFile, "lacks a field")


def test_an_update_that_overflows_is_named(k2_source: Path, tmp_path: Path) -> None:
    """A finite adapter whose product exceeds BF16: the error names weight, place and adapter, and says what to do."""
    tensors = {name: value * 1e30 for name, value in pair(ATTENTION, 256, 512).items()}
    update = adapter(tmp_path / "adapter", tensors)
    said = r"q_a_proj.weight` in .*row 0, column \d+ exceeds bfloat16; is .*lora_alpha"
    with pytest.raises(BadValue, match=said) as caught:
        k2quant.merge(k2_source, update, tmp_path / "out", to="int4")
    assert all(str(folder) in str(caught.value) for folder in (update, k2_source))


def test_the_one_weight_that_overflows_is_named_by_its_place(k2_bf16: Path, tmp_path: Path) -> None:
    """Row and column are the weight's own, below the first band of rows too; of the others none is blamed."""
    tensors = {name: torch.zeros_like(value) for name, value in pair(ATTENTION, 256, 512).items()}
    tensors[f"{ATTENTION}.lora_A.weight"][1, 37] = 1e30
    tensors[f"{ATTENTION}.lora_B.weight"][200, 1] = 1e30
    with pytest.raises(BadValue, match=r"the weight at row 200, column 37 exceeds bfloat16"):
        k2quant.merge(k2_bf16, adapter(tmp_path / "adapter", tensors), tmp_path / "out", to="bf16")


@pytest.mark.parametrize(
    ("value", "update", "said"),
    [
        (math.inf, 0.0, r"non-finite weight 0x7f80 \(inf\) at row 200, column 37"),  # and not: with the update
        (bf16_fraction(0x7F7F), -1e38, r"overflow: .* at row 200, column 37"),
    ],
    ids=["infinite", "too large for INT4 without the update"],
)
def test_a_bad_weight_of_the_base_is_the_base_s_own(
    k2_bf16: Path, tmp_path: Path, value: float, update: float, said: str
) -> None:
    """It is named by its place in the base, and the adapter is not blamed; nothing is written."""
    base = tmp_path / "base"
    shutil.copytree(k2_bf16, base)
    for shard in base.glob("*.safetensors"):
        tensors = load_file(shard)
        if f"{EXPERT.format(3, 'gate')}.weight" in tensors:
            tensors[f"{EXPERT.format(3, 'gate')}.weight"][200, 37] = float(value)
            os.chmod(shard, 0o644)  # noqa: PTH101  a copy of our own
            save_file(tensors, shard)
    factors = {name: torch.zeros_like(value) for name, value in pair(EXPERT.format(3, "gate"), 256, 512).items()}
    factors[f"{EXPERT.format(3, 'gate')}.lora_A.weight"][1, 37] = 1.0
    factors[f"{EXPERT.format(3, 'gate')}.lora_B.weight"][200, 1] = update / 2
    with pytest.raises(BadValue, match=said) as caught:
        k2quant.merge(base, adapter(tmp_path / "adapter", factors), tmp_path / "out", to="int4")
    assert "update" not in str(caught.value)


def test_a_weight_that_stays_float32_is_not_updated(k2_bf16: Path, tmp_path: Path) -> None:
    """Weights that a conversion leaves in F32 take no update; --to bf16, which makes them BF16, does."""
    base = tmp_path / "base"
    shutil.copytree(k2_bf16, base)
    for shard in base.glob("*.safetensors"):
        os.chmod(shard, 0o644)  # noqa: PTH101  a copy of our own
        save_file(
            {name: value.float() if "q_a_proj" in name else value for name, value in load_file(shard).items()}, shard
        )
    update = adapter(tmp_path / "adapter", pair(ATTENTION, 256, 512))
    with pytest.raises(DtypeMismatch, match="merge with `to=bf16`, then convert"):
        k2quant.merge(base, update, tmp_path / "out", to="int4")
    merged = bf16_tensors(k2quant.merge(base, update, tmp_path / "out", to="bf16").folder)
    expected = bf16_tensors(k2quant.merge(k2_bf16, update, tmp_path / "plain", to="bf16").folder)
    assert np.array_equal(merged[ATTENTION], expected[ATTENTION])


def test_int4_scales_of_another_dtype_are_not_rewritten(k2_thinking: Path, tmp_path: Path) -> None:
    """An INT4 weight whose scales are float32 would keep them, so it takes no update as INT4."""
    base = tmp_path / "base"
    shutil.copytree(k2_thinking, base)
    for shard in base.glob("*.safetensors"):
        tensors = load_file(shard)
        save_file({name: value.float() if "weight_scale" in name else value for name, value in tensors.items()}, shard)
    update = adapter(tmp_path / "adapter", on_k2())
    with pytest.raises(DtypeMismatch, match="merge with `to=bf16`, then convert"):
        k2quant.merge(base, update, tmp_path / "out", to="int4")


def test_a_rank_that_is_no_low_rank_is_refused(k2_source: Path, tmp_path: Path) -> None:
    """Memory is bounded by a limit on the rank, whatever the config says."""
    update = adapter(tmp_path / "adapter", pair(ATTENTION, 256, 512, 5000), r=5000)
    with pytest.raises(UnsupportedFormat, match=rf"{WEIGHTS}: the rank, expected at most 4096"):
        k2quant.merge(k2_source, update, tmp_path / "out", to="int4")


def test_destinations_inside_base_or_adapter_are_refused(k2_source: Path, tmp_path: Path) -> None:
    """Neither folder that is read may be written to; the command exits 2."""
    update = adapter(tmp_path / "adapter", on_k2())
    for destination in (k2_source / "out", update / "out", update):
        with pytest.raises(UsageError):
            k2quant.merge(k2_source, update, destination, to="int4")
    done = CliRunner().invoke(main, ["merge", str(k2_source), str(update), str(update), "--to", "int4"])
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)


def test_errors_of_the_adapter_are_one_line(k2_source: Path, tmp_path: Path) -> None:
    """A wrong adapter exits 1 with one line on stderr, a wrong option 2."""
    adapter(tmp_path / "adapter", on_k2(), use_dora=True)
    done = CliRunner().invoke(main, arguments(k2_source, tmp_path))
    assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert CliRunner().invoke(main, ["merge", "a", "b", "c", "--to", "int3"]).exit_code == 2
