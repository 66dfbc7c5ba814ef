"""Folds: what of an output they change and what not, that both halves of one are always there, and what they win."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import k2quant
from k2quant.calib.stats.layout import Input, Part
from k2quant.calib.stats.reading import open_stats
from k2quant.checkpoint import panels
from k2quant.checkpoint.reader import Checkpoint, open_checkpoint
from k2quant.checkpoint.writing.in_memory import Shard, write_checkpoint
from k2quant.checkpoint.writing.writer import ShardWriter
from k2quant.conversion.plan import Options
from k2quant.conversion.searching.asked import planned
from k2quant.conversion.searching.folding import check_halves
from k2quant.conversion.searching.powers import fold_of, shifted, shifted_scales
from k2quant.errors import CheckpointError, OutputError
from k2quant.kernels.codecs import cpu
from k2quant.kernels.codecs.values import F32, U16, bf16_to_float
from rewritten import tensors_of
from tiny import write_model

BASE = "model.layers.{}.mlp.experts.{}.{}_proj"
PAIR = BASE.format(0, 2, "up"), BASE.format(0, 2, "down")

Tensors = dict[str, NDArray[Any]]


def tensors(folder: Path) -> Tensors:
    """Return every tensor of an output; INT4's words and scales by their names."""
    return {name: array for name, (_, array) in tensors_of(open_checkpoint(folder)).items()}


def values(found: Tensors, base: str) -> U16:
    """Return the BF16 bits that a weight in INT4 stands for."""
    packed, scale = found[f"{base}.weight_packed"], found[f"{base}.weight_scale"].view(np.uint16)
    out = np.empty((len(packed), packed.shape[1] * 8), np.uint16)
    cpu.int4.decode(packed.view(np.int32), bf16_to_float(scale), 32, out)
    return out


def folds(done: k2quant.Conversion) -> dict[str, Any]:
    """Return what a report says of folds, by base."""
    facts = done.report["tensors"]
    return {name.rpartition(".")[0]: each["fold"] for name, each in facts.items() if "fold" in each}


