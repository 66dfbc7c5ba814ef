"""An export holds, bit for bit, what the forward pass saw, or is not finished."""

from __future__ import annotations

import itertools
import json
import shutil
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from k2quant import qat
from k2quant.checking.verify import verify_checksums
from k2quant.checkpoint.reader import INCOMPLETE, REPORT, open_checkpoint
from k2quant.checkpoint.reading import read_tensor
from k2quant.checkpoint.writing.in_memory import Shard, write_checkpoint
from k2quant.conversion.convert import convert
from k2quant.errors import (
    BadValue,
    CheckFailed,
    CheckpointWarning,
    DestinationStale,
    MissingTensor,
    ShapeMismatch,
    UnsafePath,
    UnsupportedFormat,
    UsageError,
)
from k2quant.formats.format import Layout
from k2quant.formats.fp8 import FP8_BLOCK
from k2quant.formats.known import ExportFormat
from k2quant.kernels import ops
from k2quant.qat import Adapter, QATConfig, prepare
from k2quant.qat.exporting import export as exporting
from k2quant.qat.exporting.export import said_once
from k2quant.qat.exporting.gate import check_export
from k2quant.qat.exporting.trained import Trained
from k2quant.qat.preparing import prepared
from tiny import DEEPSEEK

TRANSFORMERS: Any = import_module("transformers")  # its types are not for us

IDS = torch.tensor([[1, 7, 30, 2, 5, 63, 9, 11], [3, 4, 8, 60, 21, 22, 23, 24]])
EXPERTS = "model.layers.1.mlp.experts"


def build(**options: Any) -> Any:
    """Return a tiny DeepSeek-V3, always the same, whose norms are not all ones."""
    torch.manual_seed(0)
    model = TRANSFORMERS.DeepseekV3ForCausalLM(TRANSFORMERS.DeepseekV3Config(**DEEPSEEK | options))
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.08)
    bias = model.get_buffer("model.layers.1.mlp.gate.e_score_correction_bias") if not options else None
    if bias is not None:
        bias.copy_(torch.tensor([0.125, -0.25, 0.375, 0.0]))
    return model


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny model in every format, made from one in BF16."""
    folder = tmp_path_factory.mktemp("bases")
    build().to(torch.bfloat16).save_pretrained(folder / "bf16")
    build().to(torch.bfloat16).save_pretrained(folder / "fused", save_original_format=False)
    convert(folder / "bf16", folder / "fp8", to="fp8")
    convert(folder / "bf16", folder / "int4", to="int4")
    convert(folder / "bf16", folder / "ct", to="int4", grid="compressed-tensors")
    convert(folder / "bf16", folder / "nvfp4", to="nvfp4", activation_scales="one")
    convert(folder / "bf16", folder / "mxfp4", to="mxfp4")
    experts, rest = tensors(folder / "int4"), tensors(folder / "fp8")
    mixed = {name: tensor for name, tensor in experts.items() if ".experts." in name}
    mixed |= {name: tensor for name, tensor in rest.items() if ".experts." not in name}
    write_checkpoint(folder / "mixed", {"model.safetensors": mixed}, config_of(folder / "bf16"))
    prefixed = {f"language_model.{name}": tensor for name, tensor in experts.items()}
    prefixed["vision_tower.encoder.blocks.0.wqkv.weight"] = ("BF16", np.full((64, 32), 0x3F80, np.uint16))
    text = {"text_config": config_of(folder / "int4"), "model_type": "kimi_k25"}
    write_checkpoint(folder / "k25", {"model.safetensors": prefixed}, text)
    return {name: folder / name for name in ("bf16", "fused", "fp8", "int4", "ct", "mixed", "k25", "nvfp4", "mxfp4")}


@pytest.fixture
def base(bases: dict[str, Path]) -> Path:
    """The tiny model in BF16."""
    return bases["bf16"]


NUMPY: dict[str, Any] = {"BF16": np.uint16, "F32": np.float32, "F8_E4M3": np.uint8, "I32": np.int32, "U8": np.uint8}


def tensors(folder: Path) -> Shard:
    """Return all tensors of a checkpoint."""
    checkpoint = open_checkpoint(folder)
    return {
        name: (
            entry.dtype,
            np.frombuffer(bytes(read_tensor(checkpoint, entry)), NUMPY[entry.dtype]).reshape(entry.shape),
        )
        for name, entry in checkpoint.tensors.items()
    }


def config_of(folder: Path) -> dict[str, Any]:
    """Return config.json."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config


