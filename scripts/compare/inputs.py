"""Small inputs, written without the package: a change of the package's own writers must not change what is read."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Tensor = tuple[str, NDArray[Any]]
"""The dtype that a header names, and an array of as many bytes."""


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors lays them out: header length, header, data."""
    header, begin = {}, 0
    for name, (dtype, array) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [begin, begin + array.nbytes]}
        begin += array.nbytes
    head = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(head)) + head + b"".join(array.tobytes() for _, array in tensors.values()))


def bf16(values: NDArray[np.float32]) -> Tensor:
    """Cut float32 values to BF16."""
    return "BF16", (values.view(np.uint32) >> 16).astype(np.uint16)


# --- adapters -------------------------------------------------------------------------------------------------------

_EXPERTS, _HIDDEN, _INNER = 16, 512, 256  # of the small K2 that `k2quant demo` writes
_MODULES = {
    "layers.0.self_attn.q_a_proj": (256, _HIDDEN),
    "layers.1.self_attn.o_proj": (_HIDDEN, 256),
    "layers.1.self_attn.kv_a_proj_with_mqa": (160, _HIDDEN),
    "layers.1.mlp.experts.3.gate_proj": (_INNER, _HIDDEN),
    "layers.1.mlp.experts.7.down_proj": (_HIDDEN, _INNER),
    "layers.2.mlp.shared_experts.up_proj": (_INNER, _HIDDEN),
}


def write_adapters(work: Path) -> None:
    """Write three LoRA adapters as PEFT does: one of linears, one of fused experts, one of another method."""
    random = np.random.default_rng(7)

    def factors(module: str, a: tuple[int, int], b: tuple[int, int]) -> dict[str, Tensor]:
        sides = {"A": (a, 1.0), "B": (b, 0.01)}
        return {
            f"base_model.model.model.{module}.lora_{side}.weight": (
                "F32",
                random.standard_normal(shape).astype(np.float32) * np.float32(spread),
            )
            for side, (shape, spread) in sides.items()
        }

    linears: dict[str, Tensor] = {}
    for module, (rows, columns) in _MODULES.items():
        linears |= factors(module, (4, columns), (rows, 4))
    _write_adapter(work / "merge" / "linears", linears, r=4, lora_alpha=8)
    fused = factors("layers.2.mlp.experts", (2 * _EXPERTS, _INNER), (_HIDDEN, 2 * _EXPERTS))
    fused["base_model.model.model.norm.weight"] = bf16(np.linspace(0.5, 1.5, _HIDDEN, dtype=np.float32))
    settings = {"target_parameters": ["mlp.experts.down_proj"], "modules_to_save": ["model.norm"], "use_rslora": True}
    _write_adapter(work / "merge" / "fused", fused, r=2, lora_alpha=3, **settings)
    _write_adapter(work / "merge" / "dora", linears, r=4, lora_alpha=8, use_dora=True)


def _write_adapter(folder: Path, tensors: Mapping[str, Tensor], **config: Any) -> None:
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    plain = {"peft_type": "LORA", "bias": "none", "peft_version": "0.21.2"}
    (folder / "adapter_config.json").write_text(json.dumps(plain | config))


# --- jobs of training -----------------------------------------------------------------------------------------------

_DATA_LINES = 600  # rows enough for a few steps, and few enough that a teacher reads them all in a second

