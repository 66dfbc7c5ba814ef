"""An export to GGUF holds, as gguf's own code reads it, the values that the checkpoint has."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from k2quant.checkpoint.panels import read_whole
from k2quant.checkpoint.reader import CONFIG, Checkpoint, open_checkpoint
from k2quant.checkpoint.reading import read_tensor
from k2quant.checkpoint.weights import StoredWeight
from k2quant.checkpoint.writing.in_memory import write_checkpoint
from k2quant.errors import BadValue, MalformedFile, MissingTensor, ShapeMismatch, UnsupportedFormat, UsageError
from k2quant.exports import export_gguf
from k2quant.formats.dtypes import TensorSpec, as_array
from k2quant.formats.format import Parts
from k2quant.kernels.codecs.values import U16, bf16_to_float, float_to_bf16
from k2quant.nano.demo import EXPERTS, HEADS, KV_RANK, LAYERS, NOPE, VALUE

PLAIN = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
INSIDE = {
    "attn_norm": "input_layernorm",
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
}
DENSE = {f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")}
SPARSE = {"ffn_gate_inp": "mlp.gate"} | {
    f"ffn_{part}_shexp": f"mlp.shared_experts.{part}_proj" for part in ("gate", "up", "down")
}


def expected(weights: Mapping[str, U16]) -> dict[str, U16]:
    """Return what each tensor of GGUF must mean, as BF16 bits; llama.cpp's names and stacks, written out."""
    found = {f"{name}.weight": weights[ours] for name, ours in PLAIN.items()}
    for layer in range(LAYERS):
        before = f"model.layers.{layer}."
        parts = INSIDE | (SPARSE if layer else DENSE)
        found |= {f"blk.{layer}.{name}.weight": weights[before + ours] for name, ours in parts.items()}
        heads = weights[f"{before}self_attn.kv_b_proj"].reshape(HEADS, NOPE + VALUE, KV_RANK)
        found[f"blk.{layer}.attn_k_b.weight"] = heads[:, :NOPE].transpose(0, 2, 1)
        found[f"blk.{layer}.attn_v_b.weight"] = heads[:, NOPE:]
        for part in ("gate", "up", "down") if layer else ():
            each = [weights[f"{before}mlp.experts.{expert}.{part}_proj"] for expert in range(EXPERTS)]
            found[f"blk.{layer}.ffn_{part}_exps.weight"] = np.stack(each)
    return found


def means(found: Any) -> U16:
    """Return a tensor's values as BF16 bits."""
    return float_to_bf16(found.values)


def same(found: U16, other: U16) -> bool:
    """Tell whether BF16 bits are equal, zeros of whatever sign."""
    return found.shape == other.shape and bool(((found == other) | ((found | other) & 0x7FFF == 0)).all())


def tensors_of(folder: Path) -> dict[str, tuple[str, Any]]:
    """Return all tensors of a small checkpoint."""
    source = open_checkpoint(folder)
    return {
        name: (entry.dtype, as_array(np.frombuffer(read_tensor(source, entry), np.uint8), spec).copy())
        for name, entry in source.tensors.items()
        for spec in (TensorSpec(entry.dtype, entry.shape),)
    }


def changed(source: Path, folder: Path, change: Any, config: Mapping[str, Any] | None = None) -> Path:
    """Write a checkpoint anew, with other tensors or another config."""
    tensors = tensors_of(source)
    change(tensors)
    content = json.loads((source / CONFIG).read_text()) | dict(config or {})
    write_checkpoint(folder, {"model.safetensors": tensors}, content)
    return folder


# --- what comes out -------------------------------------------------------------------------------------------------


def test_int4_experts_are_q4_0_bit_for_bit(k2_thinking: Path, tmp_path: Path, seen: Any, values: Any) -> None:
    """Every tensor means what the checkpoint means; codes of INT4 and their scales are those of the source."""
    done = export_gguf(k2_thinking, tmp_path / "k2.gguf")
    found, wanted = seen(done.file), expected(values(k2_thinking))
    assert found.keys() == wanted.keys() | {f"blk.{layer}.exp_probs_b.bias" for layer in range(1, LAYERS)}
    assert {name for name, each in wanted.items() if not same(means(found[name]), each)} == set()
    tensors = tensors_of(k2_thinking)
    for expert in range(EXPERTS):
        base = f"model.layers.1.mlp.experts.{expert}.up_proj"
        pairs, scale = tensors[f"{base}.weight_packed"][1].view(np.uint8), tensors[f"{base}.weight_scale"][1]
        codes = np.stack([pairs & 15, pairs >> 4], -1).reshape(len(pairs), -1).astype(np.float32) - 8
        exact = codes * np.repeat(bf16_to_float(scale), 32, 1)
        assert np.array_equal(found["blk.1.ffn_up_exps.weight"].values[expert], exact)
    types = {name.split(".", 2)[-1] if "blk" in name else name: each.type for name, each in found.items()}
    assert {name for name, kind in types.items() if kind == "Q4_0"} == {
        f"ffn_{part}_exps.weight" for part in ("gate", "up", "down")
    }
    floats = {name for name, kind in types.items() if kind == "F32"}
    assert floats == {"ffn_gate_inp.weight", "exp_probs_b.bias"} | {name for name in types if "norm" in name}


