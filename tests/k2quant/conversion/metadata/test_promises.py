"""What config.json promises of layers, experts and parts: what is named, by whom, and what goes on all the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from k2quant.checking.inspection import inspect
from k2quant.checkpoint.reader import REPORT, open_checkpoint
from k2quant.checkpoint.writing.in_memory import Shard, write_checkpoint
from k2quant.cli import main
from k2quant.conversion.convert import convert
from rewritten import tensors_of
from tiny import NANO, write_model

LAYER = "model.layers.1."
Change = Callable[[dict[str, Any], Shard], object]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Shard:
    """The tensors of a tiny K2 of two layers: one with a dense MLP, one with eight experts."""
    folder = tmp_path_factory.mktemp("whole") / "K2"
    write_model(folder)
    return tensors_of(open_checkpoint(folder))


def written(folder: Path, tensors: Shard, change: Change, *, nested: bool = False) -> Path:
    """Write the tiny K2 with its config or its tensors changed; nested: as K2.5 has its config."""
    config, shard = NANO | {"num_hidden_layers": 2}, dict(tensors)
    change(config, shard)
    if nested:
        config = {"model_type": "kimi_k25", "text_config": config, "num_hidden_layers": 77}
    write_checkpoint(folder, {"model.safetensors": shard}, config)
    return folder


def predictor(number: int) -> Change:
    """Add a layer that predicts further tokens: a decoder layer with `eh_proj` and norms of its own."""

    def add(_: dict[str, Any], tensors: Shard) -> None:
        name = f"model.layers.{number}."
        tensors |= {key.replace(LAYER, name): value for key, value in tensors.items() if key.startswith(LAYER)}
        tensors[f"{name}eh_proj.weight"] = ("BF16", np.full((64, 128), 0x3F80, np.uint16))
        tensors |= {f"{name}{norm}.weight": ("BF16", np.full(64, 0x3F80, np.uint16)) for norm in ("enorm", "hnorm")}

    return add


def both(*changes: Change) -> Change:
    """Make several changes."""
    return lambda config, tensors: [change(config, tensors) for change in changes]


def says(**keys: object) -> Change:
    """Change the config."""
    return lambda config, _: config.update(keys)


def without(*ends: str) -> Change:
    """Leave tensors out whose names end so."""

    def drop(_: dict[str, Any], tensors: Shard) -> None:
        for name in [name for name in tensors if name.endswith(ends)]:
            del tensors[name]

    return drop


def without_layer(_: dict[str, Any], tensors: Shard) -> None:
    """Leave the second layer out."""
    for name in [name for name in tensors if name.startswith(LAYER)]:
        del tensors[name]


GATE = f"{LAYER}mlp.gate.weight"

BROKEN: dict[str, tuple[Change, str]] = {
    "a layer for further tokens is missing": (
        says(num_nextn_predict_layers=1),
        "num_nextn_predict_layers is 1, but layer 2 is none that predicts further tokens (missing layers: 1); engines",
    ),
    "one of two layers for further tokens is missing": (
        both(says(num_nextn_predict_layers=2), predictor(2)),
        "num_nextn_predict_layers is 2, but layer 3 is none that predicts further tokens (missing layers: 1)",
    ),
    "the layer for further tokens is counted among the decoder's": (
        both(says(num_nextn_predict_layers=1, num_hidden_layers=3), predictor(2)),
        "num_nextn_predict_layers is 1, but layer 3 is none that predicts further tokens (missing layers: 1)",
    ),
    "the layer for further tokens has lost what makes it one": (
        both(says(num_nextn_predict_layers=1), predictor(2), without("eh_proj.weight", "hnorm.weight", "enorm.weight")),
        "num_nextn_predict_layers is 1, but layer 2 is none that predicts further tokens (missing layers: 1)",
    ),
    "a layer for further tokens that nothing promises": (
        both(says(num_nextn_predict_layers=0), predictor(2)),
        "num_nextn_predict_layers is 0, but layer 2 predicts further tokens (layers too many: 1); a model is run",
    ),
    "two such layers, and no word of them": (
        both(lambda config, _: config.pop("num_nextn_predict_layers"), predictor(2), predictor(3)),
        "num_nextn_predict_layers is not set, but layer 2 predicts further tokens (layers too many: 2)",
    ),
    "layers are missing": (
        says(num_hidden_layers=5),
        "num_hidden_layers is 5, but there is no layer 2 (missing layers: 3)",
    ),
    "a layer in the middle is missing": (
        both(says(num_hidden_layers=3), predictor(2), without("eh_proj.weight", "norm.weight"), without_layer),
        "num_hidden_layers is 3, but there is no layer 1 (missing layers: 1)",
    ),
    "a billion layers": (
        says(num_hidden_layers=10**9),
        "num_hidden_layers is 1000000000, but there is no layer 2 (missing layers: 999999998)",
    ),
    "layers too many": (
        says(num_hidden_layers=1, first_k_dense_replace=1),
        "num_hidden_layers is 1, but there is a layer 1 (layers too many: 1); engines leave it out, or fail",
    ),
    "experts where a dense MLP should be": (
        says(first_k_dense_replace=2),
        "first_k_dense_replace is 2, but layer 1 has routed experts where a dense MLP belongs (such layers: 1)",
    ),
    "a dense MLP where experts should be": (
        says(first_k_dense_replace=0),
        "first_k_dense_replace is 0, but layer 0 has a dense MLP where a mixture of experts belongs (such layers: 1)",
    ),
    "a dense MLP beside experts": (
        lambda _, tensors: tensors.update({f"{LAYER}mlp.up_proj.weight": tensors["model.layers.0.mlp.up_proj.weight"]}),
        "first_k_dense_replace is 1, but layer 1 has a dense MLP where a mixture of experts belongs (such layers: 1)",
    ),
    "every second layer has experts": (
        says(moe_layer_freq=2),
        "first_k_dense_replace is 1, but layer 1 has routed experts where a dense MLP belongs (such layers: 1)",
    ),
    "a projection of an expert is missing": (
        without("experts.3.up_proj.weight"),
        f"n_routed_experts is 8, but there is no `{LAYER}mlp.experts.3.up_proj` (missing projections: 1, in layers: 1)",
    ),
    "an expert in the middle is missing": (
        without(*(f"experts.0.{part}_proj.weight" for part in ("gate", "up", "down"))),
        f"n_routed_experts is 8, but there is no `{LAYER}mlp.experts.0.gate_proj` (missing projections: 3, in",
    ),
    "no expert is there": (
        lambda _, tensors: [tensors.pop(name) for name in list(tensors) if ".experts." in name],
        f"n_routed_experts is 8, but there is no `{LAYER}mlp.experts.0.gate_proj` (missing projections: 24, in",
    ),
    "an expert of the layer for further tokens is missing": (
        both(says(num_nextn_predict_layers=1), predictor(2), without("layers.2.mlp.experts.7.down_proj.weight")),
        "n_routed_experts is 8, but there is no `model.layers.2.mlp.experts.7.down_proj` (missing projections: 1, in",
    ),
    "experts too many": (
        says(n_routed_experts=6),
        "n_routed_experts is 6, but layer 1 has an expert 6 (such layers: 1); engines leave it out, or fail",
    ),
    "a router for others": (
        lambda _, tensors: tensors.update({GATE: ("BF16", tensors[GATE][1][:6])}),
        "n_routed_experts is 8, but the router of layer 1 is for 6 and 8 (such layers: 1); an engine fails there",
    ),
    "two heads": (
        says(tie_word_embeddings=True),
        "tie_word_embeddings is true, but there is a head of its own, `lm_head`; it is kept and used",
    ),
    "no head": (without("lm_head.weight"), "tie_word_embeddings is not true, but `lm_head` is missing"),
}


SEVERAL = {"experts too many": 2}
"""Where one change breaks more than one promise."""


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_promise_is_named(what: str, *, nested: bool, whole: Shard, tmp_path: Path) -> None:
    """A promise that is not kept: inspect names its key, what is there, how many there are, and the first; one text."""
    change, sentence = BROKEN[what]
    found = inspect(written(tmp_path / "K2", whole, change, nested=nested))
    assert [text.startswith(f"config.json: {sentence}") for text in found.remarks].count(True) == 1, found.remarks
    assert len(found.remarks) == SEVERAL.get(what, 1)
    assert not found.problems


@pytest.mark.parametrize(
    "change",
    [
        says(),
        both(says(num_nextn_predict_layers=1), predictor(2)),
        says(num_nextn_predict_layers=None),
        both(says(tie_word_embeddings=True), without("lm_head.weight")),
        says(vision_config=None),
        says(num_hidden_layers="x", n_routed_experts=True, first_k_dense_replace=-1, num_nextn_predict_layers=[1]),
        says(num_hidden_layers=10**4000, n_routed_experts=10**4000, first_k_dense_replace=None),
        says(text_config=[1], num_hidden_layers=2),
        lambda config, _: config.clear(),
    ],
)
def test_a_promise_that_is_kept_is_passed_over(change: Change, whole: Shard, tmp_path: Path) -> None:
    """A promise that is kept, is none, or is nonsense that others refuse, is not said to be broken."""
    assert inspect(written(tmp_path / "K2", whole, change)).remarks == []


def test_the_outer_config_may_tie(whole: Shard, tmp_path: Path) -> None:
    """A promise in `text_config` or around it: `tie_word_embeddings` is looked for in both, the inner one counts."""
    outer = {"model_type": "kimi_k25", "tie_word_embeddings": True}
    for inner, count in (({}, 1), ({"tie_word_embeddings": False}, 0)):
        folder, text = tmp_path / f"K2-{count}", NANO | {"num_hidden_layers": 2}
        text.pop("tie_word_embeddings", None)
        write_checkpoint(folder, {"model.safetensors": whole}, {**outer, "text_config": text | inner})
        assert len(inspect(folder).remarks) == count


def test_a_router_without_rows_is_passed_over(whole: Shard, tmp_path: Path) -> None:
    """A router's tensor without dimensions promises nothing, and breaks nothing here."""
    bias = {f"{LAYER}mlp.gate.e_score_correction_bias": ("F32", np.zeros((), np.float32))}
    assert inspect(written(tmp_path / "K2", whole | bias, says())).remarks == []


