"""Each rule of each engine, both ways: checkpoints of the suite pass it, and one that is broken on purpose does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from k2quant.checking.engines import check_engine
from k2quant.checking.engines.checking import _KNOWN
from k2quant.ground.engines import LABELS
from rewritten import Hollow

LAYER = "model.layers.1"
EXPERT = f"{LAYER}.mlp.experts.0.gate_proj"
KV_B = "model.layers.0.self_attn.kv_b_proj"

TAKEN = {
    "vllm": ("bf16", "fp8", "blocks", "int4", "k25", "nvfp4", "groups", "mxfp4"),
    "sglang": ("bf16", "fp8", "blocks", "int4", "k25", "nvfp4", "groups"),
    "tensorrt-llm": ("bf16", "fp8", "blocks", "nvfp4", "groups", "mxfp4"),
    "ktransformers": ("bf16", "fp8", "int4", "k25"),
    "llama.cpp": ("bf16", "fp8", "blocks", "int4", "k25", "nvfp4", "groups"),
    "transformers": ("bf16", "fp8", "int4", "k25", "mxfp4"),
}
"""Which of the suite's checkpoints an engine takes."""


Findings = dict[str, tuple[str, str]]
"""What each rule came to, and what was said of it."""


class Broken(NamedTuple):
    """A checkpoint that is broken in one point."""

    of: str
    """The checkpoint that it was."""
    how: Callable[[Hollow], object]
    says: str
    """What stands in what is found."""
    result: str = "fail"


