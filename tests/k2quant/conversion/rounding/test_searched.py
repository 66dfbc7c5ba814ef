"""Conversions that search better scales than rounding's: which bytes come of it, and what is judged by what."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import k2quant
from k2quant.calib.stats.layout import Input, Part
from k2quant.calib.stats.reading import Record, open_stats, read_moments
from k2quant.checkpoint import panels
from k2quant.checkpoint.header import ShardHeader, TensorEntry
from k2quant.checkpoint.reader import Checkpoint, open_checkpoint
from k2quant.checkpoint.reading import read_tensor
from k2quant.checkpoint.writing.in_memory import Shard, write_checkpoint
from k2quant.conversion.plan import Options
from k2quant.conversion.searching.asked import planned
from k2quant.conversion.searching.gains import bought
from k2quant.errors import DestinationStale
from k2quant.formats.dtypes import TensorSpec, as_array
from k2quant.kernels.codecs import cpu
from k2quant.kernels.codecs.reference.seam import torch_codecs
from k2quant.kernels.codecs.values import F32, I32, U16, bf16_to_float

BASE = "model.layers.{}.mlp.experts.{}.{}_proj"
RARE = BASE.format(1, 3, "down")
"""Ten tokens of a part reached it."""


def shards(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every shard."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def weight(folder: Path, base: str) -> U16:
    """Return the BF16 bits of a weight that is stored so."""
    found = open_checkpoint(folder)
    entry = found.tensors[f"{base}.weight"]
    return np.frombuffer(read_tensor(found, entry), np.uint16).reshape(entry.shape)


def tensor_of(source: Checkpoint, entry: TensorEntry) -> NDArray[Any]:
    """Return a tensor."""
    return as_array(np.frombuffer(read_tensor(source, entry), np.uint8), TensorSpec(entry.dtype, entry.shape))


def codes(folder: Path, base: str) -> tuple[I32, U16]:
    """Return packed words and scales of a weight that is stored in INT4."""
    found = open_checkpoint(folder)
    packed, scale = (found.tensors[f"{base}.{suffix}"] for suffix in ("weight_packed", "weight_scale"))
    return (
        np.frombuffer(read_tensor(found, packed), np.int32).reshape(packed.shape),
        np.frombuffer(read_tensor(found, scale), np.uint16).reshape(scale.shape),
    )


def scales_of(done: k2quant.Conversion) -> dict[str, Any]:
    """Return what a report says of the scales of each weight that was searched, by base."""
    tensors = done.report["tensors"]
    return {name.rpartition(".")[0]: facts["scales"] for name, facts in tensors.items() if "scales" in facts}


def chosen(values: U16, importance: F32 | None, mean: F32 | None = None) -> U16:
    """Return the scales that the codec finds."""
    scale = np.empty((len(values), values.shape[1] // 32), np.uint16)
    cpu.int4.search(values, importance, scale, mean=mean)
    return scale


def plain(values: U16) -> U16:
    """Return the scales of rounding to nearest."""
    scale = np.empty((len(values), values.shape[1] // 32), np.uint16)
    cpu.int4.choose(values, "moonshot", scale)
    return scale


@pytest.fixture(scope="module")
def mse(small: Path) -> k2quant.Conversion:
    """The small K2, searched without data."""
    return k2quant.convert(small, small.parent / "mse", "int4", method="mse", workers=1)


@pytest.fixture(scope="module")
def imatrix(small: Path, stats: Path) -> k2quant.Conversion:
    """The same, by its statistics."""
    return k2quant.convert(small, small.parent / "imatrix", "int4", method="imatrix", stats=stats, workers=1)


def test_the_searched_scales_are_stored(mse: k2quant.Conversion, small: Path, small_bf16: Path) -> None:
    """Each expert has the scales that the codec finds for it and codes at them; all else is as rounding leaves it."""
    for base in scales_of(mse):
        values = weight(small_bf16, base)
        scale = chosen(values, None)
        packed = np.empty((len(values), values.shape[1] // 8), np.int32)
        cpu.int4.store(values, scale, "moonshot", packed)
        assert [part.tolist() for part in codes(mse.folder, base)] == [packed.tolist(), scale.tolist()]
    assert len(scales_of(mse)) == 24
    assert (
        weight(mse.folder, "model.layers.0.self_attn.o_proj").tobytes()
        == weight(small_bf16, "model.layers.0.self_attn.o_proj").tobytes()
    )
    assert k2quant.verify(small, mse.folder).passed
    assert k2quant.verify_checksums(mse.folder).passed


def test_the_report_says_how_and_what_it_came_to(mse: k2quant.Conversion, small_bf16: Path) -> None:
    """Method and candidates for the whole; for each weight the error by rounding's, here of every eighth row."""
    assert mse.report["method"] == {"asked": "mse", "candidates": 16}
    assert mse.report["recipe"]["rules"][0]["method"] == "mse"
    for base, said in scales_of(mse).items():
        values = weight(small_bf16, base)
        rows = np.ascontiguousarray(values[::8])
        lost = [cpu.int4.weighted_error(rows, scale, None) for scale in (chosen(rows, None), plain(rows))]
        assert said == {"method": "mse", "relative": lost[0] / lost[1], "measure": "weights"}
        assert said["relative"] < 0.95
    assert "substituted" not in json.dumps(mse.report)


