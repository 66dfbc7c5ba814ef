"""A small K2, rows of text for it, and conversions that solve it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

import k2quant
from k2quant.calib.inputs import Samples, read_samples
from k2quant.calib.solving.settings import Settings
from k2quant.calib.solving.solve import solve_planned
from k2quant.calib.solving.writing.planned import plan_solved
from k2quant.checkpoint.reader import REPORT, open_checkpoint
from k2quant.conversion.convert import chosen
from k2quant.model.generation import load_tokenizer
from tiny import NANO, write_model

MEMORY = 4 * 10**9
"""Bytes: enough."""

TIMES = ("finished", "seconds", "resumed_shards")
"""What a report says of a run, and not of what it made."""


@dataclass(frozen=True)
class Place:
    """A model, its data, and how it is solved unless a test says otherwise."""

    model: Path
    data: Path
    samples: Samples
    settings: Settings = field(default_factory=Settings)

    def solve(self, folder: Path, *, workers: int = 1, restart: bool = False, **options: Any) -> k2quant.Conversion:
        """Solve every projection, or what the options say."""
        asked = {"to": "int4", "scope": "projections", "method": "gptq"} | options
        planned = plan_solved(open_checkpoint(self.model), chosen(None, **asked))
        how: dict[str, Any] = {"memory": MEMORY, "workers": workers, "restart": restart}
        return solve_planned(planned, folder, self.samples, self.settings, **how)

    def by(self, **settings: Any) -> Place:
        """Return the same with other settings."""
        return replace(self, settings=Settings(**settings))


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A K2 of two layers, one of them with eight experts. Not to be changed by a test."""
    folder = tmp_path_factory.mktemp("solve")
    write_model(folder / "model")
    rows = [{"text": f"The square of {n} is {n * n}."} for n in range(150)]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = load_tokenizer(folder / "model")
    samples = read_samples(data, tokenizer, samples=8, length=32, vocabulary=NANO["vocab_size"])
    return Place(folder / "model", data, samples)


@pytest.fixture(scope="session")
def made() -> Callable[[Path], dict[str, Any]]:
    """Give the function that returns all that a finished folder holds, but for times."""

    def found(folder: Path) -> dict[str, Any]:
        files: dict[str, Any] = {
            str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()
        }
        files = {name: data for name, data in files.items() if not name.startswith(".k2quant")}
        report = json.loads(files[REPORT])
        return files | {REPORT: {key: value for key, value in report.items() if key not in TIMES}}

    return found


@pytest.fixture(scope="session")
def whole(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model, solved in one go. Not to be changed by a test."""
    return place.solve(tmp_path_factory.mktemp("solved") / "out").folder
