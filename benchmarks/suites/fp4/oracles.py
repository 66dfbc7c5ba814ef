"""Ask ModelOpt's `NVFP4QTensor` what NVFP4 of some BF16 matrices is, and write it down for the tests.

Usage, in an environment with nvidia-modelopt 0.47.0 and torch (CPU), as `make fp4-oracles` makes one:
    python benchmarks/suites/fp4/oracles.py tests/data/golden_modelopt_nvfp4.json

It imports nothing of k2quant. Cases are small and stand there in hexadecimal, low byte first; of what runs through all
BF16 weights, or all codes at all scales, the SHA-256 is kept.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BLOCK = 16
TIES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0)
SCALES = ((0x38, 1.0), (0x7E, 0.0031), (0x01, 2.0**-20), (0x35, 1.7e10))
"""Block scales, as bits, and tensor scales, at which all weights are rounded."""

TENSORS = (1.0, 0.0031, 2.0**-20, 1.7e10)
"""Tensor scales beside which all codes are decoded, and all largest weights get block scales."""


def plain_cases() -> dict[str, tuple[Tensor, float | None]]:
    """Return BF16 matrices by name, and a tensor scale where it is not that of the matrix itself."""
    generator = torch.Generator().manual_seed(20)
    gaussian = torch.randn(4, 64, generator=generator) * 0.02
    steps = torch.arange(16).repeat_interleave(BLOCK) * 2 - 30.0
    ladder = torch.randn(1, 256, generator=generator) * steps.exp2()
    zeros = gaussian.clone()
    zeros[0, :16], zeros[1, 16:32], zeros[2, ::3], zeros[3, 1::2] = 0.0, -0.0, -0.0, zeros[3, 1::2] * 1e-4
    near = torch.tensor(TIES)
    ties = torch.cat([near, -near, near.bfloat16().nextafter(torch.tensor(9.0).bfloat16()).float(), -near * 0.998])
    ties = torch.cat([ties.clamp(-6, 6), torch.full((16,), 2688.0)]).reshape(3, 16)
    return {
        "gaussian": (gaussian, None),
        "blocks of 2^-30 to 2^0": (ladder, None),
        "zeros of both signs": (zeros, None),
        "ties": (ties, None),
        "a tensor scale of larger weights": (gaussian, 0.5),
        "a tensor scale of smaller weights": (gaussian, 1e-7),
        "tiny": (torch.randn(2, 32, generator=generator) * 1e-38, None),
        "huge": (torch.randn(2, 32, generator=generator).clamp(-3, 3) * 1e38, None),
    }


def described(weights: Tensor, tensor: float | None) -> dict[str, Any]:
    """Return what ModelOpt makes of BF16 weights, at their own tensor scale or one that is given."""
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    given = None if tensor is None else torch.tensor(tensor, dtype=torch.float32)
    quantised, scale, second = NVFP4QTensor.quantize(weights, BLOCK, weights_scaling_factor_2=given)
    values = quantised.dequantize(torch.bfloat16, scale=scale, double_scale=second, block_sizes={-1: BLOCK})
    return {
        "shape": list(weights.shape),
        "weights": hexadecimal(weights),
        "own_tensor_scale": tensor is None,
        "tensor_scale": hexadecimal(second.float().reshape(1)),
        "scale": hexadecimal(scale),
        "codes": hexadecimal(codes_of(quantised)),
        "values": hexadecimal(values),
    }


def all_weights(bits: int, tensor: float) -> dict[str, Any]:
    """Return the hash of the codes of all finite BF16 weights, 0x0000 to 0x7F7F and 0x8000 to 0xFF7F, at one scale."""
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    positive = torch.arange(0x7F80, dtype=torch.int32)
    weights = torch.cat([positive, positive | 0x8000]).to(torch.uint16).view(torch.bfloat16).reshape(-1, BLOCK)
    scale = torch.full((len(weights), 1), bits, dtype=torch.uint8).view(torch.float8_e4m3fn)
    quantised, _, _ = NVFP4QTensor.quantize(weights, BLOCK, scale, torch.tensor(tensor, dtype=torch.float32))
    return {"scale": bits, "tensor_scale": tensor, "codes": digest(codes_of(quantised))}


def all_largest(tensor: float) -> dict[str, Any]:
    """Return the hash of the block scales of blocks whose largest weight is each BF16 magnitude, 0x0000 to 0x7F7F."""
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    weights = torch.zeros(0x7F80, BLOCK, dtype=torch.bfloat16)
    weights[:, 3] = torch.arange(0x7F80, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    scale, _ = NVFP4QTensor.get_weights_scaling_factor(weights, BLOCK, torch.tensor(tensor, dtype=torch.float32))
    return {"tensor_scale": tensor, "scale": digest(scale)}


def all_codes(tensor: float) -> dict[str, Any]:
    """Return the hash of the BF16 values of the codes 0 to 15 at the scales 0x00 to 0x7E; ModelOpt's -0 is +0."""
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    codes = torch.tensor([low | (low + 1) << 4 for low in range(0, BLOCK, 2)], dtype=torch.uint8).repeat(0x7F, 1)
    scale = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).reshape(-1, 1)
    held = NVFP4QTensor(torch.Size((0x7F, BLOCK)), torch.bfloat16, codes)
    second = torch.tensor(tensor, dtype=torch.float32)
    values = held.dequantize(torch.bfloat16, scale=scale, double_scale=second, block_sizes={-1: BLOCK})
    return {"tensor_scale": tensor, "values": digest(values + 0.0)}


def codes_of(quantised: Any) -> Tensor:
    """Return the packed codes of an `NVFP4QTensor`."""
    codes: Tensor = quantised._quantized_data  # noqa: SLF001 - ModelOpt has no public name for it
    return codes


def hexadecimal(tensor: Tensor) -> str:
    """Return a tensor's bytes in hexadecimal."""
    return tensor.contiguous().view(torch.uint8).numpy().tobytes().hex()


def digest(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's bytes."""
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def main() -> None:
    """Write the file."""
    import modelopt

    found = {
        "source": f"nvidia-modelopt {modelopt.__version__}, NVFP4QTensor on a CPU, torch {torch.__version__}; "
        "written by `make fp4-oracles`",
        "cases": {name: described(weights.bfloat16(), tensor) for name, (weights, tensor) in plain_cases().items()},
        "zeros_alone": described(torch.zeros(1, BLOCK, dtype=torch.bfloat16), None),
        "all_weights": [all_weights(bits, tensor) for bits, tensor in SCALES],
        "all_largest": [all_largest(tensor) for tensor in TENSORS],
        "all_codes": [all_codes(tensor) for tensor in TENSORS],
    }
    Path(sys.argv[1]).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
