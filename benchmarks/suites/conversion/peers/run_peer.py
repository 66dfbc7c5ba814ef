"""Run one peer conversion as its users would; with only a task, import what the task needs and stop.

Usage: run_peer.py TASK [SOURCE DESTINATION]

The calls are those of the peers' own examples for Kimi K2: the same tensors are quantised as by `k2quant convert`,
the rest is copied. Tested with llmcompressor 0.14.0.1 and compressed-tensors 0.20.0.
"""

from __future__ import annotations

import sys

NOT_EXPERTS = [
    "re:.*mlp.gate$",
    "lm_head",
    "re:.*embed_tokens$",
    "re:.*self_attn.*",
    "re:.*shared_experts.*",
    r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
]
NOT_LINEAR = ["re:.*mlp.gate$", "re:.*lm_head", "re:.*embed_tokens$"]
QUANTIZE = ("fp8-int4", "bf16-int4", "bf16-fp8")
DEQUANTIZE = ("fp8-bf16", "int4-bf16")
WORKERS = 2  # on a CPU both peers run one job at a time, whatever this says


def quantize(task: str, folders: list[str]) -> None:
    """Quantise with llm-compressor; FP8 sources are dequantised on the way, in the same pass."""
    from compressed_tensors.entrypoints.convert import FP8BlockDequantizer
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor import model_free_ptq

    if not folders:
        return
    source, destination = folders
    if task.endswith("fp8"):
        model_free_ptq(
            source, destination, scheme="FP8_BLOCK", ignore=NOT_LINEAR[:2], max_workers=WORKERS, device="cpu"
        )
        return
    weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=32)
    model_free_ptq(
        source,
        destination,
        scheme=QuantizationScheme(targets=["Linear"], weights=weights),
        ignore=NOT_EXPERTS,
        max_workers=WORKERS,
        device="cpu",
        converter=FP8BlockDequantizer.from_pretrained(source) if task.startswith("fp8") else None,
    )


def dequantize(task: str, folders: list[str]) -> None:
    """Dequantise with compressed-tensors."""
    from compressed_tensors.entrypoints.convert import (
        CompressedTensorsDequantizer,
        FP8BlockDequantizer,
        convert_checkpoint,
    )

    if not folders:
        return
    source, destination = folders
    if task.startswith("fp8"):
        converter = FP8BlockDequantizer.from_pretrained(source)
    else:
        converter = CompressedTensorsDequantizer(source, ignore=NOT_LINEAR)
    convert_checkpoint(source, destination, converter, max_workers=WORKERS, device="cpu")


def main(task: str, *folders: str) -> None:
    """Send the task to the peer that does it."""
    if task not in QUANTIZE + DEQUANTIZE or len(folders) not in {0, 2}:
        raise SystemExit(__doc__)
    (quantize if task in QUANTIZE else dequantize)(task, list(folders))


if __name__ == "__main__":
    main(*sys.argv[1:])
