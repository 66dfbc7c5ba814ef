"""Have every contestant load and run every checkpoint, each time in a fresh process, in turns."""

from __future__ import annotations

import datetime as dt
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from k2quant.formats.known import FormatName
from suites.common import machine, measure
from suites.models import sources as model_sources
from suites.models.sources import FORMATS, Model
from suites.models.worker import without_folders

HERE = Path(__file__).resolve().parent
OURS, PEER, PEER_LOOP = "k2quant", "transformers", "transformers, eager"
VARIANTS = {OURS: {OURS: ""}, PEER: {PEER: "", PEER_LOOP: "eager"}}
"""The contestants that a tool is, and what it is told about its experts: nothing, or to loop over them."""
PACKAGES = ["transformers", "compressed-tensors", "accelerate", "safetensors"]
RATES = ("prefill", "decode")


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What a contestant does with a model once it is loaded."""

    prompt: int = 32
    """Tokens before those that are decoded, and of the logits that are compared."""
    prefill: int = 512
    """Tokens of the prompt that is timed."""
    new_tokens: int = 64
    """Decoded in one sample; the first of them ends the prefill and is not timed."""
    batches: tuple[int, ...] = (1, 8)
    samples: int = 3
    """Of each rate in one process, after one that is not counted."""
    seconds: float = 8.0
    """No sample of a rate is begun after so long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One process: a tool with one format of one model."""

    model: Model
    form: FormatName
    tool: str
    backwards: bool = False
    """Whether the tool's contestants are measured in reverse."""

    @property
    def key(self) -> str:
        """Name it, such as `layer/int4/k2quant`."""
        return f"{self.model.name}/{self.form}/{self.tool}"

    @property
    def folder(self) -> Path:
        """Where the checkpoint lies."""
        return self.model.source(self.form) if self.tool == OURS else self.model.peer(self.form)

    @property
    def variants(self) -> dict[str, str]:
        """The contestants."""
        found = list(VARIANTS[self.tool].items())
        return dict(reversed(found) if self.backwards else found)


