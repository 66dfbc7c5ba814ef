"""Conversions of whole checkpoints: scope, layouts of each release, config, index, copies."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import k2quant
from k2quant.checking.comparison import compare
from k2quant.checkpoint.reader import Checkpoint, open_checkpoint
from k2quant.checkpoint.reading import read_tensor
from k2quant.checkpoint.weights import StoredWeight, group_tensors
from k2quant.checkpoint.writing.in_memory import Shard, write_checkpoint
from k2quant.conversion.plan import Options, make_plan
from k2quant.errors import CheckpointError, ShapeMismatch, UnsupportedFormat, UsageError
from k2quant.formats.bf16 import Bf16
from k2quant.formats.format import Format, Scope
from k2quant.formats.fp8 import Fp8
from k2quant.formats.int4 import Int4
from k2quant.nano.demo import K2_CONFIG, matrices

RANDOM = np.random.default_rng(7)
EXPERT = "model.layers.1.mlp.experts.{}.{}_proj"


def bf16(*shape: int) -> tuple[str, Any]:
    """Return random BF16 bits with their dtype, as `write_checkpoint` takes them."""
    values = RANDOM.standard_normal(shape, np.float32) * np.float32(0.02)
    return "BF16", (values.view(np.uint32) >> 16).astype(np.uint16)


def fp8(base: str, *shape: int) -> Shard:
    """Return the tensors of a random block-FP8 weight."""
    weight = k2quant.quantize(bf16(*shape)[1], "fp8")
    return {f"{base}.weight": ("F8_E4M3", weight.codes), f"{base}.weight_scale_inv": ("F32", weight.scale)}


def int4(base: str, *shape: int, shape_dtype: str = "I32") -> Shard:
    """Return the tensors of a random INT4 weight of group 32."""
    weight = k2quant.quantize(bf16(*shape)[1], "int4")
    size = np.array(shape, np.int32 if shape_dtype == "I32" else np.int64)
    return {
        f"{base}.weight_packed": ("I32", weight.codes),
        f"{base}.weight_scale": ("BF16", weight.scale),
        f"{base}.weight_shape": (shape_dtype, size),
    }


def config(**changes: Any) -> dict[str, Any]:
    """Return K2's config without a quantization block, with changes."""
    return {key: value for key, value in K2_CONFIG.items() if key != "quantization_config"} | changes


def weights_of(folder: Path) -> dict[str, StoredWeight]:
    """Return a checkpoint's weights by base."""
    return {weight.base: weight for weight in group_tensors(open_checkpoint(folder).tensors).weights}


def data_of(checkpoint: Checkpoint, name: str) -> bytes:
    """Return a tensor's bytes."""
    return read_tensor(checkpoint, checkpoint.tensors[name])


