"""An export for mlx-lm holds what mlx-lm's own loading makes of a checkpoint, byte for byte."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from k2quant.checkpoint.reader import CONFIG, INDEX, open_checkpoint
from k2quant.checkpoint.writing.in_memory import Shard, write_checkpoint
from k2quant.errors import BadValue, MalformedFile, MissingTensor, ShapeMismatch, UnsupportedFormat, UsageError
from k2quant.exports import export_mlx
from k2quant.formats.known import FormatName
from k2quant.kernels.codecs.values import bf16_to_float
from k2quant.nano.demo import EXPERTS, HEADS, KV_RANK, NOPE, VALUE
from rewritten import tensors_of

UP = "model.layers.1.mlp.switch_mlp.up_proj"


def changed(source: Path, folder: Path, change: Any, config: Mapping[str, Any] | None = None) -> Path:
    """Write a checkpoint anew, with other tensors or another config; None takes a key away."""
    tensors: Shard = {
        name: (dtype, array.copy()) for name, (dtype, array) in tensors_of(open_checkpoint(source)).items()
    }
    change(tensors)
    content = json.loads((source / CONFIG).read_text()) | dict(config or {})
    write_checkpoint(folder, {"model.safetensors": tensors}, {k: v for k, v in content.items() if v is not None})
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    """Read a config.json."""
    content: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    return content


# --- what comes out -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["int4", "mxfp4", "nvfp4", "k25"])
def test_each_tensor_is_what_mlx_lm_has_in_memory(
    k2_thinking: Path, k25: Path, fp4: Mapping[str, Path], tmp_path: Path, seen: Any, golden: Any, name: str
) -> None:
    """Names, dtypes, shapes and bytes; of INT4 those that mlx-lm's own loading makes of the native checkpoint."""
    source = {"int4": k2_thinking, "k25": k25, **fp4}[name]
    done = export_mlx(source, tmp_path / "out")
    assert {tensor: each.facts for tensor, each in seen(done.folder).items()} == golden[name]["parameters"]
    homes = json.loads((done.folder / INDEX).read_text())["weight_map"]
    assert homes.keys() == golden[name]["parameters"].keys()
    assert all((done.folder / file).is_file() for file in homes.values())
    # What mlx-lm did with these very bytes: it loads no native FP4, and where it loads the source it is the same model.
    assert (golden[name]["native"] is None) == (name in {"int4", "k25"})
    assert golden[name].get("parameters equal", True) is True
    assert golden[name].get("tokens equal", golden["tokens"]) == golden["tokens"] == 200
    assert (golden[name]["weights unlike k2quant's"], golden[name]["tokens equal to bf16"]) == (0, 200)


def test_mlx_gives_the_values_of_mxfp4_that_k2quant_gives(fp4: Mapping[str, Path], tmp_path: Path, golden: Any) -> None:
    """Each stack, dequantised by mlx in float32; MXFP4's values are all values of BF16."""
    from k2quant.conversion.convert import convert

    plain = tensors_of(open_checkpoint(convert(fp4["mxfp4"], tmp_path / "bf16", to="bf16").folder))
    assert len(golden["mxfp4"]["values"]) == 6
    for name, checksum in golden["mxfp4"]["values"].items():
        before, part = name.split(".switch_mlp.")
        stack = [plain[f"{before}.experts.{number}.{part}.weight"][1] for number in range(EXPERTS)]
        values = np.stack([bf16_to_float(each) for each in stack])
        assert f"{zlib.crc32(values.tobytes()):08x}" == checksum


def test_int4_is_the_same_bytes_and_a_bias(k2_thinking: Path, tmp_path: Path, seen: Any) -> None:
    """Words and scales as they are, an expert behind the other; the bias is -8 times the scale."""
    found, tensors = seen(export_mlx(k2_thinking, tmp_path / "out").folder), tensors_of(open_checkpoint(k2_thinking))
    experts = [f"model.layers.1.mlp.experts.{number}.up_proj" for number in range(EXPERTS)]
    for ours, theirs in (("weight_packed", "weight"), ("weight_scale", "scales")):
        assert found[f"{UP}.{theirs}"].data == b"".join(tensors[f"{each}.{ours}"][1].tobytes() for each in experts)
    scales, biases = (np.frombuffer(found[f"{UP}.{name}"].data, np.uint16) for name in ("scales", "biases"))
    assert np.array_equal(bf16_to_float(biases), -8 * bf16_to_float(scales))