def test_a_search_has_the_same_bytes_by_any_threads_and_panels(
    imatrix: k2quant.Conversion, small: Path, stats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four threads, and panels of 128 rows, write what one thread writes, and say the same of it."""
    monkeypatch.setattr(panels, "PANEL_WEIGHTS", 128 * 128)
    done = k2quant.convert(small, tmp_path / "out", "int4", method="imatrix", stats=stats, workers=4)
    assert shards(done.folder) == shards(imatrix.folder)
    for base, said in scales_of(done).items():
        assert said["relative"] == pytest.approx(scales_of(imatrix)[base]["relative"], rel=1e-12)


def test_equal_values_are_searched_alike(mse: k2quant.Conversion, small_bf16: Path, tmp_path: Path) -> None:
    """The same weights in BF16 get the same codes and scales as from block FP8."""
    done = k2quant.convert(small_bf16, tmp_path / "out", "int4", method="mse")
    assert shards(done.folder) == shards(mse.folder)


def test_the_reference_searches_the_same(
    imatrix: k2quant.Conversion, small: Path, stats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the codecs in plain torch, which a GPU without Triton uses, bytes and errors are the same."""
    monkeypatch.setattr("k2quant.conversion.convert.codecs_of", torch_codecs)
    only = r"^(?!.*layers\.0\.mlp\.experts\.1\.)"
    done = k2quant.convert(
        small, tmp_path / "out", "int4", method="imatrix", stats=stats, ignore=(only,), allow_split=True
    )
    said, known = scales_of(done), scales_of(imatrix)
    assert len(said) == 3
    for base in said:
        assert said[base] == known[base]
        ours, theirs = (codes(each.folder, base) for each in (done, imatrix))
        assert [part.tolist() for part in ours] == [part.tolist() for part in theirs]


def test_the_names_of_k25_are_found_in_statistics(
    imatrix: k2quant.Conversion, small: Path, make_stats: Callable[..., Path], tmp_path: Path
) -> None:
    """K2.5 puts `language_model.` before a name and its sizes into `text_config`; what was measured is the same."""
    source = open_checkpoint(small)
    shard: Shard = {
        f"language_model.{name}": (entry.dtype, tensor_of(source, entry)) for name, entry in source.tensors.items()
    }
    config = {"model_type": "kimi_k25", "text_config": source.config}
    write_checkpoint(tmp_path / "k25", {"model.safetensors": shard}, config)
    stats = make_stats(tmp_path / "k25")
    done = k2quant.convert(tmp_path / "k25", tmp_path / "out", "int4", method="imatrix", stats=stats)
    assert {base.removeprefix("language_model."): said for base, said in scales_of(done).items()} == scales_of(imatrix)


def test_native_int4_is_copied(rounded: Path, tmp_path: Path) -> None:
    """What is INT4 already lies on its grid: its bytes stay, and the last line says that nothing was searched."""
    done = k2quant.convert(rounded, tmp_path / "out", "int4", method="mse")
    ours, theirs = (open_checkpoint(folder) for folder in (done.folder, rounded))
    for name, entry in theirs.tensors.items():
        assert read_tensor(ours, ours.tensors[name]) == read_tensor(theirs, entry)
    assert not scales_of(done)
    assert bought(done.report) == "mse: nothing was searched, for no weight gets new codes"


def test_importance_decides_and_held_out_data_judges(
    imatrix: k2quant.Conversion, small: Path, small_bf16: Path, stats: Path
) -> None:
    """Scales are those of the train part's moments; the error is that of the validation part's."""
    known = open_stats(stats)
    assert imatrix.report["method"] == {"asked": "imatrix", "candidates": 16, "stats": known.fingerprint}
    for base, said in scales_of(imatrix).items():
        values, held = weight(small_bf16, base), known.held_out(base)
        assert held is not None
        scale = chosen(values, known.importance(base), known.mean(base))
        assert codes(imatrix.folder, base)[1].tolist() == scale.tolist()
        lost = [cpu.int4.weighted_error(values, each, held.values, mean=held.mean) for each in (scale, plain(values))]
        measure = "validation, blended" if ".1.mlp.experts.3." in base else "validation"
        assert said == {
            "method": "imatrix",
            "relative": lost[0] / lost[1],
            "measure": measure,
            "tokens": held.tokens,
        }
    assert k2quant.verify(small, imatrix.folder).passed
    line = bought(imatrix.report)
    assert line is not None
    assert line.startswith("imatrix: held-out error 0.")
    assert line.endswith("of rounding's (median of 24 matrices)")


def test_what_held_out_data_finds_worse_ships_rounded(
    small: Path, rounded: Path, make_stats: Callable[..., Path], tmp_path: Path
) -> None:
    """Where the validation part asks for what the train part did not, a matrix has rounding's bytes, and the reason."""

    def contrary(one: Input, part: Part, squares: F32) -> F32:
        """Let the down_proj of layer 0's expert 2 be given other channels in each part."""
        if one.name == "model.layers.0.mlp.experts.down_proj":
            squares[2] = 1e-6
            squares[2, int(part == "validation") :: 2] = 1.0
        return squares

    stats = make_stats(squares=contrary)
    done = k2quant.convert(small, tmp_path / "out", "int4", method="imatrix", stats=stats)
    said = scales_of(done)
    worse = [base for base in said if said[base]["method"] == "rtn"]
    assert worse == [BASE.format(0, 2, "down")]
    assert said[worse[0]]["relative"] > 1
    assert said[worse[0]]["reason"] == "worse than rounding on held-out data"
    for base in said:
        ours, theirs = ([part.tolist() for part in codes(folder, base)] for folder in (done.folder, rounded))
        assert (ours == theirs) == (base in worse)
    facts = {folder: k2quant.verify(small, folder) for folder in (done.folder, rounded)}
    assert all(found.passed for found in facts.values())
    line = bought(done.report)
    assert line is not None
    assert line.endswith("(median of 24 matrices), 1 ships rounded")
    report = json.loads((rounded / "k2quant_report.json").read_text())["tensors"][f"{worse[0]}.weight_packed"]
    mine = done.report["tensors"][f"{worse[0]}.weight_packed"]
    assert {key: mine[key] for key in ("crc32", "figures")} == {key: report[key] for key in ("crc32", "figures")}


def test_with_hessians_outputs_are_judged(
    small: Path, small_bf16: Path, make_stats: Callable[..., Path], tmp_path: Path
) -> None:
    """The error is tr(D H D^T) over the validation part's inputs, their correlations too."""
    stats = make_stats(hessians=True)
    known = open_stats(stats)
    only = r"^(?!.*layers\.(0\.mlp\.experts\.1\.gate|1\.mlp\.experts\.[23]\.down))"
    done = k2quant.convert(
        small, tmp_path / "out", "int4", method="imatrix", stats=stats, ignore=(only,), allow_split=True
    )
    said = scales_of(done)
    for base in (BASE.format(0, 1, "gate"), BASE.format(1, 2, "down")):
        hessian, values = known.hessian(base, "validation"), weight(small_bf16, base)
        assert hessian is not None
        lost = []
        for scale in (chosen(values, known.importance(base), known.mean(base)), plain(values)):
            packed, after = np.empty((len(values), values.shape[1] // 8), np.int32), np.empty_like(values)
            cpu.int4.store(values, scale, "moonshot", packed)
            cpu.int4.decode(packed, bf16_to_float(scale), 32, after)
            error = (bf16_to_float(values) - bf16_to_float(after)).astype(np.float64)
            lost.append(np.vdot(error @ hessian.astype(np.float64), error))
        assert said[base]["measure"] == "validation, hessian"
        assert said[base]["relative"] == pytest.approx(lost[0] / lost[1], rel=1e-9)
    assert said[RARE]["measure"] == "validation, blended"


def test_a_search_that_was_stopped_resumes_with_equal_bytes(
    imatrix: k2quant.Conversion, small: Path, stats: Path, tmp_path: Path
) -> None:
    """What was finished stays, and the end is that of a run that was left alone; statistics may have been moved."""

    def stop(done: int, total: int) -> None:
        if done > 0.8 * total:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        k2quant.convert(small, out, "int4", method="imatrix", stats=stats, workers=1, progress=stop)
    moved = shutil.copytree(stats, tmp_path / "moved")
    done = k2quant.convert(small, out, "int4", method="imatrix", stats=moved)
    assert done.resumed
    assert shards(out) == shards(imatrix.folder)
    assert done.report["tensors"] == imatrix.report["tensors"]
    assert k2quant.convert(small, out, "int4", method="imatrix", stats=stats).already_done


def test_another_method_and_other_statistics_are_another_run(
    imatrix: k2quant.Conversion, small: Path, stats: Path, make_stats: Callable[..., Path], rounded: Path
) -> None:
    """A finished folder is refused to a call of another method, and to one of statistics that measured otherwise."""
    with pytest.raises(DestinationStale, match="of other options"):
        k2quant.convert(small, imatrix.folder, "int4")
    with pytest.raises(DestinationStale, match="of other options"):
        k2quant.convert(small, rounded, "int4", method="mse")
    other = make_stats(squares=lambda _one, _part, squares: squares * 2)
    with pytest.raises(DestinationStale, match="of another method, other statistics or other data"):
        k2quant.convert(small, imatrix.folder, "int4", method="imatrix", stats=other)
    assert k2quant.convert(small, rounded, "int4", method="rtn").already_done
    assert k2quant.convert(small, imatrix.folder, recipe=imatrix.folder, stats=stats).already_done


def test_mse_is_judged_where_there_are_statistics(small: Path, stats: Path, tmp_path: Path) -> None:
    """Its scales need none; with them, each matrix is held against rounding on held-out data."""
    done = k2quant.convert(small, tmp_path / "out", "int4", method="mse", stats=stats)
    said = scales_of(done)
    assert {facts["method"] for facts in said.values()} <= {"mse", "rtn"}
    assert {facts["measure"] for facts in said.values()} == {"validation", "validation, blended"}
    assert all((facts["relative"] > 1) == (facts["method"] == "rtn") for facts in said.values())


def test_scope_and_ignore_say_what_is_searched(small: Path, stats: Path, tmp_path: Path) -> None:
    """Weights out of scope are as ever; in the wider scope attention is searched by its own moments."""
    done = k2quant.convert(
        small, tmp_path / "a", "int4", scope="linear", ignore=(r"layers\.1\.",), method="imatrix", stats=stats
    )
    said = scales_of(done)
    assert len(said) == 13
    assert said["model.layers.0.self_attn.o_proj"]["measure"] == "validation"
    assert not any("layers.1." in base for base in said)


def test_rules_of_a_recipe_say_which_method(small: Path, tmp_path: Path, rounded: Path) -> None:
    """One rule searches and another rounds; each weight is done as its own says."""
    rules = {
        "rules": [
            {"to": "int4", "match": r"layers\.0\.", "scope": "experts", "method": "mse"},
            {"to": "int4", "method": "rtn"},
        ]
    }
    done = k2quant.convert(small, tmp_path / "out", recipe=rules)
    assert {base.split(".")[2] for base in scales_of(done)} == {"0"}
    ours, theirs = shards(done.folder), shards(rounded)
    assert [ours[name] == theirs[name] for name in sorted(ours)] == [False, True]


def test_as_many_layers_stay_in_memory_as_shards_are_written(
    small: Path, stats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights of several layers come in turn: each layer's statistics are read once; what that takes is said before."""
    _, rounder = planned(small, Options("int4", method="imatrix"), stats)
    assert rounder is not None
    assert rounder.memory(1) < rounder.memory(8) == rounder.memory(16)
    monkeypatch.setattr("k2quant.calib.stats.reading._KEPT", 1)
    read: list[object] = []

    def counted(record: Record, header: ShardHeader) -> Any:
        read.append(header.path)
        return read_moments(record, header)

    monkeypatch.setattr("k2quant.calib.stats.reading.read_moments", counted)
    k2quant.convert(small, tmp_path / "out", "int4", method="imatrix", stats=stats, workers=2)
    assert len(read) == 2