@pytest.mark.parametrize("rest", ["bf16", "f32"])
def test_fp8_and_bf16_stay_exact(
    k2_source: Path, k2_bf16: Path, tmp_path: Path, seen: Any, values: Any, rest: str
) -> None:
    """Block FP8, that of 160 rows among it, is decoded once and rounded no more; BF16 is copied or widened."""
    for source in (k2_source, k2_bf16):
        file = export_gguf(source, tmp_path / f"{source.name}.gguf", rest=rest).file
        found = seen(file)
        assert {name for name, each in expected(values(source)).items() if not same(means(found[name]), each)} == set()
        assert found["blk.1.attn_kv_a_mqa.weight"].type == found["output.weight"].type == rest.upper()
        assert found["blk.1.ffn_up_exps.weight"].type == "BF16"


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4 of ones"])
def test_fp4_keeps_its_codes_in_blocks_of_its_own(
    fp4: Mapping[str, Path], tmp_path: Path, seen: Any, values: Any, name: str
) -> None:
    """Blocks are what the checkpoint means; of NVFP4 where the scale of the whole is 1."""
    found = seen(export_gguf(fp4[name], tmp_path / "k2.gguf").file)
    for tensor, each in expected(values(fp4[name])).items():
        assert same(means(found[tensor]), each)
        assert (found[tensor].type == name[:5].upper()) == ("_exps" in tensor)
    scales = {tensor: each.values for tensor, each in found.items() if tensor.endswith("scale")}
    assert len(scales) == (0 if name == "mxfp4" else 6)
    assert all((each == 1).all() and each.shape == (EXPERTS,) for each in scales.values())


def test_a_scale_of_the_inputs_goes_along(fp4: Mapping[str, Path], tmp_path: Path, seen: Any) -> None:
    """As ModelOpt has it, which multiplies, where compressed-tensors divides; a number for each expert."""

    def change(tensors: dict[str, tuple[str, Any]]) -> None:
        for name, (_, array) in tensors.items():
            if name.endswith("weight_global_scale"):
                array[...] = 1
            if name.endswith("input_global_scale"):
                array[...] = 4 if "experts.3." in name else 2

    folder = changed(fp4["nvfp4 divided"], tmp_path / "k2", change)
    found = seen(export_gguf(folder, tmp_path / "k2.gguf").file)
    scales = found["blk.1.ffn_down_exps.input_scale"].values
    assert scales.tolist() == [0.25 if expert == 3 else 0.5 for expert in range(EXPERTS)]
    assert found["blk.1.ffn_down_exps.weight"].type == "NVFP4"
    lacking = changed(folder, tmp_path / "less", removed("model.layers.1.mlp.experts.3.down_proj.input_global_scale"))
    with pytest.raises(UnsupportedFormat, match="some of its experts have a scale of their inputs, and others none"):
        export_gguf(lacking, tmp_path / "less.gguf")


def test_a_scale_of_the_whole_makes_nvfp4_fall_back(
    fp4: Mapping[str, Path], tmp_path: Path, seen: Any, values: Any
) -> None:
    """llama.cpp reads the scale of experts, and computes deepseek2 without it: such a file would answer nonsense."""
    for name in ("nvfp4", "nvfp4 divided"):
        with pytest.raises(UnsupportedFormat, match=r"cannot keep its codes: .* of the whole, which llama.cpp"):
            export_gguf(fp4[name], tmp_path / "k2.gguf")
    done = export_gguf(fp4["nvfp4"], tmp_path / "k2.gguf", fallback="bf16")
    found = seen(done.file)
    assert len(done.report["fallback"]) == 6
    assert {
        name for name, each in expected(values(fp4["nvfp4"])).items() if not same(means(found[name]), each)
    } == set()


