"""Ask mlx-lm what it makes of small checkpoints by itself, and of their exports, and write it down for the tests.

Usage, in an environment with mlx[cpu] 0.32.4 and mlx-lm 0.32.2, as `make mlx-oracles` makes one:
    python benchmarks/suites/exports/mlx_oracles.py FOLDER tests/data/golden_mlx.json

FOLDER is what `mlx_sources.py` left. It imports nothing of k2quant. What is kept: of native INT4, the parameters that
mlx-lm's own loading comes to; of the exports, those that it loads, and the values that mlx says they have.
"""

from __future__ import annotations

import json
import sys
import zlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.utils import load_model

TOKENS = 200
PROMPT = (0, 40, 41, 42, 43, 44)

_BITS = {mx.bfloat16: mx.uint16, mx.float32: mx.uint32, mx.float16: mx.uint16}


def crc32(array: mx.array) -> str:
    """Return the checksum of an array's bytes."""
    bits = array.view(_BITS[array.dtype]) if array.dtype in _BITS else array
    return f"{zlib.crc32(np.ascontiguousarray(np.array(bits)).tobytes()):08x}"


def facts(model: nn.Module) -> dict[str, list[Any]]:
    """Return dtype, shape and checksum of each parameter, by name."""
    return {
        name: [str(array.dtype).removeprefix("mlx.core."), list(array.shape), crc32(array)]
        for name, array in sorted(tree_flatten(model.parameters()))
    }


def values(layer: QuantizedSwitchLinear) -> mx.array:
    """Return what a stack's codes stand for, float32 `[E, N, K]`; a scale of the whole is one expert's alone."""
    whole = layer.get("global_scale")
    biases = layer.get("biases")
    how = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
    found = []
    for number in range(layer.num_experts):
        more = {} if whole is None else {"global_scale": whole[number]}
        scales = layer.scales[number]
        bias = None if biases is None else biases[number].astype(mx.float32)
        scales = scales if bias is None else scales.astype(mx.float32)
        found.append(mx.dequantize(layer.weight[number], scales, bias, **how, **more, dtype=mx.float32))
    return mx.stack(found)


def stacks(model: nn.Module) -> dict[str, QuantizedSwitchLinear]:
    """Return the quantised stacks of experts by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantizedSwitchLinear)}


def plain(model: nn.Module) -> nn.Module:
    """Have stacks multiply by their values, rounded to BF16, in float32.

    mlx's CPU multiplies neither by stacks in BF16 nor by NVFP4's with a scale of the whole: it has kernels of those for
    GPUs alone.
    """
    for name, layer in sorted(stacks(model).items()):
        found = values(layer).astype(mx.bfloat16).astype(mx.float32)
        experts, rows, width = found.shape
        other = SwitchLinear(width, rows, experts, bias=False)
        other.weight = found
        *path, last = name.split(".")
        home = model
        for part in path:
            home = home[int(part)] if isinstance(home, list) else getattr(home, part)
        setattr(home, last, other)
    model.set_dtype(mx.float32)
    return model


def greedy(model: nn.Module) -> list[int]:
    """Return the tokens that a model goes on with."""
    cache, tokens = make_prompt_cache(model), []
    fed = mx.array([PROMPT])
    for _ in range(TOKENS):
        tokens.append(int(mx.argmax(model(fed, cache=cache)[:, -1], axis=-1).item()))
        fed = mx.array([tokens[-1:]])
    return tokens


def loaded(folder: Path) -> nn.Module:
    """Load a model as mlx-lm does."""
    return load_model(folder)[0]


def refusal(folder: Path) -> str | None:
    """Return how mlx-lm refuses a checkpoint; None: it loads it."""
    try:
        loaded(folder)
    except ValueError as error:
        return str(error).partition("\n")[0].strip()
    return None


def agreement(one: list[int], other: list[int]) -> int:
    """Return how many tokens two answers have in common before they part."""
    return next((at for at, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1]), len(one))


def compared(home: Path, name: str) -> dict[str, Any]:
    """Return what mlx-lm makes of an export, and how it agrees with what else it loads."""
    export = loaded(home / f"{name}-mlx")
    found: dict[str, Any] = {"parameters": facts(export), "native": refusal(home / name)}
    found["values"] = {each: crc32(values(layer)) for each, layer in sorted(stacks(export).items())}
    if found["native"] is None:
        native = loaded(home / name)
        found["parameters equal"] = facts(native) == found["parameters"]
        found["tokens equal"] = agreement(greedy(native), greedy(export))
    other = loaded(home / f"{name}-bf16")
    ours = dict(tree_flatten(other.parameters()))
    differing, largest = 0, 0.0
    for each, layer in stacks(export).items():
        mine, theirs = values(layer).astype(mx.bfloat16), ours[f"{each}.weight"]
        differing += int((mine != theirs).sum().item())
        gap = mx.abs(mine.astype(mx.float32) - theirs.astype(mx.float32)) / mx.abs(theirs.astype(mx.float32) + 1e-30)
        largest = max(largest, float(gap.max().item()))
    found["weights unlike k2quant's"] = differing
    found["largest relative difference"] = largest
    other.set_dtype(mx.float32)
    found["tokens equal to bf16"] = agreement(greedy(plain(export)), greedy(other))
    return found


def main() -> None:
    """Look at everything, print it in short, and write it down."""
    home, there = Path(sys.argv[1]), Path(sys.argv[2])
    result: dict[str, Any] = {name: version(name) for name in ("mlx", "mlx-lm")} | {"tokens": TOKENS}
    for name in ("int4", "mxfp4", "nvfp4", "k25"):
        result[name] = compared(home, name)
        print(name, {key: each for key, each in result[name].items() if not isinstance(each, dict)})
    there.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