def logits(model: Any) -> Tensor:
    """Return the logits."""
    with torch.no_grad():
        found: Tensor = model(IDS, use_cache=False).logits
    return found


def moved(model: Any, *, seed: int = 9) -> Any:
    """Move everything that trains a little."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype), alpha=0.01)
    return model


def ready(base: Path, config: QATConfig | None = None, **options: Any) -> Any:
    """Return a model that has been trained, so to speak."""
    return moved(prepare(qat.load(base, **options), config))


def unfinished(folder: Path) -> bool:
    """Tell whether a folder says that it is no checkpoint."""
    return (folder / INCOMPLETE).is_file() and not any((folder / name).exists() for name in ("config.json", REPORT))


CONFIGS = {
    "int4": QATConfig(),
    "compressed-tensors": QATConfig(grid="compressed-tensors"),
    "3 bits": QATConfig(bits=3),
    "2 bits": QATConfig(bits=2),
    "linear": QATConfig(scope="linear"),
    "a projection apart": QATConfig(ignore=("down_proj",), train="experts", allow_split=True),
    "fp8": QATConfig(to="fp8"),
    "fp8 experts": QATConfig(to="fp8", scope="experts", train="experts"),
    "clipped": QATConfig(estimator="clipped"),
    "learned": QATConfig(estimator="learned"),
    "learned at 2 bits": QATConfig(estimator="learned", bits=2),
    "adapters": QATConfig(train="adapters", adapter=Adapter(rank=4, alpha=8)),
    "fp8 adapters": QATConfig(to="fp8", train="adapters"),
    "experts": QATConfig(train="experts"),
    "nvfp4": QATConfig(to="nvfp4"),
    "nvfp4 of compressed-tensors": QATConfig(to="nvfp4", layout="compressed-tensors", estimator="clipped"),
    "nvfp4 linear": QATConfig(to="nvfp4", scope="linear"),
    "nvfp4 adapters": QATConfig(to="nvfp4", train="adapters"),
    "mxfp4": QATConfig(to="mxfp4"),
    "fp8 of compressed-tensors": QATConfig(to="fp8", layout="compressed-tensors"),
}


# --- what is written --------------------------------------------------------------------------------------------------


SOURCES = ("fp8", "int4", "ct", "mixed", "k25")
PAIRS = [
    *((name, "bf16") for name in CONFIGS),
    *((name, source) for name in ("int4", "fp8") for source in SOURCES),
    ("a projection apart", "int4"),
    ("fp8 experts", "fp8"),
    ("fp8 experts", "mixed"),
    ("learned", "k25"),
    *(("nvfp4", source) for source in ("nvfp4", "mxfp4", "k25")),
    ("nvfp4 of compressed-tensors", "nvfp4"),
    ("mxfp4", "mxfp4"),
    ("int4", "nvfp4"),
]


@pytest.mark.parametrize(("name", "source"), PAIRS)
def test_the_export_is_the_model_that_was_trained(name: str, source: str, bases: dict[str, Path], ram: Path) -> None:
    """Whatever the base's format, a reloaded export has the logits of the prepared model, bit for bit."""
    model = ready(bases[source], CONFIGS[name])
    expected = logits(model)
    qat.export(model, ram / "out")
    assert torch.equal(logits(qat.load(ram / "out")), expected)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("name", ["int4", "fp8", "learned"])
def test_bf16_masters(name: str, base: Path, ram: Path) -> None:
    """The same in BF16, where activations are BF16 too."""
    model = ready(base, CONFIGS[name], dtype=torch.bfloat16)
    qat.export(model, ram / "out")
    assert torch.equal(logits(qat.load(ram / "out", dtype=torch.bfloat16)), logits(model))


