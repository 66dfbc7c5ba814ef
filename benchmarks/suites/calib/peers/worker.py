"""The peers' searches on weights alone, in their own environment: a job a line on stdin, its seconds a line on stdout.

Usage: worker.py

A job is JSON: `method` (`mse`, `imatrix_mse`, `Q4_0` or `Q4_0 plain`), `threads`, `inputs` (an .npz with BF16 bits
`NAME` and float32 importance `NAME/importance` of each matrix), `outputs` (an .npz to write: float32 values `NAME`; or
nothing), and for Q4_0 `ggml`, the path of libggml-base. Needs numpy, and for the observers torch and llmcompressor
0.14.0.1. Timed is the way from weights to codes and scales, reading and decoding left out.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
U16 = NDArray[np.uint16]
GROUP = 32
Q4_0 = 2
"""GGML_TYPE_Q4_0."""
Q4_0_BYTES = 18
"""A float16 scale and 32 codes."""
OBSERVERS = {"mse": "memoryless_mse", "imatrix_mse": "imatrix_mse"}
Timed = tuple[float, F32]


def observed(weights: U16, importance: F32, job: dict[str, Any]) -> Timed:
    """Round by an observer of llm-compressor, as `model_free_ptq` does a linear."""
    import torch
    from compressed_tensors.compressors import compress_module, decompress_module
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.entrypoints.model_free.lifecycle import initialize_quantized_linear
    from llmcompressor.modifiers.quantization.calibration import (
        apply_calibration_status,
        freeze_module_quantization,
        initialize_observer,
        observe,
        update_qparams,
    )

    torch.set_num_threads(job["threads"])
    args = QuantizationArgs(
        num_bits=4, type="int", symmetric=True, strategy="group", group_size=GROUP, observer=OBSERVERS[job["method"]]
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format="pack-quantized")
    matrix = torch.from_numpy(weights).view(torch.bfloat16)
    with torch.no_grad():
        module = initialize_quantized_linear(matrix, scheme, "cpu")
        begun = time.perf_counter()
        initialize_observer(module, "weight")
        if job["method"] == "imatrix_mse":
            observer: Any = module.weight_observer
            observer._imatrix_sum = torch.from_numpy(importance)  # noqa: SLF001  what its hook adds up
            observer._imatrix_count = torch.tensor(1)  # noqa: SLF001
        apply_calibration_status(module)
        observe(module, base_name="weight")
        update_qparams(module, base_name="weight")
        freeze_module_quantization(module)
        compress_module(module)
        seconds = time.perf_counter() - begun
        decompress_module(module)
        values: F32 = module.weight.detach().float().numpy()
    return seconds, values


def ggml(weights: U16, importance: F32, job: dict[str, Any]) -> Timed:
    """Round by llama.cpp's own encoder of Q4_0, with the importance as its imatrix or without."""
    encode = ctypes.CDLL(job["ggml"]).ggml_quantize_chunk
    floats, size, pointer = ctypes.POINTER(ctypes.c_float), ctypes.c_int64, ctypes.c_void_p
    encode.argtypes = [ctypes.c_int, floats, pointer, size, size, size, floats]
    encode.restype = ctypes.c_size_t
    rows, columns = weights.shape
    wide: F32 = (weights.astype(np.uint32) << 16).view(np.float32)
    blocks = np.zeros((rows, columns // GROUP, Q4_0_BYTES), np.uint8)
    imatrix = None if job["method"] == "Q4_0 plain" else importance.ctypes.data_as(floats)

    def piece(part: NDArray[np.int64]) -> None:
        first, count = int(part[0]), len(part)
        encode(Q4_0, wide.ctypes.data_as(floats), blocks.ctypes.data, first * columns, count, columns, imatrix)

    with ThreadPoolExecutor(job["threads"]) as pool:
        begun = time.perf_counter()
        list(pool.map(piece, np.array_split(np.arange(rows), job["threads"])))
        seconds = time.perf_counter() - begun
    return seconds, decoded(blocks).reshape(rows, columns)


def decoded(blocks: NDArray[np.uint8]) -> F32:
    """Return scale * (nibble - 8); the lower nibbles are the first half of a block."""
    scale = blocks[..., :2].copy().view(np.float16).astype(np.float32)
    codes = np.concatenate([blocks[..., 2:] & 15, blocks[..., 2:] >> 4], -1).astype(np.float32) - 8
    found: F32 = scale * codes
    return found


METHODS: dict[str, Callable[[U16, F32, dict[str, Any]], Timed]] = {
    "mse": observed,
    "imatrix_mse": observed,
    "Q4_0": ggml,
    "Q4_0 plain": ggml,
}


def done(job: dict[str, Any]) -> dict[str, float]:
    """Do a job; return its seconds, and how many weights they were for."""
    content = np.load(job["inputs"])
    matrices = {name: content[name] for name in content.files if not name.endswith("/importance")}
    seconds = 0.0
    values: dict[str, Any] = {}
    for name, weights in matrices.items():
        spent, values[name] = METHODS[job["method"]](weights, content[f"{name}/importance"], job)
        seconds += spent
    if job["outputs"]:
        np.savez(job["outputs"], **values)
    return {"seconds": seconds, "weights": sum(each.size for each in matrices.values())}


if __name__ == "__main__":
    answers, sys.stdout = sys.stdout, sys.stderr  # what peers print is no answer
    for line in sys.stdin:
        print(json.dumps(done(json.loads(line))), file=answers, flush=True)
