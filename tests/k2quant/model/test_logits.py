"""A loaded checkpoint computes what transformers computes on the dequantised one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DeepseekV3ForCausalLM

from k2quant.conversion.convert import convert
from k2quant.model import load_model
from k2quant.model.modules import Backend, FusedExperts, QuantizedExperts, QuantizedLinear, SeparateExperts

IDS = torch.randint(0, 2048, (2, 24), generator=torch.Generator().manual_seed(7))
MANY = torch.randint(0, 2048, (48, 12), generator=torch.Generator().manual_seed(8))
LAYOUTS = ("k2_source", "k2_thinking", "k25", "k2_mixed", "k2_bf16")


class Truth(NamedTuple):
    """What transformers computes."""

    ids: Tensor
    logits: Tensor


Expected = Callable[[Path], Truth]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Expected:
    """Logits of transformers on the BF16 form of a checkpoint, computed in float32; each once."""
    known: dict[Path, Truth] = {}

    def logits(path: Path) -> Truth:
        if path not in known:
            known[path] = truth(transformers_model(path, tmp_path_factory.mktemp("oracle")))
        return known[path]

    return logits


def truth(model: Any) -> Truth:
    """Compute the logits of the four sequences whose routing is farthest from a tie.

    A random router has tokens for which two experts are as good as equal; there, the last bit decides, and says nothing
    about the weights.
    """
    gates = [layer.mlp.gate for layer in model.model.layers[1:]]
    with torch.no_grad():
        found = model(MANY, output_router_logits=True)
    margins = []
    for gate, scores in zip(gates, found.router_logits, strict=True):
        ranked = (scores.sigmoid() + gate.e_score_correction_bias).sort(-1).values
        margins.append((ranked[:, -gate.top_k] - ranked[:, -gate.top_k - 1]).view(MANY.shape).amin(1))
    chosen = torch.stack(margins).amin(0).argsort(descending=True)[:4]
    return Truth(MANY[chosen], found.logits[chosen])


def transformers_model(path: Path, work: Path) -> Any:
    """Convert to BF16 and have transformers load the language model by its own means."""
    bf16 = convert(path, work / "bf16", to="bf16").folder
    plain = work / "plain"
    plain.mkdir()
    for shard in bf16.glob("*.safetensors"):
        tensors = {name.removeprefix("language_model."): t for name, t in load_file(shard).items()}
        kept = {name: t for name, t in tensors.items() if name.startswith(("model.", "lm_head."))}
        if kept:
            save_file(kept, plain / shard.name, metadata={"format": "pt"})
    index = {name: shard.name for shard in plain.glob("*.safetensors") for name in load_file(shard)}
    (plain / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config = json.loads((bf16 / "config.json").read_text())
    config = config.get("text_config", config) | {"model_type": "deepseek_v3"}
    (plain / "config.json").write_text(json.dumps(config))
    return DeepseekV3ForCausalLM.from_pretrained(plain, dtype=torch.float32)


def distance(model: Any, truth: Truth) -> float:
    """Return the relative distance of a model's logits to the truth."""
    with torch.no_grad():
        found = model(truth.ids).logits.float()
    return float((found - truth.logits).norm() / truth.logits.norm())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_logits_are_those_of_the_dequantised_checkpoint(
    layout: str, backend: Backend, expected: Expected, request: pytest.FixtureRequest
) -> None:
    """Within 1e-2: code * scale is not rounded to BF16 here, and that is the only difference."""
    path = request.getfixturevalue(layout)
    model = load_model(path, dtype=torch.float32, backend=backend)
    assert distance(model, expected(path)) < 1e-2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_in_bf16_stay_near(layout: str, expected: Expected, request: pytest.FixtureRequest) -> None:
    """With BF16 activations, as people run it, logits differ by BF16's own rounding and no more."""
    path = request.getfixturevalue(layout)
    model = load_model(path)
    assert model(IDS).logits.dtype == torch.bfloat16
    assert distance(model, expected(path)) < 5e-2


@pytest.mark.parametrize("layout", ["k2_source", "k2_thinking", "k2_bf16"])
def test_logits_under_torch_compile(layout: str, expected: Expected, request: pytest.FixtureRequest) -> None:
    """The whole model is one graph, and gives the same logits."""
    path = request.getfixturevalue(layout)
    model = load_model(path, dtype=torch.float32)
    torch.compiler.reset()
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert distance(compiled, expected(path)) < 1e-2


def test_formats_are_held_packed(k2_source: Path, k2_thinking: Path, k2_mixed: Path, k2_bf16: Path) -> None:
    """Each weight is held in the format that its tensors have, whatever the config calls the checkpoint."""
    fp8, int4, mixed, bf16 = (load_model(path) for path in (k2_source, k2_thinking, k2_mixed, k2_bf16))
    kinds = [type(model.model.layers[1].mlp.experts) for model in (fp8, int4, mixed, bf16)]
    assert kinds == [QuantizedExperts, QuantizedExperts, QuantizedExperts, FusedExperts]
    names = [model.model.layers[1].mlp.experts.format.name for model in (fp8, int4, mixed)]
    assert names == ["fp8", "int4", "int4"]
    attention = [model.model.layers[0].self_attn.q_a_proj for model in (fp8, int4, mixed, bf16)]
    assert [isinstance(module, QuantizedLinear) for module in attention] == [True, False, True, False]


def test_experts_of_several_formats_in_one_layer(k2_bf16: Path, tmp_path: Path, expected: Expected) -> None:
    """A layer whose experts are partly BF16 and partly INT4 runs expert by expert."""
    path = convert(
        k2_bf16, tmp_path / "part", to="int4", ignore=(r"experts\.(3|7)\.", r"experts\.5\.up_proj"), allow_split=True
    ).folder
    model = load_model(path, dtype=torch.float32)
    assert isinstance(model.model.layers[1].mlp.experts, SeparateExperts)
    assert distance(model, expected(path)) < 1e-2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_greedy_decoding_with_the_cache(layout: str, request: pytest.FixtureRequest) -> None:
    """Generated token by token through the cache, the text is what full passes over it would choose."""
    model: Any = load_model(request.getfixturevalue(layout), dtype=torch.float32)
    out = model.generate(IDS[:1], max_new_tokens=8, do_sample=False)
    with torch.no_grad():
        logits = model(out[:, :-1]).logits[0, IDS.shape[1] - 1 :]
    assert logits.argmax(-1).tolist() == out[0, IDS.shape[1] :].tolist()


def test_gradients_reach_the_activations(k2_thinking: Path) -> None:
    """A frozen packed model passes gradients through, as adapters and distillation need."""
    model = load_model(k2_thinking, dtype=torch.float32)
    embedded = model.model.embed_tokens(IDS).detach().requires_grad_()
    model(inputs_embeds=embedded).logits.float().logsumexp(-1).sum().backward()
    assert embedded.grad is not None
    assert embedded.grad.isfinite().all()
    assert embedded.grad.norm() > 0