def test_which_expert_is_named_does_not_depend_on_threads(
    fp4: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All have a scale of the whole; the first is named, though it is looked at after all others of its tensor."""
    others = threading.Semaphore(0)

    def read(source: Checkpoint, weight: StoredWeight) -> Parts:
        if "layers.1.mlp.experts" in weight.base and weight.base.endswith("up_proj"):
            if "experts.0." in weight.base:
                for _ in range(EXPERTS - 1):
                    assert others.acquire(timeout=60)
            else:
                others.release()
        return read_whole(source, weight)

    monkeypatch.setattr("k2quant.exports.gguf.types.read_whole", read)
    done = export_gguf(fp4["nvfp4"], tmp_path / "k2.gguf", fallback="bf16", workers=2)
    assert "layers.1.mlp.experts.0.up_proj" in done.report["fallback"]["blk.1.ffn_up_exps.weight"]


def test_eight_bits_are_those_of_gguf(k2_source: Path, tmp_path: Path, seen: Any, values: Any) -> None:
    """With `q8_0` everywhere blocks are those of gguf's own quantiser, of both halves of kv_b_proj too."""
    import gguf

    done = export_gguf(k2_source, tmp_path / "k2.gguf", rest="q8_0", experts="q8_0")
    found = seen(done.file)
    for name, each in expected(values(k2_source)).items():
        if found[name].type == "F32":
            assert "norm" in name or "gate_inp" in name
            continue
        assert found[name].type == "Q8_0"
        wide = np.ascontiguousarray(bf16_to_float(np.ascontiguousarray(each)))
        assert found[name].data == gguf.quants.quantize(wide, gguf.GGMLQuantizationType.Q8_0).tobytes()
    assert done.report["fallback"] == {}


def test_floats_of_other_widths_are_not_rounded_where_they_need_not_be(
    k2_bf16: Path, tmp_path: Path, seen: Any
) -> None:
    """F32 stays what it is in norms, routers and, with `rest=f32`, everywhere, and F16 becomes F32 unrounded."""
    random = np.random.default_rng(0)
    odd = {}

    def change(tensors: dict[str, tuple[str, Any]]) -> None:
        for number, name in enumerate(("input_layernorm", "mlp.gate", "self_attn.kv_b_proj", "self_attn.o_proj")):
            key = f"model.layers.1.{name}.weight"
            kind, dtype = (("F16", np.float16), ("F32", np.float32))[number % 2]
            odd[key] = random.standard_normal(tensors[key][1].shape).astype(dtype)
            tensors[key] = kind, odd[key]

    found = seen(export_gguf(changed(k2_bf16, tmp_path / "k2", change), tmp_path / "k2.gguf", rest="f32").file)
    for name, key in (
        ("attn_norm", "input_layernorm"),
        ("ffn_gate_inp", "mlp.gate"),
        ("attn_output", "self_attn.o_proj"),
    ):
        wanted = odd[f"model.layers.1.{key}.weight"].astype(np.float32)
        assert np.array_equal(found[f"blk.1.{name}.weight"].values, wanted)
    heads = odd["model.layers.1.self_attn.kv_b_proj.weight"].astype(np.float32).reshape(HEADS, NOPE + VALUE, KV_RANK)
    assert np.array_equal(found["blk.1.attn_k_b.weight"].values, heads[:, :NOPE].transpose(0, 2, 1))
    assert np.array_equal(found["blk.1.attn_v_b.weight"].values, heads[:, NOPE:])


def test_k25_is_its_language_model(k25: Path, k2_thinking: Path, tmp_path: Path, seen: Any) -> None:
    """`language_model.` falls away, and the vision tower is named as what is not written."""
    of_k25 = export_gguf(k25, tmp_path / "k25.gguf")
    of_k2 = export_gguf(k2_thinking, tmp_path / "k2.gguf")
    found, other = seen(of_k25.file), seen(of_k2.file)
    assert {name: each.data for name, each in found.items()} == {name: each.data for name, each in other.items()}
    (remark,) = (each for each in of_k25.report["remarks"] if "vision" in each)
    assert remark.startswith("not written: 2 tensors of the vision tower, such as")


def test_what_llama_cpp_does_without_is_named(k2_thinking: Path, tmp_path: Path, seen: Any) -> None:
    """Frequencies, layers behind the last (MTP) and a head that is the embedding are left out, with a remark each."""

    def change(tensors: dict[str, tuple[str, Any]]) -> None:
        ones = np.full(512, 0x3F80, np.uint16)
        tensors["model.layers.3.enorm.weight"] = tensors["model.layers.3.input_layernorm.weight"] = "BF16", ones

    folder = changed(k2_thinking, tmp_path / "k2", change, {"tie_word_embeddings": True})
    done = export_gguf(folder, tmp_path / "k2.gguf")
    assert not [name for name in seen(done.file) if name.startswith(("blk.3", "output.weight"))]
    said = "\n".join(done.report["remarks"])
    assert "3 tensors that llama.cpp makes itself" in said
    assert "2 tensors of layers behind num_hidden_layers" in said
    assert "lm_head.weight, for tie_word_embeddings" in said


def test_experts_lie_in_the_order_of_their_numbers(k2_thinking: Path, tmp_path: Path, seen: Any) -> None:
    """Wherever they stand in the source: expert 10 behind 9, not behind 1."""

    def turned(tensors: dict[str, tuple[str, Any]]) -> None:
        items = sorted(tensors.items(), reverse=True)
        tensors.clear()
        tensors.update(items)

    plain = seen(export_gguf(k2_thinking, tmp_path / "a.gguf").file)
    other = seen(export_gguf(changed(k2_thinking, tmp_path / "k2", turned), tmp_path / "b.gguf").file)
    assert {name: each.data for name, each in other.items()} == {name: each.data for name, each in plain.items()}


@pytest.mark.parametrize("workers", [1, 3])
def test_threads_change_no_byte(k2_source: Path, tmp_path: Path, workers: int) -> None:
    """And neither does the machine: there is no time in a file."""
    one = export_gguf(k2_source, tmp_path / "a.gguf", workers=2).file
    other = export_gguf(k2_source, tmp_path / "b.gguf", workers=workers).file
    assert one.read_bytes() == other.read_bytes()


# --- what does not fit ----------------------------------------------------------------------------------------------


def with_scale(bits: int) -> Any:
    """Return a change that puts other bits into a scale of an expert."""

    def change(tensors: dict[str, tuple[str, Any]]) -> None:
        tensors["model.layers.2.mlp.experts.5.up_proj.weight_scale"][1][3, 4] = bits

    return change


@pytest.mark.parametrize("fallback", ["bf16", "q8_0"])
def test_a_scale_that_fp16_lacks_is_named_and_its_tensor_falls_back(
    k2_thinking: Path, tmp_path: Path, seen: Any, values: Any, fallback: str
) -> None:
    """Without a fallback nothing is written; with one the one tensor of all its experts has another type."""
    folder = changed(k2_thinking, tmp_path / "k2", with_scale(0x0D01))
    with pytest.raises(
        UnsupportedFormat, match=r"blk.2.ffn_up_exps.weight cannot keep its codes: scale 3.9\d+e-31"
    ) as no:
        export_gguf(folder, tmp_path / "k2.gguf")
    assert "`fallback=` q8_0 or bf16" in str(no.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["k2"]
    done = export_gguf(folder, tmp_path / "k2.gguf", fallback=fallback)
    found = seen(done.file)
    assert found["blk.2.ffn_up_exps.weight"].type == fallback.upper()
    assert found["blk.2.ffn_down_exps.weight"].type == found["blk.1.ffn_up_exps.weight"].type == "Q4_0"
    assert done.report["fallback"].keys() == {"blk.2.ffn_up_exps.weight"}
    if fallback == "bf16":
        wanted = expected(values(folder))["blk.2.ffn_up_exps.weight"]
        assert same(means(found["blk.2.ffn_up_exps.weight"]), wanted)


@pytest.mark.parametrize("bits", [0x7FC0, 0x7F80, 0xBF80])
def test_a_scale_that_no_weight_can_have_ends_the_export(k2_thinking: Path, tmp_path: Path, bits: int) -> None:
    """NaN, infinity and minus one are named with their place, and nothing that looks finished is left."""
    folder = changed(k2_thinking, tmp_path / "k2", with_scale(bits))
    for fallback in (None, "bf16"):
        with pytest.raises(BadValue, match=r"layers.2.mlp.experts.5.up_proj.weight_scale.*row 3, column 4"):
            export_gguf(folder, tmp_path / "k2.gguf", fallback=fallback)
        shutil.rmtree(tmp_path / "k2.gguf.partial")
    assert not list(tmp_path.glob("*.gguf"))


def test_experts_of_several_formats_have_one_type(k2_thinking: Path, k2_bf16: Path, tmp_path: Path, seen: Any) -> None:
    """An expert of BF16 among those of INT4: the tensor falls back, or it is refused by name."""
    base = "model.layers.1.mlp.experts.3.gate_proj"
    whole = tensors_of(k2_bf16)[f"{base}.weight"]

    def change(tensors: dict[str, tuple[str, Any]]) -> None:
        for suffix in ("weight_packed", "weight_scale", "weight_shape"):
            del tensors[f"{base}.{suffix}"]
        tensors[f"{base}.weight"] = whole

    folder = changed(k2_thinking, tmp_path / "k2", change)
    with pytest.raises(UnsupportedFormat, match="its experts are bf16 and int4 group 32, and it has one type for all"):
        export_gguf(folder, tmp_path / "k2.gguf")
    found = seen(export_gguf(folder, tmp_path / "k2.gguf", fallback="bf16").file)
    assert found["blk.1.ffn_gate_exps.weight"].type == "BF16"
    assert np.array_equal(means(found["blk.1.ffn_gate_exps.weight"])[3], whole[1])


def removed(name: str) -> Any:
    """Return a change that takes a tensor away."""
    return lambda tensors: tensors.pop(name)


def added(name: str, *shape: int) -> Any:
    """Return a change that adds a tensor of ones."""
    return lambda tensors: tensors.update({name: ("BF16", np.full(shape, 0x3F80, np.uint16))})


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (removed("model.norm.weight"), MissingTensor, "`model.norm.weight` in"),
        (removed("lm_head.weight"), MissingTensor, "`lm_head.weight` in"),
        (removed("model.layers.1.mlp.gate.e_score_correction_bias"), MissingTensor, "layers.1.mlp.gate.e_score"),
        (added("model.layers.1.self_attn.indexer.wk.weight", 4, 4), UnsupportedFormat, "indexer.wk.weight.*no place"),
        (added("model.layers.1.self_attn.q_a_proj.bias", 256), UnsupportedFormat, "q_a_proj.bias.*no place"),
        (added("model.layers.1.mlp.gate_proj.weight", 4, 4), ShapeMismatch, "none of this layer's"),
        (added("model.layers.1.mlp.experts.16.up_proj.weight", 256, 512), ShapeMismatch, "at most 16 experts"),
        (added("model.layers.3.input_layernorm.weight", 512), UnsupportedFormat, "layers 0 to 2"),
        (added("model.norm.weight", 511), ShapeMismatch, r"\(512,\), found \(511,\)"),
    ],
)
def test_what_llama_cpp_would_not_load_is_named_before_anything_is_written(
    k2_bf16: Path, tmp_path: Path, change: Any, error: type[Exception], said: str
) -> None:
    """A tensor too few, too many, or of another shape than the config says."""
    folder = changed(k2_bf16, tmp_path / "k2", change)
    with pytest.raises(error, match=said):
        export_gguf(folder, tmp_path / "k2.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["k2"]


def test_a_missing_expert_is_named(k2_bf16: Path, tmp_path: Path) -> None:
    """By its number, as the checkpoint would call it."""
    folder = changed(k2_bf16, tmp_path / "k2", removed("model.layers.2.mlp.experts.11.down_proj.weight"))
    with pytest.raises(MissingTensor, match=r"`model.layers.2.mlp.experts.11.down_proj.weight`"):
        export_gguf(folder, tmp_path / "k2.gguf")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("kv_lora_rank", None, "kv_lora_rank"),
        ("n_routed_experts", 10**12, "n_routed_experts"),
        ("num_attention_heads", True, "num_attention_heads"),
        ("moe_layer_freq", 2, "moe_layer_freq"),
        ("topk_method", "greedy", "topk_method, which engines compute otherwise, expected noaux_tc"),
        ("q_lora_rank", None, "q_lora_rank"),
    ],
)
def test_a_config_that_says_too_little_is_refused(
    k2_bf16: Path, tmp_path: Path, key: str, value: Any, said: str
) -> None:
    """Each number that decides a shape must be there, and make sense."""
    folder = changed(k2_bf16, tmp_path / "k2", lambda _: None, {key: value})
    with pytest.raises((MalformedFile, UnsupportedFormat), match=said):
        export_gguf(folder, tmp_path / "k2.gguf")


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("k2.bin", {}, "ends in .gguf"),
        ("k2-00001-of-00002.gguf", {}, "part of a split model"),
        ("k2.gguf", {"rest": "int4"}, "rest"),
        ("k2.gguf", {"experts": "f32"}, "experts"),
        ("k2.gguf", {"split_size": 0}, "split_size"),
        ("source/k2.gguf", {}, "neither inside the other"),
    ],
)
def test_what_makes_no_sense_is_refused(
    k2_thinking: Path, tmp_path: Path, name: str, options: dict[str, Any], said: str
) -> None:
    """Names that are none of GGUF, types that do not exist, an output inside the source."""
    source = shutil.copytree(k2_thinking, tmp_path / "source")
    with pytest.raises(UsageError, match=said):
        export_gguf(source, tmp_path / name, **options)
