"""What a model's state is called, where it lies, and how it goes back to disk."""

from __future__ import annotations

import filecmp
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from k2quant.checkpoint.header import build_header
from k2quant.checkpoint.reader import open_checkpoint
from k2quant.errors import DestinationForeign, UsageError
from k2quant.formats.dtypes import TensorSpec
from k2quant.ground.names import in_language_model
from k2quant.model import load_model, save_model

LAYOUTS = ("k2_source", "k2_thinking", "k25", "k2_mixed", "k2_bf16")
IDS = torch.randint(0, 2048, (1, 8), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_state_has_the_checkpoints_names(layout: str, request: pytest.FixtureRequest) -> None:
    """Every tensor of the language model stands under its own name, with its dtype, shape and bits."""
    path = request.getfixturevalue(layout)
    checkpoint = open_checkpoint(path)
    wanted = {in_language_model(name): entry for name, entry in checkpoint.tensors.items() if "inv_freq" not in name}
    wanted.pop(None, None)
    state = load_model(path).state_dict()
    assert state.keys() == wanted.keys()
    for name, entry in wanted.items():
        assert tuple(state[str(name)].shape) == entry.shape


@pytest.mark.parametrize("layout", LAYOUTS)
def test_state_is_made_of_views(layout: str, request: pytest.FixtureRequest) -> None:
    """Writing into the state changes the model, and asking twice gives the same memory."""
    model: Any = load_model(request.getfixturevalue(layout))
    experts = model.model.layers[1].mlp.experts
    if getattr(experts, "_order", "rows") != "rows":
        pytest.skip("this CPU reads INT4 in another layout")
    first, second = model.state_dict(), model.state_dict()
    for name, tensor in first.items():
        assert name.endswith("weight_shape") or tensor.data_ptr() == second[name].data_ptr()
    with torch.no_grad():
        before = model(IDS).logits
        for name, tensor in first.items():
            if ".mlp.experts." in name and name.endswith(("_scale", "_scale_inv", "weight")):
                tensor.view(torch.uint8).zero_()
        assert not torch.equal(model(IDS).logits, before)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_state_goes_into_another_model(layout: str, request: pytest.FixtureRequest) -> None:
    """load_state_dict takes per-expert names, and the model then computes what the first one does."""
    path = request.getfixturevalue(layout)
    first, second = load_model(path), load_model(path)
    state = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    for tensor in second.state_dict().values():
        tensor.view(torch.uint8).zero_()
    result = second.load_state_dict(state)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    with torch.no_grad():
        assert torch.equal(first(IDS).logits, second(IDS).logits)


def test_a_state_that_does_not_fit_is_refused(k2_thinking: Path) -> None:
    """A missing, a strange and a misshapen tensor are each named."""
    model = load_model(k2_thinking)
    name = "model.layers.1.mlp.experts.3.up_proj.weight_packed"
    state = dict(model.state_dict())
    state["model.layers.1.mlp.experts.99.up_proj.weight_packed"] = state[name]
    with pytest.raises(RuntimeError, match=r"experts\.99\.up_proj"):
        model.load_state_dict(state)
    state = dict(model.state_dict())
    del state[name]
    with pytest.raises(RuntimeError, match=r"Missing.*experts\.3\.up_proj\.weight_packed"):
        model.load_state_dict(state)
    state = dict(model.state_dict())
    state[name] = state[name][:-1]
    with pytest.raises(RuntimeError, match=r"experts\.3\.up_proj: weight_scale: expected"):
        model.load_state_dict(state)


@pytest.mark.parametrize("layout", ["k2_source", "k2_thinking"])
def test_casts_leave_codes_and_scales_alone(layout: str, request: pytest.FixtureRequest) -> None:
    """`half` and `to` change what is not quantised, and not one bit of what is."""
    model: Any = load_model(request.getfixturevalue(layout))
    before = {name: bits(tensor).clone() for name, tensor in model.state_dict().items() if ".experts." in name}
    model.half().to(torch.float32)
    after = model.state_dict()
    assert all(torch.equal(bits(after[name]), tensor) for name, tensor in before.items())
    assert after["lm_head.weight"].dtype == torch.float32


def bits(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_saving_gives_the_checkpoint_back(
    layout: str, dtype: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Every file is there again, byte for byte: shards with their headers, index, config and tokenizer."""
    path = request.getfixturevalue(layout)
    load_model(path, dtype=dtype).save_pretrained(tmp_path / "saved")
    assert_equal_folders(path, tmp_path / "saved")


def assert_equal_folders(path: Path, saved: Path) -> None:
    """Compare every file of a checkpoint, the report of its conversion aside."""
    files = {file.name for file in path.iterdir() if not file.name.startswith("k2quant_report")}
    assert {file.name for file in saved.iterdir()} == files
    assert filecmp.cmpfiles(path, saved, files, shallow=False)[0] == sorted(files, key=list(files).index)


def test_saving_keeps_foreign_headers_and_fused_tensors(k2_bf16: Path, tmp_path: Path) -> None:
    """A checkpoint with fused experts and a header of another tool's making comes back as it was."""
    source = tmp_path / "fused"
    source.mkdir()
    model: Any = load_model(k2_bf16)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if ".experts." not in name}
    for number in (1, 2):
        experts, prefix = model.model.layers[number].mlp.experts, f"model.layers.{number}.mlp.experts"
        tensors |= {f"{prefix}.gate_up_proj": experts.gate_up_proj, f"{prefix}.down_proj": experts.down_proj}
    dtypes = {torch.bfloat16: "BF16", torch.float32: "F32"}
    specs = {name: TensorSpec(dtypes[t.dtype], tuple(t.shape)) for name, t in sorted(tensors.items())}
    header, spans = build_header(specs)
    header = header[:8] + header[8:].replace(b'{"format":"pt"}', b'{"format":"PT"}')
    data = bytearray(header + bytes(sum(spec.nbytes for spec in specs.values())))
    for name, (start, stop) in spans.items():
        data[start:stop] = bits(tensors[name].detach()).numpy().tobytes()
    (source / "model.safetensors").write_bytes(data)
    (source / "config.json").write_bytes((k2_bf16 / "config.json").read_bytes())
    loaded = load_model(source)
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    save_model(loaded, tmp_path / "saved")
    assert_equal_folders(source, tmp_path / "saved")


def test_saving_keeps_what_other_tools_say_of_the_quantization(k2_bf16: Path, tmp_path: Path) -> None:
    """A conversion leaves `hf_quant_config.json` behind; a saved model keeps formats, and this file."""
    source = Path(shutil.copytree(k2_bf16, tmp_path / "src"))
    (source / "hf_quant_config.json").write_text("{}")
    load_model(source).save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "hf_quant_config.json").read_text() == "{}"


def test_what_was_changed_is_saved(k2_bf16: Path, tmp_path: Path) -> None:
    """A trained weight, and a state given instead of the model's own, reach the files."""
    model: Any = load_model(k2_bf16)
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[5].fill_(0.5)
    save_model(model, tmp_path / "changed")
    name = "model.layers.1.mlp.experts.5.down_proj.weight"
    assert load_model(tmp_path / "changed").state_dict()[name].unique().tolist() == [0.5]
    model.save_pretrained(tmp_path / "given", state_dict={name: torch.full((512, 256), 0.25)})
    assert load_model(tmp_path / "given").state_dict()[name].unique().tolist() == [0.25]


def test_nothing_is_overwritten(k2_thinking: Path, tmp_path: Path) -> None:
    """A folder with a checkpoint is refused, and other files in a folder stay."""
    model = load_model(k2_thinking)
    with pytest.raises(DestinationForeign, match="holds a checkpoint already"):
        save_model(model, k2_thinking)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    save_model(model, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "tokenizer_config.json").read_text() == "{}"
    with pytest.raises(DestinationForeign):
        save_model(model, tmp_path)


def test_an_interrupted_save_does_not_look_finished(
    k2_thinking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the disk fills up, the folder says that it is incomplete and cannot be opened; the same call mends it."""
    from k2quant.errors import CheckpointError, OutputError
    from k2quant.model import saving

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "_write_rest", full)
    with pytest.raises(OutputError, match="No space left"):
        save_model(load_model(k2_thinking), tmp_path / "out")
    assert (tmp_path / "out" / "INCOMPLETE").exists()
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path / "out")
    monkeypatch.undo()
    save_model(load_model(k2_thinking), tmp_path / "out")
    assert_equal_folders(k2_thinking, tmp_path / "out")


def test_options_without_meaning_are_refused(k2_thinking: Path, tmp_path: Path) -> None:
    """`push_to_hub` is not passed over in silence; another process than the main one writes nothing."""
    model = load_model(k2_thinking)
    with pytest.raises(UsageError, match="push_to_hub"):
        model.save_pretrained(tmp_path / "out", push_to_hub=True)
    model.save_pretrained(tmp_path / "out", is_main_process=False)
    assert not (tmp_path / "out").exists()


SCALE = "model.layers.1.mlp.experts.3.up_proj.weight_scale"
WORDS = "model.layers.1.mlp.experts.3.up_proj.weight_packed"


@pytest.mark.parametrize(
    "state",
    [
        {"lm_head.weight": torch.zeros(3)},
        {"lm_head.weight": None},
        {"lm_head.weight": torch.zeros(2048, 512, device="meta")},
        {"lm_head.weight": torch.zeros(2048, 512).to_sparse()},
        {"lm_head.weight": torch.full((2048, 512), torch.nan)},
        {"lm_head.weight": torch.full((2048, 512), 3.4e38)},
        [1],
        {"lm_head.weight": torch.zeros(2048, 512, dtype=torch.int32)},
        {"lm_haed.weight": torch.zeros(2048, 512)},
        {WORDS: torch.zeros(256, 64)},
        {SCALE: torch.full((256, 16), torch.nan, dtype=torch.bfloat16)},
        {SCALE: torch.zeros(256, 15, dtype=torch.bfloat16)},
    ],
)
def test_a_given_state_is_checked_before_anything_is_written(state: Any, k2_thinking: Path, tmp_path: Path) -> None:
    """Unknown names, wrong shapes and dtypes, and values that no weight can have, leave no folder behind."""
    with pytest.raises(UsageError, match="state"):
        save_model(load_model(k2_thinking), tmp_path / "out", state=state)
    assert not (tmp_path / "out").exists()


def test_a_link_out_of_the_source_is_not_followed(k2_thinking: Path, tmp_path: Path) -> None:
    """generation_config.json as a link to another place is refused, not read."""
    from k2quant.errors import UnsafePath

    source = tmp_path / "linked"
    source.mkdir()
    for file in k2_thinking.iterdir():
        if file.name != "generation_config.json":
            (source / file.name).write_bytes(file.read_bytes())
    (tmp_path / "secret.json").write_text(json.dumps({"eos_token_id": 1}))
    (source / "generation_config.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(UnsafePath):
        load_model(source)
