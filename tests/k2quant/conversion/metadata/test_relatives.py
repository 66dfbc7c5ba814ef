"""Checkpoints of K2's relatives, and K2's own under other names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import k2quant
from k2quant.checkpoint.reader import open_checkpoint
from k2quant.checkpoint.reading import read_tensor
from k2quant.checkpoint.weights import group_tensors
from k2quant.checkpoint.writing.in_memory import Shard
from k2quant.cli import main
from k2quant.errors import CheckpointError, MalformedFile, UnsupportedFormat, UsageError
from k2quant.formats.bf16 import Bf16
from k2quant.formats.format import Format
from k2quant.formats.fp8 import Fp8
from k2quant.formats.int4 import Int4
from k2quant.model import load_model
from rewritten import respelled

INDEXER = "model.layers.{}.self_attn.indexer."


def formats(folder: Path) -> dict[str, Format | None]:
    """Return how each weight is stored."""
    return {weight.base: weight.format for weight in group_tensors(open_checkpoint(folder).tensors).weights}


def without_model(name: str) -> str:
    """Spell a name as tools do that leave `model.` out of K2.5's."""
    return name.replace("model.", "language_model.", 1) if name.startswith("model.") else f"language_model.{name}"


def experts_without_model(name: str) -> str:
    """Spell the experts so, and nothing else."""
    return without_model(name) if ".mlp.experts." in name else f"language_model.{name}"


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rename", [without_model, experts_without_model])
@pytest.mark.parametrize("to", ["int4", "fp8"])
def test_layers_without_model_in_their_names_are_in_scope(k2_bf16: Path, tmp_path: Path, rename: Any, to: Any) -> None:
    """A good checkpoint refused, names spelled two ways: the same weights are taken, under the names that they have."""
    plain = k2quant.convert(k2_bf16, tmp_path / "plain", to=to)
    source = respelled(k2_bf16, tmp_path / "src", rename)
    done = k2quant.convert(source, tmp_path / "out", to=to)
    expected = {rename(f"{base}.x").removesuffix(".x"): stored for base, stored in formats(plain.folder).items()}
    assert formats(done.folder) == expected
    one, other = open_checkpoint(plain.folder), open_checkpoint(done.folder)
    assert all(
        read_tensor(one, entry) == read_tensor(other, other.tensors[rename(n)]) for n, entry in one.tensors.items()
    )
    assert k2quant.inspect(done.folder).layers == 3


def test_layers_that_are_spelled_two_ways_are_named(k2_bf16: Path, tmp_path: Path) -> None:
    """Nothing of a layer is out of scope in silence: inspect and convert say that engines know one spelling alone."""
    source = respelled(k2_bf16, tmp_path / "src", experts_without_model)
    (said,) = k2quant.inspect(source).remarks
    assert said.startswith("decoder layers are spelled in 2 ways, `language_model.model.layers.")
    assert "`language_model.layers.1.mlp.experts." in said
    assert k2quant.convert(source, tmp_path / "out", to="fp8").report["remarks"] == [said]
    found = CliRunner().invoke(main, ["inspect", str(source)])
    assert found.stderr.count(said) == 1
    assert said not in found.stdout


@pytest.mark.parametrize(
    "name", ["language_model.layers.1.self_attn.o_proj", "language_model.model.embed_tokens", "language_model.lm_head"]
)
def test_one_weight_under_two_spellings_is_refused(k2_bf16: Path, tmp_path: Path, name: str) -> None:
    """Two tensors that stand for one weight: nobody knows which an engine takes."""
    twice: Shard = {f"{name}.weight": ("BF16", np.ones((512, 256), np.uint16))}
    source = respelled(k2_bf16, tmp_path / "src", more=twice)
    with pytest.raises(MalformedFile, match=rf"same weight as another.*{name.rpartition('.')[2]}"):
        k2quant.convert(source, tmp_path / "out", to="fp8")
    assert k2quant.inspect(source).problems


def test_splits_are_found_across_spellings(k2_bf16: Path, tmp_path: Path) -> None:
    """A group whose members are spelled differently is one group all the same."""
    source = respelled(k2_bf16, tmp_path / "src", lambda name: without_model(name) if "kv_a_" in name else name)
    with pytest.raises(UsageError, match="q_a_proj and kv_a"):
        k2quant.convert(source, tmp_path / "out", to="fp8", ignore=(r"\.q_a_proj",))


# --- relatives --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def v32(k2_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small DeepSeek-V3.2: block FP8, each layer with an indexer, of which two matrices are FP8 and one is BF16."""
    indexer: Shard = {}
    random = np.random.default_rng(3)
    for layer in range(3):
        prefix = INDEXER.format(layer)
        for name, shape in {"wq_b": (256, 128), "wk": (128, 256)}.items():
            values = (random.standard_normal(shape, np.float32).view(np.uint32) >> 16).astype(np.uint16)
            weight = k2quant.quantize(values, "fp8")
            indexer[f"{prefix}{name}.weight"] = ("F8_E4M3", weight.codes)
            indexer[f"{prefix}{name}.weight_scale_inv"] = ("F32", weight.scale)
        indexer[f"{prefix}weights_proj.weight"] = ("BF16", np.full((16, 256), 0x3F80, np.uint16))
        indexer[f"{prefix}k_norm.weight"] = ("F32", np.ones(128, np.float32))
        indexer[f"{prefix}k_norm.bias"] = ("F32", np.zeros(128, np.float32))
    folder = tmp_path_factory.mktemp("v32") / "V3.2"
    return respelled(k2_source, folder, more=indexer, model_type="deepseek_v32", index_topk=2048)