def test_the_scale_of_a_whole_is_in_mlx_s_units(fp4: Mapping[str, Path], tmp_path: Path, seen: Any) -> None:
    """Times 448 * 6, by which mlx divides it; of compressed-tensors, whose scale divides, the inverse is taken."""
    for name, suffix in (("nvfp4", "weight_scale_2"), ("nvfp4 divided", "weight_global_scale")):
        folder = export_mlx(fp4[name], tmp_path / name).folder
        found, tensors = seen(folder), tensors_of(open_checkpoint(fp4[name]))
        base = "model.layers.1.mlp.experts.{}.up_proj." + suffix
        scales = np.array([tensors[base.format(number)][1].reshape(()) for number in range(EXPERTS)], np.float32)
        wanted = (scales if name == "nvfp4" else 1 / scales) * np.float32(2688)
        assert np.array_equal(np.frombuffer(found[f"{UP}.global_scale"].data, np.float32), wanted)
        said = config_of(folder)["quantization"]
        mode = {"group_size": 16, "bits": 4, "mode": "nvfp4"}
        assert {key: said[key] for key in mode} == mode
        assert said[UP] == mode | {"global_scale": True}
        assert len(said) == 3 + 6


def test_kv_b_is_two_tensors(k2_source: Path, k2_bf16: Path, tmp_path: Path, seen: Any) -> None:
    """Each head's keys transposed, each head's values, decoded from FP8 or as they were."""
    heads = tensors_of(open_checkpoint(k2_bf16))["model.layers.2.self_attn.kv_b_proj.weight"][1]
    heads = heads.reshape(HEADS, NOPE + VALUE, KV_RANK)
    for source in (k2_source, k2_bf16):
        found = seen(export_mlx(source, tmp_path / source.name).folder)
        keys, values = (found[f"model.layers.2.self_attn.{half}.weight"] for half in ("embed_q", "unembed_out"))
        assert keys.data == heads[:, :NOPE].transpose(0, 2, 1).tobytes()
        assert values.data == heads[:, NOPE:].tobytes()
        assert (keys.shape, values.shape) == ((HEADS, KV_RANK, NOPE), (HEADS, VALUE, KV_RANK))
        assert "quantization" not in config_of(tmp_path / source.name)


def test_floats_stay_as_wide_as_they_are(k2_bf16: Path, tmp_path: Path, seen: Any) -> None:
    """F32 and F16 are not rounded, in halves of kv_b_proj neither."""
    random = np.random.default_rng(0)
    odd: dict[str, Any] = {}

    def change(tensors: Shard) -> None:
        for name, kind, dtype in (("kv_b_proj", "F32", np.float32), ("o_proj", "F16", np.float16)):
            key = f"model.layers.1.self_attn.{name}.weight"
            odd[name] = random.standard_normal(tensors[key][1].shape).astype(dtype)
            tensors[key] = kind, odd[name]

    found = seen(export_mlx(changed(k2_bf16, tmp_path / "k2", change), tmp_path / "out").folder)
    heads = odd["kv_b_proj"].reshape(HEADS, NOPE + VALUE, KV_RANK)
    assert found["model.layers.1.self_attn.unembed_out.weight"].data == heads[:, NOPE:].tobytes()
    assert found["model.layers.1.self_attn.embed_q.weight"].data == heads[:, :NOPE].transpose(0, 2, 1).tobytes()
    assert found["model.layers.1.self_attn.o_proj.weight"].data == odd["o_proj"].tobytes()


def test_the_config_says_the_mode_and_nothing_else_of_quantization(
    k2_thinking: Path, k25: Path, tmp_path: Path
) -> None:
    """At the top level, where mlx-lm looks; every other key is the source's, but for the type of a K2 without code."""
    for source in (k2_thinking, k25):
        found, before = config_of(export_mlx(source, tmp_path / source.name).folder), config_of(source)
        assert found.pop("quantization") == {"group_size": 32, "bits": 4, "mode": "affine"}
        for home in (before, before.get("text_config", {})):
            home.pop("quantization_config", None)
        if source == k2_thinking:
            before["model_type"] = "deepseek_v3"
        assert found == before


def test_a_k2_that_brings_its_own_code_keeps_its_name(k2_bf16: Path, tmp_path: Path) -> None:
    """Its classes know it. Without any, transformers does not, and mlx-lm would have no tokenizer."""
    code = {"auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}}
    for more, kind in (code, "kimi_k2"), ({}, "deepseek_v3"):
        source = changed(k2_bf16, tmp_path / kind / "k2", lambda _: None, more)
        assert config_of(export_mlx(source, tmp_path / kind / "out").folder)["model_type"] == kind


@pytest.mark.parametrize(
    "home",
    [
        {"rope_theta": None, "rope_scaling": {"type": "yarn", "factor": 32.0, "rope_theta": 300.0}},
        {"rope_theta": None, "rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": 300.0}},
    ],
    ids=["inside of rope_scaling", "in rope_parameters"],
)
def test_what_turns_positions_stands_where_mlx_lm_reads_it(k2_bf16: Path, tmp_path: Path, home: dict[str, Any]) -> None:
    """It takes 10000 for a `rope_theta` that is not at the top level, and knows no `rope_parameters`."""
    source = changed(k2_bf16, tmp_path / "k2", lambda _: None, home)
    found = config_of(export_mlx(source, tmp_path / "out").folder)
    assert found["rope_theta"] == 300.0
    assert found["rope_scaling"] == (home["rope_scaling"] or home["rope_parameters"])