@pytest.mark.parametrize("source", ["bf16", "fused"])
@pytest.mark.parametrize("name", ["int4", "fp8", "adapters"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_of_transformers(source: str, name: str, dtype: torch.dtype, bases: dict[str, Path], ram: Path) -> None:
    """A model that never met our loader is exported over a base, whose experts may be fused; both load it alike."""
    model = moved(prepare(build().to(dtype), CONFIGS[name]))
    qat.export(model, ram / "out", base=bases[source])
    ours = qat.load(ram / "out", dtype=dtype)
    theirs, found = build().to(dtype), prepared(model)
    theirs.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        for target in found.targets + found.plain:
            found.fill(target, theirs.get_parameter(target.name))
    for key, value in theirs.state_dict().items():
        if ".experts." not in key:
            assert torch.equal(ours.state_dict()[key].to(value.dtype), value), key
    down = [ours.state_dict()[f"{EXPERTS}.{expert}.down_proj.weight"] for expert in range(4)]
    assert torch.equal(torch.stack(down), theirs.state_dict()[f"{EXPERTS}.down_proj"])


@pytest.mark.parametrize("name", ["int4", "compressed-tensors", "3 bits", "2 bits", "fp8"])
def test_files_hold_the_codes_of_plain_rounding(name: str, base: Path, ram: Path) -> None:
    """Codes and scales are those of the codecs without recovery, of each expert's BF16 weights alone."""
    config = CONFIGS[name]
    model = ready(base, config)
    qat.export(model, ram / "out")
    written = tensors(ram / "out")
    for expert in range(4):
        weights = model.get_parameter(f"{EXPERTS}.gate_up_proj")[expert, 32:].detach().bfloat16()
        if config.to == "fp8":
            codes, scale = ops.bf16_to_fp8(weights, FP8_BLOCK)
            wanted = {"weight": codes.view(torch.uint8), "weight_scale_inv": scale}
        else:
            codes, scale = ops.bf16_to_int4(weights, config.grid, recover=False, bits=config.bits)
            wanted = {"weight_packed": codes, "weight_scale": scale.view(torch.uint16)}
            assert written[f"{EXPERTS}.{expert}.up_proj.weight_shape"][1].tolist() == [32, 64]
        for suffix, tensor in wanted.items():
            np.testing.assert_array_equal(written[f"{EXPERTS}.{expert}.up_proj.{suffix}"][1], tensor.numpy())


@pytest.mark.parametrize(
    ("to", "source"),
    [*itertools.product(("int4", "fp8"), ("bf16", "fp8", "k25")), ("nvfp4", "k25"), ("mxfp4", "bf16")],
)
def test_the_folder_is_that_of_a_conversion(to: ExportFormat, source: str, bases: dict[str, Path], ram: Path) -> None:
    """Files, config, index, names, dtypes and shapes are what `convert` writes of the base; the checksums fit."""
    qat.export(ready(bases[source], QATConfig(to=to)), ram / "trained")
    convert(bases[source], ram / "converted", to=to)
    assert config_of(ram / "trained") == config_of(ram / "converted")
    assert {path.name for path in (ram / "trained").iterdir()} == {path.name for path in (ram / "converted").iterdir()}
    index = "model.safetensors.index.json"
    assert (ram / "trained" / index).read_bytes() == (ram / "converted" / index).read_bytes()
    assert verify_checksums(ram / "trained").passed
    ours, theirs = tensors(ram / "trained"), tensors(ram / "converted")
    assert {name: (dtype, array.shape) for name, (dtype, array) in ours.items()} == {
        name: (dtype, array.shape) for name, (dtype, array) in theirs.items()
    }
    if source == "k25":
        vision = "vision_tower.encoder.blocks.0.wqkv.weight"
        np.testing.assert_array_equal(ours[vision][1], theirs[vision][1])


@pytest.mark.parametrize(
    ("to", "layout"),
    [("int4", None), ("fp8", None), ("nvfp4", None), ("nvfp4", "compressed-tensors"), ("mxfp4", None)],
)
def test_without_training_all_but_recovery_is_a_conversion(
    to: ExportFormat, layout: Layout | None, base: Path, ram: Path
) -> None:
    """An export of an untrained BF16 base has the bytes of a conversion: training begins there."""
    qat.export(prepare(qat.load(base), QATConfig(to=to, layout=layout)), ram / "trained")
    convert(base, ram / "converted", to=to, layout=layout)
    for shard in (ram / "converted").glob("*.safetensors"):
        assert shard.read_bytes() == (ram / "trained" / shard.name).read_bytes()


@pytest.mark.parametrize("grid", ["moonshot", "compressed-tensors"])
def test_compressed_tensors_reads_the_same_values(grid: Any, base: Path, ram: Path) -> None:
    """The library decodes each exported expert to what the forward pass saw."""
    compressors = import_module("compressed_tensors.compressors")
    model = ready(base, QATConfig(grid=grid))
    qat.export(model, ram / "out")
    found, written = prepared(model), tensors(ram / "out")
    for target in found.targets:
        seen = torch.empty_like(target.master, dtype=torch.bfloat16)
        with torch.no_grad():
            found.fill(target, seen)
        for part in target.parts:
            packed, scale, shape = (
                torch.from_numpy(written[f"{part.base}.weight_{name}"][1].copy())
                for name in ("packed", "scale", "shape")
            )
            codes = compressors.unpack_from_int32(packed, 4, torch.Size(shape.tolist()))
            values = codes.to(torch.bfloat16) * scale.view(torch.bfloat16).repeat_interleave(32, 1)
            assert torch.equal(values, part.of(seen))


def test_real_layouts(k25: Path, k2_mixed: Path, ram: Path) -> None:
    """A small K2.5 with vision tower, and INT4 experts beside FP8 attention in several shards, go through."""
    for name, source, config in (("k25", k25, QATConfig()), ("mixed", k2_mixed, QATConfig(to="fp8"))):
        model = ready(source, config)
        expected = logits(model)
        qat.export(model, ram / name)
        assert torch.equal(logits(qat.load(ram / name)), expected)


def test_frozen_weights_that_are_no_bf16_numbers(base: Path, ram: Path) -> None:
    """They are seen rounded and written rounded, though they do not train."""
    model: Any = qat.load(base)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.001)
    prepare(model, QATConfig(train="experts"))
    qat.export(model, ram / "out")
    assert torch.equal(logits(qat.load(ram / "out")), logits(model))
    bits = model.lm_head.weight.detach().bfloat16().view(torch.uint16).numpy()
    np.testing.assert_array_equal(tensors(ram / "out")["lm_head.weight"][1], bits)


def test_layers_that_predict_further_tokens_come_from_the_base(base: Path, ram: Path) -> None:
    """What the model does without is converted as ever."""
    extra = {
        name.replace("layers.1.", "layers.2."): tensor for name, tensor in tensors(base).items() if "layers.1." in name
    }
    config = config_of(base) | {"num_nextn_predict_layers": 1}
    write_checkpoint(ram / "base", {"model.safetensors": tensors(base) | extra}, config)
    model = ready(ram / "base")
    qat.export(model, ram / "out")
    convert(ram / "base", ram / "converted", to="int4")
    name = "model.layers.2.mlp.experts.3.up_proj.weight_packed"
    np.testing.assert_array_equal(tensors(ram / "out")[name][1], tensors(ram / "converted")[name][1])
    assert torch.equal(logits(qat.load(ram / "out")), logits(model))


def test_threads_and_shards_change_no_byte(base: Path, ram: Path) -> None:
    """One worker or four, one shard or many: the same tensors."""
    model = ready(base)
    qat.export(model, ram / "one", workers=1)
    qat.export(model, ram / "many", workers=4, shard_size=20_000)
    assert len(list((ram / "many").glob("*.safetensors"))) > 3
    one, many = tensors(ram / "one"), tensors(ram / "many")
    assert one.keys() == many.keys()
    assert all(np.array_equal(one[name][1].view(np.uint8), many[name][1].view(np.uint8)) for name in one)


# --- the gate ---------------------------------------------------------------------------------------------------------


def flipping(monkeypatch: pytest.MonkeyPatch, name: str, place: int, bit: int) -> None:
    """Have one bit of a tensor flip on the disk, between writing and checking."""
    original = check_export

    def check(folder: Path, plan: Any, trained: Any) -> int:
        entry = next(e for job in plan.jobs() for e in job.outputs.values() if e.name == name)
        with (folder / entry.file).open("r+b") as file:
            file.seek(entry.start + place)
            (byte,) = file.read(1)
            file.seek(entry.start + place)
            file.write(bytes([byte ^ 1 << bit]))
        return original(folder, plan, trained)

    monkeypatch.setattr(exporting, "check_export", check)


@pytest.mark.parametrize(
    ("name", "place", "bit"),
    [
        (f"{EXPERTS}.2.up_proj.weight_packed", 100, 0),
        (f"{EXPERTS}.2.down_proj.weight_packed", 1023, 5),
        (f"{EXPERTS}.0.gate_proj.weight_scale", 6, 0),
        ("model.layers.0.self_attn.q_a_proj.weight", 77, 3),
        ("model.norm.weight", 0, 0),
        ("model.layers.1.mlp.gate.e_score_correction_bias", 4, 0),
    ],
)
def test_a_bit_that_flips_is_found(
    name: str, place: int, bit: int, base: Path, ram: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One bit of any tensor on the disk: exit code 3, the tensor's name, and a folder that is not finished."""
    model = ready(base)
    with monkeypatch.context() as patch:
        flipping(patch, name, place, bit)
        with pytest.raises(CheckFailed, match=name.rpartition(".")[0].replace(".", r"\.")) as caught:
            qat.export(model, ram / "out")
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)
    assert unfinished(ram / "out")
    with pytest.raises(CheckFailed):  # the shard stands there, and is no better the second time
        qat.export(model, ram / "out")
    qat.export(model, ram / "out", restart=True)
    assert torch.equal(logits(qat.load(ram / "out")), logits(model))


def test_a_weight_that_moves_while_it_is_written_is_found(
    base: Path, ram: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is compared is what the model runs on now, not what it was when the plan was made."""
    model, original = ready(base), check_export

    def check(folder: Path, plan: Any, trained: Any) -> int:
        with torch.no_grad():
            model.get_parameter(f"{EXPERTS}.down_proj")[3, 5] += 1
        return original(folder, plan, trained)

    monkeypatch.setattr(exporting, "check_export", check)
    with pytest.raises(CheckFailed, match=r"experts\.3\.down_proj.*row 5"):
        qat.export(model, ram / "out")
    assert unfinished(ram / "out")


def test_a_diverged_weight_is_named_and_nothing_looks_finished(base: Path, ram: Path) -> None:
    """NaN among the trained weights ends in one sentence."""
    model = ready(base)
    with torch.no_grad():
        model.get_parameter(f"{EXPERTS}.down_proj")[3, 5, 7] = torch.nan
    with pytest.raises(BadValue, match=r"experts\.3\.down_proj.*row 5, column 7"):
        qat.export(model, ram / "out")
    assert unfinished(ram / "out")


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.self_attn.o_proj.weight", "lm_head.weight"])
def test_a_diverged_weight_out_of_scope_is_named_too(name: str, base: Path, ram: Path) -> None:
    """NaN in what is written as it is: nothing is finished, masters float32 or BF16."""
    for dtype in (torch.float32, torch.bfloat16):
        model = prepare(qat.load(base, dtype=dtype))
        with torch.no_grad():
            model.get_parameter(name).view(-1)[3] = torch.nan
        with pytest.raises(BadValue, match=name.removesuffix(".weight").replace(".", r"\.")):
            qat.export(model, ram / str(dtype))
        assert unfinished(ram / str(dtype))


def test_a_model_that_runs_on_older_weights_is_not_exported(base: Path, ram: Path) -> None:
    """A write into `.data` that no pass has noticed: what is exported would not be what was measured."""
    model = ready(base)
    logits(model)
    model.get_parameter(f"{EXPERTS}.down_proj").data[3, 5, 6] += 1
    with pytest.raises(CheckFailed, match=r"down_proj.*refresh\(\)"):
        qat.export(model, ram / "out")
    assert unfinished(ram / "out")
    prepared(model).refresh()
    qat.export(model, ram / "out", restart=True)
    assert torch.equal(logits(qat.load(ram / "out")), logits(model))


@pytest.mark.filterwarnings("ignore")  # of torch's compiler, about itself
def test_a_compiled_model_trains_and_exports(base: Path, ram: Path) -> None:
    """`torch.compile` changes no bit where its backend computes as torch does, and its model can be exported."""
    found = []
    for compiled in (False, True):
        model = prepare(qat.load(base))
        run: Any = torch.compile(model, backend="eager") if compiled else model
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(2):
            run(IDS, labels=IDS, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(logits(run))
        qat.export(run, ram / str(compiled))
        assert torch.equal(logits(qat.load(ram / str(compiled))), found[-1])
    assert torch.equal(*found)


# --- interrupted, and done again --------------------------------------------------------------------------------------


def test_an_interrupted_export_goes_on(base: Path, ram: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same call finishes what an interrupted one began, with the bytes of one that was not interrupted."""
    model, original = ready(base), Trained.panel

    def panel(self: Any, job: Any, start: int, stop: int) -> Any:
        if "experts.3.down_proj" in job.weight.base:
            raise KeyboardInterrupt
        return original(self, job, start, stop)

    with monkeypatch.context() as patch:
        patch.setattr(Trained, "panel", panel)
        with pytest.raises(KeyboardInterrupt):
            qat.export(model, ram / "out", shard_size=20_000, workers=1)
    assert unfinished(ram / "out")
    done = qat.export(model, ram / "out", shard_size=20_000)
    assert done.resumed > 0
    qat.export(model, ram / "whole", shard_size=20_000)
    for shard in (ram / "whole").glob("*.safetensors"):
        assert shard.read_bytes() == (ram / "out" / shard.name).read_bytes()
    assert qat.export(model, ram / "out", shard_size=20_000).already_done


@pytest.mark.parametrize("name", ["int4", "learned", "adapters", "fp8"])
def test_another_training_does_not_pass_for_this_one(name: str, base: Path, ram: Path) -> None:
    """A finished folder is not taken for the export of a model that has trained on."""
    model = ready(base, CONFIGS[name])
    qat.export(model, ram / "out")
    moved(model, seed=1)
    with pytest.raises(DestinationStale):
        qat.export(model, ram / "out")
    qat.export(model, ram / "out", restart=True)
    assert torch.equal(logits(qat.load(ram / "out")), logits(model))


def test_a_single_other_value_is_enough(ram: Path) -> None:
    """A finished folder is compared in full: one weight of thousands that moved since is noticed."""
    build(vocab_size=300).to(torch.bfloat16).save_pretrained(ram / "base")
    model = ready(ram / "base")
    qat.export(model, ram / "out")
    assert qat.export(model, ram / "out").already_done
    with torch.no_grad():
        model.get_parameter("lm_head.weight")[7, 13] += 1
    with pytest.raises(DestinationStale, match="restart"):
        qat.export(model, ram / "out")


def test_scales_and_adapters_alone_tell_a_training(base: Path, ram: Path) -> None:
    """What trains beside the weights counts as well as they do."""
    for name in ("learned", "adapters"):
        model = ready(base, CONFIGS[name])
        qat.export(model, ram / name)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "learned_scale" in key or "adapter" in key:
                    parameter.mul_(1.1)
        with pytest.raises(DestinationStale):
            qat.export(model, ram / name)


def test_warnings_that_no_note_repeats_are_not_lost() -> None:
    """What loading alone finds is warned of behind it, and where it fails; other warnings come through as they are."""

    def stopped() -> None:
        with said_once() as said:
            for text, kind in (("K2: one", CheckpointWarning), ("K2: two", CheckpointWarning), ("one", FutureWarning)):
                warnings.warn(text, kind, stacklevel=1)
            said.append("one")
            raise UsageError("so")

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(UsageError):
            stopped()
    assert [str(each.message) for each in caught] == ["K2: two", "one"]


# --- what is refused --------------------------------------------------------------------------------------------------


def refused(error: type[Exception], model: Any, folder: Path, match: str | None, **options: Any) -> None:
    """Check that an export is refused before a byte is written."""
    with pytest.raises(error, match=match) as caught:
        qat.export(model, folder, **options)
    assert "\n" not in str(caught.value)
    assert not folder.exists()


def test_a_base_of_links_is_read_where_links_are_followed(base: Path, ram: Path) -> None:
    """The base that an export names may be a folder of links, like the one that a training loads; not unasked."""
    (ram / "linked").mkdir()
    for path in base.iterdir():
        (ram / "linked" / path.name).symlink_to(path)
    model = ready(base)
    refused(UnsafePath, model, ram / "out", "follow_links=True", base=ram / "linked")
    qat.export(model, ram / "out", base=ram / "linked", follow_links=True)
    assert (ram / "out" / "config.json").is_file()


def test_what_cannot_be_exported_is_refused_at_once(base: Path, ram: Path) -> None:
    """8 bits, a model that is not prepared or runs unquantised, no base, and a folder within the base."""
    out = ram / "out"
    for estimator in ("plain", "learned"):
        refused(UsageError, ready(base, QATConfig(bits=8, estimator=estimator)), out, "8-bit")
    refused(UsageError, qat.load(base), out, "not prepared")
    refused(UsageError, prepare(build()), out, "base")
    model = ready(base)
    refused(UsageError, model, base / "out", "neither inside")
    with prepared(model).unquantised():
        refused(UsageError, model, out, "is off")
    prepared(model).remove()
    refused(UsageError, model, out, "not prepared")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"num_hidden_layers": 3}, MissingTensor),
        ({"num_hidden_layers": 1, "first_k_dense_replace": 0}, MissingTensor),
        ({"n_routed_experts": 8}, (MissingTensor, ShapeMismatch)),
        ({"hidden_size": 96}, ShapeMismatch),
        ({"vocab_size": 128}, ShapeMismatch),
    ],
)
def test_a_base_of_another_model_is_refused(options: dict[str, Any], error: Any, base: Path, ram: Path) -> None:
    """More or fewer layers or experts, or other shapes, on either side: no file is written."""
    other = build(**options)
    other.to(torch.bfloat16).save_pretrained(ram / "other")
    refused(error, ready(base), ram / "out", None, base=ram / "other")
    refused(error, prepare(other.float()), ram / "out", None, base=base)