def test_a_relative_is_converted_by_its_names(v32: Path, tmp_path: Path) -> None:
    """A good checkpoint refused: `deepseek_v32` has K2's names and an indexer, which no stray FP8 is left of."""
    bf16 = k2quant.convert(v32, tmp_path / "bf16", to="bf16")
    assert set(formats(bf16.folder).values()) <= {Bf16(), Bf16(dtype="F32"), None}
    int4 = formats(k2quant.convert(v32, tmp_path / "int4", to="int4").folder)
    assert {base for base, stored in int4.items() if isinstance(stored, Int4)} == {
        base for base in int4 if ".mlp.experts." in base
    }
    assert not any(isinstance(stored, Fp8) for stored in int4.values())
    assert int4[f"{INDEXER.format(0)}wq_b"] == Bf16()
    assert k2quant.verify(v32, tmp_path / "int4").passed


def test_what_no_scope_takes_is_named_in_the_config_too(v32: Path, tmp_path: Path) -> None:
    """Matrices that only a relative has stay BF16 in an FP8 output, so the config tells engines not to expect FP8."""
    k2quant.convert(v32, tmp_path / "bf16", to="bf16")
    k2quant.convert(tmp_path / "bf16", tmp_path / "fp8", to="fp8")
    found = json.loads((tmp_path / "fp8" / "config.json").read_text())
    kept = [f"{INDEXER.format(layer)}{name}" for layer in range(3) for name in ("wq_b", "wk", "weights_proj")]
    assert sorted(found["quantization_config"]["modules_to_not_convert"]) == sorted(kept)
    assert (found["model_type"], found["index_topk"]) == ("deepseek_v32", 2048)
    again = k2quant.convert(v32, tmp_path / "again", to="fp8", shard_size=10**6)
    assert isinstance(formats(again.folder)[f"{INDEXER.format(1)}wk"], Fp8)


def test_what_is_unknown_of_a_relative_is_said(v32: Path, tmp_path: Path) -> None:
    """`inspect` and `convert` say that the type was not tried, and which matrices no scope takes."""
    first, second = k2quant.inspect(v32).remarks
    assert first.startswith("model_type 'deepseek_v32' has not been tried")
    assert second.startswith(f"9 matrices of decoder layers are none that K2 has, such as `{INDEXER.format(0)}")
    assert not k2quant.inspect(v32).problems
    found = CliRunner().invoke(main, ["convert", "--to", "int4", str(v32), str(tmp_path / "out")])
    assert found.exit_code == 0, found.stderr
    assert all(f"note: {said}" in found.stderr for said in (first, second))


def test_a_relative_is_not_run(v32: Path) -> None:
    """Running needs the architecture: the message says that it is the model's, not the file's, fault."""
    with pytest.raises(UnsupportedFormat, match=r"converted, but not run here.*deepseek_v32"):
        load_model(v32)


@pytest.mark.parametrize("lost", ["kv_a_proj_with_mqa", "kv_b_proj", "o_proj"])
def test_another_model_is_refused_by_its_names(k2_bf16: Path, tmp_path: Path, lost: str) -> None:
    """An unknown model_type is taken where every layer has K2's names; where one layer has not, half would be lost."""

    def rename(name: str) -> str:
        return name.replace(lost, "k_proj") if ".layers.1." in name else name

    source = respelled(k2_bf16, tmp_path / "src", rename, model_type="glm_moe_dsa")
    with pytest.raises(UnsupportedFormat, match=r"not a model of this family.*'glm_moe_dsa'"):
        k2quant.convert(source, tmp_path / "out", to="fp8")
    assert not [said for said in k2quant.inspect(source).remarks if "glm_moe_dsa" in said]
    assert k2quant.inspect(respelled(k2_bf16, tmp_path / "good", model_type="glm_moe_dsa")).problems == []


@pytest.mark.parametrize("kind", [3, ["kimi_k2"], {}, True, ""])
def test_a_type_that_is_no_text_is_refused(k2_bf16: Path, tmp_path: Path, kind: object) -> None:
    """Names do not save a config that is nonsense; an empty type is no type."""
    source = respelled(k2_bf16, tmp_path / "src", model_type=kind)
    if kind == "":
        assert len(k2quant.inspect(source).remarks) == 1
        return
    with pytest.raises(CheckpointError, match="not a model of this family"):
        k2quant.convert(source, tmp_path / "out", to="fp8")
