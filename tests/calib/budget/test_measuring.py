"""What a matrix loses is what it loses in what `convert` writes, by moments that chose nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import k2quant
from k2quant.calib.budget import measuring
from k2quant.calib.budget.measuring import Lost, Measuring
from k2quant.calib.budget.units import formats_of
from k2quant.calib.budget.weighing import shares
from k2quant.calib.stats.reading import open_stats
from k2quant.checkpoint.panels import read_values
from k2quant.checkpoint.reader import open_checkpoint
from k2quant.checkpoint.weights import group_tensors
from k2quant.formats.format import Method
from k2quant.formats.int4 import Int4
from k2quant.formats.known import LADDER
from k2quant.formats.transcode import Scratch
from k2quant.kernels.codecs.choice import codecs
from k2quant.kernels.codecs.values import bf16_to_float, float_to_bf16

MATRICES = ("model.layers.1.mlp.experts.2.up_proj", "model.layers.0.self_attn.o_proj")


def measure(small: Any, bases: tuple[str, ...] = MATRICES, *, method: Method = "imatrix", workers: int = 1) -> Any:
    """Measure some matrices in every format."""
    source = open_checkpoint(small.source)
    weights = group_tensors(source.tensors).weights
    taken = Measuring(source, open_stats(small.stats), formats_of(weights, Int4()), method)
    return taken.run(
        dict.fromkeys(bases, LADDER), [weight for weight in weights if weight.base in bases], workers=workers
    )


def values_of(folder: Path, base: str) -> NDArray[np.float64]:
    """Return a matrix as a checkpoint means it."""
    source = open_checkpoint(folder)
    weight = next(each for each in group_tensors(source.tensors).weights if each.base == base)
    panel = read_values(source, weight, 0, weight.shape[0], codecs=codecs("cpu"), scratch=Scratch())
    return bf16_to_float(panel.values).astype(np.float64)


def expected(rows: NDArray[np.float64], stats: Path, base: str) -> float:
    """Return E[|rows x|^2] by the validation part's moments, all pairs of columns written out."""
    held = open_stats(stats).held_out(base)
    assert held is not None
    mean, square = held.mean.astype(np.float64), held.values.astype(np.float64)
    second = np.outer(mean, mean)
    np.fill_diagonal(second, np.maximum(square, mean**2))
    return float(np.einsum("rj,jk,rk->", rows, second, rows))


@pytest.mark.parametrize("method", ["rtn", "mse", "imatrix"])
def test_an_error_is_that_of_what_is_written(small: Any, tmp_path: Path, method: Method) -> None:
    """Of INT4 with scales of each method, and of FP8: E[|(W - Q) x|^2] of what `convert` wrote; BF16 loses nothing."""
    found = measure(small, method=method)
    known = {} if method == "rtn" else {"method": method, "stats": small.stats}
    int4 = k2quant.convert(small.source, tmp_path / "int4", "int4", scope="projections", **known).folder
    fp8 = k2quant.convert(small.source, tmp_path / "fp8", "fp8", layout="compressed-tensors").folder
    for base in MATRICES:
        exact = values_of(small.source, base)
        assert found[base].energy == pytest.approx(expected(exact, small.stats, base), rel=1e-5)
        assert found[base].errors["bf16"] == 0
        for name, folder in (("int4", int4), ("fp8", fp8)):
            lost = exact - values_of(folder, base)
            assert found[base].errors[name] == pytest.approx(expected(lost, small.stats, base), rel=1e-4), (base, name)


def test_it_is_the_measure_by_which_scales_are_judged(small: Any) -> None:
    """What the codecs' own measure says of INT4, to float32's rounding: there is one rule."""
    base = MATRICES[0]
    stats, int4, cpu = open_stats(small.stats), Int4(), codecs("cpu")
    values = float_to_bf16(values_of(small.source, base).astype(np.float32))
    held = stats.held_out(base)
    assert held is not None
    searched = int4.search(values, stats.importance(base), cpu, stats.mean(base))
    errors = [
        int4.weighted_error(values, each, held.values, cpu, held.mean) for each in (searched, int4.choose(values, cpu))
    ]
    assert measure(small)[base].errors["int4"] == pytest.approx(min(errors), rel=1e-5)