def test_a_vision_tower_that_is_not_there_is_named(k25: Path, tmp_path: Path) -> None:
    """A promise that is not kept: `vision_config` without tensors of a tower or a projector, each of them named."""
    source, seen = open_checkpoint(k25), {"vision_config": {"depth": 2}}
    tensors = tensors_of(source)

    def remarks(**dropped: str) -> list[str]:
        kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(tuple(dropped.values()))}
        folder = tmp_path / "-".join(["K2.5", *dropped])
        write_checkpoint(folder, {"model.safetensors": kept}, (source.config or {}) | seen)
        return inspect(folder).remarks

    assert remarks() == []
    (one,) = remarks(tower="vision_tower.")
    assert "vision_config is there, but no tensor of a vision tower; an engine" in one
    (two,) = remarks(tower="vision_tower.", projector="mm_projector.")
    assert "no tensor of a vision tower or of a projector; an engine" in two


def run(*words: object) -> Result:
    """Run the command line."""
    return CliRunner().invoke(main, [str(word) for word in words], catch_exceptions=False)


def test_inspect_and_convert_say_it_and_go_on(whole: Shard, tmp_path: Path) -> None:
    """A promise that is not kept stops nothing: it stands on stderr, in what `--json` prints and in the report."""
    change, sentence = BROKEN["a layer for further tokens is missing"]
    source, out = written(tmp_path / "K2", whole, change), tmp_path / "out"
    for words in (("inspect", source), ("convert", source, out, "--to", "int4", "--dry-run"), ("inspect", source)):
        plain, machine = run(*words), run(*words, "--json")
        assert (plain.exit_code, machine.exit_code) == (0, 0)
        assert f"config.json: {sentence}" in plain.stderr
        assert [text for text in json.loads(machine.stdout)["remarks"] if sentence in text]
    done = run("convert", source, out, "--to", "int4")
    assert done.exit_code == 0
    assert f"config.json: {sentence}" in done.stderr
    assert [text for text in json.loads((out / REPORT).read_text())["remarks"] if sentence in text]
    assert run("convert", source, out, "--to", "int4").stderr == ""


def test_a_layer_that_nothing_promises_is_converted(whole: Shard, tmp_path: Path) -> None:
    """A promise that was not made: a layer beyond `num_hidden_layers` is written like every other."""
    change, sentence = BROKEN["a layer for further tokens that nothing promises"]
    done = convert(written(tmp_path / "K2", whole, change), tmp_path / "out", to="int4")
    names = open_checkpoint(done.folder).tensors
    assert {"model.layers.2.eh_proj.weight", "model.layers.2.mlp.experts.7.up_proj.weight_packed"} <= names.keys()
    (text,) = done.report["remarks"]
    assert sentence in text