@pytest.mark.parametrize(
    ("source", "config"),
    [
        ("int4", QATConfig(ignore=("down_proj",), allow_split=True)),
        ("fp8", QATConfig(to="fp8", scope="experts")),
    ],
)
def test_trained_weights_that_the_base_would_keep_quantised(
    source: str, config: QATConfig, bases: dict[str, Path], ram: Path
) -> None:
    """A weight that trained unrounded cannot be written into a base that keeps it quantised: a refusal, no surprise."""
    refused(UsageError, ready(bases[source], config), ram / "out", "trained without fake quantisation")


def test_bases_in_other_units_are_refused(bases: dict[str, Path], ram: Path) -> None:
    """INT4 with float32 scales, which the model was not trained for, does not take its BF16 ones."""
    wide: Shard = {}
    for name, (dtype, array) in tensors(bases["int4"]).items():
        scales = name.endswith("weight_scale")
        wide[name] = ("F32", (array.astype(np.uint32) << 16).view(np.float32)) if scales else (dtype, array)
    write_checkpoint(ram / "wide", {"model.safetensors": wide}, config_of(bases["int4"]))
    model = ready(bases["int4"])
    refused(UnsupportedFormat, model, ram / "out", "other units", base=ram / "wide")


def test_a_base_that_vanished_is_an_error_of_ours(base: Path, ram: Path) -> None:
    """The model still knows its base, which is gone: one sentence, nothing that looks finished."""
    shutil.copytree(base, ram / "base")
    model = ready(ram / "base")
    shutil.rmtree(ram / "base")
    with pytest.raises(Exception, match="base") as caught:
        qat.export(model, ram / "out")
    assert type(caught.value).__module__ == "k2quant.errors"
    assert not (ram / "out" / "config.json").exists()


def test_tall_matrices_are_written_in_panels(ram: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Panels and pieces of a few rows give the bytes of whole matrices, whatever is written."""
    build(moe_intermediate_size=160, vocab_size=300).to(torch.bfloat16).save_pretrained(ram / "base")
    for name in ("int4", "fp8", "adapters", "learned"):
        model = ready(ram / "base", CONFIGS[name])
        panels: set[int] = set()
        qat.export(model, ram / name)
        original = Trained.panel

        def panel(self: Any, job: Any, start: int, stop: int, original: Any = original, panels: Any = panels) -> Any:
            panels.add(start)
            return original(self, job, start, stop)

        with monkeypatch.context() as patch:
            patch.setattr(Trained, "panel", panel)
            patch.setattr("k2quant.checkpoint.panels.PANEL_WEIGHTS", 1)
            patch.setattr("k2quant.qat.rounding.estimators.PIECE", 1)
            patch.setattr("k2quant.qat.rounding.adapters.PIECE", 1)
            qat.export(model, ram / f"{name} in panels")
        assert panels == {0, 128, 256}
        for shard in (ram / name).glob("*.safetensors"):
            assert shard.read_bytes() == (ram / f"{name} in panels" / shard.name).read_bytes()
