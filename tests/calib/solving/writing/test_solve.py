"""Whole conversions that solve: what is written, what the report says, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

import k2quant
from k2quant.calib.solving.writing.rounder import BEYOND, most_waiting
from k2quant.checkpoint.reader import open_checkpoint
from k2quant.checkpoint.reading import read_tensor
from k2quant.cli import main
from k2quant.errors import DestinationStale, OutputError, UsageError

pytestmark = pytest.mark.usefixtures("one_thread")

Made = Callable[[Path], dict[str, Any]]


def scales_of(report: dict[str, Any]) -> dict[str, Any]:
    """Return what a report says of the scales of each weight that was solved, by base."""
    tensors = report["tensors"]
    return {name.rpartition(".")[0]: facts["scales"] for name, facts in tensors.items() if "scales" in facts}


def test_the_function_writes_a_model_that_runs(place: Any, whole: Path, made: Made, tmp_path: Path) -> None:
    """From text alone: equal to what its parts make, its checksums hold, and it gives finite logits."""
    done = k2quant.calib.solve(
        place.model, tmp_path / "out", data=place.data, scope="projections", samples=8, length=32, memory="4GB"
    )
    assert made(tmp_path / "out") == made(whole)
    assert not (tmp_path / "out" / ".k2quant").exists()
    assert k2quant.verify_checksums(done.folder).passed
    model = k2quant.load_model(done.folder)
    assert bool(torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all())
    report = done.report
    assert report["method"]["asked"] == "gptq"
    assert report["method"]["data"]["train"]["tokens"] == place.samples.train.count
    assert [layer["layer"] for layer in report["layers"]] == [0, 1]
    assert len(scales_of(report)) == 40
    assert sum(facts["method"] == "gptq" for facts in scales_of(report).values()) > 30


def test_what_is_out_of_scope_is_copied(place: Any, made: Made, tmp_path: Path) -> None:
    """Of experts alone every other tensor has the source's bytes; a run by two threads gives the same."""
    done = place.solve(tmp_path / "out", scope=None)
    place.solve(tmp_path / "again", scope=None, workers=2)
    assert made(done.folder) == made(tmp_path / "again")
    before, after = open_checkpoint(place.model), open_checkpoint(done.folder)
    for name in before.tensors.keys() & after.tensors.keys():
        assert read_tensor(before, before.tensors[name]) == read_tensor(after, after.tensors[name])
    assert set(scales_of(done.report)) == {
        f"model.layers.1.mlp.experts.{n}.{name}_proj" for n in range(8) for name in ("gate", "up", "down")
    }


def test_shards_may_mix_layers_in_any_order(place: Any, whole: Path, tmp_path: Path) -> None:
    """Cut otherwise, each tensor is what it is; those of a shard that ends early wait for no later layer."""
    done = place.solve(tmp_path / "out", shard_size=12_000)
    cut, plain = open_checkpoint(done.folder), open_checkpoint(whole)
    assert len({entry.file for entry in cut.tensors.values()}) > 5
    assert {name: read_tensor(cut, entry) for name, entry in cut.tensors.items()} == {
        name: read_tensor(plain, entry) for name, entry in plain.tensors.items()
    }


def test_other_scales_give_other_weights(place: Any, whole: Path, made: Made, tmp_path: Path) -> None:
    """Each setting reaches the bytes, and each is noted."""
    seen = [made(whole)]
    for settings in ({"scales": "rtn"}, {"damping": 0.01}, {"propagate": False}):
        folder = tmp_path / str(settings)
        report = place.by(**settings).solve(folder).report
        assert settings.items() <= report["method"].items()
        assert made(folder) not in seen
        seen.append(made(folder))


def test_another_run_is_refused(place: Any, whole: Path, made: Made) -> None:
    """A finished folder of other data, scales or another method is not taken for this one, nor overwritten."""
    before = made(whole)
    for other in ({"scales": "mse"}, {"damping": 0.2}, {"propagate": False}):
        with pytest.raises(DestinationStale, match="another method, other statistics or other data"):
            place.by(**other).solve(whole)
    with pytest.raises(DestinationStale, match="other options"):
        k2quant.convert(place.model, whole, to="int4", scope="projections")
    with pytest.raises(DestinationStale, match="other data"):
        k2quant.calib.solve(place.model, whole, data=place.data, scope="projections", samples=7, length=32)
    assert place.solve(whole).already_done
    assert made(whole) == before


def test_layers_beyond_the_pass_are_searched(place: Any, tmp_path: Path) -> None:
    """A layer that the config does not count, as those of MTP, is searched, and that is said."""
    model = tmp_path / "model"
    shutil.copytree(place.model, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1, "num_nextn_predict_layers": 1}))
    alone = type(place)(model, place.data, place.samples)
    report = alone.solve(tmp_path / "out").report
    found = scales_of(report)
    assert {facts["method"] for base, facts in found.items() if ".layers.1." in base} <= {"mse", "rtn"}
    assert {facts["reason"] for base, facts in found.items() if ".layers.1." in base} == {BEYOND}
    assert any(facts["method"] == "gptq" for base, facts in found.items() if ".layers.0." in base)
    assert [remark for remark in report["remarks"] if "not reached by the pass" in remark]


