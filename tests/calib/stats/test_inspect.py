"""`k2quant inspect STATS`: what is in a folder of statistics, for people and as JSON, finished or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from k2quant.calib.stats.inspection import inspect_stats, is_stats
from k2quant.calib.stats.writing import calibrating, write_layer
from k2quant.cli import main


def test_people_get_model_data_settings_and_reach(made_up: Any) -> None:
    """In a few lines; the expert without a token is named, and counted."""
    stats = made_up.stats("stats", empty=3)
    done = CliRunner().invoke(main, ["inspect", str(stats.folder)])
    thinnest = "model.layers.1.mlp.experts.3"
    first, *lines = done.stdout.splitlines()
    assert done.exit_code == 0
    assert first.startswith(
        f"{stats.folder}: statistics of a calibration, 2 layers, 4 experts a layer, 2 of them a token, "
    )
    assert first.endswith(" kB, without Hessians")
    assert lines == [
        "",
        "part        documents  rows  tokens",
        "train              10    30     600",
        "validation          1     3      60",
        "test                1     3      60",
        "",
        "settings: samples 30, length 20; measured by 0.0",
        f"train: an expert has 300 tokens on average; the thinnest, {thinnest}, has 0; 1 expert of 4 has no token",
        f"validation: an expert has 30 tokens on average; the thinnest, {thinnest}, has 0; 1 expert of 4 has no token",
        f"fingerprint: {stats.fingerprint}",
    ]


def test_json_holds_everything(made_up: Any) -> None:
    """The same figures by name, and where each expert has tokens, none is called empty."""
    stats = made_up.stats("stats", made_up.manifest(hessians=True))
    found = json.loads(CliRunner().invoke(main, ["inspect", "--json", str(stats.folder)]).stdout)
    tokens = stats.load(1)[0].tolist()
    assert found.pop("nbytes") == sum(path.stat().st_size for path in stats.folder.iterdir())
    assert found.pop("reach")["train"] == {
        "experts": 4,
        "mean": 300.0,
        "least": min(tokens),
        "thinnest": f"model.layers.1.mlp.experts.{tokens.index(min(tokens))}",
        "empty": 0,
    }
    assert found.pop("sizes")["hidden_size"] == 64
    assert found == {
        "folder": str(stats.folder),
        "finished": True,
        "layers": 2,
        "layers_done": 2,
        "data": [
            {"part": "train", "documents": 10, "rows": 30, "tokens": 600},
            {"part": "validation", "documents": 1, "rows": 3, "tokens": 60},
            {"part": "test", "documents": 1, "rows": 3, "tokens": 60},
        ],
        "settings": {"samples": 30, "length": 20},
        "hessians": True,
        "version": "0.0",
        "fingerprint": stats.fingerprint,
    }


def test_an_unfinished_folder_is_said_to_be_unfinished(made_up: Any) -> None:
    """With the layers that are done, and what to do; it exits 1, for no conversion takes it."""
    folder, manifest = made_up.home / "stats", made_up.manifest()
    with calibrating(folder, manifest):
        write_layer(folder, 1, made_up.layer(manifest, 1), {})
    done = CliRunner().invoke(main, ["inspect", str(folder)])
    assert done.exit_code == 1
    assert "not finished, 1 of 2 layers done, 4 experts a layer" in done.stdout
    assert done.stdout.splitlines()[-1] == "run the same `k2quant calibrate` again: it resumes"
    assert json.loads(CliRunner().invoke(main, ["inspect", "--json", str(folder)]).stdout)["fingerprint"] is None


def test_a_model_without_routed_experts_has_no_reach(made_up: Any) -> None:
    """Nothing is said of experts that it has not."""
    folder = made_up.write("stats", made_up.manifest(num_hidden_layers=1))
    assert inspect_stats(folder).reach == {}
    assert "an expert has" not in CliRunner().invoke(main, ["inspect", str(folder)]).stdout


def test_what_lies_is_refused(made_up: Any) -> None:
    """Every layer is read: a byte that changed is an error with the file's name, and exits 1."""
    folder = made_up.write()
    path = folder / "layer-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    done = CliRunner().invoke(main, ["inspect", str(folder)])
    assert (done.exit_code, done.stdout) == (1, "")
    assert "layer-00000.safetensors: changed since it was written" in done.stderr


def test_hostile_settings_stay_text(made_up: Any) -> None:
    """A terminal's codes in a setting are shown, not obeyed."""
    folder = made_up.write()
    path = folder / "k2quant_stats.json"
    path.write_text(path.read_text().replace('"samples"', r'"\u001b[31msamples"'))
    assert r"settings: \x1b[31msamples 30" in CliRunner().invoke(main, ["inspect", str(folder)]).stdout


def test_a_checkpoint_is_none(made_up: Any, k2_source: Path, tmp_path: Path) -> None:
    """Nor is a file, an empty folder or nothing; a result shows itself in a line, and as a table."""
    (tmp_path / "file").touch()
    for path in (k2_source, tmp_path, tmp_path / "file", tmp_path / "nothing"):
        assert not is_stats(path)
    found = inspect_stats(made_up.write())
    assert repr(found).startswith("StatsInspection(folder=")
    assert "<table>" in found._repr_html_()