def test_what_is_not_written_is_named(k25: Path, k2_thinking: Path, tmp_path: Path, seen: Any) -> None:
    """The vision tower, frequencies, layers behind the last, and scales of activations, a remark each."""
    ones = np.full(1, 0x3F80, np.uint16)

    def change(tensors: Shard) -> None:
        tensors["model.layers.3.enorm.weight"] = "BF16", np.full(512, 0x3F80, np.uint16)
        tensors["model.layers.1.self_attn.k_scale"] = "BF16", ones

    plain, vision = seen(export_mlx(k2_thinking, tmp_path / "plain").folder), export_mlx(k25, tmp_path / "k25")
    done = export_mlx(changed(k2_thinking, tmp_path / "k2", change), tmp_path / "out")
    assert seen(done.folder) == plain
    said = "\n".join(done.report["remarks"])
    assert "1 tensor of layers behind num_hidden_layers" in said
    assert "1 tensor of activations or of the KV cache" in said
    assert "3 tensors that mlx-lm makes itself" in said
    assert any("not written: 2 tensors of the vision tower" in each for each in vision.report["remarks"])


def test_a_layer_whose_codes_mlx_lm_cannot_keep_becomes_bf16_and_is_named(
    k2_bf16: Path, tmp_path: Path, seen: Any
) -> None:
    """NVFP4 outside of experts, and INT4 in kv_b_proj; the others of the layer keep theirs."""
    from k2quant.conversion.convert import convert

    cases: tuple[tuple[FormatName, bool], ...] = (("nvfp4", False), ("int4", True))
    for to, kept in cases:
        source = convert(k2_bf16, tmp_path / to, to=to, scope="projections").folder
        done = export_mlx(source, tmp_path / f"{to}-mlx")
        found, plain = (
            seen(done.folder),
            tensors_of(open_checkpoint(convert(source, tmp_path / f"{to}-b", to="bf16").folder)),
        )
        assert ("model.layers.1.self_attn.o_proj.scales" in found) == kept
        if not kept:
            bits = plain["model.layers.1.self_attn.o_proj.weight"][1]
            assert found["model.layers.1.self_attn.o_proj.weight"].data == bits.tobytes()
            assert "beside experts alone" in done.report["fallback"]["model.layers.1.self_attn.o_proj.weight"]
        halves = plain["model.layers.1.self_attn.kv_b_proj.weight"][1].reshape(HEADS, NOPE + VALUE, KV_RANK)
        assert found["model.layers.1.self_attn.unembed_out.weight"].data == halves[:, NOPE:].tobytes()
        assert "two halves" in done.report["fallback"]["model.layers.1.self_attn.embed_q.weight"]
        assert f"{UP}.scales" in found


def test_shards_are_as_full_as_they_may_be(k2_thinking: Path, tmp_path: Path, seen: Any) -> None:
    """A size that is asked for is kept, but for a stack that is larger; nothing else differs."""
    one = seen(export_mlx(k2_thinking, tmp_path / "one").folder)
    done = export_mlx(k2_thinking, tmp_path / "several", shard_size=1_000_000)
    names = sorted(path.name for path in done.folder.glob("model-*"))
    assert names == [f"model-{number:05}-of-{len(names):05}.safetensors" for number in range(1, len(names) + 1)]
    assert len(names) > 5
    assert seen(done.folder) == one


@pytest.mark.parametrize("workers", [1, 3])
def test_threads_change_no_byte(k2_source: Path, tmp_path: Path, workers: int) -> None:
    """Nor does the machine: there is no time and no path in what is written, the report aside."""

    def written(folder: Path) -> dict[str, bytes]:
        return {each.name: each.read_bytes() for each in folder.iterdir() if "report" not in each.name}

    one = export_mlx(k2_source, tmp_path / "a", workers=2).folder
    other = export_mlx(k2_source, tmp_path / "b", workers=workers).folder
    assert written(one) == written(other)


def test_tokenizer_and_code_go_along(k2_thinking: Path, tmp_path: Path) -> None:
    """As a conversion copies them; the source's card stands beside the output's own, whose library is MLX."""
    source = shutil.copytree(k2_thinking, tmp_path / "source")
    files = {"tiktoken.model": b"IQ== 0\n", "tokenization_kimi.py": b"# code\n", "generation_config.json": b"{}\n"}
    for name, content in (files | {"README.md": b"---\nlicense: mit\n---\nhello\n"}).items():
        (source / name).write_bytes(content)
    folder = export_mlx(source, tmp_path / "out").folder
    assert {name: (folder / name).read_bytes() for name in files} == files
    assert b"hello" in (folder / "README.source.md").read_bytes()
    card = (folder / "README.md").read_text()
    assert "license: mit" in card
    assert "library_name: mlx" in card


