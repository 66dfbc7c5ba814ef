"""What loading costs, where a model may lie, and what is refused before its weights are read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from k2quant.checkpoint.reader import open_checkpoint
from k2quant.checkpoint.writing.in_memory import Shard, write_checkpoint
from k2quant.cli import main
from k2quant.errors import BadValue, CheckpointError, K2QuantError, MalformedFile, MissingTensor, UsageError
from k2quant.kernels.ops import prepare_int4
from k2quant.kernels.products.packed.weight import Layout
from k2quant.model import filling, load_model, save_model
from k2quant.model.generation import generate, load_tokenizer
from k2quant.model.modules import PROJECTIONS, Backend, QuantizedExperts, QuantizedLinear
from k2quant.nano import vocabulary
from k2quant.nano.demo import K2_CONFIG, matrices

IDS = torch.randint(0, 2048, (1, 8), generator=torch.Generator().manual_seed(4))


# --- memory -----------------------------------------------------------------------------------------------------------

EXPERTS, HIDDEN, INNER = 192, 1024, 512

MEASURE = """
import re, sys
from pathlib import Path
import torch
from k2quant.model import load_model

def status(key):
    return int(re.search(rf"{key}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

load_model(sys.argv[1])
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
model = load_model(sys.argv[2])
held = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
print(held, status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs /proc")
def test_loading_int4_takes_its_packed_size_and_a_small_window(k2_thinking: Path, tmp_path: Path) -> None:
    """The peak of loading is the packed weights and at most 48 MB; as BF16 they would be 3.5 times as much."""
    write_int4(tmp_path / "big")
    command = [sys.executable, "-c", MEASURE, str(k2_thinking), str(tmp_path / "big")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    held, peak = map(int, done.stdout.split())
    assert held > 150e6
    assert peak < held + 48e6


def write_int4(folder: Path) -> None:
    """Write an INT4 checkpoint of one layer, nearly all of it routed experts."""
    sizes = {"hidden_size": HIDDEN, "moe_intermediate_size": INNER, "n_routed_experts": EXPERTS}
    few = {"num_hidden_layers": 1, "first_k_dense_replace": 0, "vocab_size": 64}
    config = {**K2_CONFIG, **sizes, **few}
    del config["quantization_config"]
    random = np.random.default_rng(0)
    tensors: Shard = {}

    def dense(name: str, *shape: int) -> None:
        tensors[name] = ("BF16", np.full(shape, 0x3C00, np.uint16))

    attention = {"q_a_proj": (256, HIDDEN), "kv_a_proj_with_mqa": (160, HIDDEN), "o_proj": (HIDDEN, 256)}
    for base, shape in matrices(0).items():
        if ".self_attn." in base:
            dense(f"{base}.weight", *attention.get(base.rpartition(".")[2], shape))
    layer = "model.layers.0"
    for name, length in (("q_a_layernorm", 256), ("kv_a_layernorm", 96)):
        dense(f"{layer}.self_attn.{name}.weight", length)
    for name in (f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm", "model.norm"):
        dense(f"{name}.weight", HIDDEN)
    dense("model.embed_tokens.weight", 64, HIDDEN)
    dense("lm_head.weight", 64, HIDDEN)
    dense(f"{layer}.mlp.gate.weight", EXPERTS, HIDDEN)
    tensors[f"{layer}.mlp.gate.e_score_correction_bias"] = ("F32", np.zeros(EXPERTS, np.float32))
    for part, (rows, columns) in (
        ("gate_proj", (INNER, HIDDEN)),
        ("up_proj", (INNER, HIDDEN)),
        ("down_proj", (HIDDEN, INNER)),
    ):
        dense(f"{layer}.mlp.shared_experts.{part}.weight", rows, columns)
        for expert in range(EXPERTS):
            base = f"{layer}.mlp.experts.{expert}.{part}"
            words = random.integers(-(2**31), 2**31 - 1, (rows, columns // 8), np.int32)
            tensors[f"{base}.weight_packed"] = ("I32", words)
            tensors[f"{base}.weight_scale"] = ("BF16", np.full((rows, columns // 32), 0x3C00, np.uint16))
            tensors[f"{base}.weight_shape"] = ("I32", np.array([rows, columns], np.int32))
    write_checkpoint(folder, {"model.safetensors": tensors}, config)


# --- places -----------------------------------------------------------------------------------------------------------

BLOCKS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.layers.2", "model.norm", "lm_head")


def logits(model: Any) -> torch.Tensor:
    """Return a model's logits on the CPU."""
    with torch.no_grad():
        found: torch.Tensor = model(IDS.to(model.assembly.device)).logits.cpu()
    return found


@pytest.mark.parametrize("layout", ["k2_source", "k2_thinking", "k2_mixed", "k2_bf16"])
@pytest.mark.parametrize("on_disk", [BLOCKS, BLOCKS[2:4], ("model.embed_tokens", "lm_head")])
def test_what_lies_on_disk_computes_the_same(
    layout: str, on_disk: tuple[str, ...], request: pytest.FixtureRequest
) -> None:
    """Blocks may wait in the checkpoint's files; bits are the same, and nothing stays in memory between two passes."""
    path = request.getfixturevalue(layout)
    model: Any = load_model(path, device={name: "disk" if name in on_disk else "cpu" for name in BLOCKS})
    wanted = logits(load_model(path))
    for _ in range(2):
        assert torch.equal(logits(model), wanted)
        for name in on_disk:
            assert all(tensor.is_meta for tensor in model.get_submodule(name).parameters())


def test_generation_from_disk(k2_thinking: Path) -> None:
    """Greedy decoding with the cache works when no layer stays in memory."""
    places = dict.fromkeys(BLOCKS, "disk")
    from_disk: Any = load_model(k2_thinking, device=places)
    whole: Any = load_model(k2_thinking)
    tokens = [model.generate(IDS, max_new_tokens=4, do_sample=False).tolist() for model in (from_disk, whole)]
    assert tokens[0] == tokens[1]


def test_auto_fills_memory_first_and_leaves_the_rest_on_disk(k2_bf16: Path, tmp_path: Path) -> None:
    """With little memory allowed, some blocks are left in the files; the logits are the same, and saving works."""
    model: Any = load_model(k2_bf16, device="auto", max_memory={"cpu": "32MB"})
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    assert torch.equal(logits(model), logits(load_model(k2_bf16)))
    save_model(model, tmp_path / "saved")
    assert torch.equal(logits(load_model(tmp_path / "saved")), logits(load_model(k2_bf16)))


def test_auto_with_enough_memory_is_one_device(k2_thinking: Path) -> None:
    """Where everything fits, `auto` is an ordinary model."""
    model = load_model(k2_thinking, device="auto")
    assert not hasattr(model, "hf_device_map")
    assert not any(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("places", [{"": "disk", "lm_head": "cpu"}, {"": "cpu", "model.layers.1.mlp": "disk"}])
def test_the_nearest_entry_of_a_map_counts(places: dict[str, str], k2_bf16: Path) -> None:
    """A module within another that has an entry of its own lies where its own says, before and after a pass."""
    model: Any = load_model(k2_bf16, device=places)
    for _ in range(2):
        assert torch.equal(logits(model), logits(load_model(k2_bf16)))
        assert not model.lm_head.weight.is_meta
        assert model.model.layers[1].mlp.gate.weight.is_meta
        assert model.model.layers[0].self_attn.o_proj.weight.is_meta == (places[""] == "disk")


@pytest.mark.parametrize("layout", ["k2_bf16", "k2_thinking"])
def test_a_model_partly_on_disk_is_not_changed(layout: str, request: pytest.FixtureRequest) -> None:
    """Weights given to it, and casts, would be lost: they are refused."""
    model: Any = load_model(request.getfixturevalue(layout), device={"": "cpu", "lm_head": "disk"})
    with pytest.raises(UsageError, match="lm_head"):
        model.load_state_dict({"lm_head.weight": torch.zeros(2048, 512)}, strict=False)
    with pytest.raises(UsageError, match="lm_head"):
        model.float()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("layout", ["k2_source", "k2_thinking", "k2_bf16"])
@pytest.mark.parametrize("waiting", ["cuda:0", "cpu", "disk"])
def test_a_gpu_computes_what_waits_elsewhere(layout: str, waiting: str, request: pytest.FixtureRequest) -> None:
    """Layers on the GPU, on the CPU or on disk: all compute on the GPU, with the same bits."""
    path = request.getfixturevalue(layout)
    places = {name: waiting if ".layers." in name else "cuda:0" for name in BLOCKS}
    assert torch.equal(logits(load_model(path, device=places)), logits(load_model(path, device="cuda:0")))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_layers_spread_over_gpus(k2_thinking: Path) -> None:
    """Activations follow the layers from one GPU to the next."""
    places = {name: f"cuda:{number % 2}" for number, name in enumerate(BLOCKS)}
    assert torch.equal(logits(load_model(k2_thinking, device=places)), logits(load_model(k2_thinking, device="cuda:0")))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("layout", ["k2_source", "k2_thinking", "k2_bf16"])
def test_a_model_moves_between_devices(layout: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """`to` changes layouts with the device; the state that comes out on either side is the same, and saves the same."""
    model: Any = load_model(request.getfixturevalue(layout))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.to("cuda")
    after = model.state_dict()
    assert all(torch.equal(after[name].cpu().view(torch.uint8), t.view(torch.uint8)) for name, t in before.items())
    save_model(model, tmp_path / "saved")
    again = load_model(tmp_path / "saved").state_dict()
    assert all(torch.equal(again[name].view(torch.uint8), t.view(torch.uint8)) for name, t in before.items())


@pytest.mark.parametrize(
    ("device", "max_memory"),
    [
        ("tpu", None),
        ("cuda:99", None),
        ("nonsense", None),
        ({"model.layers.7": "cpu"}, None),
        ({"model.layers": "cpu"}, None),
        ({"": "tpu"}, None),
        ({"": None}, None),
        (None, None),
        (1.5, None),
        ("cpu", {"cpu": "1GB"}),
        ("auto", {"cpu": "plenty"}),
    ],
)
def test_places_that_make_no_sense_are_refused(device: Any, max_memory: Any, k2_thinking: Path) -> None:
    """Unknown devices, maps that name no module or forget one, and limits without `auto` are usage errors."""
    with pytest.raises(UsageError):
        load_model(k2_thinking, device=device, max_memory=max_memory)


@pytest.mark.parametrize("option", [{"dtype": "int8"}, {"dtype": torch.float64}, {"backend": "fast"}])
def test_options_that_make_no_sense_are_refused(option: dict[str, Any], k2_thinking: Path) -> None:
    """Other dtypes and backends are usage errors."""
    with pytest.raises(UsageError):
        load_model(k2_thinking, **option)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail when a weight is read."""

    def refuse(*_: object) -> None:
        pytest.fail("a weight was read")

    monkeypatch.setattr(filling, "read_into", refuse)


Edit = Callable[[dict[str, Any], dict[str, str]], object]


def edited(source: Path, folder: Path, edit: Edit) -> Path:
    """Copy a checkpoint with its config and its index changed."""
    folder.mkdir()
    for file in source.glob("*.safetensors"):
        (folder / file.name).symlink_to(file)
    config = json.loads((source / "config.json").read_text())
    index = json.loads((source / "model.safetensors.index.json").read_text())
    edit(config, index["weight_map"])
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for link in folder.glob("*.safetensors"):
        data = link.read_bytes()
        link.unlink()
        link.write_bytes(data)
    return folder


SUFFIXES = ("weight_packed", "weight_scale", "weight_shape")
EXPERT = "model.layers.1.mlp.experts.3.up_proj"
BAD: dict[str, Edit] = {
    "a whole expert is missing": lambda _, index: [
        index.pop(f"{EXPERT}.{s}") for s in ("weight_packed", "weight_scale", "weight_shape")
    ],
    "a scale is missing": lambda _, index: index.pop(f"{EXPERT}.weight_scale"),
    "a norm is missing": lambda _, index: index.pop("model.layers.2.input_layernorm.weight"),
    "the router's bias is missing": lambda _, index: index.pop("model.layers.1.mlp.gate.e_score_correction_bias"),
    "the head is missing": lambda _, index: index.pop("lm_head.weight"),
    "another hidden size": lambda config, _: config.update(hidden_size=1024),
    "another vocabulary": lambda config, _: config.update(vocab_size=163840),
    "more layers than there are": lambda config, _: config.update(num_hidden_layers=61),
    "a billion layers": lambda config, _: config.update(num_hidden_layers=10**9),
    "fewer layers than there are": lambda config, _: config.update(num_hidden_layers=2),
    "more experts than there are": lambda config, _: config.update(n_routed_experts=384),
    "fewer experts than there are": lambda config, _: config.update(n_routed_experts=8),
    "more experts a token than experts": lambda config, _: config.update(num_experts_per_tok=17),
    "a huge size": lambda config, _: config.update(intermediate_size=2**30),
    "a size beyond all": lambda config, _: config.update(hidden_size=2**62),
    "a negative size": lambda config, _: config.update(kv_lora_rank=-96),
    "a size that is text": lambda config, _: config.update(num_attention_heads="4"),
    "no size": lambda config, _: config.pop("moe_intermediate_size"),
    "groups that do not divide": lambda config, _: config.update(n_group=3),
    "no groups": lambda config, _: config.pop("n_group"),
    "another activation": lambda config, _: config.update(hidden_act="gelu"),
    "another scoring": lambda config, _: config.update(scoring_func="softmax"),
    "tied embeddings as text": lambda config, _: config.update(tie_word_embeddings="yes"),
    "grouped-query heads": lambda config, _: config.update(num_key_value_heads=2),
    "another model": lambda config, _: config.update(model_type="kimi_k3"),
    "another quantization": lambda config, _: config.update(quantization_config={"quant_method": "gptq"}),
    "text_config is a list": lambda config, _: config.update(text_config=[1]),
    "rope_scaling is nonsense": lambda config, _: config.update(rope_scaling={"type": "none of these"}),
    "rope_theta is text": lambda config, _: config.update(rope_theta="fast"),
    "eps is a list": lambda config, _: config.update(rms_norm_eps=[1]),
    "no scaling factor": lambda config, _: config.pop("routed_scaling_factor"),
    "no rope_theta": lambda config, _: config.pop("rope_theta"),
    "rotary dimensions beyond all": lambda config, _: config.update(qk_rope_head_dim=10**9),
    "an eps of 1e300": lambda config, _: config.update(rms_norm_eps=1e300),
    "a scaling factor of 1e300": lambda config, _: config.update(routed_scaling_factor=1e300),
    "norm_topk_prob is null": lambda config, _: config.update(norm_topk_prob=None),
    "yarn by 0": lambda config, _: config["rope_scaling"].update(factor=0),
    "an attention factor that is text": lambda config, _: config["rope_scaling"].update(attention_factor="x"),
    "a rope type that is a list": lambda config, _: config["rope_scaling"].update(type=["yarn"]),
    "a rope_theta below 1": lambda config, _: config.update(rope_theta=1e-45),
    "rope_scaling is a number": lambda config, _: config.update(rope_scaling=3),
    "text for a number of layers": lambda config, _: config.update(num_nextn_predict_layers="x"),
    "an end beyond the vocabulary": lambda config, _: config.update(eos_token_id=10**30),
    "no end at all": lambda config, _: config.update(eos_token_id=[]),
    "groups that hold too few experts": lambda config, _: config.update(n_group=4, topk_group=1),
    "attention with biases": lambda config, _: config.update(attention_bias=True),
}


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("what", BAD)
def test_bad_checkpoints_are_refused_before_weights_are_read(what: str, k2_thinking: Path, tmp_path: Path) -> None:
    """What config, names and shapes can tell is found without reading a weight, and said in one sentence of ours."""
    folder = edited(k2_thinking, tmp_path / "bad", BAD[what])
    with pytest.raises(CheckpointError) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def test_a_config_chooses_no_kernels(k2_thinking: Path, tmp_path: Path) -> None:
    """Keys that transformers would act on, but that no K2 has, do not reach it: nothing is downloaded or switched."""
    odd = {
        "attn_implementation": "kernels-community/flash-attn",
        "_attn_implementation": "flex_attention",
        "experts_implementation": "grouped_mm",
        "return_dict": False,
        "num_labels": 3 * 10**7,
        "partial_rotary_factor": 1e7,
        "auto_map": {"AutoModelForCausalLM": "evil.Evil"},
    }
    model = load_model(edited(k2_thinking, tmp_path / "odd", lambda config, _: config.update(odd)))
    assert model.config._attn_implementation == "sdpa"  # noqa: SLF001  where transformers keeps it
    assert torch.equal(logits(model), logits(load_model(k2_thinking)))


@pytest.mark.usefixtures("unread")
def test_a_missing_expert_is_named(k2_thinking: Path, tmp_path: Path) -> None:
    """The message says which tensor the model needs."""
    folder = edited(k2_thinking, tmp_path / "bad", BAD["a whole expert is missing"])
    with pytest.raises(MissingTensor, match=r"model\.layers\.1\.mlp\.experts\.3\.up_proj"):
        load_model(folder)


@pytest.mark.usefixtures("unread")
def test_no_config_and_no_checkpoint(k2_thinking: Path, tmp_path: Path) -> None:
    """A folder without config.json, an empty folder and a missing one are errors of ours."""
    folder = edited(k2_thinking, tmp_path / "bad", lambda *_: None)
    (folder / "config.json").unlink()
    for path in (folder, tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError):
            load_model(path)


def test_a_weight_shape_that_lies_is_refused(k2_thinking: Path, tmp_path: Path) -> None:
    """The value of weight_shape contradicts the packed words: refused, as a conversion does."""
    folder = edited(k2_thinking, tmp_path / "bad", lambda *_: None)
    patch(folder, f"{EXPERT}.weight_shape", b"\x07\x00\x00\x00")
    with pytest.raises(CheckpointError, match="weight_shape"):
        load_model(folder)


@pytest.mark.parametrize("value", [b"\x80\xbf", b"\xc0\x7f", b"\x80\x7f"])
def test_scales_that_no_weight_can_have_are_named(value: bytes, k2_thinking: Path, tmp_path: Path) -> None:
    """A negative, NaN or infinite scale is found while loading, with the weight's name and file."""
    folder = edited(k2_thinking, tmp_path / "bad", lambda *_: None)
    patch(folder, f"{EXPERT}.weight_scale", value)
    with pytest.raises(BadValue, match=r"experts\.3\.up_proj.*model-2"):
        load_model(folder)


def test_a_nan_code_is_named(k2_source: Path, tmp_path: Path) -> None:
    """An FP8 code that is NaN is found while loading."""
    folder = edited(k2_source, tmp_path / "bad", lambda *_: None)
    patch(folder, f"{EXPERT}.weight", b"\x7f")
    with pytest.raises(BadValue, match=r"experts\.3\.up_proj.*NaN"):
        load_model(folder)


def patch(folder: Path, name: str, value: bytes) -> None:
    """Overwrite the first bytes of a tensor."""
    entry = open_checkpoint(folder).tensors[name]
    with (folder / entry.file).open("r+b") as file:
        file.seek(entry.start)
        file.write(value)


# --- modules ----------------------------------------------------------------------------------------------------------


def test_a_quantised_linear_with_a_bias(k2_source: Path) -> None:
    """A bias is added, moves with the module, and is part of its state."""
    model: Any = load_model(k2_source)
    linear = model.model.layers[0].self_attn.q_a_proj
    with_bias = QuantizedLinear(linear.packed("weight"), linear.format, "auto", nn.Parameter(torch.ones(256)))
    x = torch.randn(2, 512)
    with torch.no_grad():
        assert torch.equal(with_bias(x), linear(x) + 1)
    assert set(with_bias.state_dict()) == {"weight", "weight_scale_inv", "bias"}


@pytest.mark.parametrize("layout", ["groups", "torch", "rows"])
def test_layouts_may_change_under_a_model(layout: Layout, k2_thinking: Path) -> None:
    """Every projection of a layer's experts changes its layout, as moving to another device does; the state stays."""
    model: Any = load_model(k2_thinking, dtype="float32")
    experts = model.model.layers[1].mlp.experts
    before, wanted = experts.state_dict(), logits(model)
    experts.replace(lambda weight: prepare_int4(*weight.checkpoint(), layout=layout))
    assert {experts.packed(name).layout for name in PROJECTIONS} == {layout}
    after = experts.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert torch.allclose(logits(model), wanted, rtol=1e-3, atol=1e-3)


def test_experts_pass_over_what_is_no_expert(k2_thinking: Path) -> None:
    """Ids outside 0..E-1, as expert parallelism marks tokens that are elsewhere, add nothing, in every backend."""
    x, weights = torch.randn(3, 512), torch.ones(3, 2)
    ids = torch.tensor([[0, 16], [-1, 16], [2, 3]])
    for backend in get_args(Backend):
        model: Any = load_model(k2_thinking, dtype="float32", backend=backend)
        experts = model.model.layers[1].mlp.experts
        assert isinstance(experts, QuantizedExperts)
        out = experts(x, ids, weights)
        assert out[1].abs().max() == 0
        assert out[0].abs().max() > 0


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of single characters, its numbers spread over the small model's vocabulary."""
    folder = tmp_path_factory.mktemp("tokenizer")
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {chr(0x4E00 + n): n for n in range(3, 2048)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))  # noqa: S106  a token of text
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)  # noqa: S106
    return folder


def with_tokenizer(source: Path, tokenizer: Path, folder: Path) -> Path:
    """Copy a checkpoint and put a tokenizer beside it."""
    folder.mkdir()
    for file in [*source.iterdir(), *tokenizer.iterdir()]:
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


PROMPT = "".join(chr(0x4E00 + n) for n in (17, 500, 1234))


@pytest.mark.parametrize("layout", ["k2_source", "k2_thinking", "k25", "k2_bf16"])
def test_generate_streams_what_the_model_says(
    layout: str, tokenizer_files: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Text on stdout is the greedy continuation; times are on stderr; --json gives both as one object."""
    path = with_tokenizer(request.getfixturevalue(layout), tokenizer_files, tmp_path / "model")
    model: Any = load_model(path)
    ids = torch.tensor([[17, 500, 1234]])
    wanted = model.generate(ids, max_new_tokens=6, do_sample=False)[0, 3:].tolist()
    text = "".join(chr(0x4E00 + n) for n in wanted if n > 2)
    command = ["generate", str(path), "--prompt", PROMPT, "--max-new-tokens", "6"]
    shown = CliRunner().invoke(main, command)
    assert (shown.exit_code, shown.stdout) == (0, text + "\n")
    assert "tokens/s" in shown.stderr
    facts = json.loads(CliRunner().invoke(main, [*command, "--json"]).stdout)
    assert (facts["text"], facts["prompt_tokens"], facts["new_tokens"]) == (text, 3, len(wanted))


def test_generate_reads_its_prompt_from_a_file_or_stdin(
    k2_thinking: Path, tokenizer_files: Path, tmp_path: Path
) -> None:
    """The line break that an editor or `echo` put at the end is no part of it, nor a mark of UTF-8 at its beginning."""
    path = with_tokenizer(k2_thinking, tokenizer_files, tmp_path / "model")
    (tmp_path / "prompt.txt").write_text(f"{PROMPT}\n", encoding="utf-8-sig")
    for named in (["--prompt", "-"], ["--prompt-file", str(tmp_path / "prompt.txt")]):
        command = ["generate", str(path), *named, "--max-new-tokens", "1", "--json"]
        shown = CliRunner().invoke(main, command, input=f"{PROMPT}\r\n")
        assert json.loads(shown.stdout)["prompt_tokens"] == 3


def test_generate_says_what_is_wrong(k2_thinking: Path, tokenizer_files: Path, tmp_path: Path) -> None:
    """No tokenizer, a broken one, one that is code, an empty prompt, a missing folder: one line each, no traceback."""
    path = with_tokenizer(k2_thinking, tokenizer_files, tmp_path / "model")

    def message(*extra: str, folder: Path = path, prompt: str = PROMPT) -> tuple[int, str]:
        shown = CliRunner().invoke(main, ["generate", str(folder), "--prompt", prompt, *extra])
        assert shown.stdout == ""
        return shown.exit_code, shown.stderr

    assert message(prompt="")[0] == 2
    assert message("--device", "tpu")[0] == 2
    assert message(folder=tmp_path / "nowhere")[0] == 1
    code = {
        "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
        "tokenizer_class": "TikTokenTokenizer",
    }
    (path / "tokenizer.json").unlink()
    (path / "tokenizer_config.json").write_text(json.dumps(code))
    marker = tmp_path / "ran"
    (path / "tokenization_kimi.py").write_text(f"open({str(marker)!r}, 'w')\nclass TikTokenTokenizer: pass\n")
    exit_code, text = message()
    assert exit_code == 1
    assert "--trust-remote-code" in text
    assert not marker.exists()
    (path / "tokenizer_config.json").unlink()
    assert "has no tokenizer" in message()[1]


@pytest.mark.parametrize("ids", [[], "x", 10**30, [1, -1], {"a": 1}])
def test_odd_ends_of_text_are_refused(ids: Any, k2_thinking: Path, tmp_path: Path) -> None:
    """generation_config.json may name only tokens of the vocabulary."""
    folder = edited(k2_thinking, tmp_path / "bad", lambda *_: None)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    with pytest.raises(MalformedFile, match="eos_token_id"):
        load_model(folder)


def test_tokenizer_files_stay_within_the_folder(k2_thinking: Path, tokenizer_files: Path, tmp_path: Path) -> None:
    """A link out of the folder and a pipe are refused, not followed or waited for; bytes that are no text are, too."""
    path = with_tokenizer(k2_thinking, tokenizer_files, tmp_path / "model")
    shown = CliRunner().invoke(main, ["generate", str(path), "--prompt", "a\udcff"])
    assert (shown.exit_code, shown.stdout) == (2, "")
    (path / "tokenizer.json").rename(tmp_path / "outside.json")
    (path / "tokenizer.json").symlink_to(tmp_path / "outside.json")
    shown = CliRunner().invoke(main, ["generate", str(path), "--prompt", PROMPT])
    assert (shown.exit_code, shown.stdout) == (1, "")
    assert "leaves the folder" in shown.stderr
    shown = CliRunner().invoke(main, ["generate", str(path), "--prompt", PROMPT, "--follow-links"])
    assert shown.exit_code == 0, shown.output
    (path / "tokenizer.json").unlink()
    os.mkfifo(path / "tokenizer.json")
    shown = CliRunner().invoke(main, ["generate", str(path), "--prompt", PROMPT])
    assert (shown.exit_code, shown.stdout) == (1, "")
    assert "not a regular file" in shown.stderr


PANICS = {
    "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    "pre_tokenizer": {"type": "FixedLength", "length": 0},
}


@pytest.mark.parametrize("part", PANICS)
def test_a_tokenizer_that_panics_is_an_error_of_ours(
    part: str, k2_thinking: Path, tokenizer_files: Path, tmp_path: Path
) -> None:
    """A panic of the tokenizer's compiled code is no Exception in Python, and still ends in one line."""
    path = with_tokenizer(k2_thinking, tokenizer_files, tmp_path / "model")
    settings = json.loads((path / "tokenizer.json").read_text())
    (path / "tokenizer.json").write_text(json.dumps(settings | {part: PANICS[part]}))
    shown = CliRunner().invoke(main, ["generate", str(path), "--prompt", PROMPT, "--max-new-tokens", "2"])
    assert shown.exit_code == 1
    assert "tokenizer" in shown.stderr
    assert isinstance(shown.exception, SystemExit)


@pytest.mark.parametrize(("name", "content"), [("tokenizer.json", "{}"), ("tokenizer_config.json", "[1]")])
def test_a_tokenizer_of_broken_files_is_named_with_a_remedy(
    name: str, content: str, k2_thinking: Path, tokenizer_files: Path, tmp_path: Path
) -> None:
    """The error says in which folder, of what kind the trouble is, and which files to replace."""
    path = with_tokenizer(k2_thinking, tokenizer_files, tmp_path / "model")
    (path / name).write_text(content)
    with pytest.raises(CheckpointError, match=rf"found \w+Error: .*; are its files whole\? .*{name}") as caught:
        load_tokenizer(path)
    assert str(caught.value).startswith(f"{path}: its tokenizer cannot be loaded")


def test_the_reason_of_transformers_is_told_whole(k2_thinking: Path, tmp_path: Path) -> None:
    """The reason that transformers gives stands in its second line; the error has it, in one."""
    folder = edited(k2_thinking, tmp_path / "bad", lambda *_: None)
    config = json.loads((folder / "config.json").read_text())
    config.get("text_config", config)["qk_rope_head_dim"] = 7
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(MalformedFile, match="RoPE requires an even rotary dimension, but got `head_dim`=7"):
        load_model(folder)


@pytest.mark.parametrize("prompt", ["", "Aé0478+3=", "日本", "A" * 200_000])
def test_prompts_that_cannot_be_answered_are_refused(prompt: str, k2_thinking: Path, tmp_path: Path) -> None:
    """Nothing, characters that the tokenizer passes over, and more tokens than there is room for."""
    path = edited(k2_thinking, tmp_path / "model", lambda *_: None)
    for name, content in vocabulary.files().items():
        (path / name).write_bytes(content)
    with pytest.raises(K2QuantError):
        generate(load_model(path), load_tokenizer(path), prompt, max_new_tokens=2)


def test_the_generate_command_ends_by_itself(k2_thinking: Path) -> None:
    """Errors of ours are what comes out, whatever the folder holds; the process does not hang on a prompt for trust."""
    command = [sys.executable, "-m", "k2quant", "generate", str(k2_thinking), "--prompt", "a"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 1
    assert done.stderr.startswith("k2quant: ")
    assert "Traceback" not in done.stderr