_JOBS = {
    "int4": """\
training: {steps: 3, batch: 8, seed: 0, evaluate_every: 2, least_tokens: 20}
quantize: {to: int4, bits: {0: null, 1: 8, 2: 3}, scope: linear, estimator: learned, ignore: [kv_b_proj]}
distill: {weight: 0.5}
optimizer: {rate: 1e-3, warmup: 1}
saving: {every: 2}
""",
    "fp8": """\
training: {steps: 3, batch: 8, micro_batch: 4, seed: 1, evaluate_every: 2, masters: bfloat16, precision: bfloat16}
quantize: {to: fp8}
optimizer: {rate: 1e-3, method: muon}
saving: {every: 2, keep: 1, tensorboard: true}
""",
    "adapters": """\
training: {steps: 2, batch: 8, gradient_checkpointing: true}
quantize: {to: int4, grid: compressed-tensors, train: adapters, adapter: {rank: 4, alpha: 8}}
distill: {teacher: nano/k2, top_k: 4}
optimizer: {rate: 1e-3, decay: linear}
""",
    "control": """\
training: {steps: 2, batch: 8, fake_quantize: false}
quantize: {to: int4, train: experts}
optimizer: {rate: 1e-3}
""",
}


def write_jobs(work: Path) -> None:
    """Write jobs that between them have each estimator, optimizer, kind of teacher and kind of weights that train."""
    folder = work / "qat"
    lines = (work / "nano" / "tasks" / "train.jsonl").read_text().splitlines(keepends=True)
    (folder / "data.jsonl").write_text("".join(lines[:_DATA_LINES]))
    for name, job in _JOBS.items():
        model = "nano/k2-int4" if name == "adapters" else "nano/k2"
        data = "data: {path: qat/data.jsonl, length: 64, held_out: 16}\n"
        (folder / f"{name}.yaml").write_text(f"model: {model}\noutput: qat/{name}\n{data}{job}")
    other = (folder / "fp8.yaml").read_text().replace("steps: 3", "steps: 4")
    (folder / "other.yaml").write_text(other)
    (folder / "unknown.yaml").write_text(other + "colour: blue\n")


def lose_last_step(work: Path) -> None:
    """Leave the INT4 training as a kill right before its end would have."""
    run = work / "qat" / "int4"
    shutil.rmtree(run / "checkpoints" / "step-00000003")
    for name in ("summary.json", "report.html"):
        (run / name).unlink()


# --- runs of an evaluation ------------------------------------------------------------------------------------------

_KINDS = {
    # right in both, lost, gained, wrong in both; of a task with answers and of a multiple choice
    "good": ((560, 2, 3, 35), (350, 1, 2, 47)),
    "bad": ((520, 42, 3, 35), (330, 21, 2, 47)),
    "unsure": ((549, 13, 10, 28), (346, 5, 4, 45)),
}


def write_runs(work: Path) -> None:
    """Write runs as lm-eval's `--log_samples` does: for each kind a baseline, and a candidate that lost something."""
    for kind, (words, choices) in _KINDS.items():
        for side, name in enumerate(("base", "candidate")):
            rows = {
                "answers": [_answer(n, right=right) for n, right in enumerate(_outcomes(words, side))],
                "choices": [_choice(n, right=right) for n, right in enumerate(_outcomes(choices, side))],
            }
            _write_run(work / "eval" / "given" / kind / name, f"{kind}/{name}", rows)
    policy = "margin: 2pp\nalpha: 0.1\npower: 0.7\ntasks:\n  answers:\n  choices: 5pp\n"
    (work / "eval" / "policy.yaml").write_text(policy)


def _outcomes(counts: tuple[int, ...], side: int) -> list[bool]:
    both = ((True, True), (True, False), (False, True), (False, False))
    return [pair[side] for pair, count in zip(both, counts, strict=True) for _ in range(count)]


def _answer(number: int, *, right: bool) -> dict[str, Any]:
    said = f"yes {number}" if right else f"no {number}"
    return {
        "doc_id": number,
        "doc": {"question": f"ask {number}"},
        "target": f"yes {number}",
        "arguments": {"gen_args_0": {"arg_0": f"ask {number}", "arg_1": {"until": ["\n"]}}},
        "resps": [[said]],
        "filtered_resps": [said],
        "filter": "none",
        "metrics": ["exact_match"],
        **{f"{what}_hash": _sha(f"{what} {number}") for what in ("doc", "prompt", "target")},
        "exact_match": float(right),
    }