def test_fp8_that_stays_loses_nothing(small_fp8: Any) -> None:
    """Its codes and scales are copied, under other names."""
    found = measure(small_fp8)[MATRICES[0]]
    assert found.errors["fp8"] == found.errors["bf16"] == 0 < found.errors["int4"]


def test_any_number_of_threads_measures_the_same(small: Any) -> None:
    """To the last bit."""
    bases = tuple(sorted(small.weights()))
    one, four = (measure(small, bases, workers=workers) for workers in (1, 4))
    assert one == four
    assert "model.layers.1.mlp.gate" not in one  # no projection: nothing was measured of its input
    assert list(one) == sorted(one)


def test_of_experts_some_rows_stand_for_all(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With blocks of 8 rows and one in four read, the experts of a layer together come to about the whole."""
    bases = tuple(base for base in small.weights() if ".mlp.experts." in base)
    whole = measure(small, bases)
    monkeypatch.setattr(measuring, "ROW_STEP", 8)
    monkeypatch.setattr(measuring, "SAMPLED", 4)
    some = measure(small, bases)
    assert some != whole
    for what in ("int4", "bf16"):
        sums = [sum(each.errors[what] for each in found.values()) for found in (whole, some)]
        assert sums[1] == pytest.approx(sums[0], rel=0.2)
    assert sum(lost.energy for lost in some.values()) == pytest.approx(
        sum(lost.energy for lost in whole.values()), rel=0.2
    )


def test_the_embedding_is_seen(small: Any) -> None:
    """Mean |x|^2 over its rows; a model without one has none."""
    source = open_checkpoint(small.source)
    weights = group_tensors(source.tensors).weights
    taken = Measuring(source, open_stats(small.stats), formats_of(weights, Int4()), "rtn")
    values = values_of(small.source, "model.embed_tokens")
    assert taken.embedding(weights) == pytest.approx(float((values**2).sum(axis=1).mean()), rel=1e-5)
    assert taken.embedding([weight for weight in weights if "embed" not in weight.base]) == 0


def test_an_error_counts_by_what_its_module_writes(small: Any) -> None:
    """Over the stream behind it: the embedding and all modules until there, an expert by its router's weights."""
    weights, stats = list(small.weights().values()), open_stats(small.stats)
    energies = {weight.base: Lost(2.0, {}) for weight in weights if weight.base.endswith(("o_proj", "down_proj"))}
    energies |= {base.replace("down", "up"): Lost(7.0, {}) for base in energies if "down" in base}
    found = shares(weights, energies, stats, embedding=3.0)
    loads = [_load(stats, expert) for expert in range(4)]
    routed = sum(2.0 * load for load in loads)
    assert found["model.layers.0.self_attn.o_proj"] == pytest.approx(2 / (3 + 2))
    assert found["model.layers.0.mlp.down_proj"] == found["model.layers.0.mlp.up_proj"] == pytest.approx(2 / (3 + 4))
    assert found["model.layers.1.self_attn.o_proj"] == pytest.approx(2 / (3 + 6))
    behind = 3 + 6 + 2 + routed
    assert found["model.layers.1.mlp.shared_experts.up_proj"] == pytest.approx(2 / behind)
    assert found["model.layers.1.mlp.experts.3.up_proj"] == pytest.approx(2 * loads[3] / behind)


def test_the_order_of_files_changes_no_bit_of_a_stream(small: Any) -> None:
    """Sums of floats depend on their order, and another cut into shards is the same model."""
    weights, stats = list(small.weights().values()), open_stats(small.stats)
    energies = {weight.base: 1 / (3 + number % 7) for number, weight in enumerate(weights)}
    lost = {base: Lost(energy if ".experts." in base else 0.0, {}) for base, energy in energies.items()}
    orders = [[weights[at] for at in np.random.default_rng(seed).permutation(len(weights))] for seed in range(20)]
    found = [shares(order, lost, stats, embedding=0.0) for order in orders]
    assert len(found[0]) > 20
    assert all(each == found[0] for each in found)


def _load(stats: Any, expert: int) -> float:
    """Return the sum of squares of the router's weights of an expert of layer 1, a token."""
    found = [stats.moments(f"model.layers.1.mlp.experts.{expert}.up_proj", part) for part in ("train", "validation")]
    return float(sum(own.weight for own in found) / (600 + 60))
