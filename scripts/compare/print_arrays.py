"""Write what the functions on arrays make of fixed inputs into `python/`; runs with the package of either checkout."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import k2quant
from k2quant.kernels import ops

_SHAPES = {"block": (128, 128), "odd": (160, 96), "row": (1, 32), "wide": (3, 512)}


def weights() -> Iterator[tuple[str, Any]]:
    """Yield matrices of each dtype, as numpy and as torch, with zeros, tiny and large values."""
    random = np.random.default_rng(3)
    for name, shape in _SHAPES.items():
        values = random.standard_normal(shape).astype(np.float32) * np.float32(0.02)
        values.flat[:4] = (0.0, -0.0, 3e-38, 100.0)
        values[-1, -32:] = 0
        yield f"{name}-f32", values
        yield f"{name}-f16", values.astype(np.float16)
        yield f"{name}-bits", (values.view(np.uint32) >> 16).astype(np.uint16)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            yield f"{name}-{dtype}", torch.from_numpy(values).to(dtype)


def rounded() -> Iterator[tuple[str, Any]]:
    """Yield codes, scales and values back of `quantize` and `dequantize`."""
    for name, weight in weights():
        for to, grid in (("fp8", "moonshot"), ("int4", "moonshot"), ("int4", "compressed-tensors")):
            made = k2quant.quantize(weight, to, grid=grid)  # type: ignore[arg-type]  # these are its choices
            for part, value in made.tensors("weight").items():
                yield f"quantize {name} {to} {grid} {part}", value
            yield f"dequantize {name} {to} {grid}", k2quant.dequantize(made)


def operators() -> Iterator[tuple[str, Any]]:
    """Yield what the operators on torch tensors return."""
    torch.manual_seed(4)
    weight = (torch.randn(160, 256) * 0.02).bfloat16()
    x = torch.randn(5, 256)
    for grid in ("moonshot", "compressed-tensors"):
        yield f"fake_quantize_int4 {grid}", ops.fake_quantize_int4(weight, grid)
    for bits in (2, 3, 8):
        yield f"fake_quantize_int4 {bits}", ops.fake_quantize_int4(weight, bits=bits)
    yield "fake_quantize_fp8", ops.fake_quantize_fp8(weight)
    packed, codes = ops.bf16_to_int4(weight), ops.bf16_to_fp8(weight)
    pairs = {"bf16_to_int4": packed, "bf16_to_fp8": codes}
    pairs |= {"fp8_to_int4": ops.fp8_to_int4(*codes), "int4_to_fp8": ops.int4_to_fp8(*packed)}
    for name, (first, second) in pairs.items():
        yield f"{name} codes", first
        yield f"{name} scale", second
    yield "int4_to_bf16", ops.int4_to_bf16(*packed)
    yield "fp8_to_bf16", ops.fp8_to_bf16(*codes)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for name in ("int4_linear", "fp8_linear", "fp8_linear_w8a8"):
            ready = ops.prepare_int4(*packed) if "int4" in name else ops.prepare_fp8(*codes)
            yield f"{name} {dtype}", getattr(ops, name)(x.to(dtype), ready)


def experts() -> Iterator[tuple[str, Any]]:
    """Yield what experts make of a few tokens, in both formats, and the gradient of the tokens."""
    torch.manual_seed(5)
    count, hidden, inner = 4, 128, 256
    shapes = ((inner, hidden), (inner, hidden), (hidden, inner))
    matrices = [[(torch.randn(shape) * 0.05).bfloat16() for _ in range(count)] for shape in shapes]
    ids = torch.tensor([[0, 1], [2, 3], [3, 0], [1, 1], [2, -1]])
    shares = torch.rand(5, 2)
    for form in ("int4", "fp8"):
        encode, prepare = getattr(ops, f"bf16_to_{form}"), getattr(ops, f"prepare_{form}")
        stacks = [prepare(*map(torch.stack, zip(*map(encode, each), strict=True))) for each in matrices]
        x = torch.randn(5, hidden, requires_grad=True)
        y = getattr(ops, f"moe_{form}")(x, *stacks, ids, shares)
        y.sum().backward()
        yield f"moe_{form}", y.detach()
        yield f"moe_{form} gradient", x.grad


def as_bytes(value: Any) -> bytes:
    """Return what an array holds, whatever its dtype."""
    if isinstance(value, torch.Tensor):
        value = value.contiguous().reshape(-1).view(torch.uint8).numpy()
    return bytes(np.ascontiguousarray(value).tobytes())


def main() -> None:
    """Write a file for each array, and print what it is."""
    folder = Path("python")
    folder.mkdir(exist_ok=True)
    for source in (rounded, operators, experts):
        for name, value in source():
            print(f"{name}: {type(value).__name__} {value.dtype} {tuple(value.shape)}")
            (folder / f"{name.replace(' ', '-')}.bin").write_bytes(as_bytes(value))


if __name__ == "__main__":
    main()