def shards(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every shard."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


@pytest.fixture(scope="module")
def awq(small: Path, outliers: Path) -> k2quant.Conversion:
    """The small K2, folded and searched."""
    return k2quant.convert(small, small.parent / "awq", "int4", method="awq", stats=outliers, workers=1)


@pytest.fixture(scope="module")
def imatrix(small: Path, outliers: Path) -> k2quant.Conversion:
    """The same, searched alone."""
    return k2quant.convert(small, small.parent / "awq-none", "int4", method="imatrix", stats=outliers, workers=1)


def test_a_fold_changes_ups_scales_and_down_alone(
    awq: k2quant.Conversion, imatrix: k2quant.Conversion, small_bf16: Path
) -> None:
    """Codes of up and every BF16 tensor are those of `imatrix`; up's scales are those times a power of two for a row.

    Columns of down have it, before they are rounded at scales searched by the moments of inputs that lack it.
    """
    mine, theirs, source = tensors(awq.folder), tensors(imatrix.folder), tensors(small_bf16)
    known, folded = open_stats(Path(awq.folder.parent / "outliers")), 0
    assert mine.keys() == theirs.keys()
    for name, array in theirs.items():
        base, _, suffix = name.rpartition(".")
        if not base.endswith("down_proj") and (base, suffix) != (base[: -len("up_proj")] + "up_proj", "weight_scale"):
            assert mine[name].tobytes() == array.tobytes(), name
    for base, said in folds(awq).items():
        if not base.endswith("down_proj"):
            continue
        up = base.replace("down", "up")
        before = source[f"{up}.weight"].view(np.uint16)
        k = fold_of(before, values(mine, up))
        scale = theirs[f"{up}.weight_scale"].view(np.uint16)
        assert mine[f"{up}.weight_scale"].tobytes() == shifted_scales(scale, before, -k).tobytes()
        assert (said["columns"], said["most"]) == (np.count_nonzero(k), k.max())
        folded += said["columns"] > 0
        importance, mean = known.importance(base), known.mean(base)
        assert importance is not None
        assert mean is not None
        weights = shifted(source[f"{base}.weight"].view(np.uint16), k)
        expected = np.empty((len(weights), weights.shape[1] // 32), np.uint16)
        fewer = np.ldexp(importance, -2 * k.astype(np.int32)), np.ldexp(mean, -k.astype(np.int32))
        cpu.int4.search(weights, fewer[0], expected, mean=fewer[1])
        assert mine[f"{base}.weight_scale"].tobytes() == expected.tobytes()
    assert folded >= 6
    assert k2quant.verify(awq.folder.parent / "K2-Small", awq.folder).passed
    assert k2quant.verify_checksums(awq.folder).passed


def test_what_a_fold_wins_is_what_the_outputs_of_down_lose_less(
    awq: k2quant.Conversion, imatrix: k2quant.Conversion, small_bf16: Path
) -> None:
    """By held-out moments of the inputs as they were: the report says this error over that without a fold."""
    found, source, known = (
        (tensors(awq.folder), tensors(imatrix.folder)),
        tensors(small_bf16),
        open_stats(awq.folder.parent / "outliers"),
    )
    base, facts = PAIR[1], folds(awq)[PAIR[1]]
    held = known.held_out(base)
    assert held is not None
    lost = []
    for gone in what_is_lost(source, *found):
        variance = np.maximum(held.values.astype(np.float64) - held.mean.astype(np.float64) ** 2, 0)
        lost.append((gone**2 @ variance + (gone @ held.mean.astype(np.float64)) ** 2).sum())
    assert facts["relative"] == pytest.approx(lost[0] / lost[1], rel=1e-6)
    assert facts["relative"] < 0.9
    assert facts == folds(awq)[PAIR[0]]
    assert awq.report["method"] == {"asked": "awq", "candidates": 16, "stats": known.fingerprint}
    said = awq.report["tensors"][f"{base}.weight_packed"]["scales"]
    theirs = imatrix.report["tensors"][f"{base}.weight_packed"]["scales"]
    assert said["relative"] == pytest.approx(theirs["relative"] * facts["relative"], rel=1e-9)
    assert (said["method"], said["measure"], said["tokens"]) == ("imatrix", "validation", theirs["tokens"])


def what_is_lost(source: Tensors, folded: Tensors, other: Tensors) -> list[NDArray[np.float64]]:
    """Return what a down lost in an output with folds and in one without, its inputs being as they were."""
    up, base = PAIR
    exact = bf16_to_float(source[f"{base}.weight"].view(np.uint16)).astype(np.float64)
    k = fold_of(source[f"{up}.weight"].view(np.uint16), values(folded, up)).astype(np.int32)
    return [
        exact - np.ldexp(bf16_to_float(values(each, base)).astype(np.float64), -powers)
        for each, powers in ((folded, k), (other, 0 * k))
    ]


def test_a_model_of_bf16_weights_computes_the_same_bits(tmp_path: Path) -> None:
    """Powers of two that are moved by hand, in every expert, shared ones and the dense layer, change no logit."""
    torch = pytest.importorskip("torch")
    write_model(tmp_path / "plain")
    source = open_checkpoint(tmp_path / "plain")
    shutil.copytree(tmp_path / "plain", tmp_path / "folded")
    write_checkpoint(tmp_path / "folded", {"model.safetensors": moved(source)}, source.config)
    ids = torch.randint(0, 40, (2, 16), generator=torch.Generator().manual_seed(0))
    seen: list[list[Any]] = []
    for name in ("plain", "folded"):
        model: Any = k2quant.load_model(tmp_path / name)
        seen.append([])
        for key, module in model.named_modules():
            if key.endswith(("mlp.gate", "mlp")):
                module.register_forward_hook(lambda _module, _inputs, output: seen[-1].append(output))
        with torch.no_grad():
            seen[-1].append(model(input_ids=ids).logits)
    assert len(seen[0]) > 3
    flat = [[part for each in one for part in (each if isinstance(each, tuple) else (each,))] for one in seen]
    assert all(torch.equal(*pair) for pair in zip(*flat, strict=True))


def moved(source: Checkpoint) -> Shard:
    """Return the tensors of a checkpoint with random powers moved from up to down."""
    random, found = np.random.default_rng(0), tensors_of(source)
    for name, (dtype, array) in list(found.items()):
        if name.endswith("up_proj.weight"):
            down = name.replace("up_proj", "down_proj")
            k = random.integers(-4, 5, len(array))
            found[name] = (dtype, shifted(array.view(np.uint16), -k[:, None]))
            found[down] = (dtype, shifted(found[down][1].view(np.uint16), k[None]))
    return found


def test_folds_have_the_same_bytes_by_any_threads_and_panels(
    awq: k2quant.Conversion, small: Path, outliers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four threads and panels of 128 rows write what one thread writes, and say the same of folds."""
    monkeypatch.setattr(panels, "PANEL_WEIGHTS", 128 * 128)
    done = k2quant.convert(small, tmp_path / "out", "int4", method="awq", stats=outliers, workers=4)
    assert shards(done.folder) == shards(awq.folder)
    for base, said in folds(done).items():
        known = folds(awq)[base]
        assert said | {"relative": 0} == known | {"relative": 0}
        assert said["relative"] == pytest.approx(known["relative"], rel=1e-12)


def test_halves_in_shards_of_their_own_survive_every_stop(
    awq: k2quant.Conversion, small: Path, outliers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A matrix a shard, stopped after every fourth: each run chooses anew, and all tensors are those of one run."""
    options: dict[str, Any] = {"method": "awq", "stats": outliers, "shard_size": 20_000}
    finish, left = ShardWriter.finish, [0]

    def failing(writer: ShardWriter) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        finish(writer)

    monkeypatch.setattr(ShardWriter, "finish", failing)
    stops = 0
    while True:
        left[0] = 4
        try:
            done = k2quant.convert(small, tmp_path / "out", "int4", workers=1, **options)
            break
        except OutputError:
            stops += 1
    assert stops >= 6
    ours, theirs = tensors(done.folder), tensors(awq.folder)
    assert len(shards(done.folder)) >= 24
    assert ours.keys() == theirs.keys()
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)
    assert folds(done) == folds(awq)


def test_parts_fold_as_one_process_does(awq: k2quant.Conversion, small: Path, outliers: Path, tmp_path: Path) -> None:
    """Where halves of folds lie in shards of two parts, both choose the same: all tensors are those of one run."""
    options: dict[str, Any] = {"method": "awq", "stats": outliers, "shard_size": 20_000}
    for number in (3, 1, 2):
        done = k2quant.convert(small, tmp_path / "out", "int4", part=f"{number}/3", **options)
    ours, theirs = tensors(done.folder), tensors(awq.folder)
    assert ours.keys() == theirs.keys()
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)
    assert folds(done) == folds(awq)


def test_half_a_fold_is_no_output(awq: k2quant.Conversion) -> None:
    """Records in which one half of a fold is missing or another are refused by the expert's name."""
    record: dict[str, Any] = {"tensors": awq.report["tensors"]}
    check_halves([record], awq.folder)
    up = f"{PAIR[0]}.weight_packed"
    for wrong in ({}, {"fold": {**record["tensors"][up]["fold"], "crc32": "0"}}):
        facts = {key: value for key, value in record["tensors"][up].items() if key != "fold"} | wrong
        with pytest.raises(OutputError, match=rf"halves of two folds.*{re.escape(PAIR[0].rpartition('.')[0])}"):
            check_halves([{"tensors": record["tensors"] | {up: facts}}], awq.folder)


@pytest.mark.parametrize("kept", ["up_proj", "down_proj"])
def test_nothing_is_folded_where_only_one_of_two_gets_new_codes(
    kept: str, awq: k2quant.Conversion, imatrix: k2quant.Conversion, small: Path, outliers: Path, tmp_path: Path
) -> None:
    """A weight that `ignore=` spares: its partner is searched, as `imatrix` does it, and a remark says so."""
    spared = rf"layers\.0\.mlp\.experts\.2\.{kept}"
    done = k2quant.convert(
        small, tmp_path / "out", "int4", method="awq", stats=outliers, ignore=(spared,), allow_split=True
    )
    other = next(base for base in PAIR if kept not in base)
    ours, theirs = tensors(done.folder), tensors(imatrix.folder)
    for suffix in ("weight_packed", "weight_scale"):
        assert ours[f"{other}.{suffix}"].tobytes() == theirs[f"{other}.{suffix}"].tobytes()
    assert not set(PAIR) & set(folds(done))
    assert folds(done) == {base: said for base, said in folds(awq).items() if base not in PAIR}
    such = "not folded, for only one of `up_proj` and `down_proj` gets new codes: 1 pair, such as that of"
    assert [remark for remark in done.report["remarks"] if such in remark]


def test_native_int4_takes_no_part(small: Path, make_stats: Callable[..., Path], tmp_path: Path) -> None:
    """Where up is INT4 already it is copied, and down is not folded."""
    first = k2quant.convert(
        small,
        tmp_path / "mixed",
        "int4",
        ignore=(r"^(?!.*layers\.0\.mlp\.experts\.2\.up_proj)",),
        allow_split=True,
    )
    stats = make_stats(first.folder)
    done = k2quant.convert(first.folder, tmp_path / "out", "int4", method="awq", stats=stats, allow_split=True)
    ours, theirs = tensors(done.folder), tensors(first.folder)
    assert ours[f"{PAIR[0]}.weight_scale"].tobytes() == theirs[f"{PAIR[0]}.weight_scale"].tobytes()
    assert not set(PAIR) & set(folds(done))
    assert len(folds(done)) == 2 * 8 - 2
    assert any("not folded" in remark for remark in done.report["remarks"])


def test_a_fold_that_held_out_data_finds_worse_is_dropped(
    small: Path, make_stats: Callable[..., Path], tmp_path: Path
) -> None:
    """Where the validation part has other large columns than the train part, up and down are as `imatrix` has them."""

    def contrary(one: Input, part: Part, squares: F32) -> F32:
        if one.name.endswith("down_proj"):
            squares[...] = 1e-4
            squares[..., (5 if part == "train" else 6) :: 16] = 1
        return squares

    stats = make_stats(squares=contrary)
    both = {
        method: k2quant.convert(small, tmp_path / method, "int4", method=method, stats=stats)
        for method in ("awq", "imatrix")
    }
    assert shards(both["awq"].folder) == shards(both["imatrix"].folder)
    said = folds(both["awq"]).values()
    assert {each["reason"] for each in said} == {"no better than without a fold on held-out data"}
    assert all(each["relative"] > 1 and each["columns"] == each["most"] == 0 for each in said)


def test_with_hessians_the_whole_error_of_outputs_judges_a_fold(
    imatrix: k2quant.Conversion,
    small: Path,
    small_bf16: Path,
    make_stats: Callable[..., Path],
    few_large: Callable[..., F32],
    tmp_path: Path,
) -> None:
    """Columns that vary together: down's error is that of its outputs, with its inputs as they were."""
    stats = make_stats(hessians=True, squares=few_large)
    only = r"^(?!.*layers\.0\.mlp\.experts\.2\.(up|down))"
    done = k2quant.convert(small, tmp_path / "out", "int4", method="awq", stats=stats, ignore=(only,), allow_split=True)
    hessian = open_stats(stats).hessian(PAIR[1], "validation")
    assert hessian is not None
    gone = what_is_lost(tensors(small_bf16), tensors(done.folder), tensors(imatrix.folder))
    lost = [float(np.einsum("rj,jk,rk->", each, hessian.astype(np.float64), each, optimize=True)) for each in gone]
    assert folds(done)[PAIR[1]]["columns"]
    assert folds(done)[PAIR[1]]["relative"] == pytest.approx(lost[0] / lost[1], rel=1e-9)


def test_bytes_that_were_not_calibrated_choose_nothing(small: Path, outliers: Path, tmp_path: Path) -> None:
    """A changed up_proj stops the conversion when its down is to be folded, before either is written."""
    shutil.copytree(small, tmp_path / "changed")
    entry = open_checkpoint(small).tensors[f"{PAIR[0]}.weight"]
    with (tmp_path / "changed" / entry.file).open("r+b") as file:
        file.seek(entry.start + 7)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(CheckpointError, match=rf"{re.escape(PAIR[0])}.*not the weight that was calibrated"):
        k2quant.convert(tmp_path / "changed", tmp_path / "out", "int4", method="awq", stats=outliers, workers=1)


def test_a_folded_output_is_a_checkpoint_like_others(awq: k2quant.Conversion, tmp_path: Path) -> None:
    """To BF16 and back to INT4 gives its bytes again."""
    bf16 = k2quant.convert(awq.folder, tmp_path / "bf16", "bf16")
    again = k2quant.convert(bf16.folder, tmp_path / "int4", "int4")
    ours, theirs = tensors(again.folder), tensors(awq.folder)
    assert ours.keys() == theirs.keys()
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)


def test_what_it_takes_is_said_before(small: Path, outliers: Path) -> None:
    """A fold takes more time than a search, of down alone, and more memory."""
    (plan, folding), (_, searching) = (
        planned(small, Options("int4", method=method), outliers) for method in ("awq", "imatrix")
    )
    assert folding is not None
    assert searching is not None
    jobs = {job.name: job for job in plan.jobs()}
    assert [searching.effort(jobs[base]) for base in PAIR] == [1, 1]
    assert folding.effort(jobs[PAIR[0]]) == 1 < folding.effort(jobs[PAIR[1]])
    assert folding.effort(jobs["model.layers.0.mlp.gate"]) == 0
    assert folding.memory(2) > searching.memory(2)