# --- what does not fit ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "said"), [(0x7FC0, "non-finite scale nan"), (0xBF80, "-1"), (0x7F00, "no eightfold")])
def test_a_scale_that_mlx_cannot_use_ends_the_export(k2_thinking: Path, tmp_path: Path, bits: int, said: str) -> None:
    """NaN, minus one and 2^127, whose bias would be infinite, are named with their place; nothing looks finished."""

    def change(tensors: Shard) -> None:
        tensors["model.layers.2.mlp.experts.5.up_proj.weight_scale"][1][3, 4] = bits

    folder = changed(k2_thinking, tmp_path / "k2", change)
    with pytest.raises(BadValue, match=rf"experts\.5\.up_proj\.weight_scale.*{said}.* at row 3, column 4"):
        export_mlx(folder, tmp_path / "out")
    assert not (tmp_path / "out" / CONFIG).exists()


def test_experts_of_several_formats_are_refused_by_name(k2_thinking: Path, k2_bf16: Path, tmp_path: Path) -> None:
    """One mode is all that a stack has; the remedy is a conversion."""
    base = "model.layers.1.mlp.experts.3.gate_proj"
    whole = tensors_of(open_checkpoint(k2_bf16))[f"{base}.weight"]

    def change(tensors: Shard) -> None:
        for suffix in ("weight_packed", "weight_scale", "weight_shape"):
            del tensors[f"{base}.{suffix}"]
        tensors[f"{base}.weight"] = whole

    folder = changed(k2_thinking, tmp_path / "k2", change)
    with pytest.raises(UnsupportedFormat, match=r"experts are bf16 and int4 group 32.*convert the checkpoint first"):
        export_mlx(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "kimi_k9"}, "model_type, expected kimi_k2 or deepseek_v3 or kimi_k25, found 'kimi_k9'"),
        ({"model_type": None}, "model_type"),
        ({"topk_method": "greedy"}, "topk_method, which engines compute otherwise, expected noaux_tc"),
        ({"hidden_act": "gelu"}, "hidden_act, which engines compute otherwise, expected silu, found 'gelu'"),
        ({"scoring_func": "softmax"}, "scoring_func, which engines compute otherwise, expected sigmoid"),
        ({"rope_theta": None, "rope_scaling": None}, "rope_theta is not there"),
        ({"rope_scaling": "yarn"}, "rope_scaling, expected an object, found 'yarn'"),
        ({"routed_scaling_factor": None}, "routed_scaling_factor is not there, and mlx-lm would take another value"),
        ({"tie_word_embeddings": True}, "a head of its own"),
        ({"n_routed_experts": 17}, r"expected \(17,"),
        ({"kv_lora_rank": -1}, "kv_lora_rank"),
    ],
)
def test_what_mlx_lm_would_not_load_is_named_before_anything_is_written(
    k2_bf16: Path, tmp_path: Path, config: dict[str, Any], said: str
) -> None:
    """Another model, another router, a number that no model has."""
    folder = changed(k2_bf16, tmp_path / "k2", lambda _: None, config)
    with pytest.raises((UnsupportedFormat, MalformedFile, ShapeMismatch), match=said):
        export_mlx(folder, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["k2"]


def test_a_tensor_without_a_place_is_refused(k2_bf16: Path, tmp_path: Path) -> None:
    """By name; so is one that is missing."""
    for change, error, said in (
        (lambda t: t.update({"model.layers.1.foo.weight": t["model.norm.weight"]}), UnsupportedFormat, "no place"),
        (lambda t: t.pop("lm_head.weight"), MissingTensor, "`lm_head.weight`"),
    ):
        folder = changed(k2_bf16, tmp_path / said.strip("`"), change)
        with pytest.raises(error, match=said):
            export_mlx(folder, tmp_path / "out")


def test_what_makes_no_sense_is_refused(k2_bf16: Path, tmp_path: Path) -> None:
    """An output inside the source, at an address, of shards without bytes."""
    source = shutil.copytree(k2_bf16, tmp_path / "source")
    for there, options, said in (
        (source / "out", {}, "neither inside the other"),
        ("s3://bucket/out", {}, "is no folder"),
        (tmp_path / "out", {"shard_size": 0}, "shard_size"),
    ):
        with pytest.raises(UsageError, match=said):
            export_mlx(source, there, **options)  # type: ignore[arg-type]  # options of several kinds