def test_a_recipe_says_what_is_solved(place: Any, tmp_path: Path) -> None:
    """Its rules name the method; one that names another, and what makes no sense, is refused before all else."""
    rules = [{"to": "int4", "match": "down_proj", "method": "gptq"}, {"to": "int4", "scope": "experts"}]
    given = {"data": place.data, "samples": 8, "length": 32, "memory": "4GB"}
    done = k2quant.calib.solve(place.model, tmp_path / "out", recipe={"rules": rules}, allow_split=True, **given)
    assert {base.rpartition(".")[2] for base in scales_of(done.report)} == {"down_proj"}
    with pytest.raises(UsageError, match="says method mse in its rules"):
        k2quant.calib.solve(place.model, tmp_path / "no", recipe={"rules": [{"to": "int4", "method": "mse"}]}, **given)
    with pytest.raises(UsageError, match="`scales=`"):
        k2quant.calib.solve(place.model, tmp_path / "no", scales="gptq", **given)
    with pytest.raises(UsageError, match="`memory=` is too small"):
        k2quant.calib.solve(place.model, tmp_path / "no", **(given | {"memory": "1MB"}))
    with pytest.raises(TypeError, match="no argument 'damp_percent': it is `damping` here"):
        k2quant.calib.solve(place.model, tmp_path / "no", damp_percent=0.1, **given)
    assert not (tmp_path / "no").exists()


def test_a_full_disk_is_said_before_the_pass(place: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the disk must hold beside the output counts: hidden states, and what waits for its shard."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=130_000))
    with pytest.raises(OutputError, match=r"the disk is too small.* for the output, hidden states and what is solved"):
        place.solve(tmp_path / "out")


def test_what_waits_for_its_shard_is_counted() -> None:
    """A layer's matrices lie on the disk from when a shard waits for them until the last that needs them stands."""

    def shard(**layers: int) -> Any:
        jobs = [
            SimpleNamespace(layer=int(name[1:]), outputs={"": SimpleNamespace(nbytes=nbytes)})
            for name, nbytes in layers.items()
        ]
        return SimpleNamespace(jobs=jobs)

    def most(*shards: Any) -> int:
        return most_waiting(shards, lambda job: job.layer)  # type: ignore[attr-defined]

    assert most() == most(shard()) == 0
    assert most(shard(_0=5), shard(_1=7)) == 7
    assert most(shard(_0=5), shard(_0=1, _1=7)) == 13
    assert most(shard(_2=5), shard(_2=1)) == 6
    assert most(shard(_0=1, _1=2), shard(_1=3, _2=4), shard(_2=5)) == 14


def typed(*words: Any) -> Result:
    """Return what `convert --to int4` says."""
    return CliRunner().invoke(main, ["convert", "--to", "int4", *map(str, words)])


def test_the_command_writes_what_the_function_writes(place: Any, whole: Path, made: Made, tmp_path: Path) -> None:
    """Byte for byte; it says what was won, and as JSON what was done to each layer."""
    given = ["--method", "gptq", "--data", place.data, "--samples", 8, "--length", 32, "--memory", "4GB"]
    given += ["--scope", "projections", place.model, tmp_path / "out"]
    planned = json.loads(typed("--dry-run", "--json", *given).stdout)
    assert planned["method"]["weights"] == 40
    assert planned["seconds"] > 0
    assert not (tmp_path / "out").exists()
    done = typed(*given)
    assert done.exit_code == 0, done.stderr
    assert made(tmp_path / "out") == made(whole)
    assert "gptq: held-out error 0." in done.stdout
    again = typed("--json", *given)
    assert json.loads(again.stdout)["already_done"]
    assert [layer["solved"] for layer in json.loads(again.stdout)["layers"]] == [8, 32]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data", "DATA"], "--data with --method rtn, which runs no text"),
        (["--method", "mse", "--damping", "0.1", "--no-propagate"], "with --method mse, which solves nothing"),
        (["--method", "imatrix", "--data", "DATA"], "for imatrix and awq, `k2quant calibrate SOURCE STATS"),
        (["--method", "gptq"], "and --data names none"),
        (["--method", "gptq", "--data", "DATA", "--stats", "x"], "--stats has no meaning with --method gptq"),
        (["--method", "gptq", "--data", "nowhere.jsonl"], "'nowhere.jsonl': no such file"),
        (["--method", "gptq", "--data", "DATA", "--memory", "much"], "much"),
        (["--method", "gptq", "--data", "DATA", "--damping", "0"], "Invalid value for '--damping'"),
        (["--method", "gptq", "--data", "DATA", "--grid", "compressed-tensors"], "on the grid moonshot alone"),
    ],
)
def test_the_command_refuses_what_makes_no_sense(place: Any, tmp_path: Path, words: list[str], said: str) -> None:
    """Options of one method beside another, and text that is not there: usage errors, before anything is written."""
    found = typed(*(place.data if word == "DATA" else word for word in words), place.model, tmp_path / "out")
    assert found.exit_code == 2
    assert said in found.stderr
    assert not (tmp_path / "out").exists()


def test_where_nothing_is_solved_a_dry_run_costs_a_conversion(place: Any, tmp_path: Path) -> None:
    """INT4 is copied: no pass is run, so none is planned, and no memory is too small for it."""
    native = k2quant.convert(place.model, tmp_path / "native", to="int4").folder
    given = ["--method", "gptq", "--data", place.data, "--memory", "1MB", "--dry-run", native, tmp_path / "out"]
    said = typed(*given)
    assert said.exit_code == 0, said.stderr
    assert "0 weights solved" in said.stdout
    assert "Hessian" not in said.stdout
    assert json.loads(typed("--json", *given).stdout)["seconds"] < 60