def output_config(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's config."""
    parsed: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return parsed


def ignored(base: str, ignore: list[str]) -> bool:
    """Tell whether an ignore list covers a module, read as compressed-tensors reads it."""
    return any(re.match(entry[3:], base) if entry.startswith("re:") else entry == base for entry in ignore)


def test_int4_quantises_the_routed_experts_alone(k2_source: Path, tmp_path: Path) -> None:
    """The INT4 default is what Moonshot ships: routed experts INT4, all other projections BF16."""
    k2quant.convert(k2_source, tmp_path / "out", to="int4")
    for base, weight in weights_of(tmp_path / "out").items():
        if weight.format is not None:
            assert weight.format == (Int4() if ".mlp.experts." in base else Bf16()), base


def test_fp8_quantises_every_projection(k2_source: Path, tmp_path: Path) -> None:
    """The FP8 default is what Moonshot ships: every projection, and no router, norm, embedding or head."""
    k2quant.convert(k2_source, tmp_path / "bf16", to="bf16")
    k2quant.convert(tmp_path / "bf16", tmp_path / "out", to="fp8")
    projections = {base for layer in range(3) for base in matrices(layer)}
    found = {base for base, weight in weights_of(tmp_path / "out").items() if isinstance(weight.format, Fp8)}
    assert found == projections


@pytest.mark.parametrize("scope", ["linear", "projections"])
def test_scope_linear_leaves_kv_b_in_bf16_unless_asked_for(k2_source: Path, tmp_path: Path, scope: Scope) -> None:
    """INT4 that no MLA engine can absorb: `linear` takes all projections but `kv_b_proj`, `projections` takes it too.

    The ignore list names what was left, and nothing that is quantised.
    """
    k2quant.convert(k2_source, tmp_path / "out", to="int4", scope=scope)
    found = {base: weight.format for base, weight in weights_of(tmp_path / "out").items()}
    left = [] if scope == "projections" else [f"model.layers.{layer}.self_attn.kv_b_proj" for layer in range(3)]
    quantised = {base for base, stored in found.items() if isinstance(stored, Int4)}
    assert quantised == {base for layer in range(3) for base in matrices(layer)} - set(left)
    assert all(found[base] == Bf16() for base in left)
    ignore = output_config(tmp_path / "out")["quantization_config"]["ignore"]
    assert ignore == ["re:.*lm_head.*", r"re:.*mlp\.gate$", *left]


def test_int4_that_the_source_has_stays_and_is_named(k2_source: Path, tmp_path: Path) -> None:
    """A source whose `kv_b_proj` is INT4 already loses nothing by `linear`: it is copied, and that is said."""
    k2quant.convert(k2_source, tmp_path / "all", to="int4", scope="projections")
    done = k2quant.convert(tmp_path / "all", tmp_path / "again", to="int4", scope="linear")
    name = "model.layers.0.self_attn.kv_b_proj.weight_packed"
    assert data_of(open_checkpoint(done.folder), name) == data_of(open_checkpoint(tmp_path / "all"), name)
    (said,) = done.report["remarks"]
    assert said.startswith("`model.layers.0.self_attn.kv_b_proj` stays quantised as in the source (3 such)")
    asked = k2quant.convert(tmp_path / "all", tmp_path / "asked", to="int4", scope="projections")
    assert asked.report["remarks"] == []


def test_ignored_weights_stay_out_of_scope(k2_source: Path, tmp_path: Path) -> None:
    """A weight that --ignore names comes out as BF16 when it was FP8, and the config lists it by name."""
    k2quant.convert(k2_source, tmp_path / "out", to="int4", ignore=(r"layers\.1\.mlp\.experts",))
    weights = weights_of(tmp_path / "out")
    kept = [base for base in matrices(1) if ".experts." in base]
    assert all(weights[base].format == Bf16() for base in kept)
    assert isinstance(weights["model.layers.2.mlp.experts.3.down_proj"].format, Int4)
    assert set(output_config(tmp_path / "out")["quantization_config"]["ignore"][-len(kept) :]) == set(kept)


def test_fp8_lists_what_engines_would_expect_quantised(k2_source: Path, tmp_path: Path) -> None:
    """Rule 2: the FP8 block equals K2-Instruct's; `modules_to_not_convert` is there only where something was kept."""
    k2quant.convert(k2_source, tmp_path / "bf16", to="bf16")
    k2quant.convert(tmp_path / "bf16", tmp_path / "all", to="fp8")
    assert output_config(tmp_path / "all")["quantization_config"] == K2_CONFIG["quantization_config"]
    k2quant.convert(tmp_path / "bf16", tmp_path / "some", to="fp8", ignore=(r"layers\.0\.self_attn\.o_proj",))
    block = output_config(tmp_path / "some")["quantization_config"]
    assert block == K2_CONFIG["quantization_config"] | {"modules_to_not_convert": ["model.layers.0.self_attn.o_proj"]}


def test_bf16_output_carries_no_quantization_config(k2_source: Path, tmp_path: Path) -> None:
    """Every copy of the block is removed, unknown keys and the order of keys are kept."""
    k2quant.convert(k2_source, tmp_path / "out", to="bf16")
    expected = {key: value for key, value in K2_CONFIG.items() if key != "quantization_config"}
    assert list(output_config(tmp_path / "out").items()) == list(expected.items())


def test_other_files_are_copied(k2_source: Path, tmp_path: Path) -> None:
    """Tokenizer, code and whatever else lies beside the weights goes along, byte for byte; hidden files stay."""
    k2quant.convert(k2_source, tmp_path / "out", to="int4")
    for name in ("generation_config.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (k2_source / name).read_bytes()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in k2_source.iterdir()} | {
        "k2quant_report.json",
        "README.md",
    }


def test_partners_lie_with_their_weight(k2_source: Path, tmp_path: Path) -> None:
    """Scales astray in the source come home: the tensors of a weight lie in one output shard, and shard names stay."""
    k2quant.convert(k2_source, tmp_path / "fp8", to="int4", scope="linear")
    for weight in weights_of(tmp_path / "fp8").values():
        assert len({entry.file for entry in weight.parts.values()}) == 1
    assert {p.name for p in (tmp_path / "fp8").glob("*.safetensors")} == {
        p.name for p in k2_source.glob("*.safetensors")
    }


def test_shard_size_is_kept(k2_source: Path, tmp_path: Path) -> None:
    """`--shard-size` cuts the output into numbered shards, none larger in data unless one weight alone is."""
    k2quant.convert(k2_source, tmp_path / "out", to="int4", shard_size=3_000_000)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files == [f"model-{n:05}-of-{len(files):05}.safetensors" for n in range(1, len(files) + 1)]
    checkpoint = open_checkpoint(tmp_path / "out")
    for shard in checkpoint.shards.values():
        assert sum(entry.nbytes for entry in shard.tensors.values()) <= 3_000_000
    assert all(f.relation in {"bit-equal", "codes equal"} for f in compare_with_default(k2_source, tmp_path))


def test_shards_are_filled_to_the_last_byte(tmp_path: Path) -> None:
    """A weight that just fits into what is left of a shard goes there; with a byte less it begins the next."""
    shard: Shard = {f"{EXPERT.format(number, 'up')}.weight": bf16(64, 128) for number in range(3)}
    write_checkpoint(tmp_path / "src", {"model.safetensors": shard}, config())
    source = open_checkpoint(tmp_path / "src")
    nbytes = 64 * 128 // 2 + 64 * 4 * 2 + 2 * 4  # of each as INT4: codes, scales, shape
    for shard_size, counts in ((2 * nbytes, [2, 1]), (2 * nbytes - 1, [1, 1, 1])):
        plan = make_plan(source, Options(to="int4", shard_size=shard_size))
        assert [len(shard.jobs) for shard in plan.shards] == counts


def compare_with_default(source: Path, folder: Path) -> list[Any]:
    """Compare `folder/out` with the same conversion into the source's shards."""
    k2quant.convert(source, folder / "default", to="int4")
    return compare(folder / "default", folder / "out", workers=1)


@pytest.mark.parametrize("to", ["bf16", "fp8", "int4"])
def test_result_does_not_depend_on_threads(k2_source: Path, tmp_path: Path, to: k2quant.FormatName) -> None:
    """One worker and four workers write the same bytes and note the same figures."""
    reports = [k2quant.convert(k2_source, tmp_path / str(n), to=to, workers=n).report["tensors"] for n in (1, 4)]
    assert reports[0] == reports[1]
    for path in (tmp_path / "1").glob("model*"):
        assert path.read_bytes() == (tmp_path / "4" / path.name).read_bytes()


def k26(folder: Path, *, vision: bool = True) -> None:
    """Write a checkpoint in K2.6's layout: prefix, vision, INT4 experts, block nested in text_config."""
    text: Shard = {
        "language_model.model.embed_tokens.weight": bf16(256, 128),
        "language_model.lm_head.weight": bf16(256, 128),
        "language_model.model.layers.0.mlp.gate_proj.weight": bf16(128, 128),
        "language_model.model.layers.1.self_attn.o_proj.weight": bf16(128, 128),
        "language_model.model.layers.1.mlp.gate.weight": bf16(4, 128),
        "language_model.model.layers.1.mlp.gate.e_score_correction_bias": ("F32", np.ones(4, np.float32)),
        "language_model.model.layers.1.mlp.shared_experts.up_proj.weight": bf16(64, 128),
    }
    for expert in range(2):
        for name, shape in {"gate": (64, 128), "up": (64, 128), "down": (128, 64)}.items():
            text |= int4("language_model." + EXPERT.format(expert, name), *shape)
    shards = {"model-00001-of-000002.safetensors": text}
    if vision:
        shards["model-00002-of-000002.safetensors"] = {
            "vision_tower.encoder.blocks.0.mlp.fc0.weight": bf16(64, 32),
            "vision_tower.encoder.blocks.0.mlp.fc0.bias": bf16(64),
            "vision_tower.patch_embed.proj.weight": bf16(32, 3, 4, 4),
            "mm_projector.proj.0.weight": bf16(64, 64),
        }
    write_checkpoint(folder, shards, {"model_type": "kimi_k25", "text_config": config(quantization_config=INT4_BLOCK)})


INT4_BLOCK: dict[str, Any] = {
    "config_groups": {
        "group_0": {
            "input_activations": None,
            "output_activations": None,
            "targets": ["Linear"],
            "weights": {
                "actorder": None,
                "block_structure": None,
                "dynamic": False,
                "group_size": 32,
                "num_bits": 4,
                "observer": "minmax",
                "observer_kwargs": {},
                "strategy": "group",
                "symmetric": True,
                "type": "int",
            },
        }
    },
    "format": "pack-quantized",
    "ignore": [
        "re:.*self_attn.*",
        "re:.*shared_experts.*",
        "re:.*mlp\\.(gate|up|gate_up|down)_proj.*",
        "re:.*lm_head.*",
        "re:vision_tower.*",
        "re:mm_projector.*",
    ],
    "kv_cache_scheme": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
}
"""The block of Kimi-K2.6, as formats.md has it."""


def test_k26_goes_to_bf16_and_comes_back_unchanged(tmp_path: Path) -> None:
    """Rule 4 on a K2.6 layout: INT4 -> BF16 -> INT4 gives every byte back, block and all, in text_config alone."""
    k26(tmp_path / "src")
    k2quant.convert(tmp_path / "src", tmp_path / "bf16", to="bf16")
    assert "quantization_config" not in json.dumps(output_config(tmp_path / "bf16"))
    k2quant.convert(tmp_path / "bf16", tmp_path / "int4", to="int4")
    assert all(
        f.relation in {"bit-equal", "codes equal"} for f in compare(tmp_path / "src", tmp_path / "int4", workers=1)
    )
    result = output_config(tmp_path / "int4")
    assert "quantization_config" not in result
    block = result["text_config"]["quantization_config"]
    assert block == INT4_BLOCK | {"ignore": [*INT4_BLOCK["ignore"], "re:.*mlp\\.gate$"]}


def test_k26_goes_to_fp8_with_vision_kept(tmp_path: Path) -> None:
    """Vision and projector stay BF16 and are named in `modules_to_not_convert`, where engines would quantise them."""
    k26(tmp_path / "src")
    k2quant.convert(tmp_path / "src", tmp_path / "fp8", to="fp8")
    weights = weights_of(tmp_path / "fp8")
    assert isinstance(weights["language_model.model.layers.1.self_attn.o_proj"].format, Fp8)
    assert isinstance(weights["language_model." + EXPERT.format(0, "up")].format, Fp8)
    assert weights["language_model.model.layers.1.mlp.gate"].format == Bf16()
    kept = output_config(tmp_path / "fp8")["text_config"]["quantization_config"]["modules_to_not_convert"]
    assert kept == ["vision_tower.encoder.blocks.0.mlp.fc0", "mm_projector.proj.0"]
    first, second = open_checkpoint(tmp_path / "src"), open_checkpoint(tmp_path / "fp8")
    for name in first.tensors:
        if name.startswith(("vision_tower.", "mm_projector.")):
            assert data_of(first, name) == data_of(second, name)


@pytest.mark.parametrize("pattern", INT4_BLOCK["ignore"])
def test_every_k26_pattern_earns_its_place(tmp_path: Path, pattern: str) -> None:
    """The ignore list of an output names nothing that is not there."""
    k26(tmp_path / "src", vision=False)
    k2quant.convert(tmp_path / "src", tmp_path / "int4", to="int4")
    ignore = output_config(tmp_path / "int4")["text_config"]["quantization_config"]["ignore"]
    assert (pattern in ignore) != ("vision" in pattern or "projector" in pattern)


def test_ignore_list_covers_what_is_kept_and_nothing_else(tmp_path: Path) -> None:
    """Read as compressed-tensors reads it, the list matches every matrix that stayed BF16 and no expert."""
    k26(tmp_path / "src")
    k2quant.convert(tmp_path / "src", tmp_path / "int4", to="int4")
    ignore = output_config(tmp_path / "int4")["text_config"]["quantization_config"]["ignore"]
    for base, weight in weights_of(tmp_path / "int4").items():
        if len(weight.shape) == 2 and not base.endswith("embed_tokens"):
            assert ignored(base, ignore) == (not isinstance(weight.format, Int4)), base


@pytest.mark.parametrize("part", [r"\.(q|kv)_a_proj", r"shared_experts\.(gate|up)_proj", r"layers\.0\.mlp\.down_proj"])
def test_ignore_list_spares_what_is_quantised_beside_what_is_kept(k2_source: Path, tmp_path: Path, part: str) -> None:
    """Where --ignore keeps a part of attention or of an MLP, the list covers that part and no `weight_packed`."""
    k2quant.convert(k2_source, tmp_path / "out", to="int4", scope="linear", ignore=(part,))
    ignore = output_config(tmp_path / "out")["quantization_config"]["ignore"]
    tensors = open_checkpoint(tmp_path / "out").tensors
    packed = [name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed")]
    matrices_kept = [
        name.removesuffix(".weight")
        for name, entry in tensors.items()
        if name.endswith(".weight") and len(entry.shape) == 2
    ]
    assert any(re.search(part, base) for base in matrices_kept)
    assert packed
    assert [base for base in packed if ignored(base, ignore)] == []
    assert [base for base in matrices_kept if not ignored(base, ignore)] == ["model.embed_tokens"]


def test_mtp_layer_of_deepseek_is_converted_like_any_other(tmp_path: Path) -> None:
    """DeepSeek-V3's extra layer: its experts are quantised, `eh_proj`, its norms, embedding and head are copied."""
    mtp = "model.layers.61."
    shard: Shard = {
        **fp8(f"{mtp}mlp.experts.255.up_proj", 128, 256),
        **fp8(f"{mtp}self_attn.o_proj", 256, 128),
        f"{mtp}eh_proj.weight": bf16(128, 256),
        f"{mtp}enorm.weight": bf16(128),
        f"{mtp}embed_tokens.weight": bf16(64, 128),
        f"{mtp}shared_head.head.weight": bf16(64, 128),
    }
    block = K2_CONFIG["quantization_config"]
    write_checkpoint(
        tmp_path / "src", {"model-a.safetensors": shard}, config(quantization_config=block, model_type="deepseek_v3")
    )
    k2quant.convert(tmp_path / "src", tmp_path / "int4", to="int4")
    weights = weights_of(tmp_path / "int4")
    assert isinstance(weights[f"{mtp}mlp.experts.255.up_proj"].format, Int4)
    assert weights[f"{mtp}self_attn.o_proj"].format == Bf16()
    ignore = output_config(tmp_path / "int4")["quantization_config"]["ignore"]
    assert {r"re:.*eh_proj$", r"re:.*shared_head\.head$"} <= set(ignore)
    k2quant.convert(tmp_path / "int4", tmp_path / "fp8", to="fp8")
    assert weights_of(tmp_path / "fp8")[f"{mtp}eh_proj"].format == Bf16()


def test_mixed_source_is_read_by_its_suffixes(tmp_path: Path) -> None:
    """INT4 experts, FP8 attention and BF16 dense in one folder become one format each, and verify agrees."""
    shard: Shard = {
        **int4(EXPERT.format(0, "up"), 64, 128),
        **fp8(EXPERT.format(1, "up"), 64, 128),
        f"{EXPERT.format(2, 'up')}.weight": bf16(64, 128),
        **fp8("model.layers.1.self_attn.kv_a_proj_with_mqa", 160, 128),
    }
    write_checkpoint(tmp_path / "src", {"model.safetensors": shard}, config())
    expected: dict[k2quant.FormatName, Format] = {"int4": Int4(), "fp8": Fp8(), "bf16": Bf16()}
    for to, layout in expected.items():
        k2quant.convert(tmp_path / "src", tmp_path / to, to=to)
        weights = weights_of(tmp_path / to)
        assert {weights[EXPERT.format(n, "up")].format for n in range(3)} == {layout}
        assert k2quant.verify(tmp_path / "src", tmp_path / to).failures == {}
    attention = weights_of(tmp_path / "int4")["model.layers.1.self_attn.kv_a_proj_with_mqa"]
    assert attention.format == Bf16()


def test_weights_in_the_target_format_are_copied_byte_for_byte(tmp_path: Path) -> None:
    """Nothing is re-encoded: odd but valid codes and an int64 `weight_shape` come through as they are."""
    odd = int4(EXPERT.format(0, "up"), 64, 128, shape_dtype="I64")
    odd[f"{EXPERT.format(0, 'up')}.weight_packed"][1][:] = 0x01234567  # a group without a code 7 or -7
    shard = {**odd, f"{EXPERT.format(1, 'up')}.weight": bf16(64, 128)}
    write_checkpoint(tmp_path / "src", {"model.safetensors": shard}, config(quantization_config=INT4_BLOCK))
    k2quant.convert(tmp_path / "src", tmp_path / "out", to="int4")
    first, second = open_checkpoint(tmp_path / "src"), open_checkpoint(tmp_path / "out")
    for name in odd:
        assert data_of(first, name) == data_of(second, name)
        assert first.tensors[name].dtype == second.tensors[name].dtype


@pytest.mark.parametrize(("group", "dtype"), [(64, "BF16"), (128, "F32"), (16, "F16")])
def test_symmetric_int4_of_any_group_size_is_read(tmp_path: Path, group: int, dtype: str) -> None:
    """INT4 of another group size goes to BF16 as code * scale, to FP8 too, and to INT4 only by way of those."""
    base = EXPERT.format(0, "up")
    shard = int4(base, 64, 128)
    kinds = {"BF16": np.uint16, "F32": np.float32, "F16": np.float16}
    scale = np.full((64, 128 // group), 0x3C00 if dtype == "BF16" else 2.0**-7).astype(kinds[dtype])
    shard[f"{base}.weight_scale"] = (dtype, scale)
    block = json.loads(json.dumps(INT4_BLOCK))
    block["config_groups"]["group_0"]["weights"]["group_size"] = group
    write_checkpoint(tmp_path / "src", {"model.safetensors": shard}, config(quantization_config=block))
    k2quant.convert(tmp_path / "src", tmp_path / "bf16", to="bf16")
    out = open_checkpoint(tmp_path / "bf16")
    bits = np.frombuffer(data_of(out, f"{base}.weight"), np.uint16)
    words = shard[f"{base}.weight_packed"][1].view(np.uint32)
    codes = ((words[..., None] >> np.arange(0, 32, 4, dtype=np.uint32)) & 15).astype(np.int64).reshape(-1) - 8
    assert np.array_equal((bits.astype(np.uint32) << 16).view(np.float32), codes.astype(np.float32) * 2.0**-7)
    k2quant.convert(tmp_path / "src", tmp_path / "fp8", to="fp8")
    with pytest.raises(UnsupportedFormat, match="group size"):
        k2quant.convert(tmp_path / "src", tmp_path / "int4", to="int4")


def test_fused_experts_are_written_one_by_one(tmp_path: Path) -> None:
    """`gate_up_proj` `[E, 2I, H]` and `down_proj` `[E, H, I]` become gate, up and down of each expert."""
    gate_up, down = bf16(3, 128, 96), bf16(3, 96, 64)
    prefix = "model.layers.1.mlp.experts."
    shard: Shard = {f"{prefix}gate_up_proj": gate_up, f"{prefix}down_proj": down}
    write_checkpoint(tmp_path / "src", {"model.safetensors": shard}, config())
    k2quant.convert(tmp_path / "src", tmp_path / "bf16", to="bf16")
    out = open_checkpoint(tmp_path / "bf16")
    assert len(out.tensors) == 9
    for expert in range(3):
        assert data_of(out, f"{prefix}{expert}.gate_proj.weight") == gate_up[1][expert, :64].tobytes()
        assert data_of(out, f"{prefix}{expert}.up_proj.weight") == gate_up[1][expert, 64:].tobytes()
        assert data_of(out, f"{prefix}{expert}.down_proj.weight") == down[1][expert].tobytes()
    k2quant.convert(tmp_path / "src", tmp_path / "int4", to="int4")
    assert k2quant.verify(tmp_path / "src", tmp_path / "int4").passed


def test_half_precision_source_is_rounded_to_bf16_first(tmp_path: Path) -> None:
    """An F16 or F32 weight in scope is quantised from its BF16 value; out of scope it is copied."""
    values = RANDOM.standard_normal((64, 128)).astype(np.float32) * np.float32(0.02)
    for kind, array in (("F32", values), ("F16", values.astype(np.float16))):
        source = tmp_path / kind
        shard: Shard = {f"{EXPERT.format(0, 'up')}.weight": (kind, array), "lm_head.weight": (kind, array)}
        write_checkpoint(source, {"model.safetensors": shard}, config())
        k2quant.convert(source, tmp_path / f"{kind}-int4", to="int4")
        k2quant.convert(source, tmp_path / f"{kind}-bf16", to="bf16")
        k2quant.convert(tmp_path / f"{kind}-bf16", tmp_path / f"{kind}-via", to="int4")
        direct, via = open_checkpoint(tmp_path / f"{kind}-int4"), open_checkpoint(tmp_path / f"{kind}-via")
        for suffix in ("weight_packed", "weight_scale"):
            name = f"{EXPERT.format(0, 'up')}.{suffix}"
            assert data_of(direct, name) == data_of(via, name)
        assert direct.tensors["lm_head.weight"].dtype == kind


def test_width_that_32_does_not_divide_cannot_be_int4(tmp_path: Path) -> None:
    """The error says so, names the tensor and the remedy; with --ignore and --allow-split the rest converts."""
    shard: Shard = {
        f"{EXPERT.format(0, 'up')}.weight": bf16(64, 80),
        f"{EXPERT.format(1, 'up')}.weight": bf16(64, 96),
    }
    write_checkpoint(tmp_path / "src", {"model.safetensors": shard}, config())
    with pytest.raises(ShapeMismatch, match=r"experts\.0\.up_proj.*32 divides.*`ignore=`"):
        k2quant.convert(tmp_path / "src", tmp_path / "out", to="int4")
    assert not (tmp_path / "out").exists()
    k2quant.convert(tmp_path / "src", tmp_path / "out", to="int4", ignore=(r"experts\.0\.",), allow_split=True)


def test_options_without_meaning_are_refused(k2_source: Path, tmp_path: Path) -> None:
    """A scope for BF16, a grid for FP8, a broken expression and a scope that holds nothing are errors, not silence."""
    with pytest.raises(UsageError, match="`scope=`"):
        k2quant.convert(k2_source, tmp_path / "out", to="bf16", scope="experts")
    with pytest.raises(UsageError, match="`grid=`"):
        k2quant.convert(k2_source, tmp_path / "out", to="fp8", grid="moonshot")
    with pytest.raises(UsageError, match="regular expression"):
        k2quant.convert(k2_source, tmp_path / "out", to="fp8", ignore=("(",))
    with pytest.raises(CheckpointError, match="no weight is in scope"):
        k2quant.convert(k2_source, tmp_path / "out", to="fp8", ignore=("proj",))


def test_report_names_options_source_errors_and_checksums(k2_source: Path, tmp_path: Path) -> None:
    """The report holds what a question about a model needs: version, options, fingerprint, figures, checksums."""
    report = k2quant.convert(k2_source, tmp_path / "out", to="int4", sha256=True).report
    assert json.loads((tmp_path / "out" / "k2quant_report.json").read_text(encoding="utf-8")) == report
    assert report["options"]["to"] == "int4"
    assert report["source"]["shards"].keys() == {path.name for path in k2_source.glob("*.safetensors")}
    expert = report["tensors"][f"{EXPERT.format(0, 'up')}.weight_packed"]
    assert expert["crc32"].keys() == {"weight_packed", "weight_scale", "weight_shape"}
    assert expert["figures"]["count"] == 256 * 512
    assert 0 < expert["figures"]["error"] < expert["figures"]["energy"] / 50
    assert all("sha256" in facts for facts in report["files"].values())
    assert str(tmp_path) not in json.dumps(report)


def test_values_that_do_not_exist_are_refused(k2_source: Path, tmp_path: Path) -> None:
    """From Python too, a format, grid, scope, size or list of patterns that makes no sense is an error, not a guess."""
    wrong: list[dict[str, Any]] = [
        {"to": "foo"},
        {"to": "int4", "grid": "foo"},
        {"to": "int4", "scope": "all"},
        {"to": "int4", "shard_size": 0},
        {"to": "int4", "ignore": "experts"},
        {"to": "int4", "allow_split": 1},
        {"to": "int4", "device": "tpu"},
        {"to": "int4", "workers": 100_000},
    ]
    for options in wrong:
        with pytest.raises(UsageError):
            k2quant.convert(k2_source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_quantised_output_needs_a_config(tmp_path: Path) -> None:
    """Without config.json nothing says how to load a quantised checkpoint, so that none is written; BF16 is."""
    shard: Shard = {f"{EXPERT.format(0, 'up')}.weight": bf16(64, 96)}
    write_checkpoint(tmp_path / "src", {"model.safetensors": shard}, None)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        k2quant.convert(tmp_path / "src", tmp_path / "out", to="int4")
    k2quant.convert(tmp_path / "src", tmp_path / "out", to="bf16")


@pytest.mark.parametrize(
    "change",
    [{"strategy": "channel"}, {"strategy": "tensor"}, {"group_size": 64}, {"num_bits": 8}, {"symmetric": False}],
    ids=str,
)
def test_config_that_contradicts_the_tensors_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    """A quantization block that claims another scheme than the tensors have is refused."""
    block = json.loads(json.dumps(INT4_BLOCK))
    block["config_groups"]["group_0"]["weights"] |= change
    shard = int4(EXPERT.format(0, "up"), 64, 128)
    write_checkpoint(tmp_path / "src", {"model.safetensors": shard}, config(quantization_config=block))
    with pytest.raises(CheckpointError):
        k2quant.convert(tmp_path / "src", tmp_path / "out", to="bf16")


def test_other_weights_are_left_out_and_named(k2_source: Path, tmp_path: Path) -> None:
    """Weights that the index does not name are not copied, and the report says so; other files are, folders and all."""
    shutil.copytree(k2_source, tmp_path / "src")
    for name in ("pytorch_model.bin", "extra.safetensors", "vocab.bin", "sub/config.json"):
        (tmp_path / "src" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "src" / name).write_text("x")
    report = k2quant.convert(tmp_path / "src", tmp_path / "out", to="int4").report
    assert report["left_out"] == ["extra.safetensors", "pytorch_model.bin"]
    assert (tmp_path / "out" / "vocab.bin").exists()
    assert (tmp_path / "out" / "sub" / "config.json").read_text() == "x"
