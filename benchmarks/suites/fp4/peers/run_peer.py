"""Write FP4 with a peer as its users would; with only a tool and a task, import what the task needs and stop.

Usage: run_peer.py TOOL TASK [SOURCE DESTINATION]

TOOL is `llm-compressor` (`model_free_ptq` with the presets NVFP4A16 and MXFP4A16) or `modelopt` (a loop over shards
with `NVFP4QTensor.quantize`, which is what ModelOpt has for a checkpoint that no GPU holds). TASK is the format of the
source and the target, such as `bf16-nvfp4`. The routed experts are quantised, the rest is copied, as by
`k2quant convert`. Tested with llmcompressor 0.14.0.1, compressed-tensors 0.19.0 and nvidia-modelopt 0.47.0.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

NOT_EXPERTS = [
    "re:.*mlp.gate$",
    "re:.*block_sparse_moe.gate$",
    "lm_head",
    "re:.*embed_tokens$",
    "re:.*self_attn.*",
    "re:.*shared_experts.*",
    r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
]
LINEAR = [r"re:.*proj$", r"re:.*kv_a_proj_with_mqa$"]
PRESETS = {"nvfp4": "NVFP4A16", "mxfp4": "MXFP4A16"}
WORKERS = 2  # on a CPU it runs one job at a time, whatever this says
EXPERT = re.compile(r"(.*\.experts\.\d+\.)(gate_proj|up_proj|down_proj|w1|w2|w3)\.weight")
TOGETHER = {"gate_proj": ("gate_proj", "up_proj"), "up_proj": ("gate_proj", "up_proj"), "w1": ("w1", "w3")}
TOGETHER["w3"] = TOGETHER["w1"]
"""Whose tensor scale is one: ModelOpt's own export takes the larger of the two before it quantises."""
BLOCK = 16


def compressor(task: str, folders: list[str]) -> None:
    """Quantise with llm-compressor; FP8 and INT4 sources are dequantised on the way, in the same pass."""
    from compressed_tensors.entrypoints import convert
    from llmcompressor import model_free_ptq

    if not folders:
        return
    source, destination = folders
    form, _, target = task.partition("-")
    converters: dict[str, Callable[[], Any]] = {
        "bf16": lambda: None,
        "fp8": lambda: convert.FP8BlockDequantizer(targets=LINEAR),
        "int4": lambda: convert.CompressedTensorsDequantizer(source, ignore=NOT_EXPERTS),
    }
    model_free_ptq(
        source,
        destination,
        scheme=PRESETS[target],
        ignore=NOT_EXPERTS,
        max_workers=WORKERS,
        device="cpu",
        converter=converters[form](),
    )


def modelopt(task: str, folders: list[str]) -> None:
    """Quantise BF16 with ModelOpt's tensor code, a shard at a time."""
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor
    from safetensors.torch import load_file, save_file

    if task != "bf16-nvfp4":
        raise SystemExit(__doc__)
    if not folders:
        return
    source, destination = map(Path, folders)
    destination.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    for shard in sorted(source.glob("*.safetensors")):
        tensors = load_file(shard)
        found = {}
        for name, tensor in tensors.items():
            match = EXPERT.fullmatch(name)
            if match is None:
                found[name] = tensor
                continue
            mates = [tensors[f"{match[1]}{mate}.weight"] for mate in TOGETHER.get(match[2], (match[2],))]
            whole = max(NVFP4QTensor.get_weights_scaling_factor_2(mate) for mate in mates)
            quantised, scale, whole = NVFP4QTensor.quantize(tensor, BLOCK, weights_scaling_factor_2=whole)
            base = name.removesuffix(".weight")
            found[name] = quantised._quantized_data  # noqa: SLF001  which its export takes too
            found[f"{base}.weight_scale"], found[f"{base}.weight_scale_2"] = scale, whole
        save_file(found, destination / shard.name)
        weight_map |= dict.fromkeys(found, shard.name)
    (destination / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    shutil.copyfile(source / "config.json", destination / "config.json")


TOOLS = {"llm-compressor": compressor, "modelopt": modelopt}


def main(tool: str, task: str, *folders: str) -> None:
    """Have a tool do a task."""
    if tool not in TOOLS or len(folders) not in {0, 2}:
        raise SystemExit(__doc__)
    TOOLS[tool](task, list(folders))


if __name__ == "__main__":
    main(*sys.argv[1:])