class Bench:
    """A run: its workloads by model, and the results, which are written after every process."""

    def __init__(self, file: Path, work: Path, command: str, only: str = "") -> None:
        """Take the file for results, the folder for everything else, and how what is measured must begin."""
        self.file, self.work, self.only = file, work, only
        self.data: dict[str, Any] = describe(work) | {"command": command, "models": {}, "cells": {}}

    def run(self, models: Sequence[tuple[Model, Workload]], repetitions: int) -> None:
        """Let the contestants take turns, the other way round every second time."""
        for model, workload in models:
            self.data["models"][model.name] = model.record() | {"workload": asdict(workload)}
            for form in {turn.form: None for turn in self._chosen(model)}:
                reference(model, form, workload, self.work)
        self.data["repetitions"] = repetitions
        for number in range(repetitions):
            for model, workload in models:
                for turn in self._chosen(model, backwards=number % 2 == 1):
                    self._take(turn, workload)

    def _chosen(self, model: Model, *, backwards: bool = False) -> list[Turn]:
        return [turn for turn in turns(model, backwards=backwards) if turn.key.startswith(self.only)]

    def _take(self, turn: Turn, workload: Workload) -> None:
        """Measure, unless it failed before, and keep a record for each contestant."""
        records = {name: self._record(turn, name) for name in turn.variants}
        if any("failed" in run for record in records.values() for run in record["runs"]):
            return  # it would fail again
        found = start(turn.tool, turn.form, turn.folder, turn.variants, workload, self.work)
        variants = found.pop("variants", {})
        for name, record in records.items():
            run = found | variants.get(name, {})
            if "failed" not in run:
                run |= differences(self.work / f"{name}.npy", turn.model.reference(turn.form))
            record["runs"].append(run)
            print(f"{turn.model.name}/{turn.form}/{name}: {line(run)}", flush=True)
        self.save()

    def _record(self, turn: Turn, name: str) -> dict[str, Any]:
        key = f"{turn.model.name}/{turn.form}/{name}"
        what = {"model": turn.model.name, "format": turn.form, "contestant": name, "runs": []}
        record: dict[str, Any] = self.data["cells"].setdefault(key, what)
        return record

    def save(self) -> None:
        """Write everything."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        partial = self.file.with_suffix(".partial")
        partial.write_text(json.dumps(self.data, indent=1) + "\n")
        partial.replace(self.file)


def turns(model: Model, *, backwards: bool) -> Iterator[Turn]:
    """Yield all tools with all formats of a model."""
    for form in FORMATS:
        for tool in reversed(VARIANTS) if backwards else VARIANTS:
            yield Turn(model=model, form=form, tool=tool, backwards=backwards)


def start(
    tool: str, form: FormatName, folder: Path, variants: dict[str, str], workload: Workload, work: Path, **more: Any
) -> dict[str, Any]:
    """Run a tool in a process of its own and return what it found, or why it failed.

    Args:
        tool: k2quant or transformers.
        form: bf16, fp8 or int4.
        folder: of the checkpoint.
        variants: contestants, and what each says about experts; logits go to `<contestant>.npy` in `work`.
        workload: what to run.
        work: folder for files.
        more: whatever else the job says, such as `only_logits`.
    """
    what = {"tool": tool, "format": form, "folder": str(folder), "variants": variants, "folder_out": str(work)}
    job, out = work / "job.json", work / "found.json"
    out.unlink(missing_ok=True)
    job.write_text(json.dumps({"only_logits": False} | asdict(workload) | what | more))
    measure.warm(folder)
    command = [sys.executable, "-P", str(HERE / "worker.py"), str(job)]  # no `kernels` beside it
    env = {"PYTHONPATH": str(machine.ROOT), "HF_HUB_OFFLINE": "1"}
    try:
        done = measure.run(command, log=work / "log.txt", env=env, sample=True)
    except SystemExit as error:
        lines = [text.strip() for text in str(error).splitlines() if text.strip()]
        return {"failed": f"the process ended: {without_folders(lines[-1])[:200]}"}
    found: dict[str, Any] = json.loads(out.read_text())
    return found | {"wall_s": done.wall_s, "peak_own": done.peak_private}


def reference(model: Model, form: FormatName, workload: Workload, work: Path) -> None:
    """Keep the logits of transformers on the values that a format holds, as BF16, unless they are there."""
    file = model.reference(form)
    if file.exists():
        return
    folder = model.peer(form) if form == "bf16" else model_sources.dequantized(model, form)
    found = start(PEER, "bf16", folder, {"reference": "eager"}, workload, work, only_logits=True)
    if form != "bf16":
        measure.remove(folder.parent)
    if "failed" in found:
        raise SystemExit(f"{model.name}/{form}: no reference: {found['failed']}")
    (work / "reference.npy").replace(file)


def differences(file: Path, reference: Path) -> dict[str, float]:
    """Return ||logits - reference|| / ||reference|| over all tokens, and the median of the same for each token.

    A token that rounding sends to another expert counts as much in the first as many others together.
    """
    found, wanted = np.load(file)[0], np.load(reference)[0]
    off, size = np.linalg.norm(found - wanted, axis=1), np.linalg.norm(wanted, axis=1)
    whole = np.linalg.norm(off) / np.linalg.norm(size)
    return {"difference": float(whole), "token_difference": float(np.median(off / size))}


def line(found: dict[str, Any]) -> str:
    """Return a line about one process."""
    if "failed" in found:
        return f"failed: {found['failed']}"
    rates = ", ".join(f"{name} {measure.median(found[name]):.3g}/s" for name in found if name.startswith(RATES))
    return f"loaded in {found['load_s']:.2f} s, {rates}, {found['wall_s']:.0f} s in all"


def describe(work: Path) -> dict[str, Any]:
    """Say where results come from."""
    found = machine.describe(work, sys.executable, sys.executable)
    versions = found["versions"]["k2quant"] | machine.versions(sys.executable, PACKAGES)
    return found | {"versions": versions, "date": dt.datetime.now(dt.UTC).date().isoformat()}