def packed(found: Hollow, base: str, width: int | None = None) -> None:
    """Store a matrix as INT4, whatever it was."""
    shape = found.tensors.pop(f"{base}.weight")[1]
    found.tensors |= {
        f"{base}.weight_packed": ("I32", (shape[0], (width or shape[1]) // 8)),
        f"{base}.weight_scale": ("BF16", (shape[0], (width or shape[1]) // 32)),
        f"{base}.weight_shape": ("I32", (2,)),
    }


def blocked(found: Hollow, base: str) -> None:
    """Store a matrix as block FP8, whatever it was."""
    rows, columns = found.tensors[f"{base}.weight"][1]
    found.tensors[f"{base}.weight"] = ("F8_E4M3", (rows, columns))
    found.tensors[f"{base}.weight_scale_inv"] = ("F32", (-(-rows // 128), -(-columns // 128)))


def plain(found: Hollow, base: str) -> None:
    """Store an INT4 matrix as BF16."""
    rows, words = found.tensors.pop(f"{base}.weight_packed")[1]
    for suffix in ("weight_scale", "weight_shape"):
        del found.tensors[f"{base}.{suffix}"]
    found.tensors[f"{base}.weight"] = ("BF16", (rows, words * 8))


def rescaled(found: Hollow, suffix: str, dtype: str) -> None:
    """Store scales in another dtype."""
    found.tensors |= {name: (dtype, spec[1]) for name, spec in found.tensors.items() if name.endswith(suffix)}


def fused(found: Hollow) -> None:
    """Store the experts of a layer in two tensors, as transformers 5 keeps them."""
    stem = f"{LAYER}.mlp.experts"
    count = sum(name.endswith("gate_proj.weight") and name.startswith(stem) for name in found.tensors)
    rows, columns = found.tensors[f"{stem}.0.gate_proj.weight"][1]
    found.remove(f"{stem}.")
    found.tensors[f"{stem}.gate_up_proj"] = ("BF16", (count, 2 * rows, columns))
    found.tensors[f"{stem}.down_proj"] = ("BF16", (count, columns, rows))


def settings(found: Hollow, **changes: object) -> None:
    """Change tokenizer_config.json."""
    said = json.loads(found.files["tokenizer_config.json"]) | changes
    found.files["tokenizer_config.json"] = json.dumps(said).encode()


BROKEN = {
    "tensors": Broken("int4", lambda f: f.tensors.pop(f"{EXPERT}.weight_scale"), "the index lacks this partner"),
    "architecture": Broken("int4", lambda f: f.config.update(architectures=["KimiK2ForCausalLM"]), "KimiK2ForCausalLM"),
    "model_type": Broken(
        "int4", lambda f: f.config.pop("auto_map") and f.config.update(model_type="kimi_k9"), "kimi_k9"
    ),
    "sizes": Broken("int4", lambda f: f.config.update(kv_lora_rank=64), "by the sizes in config.json"),
    "promises": Broken("int4", lambda f: f.remove("experts.5.down_proj"), "n_routed_experts is"),
    "names": Broken("int4", lambda f: f.rename("model.layers.1.", "model.language_model.layers.1."), "language_model"),
    "strangers": Broken(
        "int4", lambda f: f.tensors.update({f"{LAYER}.self_attn.indexer.wk.weight": ("BF16", (8, 8))}), "wk"
    ),
    "index": Broken("int4", lambda f: f.hidden.update({"model.norm.weight": "model.norm.weight"}), "an old copy of it"),
    "experts": Broken("bf16", fused, "gate_up_proj"),
    "formats": Broken("mxfp4", lambda _: None, "mxfp4"),
    "format": Broken("int4", lambda f: f.block.update(format="mixed-precision"), "mixed-precision"),
    "fused": Broken("int4", lambda f: plain(f, f"{LAYER}.mlp.experts.3.up_proj"), "in one kernel"),
    "unquantised": Broken("fp8", lambda f: blocked(f, f"{LAYER}.mlp.gate"), "mlp.gate.weight"),
    "kv_b_proj": Broken("int4", lambda f: packed(f, KV_B), "kv_b_proj"),
    "scales": Broken("int4", lambda f: rescaled(f, "weight_scale", "F32"), "F32"),
    "inputs": Broken("nvfp4", lambda f: f.remove("input_scale"), "by a scale that is not there"),
    "whole scales": Broken(
        "nvfp4", lambda f: f.data.update({f"{EXPERT}.weight_scale_2": b"\1\0\0\0"}), "another scale of the whole"
    ),
    "devices": Broken("int4", lambda f: setattr(f, "ranks", 16), "tensor parallelism of"),
    "block": Broken("int4", lambda f: f.config.pop("quantization_config"), "no such key"),
    "one meaning": Broken(
        "int4", lambda f: f.config.update(text_config={"quantization_config": {"quant_method": "fp8"}}), "contradict"
    ),
    "method": Broken("int4", lambda f: f.block.update(quant_method="gptq"), "gptq"),
    "blocks of FP8": Broken("fp8", lambda f: f.block.update(activation_scheme="static"), "activation_scheme"),
    "column order": Broken("int4", lambda f: f.group["weights"].update(actorder="group"), "actorder"),
    "KV cache": Broken("int4", lambda f: f.block.update(kv_cache_scheme={"num_bits": 4, "type": "int"}), "num_bits 8"),
    "lists": Broken("int4", lambda f: f.block.update(ignore=["lm_head"]), "takes `model.layers.0"),
    "one group": Broken("int4", lambda f: f.block["config_groups"].update(more=f.group), "one group"),
    "tokenizer": Broken("int4", lambda f: f.files.pop("tokenization_kimi.py"), "tokenization_kimi.py"),
    "chats": Broken("int4", lambda f: settings(f, chat_template=None), "no chat template", "cannot tell"),
    "memory": Broken("int4", lambda f: setattr(f, "memory", 10**6), "memory"),
}
"""For each rule a checkpoint that breaks it, in whatever engine has it."""

OWN = {
    ("vllm", "kv_b_proj"): BROKEN["kv_b_proj"]._replace(result="cannot tell"),
    ("vllm", "scales"): BROKEN["scales"]._replace(result="cannot tell"),
    ("sglang", "scales"): BROKEN["scales"]._replace(result="cannot tell"),
    ("sglang", "strangers"): BROKEN["strangers"]._replace(result="cannot tell"),
    ("tensorrt-llm", "formats"): Broken("int4", lambda _: None, "pack-quantized"),
    ("tensorrt-llm", "lists"): Broken("nvfp4", lambda f: f.block.update(ignore=["lm_head"]), "takes `model.layers.0"),
    ("transformers", "formats"): Broken("groups", lambda _: None, "48371"),
    ("transformers", "model_type"): BROKEN["model_type"]._replace(of="k25"),
}
"""What is otherwise in one engine."""

RULES = [(engine, rule.name) for engine, (_, rules) in _KNOWN.items() for rule in rules] + [
    (engine, "memory") for engine in _KNOWN
]


def check(found: Hollow, engine: str, folder: Path) -> Findings:
    """Return what each rule comes to."""
    done = check_engine(found.write(folder), engine, tensor_parallel=found.ranks, memory=found.memory, context=1024)
    return {finding.rule: (finding.result, finding.text) for finding in done.findings}


@pytest.mark.parametrize("engine", TAKEN)
def test_what_an_engine_takes_passes(engine: str, made: Callable[[str], Hollow], tmp_path: Path) -> None:
    """Checkpoints in every format that an engine runs break none of its rules, with K2's own files beside them."""
    for name in TAKEN[engine]:
        found = check(made(name), engine, tmp_path / name)
        assert {rule: said for rule, said in found.items() if said[0] == "fail"} == {}, name


@pytest.mark.parametrize("engine", TAKEN)
def test_what_an_engine_does_not_take_fails(engine: str, made: Callable[[str], Hollow], tmp_path: Path) -> None:
    """A format that an engine has no method for is named, by the rule of formats or of methods."""
    for name in {each for every in TAKEN.values() for each in every} - set(TAKEN[engine]):
        found = check(made(name), engine, tmp_path / name)
        assert "fail" in {found["formats"][0], found["method"][0]}, name


@pytest.fixture(scope="module")
def sound(made: Callable[[str], Hollow], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Findings]:
    """What each rule of an engine comes to for one of the suite's checkpoints as it is."""
    found: dict[tuple[str, str], Findings] = {}

    def look(engine: str, name: str) -> Findings:
        if (engine, name) not in found:
            found[engine, name] = check(made(name), engine, tmp_path_factory.mktemp("sound") / name)
        return found[engine, name]

    return look


@pytest.mark.parametrize(("engine", "rule"), RULES)
def test_what_is_broken_on_purpose_is_found(
    engine: str,
    rule: str,
    made: Callable[[str], Hollow],
    sound: Callable[[str, str], Findings],
    tmp_path: Path,
) -> None:
    """Each rule has a checkpoint that breaks it, which passes as long as it is not broken; a rule without one fails."""
    broken = OWN.get((engine, rule)) or BROKEN[rule]
    found = made(broken.of)
    before = sound(engine, broken.of)[rule]
    broken.how(found)
    result, text = check(found, engine, tmp_path / "after")[rule]
    assert (result, broken.says in text) == (broken.result, True), text
    assert before[0] == ("fail" if rule == "formats" else "pass"), before  # a format is broken as it stands


def test_every_rule_says_where_it_was_read() -> None:
    """Each rule names a file of the engine, and engines are those that the command line offers."""
    assert list(_KNOWN) == list(LABELS)
    for version, rules in _KNOWN.values():
        assert version
        assert len({rule.name for rule in rules}) == len(rules)
        for rule in rules:
            assert rule.why
            assert "/" in rule.source or "SGLang" in rule.source


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("model_type", ["kimi_k3", "deepseek_v32"])
def test_of_relatives_no_more_is_said_than_was_looked_up(
    engine: str, model_type: str, made: Callable[[str], Hollow], tmp_path: Path
) -> None:
    """Engines have classes for them; of their modules nothing was read here, so that no rule about them says fail."""
    found = made("bf16")
    found.config |= {"architectures": ["KimiK3ForConditionalGeneration"], "model_type": model_type}
    if model_type == "kimi_k3":
        del found.config["model_type"]
        for ours, theirs in (("gate", "w1"), ("down", "w2"), ("up", "w3")):
            found.tensors = {
                name.replace(f".{ours}_proj.", f".{theirs}.") if ".experts." in name else name: spec
                for name, spec in found.tensors.items()
            }
        found.rename(".mlp.experts.", ".block_sparse_moe.experts.")
    said = check(found, engine, tmp_path / "relative")
    assert {said[rule][0] for rule in ("architecture", "sizes", "devices", "lists", "memory")} == {"cannot tell"}
    assert "fail" not in {result for result, _ in said.values()}


def test_a_lost_layer_for_further_tokens_stops_no_engine(made: Callable[[str], Hollow], tmp_path: Path) -> None:
    """Engines run the model without it, and cannot decode speculatively with it: that is said, and is no failure."""
    found = made("int4")
    found.config["num_nextn_predict_layers"] = 1
    result, text = check(found, "vllm", tmp_path / "lost")["promises"]
    assert (result, "num_nextn_predict_layers is 1" in text) == ("cannot tell", True)
