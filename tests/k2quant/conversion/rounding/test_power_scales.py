"""Conversions of checkpoints whose FP8 scales are powers of two, as DeepSeek-V3.1 has them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import k2quant
from k2quant.checking.comparison import compare
from k2quant.checkpoint.reader import open_checkpoint
from k2quant.checkpoint.reading import read_tensor
from k2quant.checkpoint.writing.in_memory import Shard, write_checkpoint
from k2quant.kernels.codecs import cpu
from k2quant.kernels.codecs.values import F32, float_to_bf16
from k2quant.nano.demo import K2_CONFIG, matrices

BLOCK = (128, 128)


def powered(generator: np.random.Generator, base: str, rows: int, columns: int) -> Shard:
    """Return a random weight as writers of `ue8m0` store it: amax/448 rounded up to a power of two."""
    weights = float_to_bf16(generator.standard_normal((rows, columns), np.float32) * np.float32(0.02))
    scale = np.empty((-(-rows // 128), -(-columns // 128)), np.float32)
    cpu.fp8.choose(weights, BLOCK, scale)
    scale = np.exp2(np.ceil(np.log2(scale))).astype(np.float32)
    codes = np.empty(weights.shape, np.uint8)
    cpu.fp8.store(weights, scale, BLOCK, codes)
    return {f"{base}.weight": ("F8_E4M3", codes), f"{base}.weight_scale_inv": ("F32", scale)}


def test_power_of_two_scales_come_back_through_bf16(tmp_path: Path) -> None:
    """Power-of-two scales that were lost without a word: FP8 -> BF16 -> FP8 keeps every value, and most bytes."""
    generator = np.random.default_rng(0)
    shard: Shard = {}
    for base, (rows, columns) in matrices(0).items():
        shard |= powered(generator, base, rows, columns)
    write_checkpoint(tmp_path / "src", {"model.safetensors": shard}, K2_CONFIG | {"num_hidden_layers": 1})
    k2quant.convert(tmp_path / "src", tmp_path / "bf16", to="bf16")
    k2quant.convert(tmp_path / "bf16", tmp_path / "fp8", to="fp8")
    relations = {finding.relation for finding in compare(tmp_path / "src", tmp_path / "fp8", workers=1)}
    assert relations <= {"bit-equal", "codes equal", "values equal"}
    before, after = open_checkpoint(tmp_path / "src"), open_checkpoint(tmp_path / "fp8")
    kept = total = 0
    for name, entry in before.tensors.items():
        if name.endswith("_scale_inv"):
            ours: F32 = np.frombuffer(read_tensor(after, after.tensors[name]), np.float32)
            theirs: F32 = np.frombuffer(read_tensor(before, entry), np.float32)
            assert set((ours / theirs).tolist()) <= {0.5, 1.0}  # a largest code of 224 becomes 448
            kept, total = kept + int((ours == theirs).sum()), total + ours.size
    assert kept > 0.8 * total