def _choice(number: int, *, right: bool) -> dict[str, Any]:
    picked = 1 if right else 2
    pairs = [[str(-1.0 if n == picked else -2.0 - n - number / 1024), str(n == picked)] for n in range(4)]
    changes = {"target": "1", "resps": [[pair] for pair in pairs], "filtered_resps": pairs, "metrics": ["acc"]}
    row = {**_answer(number, right=right), **changes, "acc": float(right)}
    row.pop("exact_match")
    return row


def _write_run(folder: Path, model: str, rows: Mapping[str, list[dict[str, Any]]]) -> None:
    time, home = "2026-01-01T00-00-00.000000", folder / "some__model"
    home.mkdir(parents=True, exist_ok=True)
    for task, lines in rows.items():
        (home / f"samples_{task}_{time}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    kinds = {"answers": "generate_until", "choices": "multiple_choice"}
    content = {
        "results": {},
        "configs": {task: {"output_type": kind} for task, kind in kinds.items()},
        "versions": dict.fromkeys(kinds, 3),
        "n-shot": dict.fromkeys(kinds, 5),
        "n-samples": {task: {"original": 999, "effective": len(lines)} for task, lines in rows.items()},
        "config": {"model": "hf", "model_args": {}, "gen_kwargs": None},
        "model_name": model,
    }
    (home / f"results_{time}.json").write_text(json.dumps(content))


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# --- checkpoints that are damaged -----------------------------------------------------------------------------------


def damage_conversion(work: Path) -> None:
    """Copy a conversion, and change one bit of a weight in the copy."""
    copy = work / "verify" / "damaged"
    shutil.copytree(work / "convert" / "fp8-int4", copy)
    shard = bytearray((copy / "model-2-of-3.safetensors").read_bytes())
    shard[-5] ^= 1
    (copy / "model-2-of-3.safetensors").write_bytes(shard)


def write_damaged(work: Path) -> None:
    """Write folders that no command can take: each has one thing wrong with it."""
    folder, config = work / "errors", json.loads((work / "demo" / "fp8" / "config.json").read_text())
    (folder / "foreign").mkdir(parents=True)
    (folder / "foreign" / "letters.txt").write_text("not ours\n")
    (folder / "empty").mkdir()
    random = np.random.default_rng(11)
    weight = (random.standard_normal((64, 64)) * 0.02).astype(np.float32)
    name = "model.layers.1.mlp.experts.0.gate_proj.weight"
    codes = "F8_E4M3", random.integers(0, 0x7F, (64, 64), np.uint8)
    holes = weight.copy()
    holes[3, 5] = np.nan
    damaged: dict[str, Mapping[str, Tensor]] = {
        "dtype": {name: ("F8_E5M2", random.integers(0, 9, (64, 64), np.uint8))},
        "partner": {name: codes},
        "scale-shape": {name: codes, f"{name}_scale_inv": ("F32", np.ones((2, 1), np.float32))},
        "negative-scale": {name: codes, f"{name}_scale_inv": ("F32", -np.ones((1, 1), np.float32))},
        "nan": {name: bf16(holes)},
        "width": {name: bf16(weight[:, :40].copy())},
        "config": {name: bf16(weight)},
        "cut": {name: bf16(weight)},
        "header": {name: bf16(weight)},
        "index": {name: bf16(weight)},
    }
    for what, tensors in damaged.items():
        write_safetensors(folder / what / "model.safetensors", tensors)
        said = config if tensors[name][0] == "F8_E4M3" else {**config, "quantization_config": None}
        (folder / what / "config.json").write_text("{" if what == "config" else json.dumps(said))
    shard = folder / "cut" / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    shard = folder / "header" / "model.safetensors"
    shard.write_bytes(struct.pack("<Q", 2**40) + shard.read_bytes()[8:])
    index = {"metadata": {}, "weight_map": {name: "model.safetensors", "lm_head.weight": "gone.safetensors"}}
    (folder / "index" / "model.safetensors.index.json").write_text(json.dumps(index))
